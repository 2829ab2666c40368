package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// meshTable is the host's table of family ip.
const meshTable = "sluice-mesh"

// The sets of table ip sluice-mesh. Apply writes all of them.
const (
	mapBound     = "bound"     // ip daddr . protocol . port -> alias . port
	mapPublished = "published" // protocol . port -> alias . port
	setMasq      = "masked"    // ip daddr: aliases whose tasks see the node
	mapNets      = "nets"      // oifname -> the network's chain
	mapAllow     = "allow"     // ip daddr: aliases -> the chain that says who may connect
)

const (
	chainInput       = "input"
	chainForward     = "forward"
	chainPostrouting = "postrouting"

	netPrefix   = "net-"   // of the chains of single networks; the device's name follows
	allowPrefix = "allow-" // of those that say who may connect; the alias follows
)

const (
	// meshPriority is before -100 (NF_IP_PRI_NAT_DST), where the engine publishes its
	// ports: one that both have is the mesh's. It is behind conntrack, -200.
	meshPriority = -110
	// guardPriority is just before 0, where everybody filters.
	guardPriority = -10
	// sourcePriority is before 100 (NF_IP_PRI_NAT_SRC), where the engine masquerades.
	sourcePriority = 90
)

// containerMark marks packets of this host's containers between the hooks forward
// and postrouting: their addresses are no other host's to answer. It is a bit that
// neither the engine (0x1) nor kube-proxy (0x4000, 0x8000) uses.
const containerMark uint32 = 1 << 30

// containerDevices match the engine's bridges: docker0 and docker_gwbridge, and br-
// with the twelve digits of a network's id, which are as long as a name can be. A
// shorter one, such as br-lan, is mostly a bridge that the host's own LAN is on: who
// comes by it has an address of its own.
func containerDevices() map[string][]expr.Any {
	const last = unix.IFNAMSIZ - 2
	long := make([]byte, 4) // the word of the name that the last octet is in
	long[last%4] = 0xff
	return map[string][]expr.Any{
		"docker": device(expr.MetaKeyIIFNAME, "docker"),
		"br-": append(device(expr.MetaKeyIIFNAME, "br-"),
			mask(r3, long...), isNot(r3, 0, 0, 0, 0)),
	}
}

