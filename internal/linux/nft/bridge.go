package nft

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// bridgeFamily is the family of the table that balances.
const bridgeFamily = nftables.TableFamilyBridge

// tableName is the name of our table in either family; whatever is in a table
// of this name is ours.
const tableName = "sluice"

// The sets and maps of table bridge sluice. Those of the first group are
// written by Apply, those of the second by packets.
const (
	setVIPs    = "vips"    // ip daddr: the virtual IPs
	mapPick    = "pick"    // ip daddr -> jump to the chain that picks a backend of this VIP
	mapSlots   = "slots"   // ip daddr . slot -> ether daddr of the backend
	setAlive   = "alive"   // ip daddr . ether daddr: may serve what it serves already
	setMembers = "members" // ip saddr . its own ether address
	mapOthers  = "others"  // ip saddr . ip daddr -> ether daddr of a backend that is not the client

	setDrains    = "drains"     // ip daddr . ether daddr: alive, and gets nothing new
	setNamed     = "named"      // ip daddr: VIPs that have only their ports
	mapPorts     = "ports"      // ip daddr . protocol . port -> port of the backend, for those VIPs
	setOnePacket = "one-packet" // ip daddr: VIPs that choose for each UDP packet

	mapTCP     = "tcp-flows"   // open connections
	mapClosing = "tcp-closing" // those that the client has begun to close
	mapUDP     = "udp-flows"
	mapRest    = "rest-flows" // all protocols but TCP, UDP and ICMP
	mapFrags   = "frags"
	mapPersist = "persist" // ip daddr . client's prefix -> ether daddr, for VIPs that keep their clients
)

// How long packets' elements live after the client's last packet.
const (
	// A connection request that nobody went on with. Linux clients repeat a SYN
	// after 1, 3, 7, 15 and 31 s (RFC 6298 back-off, tcp_syn_retries 6): 60 s
	// outlives the longest gap of 32 s, and a flood of SYNs soon makes room again.
	lifeSYN = 60 * time.Second
	// An open connection, unless BridgeTableSpec.Open says otherwise. Keepalive, which
	// Linux first sends after 2 h and repeats nine times at 75 s (tcp_keepalive_time,
	// _probes, _intvl: 2 h 11 min), holds it.
	lifeOpen = 3 * time.Hour
	// A connection after the client's FIN: as long as Linux waits for the other
	// side's (tcp_fin_timeout), counted from the client's last segment. Conntrack
	// and IPVS take twice that, but these entries are the most numerous: with
	// sizeFlows, 60 s allow 4,300 connections a second.
	lifeClosing = 60 * time.Second
	// UDP has no end to see: what conntrack gives a stream (udp_timeout_stream).
	lifeUDP = 2 * time.Minute
	// Other protocols: what conntrack gives them (generic_timeout).
	lifeRest = 10 * time.Minute
	// Fragments of a datagram leave their sender back to back. It is short because
	// the 16 bits of an IP id come round soon.
	lifeFrags = 5 * time.Second
)

// How many elements packets may make. The kernel holds 140 octets for each, so
// the three maps of flows, all full, take 110 MB, and if all of it is for VIPs
// whose packets get the backend's address, those of nat.go 150 MB more.
const (
	// What conntrack allows on a host with more than 4 GB of memory; each of
	// these connections needs an entry there too.
	sizeFlows = 1 << 18
	// Fragmented datagrams within lifeFrags: 3,000 a second.
	sizeFrags = 1 << 14
	// Flows of other protocols have no ports: one for each client, VIP and protocol.
	sizeRest = 1 << 14
	// Clients that are kept, one for each VIP and prefix: as many as a /16 has
	// addresses. A client that finds no room is given a backend for each connection.
	sizePersist = 1 << 16
)

