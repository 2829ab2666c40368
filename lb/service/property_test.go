package service_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/service"
)

// worlds draws views in which services, VIPs and addresses meet often.
func worlds() *rapid.Generator[model.View] {
	return rapid.Custom(func(t *rapid.T) model.View {
		w := newWorld()
		w.Self.Datapath = rapid.SampledFrom([]string{service.NFT, service.IPVS}).Draw(t, "datapath")
		if rapid.Bool().Draw(t, "second network") {
			w.network(net2, "10.255.0.0/20", "10.255.0.1")
		}
		w.ask(rapid.SampledFrom([]string{"auto", service.IPVS}).Draw(t, "asked for"))
		network := rapid.SampledFrom([]model.NetworkID{net1, net2})
		vip := rapid.SampledFrom([]netip.Addr{webVIP, dbVIP, {}})
		ip := rapid.Map(rapid.IntRange(2, 6), func(i int) netip.Addr { return addr(fmt.Sprintf("10.255.0.%d", i)) })
		options := rapid.Custom(func(t *rapid.T) model.ServiceOptions {
			return model.ServiceOptions{
				Scheduler: rapid.SampledFrom([]string{"", "rr", "wrr", "sh", "mh", "dh", "fo", "wlc"}).Draw(t, "scheduler"),
				Mode:      rapid.SampledFrom([]string{"", "dr", "nat", "tun"}).Draw(t, "mode"),
				Weight:    rapid.SampledFrom([]int{0, 1, 2, 3, 255, -7, 1 << 20}).Draw(t, "weight"),
				Ports:     rapid.SampledFrom([]model.Ports{"", "80/tcp", "53/udp;81:80/tcp"}).Draw(t, "ports"),
				Idle:      rapid.SampledFrom([]int{0, 60, 20000}).Draw(t, "idle"),
				Upper:     rapid.SampledFrom([]int{0, 0, 10}).Draw(t, "upper"),
			}
		})
		for _, id := range []model.ServiceID{web, db, "third"} {
			if v := vip.Draw(t, "vip"); rapid.Bool().Draw(t, "told") {
				s := w.told(id, nil)
				if n := network.Draw(t, "network"); v.IsValid() {
					s.VIPs = vipOn(n, v)
				}
				s.Options = map[model.NetworkID]model.ServiceOptions{net1: options.Draw(t, "options")}
				w.Services[id] = s
			}
		}
		for i := range rapid.IntRange(0, 8).Draw(t, "endpoints") {
			id := model.EndpointID(fmt.Sprintf("endpoint%04d", i))
			at := ip.Draw(t, "ip")
			mac := model.MACFor(at)
			if rapid.IntRange(0, 9).Draw(t, "mac") == 0 {
				mac = model.MAC{2, 0, 0, 0, 0, byte(i)}
			}
			task := model.Task{
				ID: model.TaskID("task-" + id), Service: rapid.SampledFrom([]model.ServiceID{web, db, "third", ""}).Draw(t, "service"),
				VIP: vip.Draw(t, "its vip"), Ready: rapid.IntRange(0, 3).Draw(t, "ready") > 0, Leaving: rapid.IntRange(0, 3).Draw(t, "leaving") == 0,
			}
			task.ServiceName = string(task.Service)
			prepared := vip.Draw(t, "prepared")
			if rapid.Bool().Draw(t, "here") {
				w.Endpoints[id] = model.Endpoint{
					ID: id, Network: network.Draw(t, "network"), Addr: at, MAC: mac, Phase: model.Phase(rapid.IntRange(0, 2).Draw(t, "phase")),
					Sandbox: rapid.SampledFrom([]string{"", "/run/x"}).Draw(t, "sandbox"), Options: options.Draw(t, "options"), Task: task, Prepared: prepared,
				}
				continue
			}
			w.Remotes[id] = model.Remote{
				ID: id, Network: network.Draw(t, "network"), Node: "node2", VTEP: addr(rapid.SampledFrom([]string{"192.168.0.1", "192.168.0.2"}).Draw(t, "vtep")),
				Addr: at, MAC: mac, Options: options.Draw(t, "options"), Task: task, Prepared: prepared,
			}
		}
		return w.View
	})
}

func TestBalancersAreWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := worlds().Draw(t, "view")
		s := planned(v)
		for range 4 { // maps are walked in another order each time
			if d := cmp.Diff(s.Text(), planned(v).Text()); d != "" {
				t.Fatalf("two plans of one view differ:\n%s", d)
			}
		}
		slots := map[kernel.VIP]int{}
		marks := map[string]map[uint32]kernel.Mark{}
		for k, val := range s {
			switch k := k.(type) {
			case kernel.Slot:
				at := kernel.VIP{NS: k.NS, IP: k.VIP}
				spec, ok := s[at].(kernel.VIPSpec)
				if !ok || k.Slot < 0 || k.Slot >= spec.Slots {
					t.Fatalf("%s: there is no such place in %v", kernel.Line(k, val), s[at])
				}
				slots[at]++
				mac := val.(kernel.SlotSpec).MAC
				if _, ok := s[kernel.Alive{NS: k.NS, VIP: k.VIP, MAC: mac}]; !ok {
					t.Fatalf("%s: its second packet would be dropped", kernel.Line(k, val))
				}
				if !slices.ContainsFunc(service.Virtuals(v), func(x service.Virtual) bool { return x.VIP == k.VIP && serves(v, x, mac) }) {
					t.Fatalf("%s: no backend that is ready and prepared has this MAC", kernel.Line(k, val))
				}
			case kernel.Other:
				if own := clientMAC(v, k); own == val.(kernel.OtherSpec).MAC {
					t.Fatalf("%s: it is its own other", kernel.Line(k, val))
				}
				if _, ok := s[kernel.Member{NS: k.NS, IP: k.Client}]; !ok && joined(v, k.NS, k.Client) {
					t.Fatalf("%s: it is no member", kernel.Line(k, val))
				}
			case kernel.Mark:
				fwm := val.(kernel.MarkSpec).Mark
				if marks[k.NS] == nil {
					marks[k.NS] = map[uint32]kernel.Mark{}
				}
				if o, twice := marks[k.NS][fwm]; twice || fwm == 0 {
					t.Fatalf("%s: the mark is none, or that of %s", kernel.Line(k, val), o)
				}
				marks[k.NS][fwm] = k
				takes := false
				for d, spec := range s {
					if d, ok := d.(kernel.IPVSDest); ok && d.NS == k.NS && d.Mark == fwm {
						weight, nat := spec.(kernel.IPVSDestSpec).Weight, spec.(kernel.IPVSDestSpec).Method == kernel.IPVSNAT
						takes = takes || weight > 0
						if k.Proto == model.UDP && weight == 0 && !nat {
							t.Fatalf("%s: %s keeps its flows, and others are there", kernel.Line(k, val), d)
						}
						if d.IP == k.Client {
							t.Fatalf("%s: it may be given itself", kernel.Line(k, val))
						}
					}
				}
				if !takes {
					t.Fatalf("%s: nobody takes its packets", kernel.Line(k, val))
				}
			case kernel.IPVSDest:
				if _, ok := s[kernel.IPVSService{NS: k.NS, Mark: k.Mark}]; !ok {
					t.Fatalf("%s: there is no service for it", kernel.Line(k, val))
				}
				_, back := s[kernel.LiftFrom{NS: k.NS, IP: k.IP}]
				if val.(kernel.IPVSDestSpec).Method == kernel.IPVSNAT && !back {
					t.Fatalf("%s: its answers are not lifted", kernel.Line(k, val))
				}
				if w := val.(kernel.IPVSDestSpec).Weight; w < 0 || w > 65535 {
					t.Fatalf("%s: no such weight", kernel.Line(k, val))
				}
			case kernel.Port:
				if spec, ok := s[kernel.VIP{NS: k.NS, IP: k.VIP}].(kernel.VIPSpec); !ok || !spec.Named {
					t.Fatalf("%s: %v has all ports", kernel.Line(k, val), spec)
				}
			case kernel.LiftFrom:
				if _, ok := s[kernel.LiftTable{NS: k.NS}]; !ok {
					t.Fatalf("%s: there is no table for it", kernel.Line(k, val))
				}
			case kernel.TaskPort:
				if _, ok := s[kernel.TaskVIP{Sandbox: k.Sandbox, VIP: k.VIP}]; !ok {
					t.Fatalf("%s: its VIP is not translated", kernel.Line(k, val))
				}
			case kernel.TaskVIP:
				if _, ok := s[kernel.TaskTable{Sandbox: k.Sandbox}]; !ok {
					t.Fatalf("%s: there is no table for it", kernel.Line(k, val))
				}
			case kernel.VIP:
				if _, ok := s[kernel.Addr{NS: k.NS, Dev: overlay.BridgeName, Prefix: netip.PrefixFrom(k.IP, 32)}]; !ok {
					t.Fatalf("%s: nobody answers ARP for it", kernel.Line(k, val))
				}
			}
		}
		for k, val := range s {
			if at, ok := k.(kernel.VIP); ok && slots[at] != val.(kernel.VIPSpec).Slots {
				t.Fatalf("%s: it has %d", kernel.Line(k, val), slots[at])
			}
		}
	})
}

