package nft

import (
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// How packets to a VIP get their backend's address (kernel.VIPSpec.NAT), when
// hook prerouting has chosen the frame's destination:
//
//	translate  to such a VIP, not from the uplink
//	 ├▶ translate-to      ─▶ has the backend a real address? By protocol: remember the
//	 │                       flow, write that address, and its port if the VIP's has
//	 │                       another
//	 │         to a backend itself
//	 ├▶ not-translated    ─▶ forget the flow, if the client uses its port again
//	 │         from a backend's MAC, wherever it is
//	 └▶ translate-from    ─▶ by protocol: in the flows? write the VIP's address
//	                         and port
//
// A flow here is what a backend's answer shows: backend, client and both ports. It
// has no state of its own: a TCP flow lives as long as the balancer's maps say,
// and if the balancer sends a client elsewhere, that makes another flow.
//
// An ICMP error gets the address without and the one that it quotes, so that the
// socket that it is for knows it.

// The sets of translation. Those of the first group are written by Apply, those of
// the second by packets.
const (
	setNAT  = "translated" // ip daddr: VIPs whose packets get the backend's address
	mapReal = "real"       // ether daddr -> the backend's address

	// Flows, as answers show them -> VIP . port.
	mapRealTCP = "real-tcp-flows"
	mapRealUDP = "real-udp-flows"
	// All other protocols: backend . client . protocol . id of an echo, else 0 -> VIP.
	mapRealRest  = "real-rest-flows"
	mapRealFrags = "real-frags" // first fragments of answers -> VIP
)

// The chains of translation.
const (
	chainTranslate = "translate"
	chainDirect    = "not-translated"
	chainTo        = "translate-to"
	chainToReal    = "to-real"
	chainToTCP     = "to-tcp"
	chainToTCPPort = "to-tcp-port"
	chainToUDP     = "to-udp"
	chainToUDPPort = "to-udp-port"
	chainToICMP    = "to-icmp"
	chainToRest    = "to-rest"
	chainFrom      = "translate-from"
	chainFromFirst = "from-first"
	chainFromICMP  = "from-icmp"
)

// lifeEcho is how long an echo may take: what conntrack gives it (icmp_timeout).
const lifeEcho = 30 * time.Second

// sizeReal has room for both, the open and the closing connections of the
// balancer's maps. The kernel holds 150 octets for each, when it is there.
const sizeReal = 2 * sizeFlows

// natPriority is right behind the chain that chooses.
const natPriority = bridgePriority + 1

// natSets are the sets of translation.
func natSets() []set {
	var (
		ip, mac, port = nftables.TypeIPAddr, nftables.TypeEtherAddr, nftables.TypeInetService
		proto         = nftables.TypeInetProto
		types         = func(t ...nftables.SetDatatype) []nftables.SetDatatype { return t }
		flow          = types(ip, ip, port, port)
		target        = nftables.MustConcatSetType(ip, port)
	)
	return []set{
		{name: setNAT, key: types(ip)},
		{name: mapReal, key: types(mac), data: ip},

		{name: mapRealTCP, key: flow, data: target, timeout: lifeOpen, size: sizeReal},
		{name: mapRealUDP, key: flow, data: target, timeout: lifeUDP, size: sizeReal},
		{name: mapRealRest, key: types(ip, ip, proto, port), data: ip, timeout: lifeRest, size: sizeRest},
		{name: mapRealFrags, key: types(ip, ip, proto, port), data: ip, timeout: lifeFrags, size: sizeFrags},
	}
}

// natConfigured are those whose elements Apply writes.
func natConfigured() []string { return []string{setNAT, mapReal} }

func natChains() []chain {
	out := []chain{
		{name: chainTranslate, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: natPriority},
	}
	for _, name := range []string{
		chainDirect, chainTo, chainToReal, chainToTCP, chainToTCPPort, chainToUDP, chainToUDPPort, chainToICMP, chainToRest,
		chainFrom, chainFromFirst, chainFromICMP,
	} {
		out = append(out, chain{name: name})
	}
	return out
}

// Fields besides those in ruleset.go.
func etherSaddr(reg uint32) expr.Any  { return load(expr.PayloadBaseLLHeader, 6, 6, reg) }
func udpChecksum(reg uint32) expr.Any { return load(expr.PayloadBaseTransportHeader, udpSum, 2, reg) }
func echoID(reg uint32) expr.Any      { return load(expr.PayloadBaseTransportHeader, 4, 2, reg) }

// Where addresses, ports and checksums are, in octets from the beginning of their
// header; the IPv4 header that an ICMP error quotes begins at quoted, and ports
// 20 octets behind it.
const (
	ipSum, ipSrc, ipDst = 10, 12, 16
	srcPort, dstPort    = 0, 2
	tcpSum, udpSum      = 16, 6
	icmpSum, quoted     = 2, 8
)

// write puts a register into a header and mends the checksum at sum for it; at is
// counted like sum.
func write(base expr.PayloadBase, at, length, sum, reg uint32) *expr.Payload {
	return &expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: reg,
		Base: base, Offset: at, Len: length, CsumType: expr.CsumTypeInet, CsumOffset: sum,
	}
}

