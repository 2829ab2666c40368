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

// way is a way to a VIP that IPVS has a service of its own for: one port of it, all
// of UDP, or all there is, from one client or all others.
type way struct {
	vip, client netip.Addr
	port        model.PortMap // zero: all; with a protocol alone: all of that
	mark        uint32        // what its packets are marked with
	datagrams   bool          // nothing but UDP takes it
}

// waysTo lists the ways to a service's VIP, without marks. Besides those for
// everybody, each local backend has its own, in which it is not: IPVS has no "not
// the client itself". UDP has a way of its own, by which it leaves with its backend:
// see ipvsKeep.
func waysTo(x *Virtual) []way {
	ports := x.Options.Ports.List()
	if ports == nil {
		ports = []model.PortMap{{}}
		if !together(x) {
			ports = append(ports, allOfUDP())
		}
	}
	out := make([]way, 0, 2*len(ports))
	for _, p := range ports {
		udp := p.Proto == model.UDP
		out = append(out, way{vip: x.VIP, port: p, datagrams: udp})
		for i := range x.Backends { // sorted by address, which two may claim
			if b := &x.Backends[i]; b.Local && b.Addr != out[len(out)-1].client {
				out = append(out, way{vip: x.VIP, client: b.Addr, port: p, datagrams: udp})
			}
		}
	}
	return out
}

// waysInto lists the ways to a service at its alias, where only what it publishes
// arrives.
func waysInto(m *meshedVirtual) []way {
	var udp, rest bool
	for _, p := range m.Options.Published.List() {
		udp, rest = udp || p.Proto == model.UDP, rest || p.Proto != model.UDP
	}
	out := []way{{vip: m.at, datagrams: udp && !rest}}
	if udp && rest && !together(&m.Virtual) {
		out = append(out, way{vip: m.at, port: allOfUDP(), datagrams: true})
	}
	return out
}

// allOfUDP is what a way is for that takes the datagrams of all ports.
func allOfUDP() model.PortMap { return model.PortMap{Proto: model.UDP} }

// together says whether the TCP and the UDP of one client have to meet in one service
// of IPVS: where it remembers whom it has chosen, hashes the client's address into a
// table that depends on the order in which backends came, or bounds what a backend has.
func together(x *Virtual) bool {
	switch x.Scheduler {
	case SH, MH, "lblc", "lblcr", "ovf":
		return true
	}
	return x.Options.Persist > 0 || x.Options.Upper > 0 || x.Options.Lower > 0
}

// number is a hash of what the way is: FNV-1a, 32 bits.
func (w *way) number() uint32 {
	h := uint32(2166136261)
	add := func(b byte) { h = (h ^ uint32(b)) * 16777619 }
	for _, a := range [...]netip.Addr{w.vip, w.client} {
		for _, b := range a.As16() {
			add(b)
		}
	}
	add(w.port.Proto.Number())
	add(byte(w.port.From >> 8))
	add(byte(w.port.From))
	return h
}

// maxMark has 31 bits: ipvsadm prints a mark as a signed number.
const maxMark = 1<<31 - 1

