package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// How a backend is chosen. A VIP's own chain says which slot is next, or who the
// client's backend is, in the frame's mark:
//
//	choose ─▶ vip-10.255.0.100   nothing marked: count, then look whether the client is known
//	   │       ├─ yes: its backend's MAC, markKnown ─▶ known-client
//	   │       └─ no:  number of the next slot, with markKeep if the VIP keeps clients
//	   ├─ slots: VIP . number ─▶ MAC
//	   ├─ self     the client picked itself: vip-…, markAgain; or a known other
//	   └─ markKeep: vip-… once more, markStore, which remembers the client
//
// The mark is how a VIP's chain hands over what it found. Rules of its own that
// look into the map of slots would make the kernel walk all of that map whenever
// one of them is made: 10 ms at 4,000 services. The chains of VIPs that keep their
// clients do look into the map of clients, which is bounded; full, it adds less to
// a change than that varies by itself (Linux 6.18). A frame that comes out of a veth
// pair has no mark, and goes on without.
const (
	markKeep  uint32 = 1 << 31 // with a slot's number: to be remembered
	markKnown uint32 = 1 << 30 // the frame has its backend
	markStore uint32 = 1 << 29 // remember the frame's backend
	markAgain uint32 = 1 << 28 // another choice: neither counted, nor the client's
	// maskSlot is the rest, the slot's number. Maglev's tables, the longest rows of
	// slots, have 14 bits.
	maskSlot = markAgain - 1
)

// setMark sets the packet's mark, a number in the machine's order.
func setMark(n uint32) []expr.Any {
	return part(
		&expr.Immediate{Register: r0, Data: native(n)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: r0},
	)
}

// getMark reads the packet's mark.
func getMark(reg uint32) expr.Any { return &expr.Meta{Key: expr.MetaKeyMARK, Register: reg} }

// hasMark matches a mark that is just this.
func hasMark(n uint32) []expr.Any { return part(getMark(r0), is(r0, native(n)...)) }

func native(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

func chooseRules(router model.MAC) []rule {
	toRouter := part(&expr.Immediate{Register: r0, Data: router[:]}, setEtherDaddr(r0))
	pick := part(ipDaddr(r0), vmap(r0, mapPick))
	toSlot := part(
		ipDaddr(r0), getMark(r1), mask(r1, native(maskSlot)...),
		mapped(r0, r4, mapSlots), setEtherDaddr(r4),
	)
	// A packet goes by the rules that were there when it came, and finds the elements
	// that are there when it looks (nft_do_chain keeps its generation, a set's lookup
	// takes the newest): of one that comes while slots become fewer, the slot may have
	// gone. The first is there as long as there is one.
	toFirst := part(
		ipDaddr(r0), &expr.Immediate{Register: r1, Data: native(0)},
		mapped(r0, r4, mapSlots), setEtherDaddr(r4),
	)
	keeps := part(getMark(r0), mask(r0, native(markKeep)...), isNot(r0, 0, 0, 0, 0))
	toOther := part(ipSaddr(r0), ipDaddr(r1), mapped(r0, r4, mapOthers), setEtherDaddr(r4))
	return []rule{
		newRule(chainChoose, "next of this VIP", setMark(0), pick),
		newRule(chainChoose, "known client", hasMark(markKnown), goTo(chainKnown)),
		// If a slot were empty, the stack would answer, not the backend before.
		newRule(chainChoose, "if there is none", toRouter),
		newRule(chainChoose, "its backend", toSlot),
		newRule(chainChoose, "gone by now: the first", part(etherDaddr(r0), is(r0, router[:]...)), toFirst),
		newRule(chainChoose, "itself", isSelf(), jump(chainSelf)),
		newRule(chainChoose, "remember the client", keeps, setMark(markStore), pick),
		newRule(chainChoose, "unmark", setMark(0)),

		// A prefix of clients may have one of them as its backend.
		newRule(chainKnown, "unmark", setMark(0)),
		newRule(chainKnown, "itself: a known other", isSelf(), toOther),
		newRule(chainKnown, "there is no other", isSelf(), goTo(chainRefuse)),

		// A member is not given itself. The next slot is another backend, mostly;
		// with weights it may be the same once more.
		newRule(chainSelf, "next of this VIP", setMark(markAgain), pick),
		newRule(chainSelf, "its backend", toSlot),
		newRule(chainSelf, "another", isOther(), ret()),
		newRule(chainSelf, "a known other", toOther),
		newRule(chainSelf, "there is no other", isSelf(), setMark(0), goTo(chainRefuse)),

		// An echo request is no connection: not counted, not kept, and no reason to
		// keep a client.
		newRule(chainEcho, "if there is none", toRouter),
		newRule(chainEcho, "next of this VIP", setMark(markAgain), pick),
		newRule(chainEcho, "its backend", toSlot),
		newRule(chainEcho, "itself", isSelf(), jump(chainSelf)),
		newRule(chainEcho, "unmark", setMark(0)),

		// The namespace has the VIP as an address and nothing listens on it: its stack
		// answers TCP with RST, UDP with port unreachable.
		newRule(chainRefuse, "to the stack", toRouter, setPktType(unix.PACKET_HOST), accept()),
	}
}

// pickPrefix begins the names of the chains that pick.
const pickPrefix = "vip-"

// pickChain is the name of the chain that picks a backend of one VIP. Each has
// its own because the counter of a round robin lives in the rule.
func pickChain(vip netip.Addr) string { return pickPrefix + vip.String() }

// isPick reports whether a chain is one of those.
func isPick(chain string) bool {
	_, ok := pickedVIP(chain)
	return ok
}

// pickedVIP is the reverse of pickChain.
func pickedVIP(chain string) (netip.Addr, bool) {
	s, ok := strings.CutPrefix(chain, pickPrefix)
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(s)
	return a, err == nil && a.Is4()
}

// The schedulers, as in kernel.VIPSpec.
const (
	schedulerRR  = "rr"
	schedulerWRR = "wrr" // the plan gives a weight as so many slots
	schedulerSH  = "sh"
)

// pickRules are the rules of a VIP's chain. The first carries the spec. One of them
// has a counter, of connections: see Traffic.
func pickRules(vip netip.Addr, spec kernel.VIPSpec) ([]rule, error) {
	name, text := pickChain(vip), spec.String()
	if err := checkVIP(spec); err != nil {
		return nil, fmt.Errorf("vip %s: %w", vip, err)
	}
	if spec.Slots == 0 {
		// What was counted waits where no packet comes.
		return []rule{newRule(name, text, goTo(chainRefuse)), newRule(name, "so far", part(&expr.Counter{}))}, nil
	}
	store := part(&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: r0})
	if spec.Persist == 0 {
		// One rule, as there are so many; r3 is the mark before.
		count := part(is(r3, native(0)...), &expr.Counter{})
		return []rule{newRule(name, text, part(getMark(r3)), nextSlot(spec, 0), store, count)}, nil
	}
	life := time.Duration(spec.Persist) * time.Second
	client := part(ipDaddr(r0), ipSaddr(r1), mask(r1, net.CIDRMask(spec.PersistBits, 32)...))
	return []rule{
		newRule(name, text, hasMark(0), part(&expr.Counter{})),
		newRule(name, "known client", hasMark(0), client, toBackendOf(mapPersist), isAlive(), part(notInSet(r0, setDrains)),
			client, remember(mapPersist, life), setMark(markKnown), ret()),
		newRule(name, "its backend takes nothing new", hasMark(0), client, erase(mapPersist)),
		newRule(name, "remember", hasMark(markStore), client, remember(mapPersist, life)),
		newRule(name, "next slot", part(getMark(r3), isNot(r3, native(markStore)...)), nextSlot(spec, markKeep), store),
	}, nil
}

