package nft_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
)

const (
	etherIPv4, etherARP, etherRARP = 0x0800, 0x0806, 0x8035 // ETH_P_IP, ETH_P_ARP, ETH_P_RARP
	etherIPv6, etherVLAN, etherQ   = 0x86dd, 0x8100, 0x88a8 // ETH_P_IPV6, ETH_P_8021Q, ETH_P_8021AD
)

// frame is an Ethernet frame to everybody.
func frame(from model.MAC, protocol uint16, payload ...byte) []byte {
	return ethernet(model.MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, from, protocol, payload...)
}

func ethernet(to, from model.MAC, protocol uint16, payload ...byte) []byte {
	return append(binary.BigEndian.AppendUint16(slices.Concat(to[:], from[:]), protocol), payload...)
}

// arp is a packet of ARP (RFC 826) in which somebody says who it is.
func arp(op byte, mac model.MAC, ip, target netip.Addr) []byte {
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, op}, mac[:], ip.AsSlice(), make([]byte, 6), target.AsSlice())
}

// packet is one of IPv4, for everybody, of a protocol that nobody speaks (RFC 3692: 253).
func packet(from netip.Addr) []byte {
	p := []byte{0x45, 0, 0, 20, 0, 0, 0, 0, 64, 253, 0, 0}
	p = slices.Concat(p, from.AsSlice(), []byte{255, 255, 255, 255})
	binary.BigEndian.PutUint16(p[10:], checksum(p))
	return p
}

// wire is a socket that sends and gets frames as they are, on a task's device.
type wire struct{ fd int }

func (k *task) wire(t testing.TB) wire {
	t.Helper()
	var w wire
	do(t, k.fd, func() (err error) {
		eth, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		all := int(uint16(unix.ETH_P_ALL&0xff)<<8 | unix.ETH_P_ALL>>8)
		if w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		patient := unix.NsecToTimeval(patience.Nanoseconds())
		return errors.Join(
			unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: uint16(all), Ifindex: eth.Index}),
			unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patient))
	})
	t.Cleanup(func() { unix.Close(w.fd) })
	return w
}

func (w wire) send(t testing.TB, f []byte) {
	t.Helper()
	if _, err := unix.Write(w.fd, f); err != nil {
		t.Fatal(err)
	}
}

// hears reports whether a frame comes before the one that is sent behind it.
func (w wire) hears(t testing.TB, from wire, f, last []byte) bool {
	t.Helper()
	from.send(t, f)
	from.send(t, last)
	buf, heard := make([]byte, 2048), false
	for {
		n, err := unix.Read(w.fd, buf)
		if err != nil {
			t.Fatalf("the frame that must pass: %v", err)
		}
		switch got := buf[:n]; {
		case bytes.HasPrefix(got, last):
			return heard
		// A tag is taken out of the frame before it gets to a socket.
		case bytes.HasPrefix(got, f), len(f) > 18 && bytes.HasPrefix(got, f[:12]) && bytes.HasSuffix(got, f[18:]):
			heard = true
		}
	}
}

