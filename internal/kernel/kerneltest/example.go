package kerneltest

import (
	"net/netip"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Names in the example.
const (
	netA, netB = "sluice-aaaa", "sluice-bbbb" // between hosts; of this host only
	bridge     = "br0"
	vxlan      = "vxlan0"
	hostEndA   = "slva1"
	// brNF is missing where br_netfilter is not loaded: as good as 0.
	brNF      = "net.bridge.bridge-nf-call-iptables"
	redirects = "net.ipv4.conf.all.send_redirects"
)

var (
	vtepSelf  = netip.MustParseAddr("192.0.2.1") // of the first host of netnstest's LAN
	vtepTwo   = netip.MustParseAddr("192.0.2.2")
	vtepThree = netip.MustParseAddr("192.0.2.3")

	vip       = netip.MustParseAddr("10.255.0.7")
	vipPrefix = netip.PrefixFrom(vip, 32)
	member    = netip.MustParseAddr("10.255.0.2")
	remote    = netip.MustParseAddr("10.255.0.3")
	router    = model.MACFor(netip.MustParseAddr("10.255.0.1"))
	other     = model.MAC{0x02, 0x42, 0xaa, 0, 0, 1}

	// The task with address member is on a second network, which the example has
	// no other part of.
	secondVIP    = netip.MustParseAddr("10.254.0.7")
	secondMember = netip.MustParseAddr("10.254.0.2")
)

// Example is a state with every kind of object but those of nftables: netA between
// hosts, with two remote endpoints and two of its own, netB of this host only.
// The host's own underlay address must be 192.0.2.1.
func Example() kernel.State {
	s := kernel.State{
		kernel.Filter{}:                    kernel.FilterSpec{Port: 4799},
		kernel.FilterPeer{VTEP: vtepTwo}:   kernel.FilterPeerSpec{},
		kernel.FilterPeer{VTEP: vtepThree}: kernel.FilterPeerSpec{},
	}
	for _, ns := range []string{netA, netB} {
		s[kernel.Netns{Name: ns}] = kernel.NetnsSpec{}
		s[kernel.Sysctl{NS: ns, Name: redirects}] = kernel.SysctlSpec{Value: "0"}
		s[kernel.Sysctl{NS: ns, Name: brNF}] = kernel.SysctlSpec{Value: "0"}
		s[kernel.Link{NS: ns, Name: bridge, Kind: kernel.Bridge}] = kernel.LinkSpec{Alias: "sluice " + ns, MTU: 1450, MAC: router, Quiet: true}
		s[kernel.Addr{NS: ns, Dev: bridge, Prefix: netip.MustParsePrefix("10.255.0.1/20")}] = kernel.AddrSpec{}
		s[kernel.Addr{NS: ns, Dev: bridge, Prefix: vipPrefix}] = kernel.AddrSpec{}
	}
	s[kernel.Link{NS: netA, Name: vxlan, Kind: kernel.VXLAN}] = kernel.LinkSpec{
		Alias: "sluice " + netA, MTU: 1450, Master: bridge, Quiet: true, VNI: 4097, Port: 4799, Local: vtepSelf,
	}
	addVeth(s, netA, hostEndA, "slca1", "10.255.0.2")
	addVeth(s, netA, "slva2", "slca2", "10.255.0.4")
	addVeth(s, netB, "slvb1", "slcb1", "10.255.0.2")
	addRemote(s, "10.255.0.3", vtepTwo)
	addRemote(s, "10.255.0.5", vtepThree)
	return s
}

// Full is Example with the objects of nftables and the mesh besides, of a task whose
// namespace is at path, and those of IPVS if the kernel has that.
func Full(path string, ipvs bool) kernel.State {
	s := Example()
	addTables(s, path)
	addMesh(s, path)
	if ipvs {
		addIPVS(s)
	}
	return s
}

func addVeth(s kernel.State, ns, host, peer, ip string) {
	s[kernel.Link{NS: ns, Name: host, Kind: kernel.Veth}] = kernel.LinkSpec{
		Alias: "sluice " + peer, MTU: 1450, Master: bridge, Peer: peer, PeerMAC: model.MACFor(netip.MustParseAddr(ip)),
	}
}

func addRemote(s kernel.State, ip string, vtep netip.Addr) {
	a := netip.MustParseAddr(ip)
	s[kernel.Neigh{NS: netA, Dev: bridge, IP: a}] = kernel.NeighSpec{MAC: model.MACFor(a)}
	s[kernel.FDB{NS: netA, Dev: vxlan, MAC: model.MACFor(a)}] = kernel.FDBSpec{VTEP: vtep}
}

// addTables adds the objects of nftables: a VIP in netA, with the task whose
// namespace is at path as one of two backends, on a port only; that task has
// another VIP besides.
func addTables(s kernel.State, path string) {
	s[kernel.BridgeTable{NS: netA}] = kernel.BridgeTableSpec{Router: router, Uplink: vxlan}
	s[kernel.Member{NS: netA, IP: member}] = kernel.MemberSpec{MAC: model.MACFor(member)}
	s[kernel.VIP{NS: netA, IP: vip}] = kernel.VIPSpec{Scheduler: "rr", Slots: 2, Named: true}
	s[kernel.Port{NS: netA, VIP: vip, Proto: model.TCP, Port: 80}] = kernel.PortSpec{To: 8080}
	for i, ip := range []netip.Addr{member, remote} {
		s[kernel.Slot{NS: netA, VIP: vip, Slot: i}] = kernel.SlotSpec{MAC: model.MACFor(ip)}
		s[kernel.Alive{NS: netA, VIP: vip, MAC: model.MACFor(ip)}] = kernel.AliveSpec{}
	}
	s[kernel.Other{NS: netA, VIP: vip, Client: member}] = kernel.OtherSpec{MAC: model.MACFor(remote)}
	s[kernel.Real{NS: netA, MAC: model.MACFor(remote)}] = kernel.RealSpec{IP: remote}
	s[kernel.LiftTable{NS: netA}] = kernel.LiftTableSpec{Router: router}
	s[kernel.LiftFrom{NS: netA, IP: remote}] = kernel.LiftFromSpec{}
	s[kernel.LiftTo{NS: netA, IP: member}] = kernel.LiftToSpec{}
	addGuard(s)
	s[kernel.TaskTable{Sandbox: path}] = kernel.TaskTableSpec{}
	s[kernel.TaskVIP{Sandbox: path, VIP: vip}] = kernel.TaskVIPSpec{Addr: member}
	s[kernel.TaskPort{Sandbox: path, VIP: vip, Proto: model.TCP, Port: 80}] = kernel.TaskPortSpec{Addr: member, To: 8080}
	s[kernel.TaskVIP{Sandbox: path, VIP: secondVIP}] = kernel.TaskVIPSpec{Addr: secondMember}
}

// addGuard adds what guards the port of that task, which has published ports, and
// that of one which has nothing.
func addGuard(s kernel.State) {
	s[kernel.GuardTable{NS: netA}] = kernel.GuardTableSpec{Ports: "slv", Pool: meshPool}
	s[kernel.GuardPort{NS: netA, Dev: hostEndA}] = kernel.GuardPortSpec{MAC: model.MACFor(member), Aliases: true}
	s[kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: member}] = kernel.GuardAddrSpec{MAC: model.MACFor(member)}
	s[kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: vip}] = kernel.GuardAddrSpec{MAC: model.MACFor(member), VIP: true}
	s[kernel.GuardPort{NS: netA, Dev: "slva2"}] = kernel.GuardPortSpec{MAC: other}
	s[kernel.GuardAddr{NS: netA, Dev: "slva2", IP: remote}] = kernel.GuardAddrSpec{MAC: other}
}

