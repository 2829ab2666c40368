package view

import (
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
	still := func(when string) {
		t.Helper()
		if h.Settle() || !h.View().Partial || !h.Partial() {
			t.Fatalf("%s: the view counts as whole", when)
		}
	}
	still("at the start")
	ctx := t.Context()
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
	before := h.View().Revision
	if !h.Settle() || h.View().Partial || h.View().Revision == before {
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
	if h.Settle() {
		t.Error("settled before anything was taken over")
	}
	h.Adopted()
	now = now.Add(settleTime)
	h.Adopted() // again: the first counts
	if !h.Settle() {
		t.Error("a peer that is out of reach keeps the view partial for ever")
	}
}