// meshRuleset is table ip sluice-mesh.
//
//	to an address of the host ─▶ bound, published: to an alias and the task's port
//	 │                           …-ranges: to an alias
//	 └▶ routed into the network by its pair (slm…)
//	     ├▶ forward      only what was published, by whom the alias allows
//	     └▶ postrouting ─▶ net-slm…: the host's, its containers' and the network's own
//	                        addresses do not do as source; nor does any for those masqueraded
//
// What comes out of a network by its pair only answers.
func meshRuleset(spec kernel.MeshTableSpec) ruleset {
	ip, proto, port := nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService
	place := nftables.MustConcatSetType(ip, port) // fails on none of the two
	types := func(t ...nftables.SetDatatype) []nftables.SetDatatype { return t }
	in, out := device(expr.MetaKeyIIFNAME, spec.Devices), device(expr.MetaKeyOIFNAME, spec.Devices)
	dnat := part(&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r0, RegProtoMin: r1, Specified: true})
	dnatKeepsPort := part(&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r0})
	toUs := part(&expr.Fib{Register: r0, FlagDADDR: true, ResultADDRTYPE: true}, is(r0, native(unix.RTN_LOCAL)...))
	l4proto := func(reg uint32) expr.Any { return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg} }
	begins := part(&expr.Ct{Key: expr.CtKeySTATE, Register: r0}, mask(r0, native(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)...), is(r0, 0, 0, 0, 0))
	isNew := part(&expr.Ct{Key: expr.CtKeySTATE, Register: r0}, mask(r0, native(expr.CtStateBitNEW)...), isNot(r0, 0, 0, 0, 0))
	// All that was published is translated; conntrack asks for no device, and a task can
	// send what looks like an answer to whatever else the host has open.
	unpublished := part(&expr.Ct{Key: expr.CtKeySTATUS, Register: r0}, mask(r0, native(statusDNAT)...), is(r0, 0, 0, 0, 0))
	drop := part(&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})
	rs := ruleset{
		family: nftables.TableFamilyIPv4, table: meshTable,
		single: func(name string) bool {
			return strings.HasPrefix(name, netPrefix) || strings.HasPrefix(name, allowPrefix)
		},
		sets: []set{
			{name: mapBound, key: types(ip, proto, port), data: place},
			{name: mapPublished, key: types(proto, port), data: place},
			{name: setMasq, key: types(ip)},
			{name: mapNets, key: types(nftables.TypeIFName), data: nftables.TypeVerdict},
			{name: mapAllow, key: types(ip), data: nftables.TypeVerdict},
		},
		chains: []chain{
			{name: chainPrerouting, typ: nftables.ChainTypeNAT, hook: unix.NF_INET_PRE_ROUTING, priority: meshPriority},
			{name: chainOutput, typ: nftables.ChainTypeNAT, hook: unix.NF_INET_LOCAL_OUT, priority: meshPriority},
			{name: chainInput, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_LOCAL_IN, priority: guardPriority},
			{name: chainForward, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_FORWARD, priority: guardPriority},
			{name: chainPostrouting, typ: nftables.ChainTypeNAT, hook: unix.NF_INET_POST_ROUTING, priority: sourcePriority},
		},
	}
	for _, name := range allRangeSets() {
		rs.sets = append(rs.sets, set{name: name, key: types(port), data: ip, ranges: true})
	}
	for _, name := range []string{chainPrerouting, chainOutput} {
		rs.rules = append(rs.rules,
			newRule(name, "to one address's port, "+spec.String(), toUs,
				part(ipDaddr(r0), l4proto(r1), thDport(r2), mapped(r0, r0, mapBound)), dnat),
			newRule(name, "to a port", toUs, part(l4proto(r0), thDport(r1), mapped(r0, r0, mapPublished)), dnat))
		for _, p := range rangeProtos() {
			for _, set := range rangeSets(p) {
				rs.rules = append(rs.rules, newRule(name, "to "+set, toUs,
					part(l4proto(r0), is(r0, p.Number()), thDport(r0), mapped(r0, r0, set)), dnatKeepsPort))
			}
		}
	}
	rs.rules = append(rs.rules,
		newRule(chainInput, "networks only answer", in, begins, drop),
		newRule(chainInput, "to what is published", in, unpublished, drop),
		newRule(chainForward, "only what is published", out, unpublished, drop),
		newRule(chainForward, "networks only answer", in, begins, drop),
		newRule(chainForward, "to what is published", in, unpublished, drop),
		newRule(chainForward, "who may connect", out, isNew, part(ipDaddr(r0), vmap(r0, mapAllow))))
	containers := containerDevices()
	for _, name := range slices.Sorted(maps.Keys(containers)) {
		rs.rules = append(rs.rules, newRule(chainForward, "from a container, "+name, out, containers[name], isNew,
			part(getMark(r0), &expr.Bitwise{SourceRegister: r0, DestRegister: r0, Len: 4, Mask: native(^containerMark), Xor: native(containerMark)},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: r0})))
	}
	rs.rules = append(rs.rules, newRule(chainPostrouting, "into a network",
		part(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: r0}, vmap(r0, mapNets))))
	return rs
}

// statusDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const statusDNAT uint32 = 1 << 5

// device matches devices whose names begin so.
func device(key expr.MetaKey, prefix string) []expr.Any {
	return part(&expr.Meta{Key: key, Register: r0}, is(r0, []byte(prefix)...))
}

// netRules are the rules of a network's chain.
func netRules(dev string, spec kernel.MeshNetSpec) []rule {
	name := netPrefix + dev
	snat := part(&expr.Immediate{Register: r0, Data: octets(spec.Source)},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r0})
	return []rule{
		newRule(name, "the host's own, "+spec.String(),
			part(&expr.Fib{Register: r0, FlagSADDR: true, ResultADDRTYPE: true}, is(r0, native(unix.RTN_LOCAL)...)), snat),
		newRule(name, "its containers'", part(getMark(r0), mask(r0, native(containerMark)...), isNot(r0, 0, 0, 0, 0)), snat),
		newRule(name, "the network's own", inPrefix(ipSaddr(r0), spec.Subnet), snat),
		newRule(name, "masqueraded", part(ipDaddr(r0), inSet(r0, setMasq)), snat),
	}
}

