package nft_test

import (
	"context"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

// guestAt is in the name of each guest, between its host's and its address.
const guestAt = " at "

// guests gives a task n more addresses from first on, as if they were so many
// clients, and makes them known to everybody.
func (l *lab) guests(k *task, first string, n int) []netip.Addr {
	l.t.Helper()
	eth, err := k.h.LinkByName("eth0")
	must(l.t, err)
	var out []netip.Addr
	for ip := netip.MustParseAddr(first); len(out) < n; ip = ip.Next() {
		out = append(out, ip)
		addr, err := netlink.ParseAddr(ip.String() + "/20")
		must(l.t, err)
		must(l.t, k.h.AddrAdd(eth, addr))
		g := *k
		g.name, g.ip = k.name+guestAt+ip.String(), ip
		l.extra = append(l.extra, &g)
		for _, o := range l.tasks {
			if o != k {
				l.introduce(o, &g)
			}
		}
	}
	return out
}

// who connects once from each address of a task, and says who answered which.
func (l *lab) who(k *task, from []netip.Addr, address string) map[netip.Addr]string {
	l.t.Helper()
	out := map[netip.Addr]string{}
	do(l.t, k.fd, func() error {
		for _, ip := range from {
			d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0))}
			nc, err := d.DialContext(context.Background(), "tcp4", address)
			if err != nil {
				return err
			}
			c, err := greeted(nc)
			if err != nil {
				return fmt.Errorf("client %s: %w", ip, err)
			}
			if c.client != c.LocalAddr().String() {
				return fmt.Errorf("client %s was seen as %s", c.LocalAddr(), c.client)
			}
			out[ip] = c.server
			c.reset()
		}
		return nil
	})
	return out
}

// spread counts how many clients each backend has.
func spread(who map[netip.Addr]string) map[string]int {
	out := map[string]int{}
	for _, server := range who {
		out[server]++
	}
	return out
}

// chance is how likely a fair spread over backends with these weights is at least
// as uneven: the upper tail of Pearson's chi-squared.
func chance(hits, weights map[string]int) float64 {
	n, sum := 0, 0
	for _, h := range hits {
		n += h
	}
	for _, w := range weights {
		sum += w
	}
	x := 0.0
	for who, w := range weights {
		want := float64(n) * float64(w) / float64(sum)
		x += (float64(hits[who]) - want) * (float64(hits[who]) - want) / want
	}
	// With two degrees of freedom more, the tail has another term; the first two
	// are known: Abramowitz and Stegun, 26.4.4 and 26.4.5.
	p, at := math.Erfc(math.Sqrt(x/2)), 1
	if len(weights)%2 == 1 {
		p, at = math.Exp(-x/2), 2
	}
	for ; at < len(weights)-1; at += 2 {
		k := float64(at) / 2
		p += math.Pow(x/2, k) * math.Exp(-x/2) / math.Gamma(k+1)
	}
	return p
}

// unlikely is what no test sees of a fair spread: one in a million.
const unlikely = 1e-6

func TestChance(t *testing.T) {
	for _, c := range []struct {
		hits map[string]int
		want float64
	}{
		{map[string]int{"b": 50, "c": 50, "d": 50}, 1},
		{map[string]int{"b": 30, "c": 70}, math.Erfc(math.Sqrt(8))}, // chi-squared 16, 1 degree of freedom
		{map[string]int{"b": 150, "c": 0, "d": 0}, math.Exp(-150)},  // 300, 2
		// From tables of the distribution.
		{map[string]int{"b": 20, "c": 20, "d": 20, "e": 40}, 0.00738},          // 12, 3
		{map[string]int{"b": 10, "c": 10, "d": 10, "e": 10, "f": 20}, 0.15459}, // 20/3, 4
	} {
		weights := map[string]int{}
		for who := range c.hits {
			weights[who] = 1
		}
		if got := chance(c.hits, weights); math.Abs(got-c.want) > c.want/100 {
			t.Errorf("%v: %g, want %g", c.hits, got, c.want)
		}
	}
}

