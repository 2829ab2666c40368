package main

import (
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/plan"
)

func TestQuantileIsASample(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for _, c := range []struct {
		samples []float64
		q, want float64
	}{
		{[]float64{7}, 0.99, 7},
		{[]float64{3, 1, 2}, 0.5, 2},
		{hundred, 0.5, 50},
		{hundred, 0.99, 99},
		{hundred, 0.01, 1},
	} {
		if got := quantile(c.samples, c.q); got != c.want {
			t.Errorf("quantile %v of %d samples: %v, want %v", c.q, len(c.samples), got, c.want)
		}
	}
}

func TestVerdictFollowsBothLimits(t *testing.T) {
	for _, c := range []struct {
		name    string
		goal    goal
		samples []float64
		want    string
	}{
		{"no limit", goal{unit: seconds}, []float64{9}, "-"},
		{"below", goal{unit: seconds, limit: 10}, []float64{9}, "met"},
		{"above", goal{unit: seconds, limit: 8}, []float64{9}, "MISSED"},
		{"median below, tail above", goal{unit: seconds, limit: 3, limit99: 8}, []float64{1, 2, 9}, "MISSED"},
		{"lower limit kept", goal{unit: ratio, limit: 0.95, atLeast: true}, []float64{0.96}, "met"},
		{"lower limit missed", goal{unit: ratio, limit: 0.95, atLeast: true}, []float64{0.94}, "MISSED"},
	} {
		var b table
		b.add(c.goal, c.samples)
		if got := b.rows[0][5]; got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// TestTheSwarmIsWhatTheGoalsSpeakOf: every backend is in service, so that a plan
// has a slot for each, and one that leaves concerns its own service only.
func TestTheSwarmIsWhatTheGoalsSpeakOf(t *testing.T) {
	v, err := swarm(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	have := plan.Host(v)
	slots := 0
	for k := range have {
		if _, ok := k.(kernel.Slot); ok {
			slots++
		}
	}
	if slots != services*tasks {
		t.Errorf("%d slots, want %d", slots, services*tasks)
	}
	less, vip, err := withoutOne(v)
	if err != nil {
		t.Fatal(err)
	}
	ops := kernel.Diff(have, plan.Host(less))
	if len(ops) == 0 {
		t.Error("a backend less changes nothing")
	}
	for _, o := range ops {
		if !concerns(o.Key, vip) {
			t.Errorf("%s: is of another service than that of %s", o, vip)
		}
	}
}
