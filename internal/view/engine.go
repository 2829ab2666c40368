package view

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

// How long the absence of something must last before it is believed. The
// engine's list of containers lags behind its calls by the time a container
// takes to start, which a slow disk makes seconds.
const (
	// lostEndpoint: an endpoint that the engine does not list.
	lostEndpoint = 30 * time.Second
	// slowStart: one that the engine has asked for in this life of the process, and
	// whose container has not fetched it. The engine tells when a start fails; it lists
	// a container when it runs, which on a machine that is far too busy took 40 s. An
	// engine that is killed takes this process with it.
	slowStart = 5 * time.Minute
	// unusedNetwork: a network with no endpoint that the engine does not list. It
	// deletes such a network itself, unless it was killed and has forgotten it. Its
	// list is at most some seconds old; putting the network anew begins the time anew.
	unusedNetwork = time.Minute
)

// SetEngine takes what the local engine tells. What it says of this node's
// tasks becomes durable, so that a restart of this process changes nothing.
func (h *Hub) SetEngine(ctx context.Context, s model.EngineSnapshot) error {
	h.mu.Lock()
	before := h.engine
	s = believed(before, s)
	// Only what the managers have just told: services that are as before were looked
	// at then, with the networks that there were.
	if s.ServicesValid && (s.NetworksValid || before.Networks != nil) {
		s.Services = publishedHere(s)
	}
	h.engine = s
	var puts []model.Record
	var dels []model.RecordKey
	changed := !reflect.DeepEqual(before.Networks, s.Networks) || before.HostName != s.HostName ||
		!reflect.DeepEqual(before.Services, s.Services) || !reflect.DeepEqual(before.Leaving, s.Leaving) ||
		!maps.EqualFunc(before.Nodes, s.Nodes, func(a, b model.EngineNode) bool {
			return maps.Equal(a.Labels, b.Labels) && a.Drained == b.Drained && a.Down == b.Down
		})
	if self, ok := h.selfLocked(s); ok {
		if h.self.Node != "" && h.self.Node != self.Node {
			// Another swarm: what was heard and said in the former one is of no use.
			for owner := range h.tables {
				dels = append(dels, h.forgetLocked(owner)...)
			}
			for id := range h.entered {
				dels = append(dels, model.RecordKey{Kind: kindEntry, Key: string(id)})
			}
			h.entered = make(map[model.NetworkID]entryRecord)
			h.claim, h.lead, h.leadClaim, h.vacantAt, h.heard = 0, "", 0, time.Time{}, false
		}
		h.self = self
		dels = append(dels, h.forgetLocked(self.Node)...)
		puts = append(puts, record(kindSelf, kindSelf, self))
		changed = true
	}
	if s.ContainersValid {
		for id, e := range h.endpoints {
			if task := taskOf(e, s); task != e.Task {
				e.Task = task
				h.endpoints[id] = e
				puts = append(puts, record(kindEndpoint, string(id), e))
				changed = true
			}
		}
	}
	claim, lead := h.claim, h.lead
	h.leadLocked()
	changed = changed || claim != h.claim || lead != h.lead || before.Leader != s.Leader
	puts = append(puts, h.heededLocked(lead)...)
	if changed {
		said, unsaid := h.sayLocked()
		puts, dels = append(puts, said...), append(dels, unsaid...)
		h.heedLocked()
		puts = append(puts, h.leaveLocked()...)
		h.changedLocked()
	}
	// Also without news: what an earlier failure left behind is tried again.
	err := h.keepLocked(ctx, puts, dels)
	h.mu.Unlock()
	if changed {
		h.announce(true)
	}
	if err != nil {
		return fmt.Errorf("record what the engine tells: %w", err)
	}
	return nil
}

// believed is s with its invalid parts as they were before: that the engine
// could not be asked is no news.
func believed(before, s model.EngineSnapshot) model.EngineSnapshot {
	s.Alias = cmp.Or(s.Alias, before.Alias)
	s.HostName = cmp.Or(s.HostName, before.HostName)
	s.Version = cmp.Or(s.Version, before.Version)
	s.DataRoot = cmp.Or(s.DataRoot, before.DataRoot)
	if !s.SwarmValid {
		s.Active, s.Node, s.NodeAddr = before.Active, before.Node, before.NodeAddr
		s.NoSwarm, s.Managers, s.Manager = before.NoSwarm, before.Managers, before.Manager
		s.Leader, s.LeaderAt = before.Leader, before.LeaderAt
	}
	if !s.ContainersValid {
		s.Containers, s.ContainersAt = before.Containers, before.ContainersAt
	}
	if !s.NetworksValid {
		s.Networks, s.Unallocated = before.Networks, before.Unallocated
	}
	if !s.ServicesValid {
		s.ServicesAt, s.Services, s.Leaving = before.ServicesAt, before.Services, before.Leaving
		s.Live, s.Holders, s.Nodes = before.Live, before.Holders, before.Nodes
	}
	return s
}

