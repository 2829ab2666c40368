package view

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"sluice/internal/model"
)

// peerKey names a gossip record of another node in the journal. Node ids hold
// no slash.
func peerKey(owner model.NodeID, key string) string { return string(owner) + "/" + key }

func splitPeerKey(k string) (model.NodeID, string, bool) {
	owner, key, ok := strings.Cut(k, "/")
	return model.NodeID(owner), key, ok && owner != "" && key != ""
}

// SetTables takes the whole of what gossip knows. A node that gossip does not
// list is forgotten if it was listed before in this life: then it left, or a
// manager said it is gone. One that is known only from the journal stays: this
// process may have started while it is out of reach. So do records that are newer in
// the journal than in the table. So does what a node that left has said as leading
// manager, until another leads: the services did not leave with it.
//
// The journal is brought up to date, so that a restart begins where this life
// ends; that it cannot be is reported, changes nothing else, and is tried again.
func (h *Hub) SetTables(ctx context.Context, tables []Table) error {
	var puts []model.Record
	var dels []model.RecordKey
	changed := false
	listed := make(map[model.NodeID]bool, len(tables))

	h.mu.Lock()
	told := h.toldLocked()
	for _, in := range tables {
		listed[in.Owner] = true
		if in.Owner == h.self.Node {
			continue
		}
		t := h.tableOf(in.Owner)
		if t.present != in.Present {
			t.present, changed = in.Present, true
		}
		t.heard = true
		if t.age.stale(in, h.cfg.Now()) {
			t.whole = false
			continue
		}
		t.whole, t.gaps = in.Whole, in.Last > in.Version.Seq
		puts = append(puts, t.age.taken(in)...)
		for key, raw := range in.Entries {
			if d, ok := t.entries[key]; ok && bytes.Equal(d.raw, raw) {
				continue
			}
			v, err := decode(key, raw)
			if err != nil {
				h.cfg.Log.Warn("gossip record is not understood and has no effect; do all nodes run the same version?", "node", in.Owner, "err", err)
			}
			t.entries[key], t.sum = decoded{raw, v}, 0
			puts = append(puts, model.Record{Kind: kindPeer, Key: peerKey(in.Owner, key), Value: raw})
			changed = true
		}
		for key := range t.entries {
			if _, ok := in.Entries[key]; !ok && in.Whole {
				delete(t.entries, key)
				t.sum = 0
				dels = append(dels, model.RecordKey{Kind: kindPeer, Key: peerKey(in.Owner, key)})
				changed = true
			}
		}
	}
	changed = changed || h.toldLocked() != told
	gone, left := h.departLocked(listed)
	dels, changed = append(dels, gone...), changed || left
	if changed {
		claim, lead := h.claim, h.lead
		h.leadLocked()
		puts = append(puts, h.heededLocked(lead)...)
		if h.claim != claim {
			said, unsaid := h.sayLocked()
			puts, dels = append(puts, said...), append(dels, unsaid...)
		}
		h.heedLocked()
		puts = append(puts, h.leaveLocked()...)
		h.changedLocked()
	}
	err := h.keepLocked(ctx, puts, dels)
	h.mu.Unlock()
	if changed {
		h.announce(true)
	}
	if err != nil {
		return fmt.Errorf("keep gossip records for the next start: %w", err)
	}
	return nil
}

// departLocked forgets the nodes that gossip lists no more, but for what a leading
// manager among them has left to the others, and returns the durable records that go
// and whether anything did.
func (h *Hub) departLocked(listed map[model.NodeID]bool) (dels []model.RecordKey, changed bool) {
	lead := h.leaderLocked()
	another := h.claim > 0
	for owner, t := range h.tables {
		// Whatever its number: it may never have heard of the one that has left.
		l, _ := t.entries[keyLead].value.(leadRecord)
		another = another || l.Confirmed && listed[owner] && t.present
	}
	for owner, t := range h.tables {
		switch {
		case listed[owner] || !t.heard && !t.bequest():
		case t == lead && !another:
			for key := range t.entries {
				if isBequest(key) {
					continue
				}
				delete(t.entries, key) // none that sumOf has
				dels = append(dels, model.RecordKey{Kind: kindPeer, Key: peerKey(owner, key)})
				changed = true
			}
			if t.present {
				t.present, changed = false, true
			}
		default:
			dels = append(dels, h.forgetLocked(owner)...)
			changed = true
		}
	}
	return dels, changed
}

