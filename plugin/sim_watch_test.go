package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sluice/internal/gossip"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// This file is what must hold in the simulation: at every moment (watch), and once all
// is healed (disagreement).

// balanced is what a host's kernel balances each VIP over, by the tasks' MACs.
func balanced(s kernel.State) map[netip.Addr]map[model.MAC]bool {
	out := make(map[netip.Addr]map[model.MAC]bool)
	for k, v := range s {
		switch k := k.(type) {
		case kernel.VIP:
			if out[k.IP] == nil {
				out[k.IP] = make(map[model.MAC]bool)
			}
		case kernel.Slot:
			if out[k.VIP] == nil {
				out[k.VIP] = make(map[model.MAC]bool)
			}
			out[k.VIP][v.(kernel.SlotSpec).MAC] = true
		}
	}
	return out
}

// led says whether a host's kernel leads the port of a service to it.
func led(s kernel.State, x *simService) bool {
	for k := range s {
		if p, is := k.(kernel.MeshPort); is && x.published == model.Published(strconv.Itoa(int(p.Port))) {
			return true
		}
	}
	return false
}

// leads is what a host's process has of a service's port.
func (w *world) leads(h *simHost, x *simService) string {
	if h.proc == nil {
		return "no process"
	}
	v := h.proc.hub.View()
	return fmt.Sprintf("the service with %q, networks %v, entries %v, a network here: %t, tried %v, partial %t",
		v.Services[x.id].Options[simNet].Published, slices.Sorted(maps.Keys(v.Published)), sortedEntries(v), v.Networks[simNet].ID != "", v.Tried, v.Partial)
}

// works says whether a host has containers on the network: its balancer is used, and
// no change of who publishes a port ends it.
func (w *world) works(h *simHost) bool {
	return slices.ContainsFunc(w.tasks, func(t *simTask) bool { return t.host == h && t.listed })
}

// watch holds what must hold at every moment.
func (w *world) watch() {
	for _, h := range w.hosts {
		vips := balanced(h.kernel.State())
		had := w.had[h]
		if !w.works(h) {
			clear(had)
		}
		// Without its state, and without contact for settleTime, a node goes on with
		// what it has heard: the one case in which silence counts.
		deaf := h.blank && (h.proc == nil || !h.proc.hub.Partial())
		for _, t := range w.tasks {
			in := vips[t.service.vip][t.mac()]
			if had[t] && !in && !t.doomed && !deaf && !h.removed {
				w.fail("%s does not balance over %s on %s any more, and nobody has spoken against it; it has %s", h.id[:5], t.id, t.host.id[:5], w.of(h, t))
			}
			had[t] = in
		}
		for _, x := range w.services {
			leads := led(h.kernel.State(), x)
			if w.led[h][x] && !leads && !x.gone && !deaf && !h.removed {
				w.fail("%s does not lead port %s to %s any more, which is there; it has %s", h.id[:5], x.published, x.name, w.leads(h, x))
			}
			w.led[h][x] = leads
		}
		for vip, macs := range vips {
			for _, x := range w.services {
				if x.vip != vip {
					continue
				}
				for _, t := range w.tasks {
					if macs[t.mac()] && t.service != x {
						w.fail("%s balances %s over %s, which is of %s", h.id[:5], x.name, t.id, t.service.name)
					}
				}
			}
		}
		if h.proc == nil {
			continue
		}
		knows := w.knows[h.proc]
		if knows == nil {
			knows = make(map[*simTask]knowledge)
			w.knows[h.proc] = knows
		}
		view := h.proc.hub.View()
		for _, t := range w.tasks {
			_, known := view.Remotes[t.endpoint]
			switch {
			case t.host.removed: // it may show itself until its engine has heard of it
			case known && knows[t] == forgotten:
				w.fail("%s knows %s again, which had ended on %s and was forgotten", h.id[:5], t.id, t.host.id[:5])
			case known:
				knows[t] = held
			case knows[t] == held && t.ended:
				knows[t] = forgotten
			}
		}
	}
}

// of is what a host's process has of a task.
func (w *world) of(h *simHost, t *simTask) string {
	if h.proc == nil {
		return "no process"
	}
	v := h.proc.hub.View()
	r, known := v.Remotes[t.endpoint]
	if t.host == h {
		e := v.Endpoints[t.endpoint]
		r, known = model.Remote{Task: e.Task, Prepared: e.Prepared}, e.ID != ""
	}
	var table gossip.Table
	if n := h.proc.gossip.node; n != nil {
		table = n.Snapshot()[string(t.host.id)]
	}
	return fmt.Sprintf("a record: %t, %+v, prepared %s, in gossip %t of %s seq %d complete %t; service known: %t, partial %t",
		known, r.Task, r.Prepared, table.Entries["endpoint/"+string(t.endpoint)] != nil, table.State, table.Seq, table.Complete,
		v.Services[t.service.id].ID != "", v.Partial)
}

// knowledge is what a process has of a task of another node.
type knowledge int

