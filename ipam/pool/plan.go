package pool

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sluice/internal/model"
)

// PlanFresh decides which subnet a network gets that asked for none: the next
// of the list that overlaps neither a pool nor a prefix of avoid (the routes of
// this host). Two calls never give the same one as long as the first is held:
// libnetwork asks again, holding what it has, until it likes the answer.
// Errors: ErrInvalid, ErrExhausted.
func (t *Table) PlanFresh(list List, avoid []netip.Prefix) (ID, Change, error) {
	taken := make([]netip.Prefix, 0, len(t.pools))
	for subnet := range t.pools {
		taken = append(taken, subnet)
	}
	subnet, err := list.choose(t.last[list.Name], taken, avoid)
	if err != nil {
		return ID{}, Change{}, err
	}
	id := ID{Space: t.space, Subnet: subnet}
	return id, Change{
		Pools: []PoolRecord{{ID: id, Epoch: 1}},
		Last:  []LastRecord{{List: list.Name, Subnet: subnet}},
	}, nil
}

// PlanClaim decides about a subnet that was asked for, with sub the range to
// hand addresses out of, or zero. A Replayed table accepts a pool that it has:
// a new leader is told of every network in this way, and which network it is
// becomes known at Bind. Errors: ErrInvalid, ErrConflict.
func (t *Table) PlanClaim(subnet, sub netip.Prefix) (ID, Change, error) {
	id := ID{Space: t.space, Subnet: subnet, Sub: sub}
	if e := t.pools[subnet]; e != nil && t.mode == Replayed && e.id == id {
		if e.owner == "" {
			return id, Change{}, nil
		}
		return id, Change{Soft: Soft{Claims: []Claim{{Subnet: subnet, Claimed: true}}}}, nil
	}
	if _, err := NewLeases(subnet, sub, t.mode == Replayed); err != nil {
		return ID{}, Change{}, err
	}
	if err := t.free(subnet); err != nil {
		return ID{}, Change{}, err
	}
	return id, Change{Pools: []PoolRecord{{ID: id, Epoch: 1}}}, nil
}

// PlanReleasePool decides what the engine's ReleasePool does. It always
// succeeds, and drops the leases with the pool: after `service rm` and `network
// rm` in one breath the addresses' own releases come later or never.
//
// In a Replayed table it does not touch a pool that is bound: the engine frees
// the network first (PlanFree), so a release of a bound pool comes from a
// network that Bind refused and that never owned it.
func (t *Table) PlanReleasePool(id ID) Change {
	e, err := t.find(id)
	switch {
	case err != nil:
		return Change{}
	case t.mode == Replayed && e.owner != "":
		return Change{Soft: Soft{Claims: []Claim{{Subnet: id.Subnet}}}}
	}
	return Change{DropPools: []ID{id}}
}

// Want is a request for an address.
type Want struct {
	Address netip.Addr // zero: any
	Gateway bool       // for the network's gateway
	Serial  bool       // from Swarm's allocator (KeySerial)
}

// PlanAddress decides which address a request gets.
// Errors: ErrUnknownPool, ErrInvalid, ErrInUse, ErrConflict, ErrExhausted.
func (t *Table) PlanAddress(id ID, w Want) (netip.Addr, Change, error) {
	e, err := t.find(id)
	switch {
	case err != nil:
		return netip.Addr{}, Change{}, err
	case w.Gateway:
		return t.planGateway(e, w.Address)
	case w.Address.IsValid():
		return t.planAsked(e, w)
	}
	a, ok := e.Next()
	if !ok {
		return a, Change{}, e.exhausted()
	}
	r := e.record()
	r.Cursor, r.Settled = e.after(a), true
	l := []LeaseRecord{e.lease(a)}
	return a, Change{Pools: []PoolRecord{r}, Leases: l, Soft: Soft{Given: l}}, nil
}

