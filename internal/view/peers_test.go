package view

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sluice/internal/model"
)

func TestRecordsBecomeRemotesElsewhere(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	local := network("local")
	local.Local = true
	must[uint64](t)(a.PutNetwork(t.Context(), local))
	e := endpoint("local-endpoint", "10.255.0.7", model.Taken)
	e.Network = "local"
	must[uint64](t)(a.PutEndpoint(t.Context(), e))

	ok(t, b.SetTables(t.Context(), []Table{a.table(true), b.table(true)}))
	mine := a.View().Endpoints[one]
	want := map[model.EndpointID]model.Remote{one: {
		ID: one, Network: web, Node: "nodeA", VTEP: addr("192.168.0.1"), Addr: mine.Addr, MAC: mine.MAC, Task: mine.Task,
	}}
	if d := cmp.Diff(want, b.View().Remotes, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("want (-) and got (+) differ:\n%s", d)
	}
	if got := b.Peers(); len(got) != 1 || got[0] != (Peer{Node: "nodeA", Name: "nodeA", VTEP: "192.168.0.1", Present: true, Endpoints: 1}) {
		t.Errorf("peers: %+v", got)
	}
	if _, err := a.Leave(t); err != nil {
		t.Fatal(err)
	}
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	if !b.View().Remotes[one].Task.Leaving {
		t.Error("the others do not know that it was asked to leave")
	}
}

// Leave does what the driver does.
func (n *node) Leave(t fatal) (uint64, error) {
	t.Helper()
	e, known := n.Endpoint(one)
	if !known {
		t.Fatal("no such endpoint")
	}
	e.Left = true
	return n.PutEndpoint(context.Background(), e)
}

func TestSilenceRemovesNothing(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))

	ok(t, b.SetTables(t.Context(), []Table{a.table(false)}))
	if r, ok := b.View().Remotes[one]; !ok || !r.Task.Ready {
		t.Errorf("out of reach: %+v", r)
	}
	b = b.restarted(t)
	ok(t, b.SetTables(t.Context(), nil))
	if _, ok := b.View().Remotes[one]; !ok {
		t.Error("a restart without contact has lost it")
	}
	part := a.table(true)
	part.Whole = false
	delete(part.Entries, "endpoint/"+string(one))
	ok(t, b.SetTables(t.Context(), []Table{part}))
	if _, ok := b.View().Remotes[one]; !ok {
		t.Error("half a table has removed what it lacks")
	}
	part.Whole = true
	ok(t, b.SetTables(t.Context(), []Table{part}))
	if _, ok := b.View().Remotes[one]; ok {
		t.Error("its owner has deleted it, and it is still there")
	}
}

func TestANodeThatIsGoneTakesItsRecordsAlong(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	ok(t, b.SetTables(t.Context(), nil))
	if v := b.View(); len(v.Remotes) > 0 {
		t.Errorf("remotes: %v", v.Remotes)
	}
	if v := b.restarted(t).View(); len(v.Remotes) > 0 {
		t.Errorf("after a restart: %v", v.Remotes)
	}
}

func TestAForeignRecordNeverStopsTheProcess(t *testing.T) {
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	bad := Table{Owner: "nodeA", Present: true, Whole: true, Entries: map[string][]byte{
		"node": []byte(`{"vtep":"192.168.0.1"}`), "endpoint/x": []byte(`{"addr":"fd00::1"}`), "endpoint/y": []byte(`nonsense`),
		"lead": []byte(`[]`), "service/z": []byte(`{"created":7}`), "of-a-later-version": []byte("anything"),
	}}
	ok(t, b.SetTables(t.Context(), []Table{bad}))
	if v := b.View(); len(v.Remotes)+len(v.Services) > 0 {
		t.Errorf("taken for real: %v %v", v.Remotes, v.Services)
	}
	again := b.restarted(t) // which fails the test if it reports an error
	rev := again.View().Revision
	ok(t, again.SetTables(t.Context(), []Table{bad}))
	if p := again.Peers(); len(p) != 1 || again.View().Revision > rev+1 {
		t.Errorf("peers: %v", p)
	}
}

