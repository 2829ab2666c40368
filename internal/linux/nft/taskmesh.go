package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// How a task takes packets of the routing mesh (kernel.TaskMesh): by the alias's
// pool and the frame's MAC, which says by which network they came. Ports stay: the
// entry has named the task's.
//
//	prerouting  to an alias, to the MAC of a network ─▶ the address on that network
//
// A UDP server that is bound to no address answers from its default route's, because
// it does not know where it was asked. So its clients are led to that address, and
// to the task's own if the server is bound to that; the answer's source becomes the
// task's own, which has it routed back the way that the question came:
//
//	look    a new datagram ─▶ look-at    Default, or own, wherever there is a socket
//	prerouting             ─▶ mesh       translate to what was found
//	nobody  no socket      ─▶ nobody-at  refuse, and forget: the next may find one
//	reply   the answer, or an ICMP error: from the task's own address; route again
//
// What comes from within the network (masqueraded) is answered by its own device
// whatever the server is bound to.

const (
	chainMesh     = "mesh"
	chainLook     = "look"
	chainLookAt   = "look-at"
	chainNobody   = "nobody"
	chainNobodyAt = "nobody-at"
	chainReply    = "reply"
)

const (
	lookPriority  = taskPriority - 10 // before the translation, behind conntrack
	replyPriority = -150              // behind conntrack, which is to see the answer as it was sent
)

// ipDirReply is IP_CT_DIR_REPLY.
const ipDirReply = 1

// meshed is a TaskMesh.
type meshed struct {
	addr netip.Addr
	spec kernel.TaskMeshSpec
}

// text is what the first rule of it says: all of it, in no more octets than a
// comment has room for.
func (m meshed) text() string {
	s := fmt.Sprintf("mesh %s from %s at %s in %s", m.addr, m.spec.Pool, m.spec.MAC, m.spec.Subnet)
	if m.spec.UDP {
		s += " udp " + m.spec.Default.String()
	}
	return s
}

// parseMeshed is the reverse of text.
func parseMeshed(text string) (m meshed, ok bool) {
	f := strings.Fields(text)
	if len(f) != 8 && len(f) != 10 {
		return m, false
	}
	var errs [5]error
	m.addr, errs[0] = netip.ParseAddr(f[1])
	m.spec.Pool, errs[1] = netip.ParsePrefix(f[3])
	m.spec.MAC, errs[2] = model.ParseMAC(f[5])
	m.spec.Subnet, errs[3] = netip.ParsePrefix(f[7])
	if m.spec.UDP = len(f) == 10; m.spec.UDP {
		m.spec.Default, errs[4] = netip.ParseAddr(f[9])
	}
	for _, err := range errs {
		if err != nil {
			return m, false
		}
	}
	return m, m.text() == text && m.check() == nil
}

// check refuses what cannot be in a table.
func (m meshed) check() error {
	if err := checkPrefix("pool", m.spec.Pool); err != nil {
		return err
	}
	if err := checkPrefix("subnet", m.spec.Subnet); err != nil {
		return err
	}
	if !m.addr.Is4() || m.spec.UDP && !m.spec.Default.Is4() {
		return fmt.Errorf("address %s, default %s: want IPv4: %w", m.addr, m.spec.Default, kernel.ErrUnsupported)
	}
	return nil
}

// toAlias matches packets of the mesh: connections to an alias.
func (m meshed) toAlias() []expr.Any {
	return inPrefix(&expr.Ct{Key: expr.CtKeyDST, Register: r0, Direction: 0}, m.spec.Pool)
}

// byDevice matches what came by the task's device on the network.
func (m meshed) byDevice() []expr.Any {
	return part(etherDaddr(r0), is(r0, m.spec.MAC[:]...))
}

// to translates to an address.
func to(a netip.Addr) []expr.Any {
	return part(&expr.Immediate{Register: r0, Data: octets(a)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r0})
}

