package view

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

// same compares views but for what a restart may change.
func same(a, b model.View) string {
	return cmp.Diff(a, b,
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmpopts.EquateEmpty(), cmpopts.IgnoreFields(model.View{}, "Revision", "Now"), cmpopts.IgnoreFields(model.Network{}, "Name"))
}

func TestAnEngineThatCannotBeAskedIsNoNews(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	s := leads(runs(swarm("nodeA", "192.168.0.1"), one), "web", "task-9")
	s.Networks = map[model.NetworkID]model.EngineNetwork{web: {Name: "web"}}
	ok(t, a.SetEngine(t.Context(), s))
	for name, silent := range map[string]model.EngineSnapshot{
		"nothing":    {},
		"swarm":      {SwarmValid: true, Active: true, Node: "nodeA", NodeAddr: addr("192.168.0.1"), Leader: true, Manager: true},
		"containers": {ContainersValid: true, Containers: s.Containers},
		"networks":   {NetworksValid: true, Networks: s.Networks},
	} {
		t.Run(name, func(t *testing.T) {
			before, records := a.View(), a.Records()
			ok(t, a.SetEngine(t.Context(), silent))
			after := a.View()
			if d := same(before, after); d != "" || before.Revision != after.Revision || after.Networks[web].Name != "web" {
				t.Errorf("revision %d, then %d; before (-) and after (+):\n%s", before.Revision, after.Revision, d)
			}
			if !maps.EqualFunc(records, a.Records(), slices.Equal) {
				t.Error("other nodes are told something else")
			}
			if e := a.Engine(); !e.Leader || e.Node != "nodeA" || e.ServicesValid {
				t.Errorf("engine: %+v", e)
			}
		})
	}
}

