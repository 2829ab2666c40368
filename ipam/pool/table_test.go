package pool

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"sluice/internal/model"
)

// network makes a bound network with its gateway and n leases.
func network(t interface{ Fatal(...any) }, tb *Table, id model.NetworkID, subnet netip.Prefix, n int) ID {
	pid, c, err := tb.PlanClaim(subnet, netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	tb.Apply(c)
	for i := range n + 1 {
		_, c, err := tb.PlanAddress(pid, Want{Gateway: i == 0, Serial: true})
		if err != nil {
			t.Fatal(err)
		}
		tb.Apply(c)
		if i == 0 {
			if c, err = tb.PlanBind(id, subnet, nil, false); err != nil {
				t.Fatal(err)
			}
			tb.Apply(c)
		}
	}
	return pid
}

// replay tells a table what a new leader is told: pool, gateway, network, then
// the addresses.
func replay(t interface{ Fatal(...any) }, tb *Table, id model.NetworkID, pid ID, addrs []Lease) {
	step := func(c Change, err error) {
		if err != nil {
			t.Fatal(err)
		}
		tb.Apply(c)
	}
	_, c, err := tb.PlanClaim(pid.Subnet, pid.Sub)
	step(c, err)
	for _, l := range addrs {
		if l.Gateway {
			_, c, err = tb.PlanAddress(pid, Want{Address: l.Address, Gateway: true, Serial: true})
			step(c, err)
			step(tb.PlanBind(id, pid.Subnet, nil, false))
		}
	}
	for _, l := range addrs {
		if !l.Gateway {
			_, c, err = tb.PlanAddress(pid, Want{Address: l.Address, Serial: true})
			step(c, err)
		}
	}
}

func TestReplayIsIdempotent(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tb := NewTable("s", Replayed, nil)
		subnet := netip.PrefixFrom(ip("10.0.0.0"), rapid.IntRange(22, 28).Draw(t, "bits"))
		pid := network(t, tb, "web", subnet, rapid.IntRange(0, 12).Draw(t, "n"))
		for range rapid.IntRange(0, 6).Draw(t, "releases") {
			tb.Apply(tb.PlanReleaseAddress(pid, at(subnet, rapid.Uint32Range(0, 15).Draw(t, "i")), now()))
		}
		status, leases := tb.Status(), tb.Leases(pid)
		for range rapid.IntRange(1, 3).Draw(t, "changes of leader") {
			replay(t, tb, "web", pid, leases)
			if got := tb.Status(); !slices.Equal(got, status) {
				t.Fatalf("status %+v, was %+v", got, status)
			}
			if got := tb.Leases(pid); !slices.Equal(got, leases) {
				t.Fatalf("leases %+v, were %+v", got, leases)
			}
			if err := tb.Check(); err != nil {
				t.Fatal(err)
			}
		}
		// On a manager that knows nothing the same replay makes the same table.
		other := NewTable("s", Replayed, nil)
		replay(t, other, "web", pid, leases)
		if got := other.Leases(pid); !slices.Equal(got, leases) {
			t.Fatalf("elsewhere: leases %+v, were %+v", got, leases)
		}
		tb.Apply(tb.PlanFree("web"))
		if got := tb.Status(); got != nil {
			t.Fatalf("after the network: %+v", got)
		}
	})
}

// The checker has to find what it is there to find.
func TestCheckFindsWhatIsBroken(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(*Table, *entry)
		want   string
	}{
		{"nothing", func(*Table, *entry) {}, ""},
		{"overlap", func(tb *Table, e *entry) {
			l, _ := NewLeases(pfx("10.0.0.0/25"), netip.Prefix{}, true)
			tb.pools[pfx("10.0.0.0/25")] = &entry{Leases: l, id: ID{Space: "s", Subnet: pfx("10.0.0.0/25")}}
		}, "overlaps"},
		{"filed wrongly", func(tb *Table, e *entry) { e.id.Space = "other" }, "filed under"},
		{"two owners' pools", func(tb *Table, e *entry) { tb.pools[pfx("10.1.0.0/24")].owner = e.owner }, "owns pool"},
		{"gateway free", func(_ *Table, e *entry) { e.Release(e.gateway) }, "gateway 10.0.0.1 is not leased"},
		{"gateway in doubt", func(_ *Table, e *entry) { e.Doubt(e.gateway) }, "or in doubt"},
		{"network address leased", func(_ *Table, e *entry) { e.used.Add(0) }, "is the network address"},
		{"node's address leased", func(_ *Table, e *entry) { e.used.Add(250) }, "keeps for the nodes"},
		{"miscounted", func(_ *Table, e *entry) { e.auto++ }, "counted"},
		{"doubt about a free address", func(_ *Table, e *entry) { e.open.Add(99) }, "unconfirmed but not in use"},
		{"cursor astray", func(_ *Table, e *entry) { e.cursor = 255 }, "cursor 255"},
		{"set miscounts", func(_ *Table, e *entry) { e.used.n++ }, "used: set holds"},
		{"set wrong about a full word", func(_ *Table, e *entry) { e.used.levels[1][0] |= 1 }, "says full=true for word 0"},
		{"doubts miscount", func(_ *Table, e *entry) { e.open.n++ }, "unconfirmed: set holds"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tb := NewTable("s", Replayed, nil)
			network(t, tb, "web", pfx("10.0.0.0/24"), 3)
			network(t, tb, "shop", pfx("10.1.0.0/24"), 3)
			tt.damage(tb, tb.pools[pfx("10.0.0.0/24")])
			err := tb.Check()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("Check = %v, want %q", err, tt.want)
			}
		})
	}
}

func TestRefusalsNameTheNetworkAsPeopleDo(t *testing.T) {
	tb := NewTable("s", Replayed, func(id model.NetworkID) string { return "web-" + string(id) })
	network(t, tb, "x", pfx("10.0.0.0/16"), 0)
	_, _, err := tb.PlanClaim(pfx("10.0.0.0/24"), netip.Prefix{})
	wantRefusal(t, err, ErrConflict, "pool 10.0.0.0/24 overlaps network web-x (10.0.0.0/16); choose another --subnet")
	network(t, tb, "y", pfx("10.2.0.0/16"), 0) // of several, the lowest is named
	_, _, err = tb.PlanClaim(pfx("10.0.0.0/8"), netip.Prefix{})
	wantRefusal(t, err, ErrConflict, "network web-x (10.0.0.0/16)")
	if tb.Leases(ID{Space: "s", Subnet: pfx("10.9.0.0/16")}) != nil {
		t.Error("leases of a pool that is not there")
	}
}

// TestWhatWasToldOfSinceStays: whether another leads is asked for, and the answer may be
// from before this manager came to lead.
func TestWhatWasToldOfSinceStays(t *testing.T) {
	tb := NewTable("s", Replayed, nil)
	network(t, tb, "web", pfx("10.0.0.0/24"), 0)
	network(t, tb, "shop", pfx("10.1.0.0/24"), 0)
	tb.Apply(tb.PlanTold("web", now()))
	tb.Apply(tb.PlanTold("absent", now()))
	tb.Apply(tb.PlanFollow(now()))
	if got := tb.Owners(); !got["web"] || got["shop"] || len(got) != 2 {
		t.Errorf("those of this lead: %v", got)
	}
	tb.Apply(tb.PlanFollow(now().Add(1)))
	if got := tb.Owners(); got["web"] {
		t.Errorf("those of this lead: %v", got)
	}
	tb.Apply(tb.PlanTold("web", now()))
	if got := tb.Owners(); !got["web"] {
		t.Errorf("those of this lead: %v", got)
	}
}
