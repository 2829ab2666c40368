package service

import (
	"time"

	"sluice/internal/model"
)

// slowSteps is how many times its weight in the end a task's in the beginning goes into:
// ten are few slots, and small enough a share to warm up by.
const slowSteps = 10

// gradual are the schedulers that spread by weight, by those that are asked for. They
// are so also while nobody is fresh: ip_vs has none for a moment when one is exchanged
// (ip_vs_edit_service waits for readers in between), and refuses. Hashes are not among
// them: each step would lead clients to other tasks.
var gradual = map[string]string{RR: WRR, WRR: WRR, "lc": "wlc", "wlc": "wlc", "sed": "sed", "nq": "nq"}

// slowStart gives backends of x that are fresh a part of their weight, while there are
// others.
func slowStart(v model.View, x *Virtual, backends []Backend) {
	scheduler, ok := gradual[x.Scheduler]
	if !ok {
		return
	}
	x.Scheduler = scheduler
	fresh, old, heaviest := false, false, 0
	for i := range backends {
		b := &backends[i]
		if _, is := v.Fresh[b.Endpoint]; b.Ready || b.Meshed {
			fresh, old = fresh || is, old || !is
		}
		heaviest = max(heaviest, b.Weight)
	}
	if !fresh || !old {
		return
	}
	scale := slowSteps
	if heaviest*scale > maxWeight {
		scale = 1 // there are steps enough
	}
	span := time.Duration(x.Options.SlowStart) * time.Second
	for i := range backends {
		b := &backends[i]
		b.Weight *= scale
		if since, is := v.Fresh[b.Endpoint]; is {
			age := min(max(0, v.Now.Sub(since)), span)
			b.Weight = max(1, int(int64(b.Weight)*int64(age)/int64(span)))
		}
	}
}