func TestOwnRecordsThatCannotBeReadAreReported(t *testing.T) {
	for _, kind := range []string{kindSelf, kindNetwork, kindEndpoint} {
		if _, err := New(Config{Now: time.Now}, []model.Record{{Kind: kind, Key: "k", Value: []byte("nonsense")}}); err == nil {
			t.Errorf("%s: no error", kind)
		}
	}
	if _, err := New(Config{Now: time.Now}, []model.Record{{Kind: "somebody else's", Key: "k", Value: []byte("nonsense")}}); err != nil {
		t.Error(err)
	}
}

func TestThisHostUnderItsFormerNameIsNoPeer(t *testing.T) {
	a := member(t, "before", "192.168.0.1", one, "10.255.0.2")
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), swarm("now", "192.168.0.1")))
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	if v := b.View(); len(v.Remotes) > 0 {
		t.Errorf("remotes: %v", v.Remotes)
	}
}

func TestAnotherSwarmStartsFromNothing(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), leads(swarm("nodeB", "192.168.0.2"), "web")))
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	other := swarm("nodeX", "192.168.0.2")
	ok(t, b.SetEngine(t.Context(), other))
	for name, n := range map[string]*node{"now": b, "after a restart": b.restarted(t)} {
		if v := n.View(); len(v.Remotes) > 0 || len(v.Services) > 0 || v.Self.Node != "nodeX" {
			t.Errorf("%s: %v %v %v", name, v.Self, v.Remotes, v.Services)
		}
		if _, still := n.Records()["lead"]; still {
			t.Errorf("%s: it still claims to lead", name)
		}
	}
}

// TestWhoLeads plays two managers that gain the lead in turn.
func TestWhoLeads(t *testing.T) {
	a, b, c := fresh(t), fresh(t), fresh(t)
	snapshots := map[*node]model.EngineSnapshot{a: swarm("nodeA", "192.168.0.1"), b: swarm("nodeB", "192.168.0.2"), c: swarm("nodeC", "192.168.0.3")}
	elect := func(leader *node, name string, leaving ...model.TaskID) {
		t.Helper()
		for n, s := range snapshots {
			if n == leader {
				s = leads(s, name, leaving...)
			}
			ok(t, n.SetEngine(t.Context(), s))
		}
		for range 3 { // rounds of gossip until nothing is news
			for n := range snapshots {
				ok(t, n.SetTables(t.Context(), []Table{a.table(true), b.table(true), c.table(true)}))
			}
		}
		for n := range snapshots {
			if got := n.View().Services[svc].Name; got != name {
				t.Errorf("%s believes %q, want %q", n.Self().Node, got, name)
			}
			_, claims := n.Records()["lead"]
			if claims != (n == leader) {
				t.Errorf("%s claims to lead: %t", n.Self().Node, claims)
			}
		}
	}
	elect(a, "one")
	elect(b, "two")
	elect(a, "three")
	elect(a, "four")
	elect(b, "five")
	elect(c, "six")

	// One that leads no more holds to its own word until it hears of another.
	ok(t, c.SetEngine(t.Context(), snapshots[c]))
	if got := c.View().Services[svc].Name; got != "six" {
		t.Errorf("the former leader believes %q", got)
	}
	ok(t, a.SetEngine(t.Context(), leads(snapshots[a], "seven")))
	ok(t, c.SetTables(t.Context(), []Table{a.table(true), b.table(true), c.table(true)}))
	if got := c.View().Services[svc].Name; got != "seven" {
		t.Errorf("the former leader believes %q", got)
	}
}