// rules are those of one network.
func (m meshed) rules() []rule {
	if !m.spec.UDP {
		return []rule{newRule(chainPrerouting, m.text(), m.toAlias(), m.byDevice(), to(m.addr))}
	}
	udp := protocol(unix.IPPROTO_UDP)
	isNew := part(&expr.Ct{Key: expr.CtKeySTATE, Register: r0}, mask(r0, native(expr.CtStateBitNEW)...), isNot(r0, 0, 0, 0, 0))
	// The expression ends the rule where there is no socket; what it says of one is nothing to us.
	socket := part(&expr.Socket{Key: expr.SocketKeyTransparent, Register: r0})
	from, write := ipSaddr(r0), func(at uint32, a netip.Addr) []expr.Any {
		return part(&expr.Immediate{Register: r0, Data: octets(a)}, setIP(at, r0))
	}
	return []rule{
		newRule(chainPrerouting, m.text(), m.toAlias(), m.byDevice(), goTo(chainMesh)),
		newRule(chainMesh, "from within", inPrefix(from, m.spec.Subnet), to(m.addr)),
		newRule(chainMesh, "UDP to the default", udp, part(ipDaddr(r0), is(r0, octets(m.spec.Default)...)), to(m.spec.Default)),
		newRule(chainMesh, "to its own", to(m.addr)),

		newRule(chainLook, "new datagrams", isNew, udp, inPrefix(ipDaddr(r0), m.spec.Pool),
			notInPrefix(from, m.spec.Subnet), m.byDevice(), goTo(chainLookAt)),
		newRule(chainLookAt, "at the default", write(ipDst, m.spec.Default)),
		newRule(chainLookAt, "somebody there", socket, ret()),
		newRule(chainLookAt, "at its own", write(ipDst, m.addr)),
		newRule(chainLookAt, "somebody there", socket, ret()),
		newRule(chainLookAt, "nobody", write(ipDst, m.spec.Default)),

		newRule(chainNobody, "new datagrams", isNew, udp, m.toAlias(), goTo(chainNobodyAt)),
		newRule(chainNobodyAt, "somebody there", socket, ret()),
		newRule(chainNobodyAt, "refuse", part(&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: portUnreachable})),

		// Not those that another of the task's networks has led to its own address.
		newRule(chainReply, "answers", udp, part(ipSaddr(r0), is(r0, octets(m.spec.Default)...)),
			part(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: r0}, is(r0, ipDirReply)), m.toAlias(), write(ipSrc, m.addr)),
		newRule(chainReply, "errors", protocol(unix.IPPROTO_ICMP), part(ipSaddr(r0), is(r0, octets(m.spec.Default)...)),
			part(&expr.Ct{Key: expr.CtKeySTATE, Register: r0}, mask(r0, native(expr.CtStateBitRELATED)...), isNot(r0, 0, 0, 0, 0)),
			m.toAlias(), write(ipSrc, m.addr)),
	}
}

// portUnreachable is ICMP_PORT_UNREACH (RFC 792).
const portUnreachable = 3

// udpChains are the chains that UDP needs besides.
func udpChains() []chain {
	return []chain{
		{name: chainLook, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: lookPriority},
		{name: chainNobody, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_LOCAL_IN, priority: guardPriority},
		{name: chainReply, typ: nftables.ChainTypeRoute, hook: unix.NF_INET_LOCAL_OUT, priority: replyPriority},
		{name: chainMesh}, {name: chainLookAt}, {name: chainNobodyAt},
	}
}

// withMesh is the task's table with these networks, in the order of addresses.
func withMesh(rs ruleset, meshes []meshed) ruleset {
	slices.SortFunc(meshes, func(a, b meshed) int { return a.addr.Compare(b.addr) })
	var rules []rule
	for _, m := range meshes {
		rules = append(rules, m.rules()...)
		if m.spec.UDP {
			rs.chains = append(rs.chains, udpChains()...)
		}
	}
	rs.rules = append(rules, rs.rules...) // mesh first: an alias is no VIP
	return rs
}

// foundMeshes reads the networks from the rules' texts. Whether the rules are what
// they say, the ruleset with them tells.
func foundMeshes(f found) []meshed {
	var out []meshed
	for _, c := range f.rules[chainPrerouting] {
		if m, ok := parseMeshed(uncomment(c)); ok {
			out = append(out, m)
		}
	}
	return out
}

// meshOps are the networks that a table has after ops on TaskMeshes, given those
// that it has now.
func meshOps(have []meshed, ops []kernel.Op) ([]meshed, error) {
	all := map[netip.Addr]kernel.TaskMeshSpec{}
	for _, m := range have {
		all[m.addr] = m.spec
	}
	for _, op := range ops {
		k, ok := op.Key.(kernel.TaskMesh)
		if !ok {
			continue
		}
		_, want, err := cast[kernel.TaskMeshSpec](op)
		if err != nil {
			return nil, err
		}
		if op.Want == nil {
			delete(all, k.Addr)
			continue
		}
		if err := (meshed{k.Addr, want}).check(); err != nil {
			return nil, fmt.Errorf("%s: %w", k, err)
		}
		all[k.Addr] = want
	}
	out := make([]meshed, 0, len(all))
	for a, s := range all {
		out = append(out, meshed{a, s})
	}
	slices.SortFunc(out, func(a, b meshed) int { return a.addr.Compare(b.addr) })
	udp := slices.DeleteFunc(slices.Clone(out), func(m meshed) bool { return !m.spec.UDP })
	if len(udp) > 1 {
		return nil, fmt.Errorf("UDP is published on the networks of %s and %s; one for each task %w", udp[0].addr, udp[1].addr, kernel.ErrUnsupported)
	}
	return out, nil
}
