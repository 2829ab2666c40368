package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Tables reads and changes the tables. It has no state: any number of
// goroutines may use it, but only one at a time should change one namespace.
type Tables struct{}

// configured are the sets whose elements Apply writes; the rest belongs to packets.
func configured() []string {
	return append([]string{
		setVIPs, mapPick, mapSlots, setAlive, setMembers, mapOthers, setDrains, setNamed, mapPorts, setOnePacket,
	}, natConfigured()...)
}

// DumpBridge returns what the tables of a network's namespace hold, bridge sluice,
// bridge sluice-lift, bridge sluice-back, bridge sluice-guard and ip sluice, under
// namespace name ns. nsFD refers to the namespace. There is no table: no objects. The
// fixed part is not as this version makes it: no BridgeTable, LiftTable, BackTable,
// GuardTable or MarkTable, but what is in the maps.
//
// An object that is there in part only, which Apply never leaves behind, has the
// zero value, so that it differs from whatever is wanted.
//
// kernel.ErrInterrupted: the rules of the namespace changed all the while.
func (Tables) DumpBridge(nsFD int, ns string) (kernel.State, error) {
	st := kernel.State{}
	for _, t := range bridgeTables(ns) {
		more, err := t.dump(nsFD)
		if err != nil {
			return nil, fmt.Errorf("netns %s: %w", ns, err)
		}
		maps.Copy(st, more)
	}
	return st, nil
}

// bridgeTables are the tables of a network's namespace, in the order in which Apply
// changes them. A container is let say who it is before anything is sent to it. Answers
// have a way before there are any. Then marks: a network that goes over to IPVS has them
// before it loses the table that takes its frames. The last has what is of no other.
func bridgeTables(ns string) []table {
	return []table{guardLayout(ns), backLayout(ns), liftLayout(ns), marksLayout(ns), bridgeLayout(ns)}
}

// bridgeLayout is table bridge sluice of namespace ns.
func bridgeLayout(ns string) layout[kernel.BridgeTableSpec] {
	return layout[kernel.BridgeTableSpec]{
		key: kernel.BridgeTable{NS: ns}, rules: bridgeRuleset, parse: parseEntryText, check: checkBridge,
		sets: configured(), load: bridgeStates, op: (*change).bridgeOp,
	}
}

// checkBridge refuses what cannot be in a table, or would not read back as it was given.
func checkBridge(s kernel.BridgeTableSpec) error {
	if s.Uplink != "" {
		if err := checkDevice(s.Uplink); err != nil {
			return fmt.Errorf("uplink: %w", err)
		}
	}
	if s.Open < 0 {
		return fmt.Errorf("open connections are remembered for %d seconds; want 0 or more", s.Open)
	}
	return nil
}

// bridgeStates adds what the sets and the chains of VIPs hold.
func bridgeStates(f found, ns string, st kernel.State) error {
	if err := vipStates(f, ns, st); err != nil {
		return err
	}
	natStates(f, ns, st)
	for key, data := range f.elems[mapSlots] {
		vip, ok1 := keyIP(key, 0)
		n, ok2 := keySlot(key, 4)
		mac, ok3 := keyMAC(data, 0)
		if ok1 && ok2 && ok3 {
			st[kernel.Slot{NS: ns, VIP: vip, Slot: n}] = kernel.SlotSpec{MAC: mac}
		}
	}
	for key := range f.elems[setAlive] {
		vip, ok1 := keyIP(key, 0)
		mac, ok2 := keyMAC(key, 4)
		if ok1 && ok2 {
			_, drains := f.elems[setDrains][key]
			st[kernel.Alive{NS: ns, VIP: vip, MAC: mac}] = kernel.AliveSpec{Drains: drains}
		}
	}
	for key, data := range f.elems[mapPorts] {
		vip, ok1 := keyIP(key, 0)
		proto, port, ok2 := keyProtoPort(key, 4)
		to, ok3 := keyPort(data, 0)
		if ok1 && ok2 && ok3 {
			st[kernel.Port{NS: ns, VIP: vip, Proto: proto, Port: port}] = kernel.PortSpec{To: to}
		}
	}
	for key := range f.elems[setMembers] {
		ip, ok1 := keyIP(key, 0)
		mac, ok2 := keyMAC(key, 4)
		if !ok1 || !ok2 {
			continue
		}
		k := kernel.Member{NS: ns, IP: ip}
		if _, twice := st[k]; twice {
			mac = model.MAC{} // one address with two MACs
		}
		st[k] = kernel.MemberSpec{MAC: mac}
	}
	for key, data := range f.elems[mapOthers] {
		client, ok1 := keyIP(key, 0)
		vip, ok2 := keyIP(key, 4)
		mac, ok3 := keyMAC(data, 0)
		if ok1 && ok2 && ok3 {
			st[kernel.Other{NS: ns, VIP: vip, Client: client}] = kernel.OtherSpec{MAC: mac}
		}
	}
	return nil
}

