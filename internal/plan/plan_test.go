package plan_test

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/lb/service"
)

// views draws small swarms with tasks in every state.
func views() *rapid.Generator[model.View] {
	return rapid.Custom(func(t *rapid.T) model.View {
		v := swarm(rapid.IntRange(0, 4).Draw(t, "services"), rapid.IntRange(0, 12).Draw(t, "tasks"))
		if rapid.IntRange(0, 4).Draw(t, "vtep") == 0 {
			v.Self.VTEP = netip.Addr{}
		}
		for id, n := range v.Networks {
			n.Local = rapid.IntRange(0, 4).Draw(t, "local") == 0
			v.Networks[id] = n
		}
		if rapid.IntRange(0, 4).Draw(t, "network") == 0 {
			clear(v.Networks)
		}
		change := func(task *model.Task, prepared *netip.Addr) {
			task.Ready = rapid.Bool().Draw(t, "ready")
			task.Leaving = rapid.Bool().Draw(t, "leaving")
			if rapid.Bool().Draw(t, "unprepared") {
				*prepared = netip.Addr{}
			}
		}
		for _, e := range sorted(v.Endpoints) {
			e.Phase = model.Phase(rapid.IntRange(0, 2).Draw(t, "phase"))
			change(&e.Task, &e.Prepared)
			v.Endpoints[e.ID] = e
		}
		for _, r := range sorted(v.Remotes) {
			change(&r.Task, &r.Prepared)
			v.Remotes[r.ID] = r
		}
		for _, id := range sortedKeys(v.Services) {
			if rapid.IntRange(0, 3).Draw(t, "told") == 0 {
				delete(v.Services, id)
			}
		}
		return v
	})
}

func TestEveryObjectHasOnePlanner(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := views().Draw(t, "view")
		one, two := kernel.State{}, kernel.State{}
		overlay.Plan(v, one)
		service.Plan(v, two)
		for k := range one {
			if _, both := two[k]; both {
				t.Fatalf("%s: overlay and service both plan it", k)
			}
		}
		maps.Copy(one, two)
		if !maps.Equal(one, plan.Host(v)) {
			t.Fatal("the host's plan is not what its two parts are")
		}
	})
}

// TestNothingIsPlannedOnNothing: what an object stands on is planned too.
func TestNothingIsPlannedOnNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := plan.Host(views().Draw(t, "view"))
		for k := range s {
			if _, ok := k.(kernel.Netns); ok || k.Netns() == "" || k.Phase() == kernel.PhaseTask {
				continue
			}
			if _, ok := s[kernel.Netns{Name: k.Netns()}]; !ok {
				t.Fatalf("%s: its namespace is not planned", k)
			}
		}
	})
}

// TestAPlanCanBeReachedFromAnyOther is the claim that matters for restarts: from
// what any view left behind, one difference leads to any other view's state,
// except that pairs which the engine has taken are never made.
func TestAPlanCanBeReachedFromAnyOther(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := plan.Host(views().Draw(t, "before")), plan.Host(views().Draw(t, "after"))
		got := kernel.Apply(have, kernel.Diff(have, want))
		if ops := kernel.Diff(got, want); len(ops) > 0 {
			t.Fatalf("there is still something to do: %v", ops)
		}
		for k, w := range want {
			g, ok := got[k]
			l, isLink := w.(kernel.LinkSpec)
			switch {
			case isLink && l.Taken:
				if before, was := have[k]; ok != was || ok && g != w && g != before {
					t.Fatalf("%s: got %v", k, g)
				}
			case isLink && k.Phase() == kernel.PhaseVeth:
				h, _ := g.(kernel.LinkSpec)
				if h.Taken = false; h != l {
					t.Fatalf("%s: got %v, want %v", k, g, w)
				}
			case !ok || g != w:
				t.Fatalf("%s: got %v, want %v", k, g, w)
			}
		}
		for k := range got {
			if _, ok := want[k]; !ok {
				t.Fatalf("%s: is left over", k)
			}
		}
	})
}

func sorted[K ~string, V any](m map[K]V) []V {
	out := make([]V, 0, len(m))
	for _, k := range sortedKeys(m) {
		out = append(out, m[k])
	}
	return out
}

func sortedKeys[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
