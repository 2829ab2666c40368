package nft_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"regexp"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	lb "sluice/lb/service"
)

// remap is a VIP's port 80 that leads to another, in both protocols.
func remap(to int) model.Ports { return model.Ports(fmt.Sprintf("80:%d/tcp;80:%[1]d/udp", to)) }

func TestTranslationReadsBack(t *testing.T) {
	h, want := bare(t)
	vip := netip.MustParseAddr("10.240.0.1")
	mac := model.MAC{2, 1}
	put := func(st kernel.State, nat bool, real string, port uint16) kernel.State {
		st = maps.Clone(st)
		spec := st[kernel.VIP{NS: h.name, IP: vip}].(kernel.VIPSpec)
		spec.NAT = nat
		st[kernel.VIP{NS: h.name, IP: vip}] = spec
		if real != "" {
			st[kernel.Real{NS: h.name, MAC: mac}] = kernel.RealSpec{IP: netip.MustParseAddr(real)}
		}
		if port != 0 {
			st[kernel.Port{NS: h.name, VIP: vip, Proto: model.UDP, Port: 53}] = kernel.PortSpec{To: port}
		}
		return st
	}
	for _, next := range []kernel.State{
		put(want, true, "10.240.100.0", 5353), put(want, true, "10.240.100.1", 53), put(want, false, "10.240.100.1", 0), want,
		put(want, true, "", 0), want,
	} {
		ops := kernel.Diff(h.have, next)
		h.apply(t, next)
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops)) // once more
		same(t, h.dump(t), next)
	}
	base := put(want, true, "10.240.100.0", 5353)
	for _, spoil := range []string{
		"delete element bridge sluice translated { 10.240.0.1 }",
		"add element bridge sluice translated { 10.240.0.2 }",
		"add element bridge sluice translated { 10.240.9.9 }",
		"flush map bridge sluice real",
		"add element bridge sluice real { 02:00:00:00:00:07 : 10.240.0.1 }",
		"flush map bridge sluice ports",
		"flush chain bridge sluice to-tcp",
		"flush chain bridge sluice translate",
	} {
		h.apply(t, base)
		run(t, h.fd, "nft", spoil)
		ops := kernel.Diff(h.dump(t), base)
		if len(ops) == 0 {
			t.Errorf("%s: no difference is seen", spoil)
		}
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		same(t, h.dump(t), base)
	}
	for _, o := range []kernel.Op{
		{Key: kernel.Real{NS: h.name, MAC: mac}, Want: kernel.RealSpec{}},
		{Key: kernel.Real{NS: h.name, MAC: mac}, Want: kernel.RealSpec{IP: netip.MustParseAddr("fd00::1")}},
		{Key: kernel.Real{NS: h.name, MAC: mac}, Want: kernel.PortSpec{}},
	} {
		if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{o}); err == nil {
			t.Errorf("%s: no error", o)
		}
	}
}

// refuses checks that a client learns at once that nobody listens.
func (l *lab) refuses(k *task, address string) {
	l.t.Helper()
	if _, err := k.dial("", address); !errors.Is(err, unix.ECONNREFUSED) {
		l.t.Errorf("TCP from %s to %s: %v, want refused", k.name, address, err)
	}
	if err := k.knock(address, 10); !errors.Is(err, unix.ECONNREFUSED) {
		l.t.Errorf("UDP from %s to %s: %v, want refused", k.name, address, err)
	}
}

// Packets have the backend's address when they come to it, and answers the VIP's
// when they come back, for all kinds of packet, and with all ways of checksums.
func TestTranslation(t *testing.T) {
	for _, offload := range []string{"offloaded", "by senders", "by the bridge's ports"} {
		for _, ports := range []model.Ports{"", remap(80), remap(8080)} {
			t.Run(fmt.Sprint(offload, " ", ports), func(t *testing.T) {
				l := newBareLab(t, lb.NFT)
				server := "80"
				if ports == remap(8080) {
					server = "8080"
				}
				l.serveAll("0.0.0.0:" + server)
				l.checksums(offload)
				for _, backends := range []string{"b", "d", "bd"} { // local, remote, and both
					l.set(named(service{vip: vip1, ready: l.names(backends)}, ports))
					for _, client := range l.names("abcd") {
						if client.name == backends {
							l.refuses(client, vip1+":80") // there is no other
							continue
						}
						l.talks(client, vip1+":80")
						for _, b := range l.names(backends) {
							if b != client {
								l.talks(client, b.ip.String()+":"+server)
								must(t, client.ping(b.ip.String(), 4000))
							}
						}
						l.talks(client, vip1+":80")
						must(t, client.ping(vip1, 56))
						must(t, client.ping(vip1, 4000))
						l.raw(client, vip1+":80")
						l.refuses(client, vip1+":81")
						if server != "80" {
							l.refuses(client, vip1+":"+server)
						}
					}
				}
			})
		}
	}
}

