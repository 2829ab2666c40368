package nft

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// backTable is the table of family bridge that knows which node an answer of the
// routing mesh leaves by.
const backTable = "sluice-back"

const (
	mapEntries = "entries" // first address of a block -> MAC of the node's mesh address
	chainBack  = "back"
)

// backPriority is before table bridge sluice: an answer is no packet to a VIP, and
// need not be asked whether it is.
const backPriority = bridgePriority - 1

// backRuleset is table bridge sluice-back.
//
//	task ─▶ br0: from an alias ─▶ block ─▶ MAC of the entry ─▶ mesh0, or vxlan0 to its node
//
// A task sends its answer to the gateway, with the alias as its source. Nothing is
// remembered: the alias says it for every packet, also for later fragments and ICMP
// errors. One of an entry that is not known goes to the stack, which drops it.
func backRuleset(spec kernel.BackTableSpec) ruleset {
	var block []expr.Any
	if spec.Bits > 0 && spec.Bits <= 32 {
		block = part(mask(r0, netMask(spec.Bits)...))
	}
	return ruleset{
		family: bridgeFamily, table: backTable,
		sets: []set{{name: mapEntries, key: []nftables.SetDatatype{nftables.TypeIPAddr}, data: nftables.TypeEtherAddr}},
		chains: []chain{
			{name: chainPrerouting, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: backPriority},
			{name: chainBack},
		},
		rules: []rule{
			newRule(chainPrerouting, "from an alias, "+spec.String(),
				isIPv4(), inPrefix(ipSaddr(r0), spec.Pool), part(etherDaddr(r0), is(r0, spec.Router[:]...)), goTo(chainBack)),
			newRule(chainBack, "to its node",
				part(ipSaddr(r0)), block, part(mapped(r0, r0, mapEntries), setEtherDaddr(r0)), setPktType(unix.PACKET_OTHERHOST)),
		},
	}
}

// netMask is a mask of IPv4 with that many bits set; none for a number that it does
// not have.
func netMask(bits int) []byte {
	return octets(netip.PrefixFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), bits).Masked().Addr())
}

// inPrefix matches if what load puts into r0 is an address in the prefix.
func inPrefix(load expr.Any, p netip.Prefix) []expr.Any { return part(load, masked(p), equals(p)) }

// notInPrefix is the reverse.
func notInPrefix(load expr.Any, p netip.Prefix) []expr.Any {
	return part(load, masked(p), isNot(r0, octets(p.Addr())...))
}

func masked(p netip.Prefix) expr.Any { return mask(r0, netMask(p.Bits())...) }
func equals(p netip.Prefix) expr.Any { return is(r0, octets(p.Addr())...) }

// octets are those of an IPv4 address; of anything else, which nobody wants, zeros.
func octets(a netip.Addr) []byte {
	var b [4]byte
	if a.Is4() {
		b = a.As4()
	}
	return b[:]
}

// parseBackText reads the spec from the text of the first rule.
func parseBackText(s string) (kernel.BackTableSpec, bool) {
	f := strings.Fields(s)
	if len(f) != 9 {
		return kernel.BackTableSpec{}, false
	}
	mac, err1 := model.ParseMAC(f[4])
	pool, err2 := netip.ParsePrefix(f[6])
	bits, err3 := strconv.Atoi(f[8])
	spec := kernel.BackTableSpec{Router: mac, Pool: pool, Bits: bits}
	return spec, err1 == nil && err2 == nil && err3 == nil && checkBack(spec) == nil
}

// checkBack refuses what cannot be in a table, or would not read back as it was given.
func checkBack(s kernel.BackTableSpec) error {
	if err := checkPrefix("pool", s.Pool); err != nil {
		return err
	}
	if s.Bits < s.Pool.Bits() || s.Bits > 32 {
		return fmt.Errorf("blocks of %d bits; want %d to 32", s.Bits, s.Pool.Bits())
	}
	return nil
}

// checkPrefix refuses all but masked IPv4 prefixes.
func checkPrefix(what string, p netip.Prefix) error {
	if !p.IsValid() || !p.Addr().Is4() || p != p.Masked() {
		return fmt.Errorf("%s %s: want an IPv4 prefix without host bits", what, p)
	}
	return nil
}

// backLayout is table bridge sluice-back of namespace ns.
func backLayout(ns string) layout[kernel.BackTableSpec] {
	return layout[kernel.BackTableSpec]{
		key: kernel.BackTable{NS: ns}, rules: backRuleset, parse: parseBackText, check: checkBack,
		sets: []string{mapEntries}, owns: ofBack, load: backStates, op: (*change).backOp,
	}
}

// backStates adds what the map holds.
func backStates(f found, ns string, st kernel.State) error {
	for key, data := range f.elems[mapEntries] {
		block, ok1 := keyIP(key, 0)
		mac, ok2 := keyMAC(data, 0)
		if ok1 && ok2 {
			st[kernel.Back{NS: ns, Block: block}] = kernel.BackSpec{MAC: mac}
		}
	}
	return nil
}

// backOp adds an operation on a Back.
func (c *change) backOp(op kernel.Op) error {
	k, ok := op.Key.(kernel.Back)
	if !ok {
		return fmt.Errorf("%s is not of table bridge %s", op.Key, backTable)
	}
	have, want, err := cast[kernel.BackSpec](op)
	if err != nil {
		return err
	}
	if err := want4(k, k.Block); err != nil {
		return err
	}
	c.elem(op, mapEntries, ipKey(k.Block), macData(have.MAC), macData(want.MAC))
	return nil
}

// ofBack reports whether an object is in table bridge sluice-back.
func ofBack(k kernel.Key) bool {
	switch k.(type) {
	case kernel.BackTable, kernel.Back:
		return true
	}
	return false
}