func TestARestartLosesNoReadyBackend(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	_, err := a.Observe(t.Context(), read(a.View(), true))
	ok(t, err)
	before := a.View()
	if e := before.Endpoints[one]; !e.Task.Ready || e.Prepared != vip {
		t.Fatalf("not ready to begin with: %+v", e)
	}
	again := a.restarted(t)
	for _, s := range []model.EngineSnapshot{
		{}, // the engine is busy
		{SwarmValid: true, Active: true, Node: "nodeA", NodeAddr: addr("192.168.0.1")},
		runs(swarm("nodeA", "192.168.0.1"), one),
	} {
		if d := same(before, again.View()); d != "" {
			t.Fatalf("before (-) and after (+):\n%s", d)
		}
		ok(t, again.SetEngine(t.Context(), s))
	}
	// Verbose inspect did not work: the VIP is kept; the task is listed, though.
	s := runs(swarm("nodeA", "192.168.0.1"), one)
	c := s.Containers[one]
	c.Task.VIP = netip.Addr{}
	s.Containers[one] = c
	ok(t, again.SetEngine(t.Context(), s))
	if d := same(before, again.View()); d != "" {
		t.Errorf("before (-) and after (+):\n%s", d)
	}
	ok(t, again.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")))
	if again.View().Endpoints[one].Task.Ready {
		t.Error("the engine does not list it, and it counts as ready")
	}
}

// read is a round that found the pair of endpoint one taken, and its translation
// there or not.
func read(v model.View, translated bool) reconcile.Round {
	pair := kernel.Link{NS: overlay.NetnsName(v.Networks[web]), Name: overlay.HostEnd(one), Kind: kernel.Veth}
	r := reconcile.Round{
		View: v,
		Want: kernel.State{kernel.TaskVIP{Sandbox: sandbox(one), VIP: vip}: kernel.TaskVIPSpec{Addr: addr("10.255.0.2")}},
		Read: kernel.State{pair: kernel.LinkSpec{Alias: "sluice e"}},
	}
	if translated {
		r.Read[kernel.TaskVIP{Sandbox: sandbox(one), VIP: vip}] = kernel.TaskVIPSpec{Addr: addr("10.255.0.2"), Loop: true}
	}
	r.Have = r.Want
	return r
}

func TestOnlyWhatWasReadBackCounts(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Joined)))
	expect := func(what string, p model.Phase, prepared netip.Addr) {
		t.Helper()
		for _, n := range []*node{a, a.restarted(t)} {
			if e := n.View().Endpoints[one]; e.Phase != p || e.Prepared != prepared {
				t.Errorf("%s: %s, prepared %s", what, e.Phase, e.Prepared)
			}
		}
	}
	observe := func(r reconcile.Round, unread bool) {
		t.Helper()
		if got := must[bool](t)(a.Observe(t.Context(), r)); got != unread {
			t.Errorf("unread: %t, want %t", got, unread)
		}
	}
	r := read(a.View(), true)
	r.Read = nil
	observe(r, true) // made, but not read back
	expect("a round from memory", model.Joined, netip.Addr{})

	r = read(a.View(), false)
	pair := kernel.Link{NS: overlay.NetnsName(network(web)), Name: overlay.HostEnd(one), Kind: kernel.Veth}
	r.Read[pair] = kernel.LinkSpec{Peer: "slc1"}
	observe(r, true)
	expect("the engine has not taken it", model.Joined, netip.Addr{})

	observe(read(a.View(), false), true)
	expect("taken", model.Taken, netip.Addr{})

	wrong := read(a.View(), true)
	wrong.Read[kernel.TaskVIP{Sandbox: sandbox(one), VIP: vip}] = kernel.TaskVIPSpec{Addr: addr("10.255.0.99")}
	observe(wrong, true)
	expect("translated to another address", model.Taken, netip.Addr{})

	rev := a.View().Revision
	observe(read(a.View(), true), false)
	expect("translated", model.Taken, vip)
	if a.View().Revision == rev {
		t.Error("nobody is told")
	}
	rev = a.View().Revision
	observe(read(a.View(), true), false)
	if a.View().Revision != rev {
		t.Error("the same again is news")
	}

	failed := read(a.View(), false)
	failed.Failed = map[kernel.Key]error{kernel.TaskVIP{Sandbox: sandbox(one), VIP: vip}: kernel.ErrNotExist}
	observe(failed, false) // the loop repeats it anyway
	expect("the translation is gone", model.Taken, netip.Addr{})

	// A round that began before the endpoint was there says nothing of it.
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(two, "10.255.0.3", model.Joined)))
	late := read(model.View{Endpoints: map[model.EndpointID]model.Endpoint{one: {}}}, true)
	late.Read[kernel.Link{NS: overlay.NetnsName(network(web)), Name: overlay.HostEnd(two), Kind: kernel.Veth}] = kernel.LinkSpec{}
	observe(late, false)
	if e := a.View().Endpoints[two]; e.Phase != model.Joined {
		t.Errorf("the newer endpoint is %s", e.Phase)
	}
}

