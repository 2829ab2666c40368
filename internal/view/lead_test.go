package view

import (
	"maps"
	"slices"
	"testing"
	"time"

	"sluice/internal/model"
)

// led are two managers that hear each other, of which the first leads a service that
// publishes a port, and a node that hears both.
func led(t *testing.T) (a, c, b *node) {
	t.Helper()
	a, c, b = fresh(t), fresh(t), fresh(t)
	ok(t, a.SetEngine(t.Context(), asOf(publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp"}, "1400"), a.clock)))
	ok(t, c.SetEngine(t.Context(), swarm("nodeC", "192.168.0.3")))
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	hear(t, a, c, b)
	return a, c, b
}

// asOf is a snapshot for which the managers were asked now.
func asOf(s model.EngineSnapshot, c *clock) model.EngineSnapshot {
	s.LeaderAt = c.now
	return s
}

// gossiped is what others get of a node.
func gossiped(n *node) Table {
	t := n.table(true)
	t.Entries = Summed(t.Entries)
	return t
}

// hear has all nodes hear each other a second later.
func hear(t *testing.T, nodes ...*node) {
	t.Helper()
	var all []Table
	for _, n := range nodes {
		all = append(all, gossiped(n))
	}
	for _, n := range nodes {
		n.clock.now = n.clock.now.Add(time.Second)
		ok(t, n.SetTables(t.Context(), all))
	}
}

// TestAWordInPartsEndsNothing: records come one by one and in any order, also those by
// which a former leader takes its own back.
func TestAWordInPartsEndsNothing(t *testing.T) {
	a, c, b := led(t)
	before := gossiped(a).Entries
	ok(t, c.SetEngine(t.Context(), asOf(publishes(swarm("nodeC", "192.168.0.3"), model.ServiceOptions{Published: "80/tcp", Nodes: "zone"}, "1400"), c.clock)))
	after := gossiped(c).Entries
	former, later := gossiped(a), gossiped(c)
	parts, whole := 0, 1<<len(before)-1
	part := func(of map[string][]byte, mask int) map[string][]byte {
		out := maps.Clone(of)
		for i, key := range slices.Sorted(maps.Keys(of)) {
			if key != keyNode && mask&(1<<i) == 0 {
				delete(out, key)
			}
		}
		return out
	}
	for mask := range 1 << len(after) {
		later.Entries, later.Whole, former.Entries = part(after, mask), true, before
		if len(later.Entries) == len(after) {
			continue
		}
		for _, gone := range []int{whole, mask} {
			former.Entries = part(before, gone)
			ok(t, b.SetTables(t.Context(), []Table{former, later}))
			parts++
			if v := b.restarted(t).View(); gone == whole && len(v.Services) != 1 {
				t.Fatalf("after a restart with %q of the new leader's: services %v", slices.Sorted(maps.Keys(later.Entries)), v.Services)
			}
			if v := b.View(); len(v.Services) != 1 || v.Published[web].VNI == 0 {
				t.Fatalf("%q of the new leader's and %q of the former's: services %v, published %v", slices.Sorted(maps.Keys(later.Entries)), slices.Sorted(maps.Keys(former.Entries)), v.Services, v.Published)
			}
		}
	}
	later.Entries = after
	ok(t, b.SetTables(t.Context(), []Table{former, later}))
	if got := b.View().Services[svc].Options[web].Nodes; got != "zone" {
		t.Errorf("after %d parts, all is there, and the new leader's word does not count: nodes %q", parts, got)
	}
}

// TestAClaimOfAFormerLifeEndsNothing: the swarm may have decided otherwise since.
func TestAClaimOfAFormerLifeEndsNothing(t *testing.T) {
	a, c, b := led(t)
	// c leads for a moment, of which b alone hears, and knows of no service.
	old := swarm("nodeC", "192.168.0.3")
	old.Manager, old.Leader, old.ServicesValid = true, true, true
	c.claim = 6
	ok(t, c.SetEngine(t.Context(), asOf(old, c.clock)))
	if got := gossiped(c).Entries[keyLead]; string(got) != `{"claim":6,"confirmed":true,"sum":1}` {
		t.Fatalf("claims %s", got)
	}
	c = c.restarted(t)
	hear(t, a, c, b)
	for name, n := range map[string]*node{"leader": a, "reader": b, "leader, restarted": a.restarted(t), "reader, restarted": b.restarted(t)} {
		if v := n.View(); len(v.Services) != 1 {
			t.Errorf("%s: services %v", name, v.Services)
		}
	}
	ok(t, a.SetEngine(t.Context(), asOf(publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp"}, "1400"), a.clock)))
	hear(t, a, c, b)
	if a.claim != 7 || c.claim != 0 {
		t.Errorf("the leader claims %d, the former one %d; want 7 and 0", a.claim, c.claim)
	}
	// As long as nobody else leads, the word of a leader that starts anew counts.
	a = a.restarted(t)
	hear(t, a, c, b)
	for name, n := range map[string]*node{"former leader": c, "reader": b} {
		if v := n.View(); len(v.Services) != 1 {
			t.Errorf("%s: services %v", name, v.Services)
		}
	}
}

// TestALeaderThatWasFrozenSpeaksUpWithNothingOld: nor does it go by another's word before
// its engine was asked.
func TestALeaderThatWasFrozenSpeaksUpWithNothingOld(t *testing.T) {
	for name, c := range map[string]struct {
		engine func(*node) model.EngineSnapshot // of the one that was frozen, when it is asked again
		after  time.Duration
		want   string // whose word counts then
	}{
		"it leads": {func(a *node) model.EngineSnapshot {
			return asOf(leads(swarm("nodeA", "192.168.0.1"), "again"), a.clock)
		}, 0, "again"},
		"another leads": {func(a *node) model.EngineSnapshot {
			s := swarm("nodeA", "192.168.0.1")
			s.Manager, s.ServicesValid = true, true
			return s
		}, 0, "newer"},
		"the engine is silent": {func(*node) model.EngineSnapshot { return model.EngineSnapshot{} }, doubtTime, "newer"},
	} {
		t.Run(name, func(t *testing.T) {
			a, b, other := led(t)
			ok(t, b.SetEngine(t.Context(), asOf(leads(swarm("nodeC", "192.168.0.3"), "newer"), b.clock)))
			hear(t, a, b, other)
			hear(t, a, b, other)
			if got := []string{a.View().Services[svc].Name, b.View().Services[svc].Name, other.View().Services[svc].Name}; !slices.Equal(got, []string{"web", "newer", "newer"}) {
				t.Fatalf("before its engine is asked, the words of %q count", got)
			}
			a.clock.now = a.clock.now.Add(c.after)
			ok(t, a.SetEngine(t.Context(), c.engine(a)))
			hear(t, a, b, other)
			hear(t, a, b, other)
			for _, n := range []*node{a, other} {
				if got := n.View().Services[svc].Name; got != c.want {
					t.Errorf("at %s, %q counts, want %q", n.Self().Node, got, c.want)
				}
			}
		})
	}
}

// TestAnEarlierLeaderIsNoSuccessor: when the leading manager gives up before the one is
// heard for which it does, what it has said stays; what one said that has led before it
// does not come back, unless nobody else comes.
func TestAnEarlierLeaderIsNoSuccessor(t *testing.T) {
	a, c, b := led(t)
	earlier := Table{Owner: "nodeZ", Present: true, Whole: true, Entries: Summed(map[string][]byte{
		keyNode: encode(nodeRecord{VTEP: addr("192.168.0.9")}), keyLead: encode(leadRecord{Claim: 1, Confirmed: true}),
	})}
	recalled := Table{Owner: "nodeY", Present: true, Whole: true, Entries: Summed(map[string][]byte{
		keyNode: encode(nodeRecord{VTEP: addr("192.168.0.8")}), keyLead: encode(leadRecord{Claim: 9}),
	})}
	a.claim = 2
	ok(t, a.SetEngine(t.Context(), asOf(publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "81/tcp"}, "1400"), a.clock)))
	ok(t, b.SetTables(t.Context(), []Table{earlier, recalled, gossiped(a), gossiped(c)}))
	before, given := gossiped(a), gossiped(a)
	maps.DeleteFunc(given.Entries, func(key string, _ []byte) bool { return key != keyNode })
	publish := func(want string) {
		t.Helper()
		if got := b.View().Services[svc].Options[web].Published; string(got) != want {
			t.Errorf("the service publishes %q, want %q", got, want)
		}
	}
	ok(t, b.SetTables(t.Context(), []Table{earlier, recalled, given, gossiped(c)}))
	publish("81/tcp")
	alone := fresh(t)
	ok(t, alone.SetEngine(t.Context(), swarm("nodeD", "192.168.0.4")))
	ok(t, alone.SetTables(t.Context(), []Table{earlier, before, gossiped(c)}))
	ok(t, alone.SetTables(t.Context(), []Table{earlier, given, gossiped(c)}))

	ok(t, c.SetEngine(t.Context(), asOf(publishes(swarm("nodeC", "192.168.0.3"), model.ServiceOptions{Published: "82/tcp"}, "1400"), c.clock)))
	ok(t, b.SetTables(t.Context(), []Table{earlier, recalled, given, gossiped(c)}))
	publish("82/tcp")

	b = alone
	publish("81/tcp")
	b.clock.now = b.clock.now.Add(vacancyTime)
	ok(t, b.SetEngine(t.Context(), swarm("nodeD", "192.168.0.4")))
	publish("")
}

// without is what is left of a table when its owner has given up the lead.
func without(t Table) Table {
	maps.DeleteFunc(t.Entries, func(key string, _ []byte) bool { return key != keyNode })
	return t
}

// TestNobodyOutOfContactSucceeds: what a lost node has said, it may have said long ago.
func TestNobodyOutOfContactSucceeds(t *testing.T) {
	a, c, b := led(t)
	lost := Table{Owner: "nodeZ", Whole: true, Entries: Summed(map[string][]byte{
		keyNode: encode(nodeRecord{VTEP: addr("192.168.0.9")}), keyLead: encode(leadRecord{Claim: 1, Confirmed: true}),
	})}
	a.claim = 9
	ok(t, a.SetEngine(t.Context(), asOf(leads(swarm("nodeA", "192.168.0.1"), "held"), a.clock)))
	ok(t, b.SetTables(t.Context(), []Table{gossiped(a), gossiped(c), lost}))
	ok(t, b.SetTables(t.Context(), []Table{without(gossiped(a)), gossiped(c), lost}))
	b.clock.now = b.clock.now.Add(vacancyTime)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	if got := b.View().Services[svc].Name; got != "held" {
		t.Errorf("the word of %q counts: %q", b.lead, got)
	}
}

// TestALeaderThatClaimsAnewIsHeardAtOnce: it has lost its records, and numbers from one.
func TestALeaderThatClaimsAnewIsHeardAtOnce(t *testing.T) {
	a, c, b := led(t)
	a.claim = 9
	ok(t, a.SetEngine(t.Context(), asOf(leads(swarm("nodeA", "192.168.0.1"), "before"), a.clock)))
	hear(t, a, c, b)
	again := fresh(t)
	again.clock = a.clock
	ok(t, again.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")))
	hear(t, again, c, b)
	ok(t, again.SetEngine(t.Context(), asOf(leads(swarm("nodeA", "192.168.0.1"), "after"), again.clock)))
	hear(t, again, c, b)
	if got := b.View().Services[svc].Name; got != "after" {
		t.Errorf("%q counts", got)
	}
}

// TestALeaderOfAFormerLifeIsGivenUp: the swarm may have removed it meanwhile, and claims
// have begun anew.
func TestALeaderOfAFormerLifeIsGivenUp(t *testing.T) {
	a, c, b := led(t)
	a.claim = 9
	ok(t, a.SetEngine(t.Context(), asOf(leads(swarm("nodeA", "192.168.0.1"), "gone"), a.clock)))
	hear(t, a, c, b)
	b = b.restarted(t)
	c = fresh(t)
	ok(t, c.SetEngine(t.Context(), asOf(leads(swarm("nodeC", "192.168.0.3"), "newer"), c.clock)))
	ok(t, b.SetTables(t.Context(), []Table{gossiped(c)}))
	if got := b.View().Services[svc].Name; got != "gone" {
		t.Errorf("%q counts, and it may be the older one", got)
	}
	b.clock.now = b.clock.now.Add(vacancyTime)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	if got := b.View().Services[svc].Name; got != "newer" {
		t.Errorf("for ever %q", got)
	}
}

// TestWhoIsHeardFirstIsHeldOnlyInFull: else it would be of weight in which order tables come.
func TestWhoIsHeardFirstIsHeldOnlyInFull(t *testing.T) {
	a, _, _ := led(t)
	half := Table{Owner: "nodeZ", Entries: map[string][]byte{
		keyNode: encode(nodeRecord{VTEP: addr("192.168.0.9")}), keyLead: encode(leadRecord{Claim: 9, Sum: 7}),
	}}
	b := fresh(t)
	ok(t, b.SetTables(t.Context(), []Table{half}))
	ok(t, b.SetTables(t.Context(), []Table{half, gossiped(a)}))
	if got := b.View().Services; len(got) != 1 {
		t.Errorf("services %v", got)
	}
}

// TestALeaderGivesUpForOneThatLeads: not for a claim of a former life, while its own engine
// does not answer; what it has said would go from all journals.
func TestALeaderGivesUpForOneThatLeads(t *testing.T) {
	a, _, b := led(t)
	c := Table{Owner: "nodeC", Present: true, Whole: true, Entries: Summed(map[string][]byte{
		keyNode: encode(nodeRecord{VTEP: addr("192.168.0.3")}), keyLead: encode(leadRecord{Claim: 9}),
	})}
	s := swarm("nodeA", "192.168.0.1")
	s.Manager = true
	ok(t, a.SetEngine(t.Context(), s))
	ok(t, a.SetTables(t.Context(), []Table{c}))
	ok(t, b.SetTables(t.Context(), []Table{c, gossiped(a)}))
	for name, n := range map[string]*node{"leader": a, "reader": b, "leader, restarted": a.restarted(t)} {
		if got := n.View().Services; len(got) != 1 {
			t.Errorf("%s: services %v", name, got)
		}
	}
}

// TestAWordIsTheOneThatIsSaidNow: a service moves from one network to another, and of three
// changes two have come.
func TestAWordIsTheOneThatIsSaidNow(t *testing.T) {
	a, _, b := led(t)
	part := gossiped(a)
	const other model.NetworkID = "othernetwork0000000000000"
	part.Entries[keyNetwork+string(other)] = part.Entries[keyNetwork+string(web)]
	delete(part.Entries, keyNetwork+string(web))
	ok(t, b.SetTables(t.Context(), []Table{part}))
	v := b.View()
	for id := range v.Services[svc].Options {
		if v.Published[id].VNI == 0 {
			t.Errorf("the service publishes on %s, of which nothing is told", id.Short())
		}
	}
}

// TestWhatLeavesIsHeardBeforeTheRest: its tasks have some 3 s.
func TestWhatLeavesIsHeardBeforeTheRest(t *testing.T) {
	a := fresh(t)
	b := member(t, "nodeB", "192.168.0.2", one, "10.255.0.2")
	ok(t, a.SetEngine(t.Context(), asOf(leads(swarm("nodeA", "192.168.0.1"), "web"), a.clock)))
	ok(t, b.SetTables(t.Context(), []Table{gossiped(a)}))
	ok(t, a.SetEngine(t.Context(), asOf(leads(swarm("nodeA", "192.168.0.1"), "renamed", model.TaskID("task-"+one.Short())), a.clock)))
	gaps := gossiped(a)
	gaps.Last, gaps.Version.Seq = 9, 7
	ok(t, b.SetTables(t.Context(), []Table{gaps}))
	if v := b.View(); !v.Endpoints[one].Task.Leaving || v.Services[svc].Name != "web" {
		t.Errorf("leaving %t; service %q", v.Endpoints[one].Task.Leaving, v.Services[svc].Name)
	}
}