// checksums has them made by somebody, and looked at by the receiver: where nobody
// must, a veth pair does neither, and a wrong one is not seen.
func (l *lab) checksums(by string) {
	if by != "offloaded" {
		for _, k := range l.tasks {
			noOffload(l.t, k.fd, "eth0", unix.ETHTOOL_SRXCSUM)
			noOffload(l.t, k.on.fd, k.port(), unix.ETHTOOL_SRXCSUM)
		}
	}
	switch by {
	case "by senders":
		for _, k := range l.tasks {
			noOffload(l.t, k.fd, "eth0", unix.ETHTOOL_STXCSUM)
		}
	case "by the bridge's ports":
		for _, k := range l.tasks {
			noOffload(l.t, k.on.fd, k.port(), unix.ETHTOOL_STXCSUM)
		}
		for _, h := range []*host{l.one, l.two} {
			noOffload(l.t, h.fd, uplink, unix.ETHTOOL_STXCSUM)
			noOffload(l.t, h.fd, "wire", unix.ETHTOOL_STXCSUM)
		}
	}
}

// noOffload has a device's packets leave with their checksums, or its receiver look
// at them: ethtool -K tx off, rx off.
func noOffload(t testing.TB, fd int, dev string, cmd uint32) {
	t.Helper()
	do(t, fd, func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		value := struct{ cmd, data uint32 }{cmd, 0}
		var req struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte // struct ifreq is longer than that
		}
		copy(req.name[:], dev)
		req.data = unsafe.Pointer(&value)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
		runtime.KeepAlive(&value)
		if errno != 0 {
			return fmt.Errorf("checksums of %s: %w", dev, errno)
		}
		return nil
	})
}

// raw sends datagrams with checksums of their own, and without, whole and in
// fragments, from one socket, and wants each back from where it was sent.
func (l *lab) raw(k *task, address string) {
	t := l.t
	t.Helper()
	to := netip.MustParseAddrPort(address)
	pc := k.udp(t, k.ip.String()+":0")
	defer pc.Close()
	from := netip.MustParseAddrPort(pc.LocalAddr().String())
	for i, d := range []datagram{
		{data: noise(100)}, {data: noise(101), noSum: true},
		{data: noise(3001), fragment: 1000}, {data: noise(3000), fragment: 1000, noSum: true},
	} {
		d.from, d.to, d.id = from, to, uint16(i+1)
		k.send(t, d)
		must(t, pc.SetReadDeadline(time.Now().Add(patience)))
		buf := make([]byte, 1<<16)
		n, who, err := pc.ReadFrom(buf)
		if err != nil || who.String() != address || !bytes.Equal(buf[:n], d.data) {
			t.Errorf("%s to %s, %d octets, no checksum %v: %d octets from %v, %v", k.name, address, len(d.data), d.noSum, n, who, err)
		}
	}
}

// noise is some octets.
func noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}

// Round robin, draining and loss are the balancer's, whatever becomes of addresses.
func TestTranslatedBackendIsRemoved(t *testing.T) {
	l := newBareLab(t, lb.NFT)
	l.serveAll("0.0.0.0:8080")
	a, ports := l.tasks["a"], remap(8080)
	l.set(named(service{vip: vip1, ready: l.names("bcd")}, ports), named(service{vip: vip2, ready: l.names("cd")}, ports))
	wantHits(t, l.hits(a, vip1+":80", 9), map[string]int{"b": 3, "c": 3, "d": 3})
	wantHits(t, l.hits(a, vip2+":80", 4), map[string]int{"c": 2, "d": 2})
	wantHits(t, l.hits(l.tasks["b"], vip1+":80", 4), map[string]int{"c": 2, "d": 2})

	l.set(named(service{vip: vip1, ready: l.names("bd")}, ports))
	conns, _ := l.holds(a, vip1+":80", 4)
	socks := map[string]net.PacketConn{}
	for range 2 {
		pc := a.udp(t, "")
		got, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
		socks[parseAnswer(string(got)).server] = pc
	}
	l.set(named(service{vip: vip1, ready: l.names("b"), leaving: l.names("d")}, ports))
	for _, c := range conns {
		must(t, c.echo("still here"))
	}
	wantHits(t, l.hits(a, vip1+":80", 2), map[string]int{"b": 2})
	l.set(named(service{vip: vip1, ready: l.names("b")}, ports))
	for _, c := range conns {
		if err := c.echo("gone"); c.server == "d" && !errors.Is(err, unix.ECONNRESET) || c.server == "b" && err != nil {
			t.Errorf("connection with %s: %v", c.server, err)
		}
	}
	for who, pc := range socks {
		got, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
		if s := parseAnswer(string(got)).server; s != "b" {
			t.Errorf("flow with %s goes on with %s, want b", who, s)
		}
	}
	l.set(named(service{vip: vip1}, ports))
	l.refuses(a, vip1+":80")
}