// TestATaskSpeaksForItself: task b serves vip1, and c serves vip2.
func TestATaskSpeaksForItself(t *testing.T) {
	l := newLab(t, byNFT())
	a, b, c := l.tasks["a"], l.tasks["b"], l.tasks["c"]
	l.set(service{vip: vip1, ready: l.names("b")}, service{vip: vip2, ready: l.names("c")})
	own, others, gateway := netip.MustParseAddr(vip1), netip.MustParseAddr(vip2), l.one.network.Gateway
	none, alias := netip.IPv4Unspecified(), netip.MustParseAddr("250.0.16.2")
	short := packet(c.ip)[:16]
	hardware := arp(2, b.mac, b.ip, a.ip)
	hardware[4] = 8 // longer addresses: the fields are elsewhere
	tag := []byte{0, 7}
	tagged := func(of uint16, p []byte) []byte { return slices.Concat(tag, binary.BigEndian.AppendUint16(nil, of), p) }

	type say struct {
		name  string
		frame []byte
	}
	truths := []say{
		{"IPv4 from its address", frame(b.mac, etherIPv4, packet(b.ip)...)},
		{"IPv4 from its virtual IP", frame(b.mac, etherIPv4, packet(own)...)},
		{"ARP for its address", frame(b.mac, etherARP, arp(2, b.mac, b.ip, a.ip)...)},
		{"a question of ARP", frame(b.mac, etherARP, arp(1, b.mac, b.ip, gateway)...)},
		{"a probe of ARP", frame(b.mac, etherARP, arp(1, b.mac, none, b.ip)...)},
	}
	lies := []say{
		{"ARP for another's address", frame(b.mac, etherARP, arp(2, b.mac, c.ip, a.ip)...)},
		{"a question of ARP as another", frame(b.mac, etherARP, arp(1, b.mac, c.ip, a.ip)...)},
		{"ARP for its virtual IP", frame(b.mac, etherARP, arp(2, b.mac, own, a.ip)...)},
		{"ARP for another virtual IP", frame(b.mac, etherARP, arp(2, b.mac, others, others)...)},
		{"ARP for the gateway", frame(b.mac, etherARP, arp(1, b.mac, gateway, gateway)...)},
		{"ARP for another MAC", frame(b.mac, etherARP, arp(2, c.mac, b.ip, a.ip)...)},
		{"ARP from another MAC", frame(c.mac, etherARP, arp(2, b.mac, b.ip, a.ip)...)},
		{"ARP all of another", frame(c.mac, etherARP, arp(2, c.mac, c.ip, a.ip)...)},
		{"a probe from another MAC", frame(c.mac, etherARP, arp(1, b.mac, none, b.ip)...)},
		{"a probe for another MAC", frame(b.mac, etherARP, arp(1, c.mac, none, b.ip)...)},
		{"ARP of another form", frame(b.mac, etherARP, hardware...)},
		{"ARP that is cut off", frame(b.mac, etherARP, arp(2, b.mac, b.ip, a.ip)[:16]...)},
		{"IPv4 from another's address", frame(b.mac, etherIPv4, packet(c.ip)...)},
		{"IPv4 from another node's task", frame(b.mac, etherIPv4, packet(l.tasks["d"].ip)...)},
		{"IPv4 from another MAC", frame(c.mac, etherIPv4, packet(b.ip)...)},
		{"IPv4 all of another", frame(c.mac, etherIPv4, packet(c.ip)...)},
		{"IPv4 from another virtual IP", frame(b.mac, etherIPv4, packet(others)...)},
		{"IPv4 from the gateway", frame(b.mac, etherIPv4, packet(gateway)...)},
		{"IPv4 from no address", frame(b.mac, etherIPv4, packet(none)...)},
		{"IPv4 from outside", frame(b.mac, etherIPv4, packet(netip.MustParseAddr("198.51.100.1"))...)},
		{"IPv4 from an alias", frame(b.mac, etherIPv4, packet(alias)...)},
		{"IPv4 that is cut off", frame(b.mac, etherIPv4, short...)},
		{"IPv4 of a VLAN", frame(b.mac, etherVLAN, tagged(etherIPv4, packet(c.ip))...)},
		{"ARP of a VLAN", frame(b.mac, etherVLAN, tagged(etherARP, arp(2, b.mac, c.ip, a.ip))...)},
		{"IPv4 of a VLAN of a VLAN", frame(b.mac, etherQ, tagged(etherVLAN, tagged(etherIPv4, packet(c.ip)))...)},
		{"IPv6", frame(b.mac, etherIPv6, append([]byte{0x60, 0, 0, 0, 0, 0, 59, 1}, make([]byte, 32)...)...)},
		{"RARP", frame(b.mac, etherRARP, arp(4, b.mac, b.ip, a.ip)...)},
		{"a length instead of a protocol", frame(b.mac, 20, make([]byte, 20)...)},
	}
	from, to := b.wire(t), a.wire(t)
	last := func(i int) []byte { // no two alike
		return frame(b.mac, etherIPv4, append(packet(b.ip), fmt.Sprintf("last of %d", i)...)...)
	}
	check := func(i int, s say, want bool) {
		t.Helper()
		if heard := to.hears(t, from, s.frame, last(i)); heard != want {
			t.Errorf("%s is heard: %t, want %t", s.name, heard, want)
		}
	}
	for i, s := range truths {
		check(i, s, true)
	}
	for i, s := range lies {
		check(100+i, s, false)
	}
	list := run(t, l.one.fd, "nft", "list", "table", "bridge", "sluice-guard")
	for _, r := range []string{"ARP for others", "IPv4 from others", "neither"} {
		if n := counted(list, r); n == 0 {
			t.Errorf("rule %q has counted nothing:\n%s", r, list)
		}
	}

	// What has started without knowing all containers drops nothing, nor counts it.
	before, err := nft.Tables{}.Dropped(l.one.fd, l.one.name)
	must(t, err)
	if before < uint64(len(lies)) {
		t.Errorf("%d frames counted as dropped, want %d or more", before, len(lies))
	}
	closed := l.one.have[kernel.GuardTable{NS: l.one.name}].(kernel.GuardTableSpec)
	open := closed
	open.Open = true
	swing := func(have, want kernel.GuardTableSpec) {
		t.Helper()
		must(t, nft.Tables{}.ApplyBridge(l.one.fd, l.one.name, []kernel.Op{{Key: kernel.GuardTable{NS: l.one.name}, Have: have, Want: want}}))
		if got := l.one.dump(t)[kernel.GuardTable{NS: l.one.name}]; got != want {
			t.Fatalf("the table reads back as %v, want %v", got, want)
		}
	}
	swing(closed, open)
	for i, s := range lies {
		if !strings.HasSuffix(s.name, "VLAN") {
			check(400+i, s, true)
		}
	}
	if n, err := (nft.Tables{}).Dropped(l.one.fd, l.one.name); err != nil || n != 0 {
		t.Errorf("open: %d frames counted as dropped, %v; want 0", n, err)
	}
	swing(open, closed)
	check(500, lies[0], false)

	// Who answers to published ports does so from the aliases of all entries.
	l.set(service{vip: vip1, ready: l.names("b"), options: model.ServiceOptions{Published: "81:80/tcp"}})
	check(200, say{"IPv4 from an alias, published", frame(b.mac, etherIPv4, packet(alias)...)}, true)
	check(201, say{"IPv4 from an alias by another MAC", frame(c.mac, etherIPv4, packet(alias)...)}, false)
	check(202, say{"IPv4 beside the pool", frame(b.mac, etherIPv4, packet(netip.MustParseAddr("251.0.16.2"))...)}, false)

	// That each of them would be heard is what the guard is for.
	delete(l.one.have, kernel.GuardTable{NS: l.one.name})
	must(t, nft.Tables{}.ApplyBridge(l.one.fd, l.one.name, []kernel.Op{{Key: kernel.GuardTable{NS: l.one.name}, Have: kernel.GuardTableSpec{}}}))
	for i, s := range lies {
		if strings.HasSuffix(s.name, "VLAN") { // a bridge takes the outer tag for its own
			continue
		}
		check(300+i, s, true)
	}
}

