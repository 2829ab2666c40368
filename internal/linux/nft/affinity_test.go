package nft_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/model"
	lb "sluice/lb/service"
)

// onePacket are the variants that can balance each packet by itself.
func onePacket(v variant) bool { return v.mode != lb.NAT }

// asks sends n datagrams by one socket, each after the answer to the one before,
// and says who answered.
func (l *lab) asks(pc net.PacketConn, address string, n int) []string {
	l.t.Helper()
	var out []string
	for range n {
		b, err := ask(pc, address, []byte("?"))
		must(l.t, err)
		out = append(out, parseAnswer(string(b)).server)
	}
	return out
}

// until asks again and again, and fails the test if the answer is not yes in time.
func until(t testing.TB, limit time.Duration, what string, yes func() bool) {
	t.Helper()
	tick, late := time.NewTicker(50*time.Millisecond), time.After(limit)
	defer tick.Stop()
	for !yes() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("%s not within %v", what, limit)
		}
	}
}

// A client's connections go where its first one went, by whatever port, and those
// of other clients take turns with it.
func TestPersistentClientStays(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.serveAll("0.0.0.0:81")
		web := service{vip: vip1, ready: l.names("bcd"), options: model.ServiceOptions{Persist: 300, PersistBits: 32}}
		l.set(web)
		a := l.tasks["a"]
		clients := l.guests(a, "10.255.1.1", 9)
		l.set(web)
		first := l.who(a, clients, vip1+":80")
		wantHits(t, spread(first), map[string]int{"b": 3, "c": 3, "d": 3}) // round robin, once for each
		for _, port := range []string{":80", ":81"} {
			for ip, server := range l.who(a, clients, vip1+port) {
				if server != first[ip] {
					t.Errorf("client %s is with %s, then on port %s with %s", ip, first[ip], port, server)
				}
			}
		}
		// Also UDP, and also with much in between.
		for i, ip := range clients {
			got := l.asks(a.udp(t, ip.String()+":0"), vip1+":80", 2)
			if got[0] != first[ip] || got[1] != first[ip] {
				t.Errorf("client %d: UDP is with %v, TCP with %s", i, got, first[ip])
			}
		}
	})
}

// Addresses of one prefix are one client.
func TestPersistenceByPrefix(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		groups := [][]netip.Addr{l.guests(a, "10.255.1.1", 6), l.guests(a, "10.255.2.1", 6), l.guests(a, "10.255.3.1", 6)}
		l.set(service{vip: vip1, ready: l.names("bcd"), options: model.ServiceOptions{Persist: 300, PersistBits: 24}})
		for i, group := range groups {
			hits := spread(l.who(a, group, vip1+":80"))
			wantHits(t, hits, map[string]int{string(l.turns("bcd")[i]): 6})
		}
	})
}

// Persistence ends when the client has been silent for so long. One packet by
// itself is no connection that ip_vs would remember and wait for: after one of TCP
// it looks again 60 s later, if that is still remembered when the time is over.
func TestPersistenceExpires(t *testing.T) {
	// In nat, packets are not balanced each by itself.
	onThose(t, onePacket, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		const persist = 2 * time.Second
		clients := l.guests(a, "10.255.1.1", 120) // each look is a use, so each client is for one
		l.set(service{vip: vip1, ready: l.names("bcd"), options: model.ServiceOptions{
			Persist: int(persist.Seconds()), PersistBits: 32, OnePacket: true,
		}})
		type use struct {
			pc   net.PacketConn
			at   time.Time
			with string
		}
		var uses []use
		for _, ip := range clients {
			pc := a.udp(t, ip.String()+":0")
			at := time.Now()
			got := l.asks(pc, vip1+":80", 2)
			if got[0] != got[1] && time.Since(at) < persist {
				t.Errorf("client %s was answered by %v", ip, got)
			}
			uses = append(uses, use{pc, at, got[1]})
		}
		until(t, persist+patience, "another backend", func() bool {
			if len(uses) == 0 {
				t.Fatal("all clients are where they were")
			}
			// The latest first, against the order of turns: with it, all might get theirs again.
			u := uses[len(uses)-1]
			uses = uses[:len(uses)-1]
			if l.asks(u.pc, vip1+":80", 1)[0] == u.with {
				return false
			}
			const tick = 10 * time.Millisecond // of the kernel's clock, at 100 Hz
			if silent := time.Since(u.at); silent < persist-2*tick {
				t.Errorf("a client has lost its backend after %v", silent)
			}
			return true
		})
	})
}

