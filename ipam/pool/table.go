package pool

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"sluice/internal/model"
)

// Mode is how a Table takes a request that it has seen before.
type Mode int

const (
	// Replayed: it may be Swarm's allocator telling a new leader what is so.
	Replayed Mode = iota
	// Exclusive: it is somebody else, who gets a refusal.
	Exclusive
)

// Table is one address space: its pools, their owners and leases, and where the
// last subnet came from. Plan methods only read it, Apply changes it. Not safe
// for concurrent use, except for any number of readers.
type Table struct {
	space string
	mode  Mode
	name  func(model.NetworkID) string

	pools map[netip.Prefix]*entry
	last  map[string]netip.Prefix // by List.Name: the subnet chosen last
}

// entry is a pool in the table.
type entry struct {
	*Leases
	id      ID
	owner   model.NetworkID
	gateway netip.Addr // in use, though it has no LeaseRecord
	epoch   uint64     // a lease of an older epoch is unconfirmed
	settled bool

	// given are the leases that somebody has asked for since the last replay began,
	// in this life of the process. Who asks for one of them is somebody else.
	given Set

	// listed are the leases that were in doubt until the managers' lists had them, and
	// that nobody has asked for since: Swarm's allocator may know nothing of them, and
	// never release them.
	listed Set

	// orphans are the leases that nobody was known to have at the last PlanConfirm,
	// by offset, with the time of the first one that found nobody. Who leases or asks
	// for the address again begins anew.
	orphans map[uint32]time.Time

	// released are the addresses given back lately, by offset, with the time of it:
	// a list that was asked for before may still show who had them.
	released map[uint32]time.Time

	// claimed: a bound pool was requested once more and no Bind has told yet by
	// whom. One bit and no count: the allocator works through one network at a
	// time, and a count would drift upwards with every replay.
	claimed bool

	// told is when Swarm's allocator last told of the network (Bind) in this life of the
	// process; former: another manager has led since, seen in this life. That one's
	// allocator may have ended the network, and given its subnet to another, and says
	// neither here. After a restart, what was ended meanwhile is found by the managers'
	// lists alone.
	told   time.Time
	former bool
}

// NewTable returns an empty address space. name turns a network's id into what
// a person calls it, for texts; nil shows the short id.
func NewTable(space string, mode Mode, name func(model.NetworkID) string) *Table {
	if name == nil {
		name = model.NetworkID.Short
	}
	return &Table{space: space, mode: mode, name: name,
		pools: make(map[netip.Prefix]*entry), last: make(map[string]netip.Prefix)}
}

// PoolRecord is a pool as the journal keeps it.
type PoolRecord struct {
	ID      ID
	Owner   model.NetworkID // "" until Bind
	Gateway netip.Addr      // zero without one
	Epoch   uint64          // from 1, raised by each replay
	Cursor  netip.Addr      // where the next search starts
	Settled bool            // addresses were handed out since creation or replay
}

// LeaseRecord is a leased address as the journal keeps it. The gateway stands in
// the PoolRecord instead.
type LeaseRecord struct {
	Subnet  netip.Prefix
	Address netip.Addr
	Epoch   uint64 // the pool's when the lease was made; 0 if it was adopted
}

// LastRecord is the subnet that was chosen last from a list.
type LastRecord struct {
	List   string
	Subnet netip.Prefix
}

// Change is what a decision does to a Table. All of it is to be journalled in
// one commit before Apply, except Soft, which a restart may forget.
type Change struct {
	DropPools  []ID          // with all their leases
	DropLeases []LeaseRecord // Epoch does not matter
	Pools      []PoolRecord  // made or rewritten
	Leases     []LeaseRecord // made or rewritten
	Last       []LastRecord
	Soft       Soft
}

// Soft is the part of a Change that lives in memory only. After a restart the
// confirmed leases are in question again, which costs nothing but another
// Confirm, whereas a disk write for each would slow down every replay; and a
// claim whose Bind did not come is forgotten, as it should be.
type Soft struct {
	Confirmed []LeaseRecord
	Listed    []LeaseRecord // of Confirmed: by the managers' lists alone
	Given     []LeaseRecord // leased to who has asked, by name or not
	Orphans   []Orphan
	Released  []Release
	Claims    []Claim
	Told      []Told
}

