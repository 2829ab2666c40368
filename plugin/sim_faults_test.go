package main

import "time"

// This file is what happens in the simulation, at random.

// pick is one of some at random; the zero value of none.
func pick[T any](w *world, all []T, fits func(T) bool) (x T, ok bool) {
	var some []T
	for _, a := range all {
		if fits(a) {
			some = append(some, a)
		}
	}
	if len(some) == 0 {
		return x, false
	}
	return some[w.rng.IntN(len(some))], true
}

func (h *simHost) up() bool { return h.proc != nil && !h.frozen && !h.removed }

// fault does one random thing to the network, a process or the swarm.
func (w *world) fault() {
	any := func(*simHost) bool { return true }
	a, _ := pick(w, w.hosts, any)
	b, _ := pick(w, w.hosts, func(h *simHost) bool { return h != a })
	switch p := w.rng.IntN(100); {
	case p < 8:
		w.note("%s and %s are cut", a.id[:5], b.id[:5])
		w.net.Block(a.addr, b.addr)
		w.net.Block(b.addr, a.addr)
	case p < 14:
		w.note("%s to %s is cut", a.id[:5], b.id[:5])
		w.net.Block(a.addr, b.addr)
	case p < 22:
		w.note("%s is alone", a.id[:5])
		for _, h := range w.hosts {
			w.net.Block(a.addr, h.addr)
			w.net.Block(h.addr, a.addr)
		}
	case p < 28:
		k := 1 + w.rng.IntN(len(w.hosts)-1)
		w.note("split at %d", k)
		for _, x := range w.hosts[:k] {
			for _, y := range w.hosts[k:] {
				w.net.Block(x.addr, y.addr)
				w.net.Block(y.addr, x.addr)
			}
		}
	case p < 33:
		w.note("links are whole")
		w.net.Heal()
	case p < 37:
		long := time.Duration(10+w.rng.IntN(20)) * time.Second
		w.note("%v as it is", long) // until those that are cut off are given up
		for range int(long / time.Second) {
			w.pass(time.Second)
			w.watch()
		}
	case p < 42:
		w.note("the links of %s flap", a.id[:5])
		for range 5 {
			for _, h := range w.hosts {
				w.net.Block(a.addr, h.addr)
				w.net.Block(h.addr, a.addr)
			}
			w.pass(time.Duration(w.rng.IntN(2000)) * time.Millisecond)
			for _, h := range w.hosts {
				w.net.Open(a.addr, h.addr)
				w.net.Open(h.addr, a.addr)
			}
			w.pass(time.Duration(w.rng.IntN(2000)) * time.Millisecond)
		}
	case p < 48:
		loss := []float64{0, 0.2, 0.5}[w.rng.IntN(3)]
		w.note("loss %v", loss)
		w.net.SetLoss(loss)
	case p < 52:
		w.note("delay and duplicates")
		w.net.SetDelay(time.Duration(1+w.rng.IntN(400)) * time.Millisecond)
		w.net.SetTwice(0.2)
	case p < 57:
		if a.proc == nil || a.frozen {
			return
		}
		w.note("%s is frozen", a.id[:5])
		w.locked(func() { a.frozen = true })
		w.net.Freeze(a.addr)
	case p < 62:
		if !a.frozen {
			return
		}
		w.note("%s is thawed", a.id[:5])
		w.locked(func() { a.frozen = false })
		w.net.Thaw(a.addr)
	case p < 76:
		w.crash(a)
	case p < 78:
		w.locked(func() { w.keys = 2 })
		w.note("a network with another key")
	default:
		w.change(a)
	}
}

// crash kills a process, or starts one again: with what it had on disk, or without,
// and with its clock set anew.
func (w *world) crash(h *simHost) {
	switch {
	case h.frozen:
	case h.proc != nil:
		w.note("%s is killed", h.id[:5])
		w.kill(h)
	default:
		h.skew = time.Duration(w.rng.IntN(7200)-3600) * time.Second
		if w.rng.IntN(3) == 0 {
			h.disk, h.blank = newSimDisk(), true
		}
		w.note("%s starts; state lost: %t; clock %v", h.id[:5], h.blank, h.skew)
		w.boot(h)
	}
}

// change is the swarm's own doing.
func (w *world) change(h *simHost) {
	alive := func(x *simService) bool { return !x.gone }
	x, _ := pick(w, w.services, alive)
	t, some := pick(w, w.tasks, func(t *simTask) bool { return t.wanted && !t.ended })
	switch p := w.rng.IntN(100); {
	case p < 15: // elections: not every plugin hears of them
		m, _ := pick(w, w.hosts, func(m *simHost) bool { return m.manager })
		w.note("%s leads", m.id[:5])
		w.locked(func() {
			w.leader = m
			for _, t := range w.tasks {
				t.reaped = t.reaped || !t.wanted && w.rng.IntN(2) == 0
			}
		})
	case p < 22:
		w.note("nobody leads")
		w.locked(func() { w.leader = nil })
	case w.leader == nil:
	case p < 32 && some: // a crash
		if t.host.frozen {
			return
		}
		w.note("%s on %s dies", t.id, t.host.id[:5])
		w.end(t)
	case p < 45 && some:
		w.note("%s on %s is to stop", t.id, t.host.id[:5])
		w.locked(func() { t.wanted, t.doomed = false, true })
	case p < 70 && x != nil && h.up() && w.obeys(h):
		w.start(x, h)
		w.note("%s runs on %s", w.tasks[len(w.tasks)-1].id, h.id[:5])
	case p < 78 && len(w.services) < 5:
		w.locked(func() { x = w.serve() })
		w.note("service %s", x.name)
		for _, h := range w.hosts {
			if h.up() && w.obeys(h) && w.rng.IntN(2) == 0 {
				w.start(x, h)
			}
		}
	case p < 82 && x != nil:
		w.note("service %s is removed", x.name)
		w.locked(func() {
			x.gone = true
			for _, t := range w.tasks {
				if t.service == x {
					t.wanted, t.doomed = false, true
				}
			}
		})
	case !w.obeys(h) && !h.removed:
		remove := p > 90 && !h.manager
		w.note("the swarm gives %s up; removes it: %t", h.id[:5], remove)
		w.locked(func() {
			for _, t := range w.tasks {
				if t.host == h && t.wanted {
					t.wanted, t.doomed = false, true
				}
			}
			h.removed = remove
		})
	}
}
