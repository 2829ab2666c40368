package gossip

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// table is one owner's records, on the owner itself or as a copy. It decides
// nothing about clocks or networks and is not safe for concurrent use.
//
// The invariant that convergence rests on: every key whose last change has a seq
// up to t.seq is held with that change or a later one (or is absent, if that
// change was a deletion with a seq up to t.floor).
type table struct {
	owner string
	inc   Incarnation
	addr  netip.AddrPort
	seq   uint64
	floor uint64
	done  uint64 // seq of Complete; 0 before

	records  map[string]record
	retained map[string]kept // of former incarnations; nil once complete
	ahead    []span          // known beyond a gap above seq, sorted by from

	ownerFloor uint64            // highest floor heard of; collected once seq reaches it
	view       map[string][]byte // cache of entries(); nil after a change
}

type record struct {
	seq     uint64
	value   []byte
	deleted bool
}

// span is the range (from, to] of seqs.
type span struct{ from, to uint64 }

// maxAhead bounds the spans remembered beyond a gap. Packets of one burst arrive
// in any order (memberlist works through its queue from the back), a burst has
// maxBurst packets; what does not fit is asked for by anti-entropy.
const maxAhead = 64

func newTable(owner string, inc Incarnation) *table {
	return &table{owner: owner, inc: inc, records: make(map[string]record)}
}

// succeed returns the empty table of a later incarnation, which keeps what is
// visible of t until it is complete.
func (t *table) succeed(inc Incarnation) *table {
	n := newTable(t.owner, inc)
	n.addr = t.addr
	n.retained = maps.Clone(t.retained)
	if n.retained == nil {
		n.retained = make(map[string]kept, len(t.records))
	}
	for k, r := range t.records {
		if r.deleted {
			delete(n.retained, k)
		} else {
			n.retained[k] = kept{inc: t.inc, seq: r.seq, key: k, value: r.value}
		}
	}
	return n
}

func (t *table) version() version { return version{inc: t.inc, seq: t.seq} }

// last is the highest seq that is reflected, beyond a gap or not.
func (t *table) last() uint64 {
	last := t.seq
	for _, a := range t.ahead {
		last = max(last, a.to)
	}
	return last
}

func (t *table) complete() bool { return t.done != 0 && t.seq >= t.done }

// entries returns what a reader sees. The map and its values are shared between
// callers and never change.
func (t *table) entries() map[string][]byte {
	if t.view == nil {
		t.view = make(map[string][]byte, len(t.records)+len(t.retained))
		for k, old := range t.retained {
			t.view[k] = old.value
		}
		for k, r := range t.records {
			if r.deleted {
				delete(t.view, k)
			} else {
				t.view[k] = r.value
			}
		}
	}
	return t.view
}

// since returns what a copy of version v lacks.
func (t *table) since(v version) delta {
	d := delta{owner: t.owner, inc: t.inc, addr: t.addr, to: t.seq, floor: t.floor, done: t.done}
	if v.inc == t.inc && !v.grave && v.seq >= t.floor {
		d.from = v.seq
	} else {
		d.full = true
		for _, k := range slices.Sorted(maps.Keys(t.retained)) {
			d.retained = append(d.retained, t.retained[k])
		}
	}
	for k, r := range t.records {
		if r.seq > d.from {
			d.records = append(d.records, change{seq: r.seq, key: k, value: r.value, deleted: r.deleted})
		}
	}
	slices.SortFunc(d.records, func(a, b change) int { return cmp.Compare(a.seq, b.seq) })
	return d
}

// apply merges a delta of the same incarnation and reports whether anything
// changed: a record, the version, or what a reader sees.
func (t *table) apply(d *delta) (changed bool) {
	// What is at or below seq is reflected already; a record missing there was
	// deleted and collected, and must not come back with a late packet.
	known := t.seq
	for _, c := range d.records {
		if c.seq <= known || t.records[c.key].seq >= c.seq {
			continue
		}
		t.records[c.key] = record{seq: c.seq, value: c.value, deleted: c.deleted}
		changed = true
	}
	if d.full && d.to > known {
		listed := make(map[string]struct{}, len(d.records))
		for _, c := range d.records {
			listed[c.key] = struct{}{}
		}
		maps.DeleteFunc(t.records, func(k string, r record) bool {
			_, ok := listed[k]
			return !ok && r.seq <= d.to
		})
	}
	changed = t.cover(span{d.from, d.to}) || changed
	if d.addr.IsValid() && d.addr != t.addr {
		t.addr, changed = d.addr, true
	}
	if d.done > t.done {
		t.done, changed = d.done, true
	}
	if !t.complete() {
		changed = t.keep(d.retained) || changed
	} else if t.retained != nil {
		t.retained, changed = nil, true
	}
	t.ownerFloor = max(t.ownerFloor, d.floor)
	if t.seq >= t.ownerFloor {
		t.collect(t.ownerFloor)
	}
	if changed {
		t.view = nil
	}
	return changed
}

