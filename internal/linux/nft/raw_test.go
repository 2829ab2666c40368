package nft_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// datagram is a UDP datagram that a test makes itself, where a socket would leave
// the checksum to the device and the order of fragments to the stack.
type datagram struct {
	from, to netip.AddrPort
	data     []byte
	noSum    bool // without a checksum, as RFC 768 allows
	fragment int  // octets in each fragment, a multiple of 8; 0: one packet
	backward bool // the last fragment first
	id       uint16
}

// packets are the datagram as IPv4 packets. The kernel fills in their checksums
// of the header alone.
func (d datagram) packets() [][]byte {
	udp := make([]byte, 8, 8+len(d.data))
	binary.BigEndian.PutUint16(udp, d.from.Port())
	binary.BigEndian.PutUint16(udp[2:], d.to.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(d.data)))
	udp = append(udp, d.data...)
	src, dst := d.from.Addr().As4(), d.to.Addr().As4()
	if !d.noSum {
		pseudo := slices.Concat(src[:], dst[:], []byte{0, unix.IPPROTO_UDP}, udp[4:6], udp)
		binary.BigEndian.PutUint16(udp[6:], checksum(pseudo))
	}
	size := d.fragment
	if size == 0 {
		size = len(udp)
	}
	var out [][]byte
	for at := 0; at < len(udp); at += size {
		end := min(at+size, len(udp))
		p := make([]byte, 20, 20+end-at)
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP // version 4, header of 5 words; TTL
		binary.BigEndian.PutUint16(p[2:], uint16(20+end-at))
		binary.BigEndian.PutUint16(p[4:], d.id)
		off := uint16(at / 8)
		if end < len(udp) {
			off |= 0x2000 // more fragments
		}
		binary.BigEndian.PutUint16(p[6:], off)
		copy(p[12:], src[:])
		copy(p[16:], dst[:])
		out = append(out, append(p, udp[at:end]...))
	}
	if d.backward {
		slices.Reverse(out)
	}
	return out
}

// checksum is the Internet checksum (RFC 1071).
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// send sends the datagram from a task.
func (k *task) send(t testing.TB, d datagram) {
	t.Helper()
	do(t, k.fd, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, p := range d.packets() {
			if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: d.to.Addr().As4()}); err != nil {
				return err
			}
		}
		return nil
	})
}
