package nft_test

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	lb "sluice/lb/service"
)

// liftState is a lift table's: from these backends, to these endpoints.
func liftState(h *host, from, to []*task) kernel.State {
	mac, _ := model.ParseMAC(routerMAC)
	st := kernel.State{kernel.LiftTable{NS: h.name}: kernel.LiftTableSpec{Router: mac}}
	for _, k := range from {
		st[kernel.LiftFrom{NS: h.name, IP: k.ip}] = kernel.LiftFromSpec{}
	}
	for _, k := range to {
		st[kernel.LiftTo{NS: h.name, IP: k.ip}] = kernel.LiftToSpec{}
	}
	return st
}

// lifted is a namespace with a lift table.
func lifted(t testing.TB) (*host, kernel.State) {
	h := &host{name: "sluice-lifted", fd: newNetns(t), have: kernel.State{}}
	at := func(s string) *task { return &task{ip: netip.MustParseAddr(s)} }
	want := liftState(h, []*task{at("10.255.0.2"), at("10.255.0.3")}, []*task{at("10.255.0.2"), at("10.255.0.4")})
	h.apply(t, want)
	return h, want
}

func TestLiftReadsBack(t *testing.T) {
	h, want := lifted(t)
	// Done again, by somebody who believes that nothing is there.
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, kernel.Diff(kernel.State{}, want)))
	same(t, h.dump(t), want)

	next := maps.Clone(want)
	next[kernel.LiftTable{NS: h.name}] = kernel.LiftTableSpec{Router: model.MAC{2, 1}}
	next[kernel.LiftTo{NS: h.name, IP: netip.MustParseAddr("10.255.0.9")}] = kernel.LiftToSpec{}
	delete(next, kernel.LiftFrom{NS: h.name, IP: netip.MustParseAddr("10.255.0.2")})
	ops := kernel.Diff(want, next)
	for range 2 {
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		same(t, h.dump(t), next)
	}
	h.have = next
	h.apply(t, kernel.State{})
	if out := run(t, h.fd, "nft", "list", "ruleset"); out != "" {
		t.Errorf("left:\n%s", out)
	}
}

func TestLiftWithoutATable(t *testing.T) {
	h := &host{name: "sluice-bare", fd: newNetns(t)}
	key := kernel.LiftFrom{NS: h.name, IP: netip.MustParseAddr("10.255.0.2")}
	if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{{Key: key, Want: kernel.LiftFromSpec{}}}); !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("create: %v, want %v", err, kernel.ErrNotExist)
	}
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, []kernel.Op{{Key: key, Have: kernel.LiftFromSpec{}}}))
	for _, o := range []kernel.Op{
		{Key: kernel.LiftTo{NS: h.name, IP: netip.MustParseAddr("fd00::1")}, Want: kernel.LiftToSpec{}},
		{Key: kernel.LiftTable{NS: h.name}, Want: kernel.MarkTableSpec{}},
	} {
		if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{o}); err == nil {
			t.Errorf("%s: no error", o)
		}
	}
}

func TestLiftTableIsMended(t *testing.T) {
	for _, spoil := range []string{
		"delete table bridge sluice-lift",
		"flush chain bridge sluice-lift prerouting",
		"flush set bridge sluice-lift from",
		"add element bridge sluice-lift to { 10.255.0.77 }",
		"insert rule bridge sluice-lift prerouting accept",
		"add chain bridge sluice-lift other",
		"add table bridge sluice-lift { flags dormant; }",
	} {
		h, want := lifted(t)
		run(t, h.fd, "nft", spoil)
		ops := kernel.Diff(h.dump(t), want)
		if len(ops) == 0 {
			t.Errorf("%s: no difference is seen", spoil)
		}
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		same(t, h.dump(t), want)
	}
}

// newBareLab is newLab for services whose packets get the backend's address, so
// that nothing has to be done in a task.
func newBareLab(t testing.TB, datapath string) *lab {
	t.Helper()
	l := newLab(t, as(datapath, lb.NAT))
	l.bare = true
	return l
}

// download gets size octets over a connection, from a server that says its name
// first and then sends as much as it is asked for.
func (c *conn) download(size int) error {
	c.SetDeadline(time.Now().Add(patience))
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(bytes.Repeat([]byte("x"), size))
		sent <- err
	}()
	if _, err := io.CopyN(io.Discard, c.r, int64(size)); err != nil {
		return err
	}
	return <-sent
}

// talks checks all that a client and a VIP's, or a task's own, address have to say
// to each other.
func (l *lab) talks(k *task, address string) {
	t := l.t
	t.Helper()
	c, err := k.dial("", address)
	if err != nil {
		t.Errorf("%s to %s: %v", k.name, address, err)
		return
	}
	defer c.Close()
	if c.client != c.LocalAddr().String() {
		t.Errorf("client %s was seen as %s", c.LocalAddr(), c.client)
	}
	if err := c.download(2 << 20); err != nil {
		t.Errorf("%s to %s: much data: %v", k.name, address, err)
	}
	pc := k.udp(t, k.ip.String()+":0")
	for _, size := range []int{1, 1200, 4000, 30000} {
		msg := bytes.Repeat([]byte("y"), size)
		got, err := ask(pc, address, msg)
		if err != nil {
			t.Errorf("%s to %s: datagram of %d octets: %v", k.name, address, size, err)
			continue
		}
		if size > 64 && !bytes.Equal(got, msg) {
			t.Errorf("%s to %s: datagram of %d octets came back as %d others", k.name, address, size, len(got))
		}
		if ans := parseAnswer(string(got)); size <= 64 && ans.client != pc.LocalAddr().String() {
			t.Errorf("client %s was seen as %s", pc.LocalAddr(), ans.client)
		}
	}
}