// mark gives each way of a network a firewall mark of its own, which is not 0. It
// follows from the way, so that a service keeps its mark, and its connections,
// whatever comes and goes beside it. Only of two with the same hash, which among
// 10,000 happens on one node of forty, one takes the next number, and may lose it: a way
// for all of UDP rather than another, whose connections are open for longer.
func mark(ways []*way) {
	last := func(w *way) int {
		if w.port == allOfUDP() {
			return 1
		}
		return 0
	}
	slices.SortFunc(ways, func(a, b *way) int {
		return cmp.Or(last(a)-last(b), a.vip.Compare(b.vip), a.client.Compare(b.client),
			cmp.Compare(a.port.Proto, b.port.Proto), cmp.Compare(a.port.From, b.port.From))
	})
	taken := make(map[uint32]bool, len(ways))
	for _, w := range ways {
		n := w.number() & maxMark
		for n == 0 || taken[n] {
			n = (n + 1) & maxMark
		}
		w.mark, taken[n] = n, true
	}
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

// ipvsVirtual adds what an address of a service is on this node. The service of a local
// backend stays while the backend does, ready or not, because its connections are
// the service's.
//
// Packets are marked only if there is somebody to take them. Without a mark they
// are the stack's, which refuses: RST, port unreachable.
func ipvsVirtual(ns string, x *Virtual, ways []way, want kernel.State) {
	scheduler, _ := Scheduler(x, IPVS)
	weights := ipvsWeights(x)
	spec := kernel.IPVSServiceSpec{
		Scheduler: scheduler,
		// Else a client whose place is a leaving backend's would be refused.
		Fallback: x.Scheduler == SH || x.Scheduler == MH,
		Persist:  x.Options.Persist, PersistBits: x.Options.PersistBits,
		OnePacket: onePacket(x),
	}
	for i := range ways {
		w := &ways[i]
		want[kernel.IPVSService{NS: ns, Mark: w.mark}] = spec
		served := false
		for j := range x.Backends {
			if b := &x.Backends[j]; b.Ready && b.Addr != w.client {
				want[ipvsDest(ns, w, b)] = ipvsDestSpec(x, b, weights[j])
				served = true
			}
		}
		if served {
			want[kernel.Mark{NS: ns, VIP: w.vip, Client: w.client, Proto: w.port.Proto, Port: w.port.From}] = kernel.MarkSpec{Mark: w.mark}
		}
	}
}

// ipvsWeights are the weights by which IPVS chooses the backends of x, by index.
func ipvsWeights(x *Virtual) []int {
	out := make([]int, len(x.Backends))
	div, sum := 1, 0
	if x.Scheduler == SH && len(out) > 0 {
		div = divisor(x.Backends)
	}
	for i := range x.Backends {
		b := &x.Backends[i]
		switch x.Scheduler {
		case DH:
			out[i] = order(x.VIP, b)
		case FO:
			out[i] = rank(b)
		default:
			out[i] = b.Weight / div
		}
		sum += out[i]
	}
	// A weight is so many of sh's 256 places, in a row: more leave none for the last.
	if x.Scheduler == SH && sum > shPlaces {
		for i := range out {
			out[i] = max(1, out[i]*shPlaces/sum)
		}
	}
	return out
}

// shPlaces is the size of sh's table (IP_VS_SH_TAB_SIZE, by its default).
const shPlaces = 256

// onePacket says whether each UDP packet is balanced by itself. In mode nat it
// cannot be: IPVS forgets such a packet at once, and could not translate its answer.
func onePacket(x *Virtual) bool {
	return x.Options.OnePacket && x.Mode != NAT && !translates(x)
}

// ipvsDest is a backend's place in the service of a way to x. It keeps its method
// and port as long as it lives: IPVS sends what is open as it began, by a route
// that all of the destination's connections share.
func ipvsDest(ns string, w *way, b *Backend) kernel.IPVSDest {
	d := kernel.IPVSDest{NS: ns, Mark: w.mark, IP: b.Addr}
	if to := b.to(w.port); b.Mode == NAT && to != w.port.From {
		d.Port = to
	}
	return d
}

func ipvsDestSpec(x *Virtual, b *Backend, weight int) kernel.IPVSDestSpec {
	spec := kernel.IPVSDestSpec{Weight: weight, Method: kernel.IPVSDR, Upper: x.Options.Upper, Lower: x.Options.Lower}
	switch {
	case b.Mode == NAT:
		spec.Method = kernel.IPVSNAT
	case b.Mode == TUN && b.Tunnel:
		// One that has no tunnel yet, or cannot have one, gets the packets bare.
		spec.Method = kernel.IPVSTun
	}
	return spec
}

// ipvsKeep gives the backends of x that are not ready a place with weight 0 in the
// services of the VIP's owner, which may be x itself: what is open goes on.
//
// UDP has nothing open, and IPVS leads a client's port to the same place for as long as
// that is there: on a way that nothing else takes, datagrams move at once, if somebody
// else is there to take them. Where TCP and UDP go together, they move when the backend
// has gone. So they do in mode nat: with a place, the kernel forgets its connections
// (expire_nodest_conn, since Linux 5.9), and an answer that is under way would come with
// the task's own address.
func ipvsKeep(ns string, owner, x *Virtual, ways []way, want kernel.State) {
	if !slices.ContainsFunc(x.Backends, func(b Backend) bool { return !b.Ready || owner != x }) {
		return // the rule
	}
	for i := range ways {
		w := &ways[i]
		moves := w.datagrams && slices.ContainsFunc(owner.Backends, func(b Backend) bool { return b.Ready && b.Addr != w.client })
		for j := range x.Backends {
			b := &x.Backends[j]
			dest := ipvsDest(ns, w, b)
			if want[dest] != nil || b.gone || b.Addr == w.client || moves && b.Mode != NAT {
				continue
			}
			want[dest] = ipvsDestSpec(owner, b, 0)
		}
	}
}

// ipvsLift adds the way back of answers from the backends of a service whose
// packets get another address.
func ipvsLift(n *network, x *Virtual, want kernel.State) {
	for i := range x.Backends {
		b := &x.Backends[i]
		if b.Mode != NAT || b.gone {
			continue
		}
		want[kernel.LiftTable{NS: n.ns}] = kernel.LiftTableSpec{Router: overlay.RouterMAC(n.Network)}
		want[kernel.Sysctl{NS: n.ns, Name: forwarding}] = kernel.SysctlSpec{Value: "1"}
		want[kernel.LiftFrom{NS: n.ns, IP: b.Addr}] = kernel.LiftFromSpec{}
	}
}
