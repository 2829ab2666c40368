package ipam

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// 10^5 take some seconds; a million has been run, see below.
var operations = flag.Int("ops", 100_000, "operations of TestManyOperationsKeepTheInvariants")

// swarm is what a swarm does with the allocator, and what it has been given.
type swarm struct {
	t     *testing.T
	rnd   *rand.Rand
	j     *fakeJournal
	a     *Allocator
	now   time.Time
	nets  map[model.NetworkID]*network
	names []model.NetworkID // of nets, in the order of their making
	made  int
	stats map[string]int
}

// network is one, with the addresses that services and tasks have.
type network struct {
	id      pool.ID
	gateway netip.Addr
	held    []netip.Addr
	at      map[netip.Addr]int  // index in held
	lost    map[netip.Addr]bool // leased, and nobody's
	cursor  netip.Addr          // the last address that was given unasked
	full    int                 // how many addresses can be given
}

// TestManyOperationsKeepTheInvariants: a swarm makes and removes networks of many
// sizes, gives and takes addresses, changes its leader, loses leases and restarts the
// process, while commits fail now and then. No address has two holders, none lies
// outside of its subnet or in what is kept for nodes; freed ones rest until the rest of
// the subnet was given; no two subnets overlap; what is refused is full or taken; counts
// are those of the set; the journal says the same as the memory; leaks are found, all of
// them and nothing else, and freed.
//
//	go test ./ipam -run ManyOperations -ops 1000000 -v
//
// runs a million and tells what it took.
func TestManyOperationsKeepTheInvariants(t *testing.T) {
	s := &swarm{
		t: t, rnd: rand.New(rand.NewPCG(7, 7)), j: newJournal(t), now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		nets: map[model.NetworkID]*network{}, stats: map[string]int{},
	}
	s.open()
	began := time.Now()
	for i := range *operations {
		s.j.fault = s.rnd.IntN(50) == 0
		s.step()
		s.j.fault = false
		// All of the state is compared now and then, as that takes a thousand times as long
		// as an operation.
		if i%2000 == 1999 || t.Failed() {
			s.check()
		}
		if t.Failed() {
			t.Fatalf("operation %d", i)
		}
	}
	s.check()
	for name := range s.nets {
		if err := s.a.Free(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if left := s.a.Pools(); len(left) > 0 {
		t.Errorf("left at the end: %+v", left)
	}
	for r := range s.j.records {
		if r.Kind != KindLast {
			t.Errorf("left in the journal: %+v", r)
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("%d operations in %s, %d MiB from the system, leaks left: 0; %v", *operations, time.Since(began).Round(time.Millisecond), m.Sys>>20, s.stats)
	for _, what := range []string{"network", "remove", "any", "asked", "taken", "release", "full", "leader", "lose", "freed", "restart", "fault"} {
		if s.stats[what] == 0 {
			t.Errorf("never happened: %s", what)
		}
	}
}

func (s *swarm) open() {
	a, err := Open(s.t.Context(), Config{Journal: s.j, Bits: 25, Supernets: []netip.Prefix{pfx("10.240.0.0/16")}, Now: func() time.Time { return s.now }})
	if err != nil {
		s.t.Fatal(err)
	}
	s.a = a
}

// step does one operation.
func (s *swarm) step() {
	if len(s.names) == 0 {
		s.create()
		return
	}
	name := s.names[s.rnd.IntN(len(s.names))]
	n := s.nets[name]
	switch op := s.rnd.IntN(2000); {
	case op < 4 && len(s.names) < 12:
		s.create()
	case op < 6:
		s.remove(name)
	case op < 10:
		s.leader(name, n)
	case op < 12:
		s.open()
		s.stats["restart"]++
	case op < 50:
		s.look(name, n)
	case op < 60:
		s.lose(n)
	case op < 200:
		s.ask(n)
	case op < 1120: // a little more than are released: subnets fill up
		s.request(n)
	default:
		s.release(n)
	}
}

// failed counts what the journal refused, and reports whether err is that.
func (s *swarm) failed(err error) bool {
	if errors.Is(err, errFault) {
		s.stats["fault"]++
		return true
	}
	return false
}

func (s *swarm) create() {
	ctx := s.t.Context()
	s.made++
	name := model.NetworkID(fmt.Sprintf("n%d", s.made))
	req := PoolRequest{Space: GlobalSpace}
	if s.rnd.IntN(2) == 0 {
		req.Pool = fmt.Sprintf("10.%d.%d.0/%d", 1+s.rnd.IntN(3), 16*s.rnd.IntN(16), 20+s.rnd.IntN(10))
	}
	if slices.ContainsFunc(s.names, func(o model.NetworkID) bool { return s.nets[o].id.Subnet.String() == req.Pool }) {
		return // that would be a replay, until it is bound
	}
	r, err := s.a.RequestPool(ctx, req)
	overlaps := func(p netip.Prefix) bool {
		return slices.ContainsFunc(s.names, func(o model.NetworkID) bool { return s.nets[o].id.Subnet.Overlaps(p) })
	}
	if s.failed(err) {
		return
	}
	if req.Pool != "" && (err == nil) == overlaps(pfx(req.Pool)) || req.Pool == "" && err != nil {
		s.t.Errorf("network %s with subnet %q: %v", name, req.Pool, err)
	}
	if err != nil {
		return
	}
	if overlaps(r.Pool) {
		s.t.Errorf("subnet %s overlaps another", r.Pool)
	}
	id, err := pool.ParseID(r.PoolID)
	gw, gwerr := s.a.RequestAddress(ctx, AddressRequest{PoolID: r.PoolID, Options: map[string]string{pool.KeyAddressType: pool.TypeGateway, pool.KeySerial: "true"}})
	if err = errors.Join(err, gwerr); err == nil {
		err = s.a.Bind(ctx, name, r.Pool, false)
	}
	if s.failed(err) { // the engine undoes what it has asked for
		s.j.fault = false
		if err := s.a.ReleasePool(ctx, ReleasePoolRequest{r.PoolID}); err != nil {
			s.t.Error(err)
		}
		return
	}
	if err != nil {
		s.t.Error(err)
		return
	}
	full := 1<<(32-r.Pool.Bits()) - 3 // network, broadcast, gateway
	if nodes, kept := pool.NodeRange(r.Pool); kept {
		full -= 1<<(32-nodes.Bits()) - 1 // the broadcast address is one of them
	}
	s.nets[name] = &network{id: id, gateway: gw.Address.Addr(), at: map[netip.Addr]int{}, lost: map[netip.Addr]bool{}, full: full}
	s.names = append(s.names, name)
	s.stats["network"]++
}

func (s *swarm) remove(name model.NetworkID) {
	if err := s.a.Free(s.t.Context(), name); s.failed(err) {
		return
	} else if err != nil {
		s.t.Error(err)
	}
	delete(s.nets, name)
	s.names = slices.DeleteFunc(s.names, func(o model.NetworkID) bool { return o == name })
	s.stats["remove"]++
}

// take notes a new holder.
func (s *swarm) take(n *network, a netip.Addr) {
	_, twice := n.at[a]
	nodes, kept := pool.NodeRange(n.id.Subnet)
	if twice || n.lost[a] || a == n.gateway {
		s.t.Errorf("%s of %s has a holder already", a, n.id)
	}
	if !n.id.Subnet.Contains(a) || a == n.id.Subnet.Addr() || !n.id.Subnet.Contains(a.Next()) || kept && nodes.Contains(a) {
		s.t.Errorf("%s of %s is not one to be given", a, n.id)
	}
	n.at[a], n.held = len(n.held), append(n.held, a)
}

func (s *swarm) request(n *network) {
	r, err := s.a.RequestAddress(s.t.Context(), AddressRequest{PoolID: n.id.String(), Options: map[string]string{pool.KeySerial: "true"}})
	full := len(n.held)+len(n.lost) == n.full
	switch a := r.Address.Addr(); {
	case s.failed(err):
	case err != nil && full && errors.Is(err, pool.ErrExhausted):
		s.stats["full"]++
	case err != nil:
		s.t.Errorf("%s: %d of %d addresses are had: %v", n.id, len(n.held), n.full, err)
	default:
		s.take(n, a)
		s.rested(n, a)
		n.cursor = a
		s.stats["any"]++
	}
}

// rested: between the address given last and this one, none was free.
func (s *swarm) rested(n *network, a netip.Addr) {
	if !n.cursor.IsValid() {
		return
	}
	for x := n.cursor.Next(); x != a; x = x.Next() {
		if nodes, kept := pool.NodeRange(n.id.Subnet); kept && nodes.Contains(x) || !n.id.Subnet.Contains(x.Next()) {
			x = n.id.Subnet.Addr() // and on with the first
			continue
		}
		if _, held := n.at[x]; !held && !n.lost[x] && x != n.gateway {
			s.t.Errorf("%s of %s was given though %s is free and was given longer ago", a, n.id, x)
			return
		}
	}
}

// ask asks for an address by its name, as docker run --ip does. What has a holder is
// not asked for: after a restart of the process the first who asks gets it.
func (s *swarm) ask(n *network) {
	b := n.id.Subnet.Addr().As4()
	i := s.rnd.IntN(1 << (32 - n.id.Subnet.Bits()))
	b[2], b[3] = b[2]+byte(i>>8), b[3]+byte(i)
	a := netip.AddrFrom4(b)
	if _, held := n.at[a]; held || n.lost[a] {
		return
	}
	nodes, kept := pool.NodeRange(n.id.Subnet)
	usable := a != n.gateway && a != n.id.Subnet.Addr() && n.id.Subnet.Contains(a.Next()) && !(kept && nodes.Contains(a))
	_, err := s.a.RequestAddress(s.t.Context(), AddressRequest{PoolID: n.id.String(), Address: a.String(), Options: map[string]string{pool.KeySerial: "true"}})
	switch {
	case s.failed(err):
		return
	case (err == nil) != usable:
		s.t.Errorf("%s of %s, usable %t: %v", a, n.id, usable, err)
	case err != nil:
		s.stats["taken"]++
		return
	}
	s.take(n, a)
	s.stats["asked"]++
	// Until a leader hands out by itself, its search begins behind what it was told.
	n.cursor = netip.Addr{}
}

func (s *swarm) drop(n *network, i int) netip.Addr {
	a, last := n.held[i], n.held[len(n.held)-1]
	n.held[i], n.at[last] = last, i
	n.held = n.held[:len(n.held)-1]
	delete(n.at, a)
	return a
}

func (s *swarm) release(n *network) {
	if len(n.held) == 0 {
		return
	}
	i := s.rnd.IntN(len(n.held))
	if err := s.a.ReleaseAddress(s.t.Context(), ReleaseAddressRequest{n.id.String(), n.held[i].String()}); s.failed(err) {
		return
	} else if err != nil {
		s.t.Error(err)
	}
	s.drop(n, i)
	s.stats["release"]++
}

// lose ends a holder without a release: the lease is a leak.
func (s *swarm) lose(n *network) {
	if len(n.held) > 0 {
		n.lost[s.drop(n, s.rnd.IntN(len(n.held)))] = true
		s.stats["lose"]++
	}
}

// leader is a change of it: the new one says all again, and compares.
func (s *swarm) leader(name model.NetworkID, n *network) {
	ctx := s.t.Context()
	s.j.fault = false // the allocator would try again
	_, err := s.a.RequestPool(ctx, PoolRequest{Space: GlobalSpace, Pool: n.id.Subnet.String()})
	if err == nil {
		_, err = s.a.RequestAddress(ctx, AddressRequest{PoolID: n.id.String(), Address: n.gateway.String(), Options: map[string]string{pool.KeyAddressType: pool.TypeGateway, pool.KeySerial: "true"}})
	}
	if err == nil {
		err = s.a.Bind(ctx, name, n.id.Subnet, true)
	}
	if err != nil {
		s.t.Error(err)
	}
	for i, a := range n.held {
		if i%16 == 15 {
			continue // a task that runs already: it is not said again
		}
		if _, err := s.a.RequestAddress(ctx, AddressRequest{PoolID: n.id.String(), Address: a.String(), Options: map[string]string{pool.KeySerial: "true"}}); err != nil {
			s.t.Errorf("replay of %s of %s: %v", a, n.id, err)
		}
	}
	found, err := s.a.Confirm(ctx, name, n.held, s.now.Add(1))
	if err != nil || len(found.Dropped) != len(n.lost) || len(found.Adopted) > 0 {
		s.t.Errorf("%s after a change of leader: %v, %+v; %d leases were lost", n.id, err, found, len(n.lost))
	}
	clear(n.lost)
	n.cursor = netip.Addr{}
	s.stats["leader"]++
}

// look compares with the lists twice, as far apart as makes a leak free.
func (s *swarm) look(name model.NetworkID, n *network) {
	s.j.fault = false
	for i := range 2 {
		s.now = s.now.Add(pool.FreeAfter * time.Duration(i)).Add(1)
		found, err := s.a.Confirm(s.t.Context(), name, n.held, s.now)
		for _, a := range found.Dropped { // in doubt since a restart of the process
			if !n.lost[a] {
				s.t.Errorf("%s of %s was dropped", a, n.id)
			}
			delete(n.lost, a)
		}
		if err != nil || len(found.Adopted) > 0 {
			s.t.Errorf("%s: %v, %+v", n.id, err, found)
		}
		if i == 0 {
			s.now = s.now.Add(pool.LeakAfter)
			for _, l := range s.leases(n) {
				if l.Leaked(s.now) != n.lost[l.Address] {
					s.t.Errorf("%s of %s: leaked %t, lost %t", l.Address, n.id, l.Leaked(s.now), n.lost[l.Address])
				}
			}
			continue
		}
		if len(found.Freed) != len(n.lost) {
			s.t.Errorf("%s: freed %v of %v", n.id, found.Freed, n.lost)
		}
		s.stats["freed"] += len(found.Freed)
		clear(n.lost)
	}
}

func (s *swarm) leases(n *network) []pool.Lease {
	for _, l := range s.a.Pools() {
		if l.ID == n.id {
			return l.Leases
		}
	}
	return nil
}

// check compares all of the state with what the swarm has, and with what the journal
// says.
func (s *swarm) check() {
	if err := s.a.table.Check(); err != nil {
		s.t.Error(err)
	}
	all := s.a.Pools()
	if len(all) != len(s.nets) {
		s.t.Errorf("%d pools for %d networks", len(all), len(s.nets))
	}
	for _, l := range all {
		n := s.nets[l.Network]
		if n == nil || n.id != l.ID || n.gateway != l.Gateway {
			s.t.Errorf("pool %+v for %+v", l.Status, n)
			continue
		}
		if want := len(n.held) + len(n.lost) + 1; l.Used != want || len(l.Leases) != want || l.Free != n.full+1-want {
			s.t.Errorf("%s: %d used, %d leases, %d free; want %d of %d", l.ID, l.Used, len(l.Leases), l.Free, want, n.full+1)
		}
		for _, x := range l.Leases {
			if _, held := n.at[x.Address]; !held && !n.lost[x.Address] && x.Address != n.gateway {
				s.t.Errorf("%s of %s is leased to nobody that was given it", x.Address, l.ID)
			}
		}
	}
	again, err := Open(s.t.Context(), Config{Journal: s.j})
	if err != nil {
		s.t.Error(err)
		return
	}
	// Doubts and orphans are of one life.
	strip := func(all []pool.Listing) (out []string) {
		for _, l := range all {
			for _, x := range l.Leases {
				out = append(out, fmt.Sprint(l.ID, l.Network, x.Address, x.Gateway))
			}
		}
		return out
	}
	if have, want := strip(again.Pools()), strip(all); !slices.Equal(have, want) {
		s.t.Errorf("the journal has %d leases, the memory %d, or others", len(have), len(want))
	}
}
