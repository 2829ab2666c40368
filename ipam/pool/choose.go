package pool

import (
	"net/netip"
	"slices"
	"sort"
	"strings"
)

// DefaultBits is the size of a subnet that nobody chose: a /20 has 3838
// addresses for containers and virtual IPs and 256 for nodes, and a /16 holds
// sixteen of them.
const DefaultBits = 20

// DefaultSupernets returns where such subnets come from: 10.255.0.0/16, then
// 10.254.0.0/16 down to 10.240.0.0/16. Swarm's own default pool starts at
// 10.0.0.0 and the bridge driver's are 172.17.0.0 and 192.168.0.0, so the far
// end of 10.0.0.0/8 keeps away from both.
func DefaultSupernets() []netip.Prefix {
	var s []netip.Prefix
	for b := byte(255); b >= 240; b-- {
		s = append(s, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, b, 0, 0}), 16))
	}
	return s
}

// List is where to take a subnet from when nobody chose one.
type List struct {
	Name      string         // tells one list's cursor from another's
	Supernets []netip.Prefix // in order of preference
	Bits      int            // prefix length of the subnets
}

// Check returns what is wrong with the list, as an *Error of kind ErrInvalid.
func (l List) Check() error {
	if len(l.Supernets) == 0 {
		return refuse(ErrInvalid, "no pools to take subnets from; give at least one, e.g. 10.255.0.0/16")
	}
	if err := checkSize(l.Bits); err != nil {
		return err
	}
	largest := maxBits
	for _, s := range l.Supernets {
		if err := checkSubnet(s); err != nil {
			return err
		}
		largest = min(largest, s.Bits())
	}
	if l.Bits < largest {
		return refuse(ErrInvalid, "subnets of /%d do not fit into %s; choose a longer prefix or a larger pool", l.Bits, join(l.Supernets))
	}
	return nil
}

// nearDefault: routes shorter than this are ways to "everywhere else" (0.0.0.0/0,
// the 0.0.0.0/1 and 128.0.0.0/1 of VPN clients), not networks that are there.
// A /8 is the largest private block (RFC 1918) and is meant as one.
const nearDefault = 8

// choose returns the first subnet of the list, starting behind last and going
// round once, that overlaps neither taken nor avoid. The time depends on how
// many prefixes are in the way, not on how many subnets the list holds.
func (l List) choose(last netip.Prefix, taken, avoid []netip.Prefix) (netip.Prefix, error) {
	if err := l.Check(); err != nil {
		return netip.Prefix{}, err
	}
	blocked := blocks(taken, avoid)
	start := slices.IndexFunc(l.Supernets, func(s netip.Prefix) bool { return last.IsValid() && contains(s, last) })
	var from uint64
	if start < 0 {
		start = 0
	} else {
		from = uint64(number(last.Addr())) + uint64(sizeOf(last))
	}
	// Round the list, and at the end once more into the supernet it started in,
	// for what lies before the start.
	for k := 0; k <= len(l.Supernets); k++ {
		s := l.Supernets[(start+k)%len(l.Supernets)]
		if p, ok := firstFree(s, l.Bits, from, blocked); ok {
			return p, nil
		}
		from = 0
	}
	return netip.Prefix{}, refuse(ErrExhausted,
		"no free subnet of /%d in %s: %d are in use by networks, the rest overlaps routes of this host; remove networks, give a --subnet, or name another pool with --ipam-opt %s=CIDR",
		l.Bits, join(l.Supernets), len(taken), optPool)
}

// block is a run of addresses that cannot be used, both ends included.
type block struct{ first, last uint64 }

// blocks merges prefixes into sorted, disjoint blocks.
func blocks(taken, avoid []netip.Prefix) []block {
	var bs []block
	add := func(p netip.Prefix) {
		first := uint64(number(p.Masked().Addr()))
		bs = append(bs, block{first, first + 1<<(32-p.Bits()) - 1})
	}
	for _, p := range taken {
		add(p)
	}
	for _, p := range avoid {
		if p.IsValid() && p.Addr().Is4() && p.Bits() >= nearDefault {
			add(p)
		}
	}
	slices.SortFunc(bs, func(a, b block) int {
		if a.first < b.first {
			return -1
		}
		return 1
	})
	merged := bs[:0]
	for _, b := range bs {
		if n := len(merged); n > 0 && b.first <= merged[n-1].last+1 {
			merged[n-1].last = max(merged[n-1].last, b.last)
			continue
		}
		merged = append(merged, b)
	}
	return merged
}

// firstFree returns the first subnet of s, from the address upwards, that
// touches no block.
func firstFree(s netip.Prefix, bits int, from uint64, blocked []block) (netip.Prefix, bool) {
	if bits < s.Bits() {
		return netip.Prefix{}, false // another supernet of the list is large enough
	}
	size := uint64(1) << (32 - bits)
	end := uint64(number(s.Addr())) + uint64(sizeOf(s))
	up := func(n uint64) uint64 { return (n + size - 1) / size * size }
	for n := up(max(from, uint64(number(s.Addr())))); n+size <= end; {
		i := sort.Search(len(blocked), func(i int) bool { return blocked[i].last >= n })
		if i == len(blocked) || blocked[i].first >= n+size {
			return netip.PrefixFrom(address(uint32(n)), bits), true
		}
		n = up(blocked[i].last + 1)
	}
	return netip.Prefix{}, false
}

func join(ps []netip.Prefix) string {
	var s []string
	for _, p := range ps {
		s = append(s, p.String())
	}
	return strings.Join(s, ", ")
}
