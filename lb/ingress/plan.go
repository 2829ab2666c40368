package ingress

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/service"
)

// routeLocalnet lets packets from 127.0.0.1 of the host be routed by a device; their
// source is another by then.
const routeLocalnet = "route_localnet"

// anywhere is the default route's prefix.
func anywhere() netip.Prefix { return netip.PrefixFrom(netip.IPv4Unspecified(), 0) }

// lead is a network that published ports of this node lead into.
type lead struct {
	model.Network
	entry   model.Entry
	block   netip.Prefix
	aliases map[model.ServiceID]netip.Addr // of the services that publish on this node
}

// leads are those networks, as far as this node has a claim that holds. One that
// services publish on is a lead with and without ports that this node could get:
// open connections do not end because a process or an older service takes a port.
func leads(v model.View) map[model.NetworkID]*lead {
	out := make(map[model.NetworkID]*lead)
	numbers := make(map[uint16]bool) // of this node: two with one are about to have two, as Claims says
	for _, id := range Entered(v) {
		n, here := v.Networks[id]
		if !here || !n.Gateway.Is4() {
			continue
		}
		e, ok := Claimed(v, id)[v.Self.Node]
		if !ok || numbers[e.Number] {
			continue
		}
		numbers[e.Number] = true
		l := &lead{Network: n, entry: e, block: Block(PoolOf(v.Self), e.Number), aliases: make(map[model.ServiceID]netip.Addr)}
		// Services that publish on other nodes have their places too, so that a label of
		// this node moves nobody.
		var oldest []model.ServiceID
		vips := make(map[model.ServiceID]netip.Addr)
		for sid, s := range v.Services {
			if s.Options[id].Published != "" {
				oldest = append(oldest, sid)
				vips[sid] = s.VIPs[id]
			}
		}
		slices.SortFunc(oldest, func(a, b model.ServiceID) int {
			return cmp.Or(v.Services[a].Created.Compare(v.Services[b].Created), cmp.Compare(a, b))
		})
		for sid, a := range Aliases(l.block, oldest, vips) {
			if enters(v, v.Services[sid].Options[id]) {
				l.aliases[sid] = a
			}
		}
		out[id] = l
	}
	return out
}

// Balanced are the aliases at which service.Plan balances the services that
// publish on this node, sorted.
func Balanced(v model.View) []service.Alias {
	var out []service.Alias
	for id, l := range leads(v) {
		for sid, a := range l.aliases {
			out = append(out, service.Alias{Network: id, Service: sid, Addr: a})
		}
	}
	slices.SortFunc(out, func(a, b service.Alias) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), a.Addr.Compare(b.Addr))
	})
	return out
}

// Plan adds to want what published ports need besides that: the ways from this
// host into its networks, those of answers to all entries, and what tasks do.
func Plan(v model.View, want kernel.State) {
	ls := leads(v)
	for _, l := range ls {
		l.pair(want)
		l.services(v, want)
	}
	if len(ls) > 0 {
		want[kernel.Forward{}] = kernel.ForwardSpec{Devices: overlay.MeshPrefix}
		want[kernel.MeshTable{}] = kernel.MeshTableSpec{Devices: overlay.MeshPrefix}
		won, _ := Own(Wants(v), v.Taken)
		for _, p := range Tried(won, v.Tried) {
			if l := ls[p.Network]; l != nil {
				l.port(p, want)
			}
		}
	}
	for id, n := range v.Networks {
		if !n.Local && n.Gateway.Is4() && !v.Self.NoMesh {
			back(n, Claimed(v, id), PoolOf(v.Self), want)
		}
	}
	tasks(v, want)
}

// pair adds the way from the host to the network's bridge, and back.
//
//	host    slm…: the entry's address; its block by the gateway
//	network mesh0, a port of br0; the block is the namespace's own, so that what
//	        nobody balances is refused, and the refusal leaves by the entry's address
func (l *lead) pair(want kernel.State) {
	ns, end := overlay.NetnsName(l.Network), overlay.MeshEnd(l.Network)
	mac := model.MACFor(l.entry.Addr)
	want[kernel.Link{NS: ns, Name: overlay.MeshName, Kind: kernel.Veth}] = kernel.LinkSpec{
		Alias: overlay.AliasPrefix + string(l.ID),
		// The overlay's, so that the host tells clients outside what fits.
		MTU:     l.MTU,
		Master:  overlay.BridgeName,
		Quiet:   true, // the host answers no ARP for the entry's address by rp_filter: the bridge does
		Peer:    end,
		PeerMAC: mac,
		Kept:    true,
	}
	want[kernel.Addr{Dev: end, Prefix: netip.PrefixFrom(l.entry.Addr, 32)}] = kernel.AddrSpec{}
	want[kernel.Neigh{Dev: end, IP: l.Gateway}] = kernel.NeighSpec{MAC: overlay.RouterMAC(l.Network)}
	want[kernel.Route{Dev: end, Prefix: l.block}] = kernel.RouteSpec{Via: l.Gateway}
	want[kernel.Sysctl{Name: "net.ipv4.conf." + end + "." + routeLocalnet}] = kernel.SysctlSpec{Value: "1"}
	// The table that guards the host from the network is of IPv4, and what a task sends
	// to the MAC here arrives: a datagram to any address of the host, or a router's word
	// that the way to the world is by the task.
	want[kernel.Sysctl{Name: "net.ipv6.conf." + end + ".disable_ipv6"}] = kernel.SysctlSpec{Value: "1"}
	want[kernel.MeshNet{Dev: end}] = kernel.MeshNetSpec{Source: l.entry.Addr, Subnet: l.Subnet.Masked()}

	want[kernel.FDB{NS: ns, Dev: overlay.MeshName, MAC: mac}] = kernel.FDBSpec{}
	want[kernel.Neigh{NS: ns, Dev: overlay.BridgeName, IP: l.entry.Addr}] = kernel.NeighSpec{MAC: mac}
	want[kernel.Route{NS: ns, Dev: overlay.BridgeName, Prefix: l.block}] = kernel.RouteSpec{Local: true}
	want[kernel.Route{NS: ns, Dev: overlay.BridgeName, Prefix: anywhere()}] = kernel.RouteSpec{Via: l.entry.Addr}
}

