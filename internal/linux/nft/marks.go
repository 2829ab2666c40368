package nft

import (
	"encoding/binary"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// The maps of table ip sluice in a network's namespace. A task's namespace has
// another table of that name, see taskRuleset.
const (
	mapMarks    = "marks"     // ip daddr -> mark
	mapOwnMarks = "own-marks" // ip saddr . ip daddr -> mark, for a member that calls its own VIP

	// The same for all ports of a protocol: keys end in it.
	mapProtoMarks    = "proto-marks"
	mapOwnProtoMarks = "own-proto-marks"

	// The same for one port: keys end in protocol . destination port.
	mapPortMarks    = "port-marks"
	mapOwnPortMarks = "own-port-marks"
)

// markPriority is that of iptables' mangle table (NF_IP_PRI_MANGLE): before
// IPVS looks, which it does in hook input.
const markPriority = -150

// markRuleset is table ip sluice of a network's namespace. Clients send what is
// for a VIP to the bridge's own MAC, because it is the bridge that answers ARP,
// so the namespace's stack gets it without any help, and the rest of the traffic
// meets none of this. What comes from the uplink has a backend's MAC and stays in
// the bridge.
//
// The last rule that knows the packet decides, so a port's mark is before that of
// its protocol, and that before the one of the whole VIP. Of a fragmented datagram
// only the first fragment has ports; the stack puts the datagram together before IPVS
// looks, with the mark of the first.
//
// The mark ends with the packet's choice: on its way out it would be taken for one
// of the host's, which routes VXLAN packets by it on some kernels.
func markRuleset() ruleset {
	ip, proto, port := nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService
	setMarkFrom := func(key []expr.Any, name string) []expr.Any {
		return part(append(key,
			mapped(r0, r4, name),
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: r4},
		)...)
	}
	return ruleset{
		family: nftables.TableFamilyIPv4, table: tableName,
		sets: []set{
			{name: mapMarks, key: []nftables.SetDatatype{ip}, data: nftables.TypeMark},
			{name: mapOwnMarks, key: []nftables.SetDatatype{ip, ip}, data: nftables.TypeMark},
			{name: mapProtoMarks, key: []nftables.SetDatatype{ip, proto}, data: nftables.TypeMark},
			{name: mapOwnProtoMarks, key: []nftables.SetDatatype{ip, ip, proto}, data: nftables.TypeMark},
			{name: mapPortMarks, key: []nftables.SetDatatype{ip, proto, port}, data: nftables.TypeMark},
			{name: mapOwnPortMarks, key: []nftables.SetDatatype{ip, ip, proto, port}, data: nftables.TypeMark},
		},
		chains: []chain{
			{name: chainPrerouting, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: markPriority},
			{name: chainOutput, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_LOCAL_OUT, priority: markPriority},
		},
		rules: []rule{
			newRule(chainPrerouting, "to a VIP", setMarkFrom(part(ipDaddr(r0)), mapMarks)),
			newRule(chainPrerouting, "a member to its own", setMarkFrom(part(ipSaddr(r0), ipDaddr(r1)), mapOwnMarks)),
			newRule(chainPrerouting, "by a protocol", setMarkFrom(part(ipDaddr(r0), ipProtocol(r1)), mapProtoMarks)),
			newRule(chainPrerouting, "a member to its own by a protocol",
				setMarkFrom(part(ipSaddr(r0), ipDaddr(r1), ipProtocol(r2)), mapOwnProtoMarks)),
			// What is where the ports would be in a later fragment is the sender's to choose.
			newRule(chainPrerouting, "no ports", isLaterFragment(), ret()),
			newRule(chainPrerouting, "to a port", setMarkFrom(part(ipDaddr(r0), ipProtocol(r1), thDport(r2)), mapPortMarks)),
			newRule(chainPrerouting, "a member to a port of its own",
				setMarkFrom(part(ipSaddr(r0), ipDaddr(r1), ipProtocol(r2), thDport(r3)), mapOwnPortMarks)),
			newRule(chainOutput, "unmark",
				part(&expr.Meta{Key: expr.MetaKeyMARK, Register: r0}, isNot(r0, 0, 0, 0, 0)), setMark(0)),
		},
	}
}

