package nft_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	lb "sluice/lb/service"
)

func TestBackendIsRemoved(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		both := service{vip: vip1, ready: l.names("bd")}
		l.set(both)
		var conns [2]*conn
		var socks [2]net.PacketConn
		for _, who := range l.turns("bd") {
			i := strings.IndexRune("bd", who)
			var err error
			conns[i], err = a.dial("", vip1+":80")
			must(t, err)
			defer conns[i].Close()
		}
		for _, turn := range l.turns("bd") {
			who, i := string(turn), strings.IndexRune("bd", turn)
			if conns[i].server != who {
				t.Fatalf("connection %d is with %s", i, conns[i].server)
			}
			socks[i] = a.udp(t, "")
			got, err := ask(socks[i], vip1+":80", []byte("?"))
			must(t, err)
			if s := parseAnswer(string(got)).server; s != who {
				t.Fatalf("socket %d is with %s", i, s)
			}
		}
		// Leaving: what it has it keeps, and gets nothing new.
		l.set(service{vip: vip1, ready: l.names("b"), leaving: l.names("d")})
		must(t, conns[0].echo("stays"))
		must(t, conns[1].echo("leaving"))
		// Datagrams have nothing open: they move, but where answers that are under way
		// have to be translated by what would go with the place.
		with := "b"
		if isIPVS(l.variant) && l.variant.mode == lb.NAT {
			with = "d"
		}
		got, err := ask(socks[1], vip1+":80", []byte("?"))
		must(t, err)
		if s := parseAnswer(string(got)).server; s != with {
			t.Errorf("flow to the leaving backend went to %s, want %s", s, with)
		}
		wantHits(t, l.hits(a, vip1+":80", 4), map[string]int{"b": 4})
		// Gone: TCP is reset, UDP moves with its next datagram.
		l.set(service{vip: vip1, ready: l.names("b")})
		must(t, conns[0].echo("stays"))
		if err := conns[1].echo("gone"); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("connection to the gone backend: %v, want reset", err)
		}
		for range 2 {
			got, err = ask(socks[1], vip1+":80", []byte("?"))
			must(t, err)
			if s := parseAnswer(string(got)).server; s != "b" {
				t.Errorf("flow to the gone backend went to %s, want b", s)
			}
		}
		// None at all.
		l.set(service{vip: vip1})
		if err := conns[0].echo("gone"); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("connection without backends: %v, want reset", err)
		}
	})
}

// A backend gives its flows of UDP up when it leaves, and not before somebody else can
// take them, whether they are of a named port or of all.
func TestDatagramsLeaveWithTheirBackend(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		for vip, ports := range map[string]model.Ports{vip1: "", vip2: "80/udp"} {
			sock := l.tasks["a"].udp(t, "")
			for _, step := range []struct {
				name           string
				ready, leaving string
				want           string
			}{
				{"one", "d", "", "d"},
				{"it leaves, and there is no other", "", "d", "d"},
				{"another is ready", "b", "d", "b"},
				{"the first has gone", "b", "", "b"},
			} {
				l.set(service{vip: vip, ready: l.names(step.ready), leaving: l.names(step.leaving), options: model.ServiceOptions{Ports: ports}})
				if isIPVS(l.variant) && l.variant.mode == lb.NAT && step.leaving != "" {
					step.want = step.leaving
				}
				for range 3 {
					got, err := ask(sock, vip+":80", []byte("?"))
					if s := parseAnswer(string(got)).server; err != nil || s != step.want {
						t.Errorf("ports %q, %s: answered by %q, %v; want %s", ports, step.name, s, err, step.want)
					}
				}
			}
		}
	})
}

