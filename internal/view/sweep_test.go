package view

import (
	"testing"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// pairs is a kernel that has the pair of endpoint one.
func pairs() kernel.State {
	return kernel.State{kernel.Link{NS: overlay.NetnsName(network(web)), Name: overlay.HostEnd(one), Kind: kernel.Veth}: kernel.LinkSpec{}}
}

// TestSweep plays time: each row is what the engine and the kernel show from
// then on, and what must be left when that time has passed.
func TestSweep(t *testing.T) {
	listed := func(s model.EngineSnapshot) model.EngineSnapshot {
		s.Networks = map[model.NetworkID]model.EngineNetwork{web: {ID: web, Swarm: true}}
		return s
	}
	idle := swarm("nodeA", "192.168.0.1")
	busy := runs(idle, one)
	silent := idle
	silent.ContainersValid = false
	noNetworks := idle
	noNetworks.NetworksValid = false

	for _, c := range []struct {
		name    string
		phase   model.Phase
		engine  model.EngineSnapshot
		kernel  kernel.State
		after   time.Duration
		endpt   bool
		network bool
	}{
		{"a running container stays", model.Taken, busy, pairs(), time.Hour, true, true},
		{"also while its pair is not to be seen", model.Taken, busy, kernel.State{}, time.Hour, true, true},
		{"one that the engine does not list stays while its pair is there", model.Taken, idle, pairs(), time.Hour, true, true},
		{"and goes when both are gone", model.Taken, idle, kernel.State{}, 31 * time.Second, false, true},
		{"but not at once", model.Taken, idle, kernel.State{}, 29 * time.Second, true, true},
		{"a container may be slow to start", model.Joined, idle, pairs(), 299 * time.Second, true, true},
		{"a pair that was never fetched proves nothing", model.Joined, idle, pairs(), 301 * time.Second, false, true},
		{"an endpoint that is being made has time", model.Created, idle, kernel.State{}, 299 * time.Second, true, true},
		{"an engine that cannot be asked proves nothing", model.Taken, silent, kernel.State{}, time.Hour, true, true},
		{"an unused network goes in the end", model.Taken, idle, kernel.State{}, 3 * time.Minute, false, false},
		{"but not while the engine lists it: a task may wait for its start", model.Taken, listed(idle), kernel.State{}, time.Hour, false, true},
		{"nor while the list is in doubt", model.Taken, noNetworks, kernel.State{}, time.Hour, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := fresh(t)
			must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
			must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", c.phase)))
			for end := a.clock.now.Add(c.after); !a.clock.now.After(end); a.clock.now = a.clock.now.Add(time.Second) {
				c.engine.ContainersAt = a.clock.now
				ok(t, a.SetEngine(t.Context(), c.engine))
				ok(t, a.Sweep(t.Context(), c.kernel))
			}
			for _, n := range []*node{a, a.restarted(t)} {
				_, endpt := n.Endpoint(one)
				_, net := n.Network(web)
				if endpt != c.endpt || net != c.network {
					t.Errorf("endpoint there: %t, network there: %t; want %t, %t", endpt, net, c.endpt, c.network)
				}
			}
		})
	}
}

// TestWhatAFormerLifeBeganGoesSooner: its engine may have been killed with it.
func TestWhatAFormerLifeBeganGoesSooner(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Joined)))
	a = a.restarted(t)
	s := swarm("nodeA", "192.168.0.1")
	for range 32 {
		s.ContainersAt = a.clock.now
		ok(t, a.SetEngine(t.Context(), s))
		ok(t, a.Sweep(t.Context(), pairs()))
		a.clock.now = a.clock.now.Add(time.Second)
	}
	if _, there := a.Endpoint(one); there {
		t.Error("it is there still")
	}
}

// TestAListFromBeforeIsNoEvidence: the engine was asked before the endpoint was
// first missed, and never since.
func TestAListFromBeforeIsNoEvidence(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	s := swarm("nodeA", "192.168.0.1")
	s.ContainersAt = a.clock.now.Add(-time.Second)
	ok(t, a.SetEngine(t.Context(), s))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Joined)))
	for range 100 {
		ok(t, a.Sweep(t.Context(), kernel.State{}))
		a.clock.now = a.clock.now.Add(time.Second)
	}
	if _, there := a.Endpoint(one); !there {
		t.Error("forgotten")
	}
}

// TestASuspicionEndsWhenTheEngineListsIt: absence must last without a break.
func TestASuspicionEndsWhenTheEngineListsIt(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	for i := range 200 {
		s := swarm("nodeA", "192.168.0.1")
		if i%20 == 0 {
			s = runs(s, one)
		}
		s.ContainersAt = a.clock.now
		ok(t, a.SetEngine(t.Context(), s))
		ok(t, a.Sweep(t.Context(), kernel.State{}))
		a.clock.now = a.clock.now.Add(time.Second)
	}
	if _, there := a.Endpoint(one); !there {
		t.Error("forgotten")
	}
}

func TestASweepThatCannotBeRecordedIsOfMemoryFirst(t *testing.T) {
	a := fresh(t)
	must[uint64](t)(a.PutNetwork(t.Context(), network(web)))
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(one, "10.255.0.2", model.Taken)))
	s := swarm("nodeA", "192.168.0.1")
	s.ContainersAt = a.clock.now.Add(time.Hour)
	ok(t, a.SetEngine(t.Context(), s))
	ok(t, a.Sweep(t.Context(), kernel.State{}))
	a.clock.now = a.clock.now.Add(time.Minute)
	a.journal.fail = errDisk
	if err := a.Sweep(t.Context(), kernel.State{}); err == nil {
		t.Error("no error")
	}
	if _, there := a.Endpoint(one); there {
		t.Error("it stays as long as the disk is full, with an address that another task has by then")
	}
	a.journal.fail = nil
	ok(t, a.SetEngine(t.Context(), s))
	sameAfterRestart(t, a)
}