// setIP writes an address of the IPv4 header. The checksums of TCP and UDP cover
// it too (the pseudo-header); a datagram without one gets none.
func setIP(at, reg uint32) expr.Any {
	w := write(expr.PayloadBaseNetworkHeader, at, 4, ipSum, reg)
	w.CsumFlags = unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR
	return w
}

// setFragmentIP is setIP for later fragments: what is where a checksum would be is
// data. The first fragment's says it for all.
func setFragmentIP(at, reg uint32) expr.Any {
	return write(expr.PayloadBaseNetworkHeader, at, 4, ipSum, reg)
}

// setPort writes a port; sum is tcpSum or udpSum.
func setPort(at, sum, reg uint32) expr.Any {
	return write(expr.PayloadBaseTransportHeader, at, 2, sum, reg)
}

// setBarePort writes a port of a datagram without a checksum.
func setBarePort(at, reg uint32) expr.Any {
	w := write(expr.PayloadBaseTransportHeader, at, 2, 0, reg)
	w.CsumType = expr.CsumTypeNone
	return w
}

// setQuotedIP writes an address of the quoted header. Its own checksum makes up
// for the change, so that the sum of the whole stays the same.
func setQuotedIP(at, reg uint32) expr.Any {
	return write(expr.PayloadBaseTransportHeader, quoted+at, 4, quoted+ipSum, reg)
}

// setQuotedPort writes a port of the quoted packet. That packet's own checksum is
// left as it is: it may not be quoted, and nobody looks at it.
func setQuotedPort(at, reg uint32) expr.Any {
	return write(expr.PayloadBaseTransportHeader, quoted+20+at, 2, icmpSum, reg)
}

// isError matches ICMP's destination unreachable (3) and time exceeded (11).
func isError() []expr.Any { return part(icmpType(r0), mask(r0, 0xf7), is(r0, 3)) }

// noSum matches datagrams without a checksum.
func noSum() []expr.Any { return part(udpChecksum(r0), is(r0, 0, 0)) }

// backend puts the address of the frame's destination into r0.
func backend() []expr.Any { return part(etherDaddr(r0), mapped(r0, r0, mapReal)) }

// toBackend writes the backend's address, and its port if that of a named port of
// the VIP is another; ports are those steps. Behind it r0 to r3 are what answers
// will show, and r4 and r5 VIP and port.
//
// What is written is read back from the packet, because nft(8) 1.0.6 aborts when it
// lists a rule that has a map's data in a key of several fields.
func toBackend(ports ...expr.Any) []expr.Any {
	return slices.Concat(part(ipDaddr(r4), thDport(r5)), backend(), ports, flowBack())
}