// counted is what the rule with a text has counted, by what nft lists.
func counted(list, text string) (packets int) {
	for line := range strings.Lines(list) {
		if _, count, is := strings.Cut(line, "counter packets "); is && strings.Contains(line, text) {
			if _, err := fmt.Sscan(count, &packets); err != nil {
				return 0
			}
		}
	}
	return packets
}

// TestNoTaskTakesAnothersMAC: a frame for bridges alone goes past the hook that all
// others go through, and a bridge learns from it where its sender is, unless it is
// quiet as the plan wants it (kernel.LinkSpec).
func TestNoTaskTakesAnothersMAC(t *testing.T) {
	l := newLab(t, byNFT())
	a, b, c := l.tasks["a"], l.tasks["b"], l.tasks["c"]
	c.serve(t, "0.0.0.0:80")
	l.set()
	behind := func() string {
		for line := range strings.Lines(run(t, l.one.fd, "bridge", "fdb", "show", "br", overlay.BridgeName)) {
			if f := strings.Fields(line); f[0] == c.mac.String() && len(f) > 2 {
				return f[2]
			}
		}
		return ""
	}
	takes := func() {
		t.Helper()
		from := b.wire(t)
		for last := range 16 {
			to := model.MAC{0x01, 0x80, 0xc2, 0, 0, byte(last)}
			for _, protocol := range []uint16{0x88cc, etherIPv4} { // LLDP's, and one that may pass elsewhere
				from.send(t, ethernet(to, c.mac, protocol, packet(b.ip)...))
			}
		}
	}
	must(t, a.greet(c))
	if at := behind(); at != c.port() {
		t.Fatalf("before: c is behind %q, want %s", at, c.port())
	}
	learn := func(not string) {
		run(t, l.one.fd, "ip", "link", "set", overlay.BridgeName, "type", "bridge", "no_linklocal_learn", not)
	}
	learn("1")
	takes()
	if at := behind(); at != c.port() {
		t.Errorf("c is behind %q, want %s", at, c.port())
	}
	must(t, a.greet(c))

	learn("0")
	// Again and again: what c itself still sends to end its connection teaches the bridge, too.
	takes()
	for late := time.Now().Add(patience); behind() != b.port(); takes() {
		if time.Now().After(late) {
			t.Fatalf("with a bridge that learns, c is behind %q, want %s: the test shows nothing", behind(), b.port())
		}
	}
}

