package overlay

import (
	"maps"
	"net/netip"
	"slices"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Names and marks. An ifalias that begins with AliasPrefix says that a device
// is sluice's; NetnsPrefix says so of a namespace.
const (
	NetnsPrefix = "sluice-"
	AliasPrefix = "sluice "
	// LocalNetnsPrefix is that of networks of one engine. They belong to another
	// process, the alias of the plugin with SCOPE=local, and neither may take the
	// other's namespaces for its own.
	LocalNetnsPrefix = "sluicelocal-"

	BridgeName = "br0"
	VXLANName  = "vxlan0"
	// HostEndPrefix and TaskEndPrefix begin the names of a veth pair's ends. With
	// twelve characters of the endpoint's id they fill the kernel's 15 (IFNAMSIZ-1).
	HostEndPrefix      = "slv"
	TaskEndPrefix      = "slc"
	LocalTaskEndPrefix = "sll"
	// MeshName is the network's end of the pair that published ports come in by, and
	// MeshPrefix begins the name of the host's end; see lb/ingress.
	// Networks of one engine have none; LocalMeshPrefix keeps their plugin's hands off
	// those of the other.
	MeshName        = "mesh0"
	MeshPrefix      = "slm"
	LocalMeshPrefix = "sln"
	// TaskDevPrefix is what the engine names the device inside the container: eth0, eth1, …
	TaskDevPrefix = "eth"
)

// VXLANOverhead is what VXLAN over IPv4 adds to an inner packet, in bytes:
// outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348 section 5).
const VXLANOverhead = 50

// NetnsName is the network's namespace, as `ip netns` shows it.
func NetnsName(n model.Network) string {
	if n.Local {
		return LocalNetnsPrefix + n.ID.Short()
	}
	return NetnsPrefix + n.ID.Short()
}

// HostEnd is the name of the end of an endpoint's veth pair that is the bridge's port.
func HostEnd(id model.EndpointID) string { return HostEndPrefix + id.Short() }

// TaskEnd is the name of the container's end, until the engine renames it.
func TaskEnd(n model.Network, id model.EndpointID) string {
	if n.Local {
		return LocalTaskEndPrefix + id.Short()
	}
	return TaskEndPrefix + id.Short()
}

// MeshEnd is the name of the host's end of the pair that published ports come in by.
func MeshEnd(n model.Network) string { return MeshPrefix + n.ID.Short() }

// RouterMAC is the MAC of a network's bridge: derived from the gateway's
// address, and thus the same on every node and for every life of the node, so
// that no neighbour entry in a container goes stale.
func RouterMAC(n model.Network) model.MAC { return model.MACFor(n.Gateway) }

// Plan adds the objects of all of the view's networks to want.
func Plan(v model.View, want kernel.State) {
	lans := make(map[model.NetworkID]*lan, len(v.Networks))
	vxlan := false
	for id, n := range v.Networks {
		l := &lan{Network: n, ns: NetnsName(n)}
		lans[id] = l
		l.infrastructure(want)
		if !n.Local && v.Self.VTEP.IsValid() {
			vxlan = true
			l.uplink(v.Self, want)
			// Growing by doubling would copy it all.
			l.byAddr = make(map[netip.Addr]*peer, (len(v.Endpoints)+len(v.Remotes))/len(v.Networks))
		}
	}
	for id, e := range v.Endpoints {
		if l := lans[e.Network]; l != nil {
			l.endpoint(id, e, want)
		}
	}
	ways := make(map[netip.Addr]kernel.Value) // one value for each node, which all its endpoints share
	wayTo := func(vtep netip.Addr) kernel.Value {
		way := ways[vtep]
		if way == nil {
			way = kernel.FDBSpec{VTEP: vtep}
			ways[vtep] = way
		}
		return way
	}
	all := make([]peer, 0, len(v.Remotes)) // never grows: pointers into it stay good
	for id, r := range v.Remotes {
		l := lans[r.Network]
		if l == nil || l.byAddr == nil || !r.VTEP.IsValid() || r.VTEP == v.Self.VTEP {
			continue
		}
		all = append(all, peer{id: id, ready: r.Task.Ready, way: wayTo(r.VTEP), addr: r.Addr, mac: r.MAC})
		claim(l.byAddr, r.Addr, &all[len(all)-1])
	}
	for id, es := range v.Entries {
		if l := lans[id]; l != nil && l.byAddr != nil {
			l.entries(v.Self, es, wayTo)
		}
	}
	for _, l := range lans {
		l.remote(want)
	}
	if vxlan {
		filter(v.Self.VXLANPort, ways, want)
	}
}

// lan is a network while its plan is made.
type lan struct {
	model.Network
	ns string
	// byAddr says which remote endpoint has an address; nil is one of this
	// node's own. The map is nil on a network without a tunnel.
	byAddr map[netip.Addr]*peer
	ownMAC []model.MAC // of this node's endpoints
}

// peer is what the way to a remote endpoint is made of.
type peer struct {
	id    model.EndpointID
	ready bool
	way   kernel.Value // kernel.FDBSpec
	addr  netip.Addr
	mac   model.MAC
	entry bool // no endpoint: the node itself
}

// claim gives at to p, unless one has it that wins over p: one of this node, then
// an endpoint, then the one in service, then the smaller id. Two records may speak of
// one address while it moves from task to task; all nodes choose alike.
func claim[K comparable](winners map[K]*peer, at K, p *peer) {
	w, taken := winners[at]
	switch {
	case !taken:
	case w == nil:
		return
	case p.entry != w.entry:
		if p.entry {
			return
		}
	case p.ready != w.ready:
		if w.ready {
			return
		}
	case w.id < p.id:
		return
	}
	winners[at] = p
}

// sysctls of a network's namespace, each with its reason.
var sysctls = []struct{ name, value string }{
	// iptables on bridged frames costs 8-12 % of throughput and would apply the
	// host's idea of filtering to traffic that has its own. Absent where
	// br_netfilter is not loaded, which is as good as 0.
	{"net.bridge.bridge-nf-call-iptables", "0"},
	// A VIP is answered by the bridge and served elsewhere: no redirects about
	// that, and no reverse-path check of what comes back.
	{"net.ipv4.conf.all.send_redirects", "0"},
	{"net.ipv4.conf.default.send_redirects", "0"},
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	// The namespace has no business with IPv6: no router solicitations, no MLD.
	{"net.ipv6.conf.all.disable_ipv6", "1"},
	{"net.ipv6.conf.default.disable_ipv6", "1"},
	// "Refused" must be said every time, not a thousand times a second at most:
	// a service with no backends answers every connection.
	{"net.ipv4.icmp_ratelimit", "0"},
}

func (l *lan) infrastructure(want kernel.State) {
	want[kernel.Netns{Name: l.ns}] = kernel.NetnsSpec{}
	for _, s := range sysctls {
		want[kernel.Sysctl{NS: l.ns, Name: s.name}] = kernel.SysctlSpec{Value: s.value}
	}
	want[kernel.Link{NS: l.ns, Name: BridgeName, Kind: kernel.Bridge}] = kernel.LinkSpec{
		Alias: AliasPrefix + string(l.ID),
		MTU:   l.MTU,
		MAC:   RouterMAC(l.Network),
		Quiet: true, // or a container takes another's MAC by a frame that the guard does not see
	}
	if l.Gateway.IsValid() {
		want[kernel.Addr{NS: l.ns, Dev: BridgeName, Prefix: netip.PrefixFrom(l.Gateway, l.Subnet.Bits())}] = kernel.AddrSpec{}
	}
}

func (l *lan) uplink(self model.Self, want kernel.State) {
	want[kernel.Link{NS: l.ns, Name: VXLANName, Kind: kernel.VXLAN}] = kernel.LinkSpec{
		Alias:  AliasPrefix + string(l.ID),
		MTU:    l.MTU,
		Master: BridgeName,
		Quiet:  true,
		VNI:    l.VNI,
		Port:   self.VXLANPort,
		Local:  self.VTEP,
	}
}

func (l *lan) endpoint(id model.EndpointID, e model.Endpoint, want kernel.State) {
	if l.byAddr != nil {
		l.byAddr[e.Addr] = nil
		l.ownMAC = append(l.ownMAC, e.MAC)
	}
	if e.Phase == model.Created {
		return
	}
	want[kernel.Link{NS: l.ns, Name: HostEnd(id), Kind: kernel.Veth}] = kernel.LinkSpec{
		Alias: AliasPrefix + string(id),
		// In mode tun too, where 20 bytes of it are the outer header's. A veth pair
		// drops without a word what is longer than its receiving end's MTU
		// (net/core/dev.c, ____dev_forward_skb), so a task with a smaller one would
		// get no full IPIP packet. Senders learn from IPVS, by ICMP, what fits.
		MTU:     l.MTU,
		Master:  BridgeName,
		Peer:    TaskEnd(l.Network, id),
		PeerMAC: e.MAC,
		Taken:   e.Phase == model.Taken,
	}
}

// entries adds the other nodes that published ports lead into the network by: each
// has an address there, to which tasks answer. Of nodes with one address the
// smallest id has it, as in lb/ingress, which plans this node's own; others'
// endpoints go before others' claims. All are let in, for those that have no
// address now are about to take another.
func (l *lan) entries(self model.Self, es map[model.NodeID]model.Entry, wayTo func(netip.Addr) kernel.Value) {
	taken := make(map[netip.Addr]bool, len(es))
	for _, node := range slices.Sorted(maps.Keys(es)) {
		e := es[node]
		another := taken[e.Addr]
		taken[e.Addr] = true
		if node == self.Node {
			if !another {
				l.byAddr[e.Addr] = nil
				l.ownMAC = append(l.ownMAC, model.MACFor(e.Addr))
			}
			continue
		}
		if !e.VTEP.IsValid() || e.VTEP == self.VTEP {
			continue
		}
		way := wayTo(e.VTEP)
		if _, has := l.byAddr[e.Addr]; !another && !has && e.Addr != l.Gateway && l.Subnet.Contains(e.Addr) {
			l.byAddr[e.Addr] = &peer{way: way, addr: e.Addr, mac: model.MACFor(e.Addr), entry: true}
		}
	}
}

// remote adds what leads to the remote endpoints that have an address. Those
// with one MAC settle who has it by the same rule.
func (l *lan) remote(want kernel.State) {
	byMAC := make(map[model.MAC]*peer, len(l.byAddr))
	for _, mac := range l.ownMAC {
		byMAC[mac] = nil
	}
	for _, p := range l.byAddr {
		if p != nil {
			claim(byMAC, p.mac, p)
		}
	}
	for _, p := range byMAC {
		if p != nil {
			want[kernel.Neigh{NS: l.ns, Dev: BridgeName, IP: p.addr}] = kernel.NeighSpec{MAC: p.mac}
			want[kernel.FDB{NS: l.ns, Dev: VXLANName, MAC: p.mac}] = p.way
		}
	}
}

// filter lets VXLAN packets in from every node that has an endpoint on a
// network of ours or published ports that lead there, and from nobody else: VXLAN itself authenticates no one.
func filter(port uint16, ways map[netip.Addr]kernel.Value, want kernel.State) {
	want[kernel.Filter{}] = kernel.FilterSpec{Port: port}
	for a := range ways {
		want[kernel.FilterPeer{VTEP: a}] = kernel.FilterPeerSpec{}
	}
}