// flowBack is the key of a flow, as answers show it, from a packet to the backend.
func flowBack() []expr.Any { return part(ipDaddr(r0), ipSaddr(r1), thDport(r2), thSport(r3)) }

// backendPort puts the backend's port for a named port of the VIP into r2.
func backendPort() []expr.Any {
	return part(ipDaddr(r6), ipProtocol(r7), thDport(r8), mapped(r6, r2, mapPorts))
}

// restToBackend is toBackend for protocols without ports; number fills r3.
func restToBackend(number expr.Any) []expr.Any {
	return slices.Concat(part(ipDaddr(r4)), backend(), part(setIP(ipDst, r0), ipDaddr(r0), ipSaddr(r1), ipProtocol(r2), number))
}

// zero is the number of a protocol that has no echo.
func zero() expr.Any { return &expr.Immediate{Register: r3, Data: []byte{0, 0}} }

func natRules(spec kernel.BridgeTableSpec) []rule {
	open := openLife(spec)
	direct := part(append(flowBack(), ipDaddr(r4), thDport(r5))...)
	ping := part(ipDaddr(r0), ipSaddr(r1), ipProtocol(r2), echoID(r3), ipDaddr(r4))
	rules := []rule{
		newRule(chainTranslate, "to a VIP", isIPv4(), part(ipDaddr(r0), inSet(r0, setNAT)), fromHere(spec), goTo(chainTo)),
		newRule(chainTranslate, "to a backend itself", isIPv4(), part(etherDaddr(r0), mapped(r0, r4, mapReal)), fromHere(spec), jump(chainDirect)),
		newRule(chainTranslate, "from a backend", isIPv4(), part(etherSaddr(r0), mapped(r0, r4, mapReal)), goTo(chainFrom)),

		// What the client has asked the VIP before, from the same port, it now asks the
		// backend: the answer is to come from there.
		newRule(chainDirect, "later fragment", isLaterFragment(), ret()),
		newRule(chainDirect, "TCP, new", protocol(unix.IPPROTO_TCP), opens(), direct, part(forget(mapRealTCP, r0, r4)), ret()),
		newRule(chainDirect, "UDP", protocol(unix.IPPROTO_UDP), direct, part(forget(mapRealUDP, r0, r4)), ret()),
		newRule(chainDirect, "echo request", protocol(unix.IPPROTO_ICMP), part(icmpType(r0), is(r0, 8)), ping, part(forget(mapRealRest, r0, r4))),

		// During an update, some tasks may still translate by themselves, or already.
		newRule(chainTo, "to a real address", part(etherDaddr(r0), mapped(r0, r4, mapReal)), goTo(chainToReal)),
		newRule(chainTo, "the task translates", isAlive(), ret()),
		newRule(chainTo, "nobody", goTo(chainToReal)),

		// Where the first went has been chosen already.
		newRule(chainToReal, "later fragment", isLaterFragment(), backend(), part(setFragmentIP(ipDst, r0)), ret()),
		newRule(chainToReal, "later fragment, refused", isLaterFragment(), ret()),
		newRule(chainToReal, "TCP", protocol(unix.IPPROTO_TCP), goTo(chainToTCP)),
		newRule(chainToReal, "UDP", protocol(unix.IPPROTO_UDP), goTo(chainToUDP)),
		newRule(chainToReal, "ICMP", protocol(unix.IPPROTO_ICMP), goTo(chainToICMP)),
		newRule(chainToReal, "others", goTo(chainToRest)),
	}
	namedPort := part(ipDaddr(r0), ipProtocol(r1), thDport(r2), mapped(r0, r4, mapPorts))
	rules = append(rules, newRule(chainToTCP, "named port", namedPort, goTo(chainToTCPPort)))
	rules = append(rules, toTCP(chainToTCP, false, open)...)
	rules = append(rules, toTCP(chainToTCPPort, true, open)...)
	rules = append(rules, newRule(chainToUDP, "named port", namedPort, goTo(chainToUDPPort)))
	rules = append(rules, toUDP()...)
	rules = append(rules, toRest()...)
	return append(rules, fromRules()...)
}

