package nft

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// A range of ports is one element of a map of intervals. The kernel keeps those in
// a tree, and need not find in it what stays while it is changed: a lookup goes to
// the nearest element, be it of the rules that are, that were or that will be, and
// only then asks which it is (net/netfilter/nft_set_rbtree.c of Linux 5.4 to 6.2 at
// least). A connection to a port that stays would be refused in that moment. So each
// protocol has two maps, of which one is empty, and a change makes them change places:
//
//	tcp-ranges    8000-8999          8000-8999          -
//	tcp-ranges-2  -            ─1─▶  8000-8499    ─2─▶  8000-8499
//
// Packets are looked up in both. Single ports that go, go with step 2: in step 1
// they may have become part of a range.
//
// The maps have no protocol in their keys, because intervals of concatenations need
// Linux 5.6; nor an address, so that a range at one address (MeshPort.Bind) is as many
// elements as ports. So is a range that tasks have under other numbers: a rule cannot
// add to a port. (net/netfilter/nft_nat.c passes on the flag NF_NAT_RANGE_PROTO_OFFSET,
// but has no attribute for the base that the offset is counted from, as xt_DNAT has.)

// rangeProtos are the protocols that have maps of ranges.
func rangeProtos() []model.Proto { return []model.Proto{model.TCP, model.UDP, model.SCTP} }

// rangeSets are the two maps of a protocol, in the order of looking up.
func rangeSets(p model.Proto) [2]string {
	return [2]string{string(p) + "-ranges", string(p) + "-ranges-2"}
}

// allRangeSets are those of all protocols.
func allRangeSets() []string {
	var out []string
	for _, p := range rangeProtos() {
		s := rangeSets(p)
		out = append(out, s[:]...)
	}
	return out
}

// rangeKey is an interval as found.elems has it: its first and its last port.
func rangeKey(lo, hi uint16) string { return portData(lo) + portData(hi) }

// endMark follows the key of what ends an interval: the port behind its last one.
const endMark = "end"

// intervals makes intervals of elements as the kernel lists them. One ends at its
// end, at the beginning of the next, or with the ports.
func intervals(elems map[string]string) map[string]string {
	type bound struct {
		port  uint16
		end   bool
		alias string
	}
	var all []bound
	for key, data := range elems {
		if port, ok := keyPort(key, 0); ok {
			all = append(all, bound{port, key[2:] == endMark, data})
		}
	}
	slices.SortFunc(all, func(a, b bound) int {
		if a.port != b.port {
			return int(a.port) - int(b.port)
		}
		if a.end {
			return -1
		}
		return 1
	})
	out := make(map[string]string, len(all)/2+1)
	for i, b := range all {
		if b.end {
			continue
		}
		hi := uint16(65535)
		if i+1 < len(all) {
			hi = all[i+1].port - 1
		}
		out[rangeKey(b.port, hi)] = b.alias
	}
	return out
}

// bounds are the elements that make up intervals, in the order of ports: each
// beginning with its end behind it. The last port of all needs none, and has no room
// for one.
func bounds(s set, in map[string]string) []nftables.SetElement {
	var out []nftables.SetElement
	for _, key := range slices.Sorted(maps.Keys(in)) {
		out = append(out, element(s, key[:2], in[key]))
		if hi := binary.BigEndian.Uint16([]byte(key[2:])); hi < 65535 {
			out = append(out, nftables.SetElement{Key: []byte(portData(hi + 1)), IntervalEnd: true})
		}
	}
	return out
}

// swap is a change of one protocol's ranges.
type swap struct {
	fill    string            // the map that gets all ranges; empty: none
	with    map[string]string // the ranges
	stale   bool              // fill has something in it, which goes first
	discard []string          // the maps that are emptied afterwards
}

