package view

import (
	"time"

	"sluice/internal/model"
)

// freshLocked says which endpoints have become ready a short while ago, as their
// services count it (SlowStart), and remembers since when each of those services' is
// ready. Those of the first view have been so before this process was: a restart gives
// nobody less than before.
func (h *Hub) freshLocked(v *model.View) {
	ready := make(map[model.EndpointID]time.Time)
	note := func(id model.EndpointID, network model.NetworkID, t *model.Task, o *model.ServiceOptions) {
		if !t.Ready || t.Service == "" {
			return
		}
		span := o.SlowStart
		if s, told := v.Services[t.Service]; told {
			span = s.Options[network].SlowStart
		}
		if span <= 0 {
			return
		}
		since, known := h.ready[id]
		if !known && h.ready != nil {
			since = v.Now
		}
		ready[id] = since
		if v.Now.Sub(since) < time.Duration(span)*time.Second {
			if v.Fresh == nil {
				v.Fresh = make(map[model.EndpointID]time.Time)
			}
			v.Fresh[id] = since
		}
	}
	for id, e := range v.Endpoints {
		note(id, e.Network, &e.Task, &e.Options)
	}
	for id, r := range v.Remotes {
		note(id, r.Network, &r.Task, &r.Options)
	}
	h.ready = ready
}

// Ripen makes a new view if the last has endpoints that are fresh: time alone changes
// what they get. It is to be called every few seconds.
func (h *Hub) Ripen() {
	h.mu.Lock()
	fresh := h.view != nil && len(h.view.Fresh) > 0
	if fresh {
		h.changedLocked()
	}
	h.mu.Unlock()
	if fresh {
		h.announce(true)
	}
}
