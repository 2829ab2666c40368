package arch

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/lb/service"
)

// packetPaths are the machine texts of docs/packet-paths.md: the plans of two
// nodes, by phase, and what two events change in them.
func packetPaths() map[string]func() string {
	nodes := example(nil)
	one, two := plan.Host(nodes[0]), plan.Host(nodes[1])
	phases := func(s kernel.State, of ...kernel.Phase) func() string {
		return func() string {
			some := make(kernel.State)
			for k, v := range s {
				if slices.Contains(of, k.Phase()) {
					some[k] = v
				}
			}
			return fence(some.Text())
		}
	}
	// balances is the part of a state that balances in a network's namespace.
	balances := func(s kernel.State) func() string {
		some := maps.Clone(s)
		maps.DeleteFunc(some, func(k kernel.Key, _ kernel.Value) bool { return isGuard(k) })
		return phases(some, kernel.PhaseVIP)
	}
	guard := maps.Clone(one)
	maps.DeleteFunc(guard, func(k kernel.Key, _ kernel.Value) bool { return !isGuard(k) })
	after := func(edit func(task string, t *model.Task)) func() string {
		return func() string {
			var b strings.Builder
			for _, o := range kernel.Diff(one, plan.Host(example(edit)[0])) {
				b.WriteString(o.String() + "\n")
			}
			return fence(b.String())
		}
	}
	// asks is a node where the service asks for opts.
	asks := func(v model.View, datapath string, opts model.ServiceOptions) model.View {
		v.Self.Datapath = datapath
		for id, s := range v.Services {
			s.Options = make(map[model.NetworkID]model.ServiceOptions)
			for network := range s.VIPs {
				s.Options[network] = opts
			}
			v.Services[id] = s
		}
		for id, e := range v.Endpoints {
			e.Options = opts
			v.Endpoints[id] = e
		}
		for id, r := range v.Remotes {
			r.Options = opts
			v.Remotes[id] = r
		}
		return v
	}
	asked := func(opts model.ServiceOptions) kernel.State {
		return plan.Host(asks(example(nil)[0], service.IPVS, opts))
	}
	// publishes is what node 1 has more where the service publishes a port.
	publishes := func(datapath string) kernel.State {
		v := example(nil)[0]
		before := plan.Host(asks(v, datapath, model.ServiceOptions{}))
		now := plan.Host(enters(asks(v, datapath, model.ServiceOptions{Published: "81:80/tcp", Source: model.Keep})))
		maps.DeleteFunc(now, func(k kernel.Key, _ kernel.Value) bool { return before[k] != nil })
		return now
	}
	balanced := publishes(service.NFT)
	// of is the part of a state in the host's namespace (""), a network's ("sluice") or
	// a task's ("task").
	of := func(s kernel.State, netns string) func() string {
		return func() string {
			some := maps.Clone(s)
			maps.DeleteFunc(some, func(k kernel.Key, _ kernel.Value) bool {
				kind, _, _ := strings.Cut(strings.ReplaceAll(k.Netns(), ":", "-"), "-")
				return kind != netns
			})
			return fence(some.Text())
		}
	}
	byIPVS := publishes(service.IPVS)
	maps.DeleteFunc(byIPVS, func(k kernel.Key, _ kernel.Value) bool { return balanced[k] != nil })
	return map[string]func() string{
		"ipvs-dr":         balances(asked(model.ServiceOptions{})),
		"ipvs-nat":        balances(asked(model.ServiceOptions{Mode: service.NAT, Ports: "81:80/tcp"})),
		"ipvs-tun":        phases(asked(model.ServiceOptions{Mode: service.TUN, Ports: "81:80/tcp"}), kernel.PhaseTask),
		"mesh-host":       of(balanced, ""),
		"mesh-network":    of(balanced, "sluice"),
		"mesh-ipvs":       of(byIPVS, "sluice"),
		"mesh-task":       of(balanced, "task"),
		"node1-netns":     phases(one, kernel.PhaseNetns, kernel.PhaseSysctl),
		"node1-links":     phases(one, kernel.PhaseBridge, kernel.PhaseVXLAN, kernel.PhaseVeth),
		"node1-addresses": phases(one, kernel.PhaseAddr),
		"node1-peers":     phases(one, kernel.PhaseNeigh),
		"node1-filter":    phases(one, kernel.PhaseFilter),
		"node1-balancer":  balances(one),
		"node1-guard":     phases(guard, kernel.PhaseVIP),
		"node1-tasks":     phases(one, kernel.PhaseTask),
		"node2-peers":     phases(two, kernel.PhaseNeigh),
		"node2-tasks":     phases(two, kernel.PhaseTask),
		"leaving": after(func(task string, t *model.Task) {
			t.Leaving = task == "web.2"
		}),
		"none-ready": after(func(_ string, t *model.Task) {
			t.Ready = false
		}),
	}
}

