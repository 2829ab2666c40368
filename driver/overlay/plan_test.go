package overlay_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sluice/driver/overlay"
	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// Ids as the engine makes them, recognisable by their beginning.
const (
	web   model.NetworkID  = "webnetwork00000000000000a"
	db    model.NetworkID  = "dbnetwork000000000000000b"
	epA   model.EndpointID = "aaaaaaaaaaaa1111111111111111111111111111111111111111111111111111"
	epB   model.EndpointID = "bbbbbbbbbbbb2222222222222222222222222222222222222222222222222222"
	epC   model.EndpointID = "cccccccccccc3333333333333333333333333333333333333333333333333333"
	epD   model.EndpointID = "dddddddddddd4444444444444444444444444444444444444444444444444444"
	local model.NetworkID  = "10ca1000000000000000000000000000000000000000000000000000000000ff"
)

func network(id model.NetworkID, subnet, gateway string, vni model.VNI) model.Network {
	return model.Network{ID: id, Subnet: netip.MustParsePrefix(subnet), Gateway: addr(gateway), VNI: vni, MTU: 1450}
}

func endpoint(id model.EndpointID, n model.NetworkID, ip string, p model.Phase) model.Endpoint {
	return model.Endpoint{ID: id, Network: n, Addr: addr(ip), MAC: model.MACFor(addr(ip)), Phase: p}
}

func remote(id model.EndpointID, n model.NetworkID, node model.NodeID, vtep, ip string) model.Remote {
	return model.Remote{ID: id, Network: n, Node: node, VTEP: addr(vtep), Addr: addr(ip), MAC: model.MACFor(addr(ip)), Task: model.Task{Ready: true}}
}

// view is what node 192.168.0.1 sees.
func view(ns []model.Network, es []model.Endpoint, rs []model.Remote) model.View {
	v := model.View{
		Self:      model.Self{Node: "node1", VTEP: addr("192.168.0.1"), VXLANPort: 4799},
		Networks:  map[model.NetworkID]model.Network{},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Remotes:   map[model.EndpointID]model.Remote{},
	}
	for _, n := range ns {
		v.Networks[n.ID] = n
	}
	for _, e := range es {
		v.Endpoints[e.ID] = e
	}
	for _, r := range rs {
		v.Remotes[r.ID] = r
	}
	return v
}

func planned(v model.View) kernel.State {
	s := kernel.State{}
	overlay.Plan(v, s)
	return s
}

