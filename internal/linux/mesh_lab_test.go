package linux

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	"sluice/internal/netnstest"
	"sluice/internal/plan"
)

// The routing mesh in the hardest of the usual settings: reverse paths are checked
// strictly everywhere, the policy of FORWARD is DROP, and both tasks have the same
// address on their host's docker_gwbridge.
//
//	client ── LAN ── host 1: entry, task a
//	far ─ router ┘ ├ host 2: entry, task b
//	    (MTU 1200) └ host 3: entry without a task
type meshLab struct {
	client, far *netnstest.NS
	hosts       []*meshHost  // 1, 2, 3
	ipvs        bool         // which balances, not nftables
	mode        string       // of the network
	two         bool         // tasks are on a second network
	internal    bool         // the network is internal: tasks have no other way out
	legacy      bool         // the engine uses iptables-legacy
	source      model.Source // of all services, if it is to be another
}

// onBoth runs a test with either balancer.
func onBoth(t *testing.T, test func(t *testing.T, l *meshLab)) {
	t.Helper()
	onBothIn(t, "dr", test)
}

// onBothIn is onBoth in a network of another mode, which is none of the mesh's business.
func onBothIn(t *testing.T, mode string, test func(t *testing.T, l *meshLab)) {
	t.Helper()
	onBothAs(t, meshLab{mode: mode}, test)
}

// onBothAs is onBoth in a lab that is as given.
func onBothAs(t *testing.T, as meshLab, test func(t *testing.T, l *meshLab)) {
	t.Helper()
	t.Run("nft", func(t *testing.T) {
		l := as
		test(t, l.start(t))
	})
	t.Run("ipvs", func(t *testing.T) {
		netnstest.Need(t, netnstest.IPVS)
		if as.mode == "tun" {
			netnstest.Need(t, netnstest.IPIP)
		}
		l := as
		l.ipvs = true
		test(t, l.start(t))
	})
}

type meshHost struct {
	n       int
	k       *Kernel
	w       world
	addr    netip.Addr // on the LAN
	task    *netnstest.NS
	sandbox string
	mesh    netip.Addr
	number  uint16 // what it has claimed
	block   netip.Prefix
}

// claim gives a host another number.
func (h *meshHost) claim(number uint16) {
	h.number, h.block = number, netip.PrefixFrom(netip.AddrFrom4([4]byte{250, 0, byte(number * 16), 0}), 20)
}

const (
	meshPatience = 3 * time.Second // answers come within milliseconds
	meshMTU      = 1450
	// Published ports, and what they lead to.
	keepPort, ownPort, closedPort, bulkPort = 81, 82, 83, 84
	masqPort, emptyPort, allowPort, rrPort  = 85, 86, 87, 89
	secondPort, boundPort                   = 90, 91
	nearPort, farPort                       = 93, 94
	rangeLo, rangeHi                        = 8000, 8999 // of TCP and UDP, kept as they are
)

var (
	meshSubnet  = netip.MustParsePrefix("10.255.0.0/20")
	meshGateway = netip.MustParseAddr("10.255.0.1")
	meshAliases = netip.MustParsePrefix("250.0.0.0/8")
	gwbridge    = netip.MustParseAddr("172.18.0.3") // of both tasks
)

func taskAddr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 0, byte(2 + n)}) }

// alias is the k-th of an entry.
func (h *meshHost) alias(k byte) netip.Addr {
	b := h.block.Addr().As4()
	b[3] = k
	return netip.AddrFrom4(b)
}

// bound is another address of host 1 than that on the LAN.
func bound() netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, 1}) }

// meshService is a service of the lab, at 10.255.0.<vip>.
type meshService struct {
	name    string
	vip     byte // 0: endpoint mode dnsrr
	options model.ServiceOptions
	empty   bool // nobody serves it
	only    int  // the host of its only task; 0: both have one
}

// rangePorts are the ports near the ends of the range and one in it; those outside of
// it have a server too.
func rangePorts() []int { return []int{rangeLo - 1, rangeLo, 8500, rangeHi, rangeHi + 1} }