// Release is an address that was given back.
type Release struct {
	Subnet  netip.Prefix
	Address netip.Addr
	At      time.Time // zero: what is said of it from now on is younger
}

// Orphan is a lease that nobody is known to have.
type Orphan struct {
	Subnet  netip.Prefix
	Address netip.Addr
	Since   time.Time // zero: somebody has it after all
}

// Claim says whether the next Bind of a bound pool is awaited.
type Claim struct {
	Subnet  netip.Prefix
	Claimed bool
}

// Told is when a pool's network was told of, and whether another has led since.
type Told struct {
	Subnet netip.Prefix
	At     time.Time
	Former bool
}

// Durable reports whether there is something to journal.
func (c Change) Durable() bool {
	return len(c.DropPools)+len(c.DropLeases)+len(c.Pools)+len(c.Leases)+len(c.Last) > 0
}

// Apply carries out a Change that a Plan method of this table returned, with no
// other Apply in between. The order within is drop before make.
func (t *Table) Apply(c Change) {
	for _, id := range c.DropPools {
		delete(t.pools, id.Subnet)
	}
	for _, l := range c.DropLeases {
		if e := t.pools[l.Subnet]; e != nil {
			e.Release(l.Address)
			e.given.Remove(e.offset(l.Address))
			e.listed.Remove(e.offset(l.Address))
			delete(e.orphans, e.offset(l.Address))
		}
	}
	for _, r := range c.Pools {
		e := t.pools[r.ID.Subnet]
		if e == nil {
			leases, err := NewLeases(r.ID.Subnet, r.ID.Sub, t.mode == Replayed)
			if err != nil {
				continue // Plan and Restore have made the same call and looked
			}
			e = &entry{Leases: leases, id: r.ID, given: NewSet(sizeOf(r.ID.Subnet)), listed: NewSet(sizeOf(r.ID.Subnet)), orphans: make(map[uint32]time.Time), released: make(map[uint32]time.Time)}
			t.pools[r.ID.Subnet] = e
		}
		e.set(r)
	}
	for _, l := range c.Leases {
		if e := t.pools[l.Subnet]; e != nil {
			e.Take(l.Address)
			delete(e.orphans, e.offset(l.Address))
			delete(e.released, e.offset(l.Address))
			if l.Epoch != e.epoch {
				e.Doubt(l.Address)
			}
		}
	}
	for _, l := range c.Last {
		t.last[l.List] = l.Subnet
	}
	for _, l := range c.Soft.Confirmed {
		if e := t.pools[l.Subnet]; e != nil {
			e.Take(l.Address)
		}
	}
	for _, l := range c.Soft.Listed {
		if e := t.pools[l.Subnet]; e != nil {
			e.listed.Add(e.offset(l.Address))
		}
	}
	for _, l := range c.Soft.Given {
		if e := t.pools[l.Subnet]; e != nil {
			e.given.Add(e.offset(l.Address))
			e.listed.Remove(e.offset(l.Address))
			delete(e.orphans, e.offset(l.Address))
		}
	}
	for _, o := range c.Soft.Orphans {
		switch e := t.pools[o.Subnet]; {
		case e == nil:
		case o.Since.IsZero():
			delete(e.orphans, e.offset(o.Address))
		case e.Has(o.Address):
			e.orphans[e.offset(o.Address)] = o.Since
		}
	}
	for _, r := range c.Soft.Released {
		switch e := t.pools[r.Subnet]; {
		case e == nil:
		case r.At.IsZero():
			delete(e.released, e.offset(r.Address))
		default:
			e.released[e.offset(r.Address)] = r.At
		}
	}
	for _, cl := range c.Soft.Claims {
		if e := t.pools[cl.Subnet]; e != nil {
			e.claimed = cl.Claimed
		}
	}
	for _, x := range c.Soft.Told {
		if e := t.pools[x.Subnet]; e != nil {
			e.told, e.former = x.At, x.Former
		}
	}
}

