package nft_test

import (
	"bytes"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
)

// kept is a service that keeps its clients.
func kept(s service, seconds, bits int) service {
	s.options.Persist, s.options.PersistBits = seconds, bits
	return s
}

// single is a service that balances each UDP packet by itself.
func single(s service) service {
	s.options.OnePacket = true
	return s
}

// only is the one backend that has answered a client n times, over two ports and
// both protocols.
func (l *lab) only(k *task, vip string, n int) string {
	l.t.Helper()
	hits := l.hits(k, vip+":80", n)
	for who, m := range l.hits(k, vip+":81", n) {
		hits[who] += m
	}
	for range n {
		b, err := ask(k.udp(l.t, ""), vip+":80", []byte("?"))
		must(l.t, err)
		hits[parseAnswer(string(b)).server]++
	}
	if len(hits) != 1 {
		l.t.Fatalf("%s was answered by %v, want one", k.name, hits)
	}
	for who := range hits {
		return who
	}
	return ""
}

// clients are the elements of the map of clients: how long each has left, by VIP.
func (h *host) clients(t *testing.T) map[string][]time.Duration {
	t.Helper()
	out := map[string][]time.Duration{}
	list := run(t, h.fd, "nft", "list", "map", "bridge", "sluice", "persist")
	for _, m := range regexp.MustCompile(`([\d.]+) \. [\d.]+(?: timeout \w+)? expires (\w+)`).FindAllStringSubmatch(list, -1) {
		d, err := time.ParseDuration(m[2])
		must(t, err)
		out[m[1]] = append(out[m[1]], d)
	}
	return out
}

func TestPersistenceKeepsAClient(t *testing.T) {
	for _, scheduler := range []string{"rr", "sh"} {
		t.Run(scheduler, func(t *testing.T) {
			l := newLab(t, byNFT())
			l.serveAll("0.0.0.0:80")
			l.serveAll("0.0.0.0:81")
			l.set(kept(service{vip: vip1, scheduler: scheduler, ready: l.names("bcd")}, 300, 32))
			for _, name := range []string{"a", "b", "c", "d"} {
				if who := l.only(l.tasks[name], vip1, 4); who == name {
					t.Errorf("%s was given itself", name)
				}
			}
			must(t, l.tasks["a"].ping(vip1, 56))
		})
	}
}

// Backends that come do not draw a client away; one that takes nothing new loses
// it at once, and not what is open.
func TestPersistenceEndsWithTheBackend(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	l.serveAll("0.0.0.0:81")
	a := l.tasks["a"]
	l.set(kept(service{vip: vip1, ready: l.names("b")}, 300, 32))
	long, err := a.dial("", vip1+":80")
	must(t, err)
	defer long.Close()
	l.set(kept(service{vip: vip1, ready: l.names("cdb")}, 300, 32))
	if who := l.only(a, vip1, 2); who != "b" {
		t.Fatalf("with more backends: answered by %s, want b", who)
	}
	l.set(kept(service{vip: vip1, ready: l.names("cd"), leaving: l.names("b")}, 300, 32))
	second := l.only(a, vip1, 2)
	if second == "b" {
		t.Error("b leaves, and answers new connections")
	}
	must(t, long.echo("still here"))
	// It is back, and the client stays where it is.
	l.set(kept(service{vip: vip1, ready: l.names("bcd")}, 300, 32))
	if who := l.only(a, vip1, 2); who != second {
		t.Errorf("answered by %s, want %s", who, second)
	}
	// Gone altogether.
	rest := strings.ReplaceAll("bcd", second, "")
	l.set(kept(service{vip: vip1, ready: l.names(rest)}, 300, 32))
	third := l.only(a, vip1, 2)
	if third == second {
		t.Errorf("answered by %s, which is gone", third)
	}
	// A repair, and a change of the rules, leave the clients alone.
	run(t, l.one.fd, "nft", "flush chain bridge sluice choose; flush chain bridge sluice vip-"+vip1)
	must(t, nft.Tables{}.ApplyBridge(l.one.fd, l.one.name, kernel.Diff(l.one.dump(t), l.one.have)))
	same(t, l.one.dump(t), l.one.have)
	l.set(kept(service{vip: vip1, scheduler: "wrr", ready: l.names(rest)}, 600, 32))
	if who := l.only(a, vip1, 2); who != third {
		t.Errorf("after a repair: answered by %s, want %s", who, third)
	}
	// Without persistence the turn is everybody's again.
	l.set(service{vip: vip1, ready: l.names("bcd")})
	wantHits(t, l.hits(a, vip1+":80", 3), map[string]int{"b": 1, "c": 1, "d": 1})
}