// The chains of table bridge sluice, but for those that pick, see pickChain. No
// name here is a word of the nft language, which could not be typed there.
const (
	chainPrerouting = "prerouting"
	chainVIP        = "vip"
	chainFragment   = "fragment"
	chainBalance    = "balance"
	chainNamed      = "named-port"
	chainTCP        = "tcp-packet"
	chainTCPNew     = "tcp-new"
	chainTCPOpen    = "tcp-open"
	chainTCPLost    = "tcp-lost"
	chainTCPClose   = "tcp-close"
	chainTCPClosing = "tcp-closing"
	chainUDP        = "udp-packet"
	chainUDPKnown   = "udp-known"
	chainUDPNew     = "udp-new"
	chainICMP       = "icmp-packet"
	chainEcho       = "echo-request"
	chainRest       = "rest-packet"
	chainRestKnown  = "rest-known"
	chainRestNew    = "rest-new"
	chainChoose     = "choose"
	chainKnown      = "known-client"
	chainSelf       = "self"
	chainRefuse     = "refuse"
)

// bridgePriority is before everything that others hang into a bridge's
// prerouting: ebtables' dstnat is -300 (NF_BR_PRI_NAT_DST_BRIDGED) and
// br_netfilter, which would show the packet to iptables, is 0 (NF_BR_PRI_BRNF).
const bridgePriority = -310

// TCP's flags (RFC 9293 section 3.1).
const (
	fin byte = 1 << 0
	syn byte = 1 << 1
	rst byte = 1 << 2
	ack byte = 1 << 4
)

// bridgeSets are the sets of table bridge sluice. Keys have no more than four
// fields: nft 1.0.6 aborts when it lists a map with five.
func bridgeSets() []set {
	var (
		ip, mac, port = nftables.TypeIPAddr, nftables.TypeEtherAddr, nftables.TypeInetService
		proto, number = nftables.TypeInetProto, nftables.TypeMark
		types         = func(t ...nftables.SetDatatype) []nftables.SetDatatype { return t }
		flow          = types(ip, ip, port, port)
	)
	return append([]set{
		{name: setVIPs, key: types(ip)},
		{name: mapPick, key: types(ip), data: nftables.TypeVerdict},
		{name: mapSlots, key: types(ip, number), data: mac},
		{name: setAlive, key: types(ip, mac)},
		{name: setMembers, key: types(ip, mac)},
		{name: mapOthers, key: types(ip, ip), data: mac},
		{name: setDrains, key: types(ip, mac)},
		{name: setNamed, key: types(ip)},
		{name: mapPorts, key: types(ip, proto, port), data: port},
		{name: setOnePacket, key: types(ip)},

		{name: mapTCP, key: flow, data: mac, timeout: lifeOpen, size: sizeFlows},
		{name: mapClosing, key: flow, data: mac, timeout: lifeClosing, size: sizeFlows},
		{name: mapUDP, key: flow, data: mac, timeout: lifeUDP, size: sizeFlows},
		{name: mapRest, key: types(ip, ip, proto), data: mac, timeout: lifeRest, size: sizeRest},
		{name: mapFrags, key: types(ip, ip, proto, port), data: mac, timeout: lifeFrags, size: sizeFrags},
		// Each VIP's rules say how long its clients are kept; what stands here is for none.
		{name: mapPersist, key: types(ip, ip), data: mac, timeout: lifeOpen, size: sizePersist},
	}, natSets()...)
}

// bridgeRuleset is the fixed part of table bridge sluice. The picture in doc.go
// shows how its chains hang together.
func bridgeRuleset(spec kernel.BridgeTableSpec) ruleset {
	rs := ruleset{family: bridgeFamily, table: tableName, sets: bridgeSets(), single: isPick}
	rs.chains = []chain{
		{name: chainPrerouting, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: bridgePriority},
	}
	for _, name := range []string{
		chainVIP, chainFragment, chainBalance, chainNamed,
		chainTCP, chainTCPNew, chainTCPOpen, chainTCPLost, chainTCPClose, chainTCPClosing,
		chainUDP, chainUDPKnown, chainUDPNew, chainICMP, chainEcho, chainRest, chainRestKnown, chainRestNew,
		chainChoose, chainKnown, chainSelf, chainRefuse,
	} {
		rs.chains = append(rs.chains, chain{name: name})
	}
	rs.rules = append(rs.rules, entryRules(spec)...)
	rs.rules = append(rs.rules, namedRules()...)
	rs.rules = append(rs.rules, tcpRules(openLife(spec))...)
	rs.rules = append(rs.rules, udpRules()...)
	rs.rules = append(rs.rules, icmpRules()...)
	rs.rules = append(rs.rules, restRules()...)
	rs.rules = append(rs.rules, chooseRules(spec.Router)...)
	rs.chains = append(rs.chains, natChains()...)
	rs.rules = append(rs.rules, natRules(spec)...)
	return rs
}

