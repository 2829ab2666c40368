package view

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sluice/internal/model"
)

// Kinds of durable records.
const (
	kindSelf     = "self"
	kindNetwork  = "network"
	kindEndpoint = "endpoint"
	kindPeer     = "peer"   // gossip records of other nodes, as last heard
	kindHeard    = "heard"  // the version of those, by node
	kindLead     = "lead"   // gossip records of this node as leading manager, as last published
	kindEntry    = "entry"  // claims of this node; see Hub.Claim
	kindHeeded   = "heeded" // whose word as leading manager counts: a node's id
)

// Journal keeps records durably. Commit is one transaction.
type Journal interface {
	Commit(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error
}

// Config is what a Hub is made of.
type Config struct {
	Journal   Journal
	Now       func() time.Time
	VXLANPort uint16
	Datapath  string       // model.Self's
	MeshPool  netip.Prefix // likewise
	NoMesh    bool         // likewise
	// MTU is what an overlay may have over the underlay device with an address, in
	// bytes, for networks that leave it to the nodes. Nil: such networks are not
	// joined for published ports. It is called with the lock held.
	MTU func(vtep netip.Addr) (int, error)
	// Blank says that records may be missing of what the kernel has: a state file was
	// lost. The view is partial then until Settle's conditions are met.
	Blank bool
	// Alone says that no other node tells this one anything: a plugin of local scope.
	Alone bool
	Log   *slog.Logger
	// Changed is called after every new revision, without the lock held, on the
	// goroutine that made it. It must not block. planned is false if only this
	// node's gossip records may be different, and no plan is.
	Changed func(planned bool)
}

// Hub holds all that is known. Its methods may be called from any goroutine.
// Those that record something hold the lock for one durable commit, about
// 0.25 ms on a disk with a fast flush: so the journal sees changes in their order, and
// each is decided on what the one before has left. On a disk that takes 0.9 s for a
// flush, five at a time take 4.5 s, and View waits as long; of a slower one the journal
// refuses what it cannot have in a second.
type Hub struct {
	cfg Config

	// mu guards what follows. Rank 1: the journal's own lock is taken under it.
	mu        sync.Mutex
	rev       uint64
	view      *model.View // of revision rev; nil if it must be built
	partial   bool        // started without records, and not settled yet
	adopted   time.Time   // when the engine's containers were taken over; zero: not yet
	self      model.Self
	networks  map[model.NetworkID]model.Network
	endpoints map[model.EndpointID]model.Endpoint
	engine    model.EngineSnapshot
	tables    map[model.NodeID]*table
	claim     uint64                // of this node as leading manager; 0 if it is none
	highest   uint64                // claim of another node
	highestAt time.Time             // when that was heard, if in this life
	said      map[string][]byte     // what it publishes as such, also durable
	lead      model.NodeID          // whose word as leading manager counts here; if it still claims; durable
	leadClaim uint64                // by which claim it does, or did
	vacantAt  time.Time             // since when nobody's does; zero: somebody's
	word      word                  // of a leading manager: as it is, or as it was last known in full
	heard     bool                  // some was known in full, in this life
	leaving   map[model.TaskID]bool // a leader has wanted it gone, and an endpoint of it is still known
	suspects  map[model.EndpointID]time.Time
	begun     map[model.EndpointID]bool      // asked for by the engine in this life
	ready     map[model.EndpointID]time.Time // see freshLocked; nil before the first view
	since     map[model.NetworkID]time.Time  // when a network was last seen in use
	entered   map[model.NetworkID]entryRecord
	full      map[model.NetworkID]error // that Claim found no room in
	tried     []model.HostRange         // model.View's; nil before SetTaken
	taken     map[model.HostPort]string // likewise
	unjoined  bool                      // the last view lacks a network for want of an MTU
	mtu       int                       // of overlays here, as last known, in bytes
	mtuOf     netip.Addr                // the VTEP that it is of
	mtuErr    string                    // why it is not known now, as logged
	unsaved   unsaved
}

// table is one other node's records.
type table struct {
	present bool
	heard   bool   // from gossip in this life, not only from the journal
	whole   bool   // nothing was missing of what the owner had begun with, when it was last heard
	gaps    bool   // some changes that came after one that has not come yet are in entries
	sum     uint64 // sumOf the entries; 0: to be made
	entries map[string]decoded
	age     age
}

// New makes a Hub from the records of a former life; those of other kinds are ignored.
func New(cfg Config, records []model.Record) (*Hub, error) {
	h := &Hub{
		cfg:       cfg,
		rev:       1,
		partial:   cfg.Blank,
		self:      model.Self{VXLANPort: cfg.VXLANPort, Datapath: cfg.Datapath, MeshPool: cfg.MeshPool, NoMesh: cfg.NoMesh},
		networks:  make(map[model.NetworkID]model.Network),
		endpoints: make(map[model.EndpointID]model.Endpoint),
		tables:    make(map[model.NodeID]*table),
		said:      make(map[string][]byte),
		suspects:  make(map[model.EndpointID]time.Time),
		begun:     make(map[model.EndpointID]bool),
		since:     make(map[model.NetworkID]time.Time),
		entered:   make(map[model.NetworkID]entryRecord),
		unsaved:   make(unsaved),
	}
	var errs []error
	for _, r := range records {
		if err := h.load(r); err != nil {
			errs = append(errs, fmt.Errorf("stored %s %s: %w", r.Kind, r.Key, err))
		}
	}
	for _, t := range h.tables {
		t.whole = true // as far as their owners have counted
	}
	h.recallLocked()
	h.highest, _ = h.claimsLocked()
	h.electLocked()
	h.heedLocked()
	return h, errors.Join(errs...)
}

func (h *Hub) load(r model.Record) error {
	switch r.Kind {
	case kindSelf:
		var s model.Self
		if err := json.Unmarshal(r.Value, &s); err != nil {
			return err
		}
		h.self.Node, h.self.VTEP = s.Node, s.VTEP
	case kindNetwork:
		var n model.Network
		if err := json.Unmarshal(r.Value, &n); err != nil {
			return err
		}
		h.networks[n.ID] = n
		h.since[n.ID] = h.cfg.Now()
	case kindEndpoint:
		var e model.Endpoint
		if err := json.Unmarshal(r.Value, &e); err != nil {
			return err
		}
		h.endpoints[e.ID] = e
	case kindPeer:
		owner, key, ok := splitPeerKey(r.Key)
		if !ok {
			return errors.New("the key names no node")
		}
		v, err := decode(key, r.Value)
		if err != nil { // as when it was heard: another node's record never stops this one
			h.cfg.Log.Warn("stored gossip record is not understood and has no effect", "node", owner, "err", err)
		}
		h.tableOf(owner).entries[key] = decoded{r.Value, v}
	case kindHeard:
		var v Version
		if err := json.Unmarshal(r.Value, &v); err != nil {
			return err
		}
		h.tableOf(model.NodeID(r.Key)).age = age{known: v, floor: v}
	case kindLead:
		if _, err := decode(r.Key, r.Value); err != nil {
			return err
		}
		h.said[r.Key] = r.Value
	case kindHeeded:
		h.lead = model.NodeID(r.Value)
	case kindEntry:
		v, err := decode(keyEntry+r.Key, r.Value)
		if err != nil {
			return err
		}
		h.entered[model.NetworkID(r.Key)], _ = v.(entryRecord)
	}
	return nil
}

func (h *Hub) tableOf(owner model.NodeID) *table {
	t := h.tables[owner]
	if t == nil {
		t = &table{entries: make(map[string]decoded)}
		h.tables[owner] = t
	}
	return t
}

// record marshals a durable record. Model types always marshal.
func record(kind, key string, v any) model.Record {
	return model.Record{Kind: kind, Key: key, Value: encode(v)}
}

// changedLocked makes a new revision and returns its number.
func (h *Hub) changedLocked() uint64 {
	h.rev++
	h.view = nil
	return h.rev
}

// announce tells the listener. It must be called without the lock.
func (h *Hub) announce(planned bool) {
	if h.cfg.Changed != nil {
		h.cfg.Changed(planned)
	}
}

// change is what one call does to the hub.
type change struct {
	puts    []model.Record
	deletes []model.RecordKey
	visible func() // nil: there is nothing to do
	fact    bool   // it has happened: not being able to record it changes nothing
	// unplanned says that no plan is different for it: an endpoint that is only
	// created has nothing in the kernel. In a large swarm a round takes longer
	// than the engine's next call, which would wait for it.
	unplanned bool
}

// commit makes a change durable, then visible, then known. decide is called,
// and visible after it, with the lock held throughout.
func (h *Hub) commit(ctx context.Context, decide func() change) (uint64, error) {
	h.mu.Lock()
	c := decide()
	if c.visible == nil {
		defer h.mu.Unlock()
		return h.rev, nil
	}
	if err := h.recordLocked(ctx, c); err != nil {
		h.mu.Unlock()
		return 0, err
	}
	c.visible()
	rev := h.changedLocked()
	h.mu.Unlock()
	h.announce(!c.unplanned)
	return rev, nil
}

// Self returns what is known of this node.
func (h *Hub) Self() model.Self {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.self
}

// SetVTEP records this node's address of the data path.
func (h *Hub) SetVTEP(ctx context.Context, a netip.Addr) error {
	_, err := h.commit(ctx, func() change {
		s := h.self
		if s.VTEP == a {
			return change{}
		}
		s.VTEP = a
		return change{fact: true, puts: []model.Record{record(kindSelf, kindSelf, s)}, visible: func() { h.self = s }}
	})
	return err
}

// Network returns a network of this node.
func (h *Hub) Network(id model.NetworkID) (model.Network, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n, ok := h.networks[id]
	return n, ok
}

// PutNetwork records a network. One that is known starts over: its endpoints go, in
// the same commit, so that a refusal leaves the network and them.
func (h *Hub) PutNetwork(ctx context.Context, n model.Network) (uint64, error) {
	return h.commit(ctx, func() change {
		gone, dels := h.endpointsLocked(n.ID)
		return change{puts: []model.Record{record(kindNetwork, string(n.ID), n)}, deletes: dels, visible: func() {
			h.networks[n.ID] = n
			h.since[n.ID] = h.cfg.Now()
			h.dropLocked(gone)
		}}
	})
}

// endpointsLocked are the endpoints of a network, and their records.
func (h *Hub) endpointsLocked(id model.NetworkID) (ids []model.EndpointID, keys []model.RecordKey) {
	for eid, e := range h.endpoints {
		if e.Network == id {
			ids = append(ids, eid)
			keys = append(keys, model.RecordKey{Kind: kindEndpoint, Key: string(eid)})
		}
	}
	return ids, keys
}

// dropLocked forgets endpoints in memory.
func (h *Hub) dropLocked(ids []model.EndpointID) {
	for _, id := range ids {
		delete(h.endpoints, id)
		delete(h.suspects, id)
		delete(h.begun, id)
	}
}

// DeleteNetwork forgets a network and its endpoints; an unknown one is no error.
func (h *Hub) DeleteNetwork(ctx context.Context, id model.NetworkID) (uint64, error) {
	return h.commit(ctx, func() change {
		gone, dels := h.endpointsLocked(id)
		dels = append(dels, model.RecordKey{Kind: kindNetwork, Key: string(id)})
		if _, known := h.networks[id]; !known && len(gone) == 0 {
			return change{}
		}
		return change{fact: true, deletes: dels, visible: func() {
			delete(h.networks, id)
			delete(h.since, id)
			h.dropLocked(gone)
		}}
	})
}

// Endpoint returns an endpoint of this node.
func (h *Hub) Endpoint(id model.EndpointID) (model.Endpoint, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, ok := h.endpoints[id]
	return e, ok
}

// PutEndpoint records an endpoint. Of one that is known, the task, since when it leaves
// and what is prepared stay as they are: the engine and the kernel tell of them, and may have
// done so since the caller looked.
func (h *Hub) PutEndpoint(ctx context.Context, e model.Endpoint) (uint64, error) {
	return h.commit(ctx, func() change {
		if old, known := h.endpoints[e.ID]; known {
			e.Task, e.Prepared, e.Tunnel, e.Meshed, e.Leaves = old.Task, old.Prepared, old.Tunnel, old.Meshed, old.Leaves
		}
		return change{
			puts: []model.Record{record(kindEndpoint, string(e.ID), e)},
			visible: func() {
				h.endpoints[e.ID] = e
				h.begun[e.ID] = true
			},
			unplanned: e.Phase == model.Created, fact: e.Left,
		}
	})
}

// DeleteEndpoint forgets an endpoint; an unknown one is no error.
func (h *Hub) DeleteEndpoint(ctx context.Context, id model.EndpointID) (uint64, error) {
	return h.commit(ctx, func() change {
		if _, known := h.endpoints[id]; !known {
			return change{}
		}
		return change{fact: true, deletes: []model.RecordKey{{Kind: kindEndpoint, Key: string(id)}}, visible: func() {
			h.dropLocked([]model.EndpointID{id})
		}}
	})
}

// TakeOver records an endpoint that runs already, and its network if that is not
// known.
func (h *Hub) TakeOver(ctx context.Context, n model.Network, e model.Endpoint) error {
	_, err := h.commit(ctx, func() change {
		c := change{fact: true, puts: []model.Record{record(kindEndpoint, string(e.ID), e)}}
		_, known := h.networks[n.ID]
		if !known {
			c.puts = append(c.puts, record(kindNetwork, string(n.ID), n))
		}
		c.visible = func() {
			h.endpoints[e.ID] = e
			if !known {
				h.networks[n.ID] = n
				h.since[n.ID] = h.cfg.Now()
			}
		}
		return c
	})
	return err
}

// Engine returns what the local engine last told.
func (h *Hub) Engine() model.EngineSnapshot {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.engine
}

// View returns the newest view. It builds it if something has changed: for
// 10,000 remote endpoints that takes some milliseconds.
func (h *Hub) View() model.View {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.viewLocked()
}

func (h *Hub) viewLocked() model.View {
	if h.view == nil {
		v := h.buildLocked()
		h.view = &v
	}
	return *h.view
}

// recordsLocked is about the number of remote endpoints; a map that grows to ten
// thousand by doubling leaves as much behind as it holds.
func (h *Hub) recordsLocked() int {
	n := 0
	for _, t := range h.tables {
		n += len(t.entries)
	}
	return n
}

func (h *Hub) buildLocked() model.View {
	v := model.View{
		Revision:  h.rev,
		Now:       h.cfg.Now(),
		Self:      h.self,
		Partial:   h.partial,
		Networks:  maps.Clone(h.networks),
		Endpoints: maps.Clone(h.endpoints),
		Remotes:   make(map[model.EndpointID]model.Remote, h.recordsLocked()),
	}
	lead := h.word
	v.Services, v.Published, v.Labels = lead.services, lead.networks, lead.labels
	v.Drained = slices.Contains(lead.drained, h.self.Node)
	for id, n := range v.Networks {
		if known, ok := h.engine.Networks[id]; ok {
			n.Name = known.Name
			v.Networks[id] = n
		}
	}
	// Swarm never wants a task back, but a new leader deletes at once what the last
	// one wanted gone (swarmkit's task reaper), while the container has its grace
	// still before it: what a leader has said once stays said, in this life.
	leaving := make(map[model.TaskID]bool)
	wantedGone := func(id model.TaskID) bool {
		if !lead.leaving[id] && !h.leaving[id] {
			return false
		}
		leaving[id] = true
		return true
	}
	for id, e := range v.Endpoints {
		if wantedGone(e.Task.ID) || e.Left || !e.Leaves.IsZero() {
			e.Task.Leaving = true
			v.Endpoints[id] = e
		}
	}
	others := make(map[model.NodeID]nodeRecord, len(h.tables))
	for owner, t := range h.tables {
		node, ok := t.entries[keyNode].value.(nodeRecord)
		if !ok || owner == h.self.Node || node.VTEP.IsValid() && node.VTEP == h.self.VTEP {
			continue // the last: this host under a name that it had
		}
		if lead.removed(owner, t) {
			continue
		}
		others[owner] = node
		lost := lead.lost(owner, t)
		for key, d := range t.entries {
			r, ok := d.value.(endpointRecord)
			if !ok {
				continue
			}
			id := model.EndpointID(key[len(keyEndpoint):])
			if twin, twice := v.Remotes[id]; twice && twin.Node < owner {
				continue // a node that has changed its name; which one is the same for all readers
			}
			r.Task.Leaving = wantedGone(r.Task.ID) || r.Task.Leaving
			v.Remotes[id] = model.Remote{
				ID: id, Network: r.Network, Node: owner, VTEP: node.VTEP, Addr: r.Addr, MAC: r.MAC,
				Options: r.Options, Task: r.Task, Prepared: r.Prepared, Tunnel: r.Tunnel, Meshed: r.Meshed, Lost: lost,
			}
		}
	}
	h.leaving = leaving
	h.freshLocked(&v)
	v.Tried, v.Taken = h.tried, h.taken
	v.Entries = h.entriesLocked(others)
	h.joinLocked(&v)
	return v
}