// parseNetText reads the spec from the text of a network's first rule.
func parseNetText(s string) (kernel.MeshNetSpec, bool) {
	f := strings.Fields(s)
	if len(f) != 7 {
		return kernel.MeshNetSpec{}, false
	}
	source, err1 := netip.ParseAddr(f[4])
	subnet, err2 := netip.ParsePrefix(f[6])
	return kernel.MeshNetSpec{Source: source, Subnet: subnet}, err1 == nil && err2 == nil && source.Is4() && checkPrefix("subnet", subnet) == nil
}

// allowRules are the rules of the chain of an alias.
func allowRules(alias netip.Addr, spec kernel.MeshAllowSpec) ([]rule, error) {
	name := allowPrefix + alias.String()
	var out []rule
	for s := range strings.FieldsSeq(spec.From) {
		p, err := netip.ParsePrefix(s)
		if err == nil {
			err = checkPrefix("prefix", p)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, newRule(name, "from "+p.String(), inPrefix(ipSaddr(r0), p), ret()))
	}
	return append(out, newRule(name, "nobody else", part(&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}))), nil
}

// parseAllow reads the spec from the comments of the rules.
func parseAllow(comments []string) kernel.MeshAllowSpec {
	var from []string
	for _, c := range comments {
		if p, ok := strings.CutPrefix(uncomment(c), "from "); ok {
			from = append(from, p)
		}
	}
	return kernel.MeshAllowSpec{From: strings.Join(from, " ")}
}

// brokenAllow is what a dump says of a list that is there in part only: the empty one
// allows nobody.
const brokenAllow = "?"

// meshLayout is table ip sluice-mesh.
func meshLayout() layout[kernel.MeshTableSpec] {
	return layout[kernel.MeshTableSpec]{
		key: kernel.MeshTable{}, rules: meshRuleset, parse: parseMeshText,
		check: func(spec kernel.MeshTableSpec) error { return checkDevice(spec.Devices) },
		sets:  append([]string{mapBound, mapPublished, setMasq, mapNets, mapAllow}, allRangeSets()...),
		load:  meshStates, op: (*change).meshOp,
	}
}

// parseMeshText reads the spec from the text of the first rule.
func parseMeshText(s string) (kernel.MeshTableSpec, bool) {
	return kernel.MeshTableSpec{Devices: s[strings.LastIndex(s, " ")+1:]}, true
}

// DumpHost returns what table ip sluice-mesh of the host's namespace, open at nsFD,
// holds. Unless it is intact there is no MeshTable, but what is in the sets, as far
// as they can be read. A network that is there in part only has the zero value; a
// list of who may connect is from "?".
//
// kernel.ErrInterrupted: the rules of the namespace changed all the while.
func (Tables) DumpHost(nsFD int) (kernel.State, error) { return meshLayout().dump(nsFD) }

// meshStates adds what the sets and the chains of single objects hold.
func meshStates(f found, _ string, st kernel.State) error {
	ports := func(set string, offset int) {
		for key, data := range f.elems[set] {
			var k kernel.MeshPort
			var ok bool
			if k.Proto, k.Port, ok = keyProtoPort(key, offset); !ok {
				continue
			}
			if offset > 0 {
				k.Bind, _ = keyIP(key, 0)
			}
			alias, _ := keyIP(data, 0)
			to, _ := keyPort(data, 4)
			st[k] = kernel.MeshPortSpec{Alias: alias, To: to}
		}
	}
	ports(mapBound, 4)
	ports(mapPublished, 0)
	rangeStates(f, st)
	for key := range f.elems[setMasq] {
		if alias, ok := keyIP(key, 0); ok {
			st[kernel.MeshMasq{Alias: alias}] = kernel.MeshMasqSpec{}
		}
	}
	return meshChains(f, st)
}