// A client's port that has been used for one port of a VIP is used for another, and
// for the backend itself: answers come from where it asks.
func TestTranslatedPortIsReused(t *testing.T) {
	l := newBareLab(t, lb.NFT)
	b, a := l.tasks["b"], l.tasks["a"]
	b.serve(t, "0.0.0.0:80")
	local := a.ip.String() + ":41000"
	l.set(named(service{vip: vip1, ready: l.names("b")}, "81:80/tcp;82:80/tcp;80/udp"))
	for _, to := range []string{vip1 + ":81", vip1 + ":82", b.ip.String() + ":80", vip1 + ":81", b.ip.String() + ":80"} {
		c, err := a.dial(local, to)
		if err != nil {
			t.Fatalf("to %s: %v", to, err)
		}
		must(t, c.echo("hello"))
		c.reset()
	}
	pc := a.udp(t, local)
	for range 3 {
		for _, to := range []string{vip1 + ":80", b.ip.String() + ":80"} {
			if _, err := ask(pc, to, []byte("?")); err != nil {
				t.Errorf("datagram to %s: %v", to, err)
			}
		}
	}
}

// Errors of both sides reach the socket that they are about: they quote what it
// has sent.
func TestTranslatedErrors(t *testing.T) {
	for _, ports := range []model.Ports{"", remap(8080)} {
		l := newBareLab(t, lb.NFT)
		l.set(named(service{vip: vip1, ready: l.names("bd")}, ports))
		a := l.tasks["a"]
		for range 2 { // local and remote
			l.refuses(a, vip1+":80")
		}
		server := 80
		if ports != "" {
			server = 8080
		}
		local := fmt.Sprintf("%s:42000", a.ip)
		for _, k := range l.names("bd") {
			l.one.apply(t, l.want(l.one, named(service{vip: vip1, ready: []*task{k}}, ports)))
			var sc net.Conn
			do(t, k.fd, func() (err error) {
				sc, err = (&net.Dialer{LocalAddr: &net.UDPAddr{Port: server}}).Dial("udp4", local)
				return err
			})
			defer sc.Close()
			must(t, sc.SetDeadline(time.Now().Add(patience)))
			pc := a.udp(t, local)
			to, err := net.ResolveUDPAddr("udp4", vip1+":80")
			must(t, err)
			_, err = pc.WriteTo([]byte("?"), to)
			must(t, err)
			if _, err := sc.Read(make([]byte, 8)); err != nil {
				t.Fatalf("%s: %v", k.name, err)
			}
			pc.Close()
			_, err = sc.Write([]byte("too late"))
			must(t, err)
			if _, err := sc.Read(make([]byte, 8)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v, want refused", k.name, err)
			}
		}
	}
}

// Flows live as long as the state of their connection asks for.
func TestLifeOfTranslatedConnections(t *testing.T) {
	l := newBareLab(t, lb.NFT)
	l.serveAll("0.0.0.0:8080")
	l.set(named(service{vip: vip1, ready: l.names("b")}, remap(8080)))
	a := l.tasks["a"]
	expiry := regexp.MustCompile(`expires (\w+)`)
	want := func(name string, life time.Duration) {
		t.Helper()
		out := run(t, l.one.fd, "nft", "list", "map", "bridge", "sluice", name)
		m := expiry.FindAllStringSubmatch(out, -1)
		if len(m) != 1 {
			t.Fatalf("map %s has %d elements, want one:\n%s", name, len(m), out)
		}
		left, err := time.ParseDuration(m[0][1])
		must(t, err)
		if left > life || left < life-patience {
			t.Errorf("map %s: the element lives for %v, want %v", name, left, life)
		}
	}
	c, err := a.dial("", vip1+":80")
	must(t, err)
	must(t, c.echo("hello"))
	want("real-tcp-flows", 3*time.Hour)
	c.Close()
	want("real-tcp-flows", time.Minute)
	_, err = ask(a.udp(t, ""), vip1+":80", make([]byte, 4000))
	must(t, err)
	want("real-udp-flows", 2*time.Minute)
	want("real-frags", 5*time.Second)
	must(t, a.ping(vip1, 56))
	want("real-rest-flows", 30*time.Second)
}
