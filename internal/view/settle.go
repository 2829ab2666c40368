package view

import (
	"context"
	"net/netip"
	"time"

	"sluice/lb/ingress"
)

// settleTime is the longest that a view stays partial after the engine's
// containers have been taken over. It is twice what gossip needs to bring all
// tables to a node that every other can reach (gossip.ConvergenceBound, 30 s):
// who is not heard by then is out of reach, and the node cannot wait for ever
// with objects it may not remove.
const settleTime = time.Minute

// Adopted says that what the engine has was taken over; Settle may end the
// partial state from now on. Only the first call counts.
func (h *Hub) Adopted() {
	h.mu.Lock()
	if h.adopted.IsZero() {
		h.adopted = h.cfg.Now()
	}
	h.mu.Unlock()
}

// Settle ends the partial state if nothing can be missing any more: the engine's
// containers were taken over, every node that the engine says has one of this node's
// networks has told its whole table, so has a leading manager, and the published ports
// that these tell of were tried here. What this node claims (Claim) is of the same
// revision: a whole view without it would have the rules of published ports removed, and
// the other nodes forget where this one's answers go. It reports whether the view is no
// longer partial.
func (h *Hub) Settle(ctx context.Context) bool {
	_, err := h.commit(ctx, func() change {
		if !h.partial || h.adopted.IsZero() || !h.completeLocked() && h.cfg.Now().Sub(h.adopted) < settleTime {
			return change{}
		}
		v := h.viewLocked()
		v.Partial = false
		c := h.claimLocked(v)
		claimed := c.visible
		c.visible = func() {
			h.partial = false
			if claimed != nil {
				claimed()
			}
		}
		c.fact = true // the kernel has them already, and so have the others
		return c
	})
	return err == nil && !h.Partial()
}

// Partial reports whether something may still be missing; see model.View.
func (h *Hub) Partial() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.partial
}

// completeLocked reports whether this node's tasks are known to be prepared, as
// the kernel had them, whether as many nodes have told all they have as the engine
// lists peers, whether a leading manager is among those, and whether all published
// ports were tried. Nodes are counted, not compared: the engine lists addresses of its
// own gossip, which need not be those of the data path.
func (h *Hub) completeLocked() bool {
	if !h.ledLocked() {
		return false
	}
	for _, e := range h.endpoints {
		if e.Task.Ready && e.Prepared != e.Task.VIP {
			return false
		}
	}
	peers := make(map[netip.Addr]bool)
	for id, n := range h.networks {
		if n.Local {
			continue
		}
		listed := h.engine.Networks[id].Peers
		if len(listed) == 0 {
			return false // not asked yet: this node itself would be among them
		}
		for _, a := range listed {
			peers[a] = true
		}
	}
	whole := 0
	for owner, t := range h.tables {
		if owner != h.self.Node && t.heard && t.whole {
			whole++
		}
	}
	// Last, as it is dear: a port that was not tried is not planned, though the kernel may
	// have its rules from before, and they serve.
	return whole >= len(peers)-1 && ingress.AllTried(h.viewLocked())
}

// ledLocked reports whether what a leading manager has to say is known, if there can be
// one: which services there are, and what they publish. A node without tasks has no
// peers of whom it could miss anything, and may be an entry of all networks.
func (h *Hub) ledLocked() bool {
	if h.cfg.Alone || h.engine.SwarmValid && h.engine.NoSwarm {
		return true
	}
	if h.leadsLocked() {
		return h.engine.ServicesValid && h.engine.NetworksValid
	}
	lead := h.leaderLocked()
	return lead != nil && lead.heard && lead.told()
}