// Hashes spread many clients by weight, keep each where it is whatever happens to
// others' services, and are not moved by when or how often it comes.
func TestHashesSpreadManyClients(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		clients := l.guests(a, "10.255.1.1", 97) // no multiple of 3: turns would not bring each the same again
		for _, scheduler := range []string{"sh", "mh"} {
			t.Run(scheduler, func(t *testing.T) {
				l := l.in(t)
				web := service{vip: vip1, scheduler: scheduler, ready: l.names("bcd")}
				l.set(web)
				first := l.who(a, clients, vip1+":80")
				if hits := spread(first); chance(hits, map[string]int{"b": 1, "c": 1, "d": 1}) < unlikely {
					t.Errorf("97 clients are spread %v, which is not fair", hits)
				}
				for what, other := range map[string][]service{
					"nothing":                     nil,
					"another service":             {{vip: vip2, ready: l.names("bc")}},
					"a weight of another service": {{vip: vip2, scheduler: "wrr", ready: l.names("bbc")}},
					"less of another service":     {{vip: vip2, scheduler: "wrr", ready: l.names("b"), leaving: l.names("c")}},
				} {
					l.set(append(other, web)...)
					if now := l.who(a, clients, vip1+":80"); !maps.Equal(now, first) {
						t.Errorf("%s has moved clients of this one", what)
					}
				}
			})
		}
		// By weight: in nftables, sh knows none.
		weights := map[string]int{"b": 3, "c": 1, "d": 2}
		for _, scheduler := range []string{"sh", "mh"} {
			if scheduler == "sh" && l.one.ipvs == nil {
				continue
			}
			l.set()
			l.set(service{vip: vip1, scheduler: scheduler, ready: l.weighted("b3 c1 d2")})
			hits := spread(l.who(a, clients, vip1+":80"))
			if chance(hits, weights) < unlikely {
				t.Errorf("%s: 97 clients are spread %v, want as %v", scheduler, hits, weights)
			}
		}
	})
}

// With mh, a backend that leaves, and then goes, takes its own clients with it,
// which are spread over the rest; of the others, only few move.
func TestMaglevMovesFew(t *testing.T) {
	// A table of 4,093 slots moves 1 % of the others when one of six backends goes,
	// one of 251, which nftables has for so few, 4 % (means of some hundred tables);
	// clients are a sample of the slots, and the addresses here are always the same.
	// sh, which is laid out anew, moves four of five in ip_vs, and more than a quarter
	// in nftables, which gives each backend a range of hashes.
	const few = 0.15
	onAll(t, func(t *testing.T, l *lab) {
		l.addTask("e", l.one, 20)
		l.addTask("f", l.two, 21)
		l.addTask("g", l.one, 22)
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		clients := l.guests(a, "10.255.1.1", 180)
		l.set(service{vip: vip1, scheduler: "mh", ready: l.names("bcdefg")})
		before := l.who(a, clients, vip1+":80")
		// moves says how many clients of others are elsewhere, and where c's are.
		moves := func(before, now map[netip.Addr]string) (moved, others int, anew map[string]int) {
			anew = map[string]int{}
			for ip, server := range before {
				if server == "c" {
					anew[now[ip]]++
					continue
				}
				others++
				if server != now[ip] {
					moved++
				}
			}
			return moved, others, anew
		}
		for _, step := range []struct {
			what string
			web  service
		}{
			{"leaves", service{vip: vip1, scheduler: "mh", ready: l.names("bdefg"), leaving: l.names("c")}},
			{"has gone", service{vip: vip1, scheduler: "mh", ready: l.names("bdefg")}},
		} {
			l.set(step.web)
			moved, others, anew := moves(before, l.who(a, clients, vip1+":80"))
			t.Logf("c %s: %d of %d others move, its own go to %v", step.what, moved, others, anew)
			if anew["c"] > 0 || chance(anew, map[string]int{"b": 1, "d": 1, "e": 1, "f": 1, "g": 1}) < unlikely {
				t.Errorf("c %s: its clients go to %v", step.what, anew)
			}
			if float64(moved) > few*float64(others) {
				t.Errorf("c %s: %d of %d clients of others move", step.what, moved, others)
			}
		}
		// It comes back, and so do its clients.
		l.set(service{vip: vip1, scheduler: "mh", ready: l.names("bcdefg")})
		if now := l.who(a, clients, vip1+":80"); !maps.Equal(now, before) {
			t.Errorf("with the same backends as before, clients are elsewhere")
		}
		// sh promises none of it, and shows that the difference can be seen.
		l.set()
		l.set(service{vip: vip1, scheduler: "sh", ready: l.names("bcdefg")})
		before = l.who(a, clients, vip1+":80")
		l.set(service{vip: vip1, scheduler: "sh", ready: l.names("bdefg")})
		if moved, others, _ := moves(before, l.who(a, clients, vip1+":80")); float64(moved) <= few*float64(others) {
			t.Errorf("sh: only %d of %d clients of others move, as with mh", moved, others)
		}
	})
}
