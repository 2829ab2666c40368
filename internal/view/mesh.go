package view

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/lb/ingress"
)

// This file is about published ports: what nodes claim for them, and what the
// leading manager tells of networks to nodes that have no task there.

// entryRecord is what a node has claimed of a network as an entry of it.
type entryRecord struct {
	Addr   netip.Addr `json:"addr"`
	Number uint16     `json:"number"`
}

// networkRecord is a network on which a service publishes ports, as the leading
// manager tells it. The engine tells a node of a network only with its first task.
type networkRecord struct {
	Name     string               `json:"name,omitempty"`
	Subnet   netip.Prefix         `json:"subnet"`
	Gateway  netip.Addr           `json:"gateway"`
	Internal bool                 `json:"internal,omitzero"`
	VNI      model.VNI            `json:"vni"`
	MTU      int                  `json:"mtu,omitzero"` // 0: as each node's underlay has it
	Options  model.NetworkOptions `json:"options,omitzero"`
}

// check says what a record lacks.
func (r networkRecord) check() error {
	if !r.Subnet.IsValid() || !r.Subnet.Addr().Is4() || !r.Subnet.Contains(r.Gateway) || r.VNI == 0 || r.VNI > model.MaxVNI {
		return errors.New("IPv4 subnet, gateway in it and VNI are needed")
	}
	return nil
}

func (r networkRecord) network(id model.NetworkID) model.Network {
	return model.Network{
		ID: id, Name: r.Name, Subnet: r.Subnet, Gateway: r.Gateway, Internal: r.Internal, VNI: r.VNI, MTU: r.MTU, Options: r.Options,
	}
}

// labelsRecord is those labels of a node that published services ask for. That
// there is one without any says that the node has none of them.
type labelsRecord struct {
	Labels map[string]string `json:"labels,omitempty"`
}

// publishedHere are a snapshot's services without what they publish on networks that
// are none of this plugin's: an option is text that anybody may give to any network.
// Such a port would be held on every node, and kept from services that are served.
func publishedHere(s model.EngineSnapshot) map[model.ServiceID]model.Service {
	out := maps.Clone(s.Services)
	for id, sv := range s.Services {
		for network, o := range sv.Options {
			_, listed := s.Networks[network]
			_, waits := s.Unallocated[network] // whose it is is not known yet
			if o.Published == "" || listed || waits {
				continue
			}
			o.Published, o.Bind, o.Nodes, o.Allow, o.Source = "", "", "", "", model.Keep
			sv.Options = maps.Clone(sv.Options)
			sv.Options[network] = o
			out[id] = sv
		}
	}
	return out
}

// sayPublishedLocked adds to what this node says as leading manager. What its engine
// was not asked for yet in this life, or not successfully, is said as before: also a
// network that it does not list while it cannot say what services there are. An engine
// that is being stopped is no manager any more, and lists its own networks only, for as
// long as its containers need to end.
func (h *Hub) sayPublishedLocked(said map[string][]byte) {
	again := func(key string) {
		if raw, ok := h.said[key]; ok {
			said[key] = raw
		}
	}
	for _, s := range h.engine.Services {
		for id, o := range s.Options {
			key := keyNetwork + string(id)
			n, listed := h.engine.Networks[id]
			switch {
			case o.Published == "" || said[key] != nil:
			case !listed && !(h.engine.NetworksValid && h.engine.ServicesValid):
				again(key)
			case listed && n.Swarm:
				if r, err := published(n); err == nil {
					said[key] = encode(r)
				}
			}
		}
	}
	asked := ingress.LabelsAsked(h.engine.Services)
	if len(asked) == 0 {
		return
	}
	for id, n := range h.engine.Nodes {
		key := keyLabels + string(id)
		if h.engine.ServicesValid {
			said[key] = encode(labelsRecord{ingress.LabelsOf(n.Labels, asked)})
		} else {
			again(key)
		}
	}
}

// published is what the engine's list says of a network. One that the leader has
// not allocated yet, or has refused, lacks something.
func published(n model.EngineNetwork) (networkRecord, error) {
	req, err := options.Network(n.Options)
	if err != nil {
		return networkRecord{}, err
	}
	r := networkRecord{
		Name: n.Name, Subnet: n.Subnet, Gateway: n.Gateway, Internal: n.Internal, VNI: req.VNI, MTU: req.MTU, Options: req.Options,
	}
	if !r.Gateway.IsValid() && r.Subnet.IsValid() {
		r.Gateway = r.Subnet.Addr().Next()
	}
	return r, r.check()
}

// hear takes what a leading manager says of published ports.
func (w *word) hear(key string, value any) {
	switch r := value.(type) {
	case networkRecord:
		id := model.NetworkID(key[len(keyNetwork):])
		w.networks[id] = r.network(id)
	case labelsRecord:
		w.labels[model.NodeID(key[len(keyLabels):])] = r.Labels
	}
}

