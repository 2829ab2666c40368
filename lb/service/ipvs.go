package service

import (
	"cmp"
	"net/netip"
	"slices"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// The datapaths, by the names that options and people use.
const (
	IPVS = "ipvs" // the kernel's ip_vs
	NFT  = "nft"  // nftables alone
)

// Datapath is what balances a network's VIPs on this node: IPVS where the node has
// it and the network does not ask for nftables, which every node has. Nodes of
// both kinds share a network, as each chooses for its own clients and all prepare
// their tasks alike.
func Datapath(self model.Self, n model.Network) string {
	if self.Datapath != IPVS || n.Options.Datapath == NFT || !n.Subnet.Addr().Is4() {
		return NFT
	}
	return IPVS
}

// entry is a way to a VIP that IPVS has a service of its own for: one port of it
// or all, from one client or all others.
type entry struct {
	vip, client netip.Addr
	port        model.PortMap // zero: all
}

// entries lists the ways to a service's VIP. Besides those for everybody, each
// local backend has its own, in which it is not: IPVS has no "not the client itself".
func entries(x *Virtual) []entry {
	ports := x.Options.Ports.List()
	if ports == nil {
		ports = []model.PortMap{{}}
	}
	out := make([]entry, 0, 2*len(ports))
	for _, p := range ports {
		out = append(out, entry{vip: x.VIP, port: p})
		for i := range x.Backends {
			if b := &x.Backends[i]; b.Local {
				out = append(out, entry{vip: x.VIP, client: b.Addr, port: p})
			}
		}
	}
	return out
}

// number is a hash of the entry: FNV-1a, 32 bits.
func (e entry) number() uint32 {
	h := uint32(2166136261)
	add := func(bs ...byte) {
		for _, b := range bs {
			h = (h ^ uint32(b)) * 16777619
		}
	}
	vip, client := e.vip.As16(), e.client.As16()
	add(vip[12:]...)
	add(client[12:]...)
	add(e.port.Proto.Number(), byte(e.port.From>>8), byte(e.port.From))
	return h
}

// marksOf gives each entry a firewall mark of its own, which is not 0. It follows
// from the entry, so that a service keeps its mark, and its connections, whatever
// comes and goes beside it. Only of two with the same hash, which among 10,000
// happens on one node of eighty, one takes the next number, and may lose it.
func marksOf(all []entry) map[entry]uint32 {
	slices.SortFunc(all, func(a, b entry) int {
		return cmp.Or(a.vip.Compare(b.vip), a.client.Compare(b.client),
			cmp.Compare(a.port.Proto, b.port.Proto), cmp.Compare(a.port.From, b.port.From))
	})
	out, taken := make(map[entry]uint32, len(all)), make(map[uint32]bool, len(all))
	for _, e := range all {
		n := e.number()
		for n == 0 || taken[n] {
			n++
		}
		out[e], taken[n] = n, true
	}
	return out
}

// ipvsTimeouts are those of the nft datapath: an open connection outlives Linux's
// TCP keepalive of 2 h 11 min, which the kernel's own 15 minutes do not; one that
// is half closed, and UDP, are kept as long as Linux's own tables keep them.
var ipvsTimeouts = kernel.IPVSTimeoutsSpec{TCP: openLife, FIN: 60, UDP: 120}

// openLife is for how many seconds a silent TCP connection is remembered, unless
// a service asks for longer.
const openLife = 3 * 60 * 60

// ipvsSysctls of a network's namespace, each with its reason.
var ipvsSysctls = []struct{ name, value string }{
	// A connection whose backend has gone is reset, and a UDP client gets another
	// backend: without it, their packets vanish until the client gives up.
	{"net.ipv4.vs.expire_nodest_conn", "1"},
	// A client's port that is used again may get another backend, also while IPVS
	// still remembers the connection before (bit 1: in TIME_WAIT; bit 2: in FIN_WAIT,
	// the last state that it sees of one whose answers pass it by).
	{"net.ipv4.vs.conn_reuse_mode", "3"},
	// A persistent client leaves a backend that takes nothing new.
	{"net.ipv4.vs.expire_quiescent_template", "1"},
	// IPVS knows its connections by itself: conntrack would be a second table of
	// them, at a fifth of the speed of new ones.
	{"net.ipv4.vs.conntrack", "0"},
}

// ipvsBalancer adds what every network that IPVS balances has.
func ipvsBalancer(ns string, open int, want kernel.State) {
	want[kernel.MarkTable{NS: ns}] = kernel.MarkTableSpec{}
	timeouts := ipvsTimeouts
	timeouts.TCP = open
	want[kernel.IPVSTimeouts{NS: ns}] = timeouts
	for _, s := range ipvsSysctls {
		want[kernel.Sysctl{NS: ns, Name: s.name}] = kernel.SysctlSpec{Value: s.value}
	}
}

// ipvsVirtual adds what a service's VIP is on this node. The service of a local
// backend stays while the backend does, ready or not, because its connections are
// the service's.
//
// Packets are marked only if there is somebody to take them. Without a mark they
// are the stack's, which refuses: RST, port unreachable.
func ipvsVirtual(ns string, x *Virtual, marks map[entry]uint32, want kernel.State) {
	spec := kernel.IPVSServiceSpec{
		Scheduler: x.Scheduler,
		// Else a client whose place is a leaving backend's would be refused.
		Fallback: x.Scheduler == SH || x.Scheduler == MH,
		Persist:  x.Options.Persist, PersistBits: x.Options.PersistBits,
		// IPVS forgets such a packet at once, and could not translate its answer.
		OnePacket: x.Options.OnePacket && x.Mode != NAT,
	}
	for _, e := range entries(x) {
		fwm := marks[e]
		want[kernel.IPVSService{NS: ns, Mark: fwm}] = spec
		for i := range x.Backends {
			if b := &x.Backends[i]; b.Ready && b.Addr != e.client {
				want[ipvsDest(ns, x, e, fwm, b)] = ipvsDestSpec(x, b, b.Weight)
				want[kernel.Mark{NS: ns, VIP: x.VIP, Client: e.client, Proto: e.port.Proto, Port: e.port.From}] = kernel.MarkSpec{Mark: fwm}
			}
		}
	}
}

// ipvsDest is a backend's place in the service of an entry of x.
func ipvsDest(ns string, x *Virtual, e entry, fwm uint32, b *Backend) kernel.IPVSDest {
	d := kernel.IPVSDest{NS: ns, Mark: fwm, IP: b.Addr}
	if x.Mode == NAT && e.port.To != e.port.From {
		d.Port = e.port.To
	}
	return d
}

func ipvsDestSpec(x *Virtual, b *Backend, weight int) kernel.IPVSDestSpec {
	spec := kernel.IPVSDestSpec{Weight: weight, Method: kernel.IPVSDR, Upper: x.Options.Upper, Lower: x.Options.Lower}
	switch {
	case x.Mode == NAT:
		spec.Method = kernel.IPVSNAT
	case x.Mode == TUN && b.Tunnel:
		// One that has no tunnel yet, or cannot have one, gets the packets bare.
		spec.Method = kernel.IPVSTun
	}
	return spec
}

// ipvsKeep gives the backends of x that are not ready a place with weight 0 in the
// services of the VIP's owner, which may be x itself: what is open goes on.
func ipvsKeep(ns string, owner, x *Virtual, marks map[entry]uint32, want kernel.State) {
	if !slices.ContainsFunc(x.Backends, func(b Backend) bool { return !b.Ready || owner != x }) {
		return // the rule
	}
	for _, e := range entries(owner) {
		for i := range x.Backends {
			b := &x.Backends[i]
			dest := ipvsDest(ns, owner, e, marks[e], b)
			if want[dest] == nil && b.Addr != e.client {
				want[dest] = ipvsDestSpec(owner, b, 0)
				if owner.Mode == NAT {
					want[kernel.LiftFrom{NS: ns, IP: b.Addr}] = kernel.LiftFromSpec{}
				}
			}
		}
	}
}

// ipvsLift adds the way back of answers from the backends of a service whose
// packets get another address.
func ipvsLift(n model.Network, x *Virtual, want kernel.State) {
	ns := overlay.NetnsName(n)
	want[kernel.LiftTable{NS: ns}] = kernel.LiftTableSpec{Router: overlay.RouterMAC(n)}
	want[kernel.Sysctl{NS: ns, Name: forwarding}] = kernel.SysctlSpec{Value: "1"}
	for i := range x.Backends {
		want[kernel.LiftFrom{NS: ns, IP: x.Backends[i].Addr}] = kernel.LiftFromSpec{}
	}
}
