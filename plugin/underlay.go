package main

import (
	"net/netip"
	"sync/atomic"
)

// underlay remembers the MTU of the device with this node's address. Whoever wants it has
// a second at most, and some the hub's lock; asking the kernel waits for all that a round
// of the loop changes, which takes longer where networks go on a busy machine. Its
// methods may be called from any goroutine.
type underlay struct {
	ask  func(vtep netip.Addr) (int, error) // the kernel
	last atomic.Pointer[underlayMTU]        // nil: not known
}

// underlayMTU is what was read last.
type underlayMTU struct {
	vtep  netip.Addr
	bytes int
}

// mtu is the kernel's answer, as it was when it was read last: the kernel is asked only
// for an address that is new or had no device.
func (u *underlay) mtu(vtep netip.Addr) (int, error) {
	if l := u.last.Load(); l != nil && l.vtep == vtep {
		return l.bytes, nil
	}
	bytes, err := u.ask(vtep)
	if err == nil {
		u.last.Store(&underlayMTU{vtep, bytes})
	}
	return bytes, err
}

// refresh reads the MTU anew. If that fails, the next who wants it is told why.
func (u *underlay) refresh(vtep netip.Addr) {
	bytes, err := u.ask(vtep)
	if err != nil {
		u.last.Store(nil)
		return
	}
	u.last.Store(&underlayMTU{vtep, bytes})
}
