package pool

import (
	"fmt"
	"net/netip"
)

// Leases are the addresses of one subnet: which are in use, which of them have
// not been heard of since the last replay, and where to look for the next one.
// Not safe for concurrent use.
type Leases struct {
	subnet netip.Prefix
	nodes  netip.Prefix // kept for nodes; zero when nothing is kept

	lo, hi uint32 // first and last address that is handed out unasked, as offsets
	top    uint32 // last address that may be asked for

	used   Set
	auto   uint32 // how many of used lie between lo and hi
	open   Set    // leased, but not confirmed since the last replay
	cursor uint32 // between lo and hi: where the next search starts
}

// NewLeases returns an empty set of leases. Addresses are handed out from sub
// if it is valid, else from the whole subnet; with keep the node range is left
// alone. The error is an *Error of kind ErrInvalid.
func NewLeases(subnet, sub netip.Prefix, keep bool) (*Leases, error) {
	if err := checkSubnet(subnet); err != nil {
		return nil, err
	}
	size := sizeOf(subnet)
	l := &Leases{subnet: subnet, top: size - 2} // size-1 is the broadcast address
	if nodes, ok := NodeRange(subnet); ok && keep {
		l.nodes = nodes
		l.top = number(nodes.Addr()) - number(subnet.Addr()) - 1
	}
	l.lo, l.hi = 1, l.top // 0 is the network address
	if sub.IsValid() {
		if err := checkSub(sub, subnet); err != nil {
			return nil, err
		}
		first := number(sub.Addr()) - number(subnet.Addr())
		l.lo = max(l.lo, first)
		l.hi = min(l.hi, first+sizeOf(sub)-1)
		if l.lo > l.hi {
			return nil, refuse(ErrInvalid, "sub-pool %s holds no address that can be handed out of pool %s%s; choose another --ip-range", sub, subnet, l.keeps())
		}
	}
	l.used, l.open, l.cursor = NewSet(size), NewSet(size), l.lo
	return l, nil
}

// Next returns the address that Request would hand out, without taking it.
func (l *Leases) Next() (netip.Addr, bool) {
	i, ok := l.used.NextFree(l.cursor)
	if !ok || i > l.hi {
		if i, ok = l.used.NextFree(l.lo); !ok || i > l.hi {
			return netip.Addr{}, false
		}
	}
	return at(l.subnet, i), true
}

// Request hands out the next free address after the one handed out last,
// starting over at the end of the subnet.
func (l *Leases) Request() (netip.Addr, error) {
	a, ok := l.Next()
	if !ok {
		return a, l.exhausted()
	}
	l.Take(a)
	l.moveCursor(l.after(a))
	return a, nil
}

// First returns the lowest free address of the subnet, sub-pool or not: the
// gateway's when nobody chose one.
func (l *Leases) First() (netip.Addr, bool) {
	i, ok := l.used.NextFree(1)
	if !ok || i > l.top {
		return netip.Addr{}, false
	}
	return at(l.subnet, i), true
}

// Allowed returns nil if the address may be asked for by name. Whether it is in
// use is another question. The error is an *Error of kind ErrInvalid.
func (l *Leases) Allowed(a netip.Addr) error {
	switch {
	case !a.IsValid() || !l.subnet.Contains(a):
		return refuse(ErrInvalid, "address %s is outside of pool %s; choose one from %s to %s", a, l.subnet, at(l.subnet, 1), at(l.subnet, l.top))
	case l.offset(a) == 0:
		return refuse(ErrInvalid, "address %s is the network address of pool %s; choose one from %s to %s", a, l.subnet, at(l.subnet, 1), at(l.subnet, l.top))
	case l.offset(a) == sizeOf(l.subnet)-1:
		return refuse(ErrInvalid, "address %s is the broadcast address of pool %s; choose one from %s to %s", a, l.subnet, at(l.subnet, 1), at(l.subnet, l.top))
	case l.offset(a) > l.top:
		return refuse(ErrInvalid, "address %s of pool %s lies in %s, which sluice keeps for the nodes of the swarm; choose one from %s to %s", a, l.subnet, l.nodes, at(l.subnet, 1), at(l.subnet, l.top))
	}
	return nil
}

// Has reports whether the address is in use.
func (l *Leases) Has(a netip.Addr) bool { return l.subnet.Contains(a) && l.used.Has(l.offset(a)) }

