package service

import (
	"encoding/binary"
	"net/netip"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// The datapaths, by the names that options and people use.
const (
	IPVS = "ipvs" // the kernel's ip_vs
	NFT  = "nft"  // nftables alone
)

// Datapath is what balances a network's VIPs on this node: IPVS where the network
// asks for it and the node has it, else nftables, which every node has. Nodes of
// both kinds share a network, as each chooses for its own clients and all prepare
// their tasks alike.
//
// A network of more than 65,536 addresses is balanced by nftables everywhere: the
// marks of its services would be longer than the kernel's, see mark.
func Datapath(self model.Self, n model.Network) string {
	if self.Datapath != IPVS || n.Options.Datapath != IPVS || !n.Subnet.Addr().Is4() || n.Subnet.Bits() < 32-markBits {
		return NFT
	}
	return IPVS
}

// markBits is the length of the host's part of an address, so that two fit into a
// firewall mark.
const markBits = 16

// mark is the firewall mark of packets to a VIP from a client with a service of
// its own, or from all others if client is invalid. It follows from the addresses
// alone, so that a service keeps its mark, and its connections, whatever comes and
// goes beside it: the VIP's number in the subnet, with the client's 16 bits above.
// There is no mark, 0, for what is not of the subnet.
func mark(n model.Network, vip, client netip.Addr) uint32 {
	number := func(a netip.Addr) uint32 {
		if !n.Subnet.Contains(a) {
			return 0
		}
		b := a.As4()
		return binary.BigEndian.Uint32(b[:]) & (1<<(32-n.Subnet.Bits()) - 1)
	}
	v := number(vip)
	if !client.IsValid() || v == 0 {
		return v
	}
	c := number(client)
	if c == 0 {
		return 0
	}
	return v | c<<markBits
}

// ipvsTimeouts are those of the nft datapath: an open connection outlives Linux's
// TCP keepalive of 2 h 11 min, which the kernel's own 15 minutes do not; one that
// is half closed, and UDP, are kept as long as Linux's own tables keep them.
var ipvsTimeouts = kernel.IPVSTimeoutsSpec{TCP: 3 * 60 * 60, FIN: 60, UDP: 120}

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
}

// ipvsBalancer adds what every network that IPVS balances has.
func ipvsBalancer(ns string, want kernel.State) {
	want[kernel.MarkTable{NS: ns}] = kernel.MarkTableSpec{}
	want[kernel.IPVSTimeouts{NS: ns}] = ipvsTimeouts
	for _, s := range ipvsSysctls {
		want[kernel.Sysctl{NS: ns, Name: s.name}] = kernel.SysctlSpec{Value: s.value}
	}
}

// ipvsVirtual adds what a service's VIP is on this node. Besides the service for
// everybody, each local backend has one of its own, in which it is not: it must
// not be given itself. That service stays while the backend does, ready or not,
// because its connections are the service's.
//
// Packets are marked only if there is somebody to take them. Without a mark they
// are the stack's, which refuses: RST, port unreachable.
func ipvsVirtual(n model.Network, x *Virtual, want kernel.State) {
	ns := overlay.NetnsName(n)
	add := func(client netip.Addr) {
		fwm := mark(n, x.VIP, client)
		if fwm == 0 {
			return
		}
		want[kernel.IPVSService{NS: ns, Mark: fwm}] = kernel.IPVSServiceSpec{
			Scheduler: x.Scheduler,
			// Else a client whose place is a leaving backend's would be refused.
			Fallback: x.Scheduler == SH || x.Scheduler == MH,
		}
		for i := range x.Backends {
			if b := &x.Backends[i]; b.Ready && b.Addr != client {
				want[kernel.IPVSDest{NS: ns, Mark: fwm, IP: b.Addr}] = kernel.IPVSDestSpec{Weight: b.Weight, Method: kernel.IPVSDR}
				want[kernel.Mark{NS: ns, VIP: x.VIP, Client: client}] = kernel.MarkSpec{Mark: fwm}
			}
		}
	}
	add(netip.Addr{})
	for i := range x.Backends {
		if b := &x.Backends[i]; b.Local {
			add(b.Addr)
		}
	}
}

// ipvsKeep gives the backends of every service with a VIP that are not ready a
// place in the services of that VIP, with weight 0: what is open goes on.
func ipvsKeep(n model.Network, x *Virtual, want kernel.State) {
	ns := overlay.NetnsName(n)
	for i := range x.Backends {
		b := &x.Backends[i]
		keep := func(client netip.Addr) {
			svc := kernel.IPVSService{NS: ns, Mark: mark(n, x.VIP, client)}
			dest := kernel.IPVSDest{NS: ns, Mark: svc.Mark, IP: b.Addr}
			if want[svc] != nil && want[dest] == nil && b.Addr != client {
				want[dest] = kernel.IPVSDestSpec{Weight: 0, Method: kernel.IPVSDR}
			}
		}
		keep(netip.Addr{})
		for j := range x.Backends {
			if c := &x.Backends[j]; c.Local {
				keep(c.Addr)
			}
		}
	}
}
