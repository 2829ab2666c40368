package nft

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// liftTable is the table of family bridge that takes answers out of the bridge.
const liftTable = "sluice-lift"

// The sets of table bridge sluice-lift. Apply writes them.
const (
	setLiftFrom = "from" // ip saddr: backends
	setLiftTo   = "to"   // ip daddr: endpoints of this node
)

// liftPriority is behind the chains of table bridge sluice: while a network goes
// from one datapath to the other, an answer that has got its VIP back there is
// none to be lifted.
const liftPriority = bridgePriority + 2

// liftRuleset is table bridge sluice-lift.
//
//	client ─▶ br0 ─▶ stack: IPVS, to the backend's address ─▶ br0 ─▶ backend
//	client ◀─ br0 ◀─ stack: IPVS, from the VIP ◀─ forward ◀─ lifted ◀─ br0 ◀─ backend
//
// A backend's answer is for the client's address, and its frame for the client's
// MAC: the bridge would pass it on as it is. With the bridge's own MAC, it goes to
// the stack, which forwards it, through IPVS, to the client. The stack's frames go
// out by hook output, so none is lifted twice.
//
// Which frames are answers, only IPVS knows: what a backend sends to a client of
// its own accord is forwarded just as well, with the same addresses. All that it
// shows is one hop more (TTL) and the bridge's MAC as the sender's. The rest of
// the bridge's traffic, broadcasts among it, is not touched.
//
// The namespace must forward for that (net.ipv4.ip_forward), and must not tell
// the backends of the direct way (send_redirects).
func liftRuleset(spec kernel.LiftTableSpec) ruleset {
	ip := []nftables.SetDatatype{nftables.TypeIPAddr}
	return ruleset{
		family: bridgeFamily, table: liftTable,
		sets: []set{{name: setLiftFrom, key: ip}, {name: setLiftTo, key: ip}},
		chains: []chain{
			{name: chainPrerouting, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: liftPriority},
		},
		rules: []rule{
			newRule(chainPrerouting, liftText(spec),
				isIPv4(), part(ipSaddr(r0), inSet(r0, setLiftFrom), ipDaddr(r0), inSet(r0, setLiftTo)),
				// To one station: bit 0 of the first octet is that of groups (IEEE 802.3).
				part(load(expr.PayloadBaseLLHeader, 0, 1, r0), mask(r0, 1), is(r0, 0)),
				part(&expr.Immediate{Register: r0, Data: spec.Router[:]}, setEtherDaddr(r0)),
				setPktType(unix.PACKET_HOST)),
		},
	}
}

// isIPv4 matches frames that carry IPv4 (ETH_P_IP).
func isIPv4() []expr.Any {
	return part(&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: r0}, is(r0, 0x08, 0x00))
}

// liftText is the text of the rule; it carries the table's spec.
func liftText(spec kernel.LiftTableSpec) string { return "answers to the stack, " + spec.String() }

// parseLiftText is the reverse of liftText.
func parseLiftText(s string) (kernel.LiftTableSpec, bool) {
	mac, err := model.ParseMAC(s[strings.LastIndex(s, " ")+1:])
	spec := kernel.LiftTableSpec{Router: mac}
	return spec, err == nil && liftText(spec) == s
}

// liftLayout is table bridge sluice-lift of namespace ns.
func liftLayout(ns string) layout[kernel.LiftTableSpec] {
	return layout[kernel.LiftTableSpec]{
		key: kernel.LiftTable{NS: ns}, rules: liftRuleset, parse: parseLiftText,
		sets: []string{setLiftFrom, setLiftTo}, owns: ofLift, load: liftStates, op: (*change).liftOp,
	}
}

// liftStates adds what the sets hold.
func liftStates(f found, ns string, st kernel.State) error {
	for key := range f.elems[setLiftFrom] {
		if ip, ok := keyIP(key, 0); ok {
			st[kernel.LiftFrom{NS: ns, IP: ip}] = kernel.LiftFromSpec{}
		}
	}
	for key := range f.elems[setLiftTo] {
		if ip, ok := keyIP(key, 0); ok {
			st[kernel.LiftTo{NS: ns, IP: ip}] = kernel.LiftToSpec{}
		}
	}
	return nil
}

// liftOp adds an operation on a LiftFrom or LiftTo.
func (c *change) liftOp(op kernel.Op) error {
	var ip netip.Addr
	var set string
	switch k := op.Key.(type) {
	case kernel.LiftFrom:
		ip, set = k.IP, setLiftFrom
	case kernel.LiftTo:
		ip, set = k.IP, setLiftTo
	default:
		return fmt.Errorf("%s is not of table bridge %s", k, liftTable)
	}
	if err := want4(op.Key, ip); err != nil {
		return err
	}
	c.elem(op, set, ipKey(ip), "", "")
	return nil
}

// ofLift reports whether an object is in table bridge sluice-lift.
func ofLift(k kernel.Key) bool {
	switch k.(type) {
	case kernel.LiftTable, kernel.LiftFrom, kernel.LiftTo:
		return true
	}
	return false
}