// forgetLocked drops a node's table and returns the durable records that go with it.
func (h *Hub) forgetLocked(owner model.NodeID) []model.RecordKey {
	t := h.tables[owner]
	if t == nil {
		return nil
	}
	delete(h.tables, owner)
	dels := make([]model.RecordKey, 0, 1+len(t.entries))
	dels = append(dels, model.RecordKey{Kind: kindHeard, Key: string(owner)})
	for key := range t.entries {
		dels = append(dels, model.RecordKey{Kind: kindPeer, Key: peerKey(owner, key)})
	}
	return dels
}

// leaveLocked notes when this node's tasks began to leave, for those that the leading
// manager newly wants gone, and returns what has to become durable: how long their
// connections go on is counted from there, in this life and the next.
func (h *Hub) leaveLocked() []model.Record {
	var puts []model.Record
	for id, e := range h.endpoints {
		if e.Leaves.IsZero() && e.Task.ID != "" && (e.Task.Leaving || h.word.leaving[e.Task.ID]) {
			// As it reads when it comes back: the clock of this process does not.
			e.Leaves = h.cfg.Now().Round(0).UTC()
			h.endpoints[id] = e
			puts = append(puts, record(kindEndpoint, string(id), e))
		}
	}
	return puts
}

// bequest reports whether a table is what a leading manager that has left has said as
// such. Every node that has not left says where it is.
func (t *table) bequest() bool {
	_, placed := t.entries[keyNode]
	_, led := t.entries[keyLead]
	return led && !placed
}

// Peer is what is known of another node, for status.
type Peer struct {
	Node      model.NodeID
	Name      string
	VTEP      string
	Present   bool
	Endpoints int
}

// Peers lists the other nodes, sorted by id.
func (h *Hub) Peers() []Peer {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []Peer
	lead := h.word
	for owner, t := range h.tables {
		if lead.removed(owner, t) || t.bequest() {
			continue
		}
		p := Peer{Node: owner, Present: t.present}
		if n, ok := t.entries[keyNode].value.(nodeRecord); ok {
			p.Name = n.Name
			if n.VTEP.IsValid() {
				p.VTEP = n.VTEP.String()
			}
		}
		for _, d := range t.entries {
			if _, ok := d.value.(endpointRecord); ok {
				p.Endpoints++
			}
		}
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return strings.Compare(string(a.Node), string(b.Node)) })
	return out
}

// Records returns this node's own gossip records, as they should be now.
func (h *Hub) Records() map[string][]byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make(map[string][]byte)
	if h.self.VTEP.IsValid() {
		out[keyNode] = encode(nodeRecord{VTEP: h.self.VTEP, Name: h.engine.HostName})
	}
	for id, e := range h.endpoints {
		n, ok := h.networks[e.Network]
		if !ok || n.Local {
			continue
		}
		e.Task.Leaving = e.Task.Leaving || e.Left || !e.Leaves.IsZero()
		// What it publishes, the leader tells of its service: once, not for each task.
		o := &e.Options
		o.Published, o.Bind, o.Nodes, o.Allow, o.Source = "", "", "", "", ""
		out[keyEndpoint+string(id)] = encode(endpointRecord{
			Network: e.Network, Addr: e.Addr, MAC: e.MAC, Options: e.Options, Task: e.Task, Prepared: e.Prepared, Tunnel: e.Tunnel, Meshed: e.Meshed,
		})
	}
	for id, r := range h.entered {
		out[keyEntry+string(id)] = encode(r)
	}
	maps.Copy(out, h.said)
	return out
}