// toTCP are the rules for connections to a VIP. What cannot be remembered is not
// answered: the map has more room than the balancer's, which refuse first. What has
// no backend is refused.
func toTCP(name string, named bool, open time.Duration) []rule {
	write := part(setIP(ipDst, r0))
	if named {
		write = slices.Concat(backendPort(), part(setIP(ipDst, r0), setPort(dstPort, tcpSum, r2)))
	}
	to := toBackend(write...)
	keep := func(life time.Duration) []expr.Any { return part(update(mapRealTCP, r0, r4, life)) }
	return []rule{
		// The client's port may have been used for another port of the VIP, which
		// leads to the same of the backend.
		newRule(name, "new", opens(), to, part(forget(mapRealTCP, r0, r4)), keep(lifeSYN), ret()),
		newRule(name, "open", flowKey(), part(mapped(r0, r4, mapTCP)), to, keep(open), ret()),
		newRule(name, "closing", to, keep(lifeClosing), ret()),
		newRule(name, "nobody, or full", goTo(chainRefuse)),
	}
}

func toUDP() []rule {
	keep := part(update(mapRealUDP, r0, r4, lifeUDP))
	bare := slices.Concat(backendPort(), part(setFragmentIP(ipDst, r0), setBarePort(dstPort, r2)))
	summed := slices.Concat(backendPort(), part(setIP(ipDst, r0), setPort(dstPort, udpSum, r2)))
	return []rule{
		newRule(chainToUDP, "whatever port", toBackend(setIP(ipDst, r0)), keep, ret()),
		newRule(chainToUDP, "nobody, or full", goTo(chainRefuse)),
		newRule(chainToUDPPort, "without checksum", noSum(), toBackend(bare...), keep, ret()),
		newRule(chainToUDPPort, "with checksum", toBackend(summed...), keep, ret()),
		newRule(chainToUDPPort, "nobody, or full", goTo(chainRefuse)),
	}
}

func toRest() []rule {
	return []rule{
		newRule(chainToICMP, "echo request", part(icmpType(r0), is(r0, 8)), restToBackend(echoID(r3)),
			part(update(mapRealRest, r0, r4, lifeEcho)), ret()),
		// The client's error is about an answer, which had the VIP as its source.
		newRule(chainToICMP, "error: quoted port", isError(),
			part(ipDaddr(r6), quotedProtocol(r7), quotedSport(r8), mapped(r6, r2, mapPorts), setQuotedPort(srcPort, r2))),
		newRule(chainToICMP, "error", isError(), backend(), part(setQuotedIP(ipSrc, r0), setIP(ipDst, r0)), ret()),
		newRule(chainToICMP, "nobody, or full", goTo(chainRefuse)),

		newRule(chainToRest, "whatever it is", restToBackend(zero()), part(update(mapRealRest, r0, r4, lifeRest)), ret()),
		newRule(chainToRest, "nobody, or full", goTo(chainRefuse)),
	}
}

