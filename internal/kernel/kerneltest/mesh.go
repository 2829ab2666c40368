package kerneltest

import (
	"net/netip"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Names and addresses of the routing mesh in the example: this node's end of netA,
// and another node's block.
const (
	meshEnd  = "slma"
	meshPort = "mesh0"
	route    = "net.ipv4.conf." + meshEnd + ".route_localnet"
	noSix    = "net.ipv6.conf." + meshEnd + ".disable_ipv6"
)

var (
	meshAddr   = netip.MustParseAddr("10.255.15.1")
	meshOther  = netip.MustParseAddr("10.255.15.2")
	meshPool   = netip.MustParsePrefix("250.0.0.0/8")
	ownBlock   = netip.MustParsePrefix("250.0.16.0/20")
	otherBlock = netip.MustParseAddr("250.0.32.0")
	alias      = netip.MustParseAddr("250.0.16.7")
	gateway    = netip.MustParseAddr("10.255.0.1")
	subnet     = netip.MustParsePrefix("10.255.0.0/20")
	anywhere   = netip.MustParsePrefix("0.0.0.0/0")

	backTable = kernel.BackTableSpec{Router: router, Pool: meshPool, Bits: 20}
)

func meshPair() kernel.Link { return kernel.Link{NS: netA, Name: meshPort, Kind: kernel.Veth} }

// addMesh adds the routing mesh's objects: netA with this node as an entry, two
// published ports, and the task whose namespace is at path behind them.
func addMesh(s kernel.State, path string) {
	s[kernel.Forward{}] = kernel.ForwardSpec{Devices: "slm"}
	s[meshPair()] = kernel.LinkSpec{
		Alias: "sluice " + netA, MTU: 1450, Master: bridge, Quiet: true, Peer: meshEnd, PeerMAC: model.MACFor(meshAddr), Kept: true,
	}
	s[kernel.FDB{NS: netA, Dev: meshPort, MAC: model.MACFor(meshAddr)}] = kernel.FDBSpec{}
	s[kernel.Neigh{NS: netA, Dev: bridge, IP: meshAddr}] = kernel.NeighSpec{MAC: model.MACFor(meshAddr)}
	s[kernel.Route{NS: netA, Dev: bridge, Prefix: ownBlock}] = kernel.RouteSpec{Local: true}
	s[kernel.Route{NS: netA, Dev: bridge, Prefix: anywhere}] = kernel.RouteSpec{Via: meshAddr}
	s[kernel.Addr{Dev: meshEnd, Prefix: netip.PrefixFrom(meshAddr, 32)}] = kernel.AddrSpec{}
	s[kernel.Sysctl{Name: route}] = kernel.SysctlSpec{Value: "1"}
	s[kernel.Sysctl{Name: noSix}] = kernel.SysctlSpec{Value: "1"}
	s[kernel.Neigh{Dev: meshEnd, IP: gateway}] = kernel.NeighSpec{MAC: router}
	s[kernel.Route{Dev: meshEnd, Prefix: ownBlock}] = kernel.RouteSpec{Via: gateway}

	s[kernel.BackTable{NS: netA}] = backTable
	s[kernel.Back{NS: netA, Block: ownBlock.Addr()}] = kernel.BackSpec{MAC: model.MACFor(meshAddr)}
	s[kernel.Back{NS: netA, Block: otherBlock}] = kernel.BackSpec{MAC: model.MACFor(meshOther)}

	s[kernel.TaskRoute{Sandbox: path, Addr: member}] = kernel.TaskRouteSpec{Subnet: subnet, Gateway: gateway, Loose: true}
	s[kernel.TaskMesh{Sandbox: path, Addr: member}] = kernel.TaskMeshSpec{Pool: meshPool, MAC: model.MACFor(member), Subnet: subnet, UDP: true}
	s[kernel.TaskMesh{Sandbox: path, Addr: secondMember}] = kernel.TaskMeshSpec{
		Pool: meshPool, MAC: model.MACFor(secondMember), Subnet: netip.MustParsePrefix("10.254.0.0/20"),
	}

	s[kernel.MeshTable{}] = kernel.MeshTableSpec{Devices: "slm"}
	s[kernel.MeshNet{Dev: meshEnd}] = kernel.MeshNetSpec{Source: meshAddr, Subnet: subnet}
	s[kernel.MeshPort{Proto: model.TCP, Port: 81}] = kernel.MeshPortSpec{Alias: alias, To: 80}
	s[kernel.MeshPort{Proto: model.UDP, Port: 53, Bind: vtepSelf}] = kernel.MeshPortSpec{Alias: alias, To: 1053}
	s[kernel.MeshRange{Proto: model.TCP, Lo: 8000, Hi: 8999}] = kernel.MeshRangeSpec{Alias: alias}
	s[kernel.MeshRange{Proto: model.TCP, Lo: 9000, Hi: 9001}] = kernel.MeshRangeSpec{Alias: alias.Next()}
	s[kernel.MeshRange{Proto: model.UDP, Lo: 8000, Hi: 65535}] = kernel.MeshRangeSpec{Alias: alias}
	s[kernel.MeshMasq{Alias: alias}] = kernel.MeshMasqSpec{}
	s[kernel.MeshAllow{Alias: alias}] = kernel.MeshAllowSpec{From: "192.0.2.0/24 203.0.113.7/32"}
}

// meshChanges are changes to them.
func meshChanges(path string) []changeCase {
	pair := meshPair()
	return []changeCase{
		put(kernel.Forward{}, kernel.ForwardSpec{Devices: "slx"}),
		link("kept pair's MTU", pair, func(l *kernel.LinkSpec) { l.MTU = 1400 }),
		link("kept pair's MAC", pair, func(l *kernel.LinkSpec) { l.PeerMAC = other }),
		put(kernel.Addr{Dev: meshEnd, Prefix: netip.PrefixFrom(meshOther, 32)}, kernel.AddrSpec{}),
		put(kernel.Neigh{Dev: meshEnd, IP: gateway}, kernel.NeighSpec{MAC: other}),
		put(kernel.Route{Dev: meshEnd, Prefix: ownBlock}, kernel.RouteSpec{Via: remote}),
		put(kernel.Route{NS: netA, Dev: bridge, Prefix: ownBlock}, kernel.RouteSpec{Via: meshAddr}),
		put(kernel.Route{NS: netA, Dev: bridge, Prefix: anywhere}, kernel.RouteSpec{Via: meshOther}),
		put(kernel.BackTable{NS: netA}, kernel.BackTableSpec{Router: other, Pool: meshPool, Bits: 24}),
		put(kernel.Back{NS: netA, Block: otherBlock}, kernel.BackSpec{MAC: other}),
		put(kernel.TaskRoute{Sandbox: path, Addr: member}, kernel.TaskRouteSpec{Subnet: subnet, Gateway: remote, Loose: true}),
		put(kernel.TaskRoute{Sandbox: path, Addr: member}, kernel.TaskRouteSpec{Subnet: subnet, Gateway: gateway, Loose: true, Last: true}),
		put(kernel.TaskMesh{Sandbox: path, Addr: member}, kernel.TaskMeshSpec{Pool: meshPool, MAC: other, Subnet: subnet}),
		put(kernel.TaskMesh{Sandbox: path, Addr: remote}, kernel.TaskMeshSpec{Pool: meshPool, MAC: other, Subnet: subnet}),
		put(kernel.MeshTable{}, kernel.MeshTableSpec{Devices: "slx"}),
		put(kernel.MeshNet{Dev: meshEnd}, kernel.MeshNetSpec{Source: meshOther, Subnet: subnet}),
		put(kernel.MeshNet{Dev: "slmb"}, kernel.MeshNetSpec{Source: meshAddr, Subnet: subnet}),
		put(kernel.MeshPort{Proto: model.TCP, Port: 81}, kernel.MeshPortSpec{Alias: alias, To: 8080}),
		put(kernel.MeshPort{Proto: model.SCTP, Port: 81}, kernel.MeshPortSpec{Alias: alias, To: 80}),
		put(kernel.MeshPort{Proto: model.TCP, Port: 81, Bind: vtepSelf}, kernel.MeshPortSpec{Alias: alias, To: 80}),
		put(kernel.MeshRange{Proto: model.TCP, Lo: 8000, Hi: 8999}, kernel.MeshRangeSpec{Alias: alias.Next()}),
		put(kernel.MeshRange{Proto: model.TCP, Lo: 7000, Hi: 7999}, kernel.MeshRangeSpec{Alias: alias}),
		put(kernel.MeshRange{Proto: model.SCTP, Lo: 1, Hi: 65535}, kernel.MeshRangeSpec{Alias: alias}),
		{"a range shrinks", func(s kernel.State) {
			delete(s, kernel.MeshRange{Proto: model.TCP, Lo: 8000, Hi: 8999})
			s[kernel.MeshRange{Proto: model.TCP, Lo: 8001, Hi: 8500}] = kernel.MeshRangeSpec{Alias: alias}
		}},
		put(kernel.MeshMasq{Alias: alias.Next()}, kernel.MeshMasqSpec{}),
		put(kernel.MeshAllow{Alias: alias}, kernel.MeshAllowSpec{From: "192.0.2.0/24"}),
		put(kernel.MeshAllow{Alias: alias.Next()}, kernel.MeshAllowSpec{}),
	}
}

// meshDrifts are damages to them.
func meshDrifts(path string) []driftCase {
	pair := meshPair()
	return []driftCase{
		{kernel.Forward{}, Deleted}, {kernel.Forward{}, Flushed}, {kernel.Forward{}, Reordered}, {kernel.Forward{}, Intruded},
		{pair, Deleted}, {pair, Down}, {pair, Changed}, {pair, Halved},
		{kernel.FDB{NS: netA, Dev: meshPort, MAC: model.MACFor(meshAddr)}, Deleted},
		{kernel.Addr{Dev: meshEnd, Prefix: netip.PrefixFrom(meshAddr, 32)}, Deleted},
		{kernel.Sysctl{Name: route}, Changed},
		{kernel.Sysctl{Name: noSix}, Changed},
		{kernel.Route{Dev: meshEnd, Prefix: ownBlock}, Deleted},
		{kernel.Route{NS: netA, Dev: bridge, Prefix: ownBlock}, Deleted},
		{kernel.BackTable{NS: netA}, Deleted},
		{kernel.Back{NS: netA, Block: otherBlock}, Deleted},
		{kernel.TaskRoute{Sandbox: path, Addr: member}, Deleted},
		{kernel.TaskRoute{Sandbox: path, Addr: member}, Halved},
		{kernel.TaskRoute{Sandbox: path, Addr: member}, Changed},
		{kernel.TaskMesh{Sandbox: path, Addr: member}, Deleted},
		{kernel.MeshTable{}, Deleted}, {kernel.MeshTable{}, Flushed},
		{kernel.MeshPort{Proto: model.TCP, Port: 81}, Deleted},
		{kernel.MeshRange{Proto: model.TCP, Lo: 8000, Hi: 8999}, Deleted},
		{kernel.MeshNet{Dev: meshEnd}, Flushed},
		{kernel.MeshAllow{Alias: alias}, Flushed},
	}
}