// set takes over what a record says.
func (e *entry) set(r PoolRecord) {
	if e.epoch != r.Epoch { // a replay begins: everything is in doubt
		for i := range e.used.All() {
			e.open.Add(i)
		}
		e.given, e.listed = NewSet(sizeOf(e.subnet)), NewSet(sizeOf(e.subnet))
		clear(e.orphans)
	}
	if e.gateway.IsValid() && e.gateway != r.Gateway {
		e.Release(e.gateway)
	}
	if r.Gateway.IsValid() {
		e.Take(r.Gateway)
	}
	if e.owner != r.Owner {
		e.told, e.former = time.Time{}, false
	}
	e.owner, e.gateway, e.epoch, e.settled = r.Owner, r.Gateway, r.Epoch, r.Settled
	e.moveCursor(r.Cursor)
}

// record returns the entry as a record, to be changed and journalled.
func (e *entry) record() PoolRecord {
	return PoolRecord{ID: e.id, Owner: e.owner, Gateway: e.gateway, Epoch: e.epoch, Cursor: e.cursorAddr(), Settled: e.settled}
}

// lease returns the record of an address as it would be leased now.
func (e *entry) lease(a netip.Addr) LeaseRecord {
	return LeaseRecord{Subnet: e.id.Subnet, Address: a, Epoch: e.epoch}
}

// Restore returns the table that the records of a journal describe. Records that
// contradict each other are an error: a pool allocator that guesses hands out an
// address twice.
func Restore(t *Table, pools []PoolRecord, leases []LeaseRecord, last []LastRecord) error {
	for _, r := range pools {
		if r.ID.Space != t.space || r.Epoch == 0 {
			return fmt.Errorf("restore pool %s: not a pool of %s, or without an epoch", r.ID, t.space)
		}
		if _, err := NewLeases(r.ID.Subnet, r.ID.Sub, t.mode == Replayed); err != nil {
			return fmt.Errorf("restore pool %s: %w", r.ID, err)
		}
		if err := t.free(r.ID.Subnet); err != nil {
			return fmt.Errorf("restore pool %s: %w", r.ID, err)
		}
		if r.Gateway.IsValid() && !r.ID.Subnet.Contains(r.Gateway) {
			return fmt.Errorf("restore pool %s: gateway %s is outside", r.ID, r.Gateway)
		}
		t.Apply(Change{Pools: []PoolRecord{r}})
	}
	for _, l := range leases {
		e := t.pools[l.Subnet]
		if e == nil || !l.Subnet.Contains(l.Address) {
			return fmt.Errorf("restore lease %s: no pool %s", l.Address, l.Subnet)
		}
		if l.Address == e.gateway {
			return fmt.Errorf("restore lease %s: it is the gateway of pool %s", l.Address, l.Subnet)
		}
		t.Apply(Change{Leases: []LeaseRecord{l}})
	}
	t.Apply(Change{Last: last})
	return t.Check()
}

// Check returns the first broken invariant of the table, or nil: subnets are
// disjoint, a network owns at most one, leases are consistent (Leases.Check),
// gateways are leased and never in doubt.
func (t *Table) Check() error {
	owners := make(map[model.NetworkID]netip.Prefix)
	sorted := t.sorted()
	for i, e := range sorted {
		if i > 0 && sorted[i-1].id.Subnet.Overlaps(e.id.Subnet) {
			return fmt.Errorf("pool %s overlaps pool %s", sorted[i-1].id, e.id)
		}
		if t.pools[e.id.Subnet] != e || e.id.Space != t.space {
			return fmt.Errorf("pool %s is filed under another subnet or space", e.id)
		}
		if e.owner != "" {
			if other, twice := owners[e.owner]; twice {
				return fmt.Errorf("network %s owns pool %s and pool %s", e.owner, other, e.id.Subnet)
			}
			owners[e.owner] = e.id.Subnet
		}
		if e.gateway.IsValid() && (!e.Has(e.gateway) || e.Open(e.gateway)) {
			return fmt.Errorf("pool %s: gateway %s is not leased, or in doubt", e.id, e.gateway)
		}
		for i := range e.orphans {
			if a := at(e.subnet, i); !e.Has(a) || e.Open(a) || a == e.gateway {
				return fmt.Errorf("pool %s: %s is said to be nobody's, and is no confirmed lease", e.id, a)
			}
		}
		if err := e.Check(); err != nil {
			return err
		}
	}
	return nil
}

