package view

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

// publishes makes a leader's snapshot one of a swarm in which the service
// publishes ports, by options, and lists the network and the nodes' labels.
func publishes(s model.EngineSnapshot, o model.ServiceOptions, mtu string) model.EngineSnapshot {
	s = leads(s, "web")
	sv := s.Services[svc]
	sv.Options = map[model.NetworkID]model.ServiceOptions{web: o}
	s.Services = map[model.ServiceID]model.Service{svc: sv}
	opts := map[string]string{"sluice.vni": "7", "sluice.scheduler": "sh"}
	if mtu != "" {
		opts["sluice.mtu"] = mtu
	}
	s.Networks = map[model.NetworkID]model.EngineNetwork{web: {
		ID: web, Name: "shop", Swarm: true, Subnet: network(web).Subnet, Gateway: network(web).Gateway, Options: opts,
	}}
	s.Nodes = map[model.NodeID]model.EngineNode{
		"nodeA": {Labels: map[string]string{"zone": "a", "rack": "1"}}, "nodeB": {Labels: map[string]string{"zone": "b"}}, "nodeC": {},
	}
	return s
}

// mesh is a leader, and a node without a task, that have heard of each other.
func mesh(t *testing.T, o model.ServiceOptions) (a, b *node) {
	t.Helper()
	a, b = member(t, "nodeA", "192.168.0.1", one, "10.255.0.2"), fresh(t)
	ok(t, a.SetEngine(t.Context(), publishes(runs(swarm("nodeA", "192.168.0.1"), one), o, "1400")))
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	tell(t, a, b)
	return a, b
}

// tell exchanges records as often as claims need to follow each other.
func tell(t *testing.T, nodes ...*node) {
	t.Helper()
	for range 3 {
		var all []Table
		for _, n := range nodes {
			all = append(all, n.table(true))
		}
		for _, n := range nodes {
			ok(t, n.SetTables(t.Context(), all))
			ok(t, n.Claim(t.Context()))
		}
	}
}

func TestANodeWithoutATaskJoinsAPublishedNetworkAndLeaves(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp"})
	want := model.Network{
		ID: web, Name: "shop", Subnet: network(web).Subnet, Gateway: network(web).Gateway, VNI: 7, MTU: 1400,
		Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "sh"}, Transit: true,
	}
	if got := b.View().Networks[web]; got != want {
		t.Errorf("joined as %+v, want %+v", got, want)
	}
	if got := a.View().Networks[web]; got.Transit || got.MTU != 1450 {
		t.Errorf("the node with a task has %+v", got)
	}
	if _, own := b.Network(web); own {
		t.Error("a driver would take it for one of its own")
	}
	// A restart without contact, here and there, changes nothing.
	for name, n := range map[string]*node{"leader": a, "other": b} {
		if d := same(n.View(), n.restarted(t).View()); d != "" {
			t.Errorf("%s: before (-) and after (+):\n%s", name, d)
		}
	}
	// The engine asks for the network as well: it is here for a task now.
	must[uint64](t)(b.PutNetwork(t.Context(), network(web)))
	if got := b.View().Networks[web]; got.Transit {
		t.Errorf("with a task: %+v", got)
	}
	must[uint64](t)(b.DeleteNetwork(t.Context(), web))
	if got := b.View().Networks[web]; got != want {
		t.Errorf("without one again: %+v", got)
	}
	ok(t, a.SetEngine(t.Context(), publishes(runs(swarm("nodeA", "192.168.0.1"), one), model.ServiceOptions{}, "1400")))
	tell(t, a, b)
	for name, n := range map[string]*node{"leader": a, "other": b, "restarted": b.restarted(t)} {
		v := n.View()
		if len(v.Published)+len(v.Entries)+len(v.Labels) > 0 || name != "leader" && len(v.Networks) > 0 {
			t.Errorf("%s, nothing is published any more: %v %v %v", name, v.Networks, v.Published, v.Entries)
		}
	}
}

