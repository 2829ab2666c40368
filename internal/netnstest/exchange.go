package netnstest

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// exchangeWait is how long Exchange waits for one datagram, in seconds. A
// namespace answers within a millisecond. On a loaded machine a new device may take a
// second until it is up, and ARP, which was asked too early, asks again each second.
const exchangeWait = 5

// Exchange sends count UDP datagrams from one namespace to the address addr of
// another and an answer to each, one after the other. The error says which one
// did not arrive.
func Exchange(from, to *NS, addr netip.Addr, count int) error {
	server, err := udp(to, addr)
	if err != nil {
		return fmt.Errorf("server at %s: %w", addr, err)
	}
	defer unix.Close(server)
	client, err := udp(from, netip.IPv4Unspecified())
	if err != nil {
		return fmt.Errorf("client: %w", err)
	}
	defer unix.Close(client)
	at, err := unix.Getsockname(server)
	if err != nil {
		return err
	}
	buf := make([]byte, 64)
	for i := range count {
		if err := unix.Sendto(client, []byte("question"), 0, at); err != nil {
			return fmt.Errorf("send question %d: %w", i, err)
		}
		_, back, err := unix.Recvfrom(server, buf, 0)
		if err != nil {
			return fmt.Errorf("question %d to %s did not arrive: %w", i, addr, err)
		}
		if err := unix.Sendto(server, []byte("answer"), 0, back); err != nil {
			return fmt.Errorf("send answer %d: %w", i, err)
		}
		if _, _, err := unix.Recvfrom(client, buf, 0); err != nil {
			return fmt.Errorf("answer %d from %s did not arrive: %w", i, addr, err)
		}
	}
	return nil
}

// Send sends one UDP datagram to addr, whoever may be there.
func Send(from *NS, addr netip.Addr) error {
	s, err := udp(from, netip.IPv4Unspecified())
	if err != nil {
		return err
	}
	defer unix.Close(s)
	const discard = 9 // RFC 863
	return unix.Sendto(s, []byte("anybody"), 0, &unix.SockaddrInet4{Port: discard, Addr: addr.As4()})
}

// udp opens a socket in ns; it stays of that namespace whatever thread uses it.
func udp(ns *NS, addr netip.Addr) (fd int, err error) {
	err = ns.Do(func() error {
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: exchangeWait}); err != nil {
			unix.Close(fd)
			return err
		}
		if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: addr.As4()}); err != nil {
			unix.Close(fd)
			return err
		}
		return nil
	})
	return fd, err
}
