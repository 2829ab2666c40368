package view

import (
	"errors"
	"testing"

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