// A persistent client whose backend leaves is given another at once, and stays
// with that when the first is back.
func TestPersistentClientLeavesALeavingBackend(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		web := service{vip: vip1, ready: l.names("bcd"), options: model.ServiceOptions{Persist: 300, PersistBits: 32}}
		l.set(web)
		conns, hits := l.holds(a, vip1+":80", 3)
		if len(hits) != 1 {
			t.Fatalf("a persistent client was answered by %v", hits)
		}
		first := conns[0].server
		without := web
		without.ready, without.leaving = nil, l.names(first)
		for _, k := range web.ready {
			if k.name != first {
				without.ready = append(without.ready, k)
			}
		}
		l.set(without)
		hits = l.hits(a, vip1+":80", 6)
		if len(hits) != 1 || hits[first] != 0 {
			t.Errorf("answered by %v, want one that is not %s", hits, first)
		}
		must(t, conns[0].echo("still there"))
		l.set(web)
		for who, n := range l.hits(a, vip1+":80", 6) {
			if hits[who] != n {
				t.Errorf("answered by %s, before by %v", who, hits)
			}
		}
	})
}

// A backend gets no more connections than its upper threshold. When all are full,
// a client is refused at once; when there are fewer than the lower threshold, it
// gets some again.
func TestThresholds(t *testing.T) {
	// nftables counts no connections.
	onThose(t, isIPVS, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		for _, scheduler := range []string{"rr", "wlc", "sh", "mh"} {
			l.set()
			l.set(service{vip: vip1, scheduler: scheduler, ready: l.names("bcd"), options: model.ServiceOptions{Upper: 3, Lower: 2}})
			conns, hits := l.holds(a, vip1+":80", 9)
			wantHits(t, hits, map[string]int{"b": 3, "c": 3, "d": 3})
			began := time.Now()
			if _, err := a.dial("", vip1+":80"); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: all are full, and the next is answered by %v, want refused", scheduler, err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("%s: the refusal took %v", scheduler, took)
			}
			for _, c := range conns {
				must(t, c.echo("still there"))
			}
			// One is no longer full only when it has fewer than 2. So b is, with 2, and c
			// has room for two. Once is enough: whoever counts is the same in all modes.
			if scheduler == "rr" && l.variant.mode == lb.DR {
				l.lose(conns, "b", 1)
				l.lose(conns, "c", 2)
				until(t, resetLife+patience, "room", func() bool {
					c, err := a.dial("", vip1+":80")
					if err != nil {
						return false
					}
					t.Cleanup(func() { c.Close() })
					if c.server != "c" {
						t.Errorf("answered by %s, want c, which has room", c.server)
					}
					conns = append(conns, c)
					return len(conns) == 9+2
				})
				if c, err := a.dial("", vip1+":80"); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("b has 2, and the next is answered by %v, %v", c, err)
				}
			}
			for _, c := range conns {
				c.reset()
			}
		}
	})
}

// resetLife is for how long ip_vs counts a connection that was reset: its state
// CLOSE lasts 10 s.
const resetLife = 10 * time.Second

// lose resets n of the connections that a server has.
func (l *lab) lose(conns []*conn, server string, n int) {
	l.t.Helper()
	for _, c := range conns {
		if c.server == server && n > 0 {
			c.reset()
			n--
		}
	}
	if n > 0 {
		l.t.Fatalf("%s has not so many connections", server)
	}
}

// With one-packet scheduling each datagram of one socket goes to the next backend;
// without, to the first one's. TCP is as ever.
func TestOnePacketScheduling(t *testing.T) {
	// In nat, ip_vs could not translate the answer to a packet that it has forgotten.
	onThose(t, onePacket, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		turns := l.turns("bcd")
		for _, one := range []bool{false, true, false} {
			l.set()
			l.set(service{vip: vip1, ready: l.names("bcd"), options: model.ServiceOptions{OnePacket: one}})
			got := fmt.Sprint(l.asks(a.udp(t, ""), vip1+":80", 6))
			want := fmt.Sprint([]string{turns[:1], turns[:1], turns[:1], turns[:1], turns[:1], turns[:1]})
			if one {
				want = fmt.Sprint([]string{turns[:1], turns[1:2], turns[2:], turns[:1], turns[1:2], turns[2:]})
			}
			if got != want {
				t.Errorf("one packet is %v: answered by %s, want %s", one, got, want)
			}
			conns, _ := l.holds(a, vip1+":80", 3)
			for range 3 {
				for _, c := range conns {
					must(t, c.echo("hello"))
				}
			}
		}
	})
}
