package ingress

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// Bits of an address of the mesh's pool: 8 say that it is one, 12 which entry, 12
// which service.
const (
	poolBits  = 8
	blockBits = 20
	// maxNumber is the last block; block 0 is left out, so that no number is no claim.
	maxNumber = 1<<(blockBits-poolBits) - 1
	// services is how many addresses a block has.
	services = 1 << (32 - blockBits)
)

// DefaultPool is where blocks come from unless a setting says another. The mesh
// needs 24 bits of its own: 240.0.0.0/4 is nobody's network (RFC 1112 section 4),
// and ordinary unicast to Linux.
func DefaultPool() netip.Prefix { return netip.MustParsePrefix("250.0.0.0/8") }

// PoolOf is where blocks come from on this node.
func PoolOf(self model.Self) netip.Prefix {
	if self.MeshPool.IsValid() {
		return self.MeshPool
	}
	return DefaultPool()
}

// ParsePool reads the setting of the pool.
func ParsePool(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || !p.Addr().Is4() || p.Bits() != poolBits || p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("mesh pool %q is no IPv4 prefix of length %d, such as %s", s, poolBits, DefaultPool())
	case p.Addr().IsUnspecified() || p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().As4()[0] == 255 || p.Addr().As4()[0] > 224 && p.Addr().As4()[0] < 240:
		return netip.Prefix{}, fmt.Errorf("mesh pool %s has no unicast addresses; one like %s is wanted", p, DefaultPool())
	}
	return p, nil
}

// Block is the addresses that the entry with a number has for services. It is
// invalid for a number that is none.
func Block(of netip.Prefix, number uint16) netip.Prefix {
	if number == 0 || number > maxNumber || !of.Addr().Is4() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(plus(of.Masked().Addr(), uint32(number)<<(32-blockBits)), blockBits)
}

func plus(a netip.Addr, n uint32) netip.Addr {
	b := a.As4()
	var out [4]byte
	binary.BigEndian.PutUint32(out[:], binary.BigEndian.Uint32(b[:])+n)
	return netip.AddrFrom4(out)
}

// Claims decides what this node claims of each network that its published ports
// lead into. A claim that it has is kept, unless another node with a smaller id
// has taken the same. A network with no room left, or in the mesh's own pool, is told in
// the second result, and has no claim. While the view is partial, claims stay as they are.
func Claims(v model.View) (map[model.NetworkID]model.Entry, map[model.NetworkID]error) {
	out := make(map[model.NetworkID]model.Entry)
	self := v.Self.Node
	if self == "" || v.Partial {
		for id, es := range v.Entries {
			if e, ok := es[self]; ok && self != "" {
				out[id] = e
			}
		}
		return out, nil
	}
	var nets []model.NetworkID
	errs := make(map[model.NetworkID]error)
	for _, id := range Entered(v) {
		n, here := v.Networks[id]
		switch of := PoolOf(v.Self); {
		case !here:
		case n.Subnet.IsValid() && n.Subnet.Overlaps(of):
			errs[id] = fmt.Errorf("network %s has subnet %s, which is in the mesh's pool %s; set MESH_POOL to what no network has, on all nodes", id.Short(), n.Subnet, of)
		default:
			nets = append(nets, id)
		}
	}
	numbers := make(map[uint16]bool) // of this node's own networks
	for _, id := range nets {
		had, ok := v.Entries[id][self]
		if !ok {
			continue
		}
		kept := model.Entry{VTEP: v.Self.VTEP}
		if usable(v, id, had.Addr) && !clash(v, id, func(e model.Entry) bool { return e.Addr == had.Addr }) {
			kept.Addr = had.Addr
		}
		if had.Number != 0 && had.Number <= maxNumber && !numbers[had.Number] &&
			!clash(v, id, func(e model.Entry) bool { return e.Number == had.Number }) {
			kept.Number = had.Number
			numbers[had.Number] = true
		}
		out[id] = kept
	}
	for _, id := range nets {
		e := out[id]
		e.VTEP = v.Self.VTEP
		if !e.Addr.IsValid() {
			e.Addr = address(v, id)
		}
		if e.Number == 0 {
			e.Number = number(v, id, numbers)
			numbers[e.Number] = true
		}
		if e.Addr.IsValid() && e.Number != 0 {
			out[id] = e
			continue
		}
		delete(out, id)
		errs[id] = noRoom(v.Networks[id])
	}
	return out, errs
}