// addIPVS adds the objects of IPVS: a VIP in netB with two backends, of which one
// has a service of its own that leaves it out.
func addIPVS(s kernel.State) {
	s[kernel.MarkTable{NS: netB}] = kernel.MarkTableSpec{}
	s[kernel.Mark{NS: netB, VIP: vip}] = kernel.MarkSpec{Mark: 7}
	s[kernel.Mark{NS: netB, VIP: vip, Client: member}] = kernel.MarkSpec{Mark: 7 + 2<<16}
	s[kernel.Mark{NS: netB, VIP: vip, Proto: model.UDP}] = kernel.MarkSpec{Mark: 8}
	s[kernel.Mark{NS: netB, VIP: vip, Client: member, Proto: model.UDP}] = kernel.MarkSpec{Mark: 8}
	s[kernel.Mark{NS: netB, VIP: secondVIP, Proto: model.TCP, Port: 80}] = kernel.MarkSpec{Mark: 7}
	s[kernel.Mark{NS: netB, VIP: secondVIP, Client: member, Proto: model.UDP, Port: 53}] = kernel.MarkSpec{Mark: 7 + 2<<16}
	s[kernel.IPVSTimeouts{NS: netB}] = kernel.IPVSTimeoutsSpec{TCP: 10800, FIN: 60, UDP: 120}
	s[kernel.IPVSService{NS: netB, Mark: 7}] = kernel.IPVSServiceSpec{Scheduler: "rr"}
	s[kernel.IPVSService{NS: netB, Mark: 7 + 2<<16}] = kernel.IPVSServiceSpec{Scheduler: "sh", Fallback: true}
	s[kernel.IPVSService{NS: netB, Mark: 8}] = kernel.IPVSServiceSpec{Scheduler: "rr", OnePacket: true}
	s[kernel.IPVSDest{NS: netB, Mark: 7, IP: member}] = kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}
	s[kernel.IPVSDest{NS: netB, Mark: 7, IP: remote}] = kernel.IPVSDestSpec{Weight: 0, Method: kernel.IPVSDR}
	s[kernel.IPVSDest{NS: netB, Mark: 7 + 2<<16, IP: remote}] = kernel.IPVSDestSpec{Weight: 3, Method: kernel.IPVSDR, Upper: 9, Lower: 5}
	for _, port := range []uint16{0, 80} { // one address, two destinations
		s[kernel.IPVSDest{NS: netB, Mark: 8, IP: member, Port: port}] = kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT}
	}
}

