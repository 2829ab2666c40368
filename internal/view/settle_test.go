package view

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"sluice/internal/model"
)

// TestBlankViewIsPartialUntilAllIsTold walks through the start of a node whose
// state file was lost.
func TestBlankViewIsPartialUntilAllIsTold(t *testing.T) {
	now := time.Unix(1000, 0)
	h, err := New(Config{Journal: newJournal(), Now: func() time.Time { return now }, Blank: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	still := func(when string) {
		t.Helper()
		if h.Settle(ctx) || !h.View().Partial || !h.Partial() {
			t.Fatalf("%s: the view counts as whole", when)
		}
	}
	still("at the start")
	must := func(_ uint64, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(h.PutNetwork(ctx, model.Network{ID: "net", Subnet: netip.MustParsePrefix("10.255.0.0/20")}))
	h.Adopted()
	still("before the engine told the network's peers")
	if err := h.SetEngine(ctx, model.EngineSnapshot{NetworksValid: true, Networks: map[model.NetworkID]model.EngineNetwork{
		"net": {ID: "net", Peers: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")}},
	}}); err != nil {
		t.Fatal(err)
	}
	still("before the peer's table was heard")
	if err := h.SetTables(ctx, []Table{{Owner: "b", Present: true}}); err != nil {
		t.Fatal(err)
	}
	still("while the peer's table has gaps")
	e := model.Endpoint{ID: "e", Network: "net", Addr: netip.MustParseAddr("10.255.0.2"), Phase: model.Taken,
		Task: model.Task{Service: "s", Ready: true, VIP: netip.MustParseAddr("10.255.0.9")}}
	must(h.PutEndpoint(ctx, e))
	if err := h.SetTables(ctx, []Table{{Owner: "b", Present: true, Whole: true}}); err != nil {
		t.Fatal(err)
	}
	still("before the translation was read back")
	must(h.DeleteEndpoint(ctx, "e"))
	still("before a leading manager was heard")
	if err := h.SetTables(ctx, []Table{{Owner: "b", Present: true, Whole: true, Entries: map[string][]byte{keyLead: encode(leadRecord{Claim: 1})}}}); err != nil {
		t.Fatal(err)
	}
	before := h.View().Revision
	if !h.Settle(ctx) || h.View().Partial || h.View().Revision == before {
		t.Error("all is told, and the view is still partial, or it is no news")
	}
}

func TestBlankViewSettlesAfterAWhile(t *testing.T) {
	now := time.Unix(1000, 0)
	h, err := New(Config{Journal: newJournal(), Now: func() time.Time { return now }, Blank: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.PutNetwork(t.Context(), model.Network{ID: "net", Subnet: netip.MustParsePrefix("10.255.0.0/20")}); err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Hour)
	ctx := t.Context()
	if h.Settle(ctx) {
		t.Error("settled before anything was taken over")
	}
	h.Adopted()
	now = now.Add(settleTime)
	h.Adopted() // again: the first counts
	if !h.Settle(ctx) {
		t.Error("a peer that is out of reach keeps the view partial for ever")
	}
}

// TestBlankViewIsPartialUntilPublishedPortsWereTried: a port that was not is not planned,
// and a whole view would have its rules removed, which serve. So would one without this
// node's claims, of which the rules are made; also on a disk that takes nothing.
func TestBlankViewIsPartialUntilPublishedPortsWereTried(t *testing.T) {
	for name, disk := range map[string]error{"disk that takes all": nil, "disk that takes nothing": errDisk} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
			ok(t, a.SetEngine(ctx, publishes(runs(swarm("nodeA", "192.168.0.1"), one), model.ServiceOptions{Published: "80-81/tcp"}, "1400")))
			journal := newJournal()
			var h *Hub
			changed := func(bool) {
				if v := h.View(); !v.Partial && v.Entries[web]["nodeB"].Number == 0 {
					t.Errorf("revision %d is whole, and this node claims nothing", v.Revision)
				}
			}
			h, err := New(Config{
				Journal: journal, Now: func() time.Time { return newClock().now }, Blank: true, Changed: changed, Log: slog.New(slog.DiscardHandler),
			}, nil)
			ok(t, err)
			h.SetTaken(ctx, nil, nil)
			must[uint64](t)(h.PutNetwork(ctx, network(web)))
			h.Adopted()
			s := swarm("nodeB", "192.168.0.2")
			s.Networks = map[model.NetworkID]model.EngineNetwork{web: {ID: web, Peers: []netip.Addr{addr("192.168.0.1"), addr("192.168.0.2")}}}
			ok(t, h.SetEngine(ctx, s))
			ok(t, h.SetTables(ctx, []Table{a.table(true)}))
			if h.Settle(ctx) {
				t.Error("settled before the ports were tried")
			}
			h.SetTaken(ctx, []model.HostRange{{Proto: model.TCP, Lo: 80, Hi: 80}}, nil)
			if h.Settle(ctx) {
				t.Error("settled before all ports were tried")
			}
			journal.fail = disk
			h.SetTaken(ctx, []model.HostRange{{Proto: model.TCP, Lo: 80, Hi: 81}}, map[model.HostPort]string{{Proto: model.TCP, Port: 81}: "nginx (pid 7)"})
			if h.View().Partial {
				t.Error("all is told and tried, and the view is still partial")
			}
			journal.fail = nil
			ok(t, h.SetEngine(ctx, s))
			again, err := New(Config{Journal: journal, Now: h.cfg.Now, Log: h.cfg.Log}, journal.list())
			ok(t, err)
			if got, want := again.View().Entries[web]["nodeB"], h.View().Entries[web]["nodeB"]; got != want {
				t.Errorf("after a restart it claims %+v, before %+v", got, want)
			}
		})
	}
}

// TestABlankNodeWithoutTasksWaitsForTheLeader: it may be an entry of any network, and
// only a leading manager says of which.
func TestABlankNodeWithoutTasksWaitsForTheLeader(t *testing.T) {
	ctx := t.Context()
	blank := func() *Hub {
		h, err := New(Config{Journal: newJournal(), Now: func() time.Time { return newClock().now }, Blank: true, Log: slog.New(slog.DiscardHandler)}, nil)
		ok(t, err)
		h.Adopted()
		return h
	}
	h := blank()
	ok(t, h.SetEngine(ctx, swarm("nodeB", "192.168.0.2")))
	if h.Settle(ctx) {
		t.Error("settled before anybody was heard")
	}
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	ok(t, h.SetTables(ctx, []Table{a.table(true)}))
	if h.Settle(ctx) {
		t.Error("settled before a leading manager was heard")
	}
	ok(t, a.SetEngine(ctx, leads(swarm("nodeA", "192.168.0.1"), "web")))
	gaps := a.table(true)
	gaps.Whole = false
	ok(t, h.SetTables(ctx, []Table{gaps}))
	if h.Settle(ctx) {
		t.Error("settled before all was heard that the leading manager says")
	}
	ok(t, h.SetTables(ctx, []Table{a.table(true)}))
	if !h.Settle(ctx) {
		t.Error("the leading manager has told all, and the view is still partial")
	}
	for name, s := range map[string]model.EngineSnapshot{
		"leads itself": leads(swarm("nodeB", "192.168.0.2"), "web"), "is in no swarm": {SwarmValid: true, NoSwarm: true},
	} {
		h := blank()
		ok(t, h.SetEngine(ctx, s))
		if !h.Settle(ctx) {
			t.Errorf("a node that %s has nobody to wait for", name)
		}
	}
}
