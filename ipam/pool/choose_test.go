package pool

import (
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestChooseGoesRoundTheListAndAvoids(t *testing.T) {
	list := List{Supernets: []netip.Prefix{pfx("10.255.0.0/22"), pfx("10.254.0.0/22")}, Bits: 24}
	for _, tt := range []struct {
		name         string
		last         string
		taken, avoid []netip.Prefix
		want, err    string
	}{
		{name: "first of all", want: "10.255.0.0/24"},
		{name: "behind the last one, though an earlier one is free", last: "10.255.1.0/24", want: "10.255.2.0/24"},
		{name: "into the next pool", last: "10.255.3.0/24", want: "10.254.0.0/24"},
		{name: "round to the first", last: "10.254.3.0/24", want: "10.255.0.0/24"},
		{name: "last from other settings", last: "10.9.0.0/24", want: "10.255.0.0/24"},
		{name: "last of another size", last: "10.255.0.0/26", want: "10.255.1.0/24"},
		{name: "over a network", taken: []netip.Prefix{pfx("10.255.0.0/24")}, want: "10.255.1.0/24"},
		{name: "over a part of a network", taken: []netip.Prefix{pfx("10.255.0.8/30"), pfx("10.255.1.0/25")}, want: "10.255.2.0/24"},
		{name: "over a larger network", taken: []netip.Prefix{pfx("10.255.0.0/16")}, want: "10.254.0.0/24"},
		{name: "away from routes", avoid: []netip.Prefix{pfx("10.255.0.1/32"), pfx("10.255.1.0/24"), pfx("192.168.0.0/16")}, want: "10.255.2.0/24"},
		{name: "a default route is not in the way", avoid: []netip.Prefix{pfx("0.0.0.0/0"), pfx("0.0.0.0/1"), pfx("::/0"), {}}, want: "10.255.0.0/24"},
		{name: "an unmasked route", avoid: []netip.Prefix{pfx("10.255.2.9/22")}, want: "10.254.0.0/24"},
		{name: "what lies before the start, at the end", last: "10.255.2.0/24", taken: []netip.Prefix{pfx("10.255.2.0/23"), pfx("10.254.0.0/22")}, want: "10.255.0.0/24"},
		{name: "the last one itself, when nothing else is free", last: "10.255.2.0/24", taken: []netip.Prefix{pfx("10.255.0.0/23"), pfx("10.255.3.0/24"), pfx("10.254.0.0/22")}, want: "10.255.2.0/24"},
		{name: "nothing left", taken: []netip.Prefix{pfx("10.255.0.0/22")}, avoid: []netip.Prefix{pfx("10.0.0.0/8")},
			err: "no free subnet of /24 in 10.255.0.0/22, 10.254.0.0/22: 1 are in use by networks, the rest overlaps routes of this host; remove networks, give a --subnet, or name another pool with --ipam-opt sluice.pool=CIDR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var last netip.Prefix
			if tt.last != "" {
				last = pfx(tt.last)
			}
			got, err := list.choose(last, tt.taken, tt.avoid)
			wantRefusal(t, err, ErrExhausted, tt.err)
			if err == nil && got != pfx(tt.want) {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestChooseSkipsPoolsThatAreTooSmall(t *testing.T) {
	list := List{Supernets: []netip.Prefix{pfx("10.255.0.0/26"), pfx("10.254.0.0/16")}, Bits: 24}
	if got, err := list.choose(netip.Prefix{}, nil, nil); err != nil || got != pfx("10.254.0.0/24") {
		t.Errorf("got %s, %v", got, err)
	}
}

func TestDefaultsAreSixteenPoolsFromTheTop(t *testing.T) {
	s := DefaultSupernets()
	if len(s) != 16 || s[0] != pfx("10.255.0.0/16") || s[1] != pfx("10.254.0.0/16") || s[15] != pfx("10.240.0.0/16") {
		t.Errorf("got %v", s)
	}
	if err := (List{Supernets: s, Bits: DefaultBits}).Check(); err != nil {
		t.Error(err)
	}
}

// A choice is right if it is one of the list, free, and nothing free lies between
// the last one and it; the test finds that by trying all of them.
func TestChooseAgreesWithTryingAll(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		prefix := rapid.Custom(func(t *rapid.T) netip.Prefix {
			bits := rapid.IntRange(22, 32).Draw(t, "bits")
			return netip.PrefixFrom(at(pfx("10.0.0.0/20"), rapid.Uint32Range(0, 4095).Draw(t, "n")), bits).Masked()
		})
		list := List{Supernets: []netip.Prefix{pfx("10.0.8.0/21"), pfx("10.0.0.0/22")}, Bits: rapid.IntRange(22, 27).Draw(t, "size")}
		taken, avoid := rapid.SliceOfN(prefix, 0, 12).Draw(t, "taken"), rapid.SliceOfN(prefix, 0, 12).Draw(t, "avoid")
		var all []netip.Prefix
		for _, s := range list.Supernets {
			for n := uint32(0); n < sizeOf(s); n += 1 << (32 - list.Bits) {
				all = append(all, netip.PrefixFrom(at(s, n), list.Bits))
			}
		}
		start := rapid.IntRange(0, len(all)-1).Draw(t, "last")
		var want netip.Prefix
	search:
		for k := 1; k <= len(all); k++ {
			p := all[(start+k)%len(all)]
			for _, b := range append(taken, avoid...) {
				if b.Overlaps(p) {
					continue search
				}
			}
			want = p
			break
		}
		got, err := list.choose(all[start], taken, avoid)
		if got != want || (err == nil) != want.IsValid() {
			t.Fatalf("choose = %s, %v; want %s", got, err, want)
		}
	})
}

// Two million candidates, all taken one by one, must not be tried one by one.
func TestChooseIsQuickInALargePool(t *testing.T) {
	list := List{Supernets: []netip.Prefix{pfx("10.0.0.0/8")}, Bits: 29}
	var taken []netip.Prefix
	for i := range uint32(2000) {
		taken = append(taken, netip.PrefixFrom(address(10<<24+i<<13), 19))
	}
	begin := time.Now()
	got, err := list.choose(netip.Prefix{}, taken, nil)
	if err != nil || got != pfx("10.250.0.0/29") {
		t.Errorf("got %s, %v", got, err)
	}
	if took := time.Since(begin); took > time.Second { // 0.2 ms; a second for a loaded machine
		t.Errorf("took %s", took)
	}
}