// Claimed are the entries of a network whose claims hold: a node that shares its
// address or its number with one of a smaller id is about to take another, and has
// none until then. No two of the result have anything in common.
func Claimed(v model.View, id model.NetworkID) map[model.NodeID]model.Entry {
	out := make(map[model.NodeID]model.Entry, len(v.Entries[id]))
	addrs, numbers := make(map[netip.Addr]bool), make(map[uint16]bool)
	for _, node := range slices.Sorted(maps.Keys(v.Entries[id])) {
		e := v.Entries[id][node]
		if !addrs[e.Addr] && !numbers[e.Number] && e.Number != 0 && e.Number <= maxNumber && e.VTEP.IsValid() && usable(v, id, e.Addr) {
			out[node] = e
		}
		addrs[e.Addr], numbers[e.Number] = true, true
	}
	return out
}

func noRoom(n model.Network) error {
	if _, ok := pool.NodeRange(n.Subnet); !ok {
		return fmt.Errorf("network %s has no addresses for nodes that publish ports: its subnet %s is smaller than a /24; make the network with a larger one", n.ID.Short(), n.Subnet)
	}
	return fmt.Errorf("network %s has no address left for one more node that publishes ports: its subnet %s keeps a sixteenth for them; make the network with a larger one, or publish on fewer nodes", n.ID.Short(), n.Subnet)
}

// clash reports whether the claim of a node with a smaller id is such.
func clash(v model.View, id model.NetworkID, such func(model.Entry) bool) bool {
	for node, e := range v.Entries[id] {
		if node < v.Self.Node && such(e) {
			return true
		}
	}
	return false
}

// usable reports whether an address is one that nodes may have in a network. The
// last of the subnet is for broadcasts, and a gateway can be chosen by people.
func usable(v model.View, id model.NetworkID, a netip.Addr) bool {
	n := v.Networks[id]
	nodes, ok := pool.NodeRange(n.Subnet)
	return ok && nodes.Contains(a) && a != n.Gateway && nodes.Contains(a.Next())
}

// address is the first free address from the place that follows from the node's
// id; invalid if there is none.
func address(v model.View, id model.NetworkID) netip.Addr {
	nodes, ok := pool.NodeRange(v.Networks[id].Subnet)
	if !ok {
		return netip.Addr{}
	}
	used := make(map[netip.Addr]bool)
	for node, e := range v.Entries[id] {
		if node != v.Self.Node {
			used[e.Addr] = true
		}
	}
	size := uint32(1) << (32 - nodes.Bits())
	start := place(v.Self.Node, id) % size
	for i := range size {
		a := plus(nodes.Addr(), (start+i)%size)
		if !used[a] && usable(v, id, a) {
			return a
		}
	}
	return netip.Addr{}
}

// number is the first free number, likewise; 0 if there is none. One that is not taken
// in any network is better: a task on two networks, to which one client comes by two
// entries of one number, would have to tell its connections apart by the ports alone.
func number(v model.View, id model.NetworkID, own map[uint16]bool) uint16 {
	used, elsewhere := maps.Clone(own), make(map[uint16]bool)
	for network, entries := range v.Entries {
		for node, e := range entries {
			if network == id && node != v.Self.Node {
				used[e.Number] = true
			}
			elsewhere[e.Number] = true
		}
	}
	start, found := place(v.Self.Node, id)%maxNumber, uint16(0)
	for i := range uint32(maxNumber) {
		n := uint16((start+i)%maxNumber) + 1
		switch {
		case used[n]:
		case !elsewhere[n]:
			return n
		case found == 0:
			found = n
		}
	}
	return found
}

// place spreads nodes: if all took the smallest that is free, a swarm that begins
// to publish would need as many rounds of gossip as it has nodes.
func place(node model.NodeID, network model.NetworkID) uint32 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(node))
	_, _ = h.Write([]byte{0})
	_, _ = h.Write([]byte(network))
	return h.Sum32()
}

// Aliases gives each service of a network an address of this node's block, in the
// order given, oldest first: the one with the low bits of the service's virtual IP,
// which in a subnet of /20 or smaller no other virtual IP has; else the next that is
// free. So a service that comes moves none that is there, whose connections would end;
// one that goes may move a younger one that it was in the way of. vips has the zero
// address for services of endpoint mode dnsrr, whose place follows from the id. A block
// holds 4,095; who comes after that has none.
func Aliases(block netip.Prefix, oldest []model.ServiceID, vips map[model.ServiceID]netip.Addr) map[model.ServiceID]netip.Addr {
	out := make(map[model.ServiceID]netip.Addr, len(oldest))
	if !block.Addr().Is4() || block.Bits() != blockBits {
		return out
	}
	taken := map[netip.Addr]bool{block.Addr(): true} // the first stands for the block
	for _, id := range oldest {
		start := place(model.NodeID(id), "")
		if vip := vips[id]; vip.Is4() {
			b := vip.As4()
			start = binary.BigEndian.Uint32(b[:])
		}
		for i := range uint32(services) {
			if a := plus(block.Addr(), (start+i)%services); !taken[a] {
				out[id], taken[a] = a, true
				break
			}
		}
	}
	return out
}