func TestPlans(t *testing.T) {
	webNet, dbNet := network(web, "10.255.0.0/20", "10.255.0.1", 1<<20+1), network(db, "10.255.16.0/20", "10.255.16.1", 1<<20+2)
	localNet := network(local, "172.30.0.0/24", "172.30.0.1", 0)
	localNet.Local, localNet.MTU = true, 1500
	noVTEP := view([]model.Network{webNet}, []model.Endpoint{endpoint(epA, web, "10.255.0.2", model.Joined)}, nil)
	noVTEP.Self.VTEP = netip.Addr{}

	stale := remote(epC, web, "node3", "192.168.0.3", "10.255.0.3")
	stale.Task.Ready = false
	chosen := remote(epD, web, "node3", "192.168.0.3", "10.255.0.9")
	chosen.MAC = model.MACFor(addr("10.255.0.3"))

	for _, c := range []struct {
		name string
		view model.View
	}{
		{"nothing", view(nil, nil, nil)},
		{"two-nodes", view([]model.Network{webNet},
			[]model.Endpoint{endpoint(epA, web, "10.255.0.2", model.Taken)},
			[]model.Remote{remote(epB, web, "node2", "192.168.0.2", "10.255.0.3")})},
		{"phases", view([]model.Network{webNet}, []model.Endpoint{
			endpoint(epA, web, "10.255.0.2", model.Created),
			endpoint(epB, web, "10.255.0.3", model.Joined),
			endpoint(epC, web, "10.255.0.4", model.Taken),
		}, nil)},
		{"local-network", view([]model.Network{localNet}, []model.Endpoint{endpoint(epA, local, "172.30.0.2", model.Joined)}, nil)},
		{"no-data-path-address-yet", noVTEP},
		{"two-networks", view([]model.Network{webNet, dbNet},
			[]model.Endpoint{endpoint(epA, web, "10.255.0.2", model.Taken), endpoint(epB, db, "10.255.16.2", model.Taken)},
			[]model.Remote{remote(epC, web, "node2", "192.168.0.2", "10.255.0.3"), remote(epD, db, "node3", "192.168.0.3", "10.255.16.3")})},
		// Node 2 has the address now; node 3 has not yet heard that its task is gone.
		{"an-address-moves-between-others", view([]model.Network{webNet}, nil,
			[]model.Remote{stale, remote(epD, web, "node2", "192.168.0.2", "10.255.0.3")})},
		{"an-address-moves-here", view([]model.Network{webNet},
			[]model.Endpoint{endpoint(epA, web, "10.255.0.3", model.Joined)},
			[]model.Remote{remote(epB, web, "node2", "192.168.0.2", "10.255.0.3")})},
		{"one-mac-twice", view([]model.Network{webNet}, nil,
			[]model.Remote{remote(epB, web, "node2", "192.168.0.2", "10.255.0.3"), chosen})},
		// Of other nodes, what a node has claimed: like an endpoint. n3 has the address
		// of n2, n4 that of an endpoint, n5 that of the gateway: they are let in only.
		{"entries", func() model.View {
			v := view([]model.Network{webNet}, []model.Endpoint{endpoint(epA, web, "10.255.0.2", model.Taken)},
				[]model.Remote{remote(epB, web, "n4", "192.168.0.4", "10.255.15.4")})
			at := func(ip, vtep string) model.Entry { return model.Entry{Addr: addr(ip), Number: 1, VTEP: addr(vtep)} }
			v.Entries = map[model.NetworkID]map[model.NodeID]model.Entry{
				web: {
					"node1": at("10.255.15.1", "192.168.0.1"), "n2": at("10.255.15.2", "192.168.0.2"), "n3": at("10.255.15.2", "192.168.0.3"),
					"n4": at("10.255.15.4", "192.168.0.4"), "n5": at("10.255.0.1", "192.168.0.5"), "untold": {Addr: addr("10.255.15.6"), Number: 6},
				},
				db: {"n2": at("10.255.31.2", "192.168.0.9")},
			}
			return v
		}()},
		// A network that is not here, and this host under its former name.
		{"not-for-this-node", view([]model.Network{webNet}, nil,
			[]model.Remote{remote(epB, db, "node2", "192.168.0.2", "10.255.16.3"), remote(epC, web, "node1-before", "192.168.0.1", "10.255.0.3")})},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := planned(c.view).Text()
			golden.Check(t, c.name, text)
			for range 8 { // maps are walked in another order each time
				if again := planned(c.view).Text(); again != text {
					t.Fatalf("and then:\n%s", again)
				}
			}
		})
	}
}