// meshChains adds what has a chain of its own: it and an element that leads to it.
func meshChains(f found, st kernel.State) error {
	names := map[string]bool{}
	for name := range f.chains {
		names[name] = true
	}
	for key := range f.elems[mapNets] {
		names[netPrefix+strings.TrimRight(key, "\x00")] = true
	}
	for key := range f.elems[mapAllow] {
		if alias, ok := keyIP(key, 0); ok {
			names[allowPrefix+alias.String()] = true
		}
	}
	for name := range names {
		if dev, ok := strings.CutPrefix(name, netPrefix); ok && len(dev) < unix.IFNAMSIZ {
			var spec kernel.MeshNetSpec
			if rules := f.rules[name]; len(rules) > 0 {
				if s, ok := parseNetText(uncomment(rules[0])); ok {
					spec = s
				}
			}
			ok, err := f.hasChain(nftables.TableFamilyIPv4, mapNets, devKey(dev), name, netRules(dev, spec))
			if err != nil {
				return err
			}
			if !ok {
				spec = kernel.MeshNetSpec{}
			}
			st[kernel.MeshNet{Dev: dev}] = spec
		}
		if s, ok := strings.CutPrefix(name, allowPrefix); ok {
			alias, err := netip.ParseAddr(s)
			if err != nil || !alias.Is4() {
				continue
			}
			spec := parseAllow(f.rules[name])
			rules, err := allowRules(alias, spec)
			whole := err == nil
			if whole {
				if whole, err = f.hasChain(nftables.TableFamilyIPv4, mapAllow, ipKey(alias), name, rules); err != nil {
					return err
				}
			}
			if !whole {
				spec = kernel.MeshAllowSpec{From: brokenAllow}
			}
			st[kernel.MeshAllow{Alias: alias}] = spec
		}
	}
	return nil
}

// ApplyHost changes table ip sluice-mesh in one transaction; an error means that
// nothing changed. Where ranges of ports change it takes a second one, which removes
// ports: if only that fails, the error leaves all there that is wanted. Operations
// are of PhaseGuard or PhaseMesh; doing them again changes nothing.
//
// kernel.ErrNotExist: there is no table to put something in.
func (Tables) ApplyHost(nsFD int, ops []kernel.Op) error {
	if len(ops) == 0 {
		return nil
	}
	return meshLayout().apply(nsFD, ops)
}

// meshOp adds an operation on an object in table ip sluice-mesh.
func (c *change) meshOp(op kernel.Op) error {
	switch k := op.Key.(type) {
	case kernel.MeshPort:
		have, want, err := cast[kernel.MeshPortSpec](op)
		if err != nil {
			return err
		}
		if err := wantPorts(k, k.Proto); err != nil {
			return err
		}
		set, key := mapPublished, portKey(k.Proto, k.Port)
		if k.Bind.IsValid() {
			if err := want4(k, k.Bind); err != nil {
				return err
			}
			set, key = mapBound, ipKey(k.Bind)+key
		}
		if op.Want != nil {
			if err := want4(k, want.Alias); err != nil {
				return err
			}
		}
		data := func(s kernel.MeshPortSpec) string { return string(octets(s.Alias)) + portData(s.To) + "\x00\x00" }
		c.elem(op, set, key, data(have), data(want))
	case kernel.MeshRange:
		return c.rangeOp(k, op)
	case kernel.MeshMasq:
		if err := want4(k, k.Alias); err != nil {
			return err
		}
		c.elem(op, setMasq, ipKey(k.Alias), "", "")
	case kernel.MeshNet:
		have, want, err := cast[kernel.MeshNetSpec](op)
		if err != nil {
			return err
		}
		if k.Dev == "" || len(k.Dev) >= unix.IFNAMSIZ {
			return fmt.Errorf("%s: %q is no device's name", k, k.Dev)
		}
		if op.Want != nil {
			if err := want4(k, want.Source); err != nil {
				return err
			}
			if err := checkPrefix("subnet", want.Subnet); err != nil {
				return fmt.Errorf("%s: %w", k, err)
			}
		}
		c.sure = c.sure && (op.Have == nil || have != kernel.MeshNetSpec{})
		c.chain(op, mapNets, devKey(k.Dev), netPrefix+k.Dev, netRules(k.Dev, want))
	case kernel.MeshAllow:
		_, want, err := cast[kernel.MeshAllowSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.Alias); err != nil {
			return err
		}
		rules, err := allowRules(k.Alias, want)
		if err != nil {
			return fmt.Errorf("%s: %w", k, err)
		}
		c.sure = false // it may be there in pieces, and it is seldom changed
		c.chain(op, mapAllow, ipKey(k.Alias), allowPrefix+k.Alias.String(), rules)
	default:
		return fmt.Errorf("%s is not of table ip %s", k, meshTable)
	}
	return nil
}

// chain adds what an operation means for an object that is a chain and the element
// of a verdict map that leads to it.
func (c *change) chain(op kernel.Op, set, key, name string, rules []rule) {
	c.elem(op, set, key, jumpTo(name), jumpTo(name))
	c.picks[name] = rules
	if op.Want == nil {
		c.picks[name] = nil
	}
}