// TestATaskOnTwoNetworksIsPreparedForEach: its endpoints share a namespace, and
// a translation belongs to the one whose address it leads to.
func TestATaskOnTwoNetworksIsPreparedForEach(t *testing.T) {
	const db model.NetworkID = "dbnetwork000000000000000b"
	dbVIP := addr("10.254.0.9")
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutNetwork(t.Context(), network(db)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	second := endpoint(two, "10.254.0.2", model.Taken)
	second.Network, second.Sandbox = db, sandbox(one)
	must[uint64](t)(a.PutEndpoint(t.Context(), second))

	webKey, dbKey := kernel.TaskVIP{Sandbox: sandbox(one), VIP: vip}, kernel.TaskVIP{Sandbox: sandbox(one), VIP: dbVIP}
	webSpec, dbSpec := kernel.TaskVIPSpec{Addr: addr("10.255.0.2")}, kernel.TaskVIPSpec{Addr: addr("10.254.0.2")}
	elsewhere := kernel.TaskVIP{Sandbox: sandbox(two), VIP: dbVIP} // another task's
	want := kernel.State{webKey: webSpec, dbKey: dbSpec}
	none := netip.Addr{}
	for _, c := range []struct {
		name             string
		want, read       kernel.State
		unread           bool
		prepared, second netip.Addr
	}{
		{"neither is there", want, kernel.State{}, true, none, none},
		{"one of two", want, kernel.State{dbKey: dbSpec}, true, none, dbVIP},
		{"both", want, want, false, vip, dbVIP},
		{"to each other's address", want, kernel.State{webKey: dbSpec, dbKey: webSpec}, true, none, none},
		{"in another namespace", want, kernel.State{webKey: webSpec, elsewhere: dbSpec}, true, vip, none},
		{"a service on one of them", kernel.State{webKey: webSpec}, want, false, vip, none},
	} {
		t.Run(c.name, func(t *testing.T) {
			unread := must[bool](t)(a.Observe(t.Context(), reconcile.Round{View: a.View(), Want: c.want, Read: c.read}))
			e, s := a.View().Endpoints[one], a.View().Endpoints[two]
			if unread != c.unread || e.Prepared != c.prepared || s.Prepared != c.second {
				t.Errorf("unread %t, prepared %s and %s; want %t, %s and %s", unread, e.Prepared, s.Prepared, c.unread, c.prepared, c.second)
			}
		})
	}
}

// TestATunnelCountsOnceItWasReadBack: as a translation does, and peers are told.
func TestATunnelCountsOnceItWasReadBack(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	ok(t, a.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")))
	key := kernel.TaskTunnel{Sandbox: sandbox(one), Addr: addr("10.255.0.2")}
	elsewhere := kernel.TaskTunnel{Sandbox: sandbox(one), Addr: addr("10.254.0.2")} // the task's, on another network
	state := func(keys ...kernel.Key) kernel.State {
		s := kernel.State{}
		for _, k := range keys {
			s[k] = kernel.TaskTunnelSpec{}
		}
		return s
	}
	for _, c := range []struct {
		name           string
		want, read     kernel.State
		failed         kernel.Key
		unread, tunnel bool
	}{
		{"made, not read", state(key), nil, nil, true, false},
		{"not there", state(key), state(), nil, true, false},
		{"another's", state(key), state(elsewhere), nil, true, false},
		{"there", state(key), state(key), nil, false, true},
		{"still there, by memory", state(key), nil, nil, false, true},
		{"a kernel that cannot make it", state(key), state(), key, false, false},
		{"there again", state(key), state(key), nil, false, true},
		{"of no more use", state(), state(key), nil, false, false},
		{"another's is of use", state(elsewhere), state(elsewhere), nil, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := reconcile.Round{View: a.View(), Want: c.want, Read: c.read}
			if c.failed != nil {
				r.Failed = map[kernel.Key]error{c.failed: kernel.ErrUnsupported}
			}
			if unread := must[bool](t)(a.Observe(t.Context(), r)); unread != c.unread {
				t.Errorf("unread %t, want %t", unread, c.unread)
			}
			b := fresh(t)
			ok(t, b.SetTables(t.Context(), []Table{a.table(true)}))
			here, there := a.View().Endpoints[one].Tunnel, b.View().Remotes[one].Tunnel
			if here != c.tunnel || there != c.tunnel || a.restarted(t).View().Endpoints[one].Tunnel != c.tunnel {
				t.Errorf("tunnel %t, to others %t; want %t", here, there, c.tunnel)
			}
			must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
			if a.View().Endpoints[one].Tunnel != c.tunnel {
				t.Error("a verb has undone it")
			}
		})
	}
}

// TestRecordsHoldWhatIsSet: nodes of two versions share a swarm while it is
// upgraded, and each endpoint has a record on every node.
func TestRecordsHoldWhatIsSet(t *testing.T) {
	all := model.ServiceOptions{
		Scheduler: "wrr", Mode: "tun", Weight: 3, Ports: "80/tcp", Persist: 300, PersistBits: 24,
		OnePacket: true, Upper: 9, Lower: 3, Idle: 60,
		Published: "81:80/tcp", Bind: "192.0.2.1", Nodes: "zone=a", Allow: "10.0.0.0/8", Source: model.Masquerade,
	}
	at := addr("10.255.0.2")
	for _, c := range []struct {
		name string
		r    endpointRecord
		want string
	}{
		{"one option", endpointRecord{Network: web, Addr: at, MAC: model.MACFor(at), Options: model.ServiceOptions{Weight: 7}},
			`{"network":"webnetwork00000000000000a","addr":"10.255.0.2","mac":"02:42:0a:ff:00:02","options":{"Weight":7}}`},
		{"all", endpointRecord{Network: web, Addr: at, MAC: model.MACFor(at), Options: all, Tunnel: true, Meshed: true},
			`{"network":"webnetwork00000000000000a","addr":"10.255.0.2","mac":"02:42:0a:ff:00:02","options":{"Scheduler":"wrr","Mode":"tun","Weight":3,"Ports":"80/tcp","Persist":300,"PersistBits":24,"OnePacket":true,"Upper":9,"Lower":3,"Idle":60,"Published":"81:80/tcp","Bind":"192.0.2.1","Nodes":"zone=a","Allow":"10.0.0.0/8","Source":"masquerade"},"tunnel":true,"meshed":true}`},
	} {
		if got := string(encode(c.r)); got != c.want {
			t.Errorf("%s: got\n%s, want\n%s", c.name, got, c.want)
		}
		if v, err := decode(keyEndpoint+"x", encode(c.r)); err != nil || v != c.r {
			t.Errorf("%s: reads back as %+v, %v", c.name, v, err)
		}
	}
	v, err := decode(keyEndpoint+"x", []byte(`{"network":"web","addr":"10.255.0.2","mac":"02:42:0a:ff:00:02","options":{"Scheduler":"","Mode":"","Weight":7}}`))
	if r, ok := v.(endpointRecord); err != nil || !ok || r.Options != (model.ServiceOptions{Weight: 7}) || r.Tunnel || r.Meshed {
		t.Errorf("the record of a node of the version before: %+v, %v", v, err)
	}
}

// TestAVerbDoesNotUndoWhatWasReadMeanwhile: the driver looks, changes and puts.
func TestAVerbDoesNotUndoWhatWasReadMeanwhile(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	e, _ := a.Endpoint(one)
	ok(t, a.SetEngine(t.Context(), runs(swarm("nodeA", "192.168.0.1"), one)))
	_, err := a.Observe(t.Context(), read(a.View(), true))
	ok(t, err)
	e.Left = true
	must[uint64](t)(a.PutEndpoint(t.Context(), e))
	if got := a.View().Endpoints[one]; !got.Left || !got.Task.Ready || got.Prepared != vip {
		t.Errorf("got %+v", got)
	}
}

func TestAFailingJournalLeavesIntentsAsTheyWere(t *testing.T) {
	for name, do := range map[string]func(ctx context.Context, h *Hub) error{
		"PutNetwork": func(ctx context.Context, h *Hub) error { _, err := h.PutNetwork(ctx, network("other")); return err },
		"replace": func(ctx context.Context, h *Hub) error {
			_, err := h.PutNetwork(ctx, model.Network{ID: web})
			return err
		},
		"PutEndpoint": func(ctx context.Context, h *Hub) error {
			_, err := h.PutEndpoint(ctx, endpoint(two, "10.255.0.3", model.Joined))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
			before, told := a.View(), a.changed
			a.journal.fail = errDisk
			if err := do(t.Context(), a.Hub); !errors.Is(err, errDisk) {
				t.Errorf("got %v", err)
			}
			if d := same(before, a.View()); d != "" || a.changed != told || a.View().Revision != before.Revision {
				t.Errorf("told %d times; before (-) and after (+):\n%s", a.changed-told, d)
			}
			a.journal.fail = nil
			ok(t, do(t.Context(), a.Hub))
			if d := same(before, a.View()); d == "" {
				t.Error("and then it does nothing")
			}
		})
	}
}