// Keys of the maps, in registers r0 and up; r4 and r5 stay free for a MAC.
func flowKey() []expr.Any { return part(ipSaddr(r0), ipDaddr(r1), thSport(r2), thDport(r3)) }
func restKey() []expr.Any { return part(ipSaddr(r0), ipDaddr(r1), ipProtocol(r2)) }
func fragKey() []expr.Any { return part(ipSaddr(r0), ipDaddr(r1), ipProtocol(r2), ipID(r3)) }

// The frame's destination from a map, into it, and out of it.
func toBackendOf(name string) []expr.Any { return part(mapped(r0, r4, name), setEtherDaddr(r4)) }
func remember(name string, life time.Duration) []expr.Any {
	return part(etherDaddr(r4), update(name, r0, r4, life))
}
func erase(name string) []expr.Any { return part(etherDaddr(r4), forget(name, r0, r4)) }

// Whether the backend in the frame's destination may still serve.
func isAlive() []expr.Any { return part(ipDaddr(r0), etherDaddr(r1), inSet(r0, setAlive)) }
func isLost() []expr.Any  { return part(ipDaddr(r0), etherDaddr(r1), notInSet(r0, setAlive)) }

// Whether the backend in the frame's destination is the client itself.
func isSelf() []expr.Any  { return part(ipSaddr(r0), etherDaddr(r1), inSet(r0, setMembers)) }
func isOther() []expr.Any { return part(ipSaddr(r0), etherDaddr(r1), notInSet(r0, setMembers)) }

func flags(of, want byte) []expr.Any { return part(tcpFlags(r0), mask(r0, of), is(r0, want)) }
func anyFlag(of byte) []expr.Any     { return part(tcpFlags(r0), mask(r0, of), isNot(r0, 0)) }

// opens matches a segment that asks for a new connection.
func opens() []expr.Any { return flags(fin|syn|rst|ack, syn) }

// The IPv4 header's flags and offset (RFC 791 section 3.1): more fragments is
// 0x2000, the offset the 13 bits below.
func isFragment() []expr.Any { return part(ipFragOff(r0), mask(r0, 0x3f, 0xff), isNot(r0, 0, 0)) }
func isLaterFragment() []expr.Any {
	return part(ipFragOff(r0), mask(r0, 0x1f, 0xff), isNot(r0, 0, 0))
}
func ipDaddrIn(set string) []expr.Any { return part(ipDaddr(r0), inSet(r0, set)) }
func protocol(p byte) []expr.Any      { return part(ipProtocol(r0), is(r0, p)) }

// setPktType sets what the stack makes of the frame: addressed to us or not.
func setPktType(t byte) []expr.Any {
	return part(
		&expr.Immediate{Register: r0, Data: []byte{t}},
		&expr.Meta{Key: expr.MetaKeyPKTTYPE, SourceRegister: true, Register: r0},
	)
}