// planGateway gives a pool its one gateway: the same again when it has one, and
// outside of the sub-pool too, as it serves the whole subnet.
func (t *Table) planGateway(e *entry, a netip.Addr) (netip.Addr, Change, error) {
	if a.IsValid() {
		if err := e.Allowed(a); err != nil {
			return netip.Addr{}, Change{}, err
		}
	}
	if e.gateway.IsValid() {
		switch {
		case !a.IsValid() || a == e.gateway:
			return e.gateway, Change{}, nil
		case e.owner != "" || t.mode == Exclusive:
			return netip.Addr{}, Change{}, refuse(ErrConflict, "pool %s belongs to %s with gateway %s, so %s cannot be its gateway; choose another --subnet", e.subnet, t.who(e), e.gateway, a)
		}
		// Nobody's pool with the gateway of a network that never came to be:
		// the new one takes its place.
	}
	if !a.IsValid() {
		var ok bool
		if a, ok = e.First(); !ok {
			return a, Change{}, e.exhausted()
		}
	}
	r := e.record()
	r.Gateway = a
	c := Change{Pools: []PoolRecord{r}}
	if e.Has(a) {
		if t.mode == Exclusive {
			return netip.Addr{}, Change{}, inUse(e, a)
		}
		c.DropLeases = []LeaseRecord{e.lease(a)} // from now on it stands in the pool's record
	}
	return a, c, nil
}

// planAsked leases an address that was asked for by name.
//
// A Replayed table accepts one that is leased already, of a bound pool or when
// the allocator asks: at each change of leader it names every virtual IP and
// every task's address again, having released none. It names each once, so a
// second request is somebody else's, such as `docker run --ip` with an address
// in use, and is refused. Swarm itself does not look, and would release the
// address of both with the first that ends. After a start of the process the
// first request is accepted whatever it is; without a bound pool, which is
// another driver's network, replays are not seen to begin and all are.
func (t *Table) planAsked(e *entry, w Want) (netip.Addr, Change, error) {
	a := w.Address
	if err := e.Allowed(a); err != nil {
		return netip.Addr{}, Change{}, err
	}
	if a == e.gateway {
		return netip.Addr{}, Change{}, refuse(ErrInUse, "address %s is the gateway of pool %s; choose another address", a, e.subnet)
	}
	if e.Has(a) {
		if t.mode == Exclusive || e.owner == "" && !w.Serial || e.owner != "" && e.given.Has(e.offset(a)) {
			return netip.Addr{}, Change{}, inUse(e, a)
		}
		return a, Change{Soft: Soft{Confirmed: []LeaseRecord{e.lease(a)}, Given: []LeaseRecord{e.lease(a)}}}, nil
	}
	c := Change{Leases: []LeaseRecord{e.lease(a)}, Soft: Soft{Given: []LeaseRecord{e.lease(a)}}}
	if r := e.record(); t.mode == Replayed && !e.settled && e.automatic(e.offset(a)) && e.offset(a) >= e.cursor {
		// A leader that hears of old leases hands out what lies behind them, as
		// the one before it would have, so that what that one got back rests.
		// Once it hands out by itself, an address asked for moves nothing.
		r.Cursor = e.after(a)
		c.Pools = []PoolRecord{r}
	}
	return a, c, nil
}

func inUse(e *entry, a netip.Addr) error {
	return refuse(ErrInUse, "address %s of pool %s is in use; choose another address or leave the choice to sluice", a, e.subnet)
}

// PlanReleaseAddress decides what the engine's ReleaseAddress does. It always
// succeeds. The gateway of a bound pool stays: it leaves with the pool, and who
// gives it back alone is a network that Bind refused. now is for PlanConfirm, whose
// lists may be older than the release.
func (t *Table) PlanReleaseAddress(id ID, a netip.Addr, now time.Time) Change {
	e, err := t.find(id)
	switch {
	case err != nil || !e.Has(a):
		return Change{}
	case a != e.gateway:
		return Change{
			DropLeases: []LeaseRecord{e.lease(a)},
			Soft:       Soft{Released: []Release{{Subnet: e.subnet, Address: a, At: now}}},
		}
	case t.mode == Replayed && e.owner != "":
		return Change{}
	}
	r := e.record()
	r.Gateway = netip.Addr{}
	return Change{Pools: []PoolRecord{r}}
}