// serves reports, from the view alone, whether a MAC is a backend's that may
// get connections to the VIP of x.
func serves(v model.View, x service.Virtual, mac model.MAC) bool {
	good := func(n model.NetworkID, m model.MAC, t model.Task, prepared netip.Addr) bool {
		nat := slices.ContainsFunc(x.Backends, func(b service.Backend) bool { return b.Task == t.ID && b.Mode == service.NAT })
		return n == x.Network && m == mac && t.Service == x.Service && t.Ready && !t.Leaving && (prepared == x.VIP || nat)
	}
	for _, e := range v.Endpoints {
		if good(e.Network, e.MAC, e.Task, e.Prepared) {
			return true
		}
	}
	for _, r := range v.Remotes {
		if good(r.Network, r.MAC, r.Task, r.Prepared) {
			return true
		}
	}
	return false
}

// clientMAC is the MAC of the ready backend of this node that an Other is for.
func clientMAC(v model.View, k kernel.Other) model.MAC {
	for _, x := range service.Virtuals(v) {
		for _, b := range x.Ready() {
			if b.Local && overlay.NetnsName(v.Networks[x.Network]) == k.NS && x.VIP == k.VIP && b.Addr == k.Client {
				return b.MAC
			}
		}
	}
	return model.MAC{}
}

func joined(v model.View, ns string, ip netip.Addr) bool {
	found := false
	for _, e := range v.Endpoints {
		if n, ok := v.Networks[e.Network]; ok && overlay.NetnsName(n) == ns && e.Addr == ip {
			if e.Phase == model.Created {
				return false // perhaps the one that has the address, of two
			}
			found = true
		}
	}
	return found
}

func TestSlotsGiveEachBackendItsShare(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		backends := some(rapid.SliceOfN(rapid.IntRange(1, 12), 0, 6).Draw(t, "weights")...)
		slots, _ := service.Slots(service.WRR, webVIP, backends)
		share := shares(backends, slots)
		for i := range backends {
			// share[i] / weight is the same for all.
			if share[i] == 0 || share[i]*backends[0].Weight != share[0]*backends[i].Weight {
				t.Fatalf("%v got %v places", backends, share)
			}
		}
	})
}

// some are backends at 10.255.0.2 and on, by weight.
func some(weights ...int) []service.Backend {
	out := make([]service.Backend, len(weights))
	for i, w := range weights {
		out[i] = service.Backend{Addr: netip.AddrFrom4([4]byte{10, 255, byte((i + 2) >> 8), byte(i + 2)}), Weight: w}
	}
	return out
}