func TestAPortStaysPublishedWithoutTasks(t *testing.T) {
	a, b := fresh(t), fresh(t)
	ok(t, a.SetEngine(t.Context(), publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp"}, "1400")))
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	tell(t, a, b)
	for name, n := range map[string]*node{"leader": a, "other": b} {
		if v := n.View(); !v.Networks[web].Transit || len(v.Entries[web]) != 2 {
			t.Errorf("%s: %v %v", name, v.Networks, v.Entries)
		}
	}
}

func TestLabelsSayWhichNodesEnter(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp", Nodes: "zone=a"})
	want := map[model.NodeID]map[string]string{"nodeA": {"zone": "a"}, "nodeB": {"zone": "b"}, "nodeC": nil}
	for name, n := range map[string]*node{"leader": a, "other": b, "restarted leader": a.restarted(t), "restarted": b.restarted(t)} {
		v := n.View()
		if !maps.EqualFunc(v.Labels, want, func(a, b map[string]string) bool { return maps.Equal(a, b) }) {
			t.Errorf("%s: labels %v", name, v.Labels)
		}
		if _, joined := v.Networks[web]; joined == (v.Self.Node == "nodeB") {
			t.Errorf("%s: networks %v", name, v.Networks)
		}
	}
	// A label alone is news.
	s := publishes(runs(swarm("nodeA", "192.168.0.1"), one), model.ServiceOptions{Published: "80/tcp", Nodes: "zone=a"}, "1400")
	s.Nodes["nodeB"] = model.EngineNode{Labels: map[string]string{"Zone": "A"}}
	ok(t, a.SetEngine(t.Context(), s))
	tell(t, a, b)
	if v := b.View(); !v.Networks[web].Transit || len(v.Entries[web]) != 2 {
		t.Errorf("now of the zone: %v %v %v", v.Networks, v.Labels, v.Entries)
	}
}

// TestADrainedNodeHearsOfIt: a worker's engine does not tell it, the leader does.
func TestADrainedNodeHearsOfIt(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp"})
	set := func(drained ...model.NodeID) {
		t.Helper()
		s := publishes(runs(swarm("nodeA", "192.168.0.1"), one), model.ServiceOptions{Published: "80/tcp"}, "1400")
		for _, id := range drained {
			n := s.Nodes[id]
			n.Drained = true
			s.Nodes[id] = n
		}
		ok(t, a.SetEngine(t.Context(), s))
		tell(t, a, b)
	}
	for _, c := range []struct {
		drained []model.NodeID
		a, b    bool
	}{
		{nil, false, false},
		{[]model.NodeID{"nodeB"}, false, true},
		{[]model.NodeID{"nodeA", "nodeB", "nodeC"}, true, true},
		{[]model.NodeID{"nodeA"}, true, false},
		{nil, false, false},
	} {
		set(c.drained...)
		for name, n := range map[string]*node{"leader": a, "restarted leader": a.restarted(t), "other": b, "restarted": b.restarted(t)} {
			want := c.b
			if strings.HasSuffix(name, "leader") {
				want = c.a
			}
			if v := n.View(); v.Drained != want {
				t.Errorf("%v drained: %s is told %v", c.drained, name, v.Drained)
			}
			if v := n.View(); len(v.Networks) != 1 {
				t.Errorf("%v drained: %s serves %v", c.drained, name, v.Networks)
			}
		}
	}
	if _, said := a.Records()[keyDrained]; said {
		t.Error("nobody is drained, and there is a record that says who is")
	}
}

func TestClaimsAreToldAndKept(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp"})
	va, vb := a.View(), b.View()
	if d := cmp.Diff(va.Entries, vb.Entries, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Fatalf("a (-) and b (+) differ:\n%s", d)
	}
	ea, eb := va.Entries[web]["nodeA"], va.Entries[web]["nodeB"]
	if ea.Addr == eb.Addr || ea.Number == eb.Number || ea.VTEP != addr("192.168.0.1") || eb.VTEP != addr("192.168.0.2") {
		t.Errorf("claims: %+v and %+v", ea, eb)
	}
	if got := b.restarted(t).View().Entries[web]["nodeB"]; got != eb {
		t.Errorf("after a restart %+v, before %+v", got, eb)
	}
	// A third one that was apart has taken b's: it has a larger id, and moves.
	c := fresh(t)
	ok(t, c.SetEngine(t.Context(), swarm("nodeC", "192.168.0.3")))
	c.entered[web] = entryRecord{eb.Addr, eb.Number}
	tell(t, a, b, c)
	if got := b.View().Entries[web]; got["nodeB"] != eb || got["nodeC"].Addr == eb.Addr || got["nodeC"].Number == eb.Number || len(got) != 3 {
		t.Errorf("with a third: %+v", got)
	}
	// Another swarm has other claims.
	ok(t, c.SetEngine(t.Context(), swarm("nodeX", "192.168.0.3")))
	if v := c.restarted(t).View(); len(v.Entries) > 0 || len(c.Records()) != 1 {
		t.Errorf("in another swarm: %v", v.Entries)
	}
}

func TestAClaimThatCannotBeRecordedIsNotMade(t *testing.T) {
	b := fresh(t)
	a, _ := mesh(t, model.ServiceOptions{Published: "80/tcp"})
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	b.journal.fail = errDisk
	if err := b.Claim(t.Context()); !errors.Is(err, errDisk) || len(b.View().Entries[web]) != 1 {
		t.Fatalf("%v, %v", err, b.View().Entries)
	}
	b.journal.fail = nil
	ok(t, b.Claim(t.Context()))
	rev := b.View().Revision
	ok(t, b.Claim(t.Context()))
	if v := b.View(); len(v.Entries[web]) != 2 || v.Revision != rev {
		t.Errorf("%v, revision %d after %d", v.Entries, v.Revision, rev)
	}
}

func TestANetworkWithoutRoomIsTold(t *testing.T) {
	a := fresh(t)
	s := publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp"}, "1400")
	n := s.Networks[web]
	n.Subnet, n.Gateway = netip.MustParsePrefix("10.255.0.0/26"), addr("10.255.0.1")
	s.Networks[web] = n
	ok(t, a.SetEngine(t.Context(), s))
	ok(t, a.Claim(t.Context()))
	if got := a.Unclaimed(); len(got) != 1 || !strings.Contains(got[web].Error(), "smaller than a /24") {
		t.Errorf("told: %v", got)
	}
}

func TestTheMTUMayBeLeftToTheNodes(t *testing.T) {
	for _, c := range []struct {
		name string
		mtu  func(netip.Addr) (int, error)
		want int // 0: not joined
	}{
		{"known", func(a netip.Addr) (int, error) { return 1000 + int(a.As4()[3]), nil }, 1002},
		{"not known", func(netip.Addr) (int, error) { return -50, errors.New("no such device") }, 0},
		{"nobody to ask", nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := fresh(t), fresh(t)
			b.cfg.MTU = c.mtu
			ok(t, a.SetEngine(t.Context(), publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp"}, "")))
			ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
			tell(t, a, b)
			if n, joined := b.View().Networks[web]; n.MTU != c.want || joined != (c.want > 0) {
				t.Errorf("joined %t with MTU %d", joined, n.MTU)
			}
		})
	}
}

// TestAJoinedNetworkStaysWhileTheMTUCannotBeRead: and one that could not be joined is,
// once it can, without other news.
func TestAJoinedNetworkStaysWhileTheMTUCannotBeRead(t *testing.T) {
	a, b := fresh(t), fresh(t)
	asked := errors.New("no such device")
	b.cfg.MTU = func(netip.Addr) (int, error) { return 1450, asked }
	ok(t, a.SetEngine(t.Context(), publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp"}, "")))
	ok(t, b.SetEngine(t.Context(), swarm("nodeB", "192.168.0.2")))
	tell(t, a, b)
	if _, joined := b.View().Networks[web]; joined {
		t.Fatal("joined without an MTU")
	}
	asked = nil
	before := b.changed
	ok(t, b.Claim(t.Context()))
	if n := b.View().Networks[web]; n.MTU != 1450 || b.changed == before {
		t.Fatalf("joined with %d, told %d times", n.MTU, b.changed-before)
	}
	asked = errors.New("no such device")
	b.SetTaken(t.Context(), nil, map[model.HostPort]string{{Proto: model.TCP, Port: 80}: "nginx (pid 7)"}) // a new view
	if n := b.View().Networks[web]; n.MTU != 1450 {
		t.Errorf("it has gone: %d", n.MTU)
	}
	// Another underlay has an MTU of its own.
	ok(t, b.SetVTEP(t.Context(), addr("192.168.0.9")))
	if n, joined := b.View().Networks[web]; joined {
		t.Errorf("by another underlay's MTU: %d", n.MTU)
	}
}

// TestAPortOnAnotherDriversNetworkIsNobodys: an older service has no port by it.
func TestAPortOnAnotherDriversNetworkIsNobodys(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp"})
	s := publishes(runs(swarm("nodeA", "192.168.0.1"), one), model.ServiceOptions{Published: "80/tcp"}, "1400")
	s.Services["older"] = model.Service{ID: "older", Created: time.Unix(1, 0), Options: map[model.NetworkID]model.ServiceOptions{
		"dockers": {Published: "80/tcp", Bind: "192.0.2.1", Weight: 3}, web: {Published: "81/tcp"},
	}}
	published := func() (out []model.Published) {
		for _, n := range []*node{a, b, b.restarted(t)} {
			o := n.View().Services["older"].Options
			out = append(out, o["dockers"].Published, o[web].Published)
		}
		return out
	}
	ok(t, a.SetEngine(t.Context(), s))
	tell(t, a, b)
	if got, want := published(), []model.Published{"", "81/tcp", "", "81/tcp", "", "81/tcp"}; !slices.Equal(got, want) {
		t.Errorf("published %q, want %q", got, want)
	}
	if o := a.View().Services["older"].Options["dockers"]; o != (model.ServiceOptions{Weight: 3}) {
		t.Errorf("the rest is %+v", o)
	}
	if s.Services["older"].Options["dockers"].Published == "" {
		t.Error("the snapshot was changed")
	}
	// A network without a driver yet may be one of ours.
	s.Unallocated = map[model.NetworkID]string{"dockers": "new"}
	ok(t, a.SetEngine(t.Context(), s))
	tell(t, a, b)
	if got, want := published(), []model.Published{"80/tcp", "81/tcp", "80/tcp", "81/tcp", "80/tcp", "81/tcp"}; !slices.Equal(got, want) {
		t.Errorf("not allocated: published %q, want %q", got, want)
	}
}

func TestALeaderThatCannotAskRepeatsItself(t *testing.T) {
	a, b := mesh(t, model.ServiceOptions{Published: "80/tcp", Nodes: "zone!=x"})
	before := b.View()
	again := a.restarted(t)
	ok(t, again.SetEngine(t.Context(), model.EngineSnapshot{HostName: "nodeA"}))
	ok(t, again.SetEngine(t.Context(), model.EngineSnapshot{HostName: "renamed"}))
	ok(t, b.SetTables(t.Context(), []Table{again.table(true), b.table(true)}))
	if d := same(before, b.View()); d != "" {
		t.Errorf("before (-) and after (+):\n%s", d)
	}
	// An engine that is being stopped is no manager any more, and lists no network of
	// the swarm; not even those of its tasks when these have ended.
	stopping := swarm("nodeA", "192.168.0.1")
	ok(t, a.SetEngine(t.Context(), stopping))
	ok(t, again.SetEngine(t.Context(), stopping))
	for name, n := range map[string]*node{"the leader": a, "the leader, restarted": again, "the same, once more": a.restarted(t)} {
		ok(t, b.SetTables(t.Context(), []Table{n.table(true), b.table(true)}))
		if v := b.View(); len(v.Published) != 1 || !v.Networks[web].Transit || len(v.Labels) != 3 {
			t.Errorf("%s is being stopped: %v %v %v", name, v.Published, v.Networks, v.Labels)
		}
	}
	// It can, and the network is not allocated.
	s := publishes(swarm("nodeA", "192.168.0.1"), model.ServiceOptions{Published: "80/tcp", Nodes: "zone!=x"}, "")
	n := s.Networks[web]
	n.Options = nil
	s.Networks[web] = n
	ok(t, again.SetEngine(t.Context(), s))
	if v := again.View(); len(v.Published) > 0 {
		t.Errorf("published: %v", v.Published)
	}
}

// TestAnEndpointDoesNotRepeatWhatItsServicePublishes: it would be in the gossip
// of all nodes once for each task.
func TestAnEndpointDoesNotRepeatWhatItsServicePublishes(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	e, _ := a.Endpoint(one)
	e.Options = model.ServiceOptions{Weight: 3, Published: "80/tcp", Bind: "192.0.2.1", Nodes: "a=b", Allow: "10.0.0.0/8", Source: model.Masquerade}
	must[uint64](t)(a.PutEndpoint(context.Background(), e))
	b := fresh(t)
	ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
	if got := b.View().Remotes[one].Options; got != (model.ServiceOptions{Weight: 3}) {
		t.Errorf("told: %+v", got)
	}
	if a.View().Endpoints[one].Options != e.Options {
		t.Error("the intent has lost it")
	}
}

func TestTakenPortsAreNewsOnce(t *testing.T) {
	a := fresh(t)
	taken := map[model.HostPort]string{{Proto: model.TCP, Port: 80}: "nginx (pid 7)"}
	if v := a.View(); v.Tried != nil {
		t.Errorf("tried %v before anybody has", v.Tried)
	}
	a.SetTaken(t.Context(), nil, nil)
	if v := a.View(); v.Tried == nil || len(v.Tried) > 0 {
		t.Errorf("tried %#v, want that nothing was", v.Tried)
	}
	before := a.changed
	tried := []model.HostRange{{Proto: model.TCP, Lo: 80, Hi: 81}}
	a.SetTaken(t.Context(), tried, taken)
	a.SetTaken(t.Context(), slices.Clone(tried), maps.Clone(taken))
	if v := a.View(); !maps.Equal(v.Taken, taken) || !slices.Equal(v.Tried, tried) || a.changed != before+1 {
		t.Errorf("tried %v, taken %v, told %d times", v.Tried, v.Taken, a.changed-before)
	}
	if v := a.restarted(t).View(); len(v.Taken) > 0 || v.Tried != nil {
		t.Errorf("after a restart: %v, %v", v.Tried, v.Taken)
	}
}

// TestATaskIsMeshedOnceAllIsReadBack: as translations and tunnels are, and peers
// are told.
func TestATaskIsMeshedOnceAllIsReadBack(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	ok(t, a.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")))
	gw := network(web).Gateway
	tables := kernel.TaskMesh{Sandbox: sandbox(one), Addr: addr("10.255.0.2")}
	route := kernel.TaskRoute{Sandbox: sandbox(one), Addr: addr("10.255.0.2")}
	want := kernel.State{tables: kernel.TaskMeshSpec{UDP: true}, route: kernel.TaskRouteSpec{Gateway: gw, Loose: true}}
	masquerade := kernel.State{tables: kernel.TaskMeshSpec{}}
	for _, c := range []struct {
		name           string
		want, read     kernel.State
		failed         map[kernel.Key]error
		meshed, unread bool
	}{
		{"not wanted", kernel.State{}, kernel.State{}, nil, false, false},
		{"not there yet", want, kernel.State{}, nil, false, true},
		{"half of it", want, kernel.State{tables: kernel.TaskMeshSpec{UDP: true}}, nil, false, true},
		{"the other half", want, kernel.State{route: kernel.TaskRouteSpec{Gateway: gw, Loose: true}}, nil, false, true},
		{"both", want, want, nil, true, false},
		{"a default that has moved since", want, kernel.State{tables: kernel.TaskMeshSpec{UDP: true, Default: gw}, route: want[route]}, nil, true, false},
		{"not yet for UDP", want, kernel.State{tables: kernel.TaskMeshSpec{}, route: want[route]}, nil, false, true},
		{"more than is wanted", masquerade, want, nil, true, false},
		{"from memory only", want, nil, nil, true, true}, // as it was
		{"half could not be made", want, kernel.State{tables: kernel.TaskMeshSpec{UDP: true}}, map[kernel.Key]error{route: errDisk}, false, false},
		{"gone again", want, kernel.State{}, nil, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := a.View().Endpoints[one].Meshed
			r := reconcile.Round{View: a.View(), Want: c.want, Read: c.read, Failed: c.failed}
			unread := must[bool](t)(a.Observe(t.Context(), r))
			if c.read == nil {
				if now := a.View().Endpoints[one].Meshed; now != before {
					t.Errorf("a round from memory has changed it to %t", now)
				}
				return
			}
			b := fresh(t)
			ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
			here, there := a.View().Endpoints[one].Meshed, b.View().Remotes[one].Meshed
			if here != c.meshed || there != c.meshed || unread != c.unread || a.restarted(t).View().Endpoints[one].Meshed != c.meshed {
				t.Errorf("meshed %t, to others %t, unread %t; want %t, %t", here, there, unread, c.meshed, c.unread)
			}
			must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
			if a.View().Endpoints[one].Meshed != c.meshed {
				t.Error("a verb has undone it")
			}
		})
	}
}