// PlanBind decides whether a network may have a subnet. A pool that was not
// requested here (the network uses another IPAM, or the state was lost) is made.
//
// The same network with the same subnet again is a replay: all leases but the
// gateway's are in doubt until they are asked for again or PlanConfirm looks at
// them. Nothing is dropped here: who has not been replayed yet is not gone.
//
// held are the addresses of endpoints that exist on the nodes. Those without a
// lease are leased, in doubt: Swarm's new leader deletes the tasks that the last
// one was removing, replays nothing of them, and asks for new addresses in the
// same moment, while their containers still run.
//
// again: a leader has allocated it before. Then the owner of the same subnet gives way if
// it was told of before another manager led, and not since: that one ended it, or could
// not have given the subnet away. What nobody has allocated yet gets nothing by that, as
// the owner may not have been told of yet.
// Errors: ErrInvalid, ErrConflict.
func (t *Table) PlanBind(network model.NetworkID, subnet netip.Prefix, held []netip.Addr, again bool) (Change, error) {
	if network == "" {
		return Change{}, refuse(ErrInvalid, "pool %s cannot be bound to a network without an id", subnet)
	}
	if err := checkSubnet(subnet); err != nil {
		return Change{}, err
	}
	if has := t.owned(network); has != nil && has.id.Subnet != subnet {
		return Change{}, refuse(ErrConflict, "network %s has subnet %s and cannot have %s too: sluice networks have one IPv4 subnet; leave out the second --subnet", t.name(network), has.id.Subnet, subnet)
	}
	e := t.pools[subnet]
	if e == nil {
		if err := t.free(subnet); err != nil {
			return Change{}, err
		}
		return Change{Pools: []PoolRecord{{ID: ID{Space: t.space, Subnet: subnet}, Owner: network, Epoch: 1}}}, nil
	}
	other := e.owner != "" && e.owner != network
	if other && !(e.former && again) {
		return Change{}, t.conflict(subnet, e)
	}
	r := e.record()
	r.Owner = network
	if t.mode == Replayed {
		r.Settled = false
		if e.leased() {
			r.Epoch++
		}
	}
	c := Change{Soft: Soft{Claims: []Claim{{Subnet: subnet}}}}
	if r != e.record() {
		c.Pools = []PoolRecord{r}
	}
	there := e.among(held)
	if other {
		c.DropLeases = slices.DeleteFunc(e.leases(), func(l LeaseRecord) bool { return there.Has(e.offset(l.Address)) })
	}
	if t.mode == Replayed {
		c.Leases = e.adopt(there)
	}
	return c, nil
}

var errAsked = errors.New("somebody asks for it, and no network has taken it yet")

// Lost is a pool as the managers list it.
type Lost struct {
	Network     model.NetworkID
	Subnet, Sub netip.Prefix // Sub: zero without --ip-range
	Gateway     netip.Addr   // zero without one
	Live        []netip.Addr // addresses of virtual IPs and tasks
}