func entryRules(spec kernel.BridgeTableSpec) []rule {
	// What most frames meet is only this rule, so the test that ends it for most
	// of them, the address, comes as early as it can, and the name, 16 octets
	// long, last.
	entry := part(
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: r0},
		is(r0, 0x08, 0x00), // ETH_P_IP
		ipDaddr(r0), inSet(r0, setVIPs),
	)
	entry = append(entry, fromHere(spec)...)
	return []rule{
		newRule(chainPrerouting, entryText(spec), entry, goTo(chainVIP)),

		// The client sent the frame to the bridge's address, and the bridge has marked
		// it as ours already; from here on it is one that only passes.
		newRule(chainVIP, "passes through", setPktType(unix.PACKET_OTHERHOST)),
		newRule(chainVIP, "fragment", isFragment(), goTo(chainFragment)),
		newRule(chainVIP, "whole", goTo(chainBalance)),

		// Only a datagram's first fragment has ports. The others follow it by the id
		// of the datagram; first fragments that were refused left no trace, so their
		// followers go to the stack as well, which answers for the whole.
		newRule(chainFragment, "later: where the first went", isLaterFragment(), fragKey(), toBackendOf(mapFrags), accept()),
		newRule(chainFragment, "later, first unknown", isLaterFragment(), goTo(chainRefuse)),
		newRule(chainFragment, "first", jump(chainBalance)),
		newRule(chainFragment, "id used before", fragKey(), erase(mapFrags)),
		newRule(chainFragment, "remember", fragKey(), remember(mapFrags, lifeFrags)),

		newRule(chainBalance, "only some ports", ipDaddrIn(setNamed), jump(chainNamed)),
		newRule(chainBalance, "TCP", protocol(unix.IPPROTO_TCP), goTo(chainTCP)),
		newRule(chainBalance, "UDP", protocol(unix.IPPROTO_UDP), goTo(chainUDP)),
		newRule(chainBalance, "ICMP", protocol(unix.IPPROTO_ICMP), goTo(chainICMP)),
		newRule(chainBalance, "others", goTo(chainRest)),
	}
}

// namedRules refuse what is for no port of a VIP that has only its Ports: any
// other port, and every protocol without, but ICMP. They look at each packet, so a
// port that goes ends its connections: the next segment is answered with RST.
func namedRules() []rule {
	port := part(ipDaddr(r0), ipProtocol(r1), thDport(r2), mapped(r0, r4, mapPorts))
	return []rule{
		newRule(chainNamed, "one of them", port, ret()),
		newRule(chainNamed, "ICMP", protocol(unix.IPPROTO_ICMP), ret()),
		// The backend of a port that has gone still sends; what the client says to
		// that ends the connection there too.
		newRule(chainNamed, "RST: goes on if known", protocol(unix.IPPROTO_TCP), anyFlag(rst), ret()),
		newRule(chainNamed, "no port of it", goTo(chainRefuse)),
	}
}

// openLife is how long an open TCP connection without packets is remembered.
func openLife(spec kernel.BridgeTableSpec) time.Duration {
	if spec.Open == 0 {
		return lifeOpen
	}
	return time.Duration(spec.Open) * time.Second
}

// fromHere matches what is not from the uplink.
func fromHere(spec kernel.BridgeTableSpec) []expr.Any {
	if spec.Uplink == "" {
		return nil
	}
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, spec.Uplink)
	return part(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: r0}, isNot(r0, name...))
}

