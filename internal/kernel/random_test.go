package kernel_test

import (
	"fmt"
	"net/netip"

	"pgregory.net/rapid"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// states draws well-formed states: every object has the namespace, table and
// device it stands on, as a plan's and a kernel's have. Names come from a small
// set, so that two draws share many objects.
func states() *rapid.Generator[kernel.State] {
	return rapid.Custom(func(t *rapid.T) kernel.State {
		s := kernel.State{}
		if rapid.Bool().Draw(t, "filter") {
			s[kernel.Filter{}] = kernel.FilterSpec{Port: port(t)}
			for _, a := range rapid.SliceOfDistinct(addrs("192.168.0"), rapid.ID).Draw(t, "peers") {
				s[kernel.FilterPeer{VTEP: a}] = kernel.FilterPeerSpec{}
			}
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "networks") {
			if rapid.Bool().Draw(t, "present") {
				namespace(t, s, fmt.Sprintf("sluice-%d", i))
			}
		}
		for i := range rapid.IntRange(0, 3).Draw(t, "tasks") {
			if rapid.Bool().Draw(t, "present") {
				task(t, s, fmt.Sprintf("/run/%012d", i))
			}
		}
		if rapid.Bool().Draw(t, "mesh") {
			published(t, s)
		}
		return s
	})
}

func namespace(t *rapid.T, s kernel.State, ns string) {
	s[kernel.Netns{Name: ns}] = kernel.NetnsSpec{}
	s[kernel.Sysctl{NS: ns, Name: "net.ipv4.ip_forward"}] = kernel.SysctlSpec{Value: rapid.SampledFrom([]string{"0", "1"}).Draw(t, "sysctl")}
	s[kernel.Link{NS: ns, Name: "br0", Kind: kernel.Bridge}] = kernel.LinkSpec{Alias: "sluice x", MTU: mtu(t), MAC: mac(t)}
	for _, a := range some(t, "10.0.0") {
		s[kernel.Addr{NS: ns, Dev: "br0", Prefix: netip.PrefixFrom(a, 32)}] = kernel.AddrSpec{}
	}
	if rapid.Bool().Draw(t, "uplink") {
		s[kernel.Link{NS: ns, Name: "vxlan0", Kind: kernel.VXLAN}] = kernel.LinkSpec{
			Alias: "sluice x", MTU: mtu(t), Master: "br0", Quiet: true,
			VNI: model.VNI(rapid.IntRange(1, 3).Draw(t, "vni")), Port: port(t), Local: addrs("192.168.0").Draw(t, "local"),
		}
		for _, a := range some(t, "10.0.1") {
			s[kernel.Neigh{NS: ns, Dev: "br0", IP: a}] = kernel.NeighSpec{MAC: mac(t)}
			s[kernel.FDB{NS: ns, Dev: "vxlan0", MAC: model.MACFor(a)}] = kernel.FDBSpec{VTEP: addrs("192.168.0").Draw(t, "vtep")}
		}
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "pairs") {
		s[kernel.Link{NS: ns, Name: fmt.Sprintf("slv%d", i), Kind: kernel.Veth}] = kernel.LinkSpec{
			Alias: "sluice e", MTU: mtu(t), Master: "br0", Peer: fmt.Sprintf("slc%d", i), PeerMAC: mac(t),
		}
	}
	if rapid.Bool().Draw(t, "entry") {
		entry(t, s, ns)
	}
	if !rapid.Bool().Draw(t, "balancer") {
		return
	}
	if rapid.Bool().Draw(t, "guard") {
		guard(t, s, ns)
	}
	if rapid.Bool().Draw(t, "ipvs") {
		ipvs(t, s, ns)
	}
	s[kernel.BridgeTable{NS: ns}] = kernel.BridgeTableSpec{Router: mac(t), Uplink: "vxlan0"}
	for _, a := range some(t, "10.0.0") {
		s[kernel.Member{NS: ns, IP: a}] = kernel.MemberSpec{MAC: mac(t)}
	}
	for _, a := range some(t, "10.0.0") {
		s[kernel.Real{NS: ns, MAC: model.MACFor(a)}] = kernel.RealSpec{IP: addrs("10.0.0").Draw(t, "real")}
	}
	for _, vip := range some(t, "10.0.2") {
		n := rapid.IntRange(0, 3).Draw(t, "slots")
		s[kernel.VIP{NS: ns, IP: vip}] = kernel.VIPSpec{Scheduler: "rr", Slots: n, Named: rapid.Bool().Draw(t, "named"), OnePacket: rapid.Bool().Draw(t, "one packet"), NAT: rapid.Bool().Draw(t, "nat")}
		for _, p := range somePorts(t) {
			s[kernel.Port{NS: ns, VIP: vip, Proto: p.Proto, Port: p.From}] = kernel.PortSpec{To: p.To}
		}
		for i := range n {
			m := mac(t)
			s[kernel.Slot{NS: ns, VIP: vip, Slot: i}] = kernel.SlotSpec{MAC: m}
			s[kernel.Alive{NS: ns, VIP: vip, MAC: m}] = kernel.AliveSpec{Drains: rapid.Bool().Draw(t, "drains")}
			s[kernel.Other{NS: ns, VIP: vip, Client: addrs("10.0.0").Draw(t, "client")}] = kernel.OtherSpec{MAC: m}
		}
	}
}

// entry makes a network one that published ports lead into.
func entry(t *rapid.T, s kernel.State, ns string) {
	end, self := "slm"+ns, addrs("10.0.15").Draw(t, "mesh address")
	block := netip.MustParsePrefix("250.0.16.0/20")
	s[kernel.Link{NS: ns, Name: "mesh0", Kind: kernel.Veth}] = kernel.LinkSpec{
		Alias: "sluice x", MTU: mtu(t), Master: "br0", Quiet: true, Peer: end, PeerMAC: mac(t), Kept: true,
	}
	s[kernel.FDB{NS: ns, Dev: "mesh0", MAC: model.MACFor(self)}] = kernel.FDBSpec{}
	s[kernel.Route{NS: ns, Dev: "br0", Prefix: block}] = kernel.RouteSpec{Local: true}
	s[kernel.Addr{Dev: end, Prefix: netip.PrefixFrom(self, 32)}] = kernel.AddrSpec{}
	s[kernel.Sysctl{Name: "net.ipv4.conf." + end + ".route_localnet"}] = kernel.SysctlSpec{Value: "1"}
	s[kernel.Route{Dev: end, Prefix: block}] = kernel.RouteSpec{Via: addrs("10.0.0").Draw(t, "gateway")}
	s[kernel.BackTable{NS: ns}] = kernel.BackTableSpec{Router: mac(t), Pool: netip.MustParsePrefix("250.0.0.0/8"), Bits: 20}
	for _, a := range some(t, "250.0.0") {
		s[kernel.Back{NS: ns, Block: a}] = kernel.BackSpec{MAC: mac(t)}
	}
}

// guard adds what containers may say that they are.
func guard(t *rapid.T, s kernel.State, ns string) {
	s[kernel.GuardTable{NS: ns}] = kernel.GuardTableSpec{Ports: "slv", Pool: netip.MustParsePrefix("250.0.0.0/8")}
	for i, ip := range some(t, "10.0.0") {
		dev := fmt.Sprintf("slv%d", i%2)
		s[kernel.GuardPort{NS: ns, Dev: dev}] = kernel.GuardPortSpec{MAC: mac(t), Aliases: rapid.Bool().Draw(t, "aliases")}
		s[kernel.GuardAddr{NS: ns, Dev: dev, IP: ip}] = kernel.GuardAddrSpec{MAC: mac(t), VIP: rapid.Bool().Draw(t, "vip")}
	}
}

// published adds published ports.
func published(t *rapid.T, s kernel.State) {
	s[kernel.Forward{}] = kernel.ForwardSpec{Devices: rapid.SampledFrom([]string{"slm", "slx"}).Draw(t, "devices")}
	s[kernel.MeshTable{}] = kernel.MeshTableSpec{Devices: "slm"}
	s[kernel.MeshNet{Dev: "slm0"}] = kernel.MeshNetSpec{Source: addrs("10.0.15").Draw(t, "source"), Subnet: netip.MustParsePrefix("10.0.0.0/20")}
	next := rapid.Uint16Range(1, 3).Draw(t, "first port")
	for _, alias := range some(t, "250.0.16") {
		hi := next + rapid.Uint16Range(1, 2).Draw(t, "more ports")
		s[kernel.MeshRange{Proto: model.TCP, Lo: next, Hi: hi}] = kernel.MeshRangeSpec{Alias: alias}
		next = hi + rapid.Uint16Range(1, 2).Draw(t, "gap")
		s[kernel.MeshMasq{Alias: alias}] = kernel.MeshMasqSpec{}
		s[kernel.MeshAllow{Alias: alias}] = kernel.MeshAllowSpec{From: rapid.SampledFrom([]string{"", "192.0.2.0/24"}).Draw(t, "from")}
		for _, p := range somePorts(t) {
			s[kernel.MeshPort{Proto: p.Proto, Port: p.From}] = kernel.MeshPortSpec{Alias: alias, To: p.To}
			s[kernel.MeshPort{Bind: alias, Proto: p.Proto, Port: p.From}] = kernel.MeshPortSpec{Alias: alias, To: p.To}
		}
	}
}

// ipvs adds services of IPVS and what leads to them.
func ipvs(t *rapid.T, s kernel.State, ns string) {
	s[kernel.MarkTable{NS: ns}] = kernel.MarkTableSpec{}
	s[kernel.LiftTable{NS: ns}] = kernel.LiftTableSpec{Router: mac(t)}
	for _, ip := range some(t, "10.0.0") {
		s[kernel.LiftFrom{NS: ns, IP: ip}] = kernel.LiftFromSpec{}
		s[kernel.LiftTo{NS: ns, IP: ip}] = kernel.LiftToSpec{}
		s[kernel.Mark{NS: ns, VIP: ip, Proto: model.TCP, Port: port(t)}] = kernel.MarkSpec{Mark: 1}
	}
	s[kernel.IPVSTimeouts{NS: ns}] = kernel.IPVSTimeoutsSpec{TCP: rapid.IntRange(1, 2).Draw(t, "tcp"), FIN: 1, UDP: 1}
	for i, vip := range some(t, "10.0.2") {
		n := uint32(i + 1)
		s[kernel.Mark{NS: ns, VIP: vip}] = kernel.MarkSpec{Mark: n}
		s[kernel.Mark{NS: ns, VIP: vip, Proto: model.UDP}] = kernel.MarkSpec{Mark: n}
		s[kernel.IPVSService{NS: ns, Mark: n}] = kernel.IPVSServiceSpec{
			Scheduler: rapid.SampledFrom([]string{"rr", "wlc"}).Draw(t, "scheduler"), OnePacket: rapid.Bool().Draw(t, "one packet"),
		}
		for _, ip := range some(t, "10.0.0") {
			weight := rapid.IntRange(0, 2).Draw(t, "weight")
			s[kernel.IPVSDest{NS: ns, Mark: n, IP: ip}] = kernel.IPVSDestSpec{Weight: weight, Method: kernel.IPVSDR}
			if rapid.Bool().Draw(t, "remapped") {
				s[kernel.IPVSDest{NS: ns, Mark: n, IP: ip, Port: port(t)}] = kernel.IPVSDestSpec{Weight: weight, Method: kernel.IPVSNAT}
			}
		}
	}
}

func task(t *rapid.T, s kernel.State, sandbox string) {
	s[kernel.TaskTable{Sandbox: sandbox}] = kernel.TaskTableSpec{}
	for _, vip := range some(t, "10.0.2") {
		for _, p := range somePorts(t) {
			s[kernel.TaskPort{Sandbox: sandbox, VIP: vip, Proto: p.Proto, Port: p.From}] = kernel.TaskPortSpec{
				Addr: addrs("10.0.0").Draw(t, "own"), To: p.To, Loop: rapid.Bool().Draw(t, "loop"),
			}
		}
		s[kernel.TaskVIP{Sandbox: sandbox, VIP: vip}] = kernel.TaskVIPSpec{Addr: addrs("10.0.0").Draw(t, "own"), Loop: rapid.Bool().Draw(t, "loop")}
	}
	for _, own := range some(t, "10.0.0") {
		s[kernel.TaskTunnel{Sandbox: sandbox, Addr: own}] = kernel.TaskTunnelSpec{}
		subnet := netip.MustParsePrefix("10.0.0.0/20")
		s[kernel.TaskRoute{Sandbox: sandbox, Addr: own}] = kernel.TaskRouteSpec{
			Subnet: subnet, Gateway: addrs("10.0.0").Draw(t, "gateway"), Loose: true, // what is looser than wanted stays
		}
		s[kernel.TaskMesh{Sandbox: sandbox, Addr: own}] = kernel.TaskMeshSpec{
			Pool: netip.MustParsePrefix("250.0.0.0/8"), MAC: mac(t), Subnet: subnet, UDP: rapid.Bool().Draw(t, "udp"),
		}
	}
}

func addrs(net string) *rapid.Generator[netip.Addr] {
	return rapid.Map(rapid.IntRange(1, 4), func(i int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("%s.%d", net, i)) })
}

func some(t *rapid.T, net string) []netip.Addr {
	return rapid.SliceOfNDistinct(addrs(net), 0, 4, rapid.ID).Draw(t, net)
}

// somePorts draws ports of a VIP; those that a draw repeats are one.
func somePorts(t *rapid.T) []model.PortMap {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) model.PortMap {
		return model.PortMap{
			Proto: rapid.SampledFrom([]model.Proto{model.TCP, model.UDP, model.SCTP}).Draw(t, "proto"),
			From:  rapid.SampledFrom([]uint16{53, 80}).Draw(t, "from"),
			To:    rapid.SampledFrom([]uint16{53, 8080}).Draw(t, "to"),
		}
	}), 0, 3).Draw(t, "ports")
}

func mac(t *rapid.T) model.MAC { return model.MACFor(addrs("10.0.0").Draw(t, "mac")) }
func mtu(t *rapid.T) int       { return rapid.SampledFrom([]int{1450, 8950}).Draw(t, "mtu") }
func port(t *rapid.T) uint16   { return rapid.SampledFrom([]uint16{4789, 4799}).Draw(t, "port") }