// isGuard reports whether an object is of the source guard.
func isGuard(k kernel.Key) bool {
	switch k.(type) {
	case kernel.GuardTable, kernel.GuardPort, kernel.GuardAddr:
		return true
	}
	return false
}

// healthy is what `sluice status` answers on a worker without problems.
func healthy() diag.Status {
	return diag.Status{
		Version: "v0.1.0", Alias: "sluice:latest", Scope: "global", Node: "x8k2mq0v7w1t5r9y3u6i4o2pa", Host: "h2", Role: "worker",
		VTEP: "192.0.2.2", Port: 4799, Engine: "20.10.24+dfsg1", Datapath: "ipvs",
		Why:      "the kernel has it; networks that ask for nft get that",
		Kernel:   []diag.KernelAbility{{Name: diag.AbilityIPVS, Use: "balances virtual IPs, with every scheduler; looked for when the plugin starts"}},
		Networks: 1, Endpoints: 2, Services: 1, Memory: 27 << 20,
		Gossip: diag.Gossip{State: "running on 192.0.2.2", Peers: []diag.Peer{
			{Node: "3f0a9c1e7b5d2468ace013579", Host: "h1", VTEP: "192.0.2.1", State: "present", Endpoints: 1},
			{Node: "9c7d5e3f1a0b2468ace013579", Host: "h3", VTEP: "192.0.2.3", State: "present", Endpoints: 2},
		}},
		Loop: diag.LoopState{Rounds: 40, Changes: 52, ReadBack: time.Now().Add(-2 * time.Second)},
		Calls: []diag.Call{
			{Method: "NetworkDriver.CreateEndpoint", Calls: 2, Longest: 12 * time.Millisecond},
			{Method: "NetworkDriver.Join", Calls: 2, Longest: 41 * time.Millisecond},
		},
	}
}

// leaking is what `sluice ipam` answers on the leader when nobody has 10.255.0.5.
func leaking() diag.IPAM {
	at := func(last, state, owner, node string) diag.IPAMAddress {
		return diag.IPAMAddress{Address: "10.255.0." + last, State: state, Owner: owner, Node: node}
	}
	lost := at("5", "leaked", "", "")
	lost.Since = time.Now().Add(-4 * time.Minute)
	return diag.IPAM{
		Source: diag.IPAMLeases,
		Pools: []diag.IPAMPool{{
			Network: "shop", Pool: "sluice-global/10.255.0.0/20", Subnet: "10.255.0.0/20", Gateway: "10.255.0.1", Nodes: "10.255.15.0/24",
			Used: 5, Free: 3833, Kept: 256, Leaked: 1,
			Addresses: []diag.IPAMAddress{
				at("1", "used", "gateway", ""), at("2", "used", "VIP of web", ""), at("3", "used", "task web.1", "h1"),
				at("4", "used", "task web.2", "h2"), lost, at("6", "used", "container 4f1e0a8c2b7d", "h3"),
			},
		}},
		Problems: []diag.Problem{{
			What: "addresses of network shop are leased and nobody has them: 10.255.0.5",
			Do:   "nothing: they are freed when nobody has had them for 15m0s (sluice ipam)",
		}},
	}
}