// A port used again gets the next backend, whether the client reset the
// connection before, or closed it.
func TestSourcePortIsReused(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		l.set(service{vip: vip1, ready: l.names("bcd")})
		for i := range 12 {
			c, err := a.dial(a.ip.String()+":41000", vip1+":80")
			must(t, err)
			if want := string(l.turns("bcd")[i%3]); c.server != want {
				t.Errorf("use %d of the port, reset before: answered by %s, want %s", i, c.server, want)
			}
			must(t, c.echo("x"))
			c.reset()
		}
		// Servers that close first, so that the client's port is free at once.
		for _, k := range l.names("bcd") {
			do(t, k.fd, func() error {
				ln, err := net.Listen("tcp4", ":81")
				if err != nil {
					return err
				}
				t.Cleanup(func() { ln.Close() })
				go func() {
					for {
						c, err := ln.Accept()
						if err != nil {
							return
						}
						fmt.Fprintln(c, k.name, c.RemoteAddr())
						c.Close()
					}
				}()
				return nil
			})
		}
		for i := range 12 {
			// Free at once: when the server's stack has said that it has seen the FIN.
			var c *conn
			until(t, patience, "a free port", func() bool {
				var err error
				if c, err = a.dial(a.ip.String()+":41001", vip1+":81"); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
					t.Fatal(err)
				}
				return err == nil
			})
			if want := string(l.turns("bcd")[i%3]); c.server != want {
				t.Errorf("use %d of the port, closed before: answered by %s, want %s", i, c.server, want)
			}
			if _, err := c.r.ReadByte(); err != io.EOF {
				t.Errorf("use %d of the port: %v, want the server's FIN", i, err)
			}
			c.Close()
		}
	})
}

// What the other side sends after the client's FIN, and the answers to it, pass.
func TestHalfClosedConnectionGoesOn(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		a := l.tasks["a"]
		l.set(service{vip: vip1, ready: l.names("b")})
		const size = 4 << 20
		do(t, l.tasks["b"].fd, func() error {
			ln, err := net.Listen("tcp4", ":80")
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close() })
			go func() {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				c.Read(make([]byte, 1)) // until the client's FIN
				c.Write(make([]byte, size))
			}()
			return nil
		})
		do(t, a.fd, func() error {
			c, err := net.Dial("tcp4", vip1+":80")
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				return err
			}
			c.SetDeadline(time.Now().Add(patience))
			n, buf := 0, make([]byte, 1<<16)
			for {
				m, err := c.Read(buf)
				n += m
				if err != nil {
					break
				}
			}
			if n != size {
				return fmt.Errorf("got %d octets after the FIN, want %d", n, size)
			}
			return nil
		})
	})
}

func TestThousandConnections(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1, ready: l.names("bcd")})
		var mu sync.Mutex // guards conns
		var conns []*conn
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				for range 100 {
					c, err := l.tasks["a"].dial("", vip1+":80")
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					conns = append(conns, c)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		hits := map[string]int{}
		for _, c := range conns {
			hits[c.server]++
			if err := c.echo(c.server); err != nil {
				t.Errorf("connection to %s: %v", c.server, err)
			}
			c.reset()
		}
		for _, who := range []string{"b", "c", "d"} {
			if n := hits[who]; n != 333 && n != 334 {
				t.Errorf("%s has %d of 1000 connections, want a third", who, n)
			}
		}
	})
}

// What a packet chose may have gone when it looks for it: it gets the first then.
func TestSlotGoesUnderAPacket(t *testing.T) {
	onThose(t, func(v variant) bool { return v == byNFT() }, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1, ready: l.names("bcd")})
		run(t, l.one.fd, "nft", "delete element bridge sluice slots { "+vip1+" . 2 }")
		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 6), map[string]int{"b": 4, "c": 2})
	})
}

