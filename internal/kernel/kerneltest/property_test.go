package kerneltest

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"sluice/internal/kernel"
)

// randomState draws a state that hangs together: part of the full example, with
// some values changed, in which everything has what it needs.
func randomState(t *rapid.T, label string, path string) kernel.State {
	full := Example()
	addTables(full, path)
	addIPVS(full)
	addTunnels(full, path)
	addMesh(full, path)
	for _, c := range slices.Concat(changeCases(path, true), tunnelChanges(path), meshChanges(path)) {
		if rapid.IntRange(0, 3).Draw(t, label+" change "+c.name) == 0 {
			c.change(full)
		}
	}
	out := maps.Clone(full)
	for _, key := range full.Keys() {
		if _, ok := out[key]; ok && rapid.IntRange(0, 5).Draw(t, label+" without "+key.String()) == 0 {
			delete(out, key)
			dropDependents(out, key)
		}
	}
	// A quiet port, an entry on a device: what needs a bridge went with it. What
	// is told of a VIP's slots must be true.
	for key := range full {
		e, ok := key.(kernel.FDB)
		if ok && e.Dev == vxlan && out[kernel.Link{NS: netA, Name: vxlan, Kind: kernel.VXLAN}] == nil || ok && e.Dev == meshPort && out[meshPair()] == nil {
			delete(out, key)
		}
		if hostDev(key) == meshEnd && out[meshPair()] == nil {
			delete(out, key)
		}
	}
	return out
}

// From any state, with any faults on the way, the rounds after the last fault
// lead to what is wanted.
func TestApplyOfDiffConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const path = "/run/docker/netns/1"
		f := NewFake()
		f.AddSandbox(path)
		round := func(want kernel.State) error {
			have, err := f.Dump(t.Context(), []string{path})
			if err != nil {
				return err
			}
			return errors.Join(f.Apply(t.Context(), kernel.Diff(have, want))...)
		}
		f.Faults(rapid.Uint64().Draw(t, "seed"), float64(rapid.IntRange(0, 50).Draw(t, "percent"))/100)
		for i := range rapid.IntRange(1, 4).Draw(t, "wants") {
			want := randomState(t, fmt.Sprintf("%d", i), path)
			for range rapid.IntRange(0, 3).Draw(t, "rounds") {
				// Faults are expected; that anything else never fails shows below.
				_ = round(want)
			}
		}
		f.Faults(0, 0)
		want := randomState(t, "last", path)
		for range maxRounds {
			// While a device is made anew, what is on it may come too early.
			_ = round(want)
		}
		if err := round(want); err != nil {
			t.Fatalf("the round after the last: %v", err)
		}
		if have := f.State(); have.Text() != want.Text() {
			t.Fatalf("have\n%swant\n%s", have.Text(), want.Text())
		}
	})
}

// From nothing, one round without faults does it, and no op of it is refused.
func TestOneRoundMakesAnyState(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const path = "/run/docker/netns/1"
		f := NewFake()
		f.AddSandbox(path)
		want := randomState(t, "want", path)
		if err := errors.Join(f.Apply(t.Context(), kernel.Diff(kernel.State{}, want))...); err != nil {
			t.Fatal(err)
		}
		if have := f.State(); !maps.Equal(have, want) {
			t.Fatalf("have\n%swant\n%s", have.Text(), want.Text())
		}
	})
}

func TestFaultsFollowTheSeed(t *testing.T) {
	ops := kernel.Diff(kernel.State{}, Example())
	outcome := func(seed uint64) string {
		f := NewFake()
		f.Faults(seed, 0.3)
		return fmt.Sprint(f.Apply(t.Context(), ops))
	}
	if outcome(1) != outcome(1) {
		t.Error("one seed, two outcomes")
	}
	if outcome(1) == outcome(2) {
		t.Error("two seeds, one outcome")
	}
}

func TestTransactionIsWholeOrNothing(t *testing.T) {
	f := NewFake()
	ns := kernel.Netns{Name: netA}
	slot := kernel.Slot{NS: netA, VIP: vip, Slot: 5} // beyond the VIP's slots
	ops := []kernel.Op{
		{Key: ns, Want: kernel.NetnsSpec{}},
		{Key: kernel.BridgeTable{NS: netA}, Want: kernel.BridgeTableSpec{Router: router}},
		{Key: kernel.VIP{NS: netA, IP: vip}, Want: kernel.VIPSpec{Scheduler: "rr", Slots: 2}},
		{Key: slot, Want: kernel.SlotSpec{MAC: other}},
	}
	errs := f.Apply(t.Context(), ops)
	if errs[0] != nil {
		t.Fatal(errs[0])
	}
	for i, err := range errs[1:] {
		if !errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("op %d: %v, want %v", i+1, err, kernel.ErrNotExist)
		}
	}
	if s := f.State(); len(s) != 1 || s[ns] == nil {
		t.Errorf("left:\n%s", s.Text())
	}
}

func TestTaskTakesItsTableAlong(t *testing.T) {
	f := NewFake()
	f.AddSandbox("/ns")
	sandboxes := []string{"/ns"}
	s := kernel.State{
		kernel.TaskTable{Sandbox: "/ns"}:         kernel.TaskTableSpec{},
		kernel.TaskVIP{Sandbox: "/ns", VIP: vip}: kernel.TaskVIPSpec{Addr: member},
	}
	if err := errors.Join(f.Apply(t.Context(), kernel.Diff(kernel.State{}, s))...); err != nil {
		t.Fatal(err)
	}
	if have, err := f.Dump(t.Context(), nil); err != nil || len(have) != 0 {
		t.Errorf("a task that was not asked for is reported: %v, %v", have, err)
	}
	if have, err := f.Dump(t.Context(), sandboxes); err != nil || !maps.Equal(have, s) {
		t.Errorf("dump: %v, %v", have, err)
	}
	f.RemoveSandbox("/ns")
	if have := f.State(); len(have) != 0 {
		t.Errorf("left:\n%s", have.Text())
	}
}