// cover notes that everything in s is reflected, and reports whether that is new.
func (t *table) cover(s span) bool {
	if s.to <= t.seq {
		return false
	}
	if s.from > t.seq {
		within := func(a span) bool { return a.from <= s.from && a.to >= s.to }
		if s.from == s.to || len(t.ahead) >= maxAhead || slices.ContainsFunc(t.ahead, within) {
			return false
		}
		i, _ := slices.BinarySearchFunc(t.ahead, s, func(a, b span) int { return cmp.Compare(a.from, b.from) })
		t.ahead = slices.Insert(t.ahead, i, s)
		return true
	}
	t.seq = s.to
	for len(t.ahead) > 0 && t.ahead[0].from <= t.seq {
		t.seq = max(t.seq, t.ahead[0].to)
		t.ahead = t.ahead[1:]
	}
	return true
}

// keep merges entries of former incarnations, the latest per key.
func (t *table) keep(old []kept) (changed bool) {
	for _, k := range old {
		have, ok := t.retained[k.key]
		if ok && cmp.Or(have.inc.Compare(k.inc), cmp.Compare(have.seq, k.seq)) >= 0 {
			continue
		}
		if t.retained == nil {
			t.retained = make(map[string]kept)
		}
		t.retained[k.key] = k
		changed = true
	}
	return changed
}

// collect drops tombstones up to floor.
func (t *table) collect(floor uint64) {
	if floor <= t.floor {
		return
	}
	t.floor = floor
	maps.DeleteFunc(t.records, func(_ string, r record) bool { return r.deleted && r.seq <= floor })
}

// ownTable is the table this node writes.
type ownTable struct {
	*table
	size    int // bytes of keys and values of live records
	pending []change
	from    uint64 // pending begins after this seq
	graves  []tombstone
	life    uint64 // Start of its first incarnation, which names the process
}

// tombstone is a deletion waiting for its collection, in order of seq and time.
type tombstone struct {
	seq uint64
	at  time.Time
}

func newOwnTable(owner string, inc Incarnation, addr netip.AddrPort) *ownTable {
	t := newTable(owner, inc)
	t.addr = addr
	return &ownTable{table: t, life: inc.Start}
}

func (o *ownTable) write(c change) {
	o.seq++
	c.seq = o.seq
	old := o.records[c.key]
	o.size -= o.cost(c.key, old)
	o.records[c.key] = record{seq: c.seq, value: c.value, deleted: c.deleted}
	o.size += o.cost(c.key, o.records[c.key])
	o.pending = append(o.pending, c)
	o.view = nil
}

func (o *ownTable) cost(key string, r record) int {
	if r.seq == 0 || r.deleted {
		return 0
	}
	return len(key) + len(r.value)
}

// put reports whether the value is new; it does not copy it.
func (o *ownTable) put(key string, value []byte) (changed bool, err error) {
	r := o.records[key]
	if r.seq != 0 && !r.deleted && string(r.value) == string(value) {
		return false, nil
	}
	if o.size-o.cost(key, r)+len(key)+len(value) > MaxTable {
		return false, ErrTableFull
	}
	o.write(change{key: key, value: value})
	return true, nil
}

// remove reports whether there was something to delete. Before Complete a key
// that this incarnation never wrote is deleted too: peers may retain it.
func (o *ownTable) remove(key string, now time.Time) bool {
	r := o.records[key]
	if r.deleted || r.seq == 0 && o.done != 0 {
		return false
	}
	o.write(change{key: key, deleted: true})
	o.graves = append(o.graves, tombstone{o.seq, now})
	return true
}

func (o *ownTable) finish() bool {
	if o.done != 0 {
		return false
	}
	o.seq++
	o.done = o.seq
	return true
}

// expire collects the tombstones made before t, if they have been published: the
// changes that follow a collected one must not claim to include it.
func (o *ownTable) expire(t time.Time) {
	var floor uint64
	for len(o.graves) > 0 && o.graves[0].at.Before(t) && o.graves[0].seq <= o.from {
		floor = o.graves[0].seq
		o.graves = o.graves[1:]
	}
	o.collect(floor)
}

// unpublished returns the changes since its last call, of each key the last, and
// whether there are any.
func (o *ownTable) unpublished() (delta, bool) {
	d := delta{owner: o.owner, inc: o.inc, addr: o.addr, from: o.from, to: o.seq, floor: o.floor, done: o.done}
	for _, c := range o.pending {
		if o.records[c.key].seq == c.seq {
			d.records = append(d.records, c)
		}
	}
	o.pending, o.from = nil, o.seq
	return d, d.to > d.from
}

// outbid moves the whole table into an incarnation above claimed and publishes
// it again. Tombstones stay behind, but before Complete: peers may retain the
// keys they delete.
func (o *ownTable) outbid(claimed Incarnation) {
	keys := make([]string, 0, len(o.records))
	for k, r := range o.records {
		if !r.deleted || o.done == 0 {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b string) int { return cmp.Compare(o.records[a].seq, o.records[b].seq) })
	n := newOwnTable(o.owner, claimed.next(o.life), o.addr)
	n.life = o.life
	for _, k := range keys {
		r := o.records[k]
		n.write(change{key: k, value: r.value, deleted: r.deleted})
		if r.deleted && len(o.graves) > 0 {
			n.graves = append(n.graves, tombstone{n.seq, o.graves[len(o.graves)-1].at})
		}
	}
	if o.done != 0 {
		n.finish()
	}
	*o = *n
}