func TestALeadersWordSurvivesItsRestart(t *testing.T) {
	a := fresh(t)
	ok(t, a.SetEngine(t.Context(), leads(swarm("nodeA", "192.168.0.1"), "web", "task-9")))
	b := member(t, "nodeB", "192.168.0.2", one, "10.255.0.2")
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	before := b.View()

	again := a.restarted(t)
	records := a.Records()
	records[keyLead] = encode(leadRecord{Claim: 1}) // not confirmed yet
	if d := cmp.Diff(records, again.Records(), cmpopts.IgnoreMapEntries(func(k string, _ []byte) bool { return k == "node" })); d != "" {
		t.Errorf("before (-) and after (+) differ:\n%s", d)
	}
	// The engine cannot be asked at first.
	ok(t, again.SetEngine(t.Context(), model.EngineSnapshot{HostName: "nodeA"}))
	ok(t, b.SetTables(t.Context(), []Table{again.table(true)}))
	if d := same(before, b.View()); d != "" {
		t.Errorf("another node's view, before (-) and after (+):\n%s", d)
	}
	// It was asked: a service has gone meanwhile.
	gone := leads(swarm("nodeA", "192.168.0.1"), "web")
	gone.Services = nil
	ok(t, again.SetEngine(t.Context(), gone))
	if v := again.View(); len(v.Services) > 0 {
		t.Errorf("services: %v", v.Services)
	}
	if v := again.restarted(t).View(); len(v.Services) > 0 {
		t.Errorf("after another restart: %v", v.Services)
	}
}

func TestLeavingComesFromWhoeverSaysItFirst(t *testing.T) {
	task := model.TaskID("task-" + one.Short())
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), leads(swarm("nodeB", "192.168.0.2"), "web", task)))
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	ok(t, a.SetTables(t.Context(), []Table{b.table(true)}))
	if !a.View().Endpoints[one].Task.Leaving || !b.View().Remotes[one].Task.Leaving {
		t.Error("the leader's word does not count")
	}
	ok(t, b.SetEngine(t.Context(), leads(swarm("nodeB", "192.168.0.2"), "web")))
	ok(t, a.SetTables(t.Context(), []Table{b.table(true)}))
	if !a.View().Endpoints[one].Task.Leaving || !b.View().Remotes[one].Task.Leaving {
		t.Error("the task got connections again while its container still runs: swarm has forgotten it, and wants none back")
	}
}

func TestLeavingOutlivesAChangeOfLeader(t *testing.T) {
	task := model.TaskID("task-" + one.Short())
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b, c := fresh(t), fresh(t)
	ok(t, b.SetEngine(t.Context(), leads(swarm("nodeB", "192.168.0.2"), "web", task)))
	all := func(n *node) []Table { return []Table{a.table(true), b.table(true), n.table(true)} }
	ok(t, a.SetTables(t.Context(), all(c)))
	ok(t, c.SetEngine(t.Context(), swarm("nodeC", "192.168.0.3")))
	ok(t, c.SetTables(t.Context(), all(a)))
	if !a.View().Endpoints[one].Task.Leaving || !c.View().Remotes[one].Task.Leaving {
		t.Fatal("the first leader's word does not count")
	}
	// The new leader's engine has deleted the task by the time it is first read.
	ok(t, c.SetEngine(t.Context(), leads(swarm("nodeC", "192.168.0.3"), "web")))
	ok(t, a.SetTables(t.Context(), all(c)))
	if !a.View().Endpoints[one].Task.Leaving || !c.View().Remotes[one].Task.Leaving {
		t.Error("the task gets connections again while it has its grace")
	}
	must[uint64](t)(a.DeleteEndpoint(t.Context(), one))
	if a.View(); len(a.leaving) > 0 {
		t.Errorf("remembered for ever: %v", a.leaving)
	}
}

