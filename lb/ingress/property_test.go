package ingress_test

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
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// worlds draws views in which claims, services and addresses meet often.
func worlds() *rapid.Generator[model.View] {
	return rapid.Custom(func(t *rapid.T) model.View {
		w := newWorld()
		w.Self.Datapath = rapid.SampledFrom([]string{service.NFT, service.IPVS}).Draw(t, "datapath")
		w.network(net2, rapid.SampledFrom([]string{"10.255.0.0/20", "10.0.0.0/8", "192.168.0.0/26"}).Draw(t, "second subnet"), "10.255.0.1")
		networks := []model.NetworkID{net1, net2}
		for _, id := range networks {
			w.mode(id, rapid.SampledFrom([]string{"dr", "nat", "tun"}).Draw(t, "mode"))
			for _, node := range []model.NodeID{"node4", "node1", "node2", "node3"} {
				if rapid.IntRange(0, 3).Draw(t, "entry") == 0 {
					continue
				}
				ip := rapid.SampledFrom([]string{"10.255.15.1", "10.255.15.2", "10.255.15.3", "10.255.0.1", "10.250.0.1"}).Draw(t, "its address")
				w.entry(id, node, ip, rapid.Uint16Range(0, 4).Draw(t, "number"), "192.168.0."+string(node[4:]))
			}
		}
		vip := rapid.SampledFrom([]netip.Addr{webVIP, dbVIP, addr("10.255.16.10"), {}})
		for _, id := range []model.ServiceID{web, db, "third"} {
			for _, n := range networks {
				if rapid.Bool().Draw(t, "told") {
					w.publish(id, n, vip.Draw(t, "vip"), model.ServiceOptions{
						Published: rapid.SampledFrom([]model.Published{"", "80/tcp", "79-82:179-182/tcp;53/udp", "79-82/tcp;52-53/udp", "53:1053/udp"}).Draw(t, "published"),
						Nodes:     rapid.SampledFrom([]model.Labels{"", "", "zone=a", "zone=b"}).Draw(t, "nodes"),
						Bind:      rapid.SampledFrom([]model.Addrs{"", "192.0.2.1"}).Draw(t, "bind"),
						Allow:     rapid.SampledFrom([]model.Prefixes{"", "192.0.2.0/24", "what?"}).Draw(t, "allow"),
						Source:    rapid.SampledFrom([]model.Source{model.Keep, model.Masquerade}).Draw(t, "source"),
						Ports:     rapid.SampledFrom([]model.Ports{"", "80:8080/tcp"}).Draw(t, "ports"),
						Scheduler: rapid.SampledFrom([]string{"", "wrr", "sh", "mh", "dh", "wlc"}).Draw(t, "scheduler"),
					})
				}
			}
		}
		if rapid.Bool().Draw(t, "taken") {
			w.Taken[model.HostPort{Proto: model.TCP, Port: 80}] = "nginx (pid 7)"
		}
		for i := range rapid.IntRange(0, 8).Draw(t, "endpoints") {
			id := model.EndpointID(fmt.Sprintf("endpoint%04d", i))
			s := rapid.SampledFrom([]model.ServiceID{web, db, "third", ""}).Draw(t, "service")
			n, ip := rapid.SampledFrom(networks).Draw(t, "network"), fmt.Sprintf("10.255.0.%d", rapid.IntRange(2, 6).Draw(t, "ip"))
			state := func(task *model.Task, meshed *bool) {
				task.Ready, task.Leaving = rapid.IntRange(0, 3).Draw(t, "ready") > 0, rapid.IntRange(0, 3).Draw(t, "leaving") == 0
				*meshed = rapid.Bool().Draw(t, "meshed")
			}
			if rapid.Bool().Draw(t, "here") {
				w.here(id, s, n, vip.Draw(t, "its vip"), ip, func(e *model.Endpoint) {
					state(&e.Task, &e.Meshed)
					e.Phase = model.Phase(rapid.IntRange(0, 2).Draw(t, "phase"))
					e.Sandbox = rapid.SampledFrom([]string{"", "/run/x", "/run/y"}).Draw(t, "sandbox")
				})
				continue
			}
			w.there(id, s, n, vip.Draw(t, "its vip"), ip, func(r *model.Remote) { state(&r.Task, &r.Meshed) })
		}
		return w.View
	})
}