// meshServices are those of the lab. One task is of several, unlike in a swarm, so
// each is planned by itself; the last one's tasks have all that any asks for.
func meshServices() []meshService {
	return []meshService{
		{name: "empty", vip: 101, options: model.ServiceOptions{Published: "86:80/tcp;86:80/udp"}, empty: true},
		{name: "masqueraded", vip: 102, options: model.ServiceOptions{Published: "85:80/tcp;85:80/udp", Source: model.Masquerade}},
		{name: "for some", vip: 103, options: model.ServiceOptions{Published: "87:80/tcp;87:80/udp", Allow: "198.51.100.0/24"}},
		{name: "near", vip: 106, options: model.ServiceOptions{Published: "93:7000/tcp;93:7000/udp"}, only: 1},
		{name: "far", vip: 107, options: model.ServiceOptions{Published: "94:7000/tcp;94:7000/udp"}, only: 2},
		{name: "dnsrr", options: model.ServiceOptions{Published: "89:80/tcp;89:80/udp"}},
		{name: "bound", vip: 104, options: model.ServiceOptions{Published: "91:80/tcp;91:80/udp", Bind: "192.0.2.1;203.0.113.1"}},
		{name: "range", vip: 105, options: model.ServiceOptions{Published: "8000-8999/tcp;8000-8999/udp"}},
		{name: "kept", vip: 100, options: model.ServiceOptions{
			Published: "81:80/tcp;81:80/udp;82:1053/tcp;82:1053/udp;83:9/tcp;83:9/udp;84:9000/tcp;84:9000/udp",
		}},
	}
}

const (
	meshNetwork model.NetworkID  = "meshnet000000000"
	meshTask    model.EndpointID = "meshtask00000000" // of the host itself
	meshTaskEnd                  = "slcmeshtask0000"

	secondNetwork model.NetworkID  = "meshsecond000000"
	secondTask    model.EndpointID = "meshtasktwo00000"
	secondTaskEnd                  = "slcmeshtasktwo0"
)

// state is what is planned for a host: all three are entries of the network. Once
// its task is the engine's, what is to be done in there is planned too.
func (l *meshLab) state(h *meshHost, p model.Phase) kernel.State {
	st := kernel.State{}
	for _, s := range meshServices() {
		maps.Copy(st, plan.Host(l.view(h, s, p)))
	}
	if !l.ipvs { // kernels that have no ip_vs mostly have no tunnels either
		maps.DeleteFunc(st, func(key kernel.Key, _ kernel.Value) bool { _, is := key.(kernel.TaskTunnel); return is })
	}
	return st
}

// view is what a host knows, if this is the only service.
func (l *meshLab) view(h *meshHost, s meshService, p model.Phase) model.View {
	var vip netip.Addr
	vips := map[model.NetworkID]netip.Addr{}
	if s.vip != 0 {
		vip = netip.AddrFrom4([4]byte{10, 255, 0, s.vip})
		vips[meshNetwork] = vip
	}
	if l.source != "" {
		s.options.Source = l.source
	}
	id := model.ServiceID(s.name)
	node := func(h *meshHost) model.NodeID { return model.NodeID(fmt.Sprint("node", h.n)) }
	v := model.View{
		Self: model.Self{Node: node(h), VTEP: h.addr, VXLANPort: 4799},
		Networks: map[model.NetworkID]model.Network{meshNetwork: {
			ID: meshNetwork, Internal: l.internal, Subnet: meshSubnet, Gateway: meshGateway, VNI: 5000, MTU: meshMTU,
			Options: model.NetworkOptions{Datapath: "auto", Mode: l.mode, Scheduler: "rr"},
		}},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Remotes:   map[model.EndpointID]model.Remote{},
		Services: map[model.ServiceID]model.Service{id: {
			ID: id, Name: s.name, VIPs: vips,
			Options: map[model.NetworkID]model.ServiceOptions{meshNetwork: s.options},
		}},
		Entries: map[model.NetworkID]map[model.NodeID]model.Entry{meshNetwork: {}},
	}
	if l.ipvs {
		v.Self.Datapath = "ipvs"
	}
	for _, o := range l.hosts {
		v.Entries[meshNetwork][node(o)] = model.Entry{Addr: o.mesh, Number: o.number, VTEP: o.addr}
		own := taskAddr(o.n)
		task := model.Task{Service: id, ServiceName: s.name, VIP: vip, Ready: true}
		if s.empty || s.only != 0 && s.only != o.n {
			task = model.Task{}
		}
		switch {
		case o.task == nil:
		case o == h:
			v.Endpoints[meshTask] = model.Endpoint{
				ID: meshTask, Network: meshNetwork, Addr: own, MAC: model.MACFor(own), Phase: p, Sandbox: h.sandbox,
				Task: task, Prepared: vip, Meshed: true,
			}
		default:
			eid := model.EndpointID("of " + node(o))
			v.Remotes[eid] = model.Remote{
				ID: eid, Network: meshNetwork, Node: node(o), VTEP: o.addr, Addr: own, MAC: model.MACFor(own),
				Task: task, Prepared: vip, Meshed: true,
			}
		}
	}
	if l.two && s.name == "kept" {
		l.second(h, v, p)
	}
	return v
}

