package pool

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestLostPoolComesBackWithWhatIsInUse: whatever was given away and is in use is not
// given away again, and a replay by a new leader finds everything as it was.
func TestLostPoolComesBackWithWhatIsInUse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tb := NewTable("s", Replayed, nil)
		subnet := netip.PrefixFrom(ip("10.0.0.0"), rapid.IntRange(22, 28).Draw(t, "bits"))
		pid := network(t, tb, "web", subnet, rapid.IntRange(0, 12).Draw(t, "n"))
		for range rapid.IntRange(0, 6).Draw(t, "releases") {
			tb.Apply(tb.PlanReleaseAddress(pid, at(subnet, rapid.Uint32Range(2, 15).Draw(t, "i")), now()))
		}
		leases := tb.Leases(pid)
		lost := Lost{Network: "web", Subnet: subnet}
		for _, l := range leases {
			if l.Gateway {
				lost.Gateway = l.Address
			}
			lost.Live = append(lost.Live, l.Address) // the gateway too, as managers list it
		}

		tb = NewTable("s", Replayed, nil)
		c, err := tb.PlanRecover(lost)
		if err != nil {
			t.Fatal(err)
		}
		tb.Apply(c)
		if err := tb.Check(); err != nil {
			t.Fatal(err)
		}
		in := func(all []Lease) (out []netip.Addr) {
			for _, l := range all {
				out = append(out, l.Address)
			}
			return out
		}
		if got := in(tb.Leases(pid)); !slices.Equal(got, in(leases)) {
			t.Fatalf("leases %v, were %v", got, in(leases))
		}
		if again, err := tb.PlanRecover(lost); err != nil || again.Durable() {
			t.Fatalf("once more: %+v, %v", again, err)
		}
		if a, _, err := tb.PlanAddress(pid, Want{Serial: true}); err == nil && slices.Contains(lost.Live, a) {
			t.Fatalf("%s is given away again", a)
		} else if err != nil && !errors.Is(err, ErrExhausted) {
			t.Fatal(err)
		}
		found, c, err := tb.PlanConfirm("web", lost.Live, nil, now())
		if err != nil || len(found.Dropped)+len(found.Adopted)+len(found.Freed) > 0 {
			t.Fatalf("compared: %+v, %v", found, err)
		}
		tb.Apply(c)
		replay(t, tb, "web", pid, leases)
		if got := tb.Leases(pid); !slices.Equal(in(got), in(leases)) {
			t.Fatalf("replayed: leases %v, were %v", got, leases)
		}
		if err := tb.Check(); err != nil {
			t.Fatal(err)
		}
	})
}

func TestLostPoolKeepsItsRange(t *testing.T) {
	tb := NewTable("s", Replayed, nil)
	c, err := tb.PlanRecover(Lost{
		Network: "web", Subnet: netip.MustParsePrefix("10.0.0.0/24"), Sub: netip.MustParsePrefix("10.0.0.64/26"),
		Gateway: ip("10.0.0.1"), Live: []netip.Addr{ip("10.0.0.70"), ip("10.0.0.66"), ip("10.0.0.9"), ip("10.9.0.1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	tb.Apply(c)
	pid, err := ParseID("s/10.0.0.0/24/10.0.0.64/26")
	if err != nil {
		t.Fatal(err)
	}
	// Behind the highest of the range: what lies between may have been given back just now.
	if a, _, err := tb.PlanAddress(pid, Want{Serial: true}); err != nil || a != ip("10.0.0.71") {
		t.Errorf("the next is %s, %v", a, err)
	}
	if s := tb.Status(); len(s) != 1 || s[0].Used != 4 {
		t.Errorf("%+v", s)
	}
}

func TestOnlyALostPoolComesBack(t *testing.T) {
	other := netip.MustParsePrefix("10.0.0.0/24")
	for name, tt := range map[string]struct {
		lost Lost
		want error
	}{
		"its subnet is asked for just now":    {Lost{Network: "web", Subnet: netip.MustParsePrefix("10.1.0.0/24")}, errAsked},
		"it has its pool":                     {Lost{Network: "other", Subnet: other}, nil},
		"another network has a part of it":    {Lost{Network: "web", Subnet: netip.MustParsePrefix("10.0.0.0/25")}, ErrConflict},
		"another network has its subnet":      {Lost{Network: "web", Subnet: other}, ErrConflict},
		"a subnet that can be none of sluice": {Lost{Network: "web", Subnet: netip.MustParsePrefix("10.2.0.0/32")}, ErrInvalid},
	} {
		tb := NewTable("s", Replayed, nil)
		network(t, tb, "other", other, 3)
		_, c, err := tb.PlanClaim(netip.MustParsePrefix("10.1.0.0/24"), netip.Prefix{})
		if err != nil {
			t.Fatal(err)
		}
		tb.Apply(c)
		c, err = tb.PlanRecover(tt.lost)
		if !errors.Is(err, tt.want) || c.Durable() {
			t.Errorf("%s: %v, %+v", name, err, c)
		}
	}
}