// changeCase is one value that becomes another.
type changeCase struct {
	name   string
	change func(kernel.State)
}

// link changes the value of a device.
func link(name string, key kernel.Link, f func(*kernel.LinkSpec)) changeCase {
	return changeCase{name, func(s kernel.State) {
		spec := s[key].(kernel.LinkSpec)
		f(&spec)
		s[key] = spec
	}}
}

// put replaces the value of an object.
func put(key kernel.Key, v kernel.Value) changeCase {
	return changeCase{key.String(), func(s kernel.State) { s[key] = v }}
}

// changeCases are the changes of the example; sandbox is the path of its task's
// namespace, empty where there are no tables; ipvs says whether there is IPVS.
func changeCases(sandbox string, ipvs bool) []changeCase {
	br := kernel.Link{NS: netA, Name: bridge, Kind: kernel.Bridge}
	vx := kernel.Link{NS: netA, Name: vxlan, Kind: kernel.VXLAN}
	ve := kernel.Link{NS: netA, Name: hostEndA, Kind: kernel.Veth}
	cases := []changeCase{
		put(kernel.Sysctl{NS: netA, Name: redirects}, kernel.SysctlSpec{Value: "1"}),
		link("bridge's MTU", br, func(l *kernel.LinkSpec) { l.MTU = 1400 }),
		link("bridge's MAC", br, func(l *kernel.LinkSpec) { l.MAC = other }),
		link("bridge's alias", br, func(l *kernel.LinkSpec) { l.Alias = "sluice another" }),
		link("bridge's quiet", br, func(l *kernel.LinkSpec) { l.Quiet = false }),
		link("VXLAN's VNI", vx, func(l *kernel.LinkSpec) { l.VNI = 4098 }),
		link("VXLAN's port", vx, func(l *kernel.LinkSpec) { l.Port = 4800 }),
		link("VXLAN's local address", vx, func(l *kernel.LinkSpec) { l.Local = vtepThree }),
		link("VXLAN's MTU", vx, func(l *kernel.LinkSpec) { l.MTU = 1400 }),
		link("VXLAN's quiet", vx, func(l *kernel.LinkSpec) { l.Quiet = false }),
		link("veth's MTU", ve, func(l *kernel.LinkSpec) { l.MTU = 1400 }),
		link("veth's alias", ve, func(l *kernel.LinkSpec) { l.Alias = "sluice another" }),
		link("veth's quiet", ve, func(l *kernel.LinkSpec) { l.Quiet = true }),
		link("veth's peer", ve, func(l *kernel.LinkSpec) { l.Peer = "slcaother" }),
		link("veth's peer's MAC", ve, func(l *kernel.LinkSpec) { l.PeerMAC = other }),
		put(kernel.Neigh{NS: netA, Dev: bridge, IP: remote}, kernel.NeighSpec{MAC: other}),
		put(kernel.FDB{NS: netA, Dev: vxlan, MAC: model.MACFor(remote)}, kernel.FDBSpec{VTEP: vtepThree}),
		put(kernel.Filter{}, kernel.FilterSpec{Port: 4800}),
		put(kernel.FilterPeer{VTEP: netip.MustParseAddr("192.0.2.9")}, kernel.FilterPeerSpec{}),
		put(kernel.Addr{NS: netA, Dev: bridge, Prefix: netip.MustParsePrefix("10.255.0.8/32")}, kernel.AddrSpec{}),
	}
	if sandbox != "" {
		cases = append(cases,
			put(kernel.BridgeTable{NS: netA}, kernel.BridgeTableSpec{Router: other, Uplink: vxlan}),
			put(kernel.BridgeTable{NS: netA}, kernel.BridgeTableSpec{Router: router, Uplink: vxlan, Open: 20000}),
			put(kernel.Member{NS: netA, IP: member}, kernel.MemberSpec{MAC: other}),
			put(kernel.VIP{NS: netA, IP: vip}, kernel.VIPSpec{Scheduler: "sh", Slots: 2}),
			put(kernel.VIP{NS: netA, IP: vip}, kernel.VIPSpec{Scheduler: "rr", Slots: 2}),
			put(kernel.VIP{NS: netA, IP: vip}, kernel.VIPSpec{Scheduler: "rr", Slots: 2, Named: true, Persist: 300, PersistBits: 24}),
			put(kernel.VIP{NS: netA, IP: vip}, kernel.VIPSpec{Scheduler: "wrr", Slots: 2, Named: true, OnePacket: true}),
			put(kernel.Port{NS: netA, VIP: vip, Proto: model.TCP, Port: 80}, kernel.PortSpec{To: 80}),
			put(kernel.Port{NS: netA, VIP: vip, Proto: model.SCTP, Port: 80}, kernel.PortSpec{To: 8080}),
			put(kernel.Slot{NS: netA, VIP: vip, Slot: 1}, kernel.SlotSpec{MAC: other}),
			put(kernel.Alive{NS: netA, VIP: vip, MAC: other}, kernel.AliveSpec{}),
			put(kernel.Alive{NS: netA, VIP: vip, MAC: model.MACFor(remote)}, kernel.AliveSpec{Drains: true}),
			put(kernel.Other{NS: netA, VIP: vip, Client: member}, kernel.OtherSpec{MAC: other}),
			put(kernel.VIP{NS: netA, IP: vip}, kernel.VIPSpec{Scheduler: "rr", Slots: 2, NAT: true}),
			put(kernel.Real{NS: netA, MAC: model.MACFor(remote)}, kernel.RealSpec{IP: member}),
			put(kernel.Real{NS: netA, MAC: other}, kernel.RealSpec{IP: member}),
			put(kernel.LiftTable{NS: netA}, kernel.LiftTableSpec{Router: other}),
			put(kernel.LiftFrom{NS: netA, IP: member}, kernel.LiftFromSpec{}),
			put(kernel.LiftTo{NS: netA, IP: remote}, kernel.LiftToSpec{}),
			put(kernel.GuardTable{NS: netA}, kernel.GuardTableSpec{Ports: "eth", Pool: netip.MustParsePrefix("240.0.0.0/16")}),
			put(kernel.GuardTable{NS: netA}, kernel.GuardTableSpec{Ports: "slv", Pool: meshPool, Open: true}),
			put(kernel.GuardPort{NS: netA, Dev: hostEndA}, kernel.GuardPortSpec{MAC: model.MACFor(member)}),
			put(kernel.GuardPort{NS: netA, Dev: hostEndA}, kernel.GuardPortSpec{MAC: other, Aliases: true}),
			put(kernel.GuardPort{NS: netA, Dev: "slva3"}, kernel.GuardPortSpec{MAC: other}),
			put(kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: member}, kernel.GuardAddrSpec{MAC: other}),
			put(kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: vip}, kernel.GuardAddrSpec{MAC: model.MACFor(member)}),
			put(kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: secondVIP}, kernel.GuardAddrSpec{MAC: model.MACFor(member), VIP: true}),
			put(kernel.TaskVIP{Sandbox: sandbox, VIP: vip}, kernel.TaskVIPSpec{Addr: member, Loop: true}),
			put(kernel.TaskPort{Sandbox: sandbox, VIP: vip, Proto: model.TCP, Port: 80}, kernel.TaskPortSpec{Addr: member, To: 80, Loop: true}),
			put(kernel.TaskPort{Sandbox: sandbox, VIP: vip, Proto: model.UDP, Port: 80}, kernel.TaskPortSpec{Addr: member, To: 8080}),
		)
	}
	if ipvs {
		service := kernel.IPVSService{NS: netB, Mark: 7}
		dest := kernel.IPVSDest{NS: netB, Mark: 7, IP: member}
		cases = append(cases,
			put(kernel.Mark{NS: netB, VIP: vip}, kernel.MarkSpec{Mark: 7 + 2<<16}),
			put(kernel.Mark{NS: netB, VIP: secondVIP, Client: member}, kernel.MarkSpec{Mark: 7}),
			put(kernel.Mark{NS: netB, VIP: secondVIP, Proto: model.TCP, Port: 80}, kernel.MarkSpec{Mark: 7 + 2<<16}),
			put(kernel.Mark{NS: netB, VIP: secondVIP, Proto: model.SCTP, Port: 80}, kernel.MarkSpec{Mark: 7}),
			put(kernel.Mark{NS: netB, VIP: secondVIP, Client: member, Proto: model.UDP, Port: 53}, kernel.MarkSpec{Mark: 7}),
			put(kernel.Mark{NS: netB, VIP: vip, Proto: model.UDP}, kernel.MarkSpec{Mark: 7}),
			put(kernel.Mark{NS: netB, VIP: secondVIP, Client: member, Proto: model.TCP}, kernel.MarkSpec{Mark: 7}),
			put(kernel.IPVSTimeouts{NS: netB}, kernel.IPVSTimeoutsSpec{TCP: 900, FIN: 60, UDP: 120}),
			put(service, kernel.IPVSServiceSpec{Scheduler: "wlc"}),
			put(service, kernel.IPVSServiceSpec{Scheduler: "mh", Fallback: true}),
			put(service, kernel.IPVSServiceSpec{Scheduler: "rr", Persist: 300, PersistBits: 24}),
			put(service, kernel.IPVSServiceSpec{Scheduler: "rr", Persist: 300, PersistBits: 32}),
			put(service, kernel.IPVSServiceSpec{Scheduler: "rr", OnePacket: true}),
			put(kernel.IPVSService{NS: netB, Mark: 8}, kernel.IPVSServiceSpec{Scheduler: "rr"}),
			put(kernel.IPVSDest{NS: netB, Mark: 8, IP: member, Port: 80}, kernel.IPVSDestSpec{Weight: 2, Method: kernel.IPVSNAT}),
			put(kernel.IPVSDest{NS: netB, Mark: 8, IP: member, Port: 8080}, kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT}),
			put(dest, kernel.IPVSDestSpec{Weight: 65535, Method: kernel.IPVSDR}),
			put(dest, kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT}),
			put(dest, kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSTun}),
			put(dest, kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR, Upper: 100, Lower: 50}),
			put(kernel.IPVSDest{NS: netB, Mark: 7, IP: secondMember}, kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}),
		)
	}
	return cases
}

