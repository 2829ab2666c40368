package view

import (
	"net/netip"
	"time"
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
// containers were taken over, and every node that the engine says has one of
// this node's networks has told its whole table. It reports whether the view is
// no longer partial.
func (h *Hub) Settle() bool {
	h.mu.Lock()
	if !h.partial {
		h.mu.Unlock()
		return true
	}
	if h.adopted.IsZero() || !h.completeLocked() && h.cfg.Now().Sub(h.adopted) < settleTime {
		h.mu.Unlock()
		return false
	}
	h.partial = false
	h.changedLocked()
	h.mu.Unlock()
	h.announce(true)
	return true
}

// Partial reports whether something may still be missing; see model.View.
func (h *Hub) Partial() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.partial
}

// completeLocked reports whether this node's tasks are known to be prepared, as
// the kernel had them, and whether as many nodes have told all they have as the
// engine lists peers. They are counted, not compared: the engine lists addresses
// of its own gossip, which need not be those of the data path.
func (h *Hub) completeLocked() bool {
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
	return whole >= len(peers)-1
}
