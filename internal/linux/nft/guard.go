package nft

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// guardTable is the table of family bridge that drops what containers say in the
// name of others.
const guardTable = "sluice-guard"

// The maps of table bridge sluice-guard. Apply writes them.
const (
	mapGuardPorts = "ports"     // iifname . ether saddr -> guardPlain or guardAliases
	mapGuardAddrs = "addresses" // iifname . ip saddr . ether saddr -> guardOwn or guardVIP
)

const chainDoubts = "doubts" // of frames that are not the usual

// What an element says; it is a number in the machine's order, as all of type mark.
const (
	guardOwn, guardVIP       = 1, 2
	guardPlain, guardAliases = 1, 2
)

// claimPriority is before all other tables: they rewrite frames, and take what they
// see for true.
const claimPriority = backPriority - 1

// guardRuleset is table bridge sluice-guard.
//
//	slv… ─▶ IPv4, from an address of this port ────────────────▶ on
//	      └▶ doubts: ARP by the port's own address ─────────────▶ on
//	                 ARP that only asks whether an address is free ▶ on
//	                 IPv4 from an alias, the port answers by them ─▶ on
//	                 all else ─▶ counted, dropped
//
// Nearly every frame ends at the first rule: one look into one map, of port, address
// and MAC at once. What comes by other ports meets two comparisons. It takes 2 to 3 % of
// the processor's time for a round trip of 23 µs between two tasks of a host, 0.5 to
// 0.7 µs of which the hook alone is a third to a half, and of a new connection less than
// can be told from noise (BenchmarkGuard).
//
// An open table has a first rule that everything passes.
//
// Frames to the groups that bridges keep for themselves (IEEE 802.1Q 8.6.3) pass no
// table. They are forwarded nowhere, the namespace's stack does not balance, forward or
// refuse what came to a group, and the bridge must not learn from them:
// kernel.LinkSpec.Quiet.
func guardRuleset(spec kernel.GuardTableSpec) ruleset {
	var (
		ifname, ip, mac, mark = nftables.TypeIFName, nftables.TypeIPAddr, nftables.TypeEtherAddr, nftables.TypeMark
		types                 = func(t ...nftables.SetDatatype) []nftables.SetDatatype { return t }
		counted               = part(&expr.Counter{})
	)
	// The port's name fills r0 to r3; it stays there for the key of a map.
	guarded := part(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: r0}, is(r0, []byte(spec.Ports)...))
	protocol := func(high, low byte) []expr.Any {
		return part(&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: r7}, is(r7, high, low))
	}
	ipv4, arp := protocol(0x08, 0x00), protocol(0x08, 0x06) // ETH_P_IP, ETH_P_ARP
	// The fields of ARP (RFC 826) for IPv4 on Ethernet: hardware 1, protocol 0x0800,
	// lengths 6 and 4; the sender's addresses are at 8 and 14.
	arpIPv4 := part(load(expr.PayloadBaseNetworkHeader, 0, 6, r4), is(r4, 0, 1, 8, 0, 6, 4))
	arpSHA := func(reg uint32) expr.Any { return load(expr.PayloadBaseNetworkHeader, 8, 6, reg) }
	arpSPA := func(reg uint32) expr.Any { return load(expr.PayloadBaseNetworkHeader, 14, 4, reg) }
	in := func(name string, n int, key ...expr.Any) []expr.Any {
		return append(part(key...), mapped(r0, r7, name), is(r7, []byte(slotKey(n))...))
	}
	first := newRule(chainPrerouting, guardText(spec), guarded, ipv4,
		part(ipSaddr(r4), etherSaddr(r5), mapped(r0, r7, mapGuardAddrs)), accept())
	if spec.Open {
		first = newRule(chainPrerouting, guardText(spec), accept())
	}
	return ruleset{
		family: bridgeFamily, table: guardTable,
		sets: []set{
			{name: mapGuardPorts, key: types(ifname, mac), data: mark},
			{name: mapGuardAddrs, key: types(ifname, ip, mac), data: mark},
		},
		chains: []chain{
			{name: chainPrerouting, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: claimPriority},
			{name: chainDoubts},
		},
		rules: []rule{
			first,
			newRule(chainPrerouting, "containers", guarded, goTo(chainDoubts)),

			newRule(chainDoubts, "ARP, own address", guarded, arp, arpIPv4,
				in(mapGuardAddrs, guardOwn, arpSPA(r4), etherSaddr(r5)), in(mapGuardAddrs, guardOwn, arpSHA(r5)), accept()),
			newRule(chainDoubts, "ARP, a probe", guarded, arp, arpIPv4, part(arpSPA(r4), is(r4, 0, 0, 0, 0)),
				part(etherSaddr(r4), mapped(r0, r7, mapGuardPorts)), part(arpSHA(r4), mapped(r0, r7, mapGuardPorts)), accept()),
			newRule(chainDoubts, "answer of a published port", guarded, ipv4,
				part(ipSaddr(r4), mask(r4, netMask(spec.Pool.Bits())...), is(r4, octets(spec.Pool.Addr())...)),
				in(mapGuardPorts, guardAliases, etherSaddr(r4)), accept()),
			newRule(chainDoubts, "ARP for others", arp, counted, drop()),
			newRule(chainDoubts, "IPv4 from others", ipv4, counted, drop()),
			newRule(chainDoubts, "neither", counted, drop()),
		},
	}
}