// driftCase is an object that somebody else spoils.
type driftCase struct {
	key kernel.Key
	how Damage
}

// driftCases are the damages to the example; the arguments are as for changeCases.
func driftCases(sandbox string, ipvs bool) []driftCase {
	br := kernel.Link{NS: netA, Name: bridge, Kind: kernel.Bridge}
	vx := kernel.Link{NS: netA, Name: vxlan, Kind: kernel.VXLAN}
	ve := kernel.Link{NS: netA, Name: hostEndA, Kind: kernel.Veth}
	entry := kernel.FDB{NS: netA, Dev: vxlan, MAC: model.MACFor(remote)}
	arp := kernel.Neigh{NS: netA, Dev: bridge, IP: remote}
	cases := []driftCase{
		{kernel.Sysctl{NS: netA, Name: redirects}, Changed},
		{br, Changed}, {br, Down}, {br, Deleted},
		{vx, Changed}, {vx, Down}, {vx, Deleted},
		{ve, Changed}, {ve, Down}, {ve, Deleted},
		{kernel.Addr{NS: netA, Dev: bridge, Prefix: vipPrefix}, Deleted},
		{arp, Deleted}, {arp, Changed},
		{entry, Deleted}, {entry, Changed}, {entry, Halved},
		{kernel.Filter{}, Flushed}, {kernel.Filter{}, Reordered}, {kernel.Filter{}, Intruded}, {kernel.Filter{}, Deleted},
		{kernel.FilterPeer{VTEP: vtepTwo}, Deleted},
		{kernel.Netns{Name: netB}, Deleted},
	}
	if sandbox != "" {
		cases = append(cases,
			driftCase{kernel.BridgeTable{NS: netA}, Deleted},
			driftCase{kernel.Port{NS: netA, VIP: vip, Proto: model.TCP, Port: 80}, Deleted},
			driftCase{kernel.Real{NS: netA, MAC: model.MACFor(remote)}, Deleted},
			driftCase{kernel.LiftTable{NS: netA}, Deleted},
			driftCase{kernel.LiftTo{NS: netA, IP: member}, Deleted},
			driftCase{kernel.GuardTable{NS: netA}, Deleted},
			driftCase{kernel.GuardPort{NS: netA, Dev: hostEndA}, Deleted},
			driftCase{kernel.GuardPort{NS: netA, Dev: hostEndA}, Changed},
			driftCase{kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: vip}, Deleted},
			driftCase{kernel.GuardAddr{NS: netA, Dev: hostEndA, IP: member}, Changed},
			driftCase{kernel.TaskTable{Sandbox: sandbox}, Deleted},
			driftCase{kernel.TaskPort{Sandbox: sandbox, VIP: vip, Proto: model.TCP, Port: 80}, Deleted},
		)
	}
	if ipvs {
		cases = append(cases,
			driftCase{kernel.MarkTable{NS: netB}, Deleted},
			driftCase{kernel.Mark{NS: netB, VIP: secondVIP, Proto: model.TCP, Port: 80}, Deleted},
			driftCase{kernel.IPVSTimeouts{NS: netB}, Changed},
			driftCase{kernel.IPVSService{NS: netB, Mark: 7}, Changed},
			driftCase{kernel.IPVSService{NS: netB, Mark: 7}, Deleted},
			driftCase{kernel.IPVSDest{NS: netB, Mark: 7, IP: member}, Changed},
			driftCase{kernel.IPVSDest{NS: netB, Mark: 7, IP: member}, Deleted},
			driftCase{kernel.IPVSService{NS: netB, Mark: 8}, Changed},
			driftCase{kernel.IPVSDest{NS: netB, Mark: 8, IP: member, Port: 80}, Changed},
			driftCase{kernel.IPVSDest{NS: netB, Mark: 8, IP: member, Port: 80}, Deleted},
		)
	}
	return cases
}