// second adds the second network, on which the same tasks are another service's.
func (l *meshLab) second(h *meshHost, v model.View, p model.Phase) {
	n := v.Networks[meshNetwork]
	n.ID, n.VNI, n.Subnet, n.Gateway = secondNetwork, 5001, netip.MustParsePrefix("10.255.16.0/20"), netip.MustParseAddr("10.255.16.1")
	v.Networks[n.ID] = n
	v.Entries[n.ID] = map[model.NodeID]model.Entry{}
	v.Services["second"] = model.Service{ID: "second", Options: map[model.NetworkID]model.ServiceOptions{n.ID: {Published: "90:1054/tcp;90:1054/udp"}}}
	for _, o := range l.hosts {
		node := model.NodeID(fmt.Sprint("node", o.n))
		v.Entries[n.ID][node] = model.Entry{Addr: netip.AddrFrom4([4]byte{10, 255, 31, byte(o.n)}), Number: uint16(8 + o.n), VTEP: o.addr}
	}
	if e, here := v.Endpoints[meshTask]; here {
		e.ID, e.Network, e.Addr, e.Task.Service, e.Prepared = secondTask, n.ID, secondAddr(h.n), "second", netip.Addr{}
		e.MAC, e.Task.VIP = model.MACFor(e.Addr), netip.Addr{}
		v.Endpoints[e.ID] = e
	}
	for _, o := range l.hosts {
		if r, there := v.Remotes[model.EndpointID(fmt.Sprint("of node", o.n))]; there {
			r.ID, r.Network, r.Addr, r.Task.Service, r.Prepared = "second "+r.ID, n.ID, secondAddr(o.n), "second", netip.Addr{}
			r.MAC, r.Task.VIP = model.MACFor(r.Addr), netip.Addr{}
			v.Remotes[r.ID] = r
		}
	}
}

func secondAddr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 16, byte(2 + n)}) }

// newMeshLab makes all of it, as the engine and the plugin do.
func newMeshLab(t testing.TB, byIPVS bool, mode string) *meshLab {
	t.Helper()
	return (&meshLab{ipvs: byIPVS, mode: mode}).start(t)
}