// Backends come and go 200 times, and no connection notices but those of the
// backend that has gone; here none has, as it always leaves first.
func TestChangesUnderTraffic(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		sets := [][]*task{l.names("bcd"), l.names("bc"), l.names("cd"), l.names("b"), l.names("db")}
		rest := func(ready []*task) (out []*task) {
			for _, k := range l.names("bcd") {
				if !slices.Contains(ready, k) {
					out = append(out, k)
				}
			}
			return out
		}
		l.set(service{vip: vip1, ready: sets[0]})
		long, err := a.dial("", vip1+":80")
		must(t, err)
		defer long.Close()
		var stop atomic.Bool
		var done atomic.Int64
		var wg sync.WaitGroup
		wg.Go(func() {
			for !stop.Load() {
				c, err := a.dial("", vip1+":80")
				if err == nil {
					err = c.echo("hello")
					c.reset()
				}
				if err != nil {
					t.Errorf("connection %d: %v", done.Load(), err)
					return
				}
				done.Add(1)
			}
		})
		pc := a.udp(t, "")
		wg.Go(func() {
			for !stop.Load() {
				if _, err := ask(pc, vip1+":80", []byte("?")); err != nil {
					t.Errorf("datagram: %v", err)
					return
				}
			}
		})
		for i := range 200 {
			ready := sets[i%len(sets)]
			l.one.apply(t, l.want(l.one, service{vip: vip1, ready: ready, leaving: rest(ready)}))
			if err := long.echo("long"); err != nil {
				t.Errorf("change %d: long connection: %v", i, err)
				break
			}
		}
		stop.Store(true)
		wg.Wait()
		t.Logf("%d connections during 200 changes", done.Load())
	})
}

// The rules are made anew, by a repair and by a new uplink, and connections,
// which only the maps know, go on.
func TestConnectionsOutliveRebuild(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	a := l.tasks["a"]
	l.set(service{vip: vip1, ready: l.names("bcd")})
	var conns []*conn
	for range 6 {
		c, err := a.dial("", vip1+":80")
		must(t, err)
		defer c.Close()
		conns = append(conns, c)
	}
	check := func(when string) {
		t.Helper()
		for i, c := range conns {
			if err := c.echo("hello"); err != nil {
				t.Fatalf("%s: connection %d: %v", when, i, err)
			}
		}
	}
	want := l.want(l.one, service{vip: vip1, ready: l.names("bcd")})
	run(t, l.one.fd, "nft", "flush chain bridge sluice tcp-packet; flush chain bridge sluice prerouting")
	must(t, nft.Tables{}.ApplyBridge(l.one.fd, l.one.name, kernel.Diff(l.one.dump(t), want)))
	check("after a repair")
	key := kernel.BridgeTable{NS: l.one.name}
	spec := want[key].(kernel.BridgeTableSpec)
	old := spec
	spec.Uplink = "vxlan1"
	must(t, nft.Tables{}.ApplyBridge(l.one.fd, l.one.name, []kernel.Op{{Key: key, Want: spec, Have: old}}))
	check("with another uplink")
}

// The engine's rules for its DNS, and a host's filter, are in the same namespace.
func TestBesideTheEnginesRules(t *testing.T) {
	for _, iptables := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(iptables, func(t *testing.T) {
			l := newLab(t, byNFT())
			l.serveAll("0.0.0.0:80")
			for _, k := range l.tasks {
				for _, rule := range []string{
					"-N DOCKER_OUTPUT", "-N DOCKER_POSTROUTING",
					"-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT",
					"-A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING",
					"-A DOCKER_OUTPUT -d 127.0.0.11/32 -p udp -m udp --dport 53 -j DNAT --to-destination 127.0.0.11:40053",
					"-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p udp -m udp --sport 40053 -j SNAT --to-source :53",
				} {
					run(t, k.fd, iptables, append([]string{"-t", "nat"}, strings.Fields(rule)...)...)
				}
			}
			b := l.tasks["b"]
			do(t, b.fd, func() error { // the engine's resolver
				pc, err := net.ListenPacket("udp4", "127.0.0.11:40053")
				if err != nil {
					return err
				}
				t.Cleanup(func() { pc.Close() })
				go func() {
					buf := make([]byte, 512)
					for {
						n, from, err := pc.ReadFrom(buf)
						if err != nil {
							return
						}
						pc.WriteTo(buf[:n], from)
					}
				}()
				return nil
			})
			l.set(service{vip: vip1, ready: l.names("bd")})
			dns := func() {
				t.Helper()
				got, err := ask(b.udp(t, ""), "127.0.0.11:53", []byte("query"))
				if err != nil || string(got) != "query" {
					t.Errorf("DNS: %q, %v", got, err)
				}
			}
			dns()
			wantHits(t, l.hits(l.tasks["a"], vip1+":80", 4), map[string]int{"b": 2, "d": 2})
			l.set(service{vip: vip1, ready: l.names("b")})
			wantHits(t, l.hits(b, vip1+":80", 2), map[string]int{"b": 2})
			dns()
		})
	}
}

