package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"runtime"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
)

// planRuns gives a 99th percentile that is not the maximum.
const planRuns = 200

// plans measures what this node's kernel should look like, and what of it
// changes when one backend does.
func plans(ctx context.Context, t *table) error {
	v, err := swarm(ctx)
	if err != nil {
		return err
	}
	// One processor, with the garbage collection on it: the limit is for one core.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	runtime.GC() // of what the view was made of
	var wall, cpu []float64
	for range planRuns {
		var w float64
		c, err := spent(func() { w, _ = timed(func() error { plan.Host(v); return nil }) })
		if err != nil {
			return err
		}
		wall, cpu = append(wall, w), append(cpu, c)
	}
	what := fmt.Sprintf("plan of %d services × %d backends", services, tasks)
	t.add(goal{what: what + ", processor time", unit: seconds, limit: 0.020}, cpu)
	t.add(goal{what: what + ", wall clock", unit: seconds}, wall)

	have := plan.Host(v)
	changed, service, err := withoutOne(v)
	if err != nil {
		return err
	}
	want := plan.Host(changed)
	ops := kernel.Diff(have, want)
	others := 0
	for _, o := range ops {
		if !concerns(o.Key, service) {
			others++
		}
	}
	cpu = cpu[:0]
	for range planRuns {
		c, err := spent(func() { kernel.Diff(have, want) })
		if err != nil {
			return err
		}
		cpu = append(cpu, c)
	}
	what = fmt.Sprintf("one backend less among %d objects: ", len(have))
	t.add(goal{what: what + "changes", unit: count}, []float64{float64(len(ops))})
	t.add(goal{what: what + "changes to other services", unit: count}, []float64{float64(others)})
	t.add(goal{what: what + "finding them, processor time", unit: seconds}, cpu)
	return nil
}

// withoutOne is v after one remote backend has become unready, and the VIP of
// its service. It is the one with the lowest address, so that the most slots of
// its service move.
func withoutOne(v model.View) (model.View, netip.Addr, error) {
	var first model.Remote
	for _, r := range v.Remotes {
		if !first.Addr.IsValid() || r.Addr.Less(first.Addr) {
			first = r
		}
	}
	if !first.Addr.IsValid() {
		return v, netip.Addr{}, errors.New("the view has no remote endpoints")
	}
	first.Task.Ready = false
	v.Remotes = maps.Clone(v.Remotes)
	v.Remotes[first.ID] = first
	return v, first.Task.VIP, nil
}

// concerns reports whether an object is of the service with a VIP.
func concerns(k kernel.Key, vip netip.Addr) bool {
	switch k := k.(type) {
	case kernel.VIP:
		return k.IP == vip
	case kernel.Slot:
		return k.VIP == vip
	case kernel.Alive:
		return k.VIP == vip
	case kernel.Other:
		return k.VIP == vip
	case kernel.TaskVIP:
		return k.VIP == vip
	}
	return false
}