// PlanRecover decides about a network whose pool was lost with the journal: Swarm asks
// for addresses of it all the same, and tells of it again only when another manager
// leads. It is made in one change with the leases of all who have an address, in doubt,
// so that none of these is ever handed out again. New addresses come from behind the
// highest of them: what lies between may have been given back a moment ago.
//
// A pool that is there stays as it is. One that is asked for just now is an error that
// is no *Error: who asks will have told in a moment.
// Errors: ErrInvalid, ErrConflict.
func (t *Table) PlanRecover(l Lost) (Change, error) {
	if t.owned(l.Network) != nil {
		return Change{}, nil
	}
	if e := t.pools[l.Subnet]; e != nil && e.owner == "" {
		return Change{}, fmt.Errorf("pool %s: %w", l.Subnet, errAsked)
	}
	leases, err := NewLeases(l.Subnet, l.Sub, t.mode == Replayed)
	if err != nil {
		return Change{}, err
	}
	if err := t.free(l.Subnet); err != nil {
		return Change{}, err
	}
	r := PoolRecord{ID: ID{Space: t.space, Subnet: l.Subnet, Sub: l.Sub}, Owner: l.Network, Epoch: 1, Settled: true, Cursor: leases.cursorAddr()}
	if leases.Allowed(l.Gateway) == nil {
		r.Gateway = l.Gateway
		leases.Take(l.Gateway)
	}
	c := Change{}
	for _, a := range l.Live {
		if leases.Allowed(a) != nil || leases.Has(a) {
			continue
		}
		leases.Take(a)
		c.Leases = append(c.Leases, LeaseRecord{Subnet: l.Subnet, Address: a}) // epoch 0: unconfirmed
		if leases.automatic(leases.offset(a)) && !a.Less(r.Cursor) {
			r.Cursor = leases.after(a)
		}
	}
	c.Pools = []PoolRecord{r}
	return c, nil
}

// among is the set of those addresses that the pool may lease.
func (e *entry) among(addrs []netip.Addr) Set {
	s := NewSet(sizeOf(e.subnet))
	for _, a := range addrs {
		if e.Allowed(a) == nil {
			s.Add(e.offset(a))
		}
	}
	return s
}

// adopt leases those of the addresses that have no lease, unconfirmed.
func (e *entry) adopt(addrs Set) []LeaseRecord {
	var out []LeaseRecord
	for i := range addrs.All() {
		if !e.used.Has(i) {
			out = append(out, LeaseRecord{Subnet: e.subnet, Address: at(e.subnet, i)}) // epoch 0: unconfirmed
		}
	}
	return out
}

// leased reports whether anything but the gateway is leased.
func (e *entry) leased() bool {
	if e.gateway.IsValid() {
		return e.Used() > 1
	}
	return e.Used() > 0
}

// PlanFree decides what the end of a network does: its pool goes with all
// leases, whatever releases follow. A pool that somebody requested once more
// meanwhile stays for the Bind to come, without the leases. It always succeeds.
func (t *Table) PlanFree(network model.NetworkID) Change {
	e := t.owned(network)
	if e == nil {
		return Change{}
	}
	if !e.claimed {
		return Change{DropPools: []ID{e.id}}
	}
	r := e.record()
	r.Owner = ""
	c := Change{Pools: []PoolRecord{r}, Soft: Soft{Claims: []Claim{{Subnet: e.id.Subnet}}}}
	c.DropLeases = e.leases()
	return c
}

// leases are those of an entry, but for the gateway's.
func (e *entry) leases() []LeaseRecord {
	var out []LeaseRecord
	for i := range e.used.All() {
		if a := at(e.subnet, i); a != e.gateway {
			out = append(out, e.lease(a))
		}
	}
	return out
}

// PlanTold decides what it does that Swarm's allocator tells of a network, at a time.
func (t *Table) PlanTold(network model.NetworkID, at time.Time) Change {
	e := t.owned(network)
	if e == nil {
		return Change{}
	}
	return Change{Soft: Soft{Told: []Told{{Subnet: e.id.Subnet, At: at}}}}
}

// PlanFollow decides what it does that another manager led at a time: what was told of
// before is of a former lead.
func (t *Table) PlanFollow(at time.Time) Change {
	c := Change{}
	for _, e := range t.pools {
		if e.owner != "" && !e.former && e.told.Before(at) {
			c.Soft.Told = append(c.Soft.Told, Told{Subnet: e.id.Subnet, At: e.told, Former: true})
		}
	}
	return c
}
