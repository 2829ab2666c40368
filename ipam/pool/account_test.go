package pool

import (
	"maps"
	"net/netip"
	"testing"
	"time"

	"sluice/internal/model"
)

// bound is a table with network web on 10.60.0.0/24, gateway .1, and three leases.
func bound(t *testing.T) (*Table, ID) {
	t.Helper()
	table := NewTable("g", Replayed, nil)
	id, c, err := table.PlanClaim(pfx("10.60.0.0/24"), netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	table.Apply(c)
	for _, w := range []Want{{Gateway: true}, {}, {}, {}} {
		_, c, err := table.PlanAddress(id, w)
		if err != nil {
			t.Fatal(err)
		}
		table.Apply(c)
	}
	c, err = table.PlanBind("web", id.Subnet, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	table.Apply(c)
	return table, id
}

func now() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }

func addrs(last ...byte) (out []netip.Addr) {
	for _, b := range last {
		out = append(out, netip.AddrFrom4([4]byte{10, 60, 0, b}))
	}
	return out
}

// TestALeaseOfNobodyIsALeakAndThenFreed: shown after LeakAfter, dropped after
// FreeAfter by a look that finds it so, and never while anybody has it.
func TestALeaseOfNobodyIsALeakAndThenFreed(t *testing.T) {
	type step struct {
		after        time.Duration
		do           func(*testing.T, *Table, ID) // before the look; nil: nothing
		live, held   []netip.Addr
		leaked, gone bool // .4
	}
	all, some := addrs(1, 2, 3, 4), addrs(1, 2, 3)
	ask := func(w Want) func(*testing.T, *Table, ID) {
		return func(t *testing.T, table *Table, id ID) {
			_, c, err := table.PlanAddress(id, w)
			if err != nil {
				t.Fatal(err)
			}
			table.Apply(c)
		}
	}
	four := addrs(4)[0]
	// A new leader that does not replay its task, as that is about to end.
	doubt := func(t *testing.T, table *Table, id ID) {
		c, err := table.PlanBind("web", id.Subnet, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		table.Apply(c)
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"nobody has asked for it", []step{{do: doubt, live: all}, {after: FreeAfter, live: some}, {after: UnaskedAfter - 1, live: some}, {after: 1, live: some, gone: true}}},
		{"nobody has asked for it, and it is known in between", []step{{do: doubt, live: all}, {live: some}, {after: UnaskedAfter - 1, live: all}, {after: 1, live: some}}},
		{"nobody from the start", []step{{live: some}, {after: LeakAfter, live: some, leaked: true}, {after: FreeAfter - LeakAfter, live: some, gone: true}}},
		{"a moment before", []step{{live: some}, {after: LeakAfter - 1, live: some}, {after: FreeAfter - LeakAfter, live: some, leaked: true}}},
		{"one look is none, however late", []step{{after: 24 * time.Hour, live: some}}},
		{"two looks far apart", []step{{live: some}, {after: 24 * time.Hour, live: some, gone: true}}},
		{"known in between", []step{{live: some}, {after: time.Minute, live: all}, {after: FreeAfter, live: some}, {after: LeakAfter, live: some, leaked: true}}},
		{"held by a container in between", []step{{live: some}, {after: time.Minute, live: some, held: addrs(4)}, {after: FreeAfter, live: some}}},
		{"asked for again by a new leader", []step{
			{live: some},
			{after: FreeAfter, do: func(t *testing.T, table *Table, id ID) {
				c, err := table.PlanBind("web", id.Subnet, nil, false)
				if err != nil {
					t.Fatal(err)
				}
				table.Apply(c)
				ask(Want{Address: four, Serial: true})(t, table, id)
			}, live: some},
			{after: LeakAfter, live: some, leaked: true},
		}},
		{"released and given to another", []step{
			{live: some},
			{after: FreeAfter, do: func(t *testing.T, table *Table, id ID) {
				table.Apply(table.PlanReleaseAddress(id, four, now()))
				ask(Want{Address: four, Serial: true})(t, table, id)
			}, live: some},
		}},
		{"the network went", []step{{live: some}, {after: FreeAfter, do: func(_ *testing.T, table *Table, id ID) {
			table.Apply(table.PlanFree("web"))
		}, gone: true}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			table, id := bound(t)
			now := now()
			// The leases are older than the bind, so one look confirms them.
			_, first, err := table.PlanConfirm("web", all, nil, now)
			if err != nil {
				t.Fatal(err)
			}
			table.Apply(first)
			ask(Want{Address: four, Serial: true})(t, table, id) // as a new leader replays it
			for i, s := range c.steps {
				now = now.Add(s.after)
				if s.do != nil {
					s.do(t, table, id)
				}
				if found, change, err := table.PlanConfirm("web", s.live, s.held, now); err == nil {
					table.Apply(change)
					if freed := len(found.Freed) > 0; freed != s.gone {
						t.Errorf("step %d: freed %v", i, found.Freed)
					}
				}
				var have, leaked bool
				for _, l := range table.Leases(id) {
					if l.Address == four {
						have, leaked = true, l.Leaked(now)
					}
				}
				if have == s.gone || leaked != s.leaked {
					t.Errorf("step %d: leased %t, leaked %t", i, have, leaked)
				}
				if err := table.Check(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestAListOlderThanAReleaseBringsNothingBack: it shows who had the address.
func TestAListOlderThanAReleaseBringsNothingBack(t *testing.T) {
	table, id := bound(t)
	at := now()
	confirm := func(asked time.Time) Confirmation {
		t.Helper()
		found, c, err := table.PlanConfirm("web", addrs(1, 2, 3, 4), nil, asked)
		if err != nil {
			t.Fatal(err)
		}
		table.Apply(c)
		return found
	}
	confirm(at)
	table.Apply(table.PlanReleaseAddress(id, addrs(4)[0], at))
	for _, asked := range []time.Time{at.Add(-time.Second), at, at} {
		if found := confirm(asked); len(found.Adopted) > 0 {
			t.Errorf("asked %s before the release: adopted %v", at.Sub(asked), found.Adopted)
		}
	}
	if found := confirm(at.Add(1)); len(found.Adopted) != 1 {
		t.Errorf("asked after it: adopted %v", found.Adopted)
	}
}

// TestFreedAddressesRest: what was taken back from nobody is the last to be given.
func TestFreedAddressesRest(t *testing.T) {
	table, id := bound(t)
	now := now()
	for _, live := range [][]netip.Addr{addrs(1, 2, 3, 4), addrs(1, 2, 4), addrs(1, 2, 4)} {
		_, c, err := table.PlanConfirm("web", live, nil, now)
		if err != nil {
			t.Fatal(err)
		}
		table.Apply(c)
		now = now.Add(FreeAfter)
	}
	for {
		a, c, err := table.PlanAddress(id, Want{})
		if err != nil {
			t.Fatal(err)
		}
		table.Apply(c)
		if a == addrs(3)[0] {
			break
		}
	}
	for _, s := range table.Status() {
		if s.Free != 0 {
			t.Errorf("%d addresses were free when the freed one was given", s.Free)
		}
	}
}

func TestAccounts(t *testing.T) {
	now := now()
	a := addrs(9)[0]
	task := func(id string, node model.NodeID) model.Holder {
		return model.Holder{Addr: a, Kind: model.HolderTask, ID: id, Node: node}
	}
	end := func(id string, node model.NodeID) model.Holder {
		return model.Holder{Addr: a, Kind: model.HolderEndpoint, ID: id, Node: node}
	}
	vip, gw := model.Holder{Addr: a, Kind: model.HolderService, ID: "s"}, model.Holder{Addr: a, Kind: model.HolderGateway}
	lease := []Lease{{Address: a}}
	for _, c := range []struct {
		name            string
		leases          []Lease
		listed, holding []model.Holder
		decides, lists  Verdict // on the leader, and elsewhere
	}{
		{"a task", lease, []model.Holder{task("t", "n")}, []model.Holder{end("t", "n")}, InUse, Listed},
		{"docker run", lease, []model.Holder{task("t", "n")}, []model.Holder{end("", "n")}, InUse, Listed},
		{"container started anew", lease, []model.Holder{task("t", "n")}, []model.Holder{end("", "n"), end("", "n")}, InUse, Listed},
		{"forgotten by the swarm", lease, nil, []model.Holder{end("t", "n")}, InUse, Listed},
		{"virtual IP", lease, []model.Holder{vip}, nil, InUse, Listed},
		{"gateway that is not listed yet", []Lease{{Address: a, Gateway: true}}, nil, nil, InUse, ""},
		{"nobody", lease, nil, nil, Unclaimed, ""},
		{"nobody for long", []Lease{{Address: a, Orphaned: now.Add(-LeakAfter)}}, nil, nil, Leaked, ""},
		{"nobody for less", []Lease{{Address: a, Orphaned: now.Add(1 - LeakAfter)}}, nil, nil, Unclaimed, ""},
		{"in doubt", []Lease{{Address: a, Unconfirmed: true}}, []model.Holder{vip}, nil, Doubtful, Listed},
		{"not leased", nil, []model.Holder{vip}, nil, NotLeased, Listed},
		{"two tasks", lease, []model.Holder{task("t", "n"), task("u", "n")}, nil, Double, Double},
		{"task and virtual IP", nil, []model.Holder{task("t", "n"), vip}, nil, Double, Double},
		{"another task's container", lease, []model.Holder{task("t", "n")}, []model.Holder{end("u", "n")}, Double, Double},
		{"containers of two nodes", lease, nil, []model.Holder{end("t", "n"), end("u", "m")}, Double, Double},
		{"container with a virtual IP", lease, []model.Holder{vip}, []model.Holder{end("", "n")}, Double, Double},
		{"container with the gateway", lease, []model.Holder{gw}, []model.Holder{end("", "n")}, Double, Double},
	} {
		for _, decides := range []bool{true, false} {
			want := map[bool]Verdict{true: c.decides, false: c.lists}[decides]
			sum := map[Verdict]int{}
			for _, x := range Accounts(c.leases, decides, c.listed, c.holding, now) {
				sum[x.Verdict]++
			}
			expect := map[Verdict]int{want: 1}
			if want == "" {
				expect = map[Verdict]int{}
			}
			if !maps.Equal(sum, expect) {
				t.Errorf("%s, decides %t: %v, want %v", c.name, decides, sum, expect)
			}
		}
	}
}