// fromRules are for what backends send. All of it comes here, so most of it is
// none of ours, and goes on as it is.
func fromRules() []rule {
	// VIP and port are in r4 and r5. To nft(8), which follows registers when it lists
	// rules, data of two fields fills the first only: the port that is loaded before
	// is what it shows.
	virtual := func(name string) []expr.Any {
		return part(append(flowKey(), thSport(r5), mapped(r0, r4, name))...)
	}
	tcp, udp := virtual(mapRealTCP), virtual(mapRealUDP)
	rest := func(number expr.Any) []expr.Any {
		return part(ipSaddr(r0), ipDaddr(r1), ipProtocol(r2), number, mapped(r0, r4, mapRealRest))
	}
	echo := slices.Concat(part(icmpType(r0), is(r0, 0)), rest(echoID(r3)))
	about := func(p byte, name string) []expr.Any {
		return part(
			quotedProtocol(r0), is(r0, p),
			ipSaddr(r0), ipDaddr(r1), quotedDport(r2), quotedSport(r3), quotedDport(r5), mapped(r0, r4, name),
			setQuotedPort(dstPort, r5), setQuotedIP(ipDst, r4), setIP(ipSrc, r4),
		)
	}
	// An answer shows that the flow lives. The key in r0 to r3 is still that of the
	// packet as it came, and so are the addresses in it for the fragment's.
	lives := part(ipSaddr(r4), thSport(r5), update(mapRealUDP, r0, r4, lifeUDP))
	followed := part(ipProtocol(r2), ipID(r3), ipSaddr(r4), update(mapRealFrags, r0, r4, lifeFrags))
	whole := func(name string, then ...[]expr.Any) []rule {
		then = append(then, ret())
		end := slices.Concat(then...)
		return []rule{
			newRule(name, "TCP", protocol(unix.IPPROTO_TCP), tcp, part(setIP(ipSrc, r4), setPort(srcPort, tcpSum, r5)), end),
			newRule(name, "UDP without checksum", protocol(unix.IPPROTO_UDP), noSum(), udp,
				part(setFragmentIP(ipSrc, r4), setBarePort(srcPort, r5)), lives, end),
			newRule(name, "UDP", protocol(unix.IPPROTO_UDP), udp,
				part(setIP(ipSrc, r4), setPort(srcPort, udpSum, r5)), lives, end),
			newRule(name, "echo reply", protocol(unix.IPPROTO_ICMP), echo, part(setIP(ipSrc, r4)), end),
		}
	}
	rules := []rule{
		newRule(chainFrom, "later fragment", isLaterFragment(), fragKey(), part(mapped(r0, r4, mapRealFrags), setFragmentIP(ipSrc, r4)), ret()),
		newRule(chainFrom, "later fragment, first unknown", isLaterFragment(), ret()),
		newRule(chainFrom, "first fragment", isFragment(), goTo(chainFromFirst)),
	}
	rules = append(rules, whole(chainFrom)...)
	rules = append(rules,
		newRule(chainFrom, "ICMP", protocol(unix.IPPROTO_ICMP), isError(), goTo(chainFromICMP)),
		newRule(chainFrom, "others", rest(zero()), part(setIP(ipSrc, r4)), ret()),
		newRule(chainFromFirst, "id used before", fragKey(), part(ipSaddr(r4), forget(mapRealFrags, r0, r4))),
	)
	rules = append(rules, whole(chainFromFirst, followed)...)
	return append(rules,
		newRule(chainFromFirst, "others", rest(zero()), part(setIP(ipSrc, r4)), followed, ret()),
		newRule(chainFromICMP, "error about TCP", about(unix.IPPROTO_TCP, mapRealTCP), ret()),
		newRule(chainFromICMP, "error about UDP", about(unix.IPPROTO_UDP, mapRealUDP), ret()),
	)
}

// natStates adds what the maps of translation hold.
func natStates(f found, ns string, st kernel.State) {
	for key, data := range f.elems[mapReal] {
		mac, ok1 := keyMAC(key, 0)
		ip, ok2 := keyIP(data, 0)
		if ok1 && ok2 {
			st[kernel.Real{NS: ns, MAC: mac}] = kernel.RealSpec{IP: ip}
		}
	}
}

// realOp adds an operation on the address of a backend.
func (c *change) realOp(k kernel.Real, op kernel.Op) error {
	have, want, err := cast[kernel.RealSpec](op)
	if err != nil {
		return err
	}
	data := func(v kernel.Value, s kernel.RealSpec) (*string, error) {
		if v == nil {
			return nil, nil
		}
		if err := want4(k, s.IP); err != nil {
			return nil, err
		}
		return new(ipKey(s.IP)), nil
	}
	w, err := data(op.Want, want)
	if err != nil {
		return err
	}
	h, err := data(op.Have, have)
	c.sure = c.sure && err == nil // else it is there in pieces
	c.put(mapReal, macData(k.MAC), h, w)
	return nil
}
