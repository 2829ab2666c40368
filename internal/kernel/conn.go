package kernel

import (
	"net/netip"
	"time"
)

// Conn is an open TCP connection that a process in a task's namespace has
// accepted. It is no object of a State: it is not ours to make.
type Conn struct {
	Local, Remote netip.AddrPort // IPv4, also where the socket is one of IPv6
	IPv6          bool           // the socket is one of IPv6: of a server for both
	Dev           uint32         // index of the device that it is bound to; 0: none
	Cookie        uint64         // the kernel's number of the socket, never given again until the next boot
	Idle          time.Duration  // since data last went or came
	// Served: something listens on the local port, still.
	Served bool
}