// views draws views in which addresses, MACs and nodes meet often.
func views() *rapid.Generator[model.View] {
	return rapid.Custom(func(t *rapid.T) model.View {
		nets := []model.Network{network(web, "10.255.0.0/20", "10.255.0.1", 7), network(db, "10.255.16.0/20", "10.255.16.1", 8), network(local, "172.30.0.0/24", "172.30.0.1", 0)}
		nets[2].Local = true
		pick := func() (model.NetworkID, netip.Addr, model.MAC) {
			n := rapid.SampledFrom([]model.NetworkID{web, db, local, "elsewhere"}).Draw(t, "network")
			ip := rapid.SampledFrom([]string{"10.255.0.2", "10.255.0.3", "10.255.0.4"}).Draw(t, "ip")
			mac := rapid.SampledFrom([]string{ip, "10.255.0.2"}).Draw(t, "mac")
			return n, addr(ip), model.MACFor(addr(mac))
		}
		var es []model.Endpoint
		var rs []model.Remote
		for i, id := range []model.EndpointID{epA, epB, epC, epD, "e5", "e6"} {
			n, ip, mac := pick()
			ready := rapid.Bool().Draw(t, "ready")
			switch rapid.IntRange(0, 2).Draw(t, "where") {
			case 0:
				es = append(es, model.Endpoint{ID: id, Network: n, Addr: ip, MAC: mac, Phase: model.Phase(i % 3), Task: model.Task{Ready: ready}})
			case 1:
				vtep := rapid.SampledFrom([]string{"192.168.0.1", "192.168.0.2", "192.168.0.3"}).Draw(t, "vtep")
				rs = append(rs, model.Remote{ID: id, Network: n, VTEP: addr(vtep), Addr: ip, MAC: mac, Task: model.Task{Ready: ready}})
			}
		}
		v := view(nets[:rapid.IntRange(0, 3).Draw(t, "networks")], es, rs)
		v.Entries = map[model.NetworkID]map[model.NodeID]model.Entry{}
		for _, id := range []model.NetworkID{web, db, local} {
			v.Entries[id] = map[model.NodeID]model.Entry{}
			for _, node := range []model.NodeID{"n0", "node1", "node2"} {
				if rapid.Bool().Draw(t, "entry") {
					v.Entries[id][node] = model.Entry{
						Addr:   addr(rapid.SampledFrom([]string{"10.255.0.2", "10.255.0.4", "10.255.15.2"}).Draw(t, "its address")),
						Number: 1, VTEP: addr(rapid.SampledFrom([]string{"192.168.0.1", "192.168.0.2"}).Draw(t, "its vtep")),
					}
				}
			}
		}
		if rapid.Bool().Draw(t, "no vtep") {
			v.Self.VTEP = netip.Addr{}
		}
		return v
	})
}

// TestATunnelChangesNoMTU: a task must be able to take the full outer packet.
func TestATunnelChangesNoMTU(t *testing.T) {
	e := endpoint(epA, web, "10.255.0.2", model.Joined)
	e.Options.Mode = "tun"
	dr := network(web, "10.255.0.0/20", "10.255.0.1", 7)
	tun := dr
	dr.Options.Mode, tun.Options.Mode = "dr", "tun"
	es := []model.Endpoint{e}
	if d := cmp.Diff(planned(view([]model.Network{dr}, es, nil)).Text(), planned(view([]model.Network{tun}, es, nil)).Text()); d != "" {
		t.Errorf("dr (-) and tun (+):\n%s", d)
	}
}

func TestEveryAddressHasOneWay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := views().Draw(t, "view")
		s := planned(v)
		// Maps are walked in another order each time.
		for range 4 {
			if d := cmp.Diff(s.Text(), planned(v).Text()); d != "" {
				t.Fatalf("two plans of one view differ:\n%s", d)
			}
		}
		own := func(ns string, ip netip.Addr, mac model.MAC) bool {
			for _, e := range v.Endpoints {
				if n, here := v.Networks[e.Network]; here && overlay.NetnsName(n) == ns && (e.Addr == ip || e.MAC == mac) {
					return true
				}
			}
			return false
		}
		for k, val := range s {
			switch k := k.(type) {
			case kernel.Neigh:
				mac := val.(kernel.NeighSpec).MAC
				if _, ok := s[kernel.FDB{NS: k.NS, Dev: overlay.VXLANName, MAC: mac}]; !ok {
					t.Fatalf("%s: its MAC leads nowhere", kernel.Line(k, val))
				}
				if own(k.NS, k.IP, mac) {
					t.Fatalf("%s: it is an endpoint of this node", kernel.Line(k, val))
				}
			case kernel.FDB:
				vtep := val.(kernel.FDBSpec).VTEP
				if _, ok := s[kernel.FilterPeer{VTEP: vtep}]; !ok || vtep == v.Self.VTEP {
					t.Fatalf("%s: its packets would not be let in", kernel.Line(k, val))
				}
				if _, ok := s[kernel.Link{NS: k.NS, Name: k.Dev, Kind: kernel.VXLAN}]; !ok {
					t.Fatalf("%s: there is no such device", kernel.Line(k, val))
				}
			case kernel.Link:
				if len(k.Name) > 15 || len(val.(kernel.LinkSpec).Peer) > 15 {
					t.Fatalf("%s: the kernel takes 15 characters", kernel.Line(k, val))
				}
			}
		}
	})
}