// Owners are the networks that own a pool, and whether each was told of since another
// manager led last.
func (t *Table) Owners() map[model.NetworkID]bool {
	out := make(map[model.NetworkID]bool, len(t.pools))
	for _, e := range t.pools {
		if e.owner != "" {
			out[e.owner] = !e.former
		}
	}
	return out
}

// Status is one pool of a table, for people.
type Status struct {
	ID          ID
	Network     model.NetworkID // "" until Bind
	Gateway     netip.Addr      // zero without one
	Nodes       netip.Prefix    // kept for nodes; zero if nothing is
	Used        int             // addresses in use, the gateway's included
	Free        int             // addresses that can still be handed out unasked
	Unconfirmed int             // of Used: not heard of since the last replay
}

// Status returns all pools in the order of their subnets.
func (t *Table) Status() []Status {
	var all []Status
	for _, e := range t.sorted() {
		all = append(all, Status{ID: e.id, Network: e.owner, Gateway: e.gateway, Nodes: e.nodes,
			Used: e.Used(), Free: e.Free(), Unconfirmed: e.Unconfirmed()})
	}
	return all
}

// Lease is one address in use, for people.
type Lease struct {
	Address     netip.Addr
	Gateway     bool
	Unconfirmed bool
	// Orphaned is since when nobody is known to have it; zero: somebody has, or
	// nobody has looked yet (PlanConfirm).
	Orphaned time.Time
}

// Leaked reports whether nobody has had the address for longer than LeakAfter.
func (l Lease) Leaked(now time.Time) bool {
	return !l.Orphaned.IsZero() && now.Sub(l.Orphaned) >= LeakAfter
}

// Listing is one pool with its addresses in use, in rising order.
type Listing struct {
	Status
	Leases []Lease
}

// List returns all pools in the order of their subnets.
func (t *Table) List() []Listing {
	var all []Listing
	for _, s := range t.Status() {
		all = append(all, Listing{Status: s, Leases: t.Leases(s.ID)})
	}
	return all
}

// Leases returns the addresses in use of a pool in rising order; none for a pool
// that is not there.
func (t *Table) Leases(id ID) []Lease {
	e, err := t.find(id)
	if err != nil {
		return nil
	}
	var all []Lease
	for i := range e.used.All() {
		a := at(e.subnet, i)
		all = append(all, Lease{Address: a, Gateway: a == e.gateway, Unconfirmed: e.Open(a), Orphaned: e.orphans[i]})
	}
	return all
}

func (t *Table) sorted() []*entry {
	return slices.SortedFunc(maps.Values(t.pools), func(a, b *entry) int {
		return cmp.Compare(number(a.id.Subnet.Addr()), number(b.id.Subnet.Addr()))
	})
}

// find returns the pool of an id.
func (t *Table) find(id ID) (*entry, error) {
	if e := t.pools[id.Subnet]; e != nil && e.id == id {
		return e, nil
	}
	if t.mode == Exclusive {
		return nil, refuse(ErrUnknownPool, "pool %s is not known: its network was removed, or the plugin's state was lost; remove the network and create it again", id)
	}
	return nil, refuse(ErrUnknownPool, "pool %s is not known: its network was removed, or the plugin's state was lost; it comes back as soon as the managers' networks are read; if it does not, the log says why", id)
}

// owned returns the pool of a network, or nil.
func (t *Table) owned(network model.NetworkID) *entry {
	for _, e := range t.pools {
		if e.owner == network && network != "" {
			return e
		}
	}
	return nil
}

// free returns nil if no pool overlaps the subnet, else a refusal that names the
// first one which does.
func (t *Table) free(subnet netip.Prefix) error {
	var other *entry
	for _, e := range t.pools {
		if e.id.Subnet.Overlaps(subnet) && (other == nil || e.id.Subnet.Addr().Less(other.id.Subnet.Addr())) {
			other = e
		}
	}
	if other == nil {
		return nil
	}
	return t.conflict(subnet, other)
}

func (t *Table) conflict(subnet netip.Prefix, other *entry) error {
	return refuse(ErrConflict, "pool %s overlaps %s (%s); choose another --subnet", subnet, t.who(other), other.id.Subnet)
}

// who names the owner of a pool.
func (t *Table) who(e *entry) string {
	if e.owner == "" {
		return "a pool that no network has taken yet"
	}
	return "network " + t.name(e.owner)
}