const (
	unheard   knowledge = iota
	held                // its record is there
	forgotten           // it was, and went after the task had ended
)

// tablesOf are a node's tables, by owner.
func (w *world) tablesOf(n *gossip.Node) string {
	var b strings.Builder
	all := n.Snapshot()
	for _, h := range w.hosts {
		x, ok := all[string(h.id)]
		if ok && h.removed {
			fmt.Fprintf(&b, "%s, which the swarm has removed; seen by %p\n", h.id[:5], n)
		} else if ok {
			fmt.Fprintf(&b, "%s %s %s seq %d complete %t, %d entries\n", h.id[:5], x.State, x.Incarnation, x.Seq, x.Complete, len(x.Entries))
		}
	}
	return b.String()
}

// disagreement says in which way the nodes differ; empty: in none.
func (w *world) disagreement() string {
	var here []*simHost
	for _, h := range w.hosts {
		if !h.removed {
			here = append(here, h)
		}
	}
	var first *simHost
	var tables string
	var claims string
	for _, h := range here {
		up, why := h.proc.gossip.state()
		if !up {
			return fmt.Sprintf("%s has no gossip: %s", h.id[:5], why)
		}
		node := h.proc.gossip.node // its goroutine rests: see pass
		text := w.tablesOf(node)
		view := h.proc.hub.View()
		entries := fmt.Sprint(sortedEntries(view))
		if first == nil {
			first, tables, claims = h, text, entries
		}
		if text != tables {
			return fmt.Sprintf("tables of %s:\n%s\nand of %s:\n%s", first.id[:5], tables, h.id[:5], text)
		}
		if entries != claims {
			return fmt.Sprintf("entries of %s:\n%s\nand of %s:\n%s", first.id[:5], claims, h.id[:5], entries)
		}
		if d := unique(view); d != "" {
			return d
		}
		for _, p := range h.proc.hub.Peers() {
			if !p.Present {
				return fmt.Sprintf("%s is out of contact with %s", h.id[:5], p.Node[:5])
			}
		}
		for _, x := range w.services {
			if leads := led(h.kernel.State(), x); leads != (x.published != "" && !x.gone) {
				return fmt.Sprintf("%s leads port %q to %s: %t; the service is gone: %t", h.id[:5], x.published, x.name, leads, x.gone)
			}
		}
		if d := w.wrong(h); d != "" {
			return d
		}
	}
	return ""
}

// wrong is what a host's kernel does otherwise than the swarm has it.
func (w *world) wrong(h *simHost) string {
	s := h.kernel.State()
	vips := balanced(s)
	if !w.works(h) && len(vips) == 0 {
		return ""
	}
	for _, x := range w.services {
		var want, got []string
		for _, t := range w.tasks {
			if t.service == x && t.runs && t.wanted && !x.gone {
				want = append(want, string(t.id))
			}
			if vips[x.vip][t.mac()] {
				got = append(got, string(t.id))
			}
		}
		if !slices.Equal(want, got) {
			return fmt.Sprintf("%s balances %s over %q, want %q", h.id[:5], x.name, got, want)
		}
		if _, there := vips[x.vip]; there == x.gone {
			return fmt.Sprintf("%s has the VIP of %s: %t; the service is gone: %t", h.id[:5], x.name, there, x.gone)
		}
	}
	for vip, macs := range vips { // those of published ports too
		for _, t := range w.tasks {
			if macs[t.mac()] && !(t.runs && t.wanted) {
				return fmt.Sprintf("%s balances %s over %s, which is gone", h.id[:5], vip, t.id)
			}
		}
	}
	for k, v := range s {
		f, ok := k.(kernel.FDB)
		if !ok {
			continue
		}
		for _, t := range w.tasks {
			if t.mac() == f.MAC && (!t.listed || v.(kernel.FDBSpec).VTEP != t.host.addr) {
				return fmt.Sprintf("%s has the way to %s by %v", h.id[:5], t.id, v)
			}
		}
	}
	return ""
}

// sortedEntries are a view's, in one order.
func sortedEntries(v model.View) []string {
	var out []string
	for id, nodes := range v.Entries {
		for node, e := range nodes {
			out = append(out, fmt.Sprintf("%s %s %s %d", id, node, e.Addr, e.Number))
		}
	}
	slices.Sort(out)
	return out
}

// unique says which entries have claimed the same.
func unique(v model.View) string {
	for _, nodes := range v.Entries {
		addrs, numbers := make(map[netip.Addr]model.NodeID), make(map[uint16]model.NodeID)
		for _, id := range slices.Sorted(maps.Keys(nodes)) {
			e := nodes[id]
			if other, twice := addrs[e.Addr]; twice {
				return fmt.Sprintf("%s and %s have both claimed %s", id[:5], other[:5], e.Addr)
			}
			if other, twice := numbers[e.Number]; twice {
				return fmt.Sprintf("%s and %s have both claimed number %d", id[:5], other[:5], e.Number)
			}
			addrs[e.Addr], numbers[e.Number] = id, id
		}
	}
	return ""
}