// guardText is the text of the first rule; it carries the table's spec.
func guardText(spec kernel.GuardTableSpec) string { return "from its own, " + spec.String() }

// parseGuardText is the reverse of guardText.
func parseGuardText(s string) (kernel.GuardTableSpec, bool) {
	f := strings.Fields(s)
	if len(f) < 7 {
		return kernel.GuardTableSpec{}, false
	}
	pool, err := netip.ParsePrefix(f[6])
	spec := kernel.GuardTableSpec{Ports: f[4], Pool: pool, Open: len(f) > 7}
	return spec, err == nil && checkGuard(spec) == nil && guardText(spec) == s
}

// checkGuard refuses what cannot be in a table, or would not read back as it was given.
func checkGuard(s kernel.GuardTableSpec) error {
	if err := checkDevice(s.Ports); err != nil {
		return err
	}
	return checkPrefix("pool", s.Pool)
}

// checkDevice refuses what no name of a device is or begins with.
func checkDevice(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("%q is no name of a device; want 1 to %d characters, none of them blank", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// devKey is a device's name as part of a key.
func devKey(name string) string { return name + strings.Repeat("\x00", unix.IFNAMSIZ-len(name)) }

// keyDev is the reverse, of the key's beginning.
func keyDev(key string) (name string, ok bool) {
	if len(key) < unix.IFNAMSIZ {
		return "", false
	}
	name = strings.TrimRight(key[:unix.IFNAMSIZ], "\x00")
	return name, checkDevice(name) == nil
}

// guardLayout is table bridge sluice-guard of namespace ns.
func guardLayout(ns string) layout[kernel.GuardTableSpec] {
	return layout[kernel.GuardTableSpec]{
		key: kernel.GuardTable{NS: ns}, rules: guardRuleset, parse: parseGuardText, check: checkGuard,
		sets: []string{mapGuardPorts, mapGuardAddrs}, owns: ofGuard, load: guardStates, op: (*change).guardOp,
	}
}

// guardStates adds what the maps hold.
func guardStates(f found, ns string, st kernel.State) error {
	// One with two MACs, and with a number that is none of ours, has the zero value.
	for key, data := range f.elems[mapGuardPorts] {
		dev, ok1 := keyDev(key)
		mac, ok2 := keyMAC(key, unix.IFNAMSIZ)
		n, ok3 := keySlot(data, 0)
		if !ok1 || !ok2 || !ok3 {
			continue
		}
		k, spec := kernel.GuardPort{NS: ns, Dev: dev}, kernel.GuardPortSpec{MAC: mac, Aliases: n == guardAliases}
		if _, twice := st[k]; twice || n != guardPlain && n != guardAliases {
			spec = kernel.GuardPortSpec{}
		}
		st[k] = spec
	}
	for key, data := range f.elems[mapGuardAddrs] {
		dev, ok1 := keyDev(key)
		ip, ok2 := keyIP(key, unix.IFNAMSIZ)
		mac, ok3 := keyMAC(key, unix.IFNAMSIZ+4)
		n, ok4 := keySlot(data, 0)
		if !ok1 || !ok2 || !ok3 || !ok4 {
			continue
		}
		k, spec := kernel.GuardAddr{NS: ns, Dev: dev, IP: ip}, kernel.GuardAddrSpec{MAC: mac, VIP: n == guardVIP}
		if _, twice := st[k]; twice || n != guardOwn && n != guardVIP {
			spec = kernel.GuardAddrSpec{}
		}
		st[k] = spec
	}
	return nil
}

// guardOp adds an operation on a GuardPort or GuardAddr. The MAC is part of the
// element's key.
func (c *change) guardOp(op kernel.Op) error {
	switch k := op.Key.(type) {
	case kernel.GuardPort:
		have, want, err := cast[kernel.GuardPortSpec](op)
		if err != nil {
			return err
		}
		if err := checkDevice(k.Dev); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		dev := devKey(k.Dev)
		elem := func(s kernel.GuardPortSpec) (key, data string) {
			return dev + macKey(s.MAC), slotKey(either(s.Aliases, guardAliases, guardPlain))
		}
		keyed(c, op, mapGuardPorts, dev, have, want, elem)
	case kernel.GuardAddr:
		have, want, err := cast[kernel.GuardAddrSpec](op)
		if err != nil {
			return err
		}
		if err := checkDevice(k.Dev); err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		if err := want4(k, k.IP); err != nil {
			return err
		}
		at := devKey(k.Dev) + ipKey(k.IP)
		elem := func(s kernel.GuardAddrSpec) (key, data string) {
			return at + macKey(s.MAC), slotKey(either(s.VIP, guardVIP, guardOwn))
		}
		keyed(c, op, mapGuardAddrs, at, have, want, elem)
	default:
		return fmt.Errorf("%s is not of table bridge %s", k, guardTable)
	}
	return nil
}

// either is yes or no.
func either(is bool, yes, no int) int {
	if is {
		return yes
	}
	return no
}

// ofGuard reports whether an object is in table bridge sluice-guard.
func ofGuard(k kernel.Key) bool {
	switch k.(type) {
	case kernel.GuardTable, kernel.GuardPort, kernel.GuardAddr:
		return true
	}
	return false
}