func (l *meshLab) start(t testing.TB) *meshLab {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.VXLAN, netnstest.IPTables, netnstest.NFTables)
	lan := netnstest.LAN(t, 5)
	l.client, l.far = lan[3].NS, netnstest.New(t)
	router := lan[4]
	strict := func(ns *netnstest.NS) {
		ns.Must(func() error {
			return errors.Join(writeSysctl("net.ipv4.conf.all.rp_filter", "1"), writeSysctl("net.ipv4.conf.default.rp_filter", "1"))
		})
	}
	forward := func(ns *netnstest.NS) { ns.Must(func() error { return writeSysctl("net.ipv4.ip_forward", "1") }) }
	// The far client knows nothing of the narrow way: it says that it takes 1500.
	run(t, router.NS, "ip link add far mtu 1200 type veth peer name eth0 mtu 1500 netns %s", l.far.Path())
	run(t, router.NS, "ip addr add 198.51.100.1/24 dev far")
	run(t, router.NS, "ip link set far up")
	run(t, l.far, "ip addr add 198.51.100.2/24 dev eth0")
	run(t, l.far, "ip link set eth0 up")
	run(t, l.far, "ip route add default via 198.51.100.1")
	forward(router.NS)
	for i := range 3 {
		n := i + 1
		h := &meshHost{n: n, addr: lan[i].Addr, mesh: netip.AddrFrom4([4]byte{10, 255, 15, byte(n)})}
		h.claim(uint16(n))
		strict(lan[i].NS)
		forward(lan[i].NS)
		h.k, h.w = newKernel(t, lan[i].NS, nft.Tables{})
		h.k.cfg.IPVS = ipvs.New()
		run(t, h.w.host, "ip route add 198.51.100.0/24 via %s", router.Addr)
		run(t, h.w.host, "ip link add docker_gwbridge type bridge")
		run(t, h.w.host, "ip addr add 172.18.0.1/16 dev docker_gwbridge")
		run(t, h.w.host, "ip link set docker_gwbridge up")
		iptables := "iptables"
		if l.legacy {
			iptables += "-legacy"
		}
		run(t, h.w.host, "%s -P FORWARD DROP", iptables)
		run(t, h.w.host, "%s -N DOCKER-USER", iptables)
		run(t, h.w.host, "%s -A DOCKER-USER -j RETURN", iptables)
		run(t, h.w.host, "%s -A FORWARD -j DOCKER-USER", iptables)
		if n < 3 {
			h.task = netnstest.New(t)
			strict(h.task)
			h.sandbox = h.task.Path()
		}
		l.hosts = append(l.hosts, h)
	}
	for _, h := range l.hosts {
		h.lead(t, l.state(h, model.Joined)) // the engine attaches a container before anything is done in it
		if h.task != nil {
			run(t, h.w.host, "ip link set %s netns %s", meshTaskEnd, h.task.Path())
			run(t, h.task, "ip link set %s name eth0 up", meshTaskEnd)
			run(t, h.task, "ip addr add %s/20 dev eth0", taskAddr(h.n))
			if l.two {
				run(t, h.w.host, "ip link set %s netns %s", secondTaskEnd, h.task.Path())
				run(t, h.task, "ip link set %s name eth2 up", secondTaskEnd)
				run(t, h.task, "ip addr add %s/20 dev eth2", secondAddr(h.n))
			}
		}
		if h.task != nil && !l.internal {
			run(t, h.w.host, "ip link add gw1 type veth peer name eth1 netns %s", h.task.Path())
			run(t, h.w.host, "ip link set gw1 master docker_gwbridge up")
			run(t, h.task, "ip addr add %s/16 dev eth1", gwbridge)
			run(t, h.task, "ip link set eth1 up")
			run(t, h.task, "ip route add default via 172.18.0.1")
		}
		want := l.state(h, model.Taken)
		h.lead(t, want)
		if have := h.dump(t); len(kernel.Diff(have, want)) > 0 {
			t.Fatalf("host %d, still to do: %v", h.n, kernel.Diff(have, want))
		}
	}
	for i, name := range []string{"a", "b"} {
		at := []string{"0.0.0.0:80", taskAddr(i+1).String() + ":1053", "0.0.0.0:9000"}
		for _, port := range rangePorts() {
			if port != 9000 {
				at = append(at, fmt.Sprintf("0.0.0.0:%d", port))
			}
		}
		if l.two {
			at = append(at, secondAddr(i+1).String()+":1054")
		}
		serveMesh(t, l.hosts[i].task, name, at)
	}
	for _, h := range l.hosts {
		l.ready(t, h)
	}
	return l
}

// ready waits until a host leads to both tasks: the kernel tells a bridge of a port's
// carrier from a work queue, and first packets may come too early.
func (l *meshLab) ready(t testing.TB, h *meshHost) {
	t.Helper()
	for late := time.Now().Add(10 * time.Second); ; {
		got := map[string]bool{}
		for range 2 {
			a, err := askTCP(l.client, "", h.at(keepPort))
			if err == nil {
				got[a.server] = true
			}
		}
		if len(got) == 2 {
			return
		}
		if time.Now().After(late) {
			t.Fatalf("host %d does not lead to both tasks: %v", h.n, got)
		}
	}
}

func (h *meshHost) at(port int) string { return fmt.Sprintf("%s:%d", h.addr, port) }

func (h *meshHost) dump(t testing.TB) kernel.State {
	t.Helper()
	var sandboxes []string
	if h.sandbox != "" {
		sandboxes = []string{h.sandbox}
	}
	have, err := h.k.Dump(t.Context(), sandboxes)
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// lead applies the difference to want once.
func (h *meshHost) lead(t testing.TB, want kernel.State) {
	t.Helper()
	ops := kernel.Diff(h.dump(t), want)
	for i, err := range h.k.Apply(t.Context(), ops) {
		if err != nil {
			t.Fatalf("host %d: %s: %v", h.n, ops[i], err)
		}
	}
}
