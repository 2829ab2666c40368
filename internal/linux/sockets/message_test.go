package sockets

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// answer is what the kernel would tell of c: the identity is that of a request.
func answer(c kernel.Conn, state uint8, attrs ...byte) []byte {
	r := request(familyOf(c), 0, c)
	b := make([]byte, messageSize, messageSize+len(attrs))
	b[0], b[1] = r[0], state
	copy(b[idAtMessage:], r[idAtRequest:])
	return append(b, attrs...)
}

func conn(ipv6 bool) kernel.Conn {
	return kernel.Conn{
		Local: netip.MustParseAddrPort("10.255.0.3:80"), Remote: netip.MustParseAddrPort("10.255.0.2:40000"),
		IPv6: ipv6, Dev: 7, Cookie: 1<<40 + 2,
	}
}

func TestSocketIsAskedForAsItWasTold(t *testing.T) {
	for _, ipv6 := range []bool{false, true} {
		k, ok, err := parse(answer(conn(ipv6), netlink.TCP_ESTABLISHED))
		if err != nil || !ok || k.conn != conn(ipv6) {
			t.Errorf("%+v, %v, %v; want %+v", k, ok, err, conn(ipv6))
		}
		if k.open() {
			t.Error("one without times can be silent")
		}
	}
}

func TestSocketsOfIPv6AloneAreLeftOut(t *testing.T) {
	c := conn(true)
	c.Local = netip.MustParseAddrPort("[fd00::3]:80")
	if k, ok, err := parse(answer(c, netlink.TCP_ESTABLISHED)); ok || err != nil {
		t.Errorf("%+v, %v, %v", k, ok, err)
	}
	c.Local = netip.MustParseAddrPort("[::]:80")
	k, ok, err := parse(answer(c, listening, 5, 0, attrV6Only, 0, 1, 0, 0, 0))
	if !ok || err != nil || k.serves(conn(true).Local.Addr()) {
		t.Errorf("a listener that takes no IPv4: %+v, %v, %v", k, ok, err)
	}
	k, ok, err = parse(answer(c, listening, 5, 0, attrV6Only, 0, 0, 0, 0, 0))
	if !ok || err != nil || !k.serves(conn(true).Local.Addr()) {
		t.Errorf("a listener for both: %+v, %v, %v", k, ok, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(answer(conn(false), netlink.TCP_ESTABLISHED, 5, 0, attrV6Only, 0, 1, 0, 0, 0))
	f.Add(answer(conn(true), listening, append([]byte{124, 0, attrInfo, 0}, bytes.Repeat([]byte{1}, 120)...)...))
	f.Add([]byte{unix.AF_INET6})
	f.Fuzz(func(t *testing.T, b []byte) {
		k, ok, err := parse(b)
		if err != nil || !ok {
			return
		}
		if a := k.conn.Local.Addr(); !a.Is4() && !a.IsUnspecified() {
			t.Errorf("told of %s", a)
		}
		if again := request(familyOf(k.conn), 0, k.conn); k.conn.Remote.Addr().Is4() && k.conn.Local.Addr().Is4() &&
			!bytes.Equal(again[idAtRequest:][36:], b[idAtMessage:][36:idSize]) {
			t.Errorf("asked for again as % x, told as % x", again[idAtRequest:], b[idAtMessage:][:idSize])
		}
	})
}