// TestFactsCountAlsoWhenTheyCannotBeKept: what is, is.
func TestFactsCountAlsoWhenTheyCannotBeKept(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Joined)))
	b := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	a.journal.fail = errDisk
	if err := a.SetEngine(t.Context(), runs(swarm("nodeA", "192.168.0.1"), one)); !errors.Is(err, errDisk) {
		t.Errorf("SetEngine: %v", err)
	}
	if _, err := a.Observe(t.Context(), read(a.View(), true)); !errors.Is(err, errDisk) {
		t.Errorf("Observe: %v", err)
	}
	if err := a.SetTables(t.Context(), []Table{b.table(true)}); !errors.Is(err, errDisk) {
		t.Errorf("SetTables: %v", err)
	}
	v := a.View()
	if e := v.Endpoints[one]; !e.Task.Ready || e.Phase != model.Taken || e.Prepared != vip || len(v.Remotes) != 1 {
		t.Errorf("view: %+v, %+v", e, v.Remotes)
	}
}

func TestDeletingWhatIsUnknownIsNoNews(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	before := a.View().Revision
	if rev := must[uint64](t)(a.DeleteNetwork(t.Context(), "unknown")); rev != before {
		t.Errorf("network: revision %d, was %d", rev, before)
	}
	if rev := must[uint64](t)(a.DeleteEndpoint(t.Context(), "unknown")); rev != before {
		t.Errorf("endpoint: revision %d, was %d", rev, before)
	}
	must[uint64](t)(a.DeleteNetwork(t.Context(), web))
	for _, n := range []*node{a, a.restarted(t)} {
		if v := n.View(); len(v.Networks)+len(v.Endpoints) > 0 {
			t.Errorf("a network's endpoints outlive it: %v", v.Endpoints)
		}
	}
}

