package sockets

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// The library can neither ask for a socket by its number nor read whether a listener
// of IPv6 takes IPv4, and its reading of attributes trusts their lengths. So messages
// are read and written here.

// Layout of the messages (include/uapi/linux/inet_diag.h, struct inet_diag_req_v2
// and inet_diag_msg): 4 bytes, in a request 4 of states, then the socket's identity.
const (
	idAtRequest = 8
	idAtMessage = 4
	idSize      = 48 // ports 2+2, addresses 16+16, device 4, number 4+4
	requestSize = idAtRequest + idSize
	messageSize = idAtMessage + idSize + 20 // timer, queues, user, inode
)

// Attributes of an answer (the same file), and the bit that asks for the first of
// them; the second comes with every listener of IPv6.
const (
	attrInfo   = netlink.INET_DIAG_INFO
	attrV6Only = 11 // INET_DIAG_SKV6ONLY
	wantInfo   = 1 << (attrInfo - 1)
)

// Places in struct tcp_info (include/uapi/linux/tcp.h), which only grows at its end.
const (
	lastSentAt = 44 // tcpi_last_data_sent
	lastRecvAt = 52 // tcpi_last_data_recv
)

// States, by number (include/net/tcp_states.h), and the set of those in which a
// connection can be silent for long: open, or closed by one side and waiting
// for the other. The kernel itself bounds all others.
const (
	listening = netlink.TCP_LISTEN
	talking   = 1<<netlink.TCP_ESTABLISHED | 1<<netlink.TCP_FIN_WAIT2 | 1<<netlink.TCP_CLOSE_WAIT
)

// socket is a TCP socket as the kernel lists it.
type socket struct {
	conn   kernel.Conn
	state  uint8
	timed  bool // conn.Idle is known
	v6only bool // a listener of IPv6 that takes no IPv4
}

// open reports whether the socket is a connection that can be silent for long. One
// whose process has gone, kept by the kernel for its last moments, tells no times.
func (k socket) open() bool { return k.timed && talking&(1<<k.state) != 0 }

// serves reports whether a listener takes connections to addr.
func (k socket) serves(addr netip.Addr) bool {
	at := k.conn.Local.Addr()
	return !k.v6only && (at == addr || at.IsUnspecified())
}

func familyOf(c kernel.Conn) uint8 {
	if c.IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// request asks for the TCP sockets of a family in states, or for c alone.
func request(family uint8, states uint32, c kernel.Conn) []byte {
	b := make([]byte, requestSize)
	b[0], b[1], b[2] = family, unix.IPPROTO_TCP, wantInfo
	binary.NativeEndian.PutUint32(b[4:], states)
	id := b[idAtRequest:]
	binary.BigEndian.PutUint16(id, c.Local.Port())
	binary.BigEndian.PutUint16(id[2:], c.Remote.Port())
	put(id[4:20], c.Local.Addr(), c.IPv6)
	put(id[20:36], c.Remote.Addr(), c.IPv6)
	binary.NativeEndian.PutUint32(id[36:], c.Dev)
	// The number's lower half is first, whatever the machine's order of bytes
	// (sock_diag_save_cookie in net/core/sock_diag.c).
	binary.NativeEndian.PutUint32(id[40:], uint32(c.Cookie))
	binary.NativeEndian.PutUint32(id[44:], uint32(c.Cookie>>32))
	return b
}

// put writes an address of IPv4, in its IPv6 form for a socket of IPv6.
func put(b []byte, a netip.Addr, mapped bool) {
	switch {
	case !a.IsValid():
	case mapped:
		a16 := a.As16()
		copy(b, a16[:])
	default:
		copy(b, a.AsSlice())
	}
}

// parse reads an answer. It is not ok for a socket that has nothing to do with
// IPv4: one of IPv6 whose local address is neither a mapped one nor unspecified.
func parse(b []byte) (k socket, ok bool, err error) {
	if len(b) < messageSize {
		return k, false, fmt.Errorf("a socket is told in %d bytes, want %d", len(b), messageSize)
	}
	k.state = b[1]
	id := b[idAtMessage:]
	var local, remote netip.Addr
	switch b[0] {
	case unix.AF_INET:
		local, remote = netip.AddrFrom4([4]byte(id[4:8])), netip.AddrFrom4([4]byte(id[20:24]))
	case unix.AF_INET6:
		k.conn.IPv6 = true
		local, remote = netip.AddrFrom16([16]byte(id[4:20])).Unmap(), netip.AddrFrom16([16]byte(id[20:36])).Unmap()
	default:
		return k, false, fmt.Errorf("a socket is told of family %d", b[0])
	}
	if !local.Is4() && !local.IsUnspecified() {
		return k, false, nil
	}
	k.conn.Local = netip.AddrPortFrom(local, binary.BigEndian.Uint16(id))
	k.conn.Remote = netip.AddrPortFrom(remote, binary.BigEndian.Uint16(id[2:]))
	k.conn.Dev = binary.NativeEndian.Uint32(id[36:])
	k.conn.Cookie = uint64(binary.NativeEndian.Uint32(id[40:])) | uint64(binary.NativeEndian.Uint32(id[44:]))<<32
	for b = b[messageSize:]; len(b) >= unix.SizeofRtAttr; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return k, false, fmt.Errorf("an attribute of a socket has %d bytes of %d", n, len(b))
		}
		switch value := b[unix.SizeofRtAttr:n]; binary.NativeEndian.Uint16(b[2:]) {
		case attrInfo:
			if len(value) >= lastRecvAt+4 {
				sent := binary.NativeEndian.Uint32(value[lastSentAt:])
				recv := binary.NativeEndian.Uint32(value[lastRecvAt:])
				k.conn.Idle, k.timed = time.Duration(min(sent, recv))*time.Millisecond, true
			}
		case attrV6Only:
			k.v6only = len(value) > 0 && value[0] != 0
		}
		// The next begins at a multiple of four bytes (rtnetlink(3), RTA_ALIGN).
		b = b[min((n+3)&^3, len(b)):]
	}
	return k, true, nil
}