// services adds what holds for all ports of a service: as whose its tasks see
// connections, and who may make them.
func (l *lead) services(v model.View, want kernel.State) {
	for id, alias := range l.aliases {
		o := v.Services[id].Options[l.ID]
		if o.Source == model.Masquerade {
			want[kernel.MeshMasq{Alias: alias}] = kernel.MeshMasqSpec{}
		}
		if o.Allow != "" {
			// What cannot be read, as another version may have told it, allows nobody.
			var from []string
			for _, p := range o.Allow.List() {
				from = append(from, p.String())
			}
			want[kernel.MeshAllow{Alias: alias}] = kernel.MeshAllowSpec{From: strings.Join(from, " ")}
		}
	}
}

// port adds a range of ports that this node has: one object for all, where tasks have
// them under the same numbers and all addresses of the node lead to them, and one for
// each elsewhere. Neither rules nor elements can do more (kernel.MeshRange).
func (l *lead) port(p Port, want kernel.State) {
	alias, ok := l.aliases[p.Service]
	if !ok {
		return // more services than a block has addresses
	}
	if p.Lo < p.Hi && p.To == p.Lo && !p.Addr.IsValid() {
		want[kernel.MeshRange{Proto: p.Proto, Lo: p.Lo, Hi: p.Hi}] = kernel.MeshRangeSpec{Alias: alias}
		return
	}
	for i := range int(p.Hi-p.Lo) + 1 {
		n := uint16(i)
		want[kernel.MeshPort{Bind: p.Addr, Proto: p.Proto, Port: p.Lo + n}] = kernel.MeshPortSpec{Alias: alias, To: p.To + n}
	}
}

// back adds the way of answers to the node that they leave by; the way to that
// node's address is overlay.Plan's, but on the node itself.
func back(n model.Network, claimed map[model.NodeID]model.Entry, of netip.Prefix, want kernel.State) {
	if len(claimed) == 0 {
		return
	}
	ns := overlay.NetnsName(n)
	want[kernel.BackTable{NS: ns}] = kernel.BackTableSpec{Router: overlay.RouterMAC(n), Pool: of, Bits: blockBits}
	for _, e := range claimed {
		want[kernel.Back{NS: ns, Block: Block(of, e.Number).Addr()}] = kernel.BackSpec{MAC: model.MACFor(e.Addr)}
	}
}

// tasks adds what the tasks of this node do that have published ports. One that
// sees its clients as the entry, which is in the network, needs the route only for
// connections from before it did so. UDP from others asks for more, and one network of
// a task can have it: that of the smallest address.
func tasks(v model.View, want kernel.State) {
	udp := make(map[string]bool) // sandboxes that have it
	ends := slices.SortedFunc(maps.Values(v.Endpoints), func(a, b model.Endpoint) int {
		return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Network, b.Network), cmp.Compare(a.ID, b.ID))
	})
	for _, e := range ends {
		o, published := service.Publishes(v, e)
		mesh := kernel.TaskMesh{Sandbox: e.Sandbox, Addr: e.Addr}
		if !published || want[mesh] != nil { // two networks with one subnet: the first has it
			continue
		}
		n := v.Networks[e.Network]
		loose := o.Source != model.Masquerade && !udp[e.Sandbox] && slices.ContainsFunc(o.Published.List(), func(r model.PortRange) bool {
			return r.Proto == model.UDP
		})
		if loose {
			udp[e.Sandbox] = true
		}
		want[mesh] = kernel.TaskMeshSpec{Pool: PoolOf(v.Self), MAC: e.MAC, Subnet: n.Subnet.Masked(), UDP: loose}
		want[kernel.TaskRoute{Sandbox: e.Sandbox, Addr: e.Addr}] = kernel.TaskRouteSpec{Subnet: n.Subnet.Masked(), Gateway: n.Gateway, Loose: loose, Last: loose && n.Internal}
	}
}