func TestAViewDoesNotChangeAfterwards(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	v := a.View()
	if again := a.View(); again.Revision != v.Revision {
		t.Errorf("looking is a change: %d, then %d", v.Revision, again.Revision)
	}
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(two, "10.255.0.3", model.Joined)))
	must[uint64](t)(a.DeleteEndpoint(t.Context(), one))
	if _, there := v.Endpoints[one]; !there || len(v.Endpoints) != 1 {
		t.Errorf("endpoints of the old view: %v", v.Endpoints)
	}
	if a.View().Revision <= v.Revision {
		t.Error("the revision did not grow")
	}
}

func TestConcurrentUse(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	tables := []Table{b.table(true)}
	a.cfg.Changed = func(bool) {} // the counter is one test's only
	var wg sync.WaitGroup
	for i := range 4 {
		for _, do := range []func(j int) error{
			func(j int) error {
				return a.SetEngine(t.Context(), leads(runs(swarm("nodeA", "192.168.0.1"), one), fmt.Sprint(j)))
			},
			func(int) error { return a.SetTables(t.Context(), tables) },
			func(int) error { _, err := a.Observe(t.Context(), read(a.View(), true)); return err },
			func(int) error { return a.Sweep(t.Context(), kernel.State{}) },
			func(j int) error {
				_, err := a.PutEndpoint(t.Context(), endpoint(model.EndpointID(fmt.Sprint("e", i, "-", j)), "10.255.0.8", model.Created))
				return err
			},
			func(j int) error {
				_, err := a.DeleteEndpoint(t.Context(), model.EndpointID(fmt.Sprint("e", i, "-", j)))
				return err
			},
			func(int) error { a.Records(); a.Peers(); a.Engine(); a.Self(); return nil },
			func(j int) error { return a.SetVTEP(t.Context(), addr(fmt.Sprintf("192.168.1.%d", j))) },
		} {
			wg.Go(func() {
				for j := range 50 {
					if err := do(j); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	wg.Wait()
	if d := same(a.View(), a.restarted(t).View()); d != "" {
		t.Errorf("in memory (-) and durable (+) differ:\n%s", d)
	}
}
