package nft_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math/rand/v2"
	"net"
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

// named is a service with nothing but those ports.
func named(s service, ports model.Ports) service {
	s.options.Ports = ports
	return s
}

func TestNamedPortsAreServedAndNoOthers(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		for _, port := range []string{"80", "8080", "53"} {
			l.serveAll("0.0.0.0:" + port)
		}
		l.set(named(service{vip: vip1, ready: l.names("bd")}, "80:8080/tcp;53/udp"))
		for _, name := range []string{"a", "b"} {
			k := l.tasks[name]
			want := map[string]int{"b": 2, "d": 2}
			if name == "b" {
				want = map[string]int{"d": 4}
			}
			wantHits(t, l.hits(k, vip1+":80", 4), want)
			got := map[string]int{}
			for range 4 {
				b, err := ask(k.udp(t, ""), vip1+":53", []byte("?"))
				must(t, err)
				got[parseAnswer(string(b)).server]++
			}
			wantHits(t, got, want)
			began := time.Now()
			for _, port := range []string{"8080", "53", "81"} {
				if _, err := k.dial("", vip1+":"+port); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("TCP from %s to %s: %v, want refused", name, port, err)
				}
			}
			for _, port := range []string{"8080", "80", "81"} {
				for _, size := range []int{10, 4000} {
					if err := k.knock(vip1+":"+port, size); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("UDP from %s to %s, %d octets: %v, want refused", name, port, size, err)
					}
				}
			}
			// GRE (47) has no ports.
			if err := k.knockRaw(vip1, 47); !errors.Is(err, unix.ENOPROTOOPT) {
				t.Errorf("another protocol from %s: %v, want it refused", name, err)
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("refusals from %s took %v", name, took)
			}
			must(t, k.ping(vip1, 56))
			must(t, k.ping(vip1, 4000))
		}
	})
}

// knockRaw sends a packet of a protocol and returns what comes of it.
func (k *task) knockRaw(address string, proto int) error {
	return try(k.fd, func() error {
		c, err := net.Dial(fmt.Sprintf("ip4:%d", proto), address)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write(make([]byte, 16)); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 100))
		return err
	})
}

// The server is where it listens, by whatever number clients know it; alone it
// calls itself so too.
func TestOnlyBackendCallsItsOwnPort(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		b := l.tasks["b"]
		b.serve(t, b.ip.String()+":8080")
		l.set(named(service{vip: vip1, ready: l.names("b")}, "80:8080/tcp;81/tcp;53:8080/udp"))
		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 2), map[string]int{"b": 2})
		c, err := b.dial("", vip1+":80")
		must(t, err)
		must(t, c.echo("to myself"))
		if c.server != "b" || !strings.HasPrefix(c.client, b.ip.String()+":") {
			t.Errorf("alone: answered by %s, which saw %s", c.server, c.client)
		}
		c.Close()
		got, err := ask(b.udp(t, ""), vip1+":53", []byte("?"))
		must(t, err)
		if ans := parseAnswer(string(got)); ans.server != "b" {
			t.Errorf("alone: UDP answered by %v", ans)
		}
		for _, port := range []string{"81", "8080"} { // no server there, no port
			if _, err := b.dial("", vip1+":"+port); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("to %s: %v, want refused", port, err)
			}
		}
	})
}