func shares(backends []service.Backend, slots []int) []int {
	out := make([]int, len(backends))
	for _, b := range slots {
		out[b]++
	}
	return out
}

func TestSlots(t *testing.T) {
	for _, c := range []struct {
		scheduler string
		weights   []int
		want      []int
		hashed    bool
	}{
		{service.RR, nil, nil, false},
		{service.MH, nil, nil, false},
		{service.RR, []int{5, 1}, []int{0, 1}, false},
		{service.SH, []int{5, 1}, []int{0, 1}, true},
		{service.WRR, []int{7, 7, 7}, []int{0, 1, 2}, false},
		{service.WRR, []int{5, 1, 1}, []int{0, 0, 1, 0, 2, 0, 0}, false}, // nginx's own example
		{service.WRR, []int{200, 100}, []int{0, 1, 0}, false},
		{service.FO, []int{1, 3, 2}, []int{1}, false},
	} {
		t.Run(fmt.Sprint(c.scheduler, c.weights), func(t *testing.T) {
			if got, hashed := service.Slots(c.scheduler, webVIP, some(c.weights...)); !slices.Equal(got, c.want) || hashed != c.hashed {
				t.Errorf("got %v, %v; want %v, %v", got, hashed, c.want, c.hashed)
			}
		})
	}
}

// Maglev's two promises: even shares, and that the others stay when one goes.
func TestMaglev(t *testing.T) {
	for _, n := range []int{2, 3, 10, 40, 200} {
		weights := make([]int, n)
		for i := range weights {
			weights[i] = 1
		}
		backends := some(weights...)
		slots, hashed := service.Slots(service.MH, webVIP, backends)
		share := shares(backends, slots)
		if !hashed || slices.Max(share)-slices.Min(share) > 1 {
			t.Errorf("%d backends got %v of %d places", n, share, len(slots))
		}
		gone := n / 2
		left := slices.Delete(slices.Clone(backends), gone, gone+1)
		after, _ := service.Slots(service.MH, webVIP, left)
		moved := 0
		for i := range min(len(slots), len(after)) {
			if slots[i] != gone && backends[slots[i]].Addr != left[after[i]].Addr {
				moved++
			}
		}
		// The paper has a few per cent at 100 places for each backend; with a quarter
		// of that, up to an eighth. A hash without the table moves all but 1/n.
		if len(after) == len(slots) && moved > len(slots)/8 {
			t.Errorf("%d of %d places of others moved when one of %d backends went", moved, len(slots), n)
		}
	}
	heavy := some(3, 1)
	slots, _ := service.Slots(service.MH, webVIP, heavy)
	if share := shares(heavy, slots); share[0] < 3*share[1]-3 || share[0] > 3*share[1]+3 {
		t.Errorf("weights 3 and 1 got %v", share)
	}
}

// dh keeps its backend while others come and go.
func TestDestinationHash(t *testing.T) {
	all := some(1, 1, 1, 1, 1)
	first, _ := service.Slots(service.DH, webVIP, all)
	chosen := map[int]bool{}
	for i := range 20 {
		s, _ := service.Slots(service.DH, netip.AddrFrom4([4]byte{10, 255, 9, byte(i)}), all)
		chosen[s[0]] = true
	}
	if len(first) != 1 || len(chosen) < 3 {
		t.Errorf("places %v; 20 VIPs chose of five backends %v", first, chosen)
	}
	for i := range all {
		if i == first[0] {
			continue
		}
		left := slices.Delete(slices.Clone(all), i, i+1)
		if s, _ := service.Slots(service.DH, webVIP, left); left[s[0]].Addr != all[first[0]].Addr {
			t.Errorf("without backend %d it is another", i)
		}
	}
}