// sayLocked brings what this node says as leading manager up to date, and
// returns what has to become durable. Without that, peers would drop the word of
// a leader whose process starts anew, until its engine has been asked.
func (h *Hub) sayLocked() (puts []model.Record, deletes []model.RecordKey) {
	said := make(map[string][]byte)
	if h.claim > 0 {
		said[keyLead] = encode(leadRecord{Claim: h.claim, Confirmed: h.engine.Leader})
		leaving := slices.Clone(h.engine.Leaving)
		slices.Sort(leaving)
		said[keyLeaving] = encode(leavingRecord{leaving})
		if len(h.engine.Nodes) > 0 {
			said[keyMembers] = encode(membersRecord{slices.Sorted(maps.Keys(h.engine.Nodes))})
		}
		if nodes := those(h.engine.Nodes, isDrained); len(nodes) > 0 {
			said[keyDrained] = encode(drainedRecord{nodes})
		}
		if nodes := those(h.engine.Nodes, isDown); len(nodes) > 0 {
			said[keyDown] = encode(downRecord{nodes})
		}
		for id, s := range h.engine.Services {
			said[keyService+string(id)] = encode(serviceRecord{s.Name, s.Created, s.VIPs, s.Options})
		}
		h.sayPublishedLocked(said)
	}
	for key, raw := range said {
		if was, ok := h.said[key]; !ok || !bytes.Equal(was, raw) {
			puts = append(puts, model.Record{Kind: kindLead, Key: key, Value: raw})
		}
	}
	for key := range h.said {
		if _, ok := said[key]; !ok {
			deletes = append(deletes, model.RecordKey{Kind: kindLead, Key: key})
		}
	}
	h.said = said
	return puts, deletes
}

// recallLocked takes up the lead where a former life left it.
func (h *Hub) recallLocked() {
	h.engine.Services = make(map[model.ServiceID]model.Service)
	var away, down []model.NodeID
	for key, raw := range h.said {
		v, err := decode(key, raw)
		if err != nil {
			continue // load has refused it
		}
		switch r := v.(type) {
		case leadRecord:
			h.claim = r.Claim
			h.said[key] = encode(leadRecord{Claim: r.Claim}) // not confirmed yet
		case leavingRecord:
			h.engine.Leaving = r.Tasks
		case membersRecord:
			h.engine.Nodes = make(map[model.NodeID]model.EngineNode, len(r.Nodes))
			for _, id := range r.Nodes {
				h.engine.Nodes[id] = model.EngineNode{}
			}
		case drainedRecord:
			away = r.Nodes
		case downRecord:
			down = r.Nodes
		case serviceRecord:
			id, s := serviceOf(key, r)
			h.engine.Services[id] = s
		}
	}
	for _, id := range away {
		if n, member := h.engine.Nodes[id]; member {
			n.Drained = true
			h.engine.Nodes[id] = n
		}
	}
	for _, id := range down {
		if n, member := h.engine.Nodes[id]; member {
			n.Down = true
			h.engine.Nodes[id] = n
		}
	}
}

func isDrained(n model.EngineNode) bool { return n.Drained }
func isDown(n model.EngineNode) bool    { return n.Down }

// those lists the nodes of which is is true, sorted.
func those(nodes map[model.NodeID]model.EngineNode, is func(model.EngineNode) bool) []model.NodeID {
	var out []model.NodeID
	for id, n := range nodes {
		if is(n) {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// serviceOf is the service that a record tells of.
func serviceOf(key string, r serviceRecord) (model.ServiceID, model.Service) {
	id := model.ServiceID(strings.TrimPrefix(key, keyService))
	return id, model.Service{ID: id, Name: r.Name, Created: r.Created, VIPs: r.VIPs, Options: r.Options}
}
