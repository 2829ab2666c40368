package pool

import (
	"encoding/binary"
	"net/netip"
	"strings"
)

// Limits of a subnet, as prefix lengths.
const (
	// minBits: a /8 is the largest private block there is (RFC 1918), and its
	// address set still fits into 2 MiB.
	minBits = 8
	// maxBits: below a /30 no address is left beside network, broadcast and
	// gateway address.
	maxBits = 30
	// keepBits: subnets smaller than a /24 keep nothing for nodes. One sixteenth
	// of a /25 would be 8 addresses: too few nodes to be of use, too many
	// containers lost.
	keepBits = 24
	// keepShare is log2 of the share kept for nodes: the top 1/16.
	keepShare = 4
)

// unusable are the blocks in which no container can have an address.
var unusable = []struct {
	prefix netip.Prefix
	why    string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "'this network' (RFC 1122)"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback (RFC 1122)"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast (RFC 5771)"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved (RFC 1112)"},
}

// ParseSubnet reads what a user gave as --subnet. The error is an *Error of
// kind ErrInvalid.
func ParseSubnet(s string) (netip.Prefix, error) {
	p, err := parsePrefix("pool", "--subnet", s)
	if err != nil {
		return netip.Prefix{}, err
	}
	return p, checkSubnet(p)
}

// ParseSub reads what a user gave as --ip-range for the subnet.
func ParseSub(s string, subnet netip.Prefix) (netip.Prefix, error) {
	p, err := parsePrefix("sub-pool", "--ip-range", s)
	if err != nil {
		return netip.Prefix{}, err
	}
	return p, checkSub(p, subnet)
}

func parsePrefix(what, flag, s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return netip.Prefix{}, refuse(ErrInvalid, "%s %q is not a CIDR; write %s as address/length, e.g. 10.255.0.0/20", what, s, flag)
	case !p.Addr().Is4():
		// Judged by the prefix: the engine's V6 flag is false for IPv6 subnets
		// of a swarm network (20.10 to 28.5).
		return netip.Prefix{}, refuse(ErrInvalid, "%s %s is IPv6; sluice networks are IPv4 only, since Swarm does not coordinate IPv6 addresses between nodes; leave out --ipv6 and give an IPv4 %s", what, p, flag)
	case p != p.Masked():
		return netip.Prefix{}, refuse(ErrInvalid, "%s %s has host bits set; did you mean %s?", what, p, p.Masked())
	}
	return p, nil
}

func checkSubnet(p netip.Prefix) error {
	switch {
	case !p.IsValid() || !p.Addr().Is4() || p != p.Masked():
		return refuse(ErrInvalid, "pool %s is not an IPv4 subnet; give --subnet as address/length, e.g. 10.255.0.0/20", p)
	case p.Bits() > maxBits:
		return refuse(ErrInvalid, "pool %s has no room: a /%d leaves nothing beside network, broadcast and gateway address; choose a --subnet of /%d or larger", p, p.Bits(), maxBits-1)
	case p.Bits() < minBits:
		return refuse(ErrInvalid, "pool %s is too large; choose a --subnet of /%d or smaller", p, minBits)
	}
	for _, u := range unusable {
		if u.prefix.Overlaps(p) {
			return refuse(ErrInvalid, "pool %s overlaps %s, which is %s; choose a private --subnet, e.g. 10.255.0.0/20", p, u.prefix, u.why)
		}
	}
	return nil
}

func checkSub(sub, subnet netip.Prefix) error {
	if !sub.IsValid() || sub != sub.Masked() || !contains(subnet, sub) {
		return refuse(ErrInvalid, "sub-pool %s is outside of pool %s; choose an --ip-range inside the --subnet", sub, subnet)
	}
	return nil
}

// contains reports whether all of b lies in a.
func contains(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Contains(b.Addr()) }

// NodeRange returns the part of a swarm network's subnet that is kept for the
// nodes themselves (sources of masqueraded connections, probes): its top 1/16.
// ok is false for subnets smaller than a /24, which keep nothing.
func NodeRange(subnet netip.Prefix) (nodes netip.Prefix, ok bool) {
	if !subnet.IsValid() || !subnet.Addr().Is4() || subnet.Bits() > keepBits {
		return netip.Prefix{}, false
	}
	size := sizeOf(subnet)
	return netip.PrefixFrom(at(subnet, size-size>>keepShare), subnet.Bits()+keepShare), true
}

// ID names a pool in the engine's memory. It describes itself, so that a
// request for it can be understood whatever has been forgotten meanwhile: the
// engine keeps the PoolID over restarts of the plugin.
type ID struct {
	Space  string
	Subnet netip.Prefix
	Sub    netip.Prefix // zero without --ip-range
}

// String returns "space/cidr" or "space/cidr/sub-pool cidr".
func (id ID) String() string {
	s := id.Space + "/" + id.Subnet.String()
	if id.Sub.IsValid() {
		s += "/" + id.Sub.String()
	}
	return s
}

// ParseID reads the result of ID.String. The error is an *Error of kind
// ErrInvalid. ParseID(s) succeeds only if the ID prints as s again.
func ParseID(s string) (ID, error) {
	bad := func() (ID, error) {
		return ID{}, refuse(ErrInvalid, "pool id %q is not one of sluice's; they look like %q", s, "sluice-global/10.255.0.0/20")
	}
	part := strings.Split(s, "/")
	if len(part) != 3 && len(part) != 5 || part[0] == "" {
		return bad()
	}
	id := ID{Space: part[0]}
	var err error
	if id.Subnet, err = ParseSubnet(part[1] + "/" + part[2]); err != nil {
		return bad()
	}
	if len(part) == 5 {
		if id.Sub, err = ParseSub(part[3]+"/"+part[4], id.Subnet); err != nil {
			return bad()
		}
	}
	return id, nil
}

// sizeOf returns how many addresses a subnet of /8 or smaller has.
func sizeOf(p netip.Prefix) uint32 { return 1 << (32 - p.Bits()) }

// number returns an IPv4 address as a number.
func number(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// at returns address number i of the subnet.
func at(p netip.Prefix, i uint32) netip.Addr { return address(number(p.Addr()) + i) }

func address(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}
