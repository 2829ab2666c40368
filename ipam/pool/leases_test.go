package pool

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func leases(t testing.TB, subnet, sub string, keep bool) *Leases {
	t.Helper()
	var s netip.Prefix
	if sub != "" {
		s = pfx(sub)
	}
	l, err := NewLeases(pfx(subnet), s, keep)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestRequestHandsOutWhatMayBeHandedOut(t *testing.T) {
	for _, tt := range []struct {
		name, subnet, sub string
		keep              bool
		first, last       string
		n                 int
	}{
		{"swarm /24", "10.0.0.0/24", "", true, "10.0.0.1", "10.0.0.239", 239},
		{"local /24", "10.0.0.0/24", "", false, "10.0.0.1", "10.0.0.254", 254},
		{"swarm /20", "10.255.0.0/20", "", true, "10.255.0.1", "10.255.14.255", 3839},
		{"swarm /25 keeps nothing", "10.0.0.0/25", "", true, "10.0.0.1", "10.0.0.126", 126},
		{"smallest", "10.0.0.4/30", "", true, "10.0.0.5", "10.0.0.6", 2},
		{"upper half", "10.0.0.0/24", "10.0.0.128/25", false, "10.0.0.128", "10.0.0.254", 127},
		{"upper half of a swarm", "10.0.0.0/24", "10.0.0.128/25", true, "10.0.0.128", "10.0.0.239", 112},
		{"lower half", "10.0.0.0/24", "10.0.0.0/25", true, "10.0.0.1", "10.0.0.127", 127},
		{"one address", "10.0.0.0/24", "10.0.0.9/32", true, "10.0.0.9", "10.0.0.9", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := leases(t, tt.subnet, tt.sub, tt.keep)
			if l.Free() != tt.n {
				t.Errorf("Free = %d, want %d", l.Free(), tt.n)
			}
			for i := range tt.n {
				a, err := l.Request()
				if err != nil {
					t.Fatal(err)
				}
				if i == 0 && a != ip(tt.first) || i == tt.n-1 && a != ip(tt.last) {
					t.Errorf("address %d is %s", i, a)
				}
			}
			if a, err := l.Request(); err == nil {
				t.Errorf("one more: %s", a)
			}
			if err := l.Check(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFreedAddressRestsUntilTheSearchHasGoneRound(t *testing.T) {
	l := leases(t, "10.0.0.0/24", "", true)
	a, _ := l.Request()
	for range 238 {
		l.Release(a)
		b, err := l.Request()
		if err != nil || b == ip("10.0.0.1") {
			t.Fatalf("got %s, %v", b, err)
		}
		a = b
	}
	l.Release(a)
	if b, _ := l.Request(); b != ip("10.0.0.1") {
		t.Errorf("after one round: %s", b)
	}
}

func TestExhaustedPoolSaysHowManyAndWhatToDo(t *testing.T) {
	for _, tt := range []struct{ name, subnet, sub, want string }{
		{"swarm", "10.0.0.0/24", "", "pool 10.0.0.0/24 has no free address: 239 in use, 2 of them unconfirmed since the last change of leader (10.0.0.240/28 is kept for nodes); remove containers or services from the network, or create one with a larger --subnet"},
		{"range", "10.0.0.0/25", "10.0.0.8/29", "the --ip-range from 10.0.0.8 to 10.0.0.15 of pool 10.0.0.0/25 has no free address: 8 in use, 2 of them"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := leases(t, tt.subnet, tt.sub, true)
			for l.Free() > 0 {
				a, err := l.Request()
				if err != nil {
					t.Fatal(err)
				}
				if l.Unconfirmed() < 2 {
					l.Doubt(a)
				}
			}
			_, err := l.Request()
			wantRefusal(t, err, ErrExhausted, tt.want)
		})
	}
}

func TestAllowedSaysWhyNot(t *testing.T) {
	l := leases(t, "10.0.0.0/24", "10.0.0.128/25", true)
	for addr, want := range map[string]string{
		"10.0.0.1":   "",
		"10.0.0.239": "",
		"10.0.0.0":   "is the network address of pool 10.0.0.0/24; choose one from 10.0.0.1 to 10.0.0.239",
		"10.0.0.255": "is the broadcast address",
		"10.0.0.240": "lies in 10.0.0.240/28, which sluice keeps for the nodes of the swarm",
		"10.0.1.1":   "is outside of pool 10.0.0.0/24",
		"fd00::1":    "is outside of pool",
	} {
		wantRefusal(t, l.Allowed(ip(addr)), ErrInvalid, want)
	}
	wantRefusal(t, l.Allowed(netip.Addr{}), ErrInvalid, "outside")
}

func TestSubPoolWithNothingToHandOut(t *testing.T) {
	for _, sub := range []string{"10.0.0.240/28", "10.0.0.0/32", "10.0.0.248/29"} {
		_, err := NewLeases(pfx("10.0.0.0/24"), pfx(sub), true)
		wantRefusal(t, err, ErrInvalid, "sub-pool "+sub+" holds no address that can be handed out of pool 10.0.0.0/24 (10.0.0.240/28 is kept for nodes)")
	}
	_, err := NewLeases(pfx("10.0.0.0/24"), pfx("10.1.0.0/25"), true)
	wantRefusal(t, err, ErrInvalid, "outside of pool")
}

func TestNoAddressTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.IntRange(22, 30).Draw(t, "bits")
		l, err := NewLeases(netip.PrefixFrom(ip("10.0.0.0"), bits), netip.Prefix{}, rapid.Bool().Draw(t, "keep"))
		if err != nil {
			t.Fatal(err)
		}
		have := map[netip.Addr]bool{}
		t.Repeat(map[string]func(*rapid.T){
			"request": func(t *rapid.T) {
				free := l.Free()
				a, err := l.Request()
				if (err == nil) != (free > 0) || err == nil && (have[a] || l.Allowed(a) != nil) {
					t.Fatalf("Request = %s, %v with %d free", a, err, free)
				}
				if err == nil {
					have[a] = true
				}
			},
			"release": func(t *rapid.T) {
				a := at(l.subnet, rapid.Uint32Range(0, sizeOf(l.subnet)-1).Draw(t, "i"))
				l.Release(a)
				delete(have, a)
			},
			"ask": func(t *rapid.T) {
				a := at(l.subnet, rapid.Uint32Range(1, l.top).Draw(t, "i"))
				l.Take(a)
				l.Take(a) // a replay
				have[a] = true
			},
			"": func(t *rapid.T) {
				if err := l.Check(); err != nil {
					t.Fatal(err)
				}
				if l.Used() != len(have) {
					t.Fatalf("%d used, want %d", l.Used(), len(have))
				}
			},
		})
	})
}

func BenchmarkRequest16(b *testing.B) {
	l := leases(b, "10.0.0.0/16", "", true)
	for b.Loop() {
		a, err := l.Request()
		if err != nil {
			b.Fatal(err)
		}
		l.Release(a)
	}
}

// BenchmarkRequest16Full has one free address in a /16, as far from the cursor
// as it can be: the search goes round the whole subnet each time.
func BenchmarkRequest16Full(b *testing.B) { full(b, "10.0.0.0/16") }

// BenchmarkRequest8Full is the same in the largest subnet there can be.
func BenchmarkRequest8Full(b *testing.B) { full(b, "10.0.0.0/8") }

func full(b *testing.B, subnet string) {
	l := leases(b, subnet, "", true)
	for l.Free() > 0 {
		if _, err := l.Request(); err != nil {
			b.Fatal(err)
		}
	}
	hole := at(l.subnet, l.hi/2)
	for b.Loop() {
		l.Release(hole)
		if a, err := l.Request(); err != nil || a != hole {
			b.Fatal(a, err)
		}
	}
}

// BenchmarkPlanAddress16 is a whole decision and its Apply in a /16 that is full
// but for one address.
func BenchmarkPlanAddress16(b *testing.B) {
	t := NewTable("s", Replayed, nil)
	id, c, err := t.PlanClaim(pfx("10.0.0.0/16"), netip.Prefix{})
	if err != nil {
		b.Fatal(err)
	}
	t.Apply(c)
	for t.pools[id.Subnet].Free() > 0 {
		_, c, err := t.PlanAddress(id, Want{})
		if err != nil {
			b.Fatal(err)
		}
		t.Apply(c)
	}
	hole := ip("10.0.100.0")
	for b.Loop() {
		t.Apply(t.PlanReleaseAddress(id, hole, now()))
		a, c, err := t.PlanAddress(id, Want{})
		if err != nil || a != hole {
			b.Fatal(a, err)
		}
		t.Apply(c)
	}
}