func TestAnswersAreLifted(t *testing.T) {
	l := newBareLab(t, lb.IPVS)
	l.serveAll("0.0.0.0:80")
	for _, backends := range []string{"b", "d", "bd"} { // local, remote, and both
		l.set(service{vip: vip1, ready: l.names(backends)})
		for _, client := range l.names("abcd") {
			if client.name == backends {
				continue // alone: IPVS has no way back to itself
			}
			l.talks(client, vip1+":80")
			// Directly as well, before and after the VIP's answers.
			for _, b := range l.names(backends) {
				if b != client {
					l.talks(client, b.ip.String()+":80")
					must(t, client.ping(b.ip.String(), 4000))
				}
			}
			l.talks(client, vip1+":80")
			if _, err := client.dial("", vip1+":81"); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("TCP from %s to a closed port of %s: %v, want refused", client.name, backends, err)
			}
			if err := client.knock(vip1+":81", 10); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("UDP from %s to a closed port of %s: %v, want refused", client.name, backends, err)
			}
		}
	}
	wantHits(t, l.hits(l.tasks["a"], vip1+":80", 4), map[string]int{"b": 2, "d": 2})
	// Draining: what is open goes on.
	conns, _ := l.holds(l.tasks["a"], vip1+":80", 4)
	l.set(service{vip: vip1, ready: l.names("b"), leaving: l.names("d")})
	wantHits(t, l.hits(l.tasks["a"], vip1+":80", 2), map[string]int{"b": 2})
	for _, c := range conns {
		must(t, c.echo("still here"))
	}
	l.set(service{vip: vip1})
	if _, err := l.tasks["a"].dial("", vip1+":80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("no backends: %v, want refused", err)
	}
}

// A port of a VIP may be another of the backend's. A fragmented datagram to it is
// known by its first fragment, also if the others come before that.
func TestPortIsMarkedAndMapped(t *testing.T) {
	l := newBareLab(t, lb.IPVS)
	l.serveAll("0.0.0.0:8080")
	h, a := l.one, l.tasks["a"]
	l.set(named(service{vip: vip1, ready: l.names("bd")}, "80:8080/tcp;80:8080/udp"))
	run(t, h.fd, "nft", "add table ip watch; "+
		"add chain ip watch out { type filter hook postrouting priority 300; }; add rule ip watch out meta mark != 0 counter")
	wantHits(t, l.hits(a, vip1+":80", 4), map[string]int{"b": 2, "d": 2})
	for range 2 { // local and remote
		l.talks(a, vip1+":80")
	}
	pc := a.udp(t, a.ip.String()+":42000")
	msg := bytes.Repeat([]byte("z"), 4000)
	for id, backward := range []bool{false, true, true} {
		a.send(t, datagram{
			from: netip.AddrPortFrom(a.ip, 42000), to: netip.MustParseAddrPort(vip1 + ":80"),
			data: msg, fragment: 1000, backward: backward, id: uint16(id + 1),
		})
		must(t, pc.SetReadDeadline(time.Now().Add(patience)))
		buf := make([]byte, 1<<16)
		n, from, err := pc.ReadFrom(buf)
		if err != nil || from.String() != vip1+":80" || !bytes.Equal(buf[:n], msg) {
			t.Errorf("fragments, last one first %v: %d octets from %v, %v", backward, n, from, err)
		}
	}
	for _, port := range []string{"81", "8080"} {
		if _, err := a.dial("", vip1+":"+port); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("TCP to port %s: %v, want refused", port, err)
		}
		for _, size := range []int{10, 4000} {
			if err := a.knock(vip1+":"+port, size); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("UDP to port %s, %d octets: %v, want refused", port, size, err)
			}
		}
	}
	if out := run(t, h.fd, "nft", "list", "chain", "ip", "watch", "out"); !strings.Contains(out, "packets 0") {
		t.Errorf("marked packets leave:\n%s", out)
	}
}

// Only frames from a backend to an endpoint of this node leave the bridge.
func TestOtherFramesStayInTheBridge(t *testing.T) {
	l := newBareLab(t, lb.IPVS)
	l.serveAll("0.0.0.0:80")
	h := l.one
	h.apply(t, liftState(h, l.names("bd"), l.names("a")))
	run(t, h.fd, "nft", "add table ip watch; add chain ip watch forward { type filter hook forward priority 0; }; add rule ip watch forward counter")
	forwarded := func() bool {
		t.Helper()
		out := run(t, h.fd, "nft", "list", "chain", "ip", "watch", "forward")
		return !strings.Contains(out, "packets 0")
	}
	for _, pair := range []string{"cb", "bc", "db", "bd", "cd", "dc"} {
		l.talks(l.tasks[pair[:1]], l.tasks[pair[1:]].ip.String()+":80")
		if forwarded() {
			t.Fatalf("%s: frames left the bridge", pair)
		}
	}
	l.talks(l.tasks["a"], l.tasks["b"].ip.String()+":80")
	if !forwarded() {
		t.Error("answers did not leave the bridge")
	}
}