// vipStates adds the VIPs. Three things make one: elements in the sets that its
// spec puts it in, an element in the verdict map, and the chain that this points to
// with its rules.
func vipStates(f found, ns string, st kernel.State) error {
	seen := map[netip.Addr]bool{}
	for _, s := range []string{setVIPs, setNamed, setOnePacket, setNAT, mapPick} {
		for key := range f.elems[s] {
			if vip, ok := keyIP(key, 0); ok {
				seen[vip] = true
			}
		}
	}
	for name := range f.chains {
		if vip, ok := pickedVIP(name); ok {
			seen[vip] = true
		}
	}
	for vip := range seen {
		spec, err := vipState(f, vip)
		if err != nil {
			return err
		}
		st[kernel.VIP{NS: ns, IP: vip}] = spec
	}
	return nil
}

// vipState returns the spec of a VIP, or the zero spec if it is in pieces.
func vipState(f found, vip netip.Addr) (kernel.VIPSpec, error) {
	name := pickChain(vip)
	if len(f.rules[name]) == 0 {
		return kernel.VIPSpec{}, nil
	}
	spec, ok := parsePickText(uncomment(f.rules[name][0]))
	if !ok {
		return kernel.VIPSpec{}, nil
	}
	for set, want := range vipSets(spec) {
		if _, in := f.elems[set][ipKey(vip)]; in != want {
			return kernel.VIPSpec{}, nil
		}
	}
	rules, err := pickRules(vip, spec)
	if err != nil {
		return kernel.VIPSpec{}, nil // a text that we would not write
	}
	if ok, err := f.hasChain(bridgeFamily, mapPick, ipKey(vip), name, rules); !ok || err != nil {
		return kernel.VIPSpec{}, err
	}
	return spec, nil
}

// ApplyBridge changes the tables of a network's namespace, each in one
// transaction: packets meet the state before or the state after, and an error
// means that nothing changed in that table and those that come after it: guard,
// back, lift, marks, balancer. Operations are of PhaseVIP and this namespace; doing them again
// changes nothing. Creating a table where one is repairs it: connections stay known.
//
// kernel.ErrNotExist: there is no table to put something in.
// kernel.ErrUnsupported: no such scheduler.
func (Tables) ApplyBridge(nsFD int, ns string, ops []kernel.Op) error {
	tables := bridgeTables(ns)
	by := make([][]kernel.Op, len(tables))
	for _, op := range ops {
		if op.Key.Netns() != ns {
			return fmt.Errorf("netns %s: %s belongs to netns %s", ns, op.Key, op.Key.Netns())
		}
		i := slices.IndexFunc(tables, func(t table) bool { return t.holds(op.Key) })
		by[i] = append(by[i], op)
	}
	for i, t := range tables {
		if len(by[i]) == 0 {
			continue
		}
		if err := t.apply(nsFD, by[i]); err != nil {
			return fmt.Errorf("netns %s: %w", ns, err)
		}
	}
	return nil
}