// checkVIP is an error for a spec that no rules can be made of, or that would not
// read back.
func checkVIP(spec kernel.VIPSpec) error {
	switch {
	case spec.Scheduler != schedulerRR && spec.Scheduler != schedulerWRR && spec.Scheduler != schedulerSH:
		return fmt.Errorf("scheduler %q; want rr, wrr or sh: %w", spec.Scheduler, kernel.ErrUnsupported)
	case spec.Slots < 0 || spec.Slots > int(maskSlot):
		return fmt.Errorf("%d slots; want 0 to %d", spec.Slots, maskSlot)
	case spec.Persist < 0:
		return fmt.Errorf("persist %d seconds; want 0 or more", spec.Persist)
	case spec.Persist == 0 && spec.PersistBits != 0:
		return fmt.Errorf("persist prefix of %d bits, but no time", spec.PersistBits)
	case spec.Persist > 0 && (spec.PersistBits < 1 || spec.PersistBits > 32):
		return fmt.Errorf("persist prefix of %d bits; want 1 to 32", spec.PersistBits)
	}
	return nil
}

// nextSlot puts the number of the next slot into r0, with the flag.
func nextSlot(spec kernel.VIPSpec, flag uint32) []expr.Any {
	slots := uint32(spec.Slots)
	if spec.Scheduler == schedulerSH {
		// The seed is the same everywhere and always, so that a client's slot changes
		// only if their number does.
		return part(ipSaddr(r1), &expr.Hash{
			SourceRegister: r1, DestRegister: r0, Length: 4, Modulus: slots, Seed: hashSeed, Offset: flag, Type: expr.HashTypeJenkins,
		})
	}
	return part(&expr.Numgen{Register: r0, Modulus: slots, Offset: flag, Type: unix.NFT_NG_INCREMENTAL})
}

// hashSeed is any number but 0, for which the kernel takes a random one.
const hashSeed = 1

// parsePickText is the reverse of the text of a VIP's first rule, kernel.VIPSpec.String.
func parsePickText(s string) (kernel.VIPSpec, bool) {
	var spec kernel.VIPSpec
	if _, err := fmt.Sscanf(s, "%s slots %d", &spec.Scheduler, &spec.Slots); err != nil {
		return kernel.VIPSpec{}, false
	}
	f := strings.Fields(s)
	for f = f[min(3, len(f)):]; len(f) > 0; f = f[1:] {
		switch f[0] {
		case "named":
			spec.Named = true
		case "nat":
			spec.NAT = true
		case "one-packet":
			spec.OnePacket = true
		case "persist":
			if len(f) < 4 {
				return kernel.VIPSpec{}, false
			}
			if _, err := fmt.Sscanf(strings.Join(f[:4], " "), "persist %d bits %d", &spec.Persist, &spec.PersistBits); err != nil {
				return kernel.VIPSpec{}, false
			}
			f = f[3:]
		}
	}
	return spec, spec.String() == s
}

// vipSets are the sets that a VIP is in, or not, as its spec says.
func vipSets(spec kernel.VIPSpec) map[string]bool {
	return map[string]bool{setVIPs: true, setNamed: spec.Named, setOnePacket: spec.OnePacket, setNAT: spec.NAT}
}