// A port that goes takes its connections along, at both ends, and leaves others.
func TestPortGoesAway(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		a, b := l.tasks["a"], l.tasks["b"]
		b.serve(t, "0.0.0.0:81")
		var server net.Conn
		accepted := make(chan struct{})
		do(t, b.fd, func() error {
			ln, err := net.Listen("tcp4", ":80")
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close() })
			go func() {
				defer close(accepted)
				if server, err = ln.Accept(); err == nil {
					fmt.Fprintln(server, "b", server.RemoteAddr())
				}
			}()
			return nil
		})
		web := service{vip: vip1, ready: l.names("b")}
		l.set(named(web, "80/tcp;81/tcp;81/udp"))
		gone, err := a.dial("", vip1+":80")
		must(t, err)
		defer gone.Close()
		<-accepted
		defer server.Close()
		stays, err := a.dial("", vip1+":81")
		must(t, err)
		defer stays.Close()
		pc := a.udp(t, "")
		_, err = ask(pc, vip1+":81", []byte("?"))
		must(t, err)

		l.set(named(web, "81/tcp"))
		must(t, stays.echo("stays"))
		if err := gone.echo("gone"); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("connection to the port that is gone: %v, want reset", err)
		}
		if err := a.knock(vip1+":81", 10); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("UDP to the port that is gone: %v, want refused", err)
		}
		// ip_vs forgets a connection with its service; what the client then answers
		// comes to the server only if it has not gone by it before.
		if !isIPVS(l.variant) || l.variant.mode == lb.NAT {
			server.SetDeadline(time.Now().Add(patience))
			if _, err := server.Write([]byte("are you there")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadAll(server); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the server hears %v, want reset", err)
			}
		}
		// All ports, which ip_vs has another service for, and none.
		l.set(web)
		if isIPVS(l.variant) {
			if err := stays.echo("gone"); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("connection to the port's own service: %v, want reset", err)
			}
			stays, err = a.dial("", vip1+":81")
			must(t, err)
			defer stays.Close()
		}
		must(t, stays.echo("stays"))
		l.set(named(web, "82/tcp"))
		if err := stays.echo("gone"); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("connection to the other port that is gone: %v, want reset", err)
		}
	})
}

// An SCTP port is translated as the others; the packet is made by hand, as few
// kernels have sockets for it.
func TestNamedPortOfSCTP(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		a, b := l.tasks["a"], l.tasks["b"]
		inside, ports := uint16(2905), model.Ports("9:2905/sctp")
		if !isIPVS(l.variant) && l.variant.mode == lb.NAT { // nftables leaves the port as it is, see doc.go
			inside, ports = 9, "9/sctp"
		}
		l.set(named(service{vip: vip1, ready: l.names("b")}, ports))
		var at net.PacketConn
		do(t, b.fd, func() (err error) {
			at, err = net.ListenPacket("ip4:132", "0.0.0.0")
			return err
		})
		defer at.Close()
		send := func(port uint16) {
			t.Helper()
			do(t, a.fd, func() error {
				c, err := net.Dial("ip4:132", vip1)
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write(sctpInit(40000, port))
				return err
			})
		}
		send(10) // refused, so it is not what arrives first
		send(9)
		at.SetReadDeadline(time.Now().Add(patience))
		buf := make([]byte, 1500)
		n, from, err := at.ReadFrom(buf)
		if err != nil {
			t.Fatalf("nothing arrives: %v", err)
		}
		if port := binary.BigEndian.Uint16(buf[2:]); from.String() != a.ip.String() || port != inside || n != 32 {
			t.Errorf("%d octets from %s to port %d, want 32 from %s to %d", n, from, port, a.ip, inside)
		}
	})
}

// sctpInit is a packet that asks for an association (RFC 9260 section 3.3.2).
func sctpInit(from, to uint16) []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	b[12], b[15] = 1, 20                        // INIT, its length
	binary.BigEndian.PutUint32(b[16:], 1)       // its tag
	binary.BigEndian.PutUint32(b[20:], 1<<16)   // window
	binary.BigEndian.PutUint32(b[24:], 1<<16|1) // one stream each way
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// full is a namespace with a VIP for each kind of spec.
func full(t testing.TB) (*host, kernel.State) {
	h, have := bare(t)
	want := maps.Clone(have)
	for i, spec := range []kernel.VIPSpec{
		{Named: true}, {OnePacket: true}, {Persist: 300, PersistBits: 24}, {Named: true, OnePacket: true, Persist: 5, PersistBits: 32},
	} {
		vip := netip.AddrFrom4([4]byte{10, 240, 1, byte(i)})
		spec.Scheduler, spec.Slots = "wrr", 2
		want[kernel.VIP{NS: h.name, IP: vip}] = spec
		for _, p := range []model.Proto{model.TCP, model.UDP, model.SCTP} {
			want[kernel.Port{NS: h.name, VIP: vip, Proto: p, Port: 80}] = kernel.PortSpec{To: 8080}
		}
		want[kernel.Alive{NS: h.name, VIP: vip, MAC: model.MACFor(vip)}] = kernel.AliveSpec{Drains: i%2 == 0}
	}
	h.apply(t, want)
	return h, want
}