// selfLocked is this node by the engine's word, if that is news. The data-path
// address that the engine gives a driver by node discovery wins over the node's
// address of the swarm, which is the same unless --data-path-addr was set.
func (h *Hub) selfLocked(s model.EngineSnapshot) (model.Self, bool) {
	self := h.self
	if s.SwarmValid && s.Active {
		self.Node = s.Node
		if !self.VTEP.IsValid() && s.NodeAddr.Is4() {
			self.VTEP = s.NodeAddr
		}
	}
	return self, self != h.self
}

// taskOf is the task behind an endpoint by the engine's word. An endpoint that
// the engine does not list is not running; whether it is no more, Sweep decides.
func taskOf(e model.Endpoint, s model.EngineSnapshot) model.Task {
	c, ok := s.Containers[e.ID]
	if !ok {
		t := e.Task
		t.Ready = false
		return t
	}
	t := c.Task
	if !t.VIP.IsValid() && t.Service == e.Task.Service {
		t.VIP = e.Task.VIP // the engine was not asked, or did not know at the moment
	}
	return t
}

// Observe takes what a round of the loop tells of this node's endpoints: that
// the engine has taken a container's end, and that a task's namespace translates
// its VIP, takes its tunnel's packets, and has what published ports need of it. All
// count only when they were read back from the kernel; unread reports that something
// was made that has not been. What could not be made is not waited for: the round
// has told why.
func (h *Hub) Observe(ctx context.Context, r reconcile.Round) (unread bool, err error) {
	// A namespace may hold several endpoints, one for each network of the task;
	// a translation belongs to the one whose address it leads to.
	type site struct {
		sandbox string
		addr    netip.Addr
	}
	wanted := make(map[site]netip.Addr) // the VIPs
	done := make(map[site]netip.Addr)
	tunnels := make(map[site]bool) // whether it was read back
	meshed, unmeshed := make(map[site]bool), make(map[site]bool)
	// All that is wanted of a task must be there before entries count on it.
	mesh := func(at site, k kernel.Key, as func(have any) bool) {
		if r.Failed[k] != nil {
			unmeshed[at] = true
			return
		}
		was, asked := meshed[at]
		meshed[at] = (was || !asked) && as(r.Read[k])
	}
	for k, want := range r.Want {
		switch k := k.(type) {
		case kernel.TaskMesh:
			want, _ := want.(kernel.TaskMeshSpec)
			mesh(site{k.Sandbox, k.Addr}, k, func(have any) bool {
				is, ok := have.(kernel.TaskMeshSpec)
				// Default shows in what was read only, where it has moved since.
				return ok && is.Pool == want.Pool && is.MAC == want.MAC && (is.UDP || !want.UDP)
			})
		case kernel.TaskRoute:
			want, _ := want.(kernel.TaskRouteSpec)
			mesh(site{k.Sandbox, k.Addr}, k, func(have any) bool {
				is, ok := have.(kernel.TaskRouteSpec)
				return ok && is.Gateway == want.Gateway && (is.Loose || !want.Loose)
			})
		}
		if r.Failed[k] != nil {
			continue
		}
		switch k := k.(type) {
		case kernel.TaskVIP:
			at := site{k.Sandbox, want.(kernel.TaskVIPSpec).Addr}
			wanted[at] = k.VIP
			if have, ok := r.Read[k].(kernel.TaskVIPSpec); ok && have.Addr == at.addr {
				done[at] = k.VIP
			}
		case kernel.TaskTunnel:
			_, read := r.Read[k]
			tunnels[site{k.Sandbox, k.Addr}] = read
		}
	}
	h.mu.Lock()
	var puts []model.Record
	for id, e := range h.endpoints {
		if _, asked := r.View.Endpoints[id]; !asked {
			continue // newer than the round
		}
		was, at := e, site{e.Sandbox, e.Addr}
		if r.Read != nil {
			pair := kernel.Link{NS: overlay.NetnsName(h.networks[e.Network]), Name: overlay.HostEnd(id), Kind: kernel.Veth}
			if l, ok := r.Read[pair].(kernel.LinkSpec); ok && e.Phase == model.Joined && l.Peer == "" {
				e.Phase = model.Taken
			}
			e.Prepared, e.Tunnel, e.Meshed = done[at], tunnels[at], meshed[at] && !unmeshed[at]
		}
		if vip, ok := wanted[at]; ok && e.Prepared != vip {
			unread = true
		}
		if _, ok := tunnels[at]; ok && !e.Tunnel {
			unread = true
		}
		if _, ok := meshed[at]; ok && !e.Meshed && !unmeshed[at] {
			unread = true
		}
		if e != was {
			h.endpoints[id] = e
			puts = append(puts, record(kindEndpoint, string(id), e))
		}
	}
	if len(puts) > 0 {
		h.changedLocked()
		err = h.keepLocked(ctx, puts, nil)
	}
	h.mu.Unlock()
	if len(puts) > 0 {
		h.announce(true)
	}
	if err != nil {
		return unread, fmt.Errorf("record what the kernel has: %w", err)
	}
	return unread, nil
}

