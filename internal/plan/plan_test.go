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
	"sluice/lb/guard"
	"sluice/lb/ingress"
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
		publish(t, &v)
		return v
	})
}

// publish has some services of a view publish ports, and some nodes claim what
// they need for it, this one (node0) in most cases among them.
func publish(t *rapid.T, v *model.View) {
	v.Entries = map[model.NetworkID]map[model.NodeID]model.Entry{}
	v.Taken = map[model.HostPort]string{{Proto: model.TCP, Port: 82}: "nginx (pid 7)"}
	v.Self.Datapath = rapid.SampledFrom([]string{service.NFT, service.IPVS}).Draw(t, "datapath")
	for id := range v.Networks {
		v.Entries[id] = map[model.NodeID]model.Entry{}
		for _, node := range []model.NodeID{"node0", "node1", "node2", "transit"} {
			if rapid.IntRange(0, 3).Draw(t, "entry") > 0 {
				last := rapid.ByteRange(1, 4).Draw(t, "address")
				v.Entries[id][node] = model.Entry{
					Addr: netip.AddrFrom4([4]byte{10, 255, 15, last}), Number: rapid.Uint16Range(0, 4).Draw(t, "number"),
					VTEP: vtep(rapid.IntRange(0, 11).Draw(t, "its vtep")),
				}
			}
		}
		v.Entries[id]["node0"] = model.Entry{Addr: v.Entries[id]["node0"].Addr, Number: v.Entries[id]["node0"].Number, VTEP: v.Self.VTEP}
	}
	for _, id := range sortedKeys(v.Services) {
		s := v.Services[id]
		if rapid.IntRange(0, 3).Draw(t, "dnsrr") == 0 {
			s.VIPs = nil
		}
		for network := range v.Networks {
			s.Options = map[model.NetworkID]model.ServiceOptions{network: {
				Published: rapid.SampledFrom([]model.Published{"", "80/tcp", "80-85:8080-8085/tcp;53/udp"}).Draw(t, "published"),
				Bind:      rapid.SampledFrom([]model.Addrs{"", "192.0.2.1"}).Draw(t, "bind"),
				Allow:     rapid.SampledFrom([]model.Prefixes{"", "192.0.2.0/24"}).Draw(t, "allow"),
				Source:    rapid.SampledFrom([]model.Source{model.Keep, model.Masquerade}).Draw(t, "source"),
				Mode:      rapid.SampledFrom([]string{"", "dr", "nat", "tun"}).Draw(t, "mode"),
			}}
		}
		v.Services[id] = s
	}
	for _, e := range sorted(v.Endpoints) {
		e.Meshed = rapid.Bool().Draw(t, "meshed")
		v.Endpoints[e.ID] = e
	}
	for _, r := range sorted(v.Remotes) {
		r.Meshed = rapid.Bool().Draw(t, "meshed")
		if rapid.IntRange(0, 9).Draw(t, "an entry's address") == 0 {
			r.Addr = netip.AddrFrom4([4]byte{10, 255, 15, 1})
			r.MAC = model.MACFor(r.Addr)
		}
		v.Remotes[r.ID] = r
	}
}

func TestEveryObjectHasOnePlanner(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := views().Draw(t, "view")
		parts := []kernel.State{{}, {}, {}, {}}
		overlay.Plan(v, parts[0])
		service.Plan(v, ingress.Balanced(v), parts[1])
		ingress.Plan(v, parts[2])
		guard.Plan(v, parts[3])
		all := kernel.State{}
		for _, part := range parts {
			for k, val := range part {
				if _, both := all[k]; both {
					t.Fatalf("%s: two plan it", k)
				}
				all[k] = val
			}
		}
		if !maps.Equal(all, plan.Host(v)) {
			t.Fatal("the host's plan is not what its parts are")
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

// TestWhatATaskAnswersPasses: what a task's namespace translates for it to answer, its
// ports' guards let out; and nobody has another's address.
func TestWhatATaskAnswersPasses(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := views().Draw(t, "view")
		s := plan.Host(v)
		for id, e := range v.Endpoints {
			n, here := v.Networks[e.Network]
			if !here || e.Phase == model.Created {
				continue
			}
			ns, dev := overlay.NetnsName(n), overlay.HostEnd(id)
			if s[kernel.GuardTable{NS: ns}] == nil {
				t.Fatalf("%s: there is no guard", ns)
			}
			own, _ := s[kernel.GuardAddr{NS: ns, Dev: dev, IP: e.Addr}].(kernel.GuardAddrSpec)
			if own != (kernel.GuardAddrSpec{MAC: e.MAC}) {
				t.Fatalf("%s: its own address is let out as %q", dev, own)
			}
			for k, val := range s {
				switch k := k.(type) {
				case kernel.TaskVIP:
					if k.Sandbox == e.Sandbox && val.(kernel.TaskVIPSpec).Addr == e.Addr && s[kernel.GuardAddr{NS: ns, Dev: dev, IP: k.VIP}] == nil {
						t.Fatalf("%s: its answers do not pass %s", kernel.Line(k, val), dev)
					}
				case kernel.TaskMesh:
					if port, _ := s[kernel.GuardPort{NS: ns, Dev: dev}].(kernel.GuardPortSpec); k.Sandbox == e.Sandbox && k.Addr == e.Addr && !port.Aliases {
						t.Fatalf("%s: its answers do not pass %s", kernel.Line(k, val), dev)
					}
				case kernel.GuardAddr:
					if spec := val.(kernel.GuardAddrSpec); k.NS == ns && k.Dev == dev && !spec.VIP && k.IP != e.Addr {
						t.Fatalf("%s: it is not its address", kernel.Line(k, val))
					}
				}
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
			case ok && looser(g, w): // see kernel.TaskRouteSpec
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

// looser reports whether a route is what is wanted but for what it lets in.
func looser(have, want kernel.Value) bool {
	h, ok1 := have.(kernel.TaskRouteSpec)
	w, ok2 := want.(kernel.TaskRouteSpec)
	h.Loose = w.Loose
	return ok1 && ok2 && !w.Loose && h == w
}

func sorted[K ~string, V any](m map[K]V) []V {
	out := make([]V, 0, len(m))
	for _, k := range sortedKeys(m) {
		out = append(out, m[k])
	}
	return out
}

func sortedKeys[K ~string, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