func TestDamageOfPortsAndPersistenceIsRepaired(t *testing.T) {
	mac := model.MACFor(netip.MustParseAddr("10.240.1.0")).String()
	for name, damage := range map[string]string{
		"port gone":            "delete element bridge sluice ports { 10.240.1.0 . udp . 80 }",
		"port elsewhere":       "delete element bridge sluice ports { 10.240.1.0 . udp . 80 }; add element bridge sluice ports { 10.240.1.0 . udp . 80 : 81 }",
		"foreign port":         "add element bridge sluice ports { 10.240.1.0 . udp . 81 : 81 }",
		"ports flushed":        "flush map bridge sluice ports",
		"not named":            "delete element bridge sluice named { 10.240.1.0 }",
		"named":                "add element bridge sluice named { 10.240.1.1 }",
		"nobody, named":        "add element bridge sluice named { 10.240.7.7 }",
		"not one-packet":       "delete element bridge sluice one-packet { 10.240.1.1 }",
		"nobody, one-packet":   "add element bridge sluice one-packet { 10.240.7.7 }",
		"drains no more":       "delete element bridge sluice drains { 10.240.1.0 . " + mac + " }",
		"rules flushed":        "flush chain bridge sluice vip-10.240.1.2",
		"rule more":            "add rule bridge sluice vip-10.240.1.2 accept",
		"set of clients is no": "flush chain bridge sluice vip-10.240.1.2; flush chain bridge sluice vip-10.240.1.3; delete map bridge sluice persist",
	} {
		t.Run(name, func(t *testing.T) {
			h, want := full(t)
			run(t, h.fd, "nft", damage)
			have := h.dump(t)
			if maps.Equal(have, want) {
				t.Fatal("the dump does not show it")
			}
			must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, kernel.Diff(have, want)))
			same(t, h.dump(t), want)
			fresh, _ := full(t)
			if got, want := rules(t, h), rules(t, fresh); got != want {
				t.Errorf("rules after the repair:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// Any state may follow any other, and doing it again changes nothing.
func TestAnyPortsMayFollowAnyOther(t *testing.T) {
	h := &host{name: "sluice-any", fd: newNetns(t), have: kernel.State{}}
	k := &task{name: "k", fd: newNetns(t), have: kernel.State{}}
	r := rand.New(rand.NewPCG(3, 4)) // any numbers, the same at each run
	ip := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 1, byte(n)}) }
	coin := func() bool { return r.IntN(2) == 0 }
	port := func() (model.Proto, uint16) {
		return []model.Proto{model.TCP, model.UDP, model.SCTP}[r.IntN(3)], uint16(80 + r.IntN(2))
	}
	for range 60 {
		want := kernel.State{kernel.BridgeTable{NS: h.name}: kernel.BridgeTableSpec{Open: r.IntN(2) * 20000}}
		task := kernel.State{kernel.TaskTable{Sandbox: "/k"}: kernel.TaskTableSpec{}}
		for range r.IntN(30) {
			vip := ip(100 + r.IntN(4))
			proto, n := port()
			switch r.IntN(4) {
			case 0:
				spec := kernel.VIPSpec{Scheduler: "rr", Slots: r.IntN(3), Named: coin(), OnePacket: coin()}
				if coin() {
					spec.Persist, spec.PersistBits = 1+r.IntN(2), 31+r.IntN(2)
				}
				want[kernel.VIP{NS: h.name, IP: vip}] = spec
			case 1:
				want[kernel.Port{NS: h.name, VIP: vip, Proto: proto, Port: n}] = kernel.PortSpec{To: uint16(r.IntN(2))}
			case 2:
				want[kernel.Alive{NS: h.name, VIP: vip, MAC: model.MACFor(ip(r.IntN(3)))}] = kernel.AliveSpec{Drains: coin()}
			case 3:
				task[kernel.TaskPort{Sandbox: "/k", VIP: vip, Proto: proto, Port: n}] = kernel.TaskPortSpec{
					Addr: ip(r.IntN(2)), To: uint16(80 + r.IntN(2)), Loop: coin(),
				}
			}
		}
		ops, taskOps := kernel.Diff(h.have, want), kernel.Diff(k.have, task)
		h.apply(t, want)
		k.apply(t, task)
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		must(t, nft.Tables{}.ApplyTask(k.fd, "/k", taskOps))
		same(t, h.dump(t), want)
		same(t, k.dump(t, false), task)
	}
}

func TestDamageOfTaskPortsIsRepaired(t *testing.T) {
	for name, damage := range map[string]string{
		"gone":         "delete element ip sluice in-ports { 10.255.0.100 . tcp . 80 }",
		"elsewhere":    "flush map ip sluice in-ports; add element ip sluice in-ports { 10.255.0.100 . tcp . 80 : 10.255.0.2 . 81 }",
		"loop gone":    "flush map ip sluice loop-ports",
		"loop without": "add element ip sluice loop-ports { 10.255.0.100 . tcp . 81 : 10.255.0.2 . 81 }",
		"foreign":      "add element ip sluice in-ports { 10.255.0.100 . sctp . 81 : 10.255.0.2 . 81 }",
	} {
		t.Run(name, func(t *testing.T) {
			k := &task{name: "k", fd: newNetns(t), have: kernel.State{}}
			key := kernel.TaskPort{Sandbox: "/k", VIP: netip.MustParseAddr(vip1), Proto: model.TCP, Port: 80}
			want := kernel.State{
				kernel.TaskTable{Sandbox: "/k"}: kernel.TaskTableSpec{},
				key:                             kernel.TaskPortSpec{Addr: netip.MustParseAddr("10.255.0.2"), To: 8080, Loop: true},
			}
			k.apply(t, want)
			run(t, k.fd, "nft", damage)
			have := k.dump(t, false)
			if maps.Equal(have, want) {
				t.Fatal("the dump does not show it")
			}
			must(t, nft.Tables{}.ApplyTask(k.fd, "/k", kernel.Diff(have, want)))
			same(t, k.dump(t, false), want)
		})
	}
}

func TestApplyRefusesSpecsWithoutSense(t *testing.T) {
	h, want := full(t)
	four := netip.MustParseAddr(vip1)
	vip := func(s kernel.VIPSpec) kernel.Op {
		s.Scheduler, s.Slots = "rr", 1
		return kernel.Op{Key: kernel.VIP{NS: h.name, IP: four}, Want: s}
	}
	for _, op := range []kernel.Op{
		vip(kernel.VIPSpec{Persist: -1}),
		vip(kernel.VIPSpec{Persist: 1}),
		vip(kernel.VIPSpec{Persist: 1, PersistBits: 33}),
		vip(kernel.VIPSpec{PersistBits: 32}),
		{Key: kernel.VIP{NS: h.name, IP: four}, Want: kernel.VIPSpec{Scheduler: "rr", Slots: 1 << 28}},
		{Key: kernel.BridgeTable{NS: h.name}, Want: kernel.BridgeTableSpec{Open: -1}},
		{Key: kernel.Port{NS: h.name, VIP: four, Proto: "icmp"}, Want: kernel.PortSpec{}},
		{Key: kernel.Port{NS: h.name, VIP: netip.MustParseAddr("fd00::1"), Proto: model.TCP}, Want: kernel.PortSpec{}},
		{Key: kernel.Port{NS: h.name, VIP: four, Proto: model.TCP}, Want: kernel.AliveSpec{}},
	} {
		if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{op}); err == nil {
			t.Errorf("%s: no error", op)
		}
	}
	same(t, h.dump(t), want)
	op := kernel.Op{Key: kernel.TaskPort{Sandbox: "/k", VIP: four, Proto: "x"}, Want: kernel.TaskPortSpec{Addr: four}}
	if err := (nft.Tables{}).ApplyTask(h.fd, "/k", []kernel.Op{op}); err == nil || errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("%s: %v, want it refused for what it is", op, err)
	}
}