// marksLayout is table ip sluice of a network's namespace ns.
func marksLayout(ns string) layout[kernel.MarkTableSpec] {
	return layout[kernel.MarkTableSpec]{
		key:   kernel.MarkTable{NS: ns},
		rules: func(kernel.MarkTableSpec) ruleset { return markRuleset() },
		parse: func(string) (spec kernel.MarkTableSpec, ok bool) { return spec, true },
		sets:  []string{mapMarks, mapOwnMarks, mapProtoMarks, mapOwnProtoMarks, mapPortMarks, mapOwnPortMarks},
		owns:  ofMarks, load: markStates, op: (*change).markOp,
	}
}

// markData is the data of an element: a number in the machine's order.
func markData(n uint32) string { return string(binary.NativeEndian.AppendUint32(nil, n)) }

// markStates adds what the maps hold.
func markStates(f found, ns string, st kernel.State) error {
	put := func(key kernel.Mark, data string) {
		if len(data) == 4 {
			st[key] = kernel.MarkSpec{Mark: binary.NativeEndian.Uint32([]byte(data))}
		}
	}
	for key, data := range f.elems[mapMarks] {
		if vip, ok := keyIP(key, 0); ok {
			put(kernel.Mark{NS: ns, VIP: vip}, data)
		}
	}
	for key, data := range f.elems[mapOwnMarks] {
		client, ok1 := keyIP(key, 0)
		vip, ok2 := keyIP(key, 4)
		if ok1 && ok2 {
			put(kernel.Mark{NS: ns, VIP: vip, Client: client}, data)
		}
	}
	for key, data := range f.elems[mapProtoMarks] {
		vip, ok1 := keyIP(key, 0)
		proto, ok2 := keyProto(key, 4)
		if ok1 && ok2 {
			put(kernel.Mark{NS: ns, VIP: vip, Proto: proto}, data)
		}
	}
	for key, data := range f.elems[mapOwnProtoMarks] {
		client, ok1 := keyIP(key, 0)
		vip, ok2 := keyIP(key, 4)
		proto, ok3 := keyProto(key, 8)
		if ok1 && ok2 && ok3 {
			put(kernel.Mark{NS: ns, VIP: vip, Client: client, Proto: proto}, data)
		}
	}
	for key, data := range f.elems[mapPortMarks] {
		vip, ok1 := keyIP(key, 0)
		proto, port, ok2 := keyProtoPort(key, 4)
		if ok1 && ok2 {
			put(kernel.Mark{NS: ns, VIP: vip, Proto: proto, Port: port}, data)
		}
	}
	for key, data := range f.elems[mapOwnPortMarks] {
		client, ok1 := keyIP(key, 0)
		vip, ok2 := keyIP(key, 4)
		proto, port, ok3 := keyProtoPort(key, 8)
		if ok1 && ok2 && ok3 {
			put(kernel.Mark{NS: ns, VIP: vip, Client: client, Proto: proto, Port: port}, data)
		}
	}
	return nil
}

// markOp adds an operation on a Mark.
func (c *change) markOp(op kernel.Op) error {
	k, ok := op.Key.(kernel.Mark)
	if !ok {
		return fmt.Errorf("%s is not of table ip %s", op.Key, tableName)
	}
	have, want, err := cast[kernel.MarkSpec](op)
	if err != nil {
		return err
	}
	if op.Want != nil && want.Mark == 0 {
		return fmt.Errorf("%s: mark 0 is none", k)
	}
	if err := want4(k, k.VIP); err != nil {
		return err
	}
	set, protoSet, portSet, key := mapMarks, mapProtoMarks, mapPortMarks, ipKey(k.VIP)
	if k.Client.IsValid() {
		if err := want4(k, k.Client); err != nil {
			return err
		}
		set, protoSet, portSet, key = mapOwnMarks, mapOwnProtoMarks, mapOwnPortMarks, ipKey(k.Client)+key
	}
	switch {
	case k.Proto == "" && k.Port == 0: // all
	case k.Proto.Number() == 0:
		return wantPorts(k, k.Proto)
	case k.Port == 0:
		set, key = protoSet, key+protoKey(k.Proto)
	default:
		set, key = portSet, key+portKey(k.Proto, k.Port)
	}
	c.elem(op, set, key, markData(have.Mark), markData(want.Mark))
	return nil
}

// ofMarks reports whether an object is in table ip sluice of a network's
// namespace, not in table bridge sluice.
func ofMarks(k kernel.Key) bool {
	switch k.(type) {
	case kernel.MarkTable, kernel.Mark:
		return true
	}
	return false
}