// An error that a client's stack reports reaches the backend that it is about.
func TestPortUnreachableReachesTheBackend(t *testing.T) {
	l := newLab(t, byNFT())
	l.set(service{vip: vip1, ready: l.names("bd")})
	a := l.tasks["a"]
	local := fmt.Sprintf("%s:42000", a.ip)
	for _, server := range l.names("bd") { // in turn, local and remote
		var sc net.Conn
		do(t, server.fd, func() (err error) {
			sc, err = (&net.Dialer{LocalAddr: &net.UDPAddr{Port: 80}}).Dial("udp4", local)
			return err
		})
		defer sc.Close()
		sc.SetDeadline(time.Now().Add(patience))
		pc := a.udp(t, local)
		to, err := net.ResolveUDPAddr("udp4", vip1+":80")
		must(t, err)
		_, err = pc.WriteTo([]byte("?"), to)
		must(t, err)
		if _, err := sc.Read(make([]byte, 8)); err != nil {
			t.Fatalf("%s: %v", server.name, err)
		}
		pc.Close()
		if _, err := sc.Write([]byte("too late")); err != nil {
			t.Fatal(err)
		}
		if _, err := sc.Read(make([]byte, 8)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v, want refused", server.name, err)
		}
		// Forget the flow, for the next one to choose.
		run(t, l.one.fd, "nft", "flush map bridge sluice udp-flows")
	}
}

// Elements live as long as the state of their connection asks for.
func TestLifeOfConnections(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	l.set(service{vip: vip1, ready: l.names("b")})
	a := l.tasks["a"]
	expiry := regexp.MustCompile(`\. (\d+)(?: timeout \w+)? expires (\w+)`)
	// want checks the one element of a map whose key ends in a number, or in any.
	want := func(name, last string, life time.Duration) {
		t.Helper()
		out := run(t, l.one.fd, "nft", "list", "map", "bridge", "sluice", name)
		var left []time.Duration
		for _, m := range expiry.FindAllStringSubmatch(out, -1) {
			d, err := time.ParseDuration(m[2])
			must(t, err)
			if last == "" || last == m[1] {
				left = append(left, d)
			}
		}
		if life == 0 && len(left) == 0 {
			return
		}
		// Some of it is over already, but not much.
		if len(left) != 1 || left[0] > life || left[0] < life-patience {
			t.Errorf("map %s has elements that live %v, want one with %v:\n%s", name, left, life, out)
		}
	}
	c, err := a.dial("", vip1+":80")
	must(t, err)
	must(t, c.echo("hello"))
	want("tcp-flows", "80", 3*time.Hour)
	c.Close()
	want("tcp-closing", "80", time.Minute)
	want("tcp-flows", "80", 0)
	c, err = a.dial("", vip1+":80")
	must(t, err)
	want("tcp-flows", "80", 3*time.Hour)
	c.reset()
	want("tcp-closing", "80", time.Minute) // the one before
	want("tcp-flows", "80", 0)
	// A SYN that nobody answers.
	run(t, l.tasks["b"].fd, "nft", "add table ip x { chain i { type filter hook input priority 0; tcp dport 99 drop; }; }")
	err = try(a.fd, func() error {
		_, err := (&net.Dialer{Timeout: 100 * time.Millisecond}).Dial("tcp4", vip1+":99")
		return err
	})
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("connection to a port that drops: %v, want a timeout", err)
	}
	want("tcp-flows", "99", time.Minute)
	_, err = ask(a.udp(t, ""), vip1+":80", make([]byte, 4000))
	must(t, err)
	want("udp-flows", "80", 2*time.Minute)
	want("frags", "", 5*time.Second)
}