// TestTheMeshIsWhole: whatever the view, a published port has all that stands
// behind it, and nothing is there that must not be.
func TestTheMeshIsWhole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := worlds().Draw(t, "view")
		s := planned(v)
		for range 4 { // maps are walked in another order each time
			if d := cmp.Diff(s.Text(), planned(v).Text()); d != "" {
				t.Fatalf("two plans of one view differ:\n%s", d)
			}
		}
		need := func(of kernel.Key, ks ...kernel.Key) {
			for _, k := range ks {
				if _, ok := s[k]; !ok {
					t.Fatalf("%s: there is no %s", kernel.Line(of, s[of]), k)
				}
			}
		}
		aliases := make(map[netip.Addr]service.Alias)
		for _, a := range ingress.Balanced(v) {
			if o, twice := aliases[a.Addr]; twice {
				t.Fatalf("%v and %v", a, o)
			}
			aliases[a.Addr] = a
		}
		udp := make(map[string]int)
		for k, val := range s {
			switch k := k.(type) {
			case kernel.MeshPort, kernel.MeshRange:
				var alias netip.Addr
				switch spec := val.(type) {
				case kernel.MeshPortSpec:
					alias = spec.Alias
				case kernel.MeshRangeSpec:
					alias = spec.Alias
				}
				a, ok := aliases[alias]
				if !ok {
					t.Fatalf("%s: nobody balances it", kernel.Line(k, val))
				}
				n := v.Networks[a.Network]
				own := v.Entries[a.Network][v.Self.Node]
				block := ingress.Block(ingress.DefaultPool(), own.Number)
				ns, end := overlay.NetnsName(n), overlay.MeshEnd(n)
				need(k, kernel.Forward{}, kernel.MeshTable{}, kernel.MeshNet{Dev: end},
					kernel.Link{NS: ns, Name: overlay.MeshName, Kind: kernel.Veth}, kernel.Route{Dev: end, Prefix: block},
					kernel.Route{NS: ns, Dev: overlay.BridgeName, Prefix: block}, kernel.BackTable{NS: ns}, kernel.Back{NS: ns, Block: block.Addr()},
					kernel.Neigh{NS: ns, Dev: overlay.BridgeName, IP: own.Addr}, kernel.Addr{Dev: end, Prefix: netip.PrefixFrom(own.Addr, 32)})
				if !block.Contains(alias) {
					t.Fatalf("%s: it is not of %s", kernel.Line(k, val), block)
				}
				if o := v.Services[a.Service].Options[a.Network]; o.Allow != "" {
					need(k, kernel.MeshAllow{Alias: alias})
				}
			case kernel.Back:
				need(k, kernel.BackTable{NS: k.NS})
			case kernel.VIP:
				if spec := val.(kernel.VIPSpec); aliases[k.IP].Service != "" && (spec.NAT || spec.Named) {
					t.Fatalf("%s: its packets have a port already, and keep their address", kernel.Line(k, val))
				}
			case kernel.Slot:
				if a := aliases[k.VIP]; a.Service != "" && !meshed(v, a, val.(kernel.SlotSpec).MAC) {
					t.Fatalf("%s: no task that takes it has this MAC", kernel.Line(k, val))
				}
			case kernel.Mark:
				if a := aliases[k.VIP]; a.Service != "" {
					for d, spec := range s {
						if d, ok := d.(kernel.IPVSDest); ok && d.NS == k.NS && d.Mark == val.(kernel.MarkSpec).Mark {
							if spec := spec.(kernel.IPVSDestSpec); spec.Method != kernel.IPVSDR || spec.Weight > 0 && !meshed(v, a, model.MACFor(d.IP)) {
								t.Fatalf("%s: leads to %s", kernel.Line(k, val), kernel.Line(d, spec))
							}
						}
					}
				}
			case kernel.Addr:
				if aliases[k.Prefix.Addr()].Service != "" {
					t.Fatalf("%s: it is an alias", k)
				}
			case kernel.TaskMesh:
				need(k, kernel.TaskTable{Sandbox: k.Sandbox})
				route, _ := s[kernel.TaskRoute(k)].(kernel.TaskRouteSpec)
				if spec := val.(kernel.TaskMeshSpec); spec.UDP != route.Loose {
					t.Fatalf("%s: and its route is %s", kernel.Line(k, val), route)
				} else if spec.UDP {
					udp[k.Sandbox]++
				}
			case kernel.TaskRoute:
				need(k, kernel.TaskMesh(k))
			}
		}
		for sandbox, n := range udp {
			if n > 1 {
				t.Fatalf("%s has UDP on %d networks", sandbox, n)
			}
		}
		holds, numbers := make(map[model.NetworkID]bool), make(map[uint16]bool)
		for _, id := range ingress.Entered(v) {
			if e, ok := ingress.Claimed(v, id)[v.Self.Node]; ok && !numbers[e.Number] {
				holds[id], numbers[e.Number] = true, true
			}
		}
		led := make(map[model.HostPort]bool) // the ports that lead somewhere
		for k := range s {
			switch k := k.(type) {
			case kernel.MeshPort:
				led[model.HostPort{Proto: k.Proto, Addr: k.Bind, Port: k.Port}] = true
			case kernel.MeshRange:
				for port := k.Lo; port <= k.Hi; port++ {
					p := model.HostPort{Proto: k.Proto, Port: port}
					if led[p] {
						t.Fatalf("%s: %s leads elsewhere too", k, p)
					}
					led[p] = true
				}
			}
		}
		won, _ := ingress.Own(ingress.Wants(v), v.Taken)
		for _, p := range ingress.HostPorts(won) {
			i := slices.IndexFunc(won, func(w ingress.Port) bool {
				return w.Proto == p.Proto && w.Addr == p.Addr && w.Lo <= p.Port && p.Port <= w.Hi
			})
			if there := led[p]; there != holds[won[i].Network] {
				t.Fatalf("port %s leads into the network: %t, and the claim holds: %t", p, there, !there)
			}
		}
	})
}

// meshed reports, from the view alone, whether a MAC is of a task that may get
// connections to an alias.
func meshed(v model.View, a service.Alias, mac model.MAC) bool {
	good := func(n model.NetworkID, m model.MAC, t model.Task, meshed bool) bool {
		return n == a.Network && m == mac && t.Service == a.Service && t.Ready && !t.Leaving && meshed
	}
	for _, e := range v.Endpoints {
		if good(e.Network, e.MAC, e.Task, e.Meshed) {
			return true
		}
	}
	for _, r := range v.Remotes {
		if good(r.Network, r.MAC, r.Task, r.Meshed) {
			return true
		}
	}
	return false
}