// starting is what `sluice services` answers while a task starts.
func starting() diag.Services {
	return diag.Services{Services: []diag.Service{{
		Name: "web", Network: "shop", VIP: "10.255.0.2", Datapath: "ipvs", Mode: "dr", Scheduler: "rr", SchedulerUsed: "rr",
		Backends: []diag.Backend{
			{Addr: "10.255.0.3", Node: "h1", Weight: 1, State: "ready"},
			{Addr: "10.255.0.4", Node: "h2", Weight: 1, State: "ready"},
			{Addr: "10.255.0.6", Node: "h3", Weight: 1, State: "not ready"},
		},
	}}}
}

// entered is what `sluice service web` answers on h1 a little later, after a client
// there and the task there have asked the service.
func entered() diag.Entry {
	counted := func(connections uint64, open int) *diag.Traffic {
		// A connection of curl for a small page is six packets to the service.
		return &diag.Traffic{Connections: connections, PacketsIn: 6 * connections, BytesIn: 388 * connections, Active: open, Inactive: int(connections) - open}
	}
	backends := []diag.EntryBackend{
		{Backend: diag.Backend{Addr: "10.255.0.3", Node: "h1", Task: "p3v1c9", Weight: 1, State: "ready"}, Method: "dr", Traffic: counted(10, 1)},
		{Backend: diag.Backend{Addr: "10.255.0.4", Node: "h2", Task: "x8k2mq", Weight: 1, State: "ready"}, Method: "dr", Traffic: counted(11, 0)},
		{Backend: diag.Backend{Addr: "10.255.0.6", Node: "h3", Task: "o2pa41", Weight: 1, State: "leaving"}, Method: "dr", Traffic: counted(9, 0)},
	}
	service := func(mark uint32, client string, connections uint64, dests ...diag.EntryDest) diag.EntryIPVS {
		sum := counted(connections, 0)
		sum.Inactive = 0
		return diag.EntryIPVS{Mark: mark, Client: client, Scheduler: "rr", Traffic: sum, Destinations: dests}
	}
	dest := func(addr string, weight int, connections uint64, open int) diag.EntryDest {
		return diag.EntryDest{Addr: addr + ":0", Method: "dr", Weight: weight, Traffic: counted(connections, open)}
	}
	datagrams := func(s diag.EntryIPVS) diag.EntryIPVS {
		s.Proto = "udp"
		return s
	}
	total := counted(30, 0)
	return diag.Entry{Name: "web", ID: "k2l9w0", Networks: []diag.EntryNetwork{{
		Network: "shop", ID: "shopnet0000000000", Netns: "sluice-shopnet00000", VIP: "10.255.0.2", Mode: "dr",
		Scheduler: "rr", SchedulerUsed: "rr", Datapath: "ipvs", DatapathReason: "this node has ip_vs",
		Traffic: total, Backends: backends,
		IPVS: []diag.EntryIPVS{
			service(275017261, "", 28, dest("10.255.0.3", 1, 10, 1), dest("10.255.0.4", 1, 10, 0), dest("10.255.0.6", 0, 8, 0)),
			service(1402988241, "10.255.0.3", 2, dest("10.255.0.4", 1, 1, 0), dest("10.255.0.6", 0, 1, 0)),
			datagrams(service(691472908, "", 0, dest("10.255.0.3", 1, 0, 0), dest("10.255.0.4", 1, 0, 0))),
			datagrams(service(1120385617, "10.255.0.3", 0, dest("10.255.0.4", 1, 0, 0))),
		},
		Compare: "nsenter --net=/run/netns/sluice-shopnet00000 ipvsadm -Ln --stats",
	}}}
}