// swaps says how to get from what was found to what the change wants.
func (c change) swaps(f found) []swap {
	var out []swap
	for _, p := range rangeProtos() {
		ops, ok := c.ranges[p]
		if !ok {
			continue
		}
		names := rangeSets(p)
		first, second := f.elems[names[0]], f.elems[names[1]]
		want := map[string]string{}
		maps.Copy(want, second)
		maps.Copy(want, first) // looked up first
		for key, alias := range ops {
			if alias == nil {
				delete(want, key)
			} else {
				want[key] = *alias
			}
		}
		s := swap{with: want}
		switch {
		case len(want) == 0, maps.Equal(first, want), maps.Equal(second, want):
		case len(first) == 0:
			s.fill = names[0]
		default:
			// Both have something if a change was cut short. The first has what
			// packets met then.
			s.fill, s.stale = names[1], len(second) > 0
		}
		kept := s.fill
		if kept == "" && len(want) > 0 {
			kept = names[0]
			if !maps.Equal(first, want) {
				kept = names[1]
			}
		}
		for i, elems := range []map[string]string{first, second} {
			if names[i] != kept && len(elems) > 0 {
				s.discard = append(s.discard, names[i])
			}
		}
		if s.fill != "" || len(s.discard) > 0 {
			out = append(out, s)
		}
	}
	return out
}

// fill puts the ranges into the maps that packets do not depend on yet.
func (b *batch) fill(rs ruleset, all []swap) error {
	for _, s := range all {
		if s.fill == "" {
			continue
		}
		if s.stale {
			b.conn.FlushSet(b.sets[s.fill])
		}
		for _, decl := range rs.sets {
			if decl.name != s.fill {
				continue
			}
			if err := b.elements(b.conn.SetAddElements, decl, bounds(decl, s.with)); err != nil {
				return err
			}
		}
	}
	return nil
}

// discard empties the maps that packets do not depend on any more, and removes the
// single ports that go.
func discard(nsFD int, rs ruleset, all []swap, gone []nftables.SetElement) error {
	b, err := newBatch(nsFD, rs)
	if err != nil {
		return err
	}
	n := 0
	for _, s := range all {
		for _, name := range s.discard {
			b.conn.FlushSet(b.sets[name])
			n++
		}
	}
	for _, s := range rs.sets {
		if s.name == mapPublished {
			if err := b.elements(b.conn.SetDeleteElements, s, gone); err != nil {
				return err
			}
		}
	}
	if n+len(gone) == 0 {
		return nil
	}
	return b.flush()
}

// holdBack takes the deletions of single ports out of the change.
func (c *change) holdBack() []nftables.SetElement {
	var out []nftables.SetElement
	for key, e := range c.elems[mapPublished] {
		if e.want == nil {
			delete(c.elems[mapPublished], key)
			if e.have != nil {
				out = append(out, nftables.SetElement{Key: []byte(key)})
			}
		}
	}
	return out
}

// rangeOp adds an operation on a range.
func (c *change) rangeOp(k kernel.MeshRange, op kernel.Op) error {
	_, want, err := cast[kernel.MeshRangeSpec](op)
	if err != nil {
		return err
	}
	if err := wantPorts(k, k.Proto); err != nil {
		return err
	}
	if k.Lo > k.Hi {
		return fmt.Errorf("%s: it ends before it begins", k)
	}
	if c.ranges[k.Proto] == nil {
		c.ranges[k.Proto] = map[string]*string{}
	}
	key := rangeKey(k.Lo, k.Hi)
	c.ranges[k.Proto][key] = nil
	c.sure = false // which of the maps has them is not said
	if op.Want == nil {
		return nil
	}
	if err := want4(k, want.Alias); err != nil {
		return err
	}
	c.ranges[k.Proto][key] = new(string(octets(want.Alias)))
	return nil
}

// rangeStates adds the ranges of a table.
func rangeStates(f found, st kernel.State) {
	for _, p := range rangeProtos() {
		names := rangeSets(p)
		for _, name := range []string{names[1], names[0]} { // the first counts
			for key, data := range f.elems[name] {
				lo, ok1 := keyPort(key, 0)
				hi, ok2 := keyPort(key, 2)
				if alias, ok := keyIP(data, 0); ok && ok1 && ok2 {
					st[kernel.MeshRange{Proto: p, Lo: lo, Hi: hi}] = kernel.MeshRangeSpec{Alias: alias}
				}
			}
		}
	}
}

// isInterval reports whether a set of this shape has intervals.
func (s setShape) isInterval() bool {
	return s.flags&unix.NFT_SET_INTERVAL != 0 && s.flags&nftables.NFT_SET_CONCAT == 0 && s.keyLen == 2
}