// Sweep forgets what a killed engine has left behind: it deletes neither
// endpoints nor networks then, and never speaks of them again. An endpoint goes
// when its veth pair is gone, or was never fetched, and the engine's list of
// containers does not have it either, for a while; a network when it has had no
// endpoint and the engine has not listed it, for a while.
//
// An unused network that the engine lists must stay: a task's network is made
// when the task is prepared, and the task may then wait for its start for as
// long as a predecessor takes to stop, or as --restart-delay says; the engine
// would not ask for the network again. A manager lists all networks of the
// swarm, so there what a killed engine left behind stays until `docker network
// rm`, or until the network is used again.
func (h *Hub) Sweep(ctx context.Context, read kernel.State) error {
	h.mu.Lock()
	now := h.cfg.Now()
	var dels []model.RecordKey
	used := make(map[model.NetworkID]bool)
	var lost []model.EndpointID
	for id, e := range h.endpoints {
		_, listed := h.engine.Containers[id]
		_, pair := read[kernel.Link{NS: overlay.NetnsName(h.networks[e.Network]), Name: overlay.HostEnd(id), Kind: kernel.Veth}]
		alive := pair && e.Phase == model.Taken
		if !h.engine.ContainersValid || listed || alive {
			delete(h.suspects, id)
			used[e.Network] = true
			continue
		}
		first, ok := h.suspects[id]
		if !ok {
			first = now
			h.suspects[id] = now
		}
		patience := lostEndpoint
		if h.begun[id] && e.Phase != model.Taken {
			patience = slowStart
		}
		if now.Sub(first) < patience || h.engine.ContainersAt.Before(first) {
			used[e.Network] = true
			continue
		}
		lost = append(lost, id)
		dels = append(dels, model.RecordKey{Kind: kindEndpoint, Key: string(id)})
	}
	var idle []model.NetworkID
	for id := range h.networks {
		_, listed := h.engine.Networks[id]
		if used[id] || !h.engine.NetworksValid || !h.engine.ContainersValid || listed {
			h.since[id] = now
			continue
		}
		if now.Sub(h.since[id]) >= unusedNetwork {
			idle = append(idle, id)
			dels = append(dels, model.RecordKey{Kind: kindNetwork, Key: string(id)})
		}
	}
	var err error
	if len(dels) > 0 {
		for _, id := range lost {
			h.cfg.Log.Info("endpoint forgotten: the engine no longer has it", "endpoint", id.Short())
			delete(h.endpoints, id)
			delete(h.suspects, id)
			delete(h.begun, id)
		}
		for _, id := range idle {
			h.cfg.Log.Info("network forgotten: unused, and the engine no longer has it", "network", id.Short())
			delete(h.networks, id)
			delete(h.since, id)
		}
		h.changedLocked()
		err = h.keepLocked(ctx, nil, dels)
	}
	h.mu.Unlock()
	if len(dels) > 0 {
		h.announce(true)
	}
	if err != nil {
		return fmt.Errorf("forget what the engine has lost: %w", err)
	}
	return nil
}
