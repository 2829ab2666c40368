package view

import (
	"errors"
	"testing"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// sameAfterRestart compares what a node knows with what a process that starts
// now would.
func sameAfterRestart(t *testing.T, n *node) {
	t.Helper()
	later := n.restarted(t)
	if now, then := n.Self(), later.Self(); now != then {
		t.Errorf("self %+v, after a restart %+v", now, then)
	}
	for _, id := range []model.EndpointID{one, two} {
		if now, then := n.View().Endpoints[id], later.View().Endpoints[id]; now != then {
			t.Errorf("endpoint %s: %+v, after a restart %+v", id.Short(), now, then)
		}
		if now, then := n.View().Remotes[id], later.View().Remotes[id]; now != then {
			t.Errorf("remote %s: %+v, after a restart %+v", id.Short(), now, then)
		}
	}
	if len(n.unsaved) > 0 {
		t.Errorf("still unsaved: %v", n.unsaved)
	}
}

// TestFactsThatCouldNotBeRecordedAreTriedAgain: memory has them at once, the
// journal as soon as it can, without the fact being told again.
func TestFactsThatCouldNotBeRecordedAreTriedAgain(t *testing.T) {
	peer := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	seen := swarm("nodeA", "192.168.0.1") // its task is no longer listed: not ready

	a.journal.fail = errDisk
	for name, err := range map[string]error{
		"SetEngine": a.SetEngine(t.Context(), seen),
		"SetTables": a.SetTables(t.Context(), []Table{peer.table(true)}),
		"again":     a.SetEngine(t.Context(), seen),
	} {
		if !errors.Is(err, errDisk) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v := a.View(); v.Endpoints[one].Task.Ready || len(v.Remotes) != 1 {
		t.Errorf("memory waits for the disk: %+v", v)
	}
	if a.restarted(t).View().Endpoints[one].Task.Ready != true {
		t.Error("the disk is not behind: this test proves nothing")
	}

	a.journal.fail = nil
	before := a.View().Revision
	ok(t, a.SetEngine(t.Context(), seen))
	if a.View().Revision != before {
		t.Error("a repeated write made a new revision")
	}
	sameAfterRestart(t, a)

	a.journal.fail = errDisk // and what is forgotten, is so on disk too
	if err := a.SetTables(t.Context(), nil); !errors.Is(err, errDisk) {
		t.Errorf("forget: %v", err)
	}
	a.journal.fail = nil
	ok(t, a.SetTables(t.Context(), nil))
	sameAfterRestart(t, a)
}

// TestAnIntentOutdatesWhatIsUnsaved: what waits to be written must not undo what
// has been written since.
func TestAnIntentOutdatesWhatIsUnsaved(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	a.journal.fail = errDisk
	if err := a.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")); !errors.Is(err, errDisk) {
		t.Fatal(err)
	}
	a.journal.fail = nil
	must[uint64](t)(a.DeleteEndpoint(t.Context(), one))
	ok(t, a.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")))
	if _, back := a.restarted(t).Endpoint(one); back {
		t.Error("a deleted endpoint came back")
	}
	sameAfterRestart(t, a)
}

// TestWhatHasHappenedIsNotRefused: the engine tells that something is over, or runs
// already. A journal that cannot have it now has it later.
func TestWhatHasHappenedIsNotRefused(t *testing.T) {
	for name, do := range map[string]func(*node) error{
		"DeleteNetwork":  func(a *node) error { _, err := a.DeleteNetwork(t.Context(), web); return err },
		"DeleteEndpoint": func(a *node) error { _, err := a.DeleteEndpoint(t.Context(), one); return err },
		"SetVTEP":        func(a *node) error { return a.SetVTEP(t.Context(), addr("192.168.0.77")) },
		"TakeOver": func(a *node) error {
			return a.TakeOver(t.Context(), network(web), endpoint(two, "10.255.0.3", model.Taken))
		},
		"leave": func(a *node) error {
			e, _ := a.Endpoint(one)
			e.Left = true
			_, err := a.PutEndpoint(t.Context(), e)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
			before, told := a.View(), a.changed
			a.journal.fail = errDisk
			ok(t, do(a))
			if d := same(before, a.View()); d == "" || a.changed == told {
				t.Error("it waits for the disk")
			}
			if len(a.unsaved) == 0 {
				t.Error("the journal is not behind: this test proves nothing")
			}
			a.journal.fail = nil
			ok(t, a.SetEngine(t.Context(), runs(swarm("nodeA", "192.168.0.1"), one)))
			sameAfterRestart(t, a)
			if _, there := a.restarted(t).Network(web); there == (name == "DeleteNetwork") {
				t.Errorf("after a restart the network is there: %t", there)
			}
		})
	}
}

// TestWhatIsDeletedAndUnsavedIsDeletedAgain: the process ends before its journal has
// taken a deletion, and the next one has the endpoint and the network back. The engine
// does not list them, so both go again.
func TestWhatIsDeletedAndUnsavedIsDeletedAgain(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	a.journal.fail = errDisk
	must[uint64](t)(a.DeleteEndpoint(t.Context(), one))
	must[uint64](t)(a.DeleteNetwork(t.Context(), web))
	a.journal.fail = nil
	a = a.restarted(t)
	if _, back := a.Endpoint(one); !back {
		t.Fatal("the journal was not behind: this test proves nothing")
	}
	idle := swarm("nodeA", "192.168.0.1")
	for end := a.clock.now.Add(lostEndpoint + unusedNetwork + 2*time.Second); !a.clock.now.After(end); a.clock.now = a.clock.now.Add(time.Second) {
		idle.ContainersAt = a.clock.now
		ok(t, a.SetEngine(t.Context(), idle))
		ok(t, a.Sweep(t.Context(), kernel.State{}))
		if e, there := a.Endpoint(one); there && e.Task.Ready {
			t.Fatal("it is given connections")
		}
	}
	if v := a.View(); len(v.Endpoints)+len(v.Networks) > 0 {
		t.Errorf("left are %v and %v", v.Endpoints, v.Networks)
	}
	sameAfterRestart(t, a)
}

// TestARefusedIntentIsNotUnsaved: its caller was told that it failed.
func TestARefusedIntentIsNotUnsaved(t *testing.T) {
	a := fresh(t)
	a.journal.fail = errDisk
	if _, err := a.PutNetwork(t.Context(), network(web)); !errors.Is(err, errDisk) {
		t.Fatal(err)
	}
	a.journal.fail = nil
	ok(t, a.SetEngine(t.Context(), swarm("nodeA", "192.168.0.1")))
	if _, there := a.restarted(t).Network(web); there {
		t.Error("it was written later, though the caller was told that it failed")
	}
}

func TestAnIPv6AddressOfTheNodeIsNoVTEP(t *testing.T) {
	a := fresh(t)
	ok(t, a.SetEngine(t.Context(), swarm("nodeA", "fd00::1")))
	if got := a.Self(); got.VTEP.IsValid() || got.Node != "nodeA" {
		t.Errorf("%+v", got)
	}
}