// greet connects to another task and hears its greeting.
func (k *task) greet(to *task) error {
	c, err := k.dial("", to.ip.String()+":80")
	if err != nil {
		return err
	}
	return c.Close()
}

// A packet meets the guard as it was or as it is to be: whoever has a place in it has
// that all the time.
func TestGuardRefusesWhatItCannotHold(t *testing.T) {
	fd := newNetns(t)
	const ns = "sluice-guarded"
	spec := kernel.GuardTableSpec{Ports: "slv", Pool: netip.MustParsePrefix("250.0.0.0/8")}
	table := kernel.Op{Key: kernel.GuardTable{NS: ns}, Want: spec}
	ip, mac := netip.MustParseAddr("10.255.0.2"), model.MAC{2, 0, 0, 0, 0, 1}
	for _, c := range []struct {
		name string
		op   kernel.Op
		want string
	}{
		{"no ports", kernel.Op{Key: kernel.GuardTable{NS: ns}, Want: kernel.GuardTableSpec{Pool: spec.Pool}}, "no name of a device"},
		{"no pool", kernel.Op{Key: kernel.GuardTable{NS: ns}, Want: kernel.GuardTableSpec{Ports: "slv"}}, "want an IPv4 prefix"},
		{"a long name", kernel.Op{Key: kernel.GuardPort{NS: ns, Dev: strings.Repeat("x", 16)}, Want: kernel.GuardPortSpec{MAC: mac}}, "1 to 15 characters"},
		{"no name", kernel.Op{Key: kernel.GuardAddr{NS: ns, IP: ip}, Want: kernel.GuardAddrSpec{MAC: mac}}, "1 to 15 characters"},
		{"IPv6", kernel.Op{Key: kernel.GuardAddr{NS: ns, Dev: "slv1", IP: netip.IPv6Unspecified()}, Want: kernel.GuardAddrSpec{MAC: mac}}, "is not IPv4"},
		{"another's value", kernel.Op{Key: kernel.GuardPort{NS: ns, Dev: "slv1"}, Want: kernel.GuardAddrSpec{}}, "value is a"},
		{"no table", kernel.Op{Key: kernel.GuardPort{NS: ns, Dev: "slv1"}, Want: kernel.GuardPortSpec{MAC: mac}}, "make it first"},
	} {
		if err := (nft.Tables{}).ApplyBridge(fd, ns, []kernel.Op{c.op}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", c.name, err, c.want)
		}
	}
	// Somebody gives a port a second MAC: the dump says that it is nothing of ours, and
	// the next change leaves one.
	port, addr := kernel.GuardPort{NS: ns, Dev: "slv1"}, kernel.GuardAddr{NS: ns, Dev: "slv1", IP: ip}
	want := kernel.State{table.Key: spec, port: kernel.GuardPortSpec{MAC: mac, Aliases: true}, addr: kernel.GuardAddrSpec{MAC: mac}}
	must(t, nft.Tables{}.ApplyBridge(fd, ns, kernel.Diff(kernel.State{}, want)))
	run(t, fd, "nft", "add", "element", "bridge", "sluice-guard", "ports", `{ "slv1" . 02:00:00:00:00:99 : 1 }`)
	run(t, fd, "nft", "add", "element", "bridge", "sluice-guard", "addresses", `{ "slv1" . 10.255.0.2 . 02:00:00:00:00:99 : 1 }`)
	have, err := nft.Tables{}.DumpBridge(fd, ns)
	must(t, err)
	if have[port] != (kernel.GuardPortSpec{}) || have[addr] != (kernel.GuardAddrSpec{}) {
		t.Errorf("with two MACs:\n%s", have.Text())
	}
	must(t, nft.Tables{}.ApplyBridge(fd, ns, kernel.Diff(have, want)))
	have, err = nft.Tables{}.DumpBridge(fd, ns)
	must(t, err)
	if have.Text() != want.Text() {
		t.Errorf("mended:\n%s", have.Text())
	}
}
