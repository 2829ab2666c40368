package ipam

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sluice/ipam/pool"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// describe prints all that can be seen of an allocator.
func describe(a *Allocator) string {
	var b strings.Builder
	for _, p := range a.Snapshot() {
		fmt.Fprintf(&b, "%s owner=%s gw=%s:", p.ID, p.Network, p.Gateway)
		for _, l := range a.Leases(p.ID) {
			switch {
			case l.Gateway:
				fmt.Fprintf(&b, " [%s]", l.Address)
			case l.Unconfirmed:
				fmt.Fprintf(&b, " %s?", l.Address)
			case !l.Orphaned.IsZero():
				fmt.Fprintf(&b, " %s since %s", l.Address, l.Orphaned.Format(time.TimeOnly))
			default:
				fmt.Fprintf(&b, " %s", l.Address)
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// spec is what the allocator of a swarm should do, written down a second time
// with maps and no regard for speed.
type spec struct {
	shared bool // Scope=global
	pools  map[netip.Prefix]*specPool
}

type specPool struct {
	id      pool.ID
	owner   string
	gw      netip.Addr
	epoch   int
	claimed bool
	former  bool // another manager has led since the owner was told of
	leases  map[netip.Addr]*specLease

	released map[netip.Addr]time.Time
}

type specLease struct {
	epoch  int
	listed bool // sure by a list, and not asked for since
	sure   bool
	given  bool // to somebody who asked, in this epoch and life

	orphan time.Time // since when nobody has it
}

func (s *spec) String() string {
	var b strings.Builder
	for _, k := range slices.SortedFunc(maps.Keys(s.pools), func(x, y netip.Prefix) int { return x.Addr().Compare(y.Addr()) }) {
		p := s.pools[k]
		fmt.Fprintf(&b, "%s owner=%s gw=%s:", p.id, p.owner, p.gw)
		all := slices.Collect(maps.Keys(p.leases))
		if p.gw.IsValid() {
			all = append(all, p.gw)
		}
		for _, a := range slices.SortedFunc(slices.Values(all), netip.Addr.Compare) {
			switch l := p.leases[a]; {
			case l == nil:
				fmt.Fprintf(&b, " [%s]", a)
			case !l.sure:
				fmt.Fprintf(&b, " %s?", a)
			case !l.orphan.IsZero():
				fmt.Fprintf(&b, " %s since %s", a, l.orphan.Format(time.TimeOnly))
			default:
				fmt.Fprintf(&b, " %s", a)
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

func (s *spec) overlaps(p netip.Prefix) bool {
	for q := range s.pools {
		if q.Overlaps(p) {
			return true
		}
	}
	return false
}

func (s *spec) find(id pool.ID) *specPool {
	if p := s.pools[id.Subnet]; p != nil && p.id == id {
		return p
	}
	return nil
}

func (s *spec) owned(n string) *specPool {
	for _, p := range s.pools {
		if p.owner == n {
			return p
		}
	}
	return nil
}

func (s *spec) add(id pool.ID) *specPool {
	p := &specPool{id: id, epoch: 1, leases: map[netip.Addr]*specLease{}, released: map[netip.Addr]time.Time{}}
	s.pools[id.Subnet] = p
	return p
}

func (p *specPool) usable(a netip.Addr, shared bool) bool {
	nodes, ok := pool.NodeRange(p.id.Subnet)
	return p.id.Subnet.Contains(a) && a != p.id.Subnet.Addr() && p.id.Subnet.Contains(a.Next()) && !(shared && ok && nodes.Contains(a))
}

func (p *specPool) taken(a netip.Addr) bool { return a == p.gw || p.leases[a] != nil }

// room returns the free addresses, in the sub-pool only or in all of the subnet.
func (p *specPool) room(shared, everywhere bool) []netip.Addr {
	var free []netip.Addr
	for a := p.id.Subnet.Addr(); p.id.Subnet.Contains(a); a = a.Next() {
		if p.usable(a, shared) && !p.taken(a) && (everywhere || !p.id.Sub.IsValid() || p.id.Sub.Contains(a)) {
			free = append(free, a)
		}
	}
	return free
}