// With fo and dh, nodes of both kinds send everybody to the same backend, also of
// several with one weight.
func TestOneBackendForAllNodes(t *testing.T) {
	for _, scheduler := range []string{service.FO, service.DH} {
		for last := range 8 {
			w := newWorld()
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: scheduler}}
			w.Services[web] = s
			for i := range 3 + last {
				w.there(model.EndpointID(fmt.Sprint("e", i)), web, webVIP, fmt.Sprintf("10.255.1.%d", 10+i))
			}
			nft, ipvs, most := model.MAC{}, netip.Addr{}, 0
			for k, v := range planned(w.View) {
				if _, ok := k.(kernel.Slot); ok {
					nft = v.(kernel.SlotSpec).MAC
				}
			}
			w.Self.Datapath = service.IPVS
			for k, v := range planned(w.View) {
				if d, ok := k.(kernel.IPVSDest); ok && v.(kernel.IPVSDestSpec).Weight > most {
					ipvs, most = d.IP, v.(kernel.IPVSDestSpec).Weight
				}
			}
			if nft.IsZero() || model.MACFor(ipvs) != nft {
				t.Errorf("%s of %d: nftables has %s, ip_vs %s", scheduler, 3+last, nft, ipvs)
			}
		}
	}
}

// sh has 256 places and gives them out by weight: all backends must get some.
func TestSourceHashLeavesNobodyOut(t *testing.T) {
	for _, weights := range [][]int{{200, 200, 200}, {255, 1, 1}, {255, 254, 253}} {
		w := newWorld()
		s := w.told(web, vipOn(net1, webVIP))
		s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: service.SH}}
		w.Services[web] = s
		w.Self.Datapath = service.IPVS
		for i, n := range weights {
			w.there(model.EndpointID(fmt.Sprint("e", i)), web, webVIP, fmt.Sprintf("10.255.1.%d", 10+i), func(r *model.Remote) { r.Options.Weight = n })
		}
		sum, least := 0, 256
		for _, v := range planned(w.View) {
			if d, ok := v.(kernel.IPVSDestSpec); ok {
				sum, least = sum+d.Weight, min(least, d.Weight)
			}
		}
		if least < 1 || sum > 256+len(weights) {
			t.Errorf("%v: the least has %d of %d", weights, least, sum)
		}
	}
}

// What a task was started with holds for it while an update gives others another.
func TestAnUpdateLeavesTheOldTasksAlone(t *testing.T) {
	w := newWorld()
	s := w.told(web, vipOn(net1, webVIP))
	s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Mode: "tun", Ports: "80:9090/tcp"}}
	w.Services[web] = s
	w.here("e1", web, webVIP, "10.255.0.2", func(e *model.Endpoint) { e.Options = model.ServiceOptions{Mode: "nat", Ports: "80:8080/tcp"} })
	w.there("e4", web, webVIP, "10.255.0.5") // the network's mode, whatever the service asks for by now
	w.there("e2", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Options = model.ServiceOptions{Mode: "tun"}; r.Tunnel = true })
	w.there("e3", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Options = s.Options[net1] })
	w.Self.Datapath = service.IPVS
	st := planned(w.View)
	to := kernel.TaskPort{Sandbox: w.Endpoints["e1"].Sandbox, VIP: webVIP, Proto: model.TCP, Port: 80}
	if spec, _ := st[to].(kernel.TaskPortSpec); spec.To != 8080 {
		t.Errorf("the old task gets port %d", spec.To)
	}
	methods := map[netip.Addr]string{}
	for k, v := range st {
		if d, ok := k.(kernel.IPVSDest); ok {
			methods[d.IP] = fmt.Sprint(v.(kernel.IPVSDestSpec).Method, d.Port)
		}
	}
	want := map[netip.Addr]string{addr("10.255.0.2"): "nat8080", addr("10.255.0.3"): "tun0", addr("10.255.0.4"): "dr0", addr("10.255.0.5"): "dr0"}
	if d := cmp.Diff(want, methods, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("want (-) and got (+) differ:\n%s", d)
	}
	if st[kernel.LiftFrom{NS: "sluice-webnetwork00", IP: addr("10.255.0.2")}] == nil {
		t.Error("answers of the old task are not lifted")
	}
}