func tcpRules(open time.Duration) []rule {
	return []rule{
		newRule(chainTCP, "open", flowKey(), toBackendOf(mapTCP), goTo(chainTCPOpen)),
		// A port used again gets a new choice although the connection before it is
		// still remembered: that one has left the map of open ones.
		newRule(chainTCP, "new", opens(), goTo(chainTCPNew)),
		newRule(chainTCP, "closing", flowKey(), toBackendOf(mapClosing), goTo(chainTCPClosing)),
		newRule(chainTCP, "unknown: reset", goTo(chainRefuse)),

		newRule(chainTCPNew, "choose", jump(chainChoose)),
		newRule(chainTCPNew, "remember", flowKey(), remember(mapTCP, lifeSYN), ret()),
		// Without a place to remember it, the next segment would not find its backend.
		newRule(chainTCPNew, "full: reset", goTo(chainRefuse)),

		newRule(chainTCPOpen, "backend is gone", isLost(), goTo(chainTCPLost)),
		newRule(chainTCPOpen, "goes on", flags(fin|syn|rst, 0), flowKey(), remember(mapTCP, open), ret()),
		newRule(chainTCPOpen, "SYN repeated", anyFlag(syn), flowKey(), remember(mapTCP, lifeSYN), ret()),
		newRule(chainTCPOpen, "FIN or RST", goTo(chainTCPClose)),

		newRule(chainTCPLost, "forget", flowKey(), erase(mapTCP)),
		newRule(chainTCPLost, "new", opens(), goTo(chainTCPNew)),
		newRule(chainTCPLost, "reset", goTo(chainRefuse)),

		// Nothing follows a RST.
		newRule(chainTCPClose, "RST: forget", anyFlag(rst), flowKey(), erase(mapTCP), ret()),
		// After a FIN the other side may still send, and what the client answers to
		// that must arrive, but must not make the connection an open one again. It is
		// in one map before it leaves the other: its next segment may be on another
		// CPU. It leaves also if the other map is full, or this one would fill up too;
		// then the end of the connection is reset.
		newRule(chainTCPClose, "port used before", flowKey(), erase(mapClosing)),
		newRule(chainTCPClose, "FIN: closing", flowKey(), remember(mapClosing, lifeClosing)),
		newRule(chainTCPClose, "no longer open", flowKey(), erase(mapTCP)),

		newRule(chainTCPClosing, "backend is gone", isLost(), goTo(chainRefuse)),
		newRule(chainTCPClosing, "RST: forget", anyFlag(rst), flowKey(), erase(mapClosing), ret()),
		newRule(chainTCPClosing, "goes on", flowKey(), remember(mapClosing, lifeClosing)),
	}
}

// UDP and the rest differ from TCP: nothing says which packet is the first, so
// any packet may choose; and if there is no place to remember the choice, each
// packet chooses for itself, which a question and its answer survive.
func udpRules() []rule {
	return []rule{
		newRule(chainUDP, "each by itself", ipDaddrIn(setOnePacket), goTo(chainChoose)),
		newRule(chainUDP, "known", flowKey(), toBackendOf(mapUDP), goTo(chainUDPKnown)),
		newRule(chainUDP, "new", goTo(chainUDPNew)),
		newRule(chainUDPKnown, "goes on", isAlive(), part(notInSet(r0, setDrains)), flowKey(), remember(mapUDP, lifeUDP), ret()),
		newRule(chainUDPKnown, "backend leaves or is gone", flowKey(), erase(mapUDP)),
		newRule(chainUDPKnown, "new", goTo(chainUDPNew)),
		newRule(chainUDPNew, "choose", jump(chainChoose)),
		newRule(chainUDPNew, "remember", flowKey(), remember(mapUDP, lifeUDP)),
	}
}

func restRules() []rule {
	return []rule{
		newRule(chainRest, "known", restKey(), toBackendOf(mapRest), goTo(chainRestKnown)),
		newRule(chainRest, "new", goTo(chainRestNew)),
		newRule(chainRestKnown, "goes on", isAlive(), restKey(), remember(mapRest, lifeRest), ret()),
		newRule(chainRestKnown, "backend is gone", restKey(), erase(mapRest)),
		newRule(chainRestKnown, "new", goTo(chainRestNew)),
		newRule(chainRestNew, "choose", jump(chainChoose)),
		newRule(chainRestNew, "remember", restKey(), remember(mapRest, lifeRest)),
	}
}

// icmpRules send an echo request to whoever is next: each is whole in itself.
// An error that a client, or a router before it, reports goes to the backend whose
// packet it quotes.
func icmpRules() []rule {
	// The quoted packet went the other way, to the client. Who reports it may be a
	// router on the way: the client of a published port is not on this network.
	quoted := part(quotedDaddr(r0), ipDaddr(r1), quotedDport(r2), quotedSport(r3))
	about := func(p byte) []expr.Any { return part(quotedProtocol(r0), is(r0, p)) }
	return []rule{
		newRule(chainICMP, "echo request", part(icmpType(r0), is(r0, 8)), goTo(chainEcho)),
		newRule(chainICMP, "about open TCP", about(unix.IPPROTO_TCP), quoted, toBackendOf(mapTCP), ret()),
		newRule(chainICMP, "about closing TCP", about(unix.IPPROTO_TCP), quoted, toBackendOf(mapClosing), ret()),
		newRule(chainICMP, "about UDP", about(unix.IPPROTO_UDP), quoted, toBackendOf(mapUDP), ret()),
		newRule(chainICMP, "about nothing known", goTo(chainRefuse)),
	}
}

