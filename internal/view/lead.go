package view

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"sluice/internal/model"
)

// This file is about who leads: which manager's word of the swarm's services counts.

// doubtTime is how long a leading manager goes by its own word that another has
// contradicted: its engine, asked every 2 s (dockerapi) by a process that looks every 2 s,
// has said by then which of the two is right.
const doubtTime = 5 * time.Second

// vacancyTime is how long a later claim may be on its way: what gossip needs to bring all
// tables to all nodes (gossip.ConvergenceBound).
const vacancyTime = 30 * time.Second

// leadLocked claims the lead if this node's engine is the swarm's leader, or
// gives it up once another node has claimed it later; then it settles whose word
// counts. What the engine was asked for before a higher claim was heard is no ground to
// outbid that: a process that was frozen while another manager came to lead would speak
// up with what it knew before.
func (h *Hub) leadLocked() {
	highest, confirmed := h.claimsLocked()
	if highest > h.highest {
		h.highestAt = h.cfg.Now()
	}
	h.highest = highest
	switch {
	case h.claim > highest:
	case h.engine.Leader && h.engine.ServicesValid && !h.engine.LeaderAt.Before(h.highestAt):
		h.claim = highest + 1
	case h.claim < confirmed && !h.doubtsLocked():
		h.claim = 0
	}
	h.electLocked()
}

// doubtsLocked reports whether this node's engine was not asked yet since another node
// has contradicted it.
func (h *Hub) doubtsLocked() bool {
	return h.engine.Leader && h.cfg.Now().Sub(h.highestAt) < doubtTime
}

// claimsLocked are the highest claims of other nodes: of all, and of those that lead by
// their engines' word.
func (h *Hub) claimsLocked() (highest, confirmed uint64) {
	for owner, t := range h.tables {
		l, ok := t.entries[keyLead].value.(leadRecord)
		if !ok || owner == h.self.Node {
			continue
		}
		highest = max(highest, l.Claim)
		if l.Confirmed {
			confirmed = max(confirmed, l.Claim)
		}
	}
	return highest, confirmed
}

// claimant is a manager that says it leads.
type claimant struct {
	node      model.NodeID
	claim     uint64
	confirmed bool // its engine says so, too
	present   bool // it is in contact
	heard     bool // it was heard in this life
	told      bool // all that it says is known here
}

// compare orders claimants by their claims. Two managers may claim the same number in the
// same moment: all readers take the smaller name until one claims again.
func (c claimant) compare(other claimant) int {
	return cmp.Or(cmp.Compare(c.claim, other.claim), cmp.Compare(other.node, c.node))
}

func (h *Hub) claimantsLocked() []claimant {
	var out []claimant
	for owner, t := range h.tables {
		if l, ok := t.entries[keyLead].value.(leadRecord); ok && owner != h.self.Node {
			out = append(out, claimant{owner, l.Claim, l.Confirmed, t.present, t.heard, t.told()})
		}
	}
	if h.claim > 0 {
		out = append(out, claimant{h.self.Node, h.claim, h.engine.Leader, true, true, true})
	}
	return out
}

// electLocked settles whose word counts. It stays who it is until somebody with a later
// claim leads: the number alone says nothing, as managers may not have heard of each
// other's claims, and may recall those of a former life. Once it has given up, the latest
// claim counts of a manager that leads, and no earlier one than it had: it has given up
// for a later one, which may be on its way. Until there is one, nobody's counts, and what
// was last said stays. If none comes in time, or the one that is known from a former life
// is not heard in that time, whoever is here and leads counts. A process that starts goes
// by whom its former life went by, or else by what that has heard in full.
func (h *Hub) electLocked() {
	all := h.claimantsLocked()
	i := slices.IndexFunc(all, func(c claimant) bool { return c.node == h.lead })
	if i >= 0 && h.lead == h.self.Node && h.doubtsLocked() {
		return
	}
	switch now := h.cfg.Now(); {
	case i >= 0 && all[i].heard:
		h.vacantAt = time.Time{}
	case h.vacantAt.IsZero():
		h.vacantAt = now
	}
	waited := !h.vacantAt.IsZero() && h.cfg.Now().Sub(h.vacantAt) >= vacancyTime
	if i < 0 && h.lead != h.self.Node && h.tables[h.lead] == nil {
		h.leadClaim = 0 // it has left, and for nobody
	}

	var now []claimant // that it is
	may := func(claimant) bool { return true }
	switch {
	case i >= 0 && (h.heard || all[i].told):
		now = all[i : i+1 : i+1]
		may = func(c claimant) bool {
			return c.confirmed && (c.compare(now[0]) > 0 || waited && c.present && c.told && c.node != h.lead)
		}
	case h.heard:
		may = func(c claimant) bool { return c.confirmed && (c.claim >= h.leadClaim || waited && c.present) }
	case slices.ContainsFunc(all, func(c claimant) bool { return c.told }):
		may = func(c claimant) bool { return c.told }
	}
	var next []claimant
	for _, c := range all {
		if may(c) {
			next = append(next, c)
		}
	}
	if len(next) == 0 {
		next = now
	}
	if len(next) > 0 {
		best := slices.MaxFunc(next, claimant.compare)
		h.lead, h.leadClaim = best.node, best.claim
	}
}