// entriesLocked is what all nodes have claimed.
func (h *Hub) entriesLocked(others map[model.NodeID]nodeRecord) map[model.NetworkID]map[model.NodeID]model.Entry {
	out := make(map[model.NetworkID]map[model.NodeID]model.Entry)
	add := func(id model.NetworkID, node model.NodeID, e model.Entry) {
		if out[id] == nil {
			out[id] = make(map[model.NodeID]model.Entry)
		}
		out[id][node] = e
	}
	for owner, n := range others {
		for key, d := range h.tables[owner].entries {
			if r, ok := d.value.(entryRecord); ok {
				add(model.NetworkID(key[len(keyEntry):]), owner, model.Entry{Addr: r.Addr, Number: r.Number, VTEP: n.VTEP})
			}
		}
	}
	if h.self.Node != "" {
		for id, r := range h.entered {
			add(id, h.self.Node, model.Entry{Addr: r.Addr, Number: r.Number, VTEP: h.self.VTEP})
		}
	}
	return out
}

// joinLocked adds the networks to a view that are here for published ports only.
func (h *Hub) joinLocked(v *model.View) {
	h.unjoined = false
	for _, n := range ingress.Transit(*v) {
		if n.MTU == 0 && h.cfg.MTU != nil {
			n.MTU = h.mtuLocked()
		}
		if n.MTU > 0 {
			v.Networks[n.ID] = n
		} else {
			h.unjoined = true
		}
	}
}

// mtuLocked is what an overlay of this node may have; 0 if that was never known. A
// moment in which the underlay has no address must not end what goes through the
// networks that are joined.
func (h *Hub) mtuLocked() int {
	mtu, err := h.cfg.MTU(h.self.VTEP)
	switch {
	case err == nil && mtu > 0:
		h.mtu, h.mtuOf, h.mtuErr = mtu, h.self.VTEP, ""
		return mtu
	case err == nil:
		err = fmt.Errorf("it leaves %d bytes", mtu)
	}
	if h.mtuErr != err.Error() {
		h.mtuErr = err.Error()
		h.cfg.Log.Warn("the MTU of networks that are joined for published ports is not known; the last one counts, without one they are not joined; tried again", "err", err)
	}
	if h.mtuOf != h.self.VTEP {
		return 0
	}
	return h.mtu
}

// join makes a new view if a network can be joined by now that could not. Nobody
// tells of that.
func (h *Hub) join() {
	h.mu.Lock()
	can := h.unjoined && h.cfg.MTU != nil && h.mtuLocked() > 0
	if can {
		h.unjoined = false
		h.changedLocked()
	}
	h.mu.Unlock()
	if can {
		h.announce(true)
	}
}

// Claim brings up to date what this node claims of the networks into which its
// published ports lead, and joins what could not be joined before. It is for whoever feeds the hub: claims follow from what
// is known of services, networks and other nodes, and are known to those by gossip.
// A network that has no room is logged, once, and told by Unclaimed.
func (h *Hub) Claim(ctx context.Context) error {
	h.join()
	_, err := h.commit(ctx, func() change { return h.claimLocked(h.viewLocked()) })
	if err != nil {
		return fmt.Errorf("record what this node claims for published ports: %w", err)
	}
	return nil
}

// claimLocked is the change to what this node claims by a view.
func (h *Hub) claimLocked(v model.View) change {
	claims, full := ingress.Claims(v)
	for id, err := range full {
		if h.full[id] == nil {
			h.cfg.Log.Error("published ports of a network are not served by this node", "network", id.Short(), "err", err)
		}
	}
	h.full = full
	next := make(map[model.NetworkID]entryRecord, len(claims))
	for id, e := range claims {
		next[id] = entryRecord{e.Addr, e.Number}
	}
	if maps.Equal(next, h.entered) {
		return change{}
	}
	c := change{visible: func() { h.entered = next }}
	for id, r := range next {
		if h.entered[id] != r {
			c.puts = append(c.puts, record(kindEntry, string(id), r))
		}
	}
	for id := range h.entered {
		if _, kept := next[id]; !kept {
			c.deletes = append(c.deletes, model.RecordKey{Kind: kindEntry, Key: string(id)})
		}
	}
	return c
}

// SetTaken takes which published ports of this node were tried, and which of them
// processes have, as it is now; the caller does not change them any more. It is not
// durable: a process that starts tries them all.
func (h *Hub) SetTaken(ctx context.Context, tried []model.HostRange, taken map[model.HostPort]string) {
	h.mu.Lock()
	news := !maps.Equal(h.taken, taken) || !slices.Equal(h.tried, tried) || h.tried == nil
	if news {
		h.tried, h.taken = append([]model.HostRange{}, tried...), taken // not nil any more
		h.changedLocked()
	}
	h.mu.Unlock()
	if news {
		h.announce(true)
		h.Settle(ctx) // it may have waited for this
	}
}

// Unclaimed are the networks that have no room for this node as an entry, with
// what a person can do.
func (h *Hub) Unclaimed() map[model.NetworkID]error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.full)
}
