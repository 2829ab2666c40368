package view

import (
	"testing"
	"time"

	"sluice/internal/model"
)

// FuzzStored starts a process on any record: it is understood or left out, and what
// comes of it can be planned from, told to others, and recorded again.
func FuzzStored(f *testing.F) {
	a := member(f, "nodeA", "192.168.0.1", one, "10.255.0.2")
	for _, r := range a.journal.list() {
		f.Add(r.Kind, r.Key, r.Value)
	}
	f.Add(kindPeer, "nodeB/"+keyNode, []byte(`{"VTEP":"192.168.0.2"}`))
	f.Add(kindEntry, string(web), []byte(`{"Addr":"::1","Number":-1}`))
	f.Add(kindEndpoint, "x", []byte(`{"Task":null,"MAC":"x"}`))
	f.Add(kindNetwork, "", []byte(`{"Subnet":"10.0.0.0/33"}`))
	f.Fuzz(func(t *testing.T, kind, key string, value []byte) {
		j := newJournal()
		j.records[model.RecordKey{Kind: kind, Key: key}] = value
		h, err := New(Config{Journal: j, Now: func() time.Time { return newClock().now }, Log: a.cfg.Log}, j.list())
		if h == nil {
			t.Fatalf("a record keeps the process from starting: %v", err)
		}
		h.View()
		h.Records()
		h.Peers()
		if err := h.SetEngine(t.Context(), runs(leads(swarm("nodeA", "192.168.0.1"), "web"), one)); err != nil {
			t.Error(err)
		}
		if err := h.Claim(t.Context()); err != nil {
			t.Error(err)
		}
		h.View()
		h.Records()
	})
}