// Open reports whether the address is in use and unconfirmed.
func (l *Leases) Open(a netip.Addr) bool { return l.subnet.Contains(a) && l.open.Has(l.offset(a)) }

// Take marks an allowed address as used and confirmed.
func (l *Leases) Take(a netip.Addr) {
	i := l.offset(a)
	l.open.Remove(i)
	if l.used.Add(i) && l.automatic(i) {
		l.auto++
	}
}

// Release gives an address back. One that is not in use is no error.
func (l *Leases) Release(a netip.Addr) {
	if !l.subnet.Contains(a) {
		return
	}
	i := l.offset(a)
	l.open.Remove(i)
	if l.used.Remove(i) && l.automatic(i) {
		l.auto--
	}
}

// Doubt marks a used address as unconfirmed.
func (l *Leases) Doubt(a netip.Addr) {
	if l.Has(a) {
		l.open.Add(l.offset(a))
	}
}

// Used returns how many addresses are in use, Free how many more can be handed
// out unasked, Unconfirmed how many of the used ones are in doubt.
func (l *Leases) Used() int        { return l.used.Len() }
func (l *Leases) Free() int        { return int(l.hi - l.lo + 1 - l.auto) }
func (l *Leases) Unconfirmed() int { return l.open.Len() }

// Check returns the first broken invariant, or nil. It walks the whole subnet:
// for tests and for a journal that was just read.
func (l *Leases) Check() error {
	if err := l.used.check(); err != nil {
		return fmt.Errorf("pool %s: used: %w", l.subnet, err)
	}
	if err := l.open.check(); err != nil {
		return fmt.Errorf("pool %s: unconfirmed: %w", l.subnet, err)
	}
	var auto uint32
	for i := range l.used.All() {
		if err := l.Allowed(at(l.subnet, i)); err != nil {
			return fmt.Errorf("pool %s: leased: %w", l.subnet, err)
		}
		if l.automatic(i) {
			auto++
		}
	}
	if auto != l.auto {
		return fmt.Errorf("pool %s: %d addresses in use between %d and %d, counted %d", l.subnet, auto, l.lo, l.hi, l.auto)
	}
	for i := range l.open.All() {
		if !l.used.Has(i) {
			return fmt.Errorf("pool %s: %s is unconfirmed but not in use", l.subnet, at(l.subnet, i))
		}
	}
	if !l.automatic(l.cursor) {
		return fmt.Errorf("pool %s: cursor %d is not between %d and %d", l.subnet, l.cursor, l.lo, l.hi)
	}
	return nil
}

// after returns the address behind a, starting over at the end: where the
// search goes on when a is handed out.
func (l *Leases) after(a netip.Addr) netip.Addr {
	if i := l.offset(a); l.automatic(i) && i < l.hi {
		return at(l.subnet, i+1)
	}
	return at(l.subnet, l.lo)
}

// moveCursor starts the next search at a; an address that is never handed out
// unasked (a journal of another version) starts it at the beginning.
func (l *Leases) moveCursor(a netip.Addr) {
	l.cursor = l.lo
	if l.subnet.Contains(a) && l.automatic(l.offset(a)) {
		l.cursor = l.offset(a)
	}
}

func (l *Leases) cursorAddr() netip.Addr     { return at(l.subnet, l.cursor) }
func (l *Leases) offset(a netip.Addr) uint32 { return number(a) - number(l.subnet.Addr()) }
func (l *Leases) automatic(i uint32) bool    { return l.lo <= i && i <= l.hi }

func (l *Leases) keeps() string {
	if !l.nodes.IsValid() {
		return ""
	}
	return fmt.Sprintf(" (%s is kept for nodes)", l.nodes)
}

func (l *Leases) exhausted() error {
	where := "pool " + l.subnet.String()
	if l.hi-l.lo < l.top-1 {
		where = fmt.Sprintf("the --ip-range from %s to %s of pool %s", at(l.subnet, l.lo), at(l.subnet, l.hi), l.subnet)
	}
	doubt := ""
	if n := l.open.Len(); n > 0 {
		doubt = fmt.Sprintf(", %d of them unconfirmed since the last change of leader", n)
	}
	return refuse(ErrExhausted, "%s has no free address: %d in use%s%s; remove containers or services from the network, or create one with a larger --subnet", where, l.auto, doubt, l.keeps())
}
