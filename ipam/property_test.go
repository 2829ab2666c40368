package ipam

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

func TestAllocatorDoesWhatItsSpecSays(t *testing.T) {
	for _, scope := range []Scope{ScopeGlobal, ScopeLocal} {
		t.Run(fmt.Sprintf("scope %d", scope), func(t *testing.T) {
			for seed := range uint64(5) {
				walk(t, scope, seed, 10_000) // 5 walks of 10000 for each of 2 scopes: 10^5 calls
				if t.Failed() {
					return
				}
			}
		})
	}
}

// walk makes random calls with seeded faults of the journal and restarts, and
// compares the allocator with its spec after each.
func walk(t *testing.T, scope Scope, seed uint64, steps int) {
	rnd := rand.New(rand.NewPCG(seed, uint64(scope)))
	j := newJournal(t)
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	config := Config{Scope: scope, Journal: j, Now: func() time.Time { return now }, Supernets: []netip.Prefix{pfx("10.3.0.0/25")}, Bits: 27}
	a, err := Open(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	s := &spec{shared: scope == ScopeGlobal, pools: map[netip.Prefix]*specPool{}}
	space := a.space
	subnets := []netip.Prefix{pfx("10.1.0.0/28"), pfx("10.1.0.0/24"), pfx("10.1.0.128/26"), pfx("10.2.0.0/29"), pfx("10.3.0.32/27"), pfx("10.4.0.0/30")}
	networks := []string{"n1", "n2", "n3", "n4"}
	counts := map[string]int{}

	anyID := func() pool.ID {
		if len(s.pools) > 0 && rnd.IntN(8) > 0 {
			all := a.Snapshot()
			return all[rnd.IntN(len(all))].ID
		}
		return pool.ID{Space: space, Subnet: subnets[rnd.IntN(len(subnets))]}
	}
	anyAddr := func(p netip.Prefix) netip.Addr {
		b := p.Addr().As4()
		b[3] += byte(rnd.IntN(1<<(32-p.Bits()) + 2)) // two more: some are outside
		return netip.AddrFrom4(b)
	}
	for step := range steps {
		j.fault = rnd.IntN(10) == 0
		var what string
		var err error
		var expect bool       // success
		var apply = func() {} // on the spec, if the call succeeds
		switch op := rnd.IntN(20); {
		case op < 2:
			what = "fresh pool"
			var r PoolReply
			r, err = a.RequestPool(t.Context(), PoolRequest{Space: space})
			for _, c := range []string{"10.3.0.0/27", "10.3.0.32/27", "10.3.0.64/27", "10.3.0.96/27"} {
				expect = expect || !s.overlaps(pfx(c))
			}
			apply = func() {
				if s.overlaps(r.Pool) || r.Pool.Bits() != 27 {
					t.Errorf("fresh pool %s overlaps", r.Pool)
				}
				s.add(pool.ID{Space: space, Subnet: r.Pool})
			}
		case op < 4:
			id := pool.ID{Space: space, Subnet: subnets[rnd.IntN(len(subnets))]}
			req := PoolRequest{Space: space, Pool: id.Subnet.String()}
			if rnd.IntN(3) == 0 {
				id.Sub = netip.PrefixFrom(anyAddr(id.Subnet), id.Subnet.Bits()+1).Masked()
				req.SubPool = id.Sub.String()
			}
			what = "pool " + id.String()
			_, err = a.RequestPool(t.Context(), req)
			have := s.find(id)
			fits := !id.Sub.IsValid() || id.Subnet.Contains(id.Sub.Addr())
			expect = fits && (!s.overlaps(id.Subnet) || s.shared && have != nil)
			apply = func() {
				if have == nil {
					s.add(id)
				} else if have.owner != "" {
					have.claimed = true
				}
			}
		case op < 5:
			id := anyID()
			what = "release pool " + id.String()
			err, expect = a.ReleasePool(t.Context(), ReleasePoolRequest{id.String()}), true
			apply = func() {
				if p := s.find(id); p != nil && s.shared && p.owner != "" {
					p.claimed = false
				} else if p != nil {
					delete(s.pools, id.Subnet)
				}
			}
		case op < 9:
			id := anyID()
			what = "any address of " + id.String()
			var r AddressReply
			r, err = a.RequestAddress(t.Context(), AddressRequest{PoolID: id.String()})
			p := s.find(id)
			expect = p != nil && len(p.room(s.shared, false)) > 0
			apply = func() {
				if !slices.Contains(p.room(s.shared, false), r.Address.Addr()) || r.Address.Bits() != id.Subnet.Bits() {
					t.Errorf("%s: got %s, which is not free", what, r.Address)
				}
				delete(p.released, r.Address.Addr())
				p.leases[r.Address.Addr()] = &specLease{epoch: p.epoch, sure: true, given: true}
			}
		case op < 12:
			id := anyID()
			addr, serial := anyAddr(id.Subnet), rnd.IntN(2) == 0
			what = fmt.Sprintf("address %s of %s, serial %t", addr, id, serial)
			req := AddressRequest{PoolID: id.String(), Address: addr.String()}
			if serial {
				req.Options = map[string]string{"com.docker.network.ipam.serial": "true"}
			}
			_, err = a.RequestAddress(t.Context(), req)
			p := s.find(id)
			expect = p != nil && p.usable(addr, s.shared) && addr != p.gw &&
				(!p.taken(addr) || s.shared && (serial && p.owner == "" || p.owner != "" && p.leases[addr] != nil && !p.leases[addr].given))
			apply = func() {
				if l := p.leases[addr]; l != nil {
					l.sure, l.given, l.listed, l.orphan = true, true, false, time.Time{}
				} else {
					delete(p.released, addr)
					p.leases[addr] = &specLease{epoch: p.epoch, sure: true, given: true}
				}
			}
		case op < 14:
			id := anyID()
			var addr netip.Addr
			req := AddressRequest{PoolID: id.String(), Options: map[string]string{"RequestAddressType": "com.docker.network.gateway"}}
			if rnd.IntN(2) == 0 {
				addr = anyAddr(id.Subnet)
				req.Address = addr.String()
			}
			what = fmt.Sprintf("gateway %s of %s", addr, id)
			var r AddressReply
			r, err = a.RequestAddress(t.Context(), req)
			p := s.find(id)
			switch {
			case p == nil || addr.IsValid() && !p.usable(addr, s.shared):
			case p.gw.IsValid() && (!addr.IsValid() || addr == p.gw):
				addr, expect = p.gw, true
			case p.gw.IsValid() && (p.owner != "" || !s.shared):
			case addr.IsValid():
				expect = s.shared || !p.taken(addr)
			default:
				if room := p.room(s.shared, true); len(room) > 0 {
					addr, expect = room[0], true
				}
			}
			apply = func() {
				if r.Address.Addr() != addr {
					t.Errorf("%s: got %s", what, r.Address)
				}
				delete(p.leases, addr)
				p.gw = addr
			}
		case op < 16:
			id := anyID()
			addr := anyAddr(id.Subnet)
			what = fmt.Sprintf("release %s of %s", addr, id)
			err, expect = a.ReleaseAddress(t.Context(), ReleaseAddressRequest{id.String(), addr.String()}), true
			apply = func() {
				p := s.find(id)
				if p == nil {
					return
				}
				if p.leases[addr] != nil {
					delete(p.leases, addr)
					p.released[addr] = now
				}
				if addr == p.gw && !(s.shared && p.owner != "") {
					p.gw = netip.Addr{}
				}
			}
		case op < 18:
			n, subnet := networks[rnd.IntN(len(networks))], anyID().Subnet
			what = fmt.Sprintf("bind %s to %s", subnet, n)
			again := rnd.IntN(2) == 0
			err = a.Bind(t.Context(), model.NetworkID(n), subnet, again)
			p, other := s.pools[subnet], s.owned(n)
			expect = (other == nil || other == p) && (p == nil && !s.overlaps(subnet) || p != nil && (p.owner == "" || p.owner == n || p.former && again))
			if p != nil && p.owner == n {
				p.former = false // even if that cannot be written
			}
			apply = func() {
				if p == nil {
					p = s.add(pool.ID{Space: space, Subnet: subnet})
				}
				if p.owner != "" && p.owner != n {
					counts["displaced"]++
					if len(p.leases) > 0 {
						p.epoch++
						clear(p.leases)
					}
				}
				p.owner, p.claimed, p.former = n, false, false
				if s.shared && len(p.leases) > 0 {
					p.epoch++
					for _, l := range p.leases {
						l.sure, l.given, l.listed, l.orphan = false, false, false, time.Time{}
					}
				}
			}
		case op < 19 && rnd.IntN(2) == 0:
			n := networks[rnd.IntN(len(networks))]
			what = "free " + n
			err, expect = a.Free(t.Context(), model.NetworkID(n)), true
			apply = func() {
				p := s.owned(n)
				switch {
				case p == nil:
				case p.claimed:
					p.owner, p.claimed, p.former = "", false, false
					clear(p.leases)
				default:
					delete(s.pools, p.id.Subnet)
				}
			}
		case op < 19 && s.shared && rnd.IntN(4) == 0:
			what, expect = "follow", true
			a.Follow(now.Add(time.Second))
			apply = func() {
				for _, p := range s.pools {
					p.former = p.owner != ""
				}
			}
		default:
			n := networks[rnd.IntN(len(networks))]
			p := s.owned(n)
			var live []netip.Addr
			if p != nil {
				for range rnd.IntN(6) {
					live = append(live, anyAddr(p.id.Subnet))
				}
				for x := range p.leases {
					if rnd.IntN(2) == 0 {
						live = append(live, x)
					}
				}
			}
			now = now.Add(time.Duration(rnd.IntN(10)) * time.Minute)
			asked := now.Add(-time.Duration(rnd.IntN(10)) * time.Minute)
			what = fmt.Sprintf("confirm %s %v", n, live)
			_, err = a.Confirm(t.Context(), model.NetworkID(n), live, asked)
			expect = p != nil
			apply = func() {
				live = slices.DeleteFunc(live, func(x netip.Addr) bool {
					at, given := p.released[x]
					return given && !at.Before(asked)
				})
				maps.DeleteFunc(p.released, func(_ netip.Addr, at time.Time) bool { return at.Before(asked) })
				for x, l := range p.leases {
					switch alive := slices.Contains(live, x); {
					case alive:
						l.listed = l.listed || !l.sure
						l.sure, l.orphan = true, time.Time{}
					case !l.sure:
						delete(p.leases, x)
					case l.orphan.IsZero():
						l.orphan = asked
					case asked.Sub(l.orphan) >= pool.FreeAfter, l.listed && asked.Sub(l.orphan) >= pool.UnaskedAfter:
						delete(p.leases, x)
						counts["orphan"]++
					}
				}
				for _, x := range live {
					if p.usable(x, s.shared) && !p.taken(x) {
						delete(p.released, x)
						p.leases[x] = &specLease{}
					}
				}
			}
		}
		if errors.Is(err, errFault) {
			counts["fault"]++ // and the spec stays as it is
		} else if (err == nil) != expect {
			t.Fatalf("seed %d step %d: %s: err = %v, expected success = %t in\n%s", seed, step, what, err, expect, s)
		} else if err == nil {
			counts[strings.Fields(what)[0]]++
			apply()
		}
		j.fault = false
		if rnd.IntN(20) == 0 {
			counts["restart"]++
			config.Journal = j
			if a, err = Open(t.Context(), config); err != nil {
				t.Fatalf("seed %d step %d: %s: restart: %v", seed, step, what, err)
			}
			for _, p := range s.pools { // what a restart may forget
				p.claimed, p.former = false, false
				clear(p.released)
				for _, l := range p.leases {
					l.sure, l.given, l.listed, l.orphan = l.epoch == p.epoch, false, false, time.Time{}
				}
			}
		}
		if got, want := describe(a), s.String(); got != want {
			t.Fatalf("seed %d step %d: after %s (err %v): have\n%swant\n%s", seed, step, what, err, got, want)
		}
		if err := a.table.Check(); err != nil {
			t.Fatalf("seed %d step %d: after %s: %v", seed, step, what, err)
		}
	}
	if scope == ScopeGlobal && (counts["orphan"] == 0 || counts["displaced"] == 0 || counts["follow"] < steps/500) {
		t.Errorf("seed %d: nothing was nobody's for long enough, or of a former lead: %v", seed, counts)
	}
	for _, op := range []string{"fresh", "pool", "release", "any", "address", "gateway", "bind", "free", "confirm", "restart", "fault"} {
		if counts[op] < steps/500 {
			t.Errorf("seed %d: only %d times %q in %d steps", seed, counts[op], op, steps)
		}
	}
}

// Where the search goes on is not seen in a snapshot: after a restart at any
// point, the same requests get the same answers.
func TestRestartAtAnyPointGivesTheSameAnswers(t *testing.T) {
	type call struct {
		pool   string
		addr   string
		gw     bool
		rel    bool
		newNet bool
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	j := newJournal(t)
	a := open(t, ScopeGlobal, j)
	do := func(a *Allocator, c call) string {
		ctx := t.Context()
		var r AddressReply
		var err error
		switch {
		case c.newNet:
			p, err := a.RequestPool(ctx, PoolRequest{Space: GlobalSpace, Options: map[string]string{"sluice.size": "27"}})
			return fmt.Sprint(p, err)
		case c.rel:
			err = a.ReleaseAddress(ctx, ReleaseAddressRequest{c.pool, c.addr})
		default:
			opts := map[string]string{"com.docker.network.ipam.serial": "true"}
			if c.gw {
				opts["RequestAddressType"] = "com.docker.network.gateway"
			}
			r, err = a.RequestAddress(ctx, AddressRequest{PoolID: c.pool, Address: c.addr, Options: opts})
		}
		return fmt.Sprint(r, err)
	}
	do(a, call{newNet: true})
	for step := range 2000 {
		all := a.Snapshot()
		p := all[rnd.IntN(len(all))].ID
		b := p.Subnet.Addr().As4()
		b[3] += byte(rnd.IntN(32))
		c := call{pool: p.String()}
		switch rnd.IntN(6) {
		case 0:
			c.rel, c.addr = true, netip.AddrFrom4(b).String()
		case 1:
			c.addr = netip.AddrFrom4(b).String()
		case 2:
			c.gw = true
		case 3:
			c.newNet = rnd.IntN(20) == 0
		}
		restarted := open(t, ScopeGlobal, j.clone())
		if got, want := do(restarted, c), do(a, c); got != want {
			t.Fatalf("step %d: %+v: %s after a restart, %s without", step, c, got, want)
		}
	}
}

// A commit that fails fails the call, and the same call succeeds after it.
func TestFailedCommitChangesNothing(t *testing.T) {
	ctx := t.Context()
	const p = GlobalSpace + "/10.60.0.0/24"
	for _, tt := range []struct {
		name string
		call func(*Allocator) error
	}{
		{"fresh pool", func(a *Allocator) error { _, err := a.RequestPool(ctx, PoolRequest{Space: GlobalSpace}); return err }},
		{"pool", func(a *Allocator) error {
			_, err := a.RequestPool(ctx, PoolRequest{Space: GlobalSpace, Pool: "10.61.0.0/24"})
			return err
		}},
		{"address", func(a *Allocator) error { _, err := a.RequestAddress(ctx, AddressRequest{PoolID: p}); return err }},
		{"release address", func(a *Allocator) error {
			return a.ReleaseAddress(ctx, ReleaseAddressRequest{p, "10.60.0.2"})
		}},
		{"release pool", func(a *Allocator) error {
			return a.ReleasePool(ctx, ReleasePoolRequest{GlobalSpace + "/10.62.0.0/24"})
		}},
		{"bind", func(a *Allocator) error { return a.Bind(ctx, "shop", pfx("10.62.0.0/24"), false) }},
		{"replay", func(a *Allocator) error { return a.Bind(ctx, "web", pfx("10.60.0.0/24"), true) }},
		{"free", func(a *Allocator) error { return a.Free(ctx, "web") }},
		{"confirm", func(a *Allocator) error {
			_, err := a.Confirm(ctx, "web", []netip.Addr{netip.MustParseAddr("10.60.0.77")}, time.Now())
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := newJournal(t)
			a := open(t, ScopeGlobal, j)
			for _, s := range []string{"10.60.0.0/24", "10.62.0.0/24"} {
				if _, err := a.RequestPool(ctx, PoolRequest{Space: GlobalSpace, Pool: s}); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.Bind(ctx, "web", pfx("10.60.0.0/24"), false); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				if _, err := a.RequestAddress(ctx, AddressRequest{PoolID: p}); err != nil {
					t.Fatal(err)
				}
			}
			before, disk := describe(a), maps.Clone(j.records)
			j.fault = true
			if err := tt.call(a); !errors.Is(err, errFault) {
				t.Fatalf("err = %v", err)
			}
			if after := describe(a); after != before {
				t.Errorf("have\n%swant\n%s", after, before)
			}
			if !maps.EqualFunc(disk, j.records, slices.Equal) {
				t.Error("journal changed")
			}
			if err := tt.call(a); err != nil {
				t.Errorf("second try: %v", err)
			}
			if after := describe(a); after == before {
				t.Error("second try changed nothing")
			}
		})
	}
}

func TestConcurrentRequestsGetDifferentAddresses(t *testing.T) {
	a := open(t, ScopeGlobal, newJournal(t))
	r, err := a.RequestPool(t.Context(), PoolRequest{Space: GlobalSpace, Pool: "10.60.0.0/20"})
	if err != nil {
		t.Fatal(err)
	}
	const workers, each = 8, 200
	got := make(chan netip.Prefix, workers*each)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				reply, err := a.RequestAddress(t.Context(), AddressRequest{PoolID: r.PoolID})
				if err != nil {
					t.Error(err)
					return
				}
				got <- reply.Address
				a.Snapshot()
			}
		})
	}
	wg.Wait()
	close(got)
	seen := map[netip.Prefix]bool{}
	for p := range got {
		if seen[p] {
			t.Errorf("%s twice", p)
		}
		seen[p] = true
	}
	if len(seen) != workers*each {
		t.Errorf("%d addresses", len(seen))
	}
}