// entryText is the text of the first rule. It carries the table's spec, so that
// a dump need not take expressions apart; the fingerprints vouch for it.
func entryText(spec kernel.BridgeTableSpec) string { return "to a VIP, " + spec.String() }

// parseEntryText is the reverse of entryText.
func parseEntryText(s string) (kernel.BridgeTableSpec, bool) {
	f := strings.Fields(s)
	if len(f) < 5 || f[3] != "router" {
		return kernel.BridgeTableSpec{}, false
	}
	mac, err := model.ParseMAC(f[4])
	if err != nil {
		return kernel.BridgeTableSpec{}, false
	}
	spec := kernel.BridgeTableSpec{Router: mac}
	for f = f[5:]; len(f) >= 2; f = f[2:] {
		switch f[0] {
		case "uplink":
			spec.Uplink = f[1]
		case "open":
			if spec.Open, err = strconv.Atoi(f[1]); err != nil {
				return kernel.BridgeTableSpec{}, false
			}
		}
	}
	return spec, entryText(spec) == s
}

// Keys and data of elements as the kernel holds them: fields in network order,
// each padded with zeros to 4 octets, numbers that the kernel computes in the
// machine's order.
func ipKey(a netip.Addr) string {
	b := a.As4()
	return string(b[:])
}
func macKey(m model.MAC) string         { return string(m[:]) + "\x00\x00" }
func macData(m model.MAC) string        { return string(m[:]) }
func protoKey(proto model.Proto) string { return string([]byte{proto.Number(), 0, 0, 0}) }
func portKey(proto model.Proto, port uint16) string {
	return protoKey(proto) + portData(port) + "\x00\x00"
}
func portData(port uint16) string { return string(binary.BigEndian.AppendUint16(nil, port)) }
func slotKey(n int) string        { return string(binary.NativeEndian.AppendUint32(nil, uint32(n))) }

// The reverse; offset counts octets. ok is false if the key is too short.
func keyIP(key string, offset int) (a netip.Addr, ok bool) {
	if len(key) < offset+4 {
		return a, false
	}
	return netip.AddrFrom4([4]byte([]byte(key[offset:]))), true
}
func keyMAC(key string, offset int) (m model.MAC, ok bool) {
	if len(key) < offset+len(m) {
		return m, false
	}
	copy(m[:], key[offset:])
	return m, true
}
func keyPort(key string, offset int) (port uint16, ok bool) {
	if len(key) < offset+2 {
		return 0, false
	}
	return binary.BigEndian.Uint16([]byte(key[offset:])), true
}

// keyProto reads what protoKey wrote. ok is false also if the protocol has no ports.
func keyProto(key string, offset int) (proto model.Proto, ok bool) {
	if len(key) < offset+4 {
		return "", false
	}
	for _, p := range []model.Proto{model.TCP, model.UDP, model.SCTP} {
		if p.Number() == key[offset] {
			return p, true
		}
	}
	return "", false
}

// keyProtoPort reads what portKey wrote, likewise.
func keyProtoPort(key string, offset int) (proto model.Proto, port uint16, ok bool) {
	if proto, ok = keyProto(key, offset); !ok {
		return "", 0, false
	}
	port, ok = keyPort(key, offset+4)
	return proto, port, ok
}
func keySlot(key string, offset int) (n int, ok bool) {
	if len(key) < offset+4 {
		return 0, false
	}
	return int(binary.NativeEndian.Uint32([]byte(key[offset:]))), true
}
