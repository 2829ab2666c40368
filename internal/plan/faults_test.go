package plan_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"sluice/internal/kernel"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/model"
	"sluice/internal/plan"
)

// TestLeavingOneOfTwoNetworksTakesItsTranslationOnly: the endpoints of a task on
// two networks share a namespace and the table in it.
func TestLeavingOneOfTwoNetworksTakesItsTranslationOnly(t *testing.T) {
	const path = "/run/docker/netns/fa2eb53e4edc"
	const service model.ServiceID = "service"
	v := model.View{
		Self:      model.Self{Node: "node", VTEP: netip.MustParseAddr("192.168.0.1"), VXLANPort: 4799},
		Networks:  map[model.NetworkID]model.Network{},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Services:  map[model.ServiceID]model.Service{service: {ID: service, VIPs: map[model.NetworkID]netip.Addr{}}},
	}
	for i, id := range []string{"first00000000", "second0000000"} {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i + 1), 0, 0}), 24)
		n := model.NetworkID(id)
		gateway := subnet.Addr().Next()
		ip := gateway.Next()
		vip := ip.Next()
		v.Networks[n] = model.Network{ID: n, Subnet: subnet, Gateway: gateway, VNI: model.VNI(i + 1), MTU: 1450, Options: model.NetworkOptions{Scheduler: "rr"}}
		v.Services[service].VIPs[n] = vip
		v.Endpoints[model.EndpointID(id)] = model.Endpoint{
			ID: model.EndpointID(id), Network: n, Addr: ip, MAC: model.MACFor(ip), Phase: model.Taken, Sandbox: path,
			Task: model.Task{ID: "task", Service: service, VIP: vip, Ready: true}, Prepared: vip,
		}
	}
	fake := kerneltest.NewFake()
	fake.AddSandbox(path)
	tasks := func() (changes, found []string) {
		t.Helper()
		have, err := fake.Dump(t.Context(), []string{path})
		if err != nil {
			t.Fatal(err)
		}
		ops := kernel.Diff(have, plan.Host(v))
		if err := errors.Join(fake.Apply(t.Context(), ops)...); err != nil {
			t.Fatal(err)
		}
		for _, o := range ops {
			if o.Key.Phase() == kernel.PhaseTask {
				changes = append(changes, o.String())
			}
		}
		have = fake.State()
		for _, k := range have.Keys() {
			if k.Phase() == kernel.PhaseTask {
				found = append(found, kernel.Line(k, have[k]))
			}
		}
		return changes, found
	}
	_, found := tasks()
	if want := []string{
		"translate task fa2eb53e4edc",
		"translate task fa2eb53e4edc vip 10.1.0.3 to 10.1.0.2 loop",
		"translate task fa2eb53e4edc vip 10.2.0.3 to 10.2.0.2 loop",
	}; !slices.Equal(found, want) {
		t.Fatalf("on both networks: got %q, want %q", found, want)
	}
	delete(v.Endpoints, "first00000000")
	changes, _ := tasks()
	if want := []string{"- translate task fa2eb53e4edc vip 10.1.0.3 to 10.1.0.2 loop"}; !slices.Equal(changes, want) {
		t.Errorf("after leaving the first: got %q, want %q", changes, want)
	}
	if changes, _ := tasks(); len(changes) > 0 {
		t.Errorf("and then: %q", changes)
	}
}

// TestWhenFaultsStopTheKernelIsAsPlanned drives a strict kernel that fails at
// random from view to view, and reads it back each time, as the loop does.
func TestWhenFaultsStopTheKernelIsAsPlanned(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fake := kerneltest.NewFake()
		round := func(want kernel.State, sandboxes []string) int {
			have, err := fake.Dump(t.Context(), sandboxes)
			if err != nil {
				return 1
			}
			ops := kernel.Diff(have, want)
			fake.Apply(t.Context(), ops)
			return len(ops)
		}
		for range rapid.IntRange(1, 4).Draw(t, "views") {
			v := views().Draw(t, "view")
			var sandboxes []string
			for _, e := range v.Endpoints {
				if e.Phase == model.Taken {
					sandboxes = append(sandboxes, e.Sandbox)
				}
				fake.AddSandbox(e.Sandbox)
			}
			want := plan.Host(v)
			fake.Faults(rapid.Uint64().Draw(t, "seed"), 0.2)
			for range rapid.IntRange(0, 4).Draw(t, "rounds") {
				round(want, sandboxes)
			}
			fake.Faults(0, 0)
			// One round makes what is missing, one more what the first could not see
			// behind a half-done change.
			left := 1
			for i := 0; i < 3 && left > 0; i++ {
				left = round(want, sandboxes)
			}
			if left > 0 {
				have, err := fake.Dump(t.Context(), sandboxes)
				t.Fatalf("still to do: %v, %v", kernel.Diff(have, want), err)
			}
		}
	})
}