// A prefix of clients is one client, but a member of it is not given itself.
func TestPersistenceOfAPrefix(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	l.serveAll("0.0.0.0:81")
	l.set(kept(service{vip: vip1, ready: l.names("bcd")}, 300, 24))
	who := l.only(l.tasks["a"], vip1, 2)
	for range 2 {
		for _, name := range []string{"a", "b", "c"} {
			got := l.only(l.tasks[name], vip1, 2)
			if name == who && got == name || name != who && got != who {
				t.Errorf("%s was answered by %s; a by %s", name, got, who)
			}
		}
	}
	// Prefixes of two addresses: a and b, c and d.
	l.set(kept(service{vip: vip2, ready: l.names("bcd")}, 300, 31))
	first, second := l.only(l.tasks["a"], vip2, 1), l.only(l.tasks["c"], vip2, 1)
	if first == second {
		t.Errorf("both prefixes are answered by %s", first)
	}
}

// The time is each VIP's own, and begins anew with every connection.
func TestPersistenceTakesItsTime(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	l.serveAll("0.0.0.0:81") // in a task, one port of two VIPs would be one
	a := l.tasks["a"]
	l.set(
		kept(service{vip: vip1, ready: l.names("bcd")}, 3600, 32),
		kept(service{vip: vip2, ready: l.names("bc")}, 1, 32),
	)
	// left is how long the client of a VIP is still kept; 0 if it is not.
	left := func(vip string) time.Duration {
		t.Helper()
		switch all := l.one.clients(t)[vip]; len(all) {
		case 0:
			return 0
		case 1:
			return all[0]
		default:
			t.Fatalf("%s has clients with %v left, want one", vip, all)
			return 0
		}
	}
	wait := func(what string, is func() bool) {
		t.Helper()
		tick, late := time.NewTicker(20*time.Millisecond), time.After(patience)
		defer tick.Stop()
		for !is() {
			select {
			case <-tick.C:
			case <-late:
				t.Fatal("it never comes that " + what)
			}
		}
	}
	wantHits(t, l.hits(a, vip1+":80", 3), map[string]int{"b": 3})
	wantHits(t, l.hits(a, vip2+":81", 1), map[string]int{"b": 1})
	if d := left(vip1); d > time.Hour || d < time.Hour-patience {
		t.Errorf("the client is kept for %s, want an hour", d)
	}
	const some = time.Hour - 300*time.Millisecond
	wait("time passes", func() bool { return left(vip1) < some })
	before := left(vip1)
	wantHits(t, l.hits(a, vip1+":80", 1), map[string]int{"b": 1})
	if after := left(vip1); after <= before {
		t.Errorf("with a new connection %s are left, which were %s", after, before)
	}
	wait("the client is forgotten", func() bool { return left(vip2) == 0 })
	wantHits(t, l.hits(a, vip2+":81", 1), map[string]int{"c": 1})
	wantHits(t, l.hits(a, vip1+":80", 1), map[string]int{"b": 1})
}

func TestOnePacketIsBalancedByItself(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	a := l.tasks["a"]
	l.set(single(service{vip: vip1, ready: l.names("bd")}))
	pc := a.udp(t, "")
	var got []string
	for range 4 {
		b, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
		got = append(got, parseAnswer(string(b)).server)
	}
	if !slices.Equal(got, []string{"b", "d", "b", "d"}) {
		t.Errorf("datagrams of one socket were answered by %v", got)
	}
	// One of several fragments goes to one backend.
	for i := range 4 {
		msg := bytes.Repeat([]byte{byte(i)}, 8000)
		b, err := ask(pc, vip1+":80", msg)
		must(t, err)
		if !bytes.Equal(b, msg) {
			t.Errorf("%d octets came back as %d others", len(msg), len(b))
		}
	}
	if out := run(t, l.one.fd, "nft", "list", "map", "bridge", "sluice", "udp-flows"); strings.Contains(out, "elements") {
		t.Errorf("flows are remembered:\n%s", out)
	}
	// A connection of TCP is one all the same.
	c, err := a.dial("", vip1+":80")
	must(t, err)
	for range 4 {
		must(t, c.echo("hello"))
	}
	c.Close()
	// With persistence, all of a client's are for one.
	l.set(single(kept(service{vip: vip1, ready: l.names("bd")}, 60, 32)))
	hits := map[string]int{}
	for range 4 {
		b, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
		hits[parseAnswer(string(b)).server]++
	}
	if len(hits) != 1 {
		t.Errorf("a client that is kept was answered by %v", hits)
	}
}