// TestDocsShowTheWholePlan: no phase is left out of the page.
func TestDocsShowTheWholePlan(t *testing.T) {
	shown := make(map[string]bool)
	for name, f := range packetPaths() {
		if strings.HasPrefix(name, "node1-") {
			for line := range strings.Lines(f()) {
				shown[line] = true
			}
		}
	}
	for line := range strings.Lines(plan.Host(example(nil)[0]).Text()) {
		if !shown[line] {
			t.Errorf("missing: %s", line)
		}
	}
}

func fence(text string) string { return "```\n" + text + "```\n" }

// example is what two nodes see of one network with a service of two tasks, one
// on each, and a client on the first. edit may change what is said of a task.
func example(edit func(task string, t *model.Task)) [2]model.View {
	const net model.NetworkID = "shopnet000000000000000000" // 25 characters, as swarm's are
	const service model.ServiceID = "webservice"
	addr := netip.MustParseAddr
	vip := addr("10.255.0.2")
	vteps := [2]string{"192.0.2.1", "192.0.2.2"}
	containers := []struct {
		id   string
		node int
		ip   string
		task string
	}{
		{"a1", 0, "10.255.0.3", "web.1"},
		{"b2", 1, "10.255.0.4", "web.2"},
		{"c3", 0, "10.255.0.5", ""},
	}
	var out [2]model.View
	for self := range out {
		v := model.View{
			Self: model.Self{Node: nodeID(self), VTEP: addr(vteps[self]), VXLANPort: 4799},
			Networks: map[model.NetworkID]model.Network{net: {
				ID: net, Name: "shop", Subnet: netip.MustParsePrefix("10.255.0.0/20"), Gateway: addr("10.255.0.1"), VNI: 1048577, MTU: 1450,
				Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "rr"},
			}},
			Endpoints: make(map[model.EndpointID]model.Endpoint),
			Remotes:   make(map[model.EndpointID]model.Remote),
			Services: map[model.ServiceID]model.Service{service: {
				ID: service, Name: "web", VIPs: map[model.NetworkID]netip.Addr{net: vip},
			}},
		}
		for _, c := range containers {
			id := model.EndpointID(strings.Repeat(c.id, 32))
			var task model.Task
			prepared := vip
			if c.task == "" {
				prepared = netip.Addr{}
			} else {
				task = model.Task{ID: model.TaskID(c.task), Service: service, ServiceName: "web", VIP: vip, Ready: true}
				if edit != nil {
					edit(c.task, &task)
				}
			}
			if c.node == self {
				v.Endpoints[id] = model.Endpoint{
					ID: id, Network: net, Addr: addr(c.ip), MAC: model.MACFor(addr(c.ip)), Phase: model.Taken,
					Sandbox: "/host/run/docker/netns/" + strings.Repeat("5d"+c.id, 3), Task: task, Prepared: prepared,
				}
				continue
			}
			v.Remotes[id] = model.Remote{
				ID: id, Network: net, Node: nodeID(c.node), VTEP: addr(vteps[c.node]), Addr: addr(c.ip),
				MAC: model.MACFor(addr(c.ip)), Task: task, Prepared: prepared,
			}
		}
		out[self] = v
	}
	return out
}

// enters has the nodes claim what they need to be entries, and node 1 know of a
// third, which has no task of the network.
func enters(v model.View) model.View {
	v.Entries = make(map[model.NetworkID]map[model.NodeID]model.Entry)
	for id := range v.Networks {
		v.Entries[id] = make(map[model.NodeID]model.Entry)
		for i := range 3 {
			v.Entries[id][nodeID(i)] = model.Entry{
				Addr: netip.AddrFrom4([4]byte{10, 255, 15, byte(i + 1)}), Number: uint16(i + 1), VTEP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}),
			}
		}
	}
	for id, e := range v.Endpoints {
		e.Meshed = true
		v.Endpoints[id] = e
	}
	for id, r := range v.Remotes {
		r.Meshed = true
		v.Remotes[id] = r
	}
	return v
}

func nodeID(i int) model.NodeID { return model.NodeID(fmt.Sprintf("node%d", i+1)) }
