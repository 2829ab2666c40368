package pool

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func ip(s string) netip.Addr    { return netip.MustParseAddr(s) }

func TestParseSubnetRefusesWithAReason(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"good", "10.255.0.0/20", ""},
		{"smallest", "10.0.0.4/30", ""},
		{"largest", "10.0.0.0/8", ""},
		{"not a CIDR", "10.0.0.0", `pool "10.0.0.0" is not a CIDR`},
		{"nonsense", "web", `pool "web" is not a CIDR`},
		{"empty", "", `pool "" is not a CIDR`},
		{"host bits", "10.0.0.1/24", "pool 10.0.0.1/24 has host bits set; did you mean 10.0.0.0/24?"},
		{"IPv6", "fd00:88::/64", "pool fd00:88::/64 is IPv6"},
		{"IPv4 in IPv6", "::ffff:10.0.0.0/120", "is IPv6"},
		{"/31", "10.0.0.0/31", "a /31 leaves nothing beside network, broadcast and gateway address"},
		{"/32", "10.0.0.0/32", "a /32 leaves nothing beside network, broadcast and gateway address"},
		{"/7", "10.0.0.0/7", "pool 10.0.0.0/7 is too large; choose a --subnet of /8 or smaller"},
		{"everything", "0.0.0.0/0", "too large"},
		{"this network", "0.0.0.0/8", "'this network'"},
		{"loopback", "127.1.0.0/16", "loopback"},
		{"multicast", "224.0.0.0/24", "multicast"},
		{"reserved", "250.0.0.0/8", "reserved"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseSubnet(tt.in)
			wantRefusal(t, err, ErrInvalid, tt.want)
		})
	}
}

func TestParseSubRefusesWithAReason(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"good", "10.0.0.128/25", ""},
		{"one address", "10.0.0.9/32", ""},
		{"the whole pool", "10.0.0.0/24", ""},
		{"outside", "10.0.1.0/25", "sub-pool 10.0.1.0/25 is outside of pool 10.0.0.0/24"},
		{"larger than the pool", "10.0.0.0/16", "is outside of pool"},
		{"host bits", "10.0.0.129/25", "did you mean 10.0.0.128/25?"},
		{"not a CIDR", "10.0.0.128", "write --ip-range as address/length"},
		{"IPv6", "fd00::/64", "is IPv6"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseSub(tt.in, pfx("10.0.0.0/24"))
			wantRefusal(t, err, ErrInvalid, tt.want)
		})
	}
}

func TestNodeRangeIsTheTopSixteenth(t *testing.T) {
	for subnet, want := range map[string]string{
		"10.255.0.0/20": "10.255.15.0/24",
		"10.0.0.0/24":   "10.0.0.240/28",
		"10.0.0.0/8":    "10.240.0.0/12",
		"10.0.0.0/25":   "",
		"10.0.0.0/30":   "",
		"fd00::/16":     "",
	} {
		got, ok := NodeRange(pfx(subnet))
		if ok != (want != "") || ok && got != pfx(want) {
			t.Errorf("NodeRange(%s) = %s, %t; want %q", subnet, got, ok, want)
		}
	}
}

func TestIDDescribesItself(t *testing.T) {
	for _, id := range []ID{
		{Space: "sluice-global", Subnet: pfx("10.255.0.0/20")},
		{Space: "sluice-local", Subnet: pfx("10.0.0.0/24"), Sub: pfx("10.0.0.128/25")},
	} {
		got, err := ParseID(id.String())
		if err != nil || got != id {
			t.Errorf("ParseID(%q) = %v, %v", id, got, err)
		}
	}
	for _, s := range []string{"", "sluice-global", "/10.0.0.0/24", "a/10.0.0.0", "a/10.0.0.1/24", "a/10.0.0.0/24/10.1.0.0/25", "a/10.0.0.0/24/x", "a/fd00::/64", "a/10.0.0.0/024"} {
		if id, err := ParseID(s); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseID(%q) = %v, %v", s, id, err)
		}
	}
}

// wantRefusal checks for an *Error of a kind whose text holds want; want "" is
// no error.
func wantRefusal(t *testing.T, err, kind error, want string) {
	t.Helper()
	if want == "" {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
		return
	}
	if _, ok := errors.AsType[*Error](err); !ok || !errors.Is(err, kind) || !strings.Contains(err.Error(), want) {
		t.Errorf("err = %v; want %v with %q", err, kind, want)
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"sluice-global/10.255.0.0/20", "sluice-local/10.0.0.0/24/10.0.0.128/25", "//", "a/::/0", "a/10.0.0.0/8"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err != nil {
			return
		}
		if id.String() != s {
			t.Fatalf("ParseID(%q) prints as %q", s, id)
		}
		l, err := NewLeases(id.Subnet, id.Sub, false)
		if err != nil {
			return // a sub-pool of the network address alone
		}
		if id.Subnet.Bits() >= 16 { // Check walks the subnet
			if err := l.Check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzParseOptions(f *testing.F) {
	f.Add("sluice.size", "24", "sluice.pool", "10.0.0.0/8")
	f.Add("sluice.size", "-1", "RequestAddressType", "x")
	f.Add("com.docker.network.ipam.serial", "true", "", "")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		o, err := ParseOptions(map[string]string{k1: v1, k2: v2})
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		list, err := o.List(List{Supernets: DefaultSupernets(), Bits: DefaultBits})
		if err != nil {
			return
		}
		if p, err := list.choose(netip.Prefix{}, nil, nil); err != nil || checkSubnet(p) != nil || p.Bits() != list.Bits {
			t.Fatalf("%v chose %s, %v", list, p, err)
		}
	})
}