// The plan says how long an open connection may be silent.
func TestLifeOfOpenConnections(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	web := service{vip: vip1, ready: l.names("b")}
	l.set(web)
	c, err := l.tasks["a"].dial("", vip1+":80")
	must(t, err)
	defer c.Close()
	for _, seconds := range []int{20000, 0} {
		want := l.want(l.one, web)
		key := kernel.BridgeTable{NS: l.one.name}
		spec := want[key].(kernel.BridgeTableSpec)
		spec.Open = seconds
		want[key] = spec
		l.one.apply(t, want)
		must(t, c.echo("hello"))
		life := time.Duration(seconds) * time.Second
		if seconds == 0 {
			life = 3 * time.Hour
		}
		out := run(t, l.one.fd, "nft", "list", "map", "bridge", "sluice", "tcp-flows")
		m := regexp.MustCompile(`expires (\w+)`).FindStringSubmatch(out)
		if m == nil {
			t.Fatalf("no element:\n%s", out)
		}
		if left, err := time.ParseDuration(m[1]); err != nil || left > life || left < life-patience {
			t.Errorf("a connection is remembered for %s, want %s", m[1], life)
		}
	}
}

func TestTrafficCountsConnections(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	a, b := l.tasks["a"], l.tasks["b"]
	count := func(when string, want ...uint64) {
		t.Helper()
		got, err := nft.Tables{}.Traffic(l.one.fd, l.one.name)
		must(t, err)
		for i, vip := range []string{vip1, vip2} {
			if n := got[kernel.VIP{NS: l.one.name, IP: netip.MustParseAddr(vip)}].Connections; n != want[i] {
				t.Errorf("%s: %d connections of %s, want %d", when, n, vip, want[i])
			}
		}
		if len(got) != 2 {
			t.Errorf("%s: %d VIPs are counted, want 2: %v", when, len(got), got)
		}
	}
	one, two := service{vip: vip1, ready: l.names("bd")}, service{vip: vip2, ready: l.names("b")}
	l.set(one, two)
	count("at first", 0, 0)
	l.hits(a, vip1+":80", 5)
	l.hits(b, vip1+":80", 4) // the choice of itself is none
	l.hits(a, vip2+":80", 1)
	pc := a.udp(t, "")
	for range 3 {
		_, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
	}
	must(t, a.ping(vip1, 56)) // is no connection
	count("9 and a flow", 10, 1)
	same(t, l.one.dump(t), l.one.have)

	// The service changes, and the number goes on.
	one.ready = l.names("bcd")
	l.set(one, two)
	count("another backend", 10, 1)
	one.ready = nil
	l.set(one, two)
	if _, err := a.dial("", vip1+":80"); err == nil {
		t.Error("no backends, and no error")
	}
	count("refused", 10, 1)
	one.ready = l.names("bc")
	l.set(kept(one, 300, 32), two)
	l.hits(a, vip1+":80", 3)
	l.hits(b, vip1+":80", 2)
	must(t, a.ping(vip1, 56))
	count("kept clients", 15, 1)
	one.ready = l.names("b")
	l.set(single(one), two)
	for range 3 {
		_, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
	}
	count("each packet", 18, 1)
	run(t, l.one.fd, "nft", "flush chain bridge sluice vip-"+vip1)
	must(t, nft.Tables{}.ApplyBridge(l.one.fd, l.one.name, kernel.Diff(l.one.dump(t), l.one.have)))
	count("anew", 0, 1)

	l.one.apply(t, kernel.State{})
	if got, err := (nft.Tables{}).Traffic(l.one.fd, l.one.name); err != nil || len(got) != 0 {
		t.Errorf("without a table: %v, %v", got, err)
	}
	if _, err := (nft.Tables{}).Traffic(0, l.one.name); err == nil {
		t.Error("no descriptor, and no error")
	}
}

// A choice leaves no mark on the frame.
func TestNoMarkGoesOn(t *testing.T) {
	l := newLab(t, byNFT())
	l.serveAll("0.0.0.0:80")
	run(t, l.one.fd, "nft", "add table bridge watch; add chain bridge watch f { type filter hook prerouting priority 0; }; "+
		"add rule bridge watch f meta mark != 0 counter")
	for i, s := range []service{
		{vip: vip1, ready: l.names("bd")},
		kept(service{vip: vip1, ready: l.names("bd")}, 300, 32),
		kept(service{vip: vip1, ready: l.names("bd")}, 300, 24),
		{vip: vip1},
	} {
		l.set(s)
		for _, name := range []string{"a", "b"} {
			for range 3 {
				if c, err := l.tasks[name].dial("", vip1+":80"); err == nil {
					c.Close()
				}
			}
			if len(s.ready) > 0 {
				must(t, l.tasks[name].ping(vip1, 56))
			}
		}
		if out := run(t, l.one.fd, "nft", "list", "chain", "bridge", "watch", "f"); !strings.Contains(out, "packets 0 ") {
			t.Errorf("case %d: marked frames go on:\n%s", i, out)
		}
	}
}