// heededLocked is the record of whose word counts, if that is another than it was.
func (h *Hub) heededLocked(was model.NodeID) []model.Record {
	if h.lead == was {
		return nil
	}
	return []model.Record{{Kind: kindHeeded, Key: kindHeeded, Value: []byte(h.lead)}}
}

// leadsLocked reports whether this node is the leading manager, as far as is known here.
func (h *Hub) leadsLocked() bool { return h.claim > 0 && h.lead == h.self.Node }

// leaderLocked is the table of the leading manager, if that is another node; else nil.
func (h *Hub) leaderLocked() *table {
	t := h.tables[h.lead]
	if t == nil {
		return nil
	}
	if _, claims := t.entries[keyLead].value.(leadRecord); !claims {
		return nil
	}
	return t
}

// told reports whether all is here that a leading manager says as such, as it says it
// now: by the sum of it, in a table without gaps.
func (t *table) told() bool {
	l, leads := t.entries[keyLead].value.(leadRecord)
	if !leads || !t.whole || t.gaps || l.Sum == 0 {
		return leads && t.whole && !t.gaps
	}
	if t.sum == 0 {
		t.sum = sumOf(func(yield func(string, []byte) bool) {
			for key, d := range t.entries {
				if !yield(key, d.raw) {
					return
				}
			}
		})
	}
	return t.sum == l.Sum
}

// toldLocked reports whether the leading manager, another node, has told all.
func (h *Hub) toldLocked() bool {
	lead := h.leaderLocked()
	return lead != nil && lead.told()
}

// HearsLeader reports whether this node is the leading manager, or in contact with it.
func (h *Hub) HearsLeader() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.leadsLocked() {
		return true
	}
	lead := h.leaderLocked()
	return lead != nil && lead.present
}

// word is what the leading manager says. It is not changed once it is made: views have it.
type word struct {
	services map[model.ServiceID]model.Service
	leaving  map[model.TaskID]bool              // tasks that it wants gone
	members  map[model.NodeID]bool              // nodes of the swarm; nil: not told
	drained  []model.NodeID                     // of those, the ones that it has paused or drained
	down     []model.NodeID                     // and the ones that it takes for lost
	networks map[model.NetworkID]model.Network  // with published ports
	labels   map[model.NodeID]map[string]string // that those ask for
}

// lost reports whether a node has gone without a word: the swarm takes it for lost, and
// it has gone out of contact here, too. One that only its managers miss serves still; and
// of one that this process has not heard of yet, what is known may be old.
func (w word) lost(node model.NodeID, t *table) bool {
	return t.heard && !t.present && slices.Contains(w.down, node)
}

// removed reports whether a node is of the swarm no more: it is out of contact,
// and the leader does not list it. A node that has just joined may be in contact
// before the leader's list has it.
func (w word) removed(node model.NodeID, t *table) bool {
	return w.members != nil && !t.present && !w.members[node]
}

// heedLocked takes the word of the leading manager, this node or another, as it is now.
// While that is on its way, in parts, it stays as it was last heard in full: of what the
// parts are about the rest would end, and begin again.
func (h *Hub) heedLocked() {
	lead, told := h.leaderLocked(), h.toldLocked()
	switch {
	case h.leadsLocked():
		h.word, h.heard = h.ownWordLocked(), true
	case lead != nil && (told || !h.heard):
		h.word, h.heard = lead.word(), told
	case !h.heard:
		h.word = newWord()
	case lead != nil:
		// What tasks leave cannot wait: they have some 3 s. More is never wrong.
		if r, ok := lead.entries[keyLeaving].value.(leavingRecord); ok {
			h.word.leaving = maps.Clone(h.word.leaving)
			for _, id := range r.Tasks {
				h.word.leaving[id] = true
			}
		}
	}
}

func newWord() word {
	return word{
		services: make(map[model.ServiceID]model.Service), leaving: make(map[model.TaskID]bool),
		networks: make(map[model.NetworkID]model.Network), labels: make(map[model.NodeID]map[string]string),
	}
}

// ownWordLocked is this node's word as the leading manager.
func (h *Hub) ownWordLocked() word {
	w := newWord()
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
	w.drained, w.down = those(h.engine.Nodes, isDrained), those(h.engine.Nodes, isDown)
	for key, raw := range h.said {
		if strings.HasPrefix(key, keyNetwork) || strings.HasPrefix(key, keyLabels) {
			if v, err := decode(key, raw); err == nil {
				w.hear(key, v)
			}
		}
	}
	return w
}

// word is what a table has of its owner's word as the leading manager.
func (t *table) word() word {
	w := newWord()
	for key, d := range t.entries {
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
		case downRecord:
			w.down = r.Nodes
		default:
			w.hear(key, r)
		}
	}
	return w
}
