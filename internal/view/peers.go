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
// process may have started while it is out of reach.
//
// The journal is brought up to date, so that a restart begins where this life
// ends; that it cannot be is reported, changes nothing else, and is tried again.
func (h *Hub) SetTables(ctx context.Context, tables []Table) error {
	var puts []model.Record
	var dels []model.RecordKey
	changed := false
	listed := make(map[model.NodeID]bool, len(tables))

	h.mu.Lock()
	for _, in := range tables {
		listed[in.Owner] = true
		if in.Owner == h.self.Node {
			continue
		}
		t := h.tableOf(in.Owner)
		if t.present != in.Present {
			t.present, changed = in.Present, true
		}
		t.heard, t.whole = true, in.Whole
		for key, raw := range in.Entries {
			if d, ok := t.entries[key]; ok && bytes.Equal(d.raw, raw) {
				continue
			}
			v, err := decode(key, raw)
			if err != nil {
				h.cfg.Log.Warn("gossip record is not understood and has no effect; do all nodes run the same version?", "node", in.Owner, "err", err)
			}
			t.entries[key] = decoded{raw, v}
			puts = append(puts, model.Record{Kind: kindPeer, Key: peerKey(in.Owner, key), Value: raw})
			changed = true
		}
		for key := range t.entries {
			if _, ok := in.Entries[key]; !ok && in.Whole {
				delete(t.entries, key)
				dels = append(dels, model.RecordKey{Kind: kindPeer, Key: peerKey(in.Owner, key)})
				changed = true
			}
		}
	}
	for owner, t := range h.tables {
		if listed[owner] || !t.heard {
			continue
		}
		dels = append(dels, h.forgetLocked(owner)...)
		changed = true
	}
	if changed {
		claim := h.claim
		h.leadLocked()
		if h.claim != claim {
			said, unsaid := h.sayLocked()
			puts, dels = append(puts, said...), append(dels, unsaid...)
		}
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

// forgetLocked drops a node's table and returns the durable records that go with it.
func (h *Hub) forgetLocked(owner model.NodeID) []model.RecordKey {
	t := h.tables[owner]
	if t == nil {
		return nil
	}
	delete(h.tables, owner)
	dels := make([]model.RecordKey, 0, len(t.entries))
	for key := range t.entries {
		dels = append(dels, model.RecordKey{Kind: kindPeer, Key: peerKey(owner, key)})
	}
	return dels
}

// leadLocked claims the lead if this node's engine is the swarm's leader, or
// gives it up once another node has claimed it later.
func (h *Hub) leadLocked() {
	highest := h.highestLocked()
	switch {
	case h.engine.Leader && h.engine.ServicesValid:
		if h.claim <= highest {
			h.claim = highest + 1
		}
	case h.claim < highest:
		h.claim = 0
	}
}

// word is what the leading manager says.
type word struct {
	services map[model.ServiceID]model.Service
	leaving  map[model.TaskID]bool              // tasks that it wants gone
	members  map[model.NodeID]bool              // nodes of the swarm; nil: not told
	drained  []model.NodeID                     // of those, the ones that it has paused or drained
	networks map[model.NetworkID]model.Network  // with published ports
	labels   map[model.NodeID]map[string]string // that those ask for
}

// removed reports whether a node is of the swarm no more: it is out of contact,
// and the leader does not list it. A node that has just joined may be in contact
// before the leader's list has it.
func (w word) removed(node model.NodeID, t *table) bool {
	return w.members != nil && !t.present && !w.members[node]
}

// leadersWordLocked is the word of the leading manager, this node or another.
func (h *Hub) leadersWordLocked() word {
	w := word{
		services: make(map[model.ServiceID]model.Service), leaving: make(map[model.TaskID]bool),
		networks: make(map[model.NetworkID]model.Network), labels: make(map[model.NodeID]map[string]string),
	}
	if h.claim > 0 && h.claim >= h.highestLocked() {
		maps.Copy(w.services, h.engine.Services)
		for _, id := range h.engine.Leaving {
			w.leaving[id] = true
		}
		if len(h.engine.Nodes) > 0 {
			w.members = make(map[model.NodeID]bool, len(h.engine.Nodes))
			for id := range h.engine.Nodes {
				w.members[id] = true
			}
		}
		w.drained = drained(h.engine.Nodes)
		for key, raw := range h.said {
			if strings.HasPrefix(key, keyNetwork) || strings.HasPrefix(key, keyLabels) {
				if v, err := decode(key, raw); err == nil {
					w.hear(key, v)
				}
			}
		}
		return w
	}
	lead := h.leaderLocked()
	if lead == nil {
		return w
	}
	for key, d := range lead.entries {
		switch r := d.value.(type) {
		case serviceRecord:
			id, s := serviceOf(key, r)
			w.services[id] = s
		case leavingRecord:
			for _, id := range r.Tasks {
				w.leaving[id] = true
			}
		case membersRecord:
			w.members = make(map[model.NodeID]bool, len(r.Nodes))
			for _, id := range r.Nodes {
				w.members[id] = true
			}
		case drainedRecord:
			w.drained = r.Nodes
		default:
			w.hear(key, r)
		}
	}
	return w
}

// leaderLocked is the table of the leading manager among the other nodes; nil if none
// has said that it is.
func (h *Hub) leaderLocked() *table {
	var lead *table
	var from model.NodeID
	var claim uint64
	for owner, t := range h.tables {
		l, ok := t.entries[keyLead].value.(leadRecord)
		// Two managers may claim the same number in the same moment; all readers
		// take the smaller name until one claims again.
		if ok && (l.Claim > claim || l.Claim == claim && owner < from) {
			lead, from, claim = t, owner, l.Claim
		}
	}
	return lead
}

// HearsLeader reports whether this node is the leading manager, or in contact with it.
func (h *Hub) HearsLeader() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.claim > 0 && h.claim >= h.highestLocked() {
		return true
	}
	lead := h.leaderLocked()
	return lead != nil && lead.present
}

func (h *Hub) highestLocked() uint64 {
	var highest uint64
	for owner, t := range h.tables {
		if l, ok := t.entries[keyLead].value.(leadRecord); ok && owner != h.self.Node {
			highest = max(highest, l.Claim)
		}
	}
	return highest
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
	lead := h.leadersWordLocked()
	for owner, t := range h.tables {
		if lead.removed(owner, t) {
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
		e.Task.Leaving = e.Task.Leaving || e.Left
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
		said[keyLead] = encode(leadRecord{h.claim})
		leaving := slices.Clone(h.engine.Leaving)
		slices.Sort(leaving)
		said[keyLeaving] = encode(leavingRecord{leaving})
		if len(h.engine.Nodes) > 0 {
			said[keyMembers] = encode(membersRecord{slices.Sorted(maps.Keys(h.engine.Nodes))})
		}
		if nodes := drained(h.engine.Nodes); len(nodes) > 0 {
			said[keyDrained] = encode(drainedRecord{nodes})
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
	var away []model.NodeID
	for key, raw := range h.said {
		v, err := decode(key, raw)
		if err != nil {
			continue // load has refused it
		}
		switch r := v.(type) {
		case leadRecord:
			h.claim = r.Claim
		case leavingRecord:
			h.engine.Leaving = r.Tasks
		case membersRecord:
			h.engine.Nodes = make(map[model.NodeID]model.EngineNode, len(r.Nodes))
			for _, id := range r.Nodes {
				h.engine.Nodes[id] = model.EngineNode{}
			}
		case drainedRecord:
			away = r.Nodes
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
}

// drained lists the nodes that the swarm has paused or drained, sorted.
func drained(nodes map[model.NodeID]model.EngineNode) []model.NodeID {
	var out []model.NodeID
	for id, n := range nodes {
		if n.Drained {
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