// TestSinceWhenATaskLeavesOutlivesARestart: its connections get no more time by one, nor
// new ones.
func TestSinceWhenATaskLeavesOutlivesARestart(t *testing.T) {
	task := model.TaskID("task-" + one.Short())
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := fresh(t)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	for _, told := range []func(){
		func() {},
		func() {
			ok(t, b.SetEngine(t.Context(), leads(swarm("nodeB", "192.168.0.2"), "web", task)))
			ok(t, a.SetTables(t.Context(), []Table{b.table(true)}))
		},
	} {
		if e := a.View().Endpoints[one]; !e.Leaves.IsZero() {
			t.Fatalf("it leaves since %s, and nobody has said so", e.Leaves)
		}
		told()
	}
	since := a.View().Endpoints[one].Leaves
	if since.IsZero() {
		t.Fatal("the leader's word is not noted")
	}
	// The leader's engine has forgotten the task, and this process too.
	ok(t, b.SetEngine(t.Context(), leads(swarm("nodeB", "192.168.0.2"), "web")))
	ok(t, a.SetTables(t.Context(), []Table{b.table(true)}))
	again := a.restarted(t)
	must[uint64](t)(again.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	if e := again.View().Endpoints[one]; e.Leaves != since || !e.Task.Leaving {
		t.Errorf("after a restart: %+v; want it to leave since %s", e, since)
	}
	// And the others hear it of this node, too.
	ok(t, b.SetTables(t.Context(), []Table{again.table(true)}))
	if !b.View().Remotes[one].Task.Leaving {
		t.Error("its node does not say that it leaves")
	}
}

// TestNodeThatIsLostIsToldOf: by the leader and by the lack of contact, and not by one of
// them alone.
func TestNodeThatIsLostIsToldOf(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	lead, other := fresh(t), fresh(t)
	ok(t, other.SetEngine(t.Context(), swarm("nodeC", "192.168.0.3")))
	for _, c := range []struct{ down, present, want bool }{
		{false, true, false}, {true, true, false}, {true, false, true}, {false, false, false}, {true, false, true}, {false, true, false},
	} {
		s := leads(swarm("nodeB", "192.168.0.2"), "web")
		s.Nodes = map[model.NodeID]model.EngineNode{"nodeA": {Down: c.down}, "nodeB": {}, "nodeC": {}}
		ok(t, lead.SetEngine(t.Context(), s))
		ok(t, lead.SetTables(t.Context(), []Table{a.table(c.present)}))
		ok(t, other.SetTables(t.Context(), []Table{a.table(c.present), lead.table(true)}))
		for name, n := range map[string]*node{"the leader": lead, "another": other} {
			if got := n.View().Remotes[one].Lost; got != c.want {
				t.Errorf("%+v: lost to %s: %t", c, name, got)
			}
		}
		// What a process has not heard in its life may be old: the node may be back.
		if lead.restarted(t).View().Remotes[one].Lost || other.restarted(t).View().Remotes[one].Lost {
			t.Errorf("%+v: lost to a process that has heard nothing yet", c)
		}
	}
	if _, said := lead.Records()[keyDown]; said {
		t.Error("no node is down, and there is a record that says which is")
	}
}

// TestNodeThatTheSwarmRemovedIsForgotten: it was out of contact, perhaps while
// this process did not run, so that nobody but the leader's list tells.
func TestNodeThatTheSwarmRemovedIsForgotten(t *testing.T) {
	h, err := New(Config{Journal: newJournal(), Now: time.Now, Log: slog.New(slog.DiscardHandler)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	entries := func(ip string) map[string][]byte {
		return map[string][]byte{
			keyNode: encode(nodeRecord{VTEP: netip.MustParseAddr("192.0.2.7")}),
			keyEndpoint + "e": encode(endpointRecord{
				Network: "net", Addr: netip.MustParseAddr(ip), MAC: model.MACFor(netip.MustParseAddr(ip)),
			}),
		}
	}
	lead := func(nodes ...model.NodeID) map[string][]byte {
		return map[string][]byte{
			keyNode: encode(nodeRecord{VTEP: netip.MustParseAddr("192.0.2.1")}), keyLead: encode(leadRecord{Claim: 1}), keyMembers: encode(membersRecord{nodes}),
		}
	}
	for _, tt := range []struct {
		name    string
		present bool
		members []model.NodeID
		want    int
	}{
		{"out of contact, and of the swarm", false, []model.NodeID{"lead", "gone"}, 1},
		{"in contact, and not listed yet", true, []model.NodeID{"lead"}, 1},
		{"out of contact, and removed", false, []model.NodeID{"lead"}, 0},
	} {
		err := h.SetTables(t.Context(), []Table{
			{Owner: "lead", Present: true, Whole: true, Entries: lead(tt.members...)},
			{Owner: "gone", Present: tt.present, Whole: true, Entries: entries("10.255.0.9")},
		})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(h.View().Remotes); n != tt.want {
			t.Errorf("%s: %d endpoints, want %d", tt.name, n, tt.want)
		}
		if n := len(h.Peers()); n != tt.want+1 {
			t.Errorf("%s: %d peers, want %d", tt.name, n, tt.want+1)
		}
	}
}

// TestWordOfALeaderThatLeftCountsUntilAnotherLeads: its services and their published
// ports are the swarm's, and its tasks went with it.
func TestWordOfALeaderThatLeftCountsUntilAnotherLeads(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp"})
	c := fresh(t)
	ok(t, c.SetEngine(t.Context(), swarm("nodeC", "192.168.0.3")))
	tell(t, a, b, c)
	if v := b.View(); len(v.Remotes) != 1 || len(v.Published) != 1 || len(v.Entries[web]) != 3 {
		t.Fatalf("before: %v %v %v", v.Remotes, v.Published, v.Entries)
	}
	tell(t, b, c)
	for name, n := range map[string]*node{"a node": b, "the same, restarted": b.restarted(t)} {
		v := n.View()
		if len(v.Remotes) > 0 || len(v.Published) != 1 || len(v.Services) != 1 || !v.Networks[web].Transit || len(v.Entries[web]) != 2 {
			t.Errorf("%s: %v %v %v %v", name, v.Remotes, v.Published, v.Networks, v.Entries)
		}
		if n.HearsLeader() || len(n.Peers()) != 1 {
			t.Errorf("%s: in contact with a leader: %t, and with %v", name, n.HearsLeader(), n.Peers())
		}
	}
	again := b.restarted(t)
	// Another leads, and there the service is no more.
	s := leads(swarm("nodeC", "192.168.0.3"), "web")
	s.Services = nil
	ok(t, c.SetEngine(t.Context(), s))
	for name, n := range map[string]*node{"a node": b, "the same, restarted": again} {
		tell(t, n, c)
		if v := n.View(); len(v.Published)+len(v.Services)+len(v.Networks) > 0 {
			t.Errorf("%s, another leads: %v %v %v", name, v.Published, v.Services, v.Networks)
		}
		for _, r := range n.journal.list() {
			if strings.HasPrefix(r.Key, "nodeA") {
				t.Errorf("%s, another leads: there is still %s %s", name, r.Kind, r.Key)
			}
		}
	}
	if v := c.View(); len(v.Published)+len(v.Services) > 0 {
		t.Errorf("the leader: %v %v", v.Published, v.Services)
	}
}

// TestALeaderThatNeverHeardOfTheFormerOneCounts: its number may be lower.
func TestALeaderThatNeverHeardOfTheFormerOneCounts(t *testing.T) {
	former := Table{Owner: "nodeA", Present: true, Whole: true, Entries: map[string][]byte{
		keyNode: encode(nodeRecord{VTEP: addr("192.168.0.1")}), keyLead: encode(leadRecord{Claim: 7}),
		keyMembers: encode(membersRecord{[]model.NodeID{"nodeA", "nodeB"}}), keyService + "old": encode(serviceRecord{Name: "old"}),
	}}
	b, d := fresh(t), fresh(t)
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	ok(t, b.SetTables(t.Context(), []Table{former}))
	ok(t, b.SetTables(t.Context(), nil))
	if v := b.View(); len(v.Services) != 1 || v.Services["old"].Name != "old" {
		t.Errorf("nobody leads: %v", v.Services)
	}
	if _, kept := b.tables["nodeA"].entries[keyMembers]; kept {
		t.Error("what it said of nodes is kept")
	}
	ok(t, d.SetEngine(t.Context(), leads(swarm("nodeD", "192.168.0.4"), "web")))
	again := b.restarted(t)
	for name, n := range map[string]*node{"a node": b, "restarted": again} {
		ok(t, n.SetTables(t.Context(), []Table{d.table(false)}))
		if v := n.View(); v.Services["old"].Name != "old" {
			t.Errorf("%s, out of contact with the new leader: %v", name, v.Services)
		}
		ok(t, n.SetTables(t.Context(), []Table{d.table(true)}))
		if v := n.View(); len(v.Services) != 1 || v.Services[svc].Name != "web" {
			t.Errorf("%s, another leads: %v", name, v.Services)
		}
	}
}
