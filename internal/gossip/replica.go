package gossip

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// maxOwners bounds the tables and graves a node holds: ten times the intended
// size of a cluster, so that only a mistake reaches it.
const maxOwners = 1000

// replica is everything one node knows: its own table, copies of the others'
// and graves. Like table it is pure state: the clock comes in as a value.
type replica struct {
	own    *ownTable
	left   bool // this node has left; its own grave is then no claim to outbid
	tables map[string]*table
	graves map[string]grave
}

func newReplica(name string, inc Incarnation, addr netip.AddrPort) *replica {
	r := &replica{tables: make(map[string]*table), graves: make(map[string]grave)}
	r.own = newOwnTable(name, inc, addr)
	r.tables[name] = r.own.table
	return r
}

// outcome is what became of a received change.
type outcome int

const (
	outcomeStale    outcome = iota // nothing new
	outcomeApplied                 // something new
	outcomeRefuted                 // a claim about this node, outbid
	outcomeRejected                // beyond maxOwners
)

func (r *replica) version(owner string) version {
	if g, ok := r.graves[owner]; ok {
		return version{inc: g.inc, grave: true}
	}
	if t, ok := r.tables[owner]; ok {
		return t.version()
	}
	return version{}
}

func (r *replica) applyDelta(d *delta) outcome {
	if d.owner == r.own.owner {
		claimed := version{inc: d.inc, seq: d.to}
		for _, c := range d.records {
			claimed.seq = max(claimed.seq, c.seq)
		}
		return r.claim(claimed)
	}
	if g, ok := r.graves[d.owner]; ok && d.inc.Compare(g.inc) <= 0 {
		return outcomeStale
	}
	t := r.tables[d.owner]
	switch {
	case t == nil:
		if len(r.tables)+len(r.graves) >= maxOwners {
			return outcomeRejected
		}
		t = newTable(d.owner, d.inc)
		t.apply(d)
	case d.inc.Compare(t.inc) < 0:
		return outcomeStale
	case d.inc.Compare(t.inc) > 0:
		t = t.succeed(d.inc)
		t.apply(d)
	default:
		if !t.apply(d) {
			return outcomeStale
		}
	}
	delete(r.graves, d.owner)
	r.tables[d.owner] = t
	return outcomeApplied
}

func (r *replica) applyGrave(g *grave, now time.Time) outcome {
	if g.owner == r.own.owner {
		return r.claim(version{inc: g.inc, grave: true})
	}
	if now.Sub(time.Unix(g.at, 0)) > GraveTTL {
		return outcomeStale
	}
	if (version{inc: g.inc, grave: true}).compare(r.version(g.owner)) <= 0 {
		return outcomeStale
	}
	if _, ok := r.tables[g.owner]; !ok && len(r.tables)+len(r.graves) >= maxOwners {
		return outcomeRejected
	}
	r.bury(*g, now)
	return outcomeApplied
}

// bury replaces an owner's table by a grave. A clock ahead of ours must not make
// the grave stay longer.
func (r *replica) bury(g grave, now time.Time) {
	g.at = min(g.at, now.Unix())
	delete(r.tables, g.owner)
	r.graves[g.owner] = g
}

// claim answers what somebody says about this node itself. Only this node
// writes its table: a version above its own is a remnant of a life it does not
// remember, and a grave is a mistake as long as it lives.
func (r *replica) claim(v version) outcome {
	if r.left || v.compare(r.own.version()) <= 0 {
		return outcomeStale
	}
	r.own.outbid(v.inc)
	r.tables[r.own.owner] = r.own.table
	return outcomeRefuted
}

// forget buries an owner and reports whether there was a table to bury.
func (r *replica) forget(owner string, now time.Time) (grave, bool) {
	t, ok := r.tables[owner]
	if !ok || owner == r.own.owner {
		return grave{}, false
	}
	g := grave{owner: owner, inc: t.inc, at: now.Unix(), forgot: true}
	r.bury(g, now)
	return g, true
}

// leave buries this node's own table.
func (r *replica) leave(now time.Time) grave {
	g := grave{owner: r.own.owner, inc: r.own.inc, at: now.Unix()}
	r.left = true
	r.bury(g, now)
	return g
}

// expire drops graves older than GraveTTL and the own tombstones older than
// TombstoneTTL.
func (r *replica) expire(now time.Time) {
	maps.DeleteFunc(r.graves, func(owner string, g grave) bool {
		return owner != r.own.owner && now.Sub(time.Unix(g.at, 0)) > GraveTTL
	})
	r.own.expire(now.Add(-TombstoneTTL))
}

// digest lists the version of every owner, by name.
func (r *replica) digest() []digestItem {
	items := make([]digestItem, 0, len(r.tables)+len(r.graves))
	for owner := range r.tables {
		items = append(items, digestItem{owner, r.version(owner)})
	}
	for owner := range r.graves {
		items = append(items, digestItem{owner, r.version(owner)})
	}
	slices.SortFunc(items, func(a, b digestItem) int { return cmp.Compare(a.owner, b.owner) })
	return items
}

// hash stands for the digest in a probe. 64 bits: two of a few thousand digests
// a day collide by chance once in many millions of years, and the next change
// ends it.
func (r *replica) hash() uint64 {
	h := fnv.New64a()
	var b []byte
	for _, it := range r.digest() {
		b = appendBytes(b[:0], it.owner)
		b = append(b, flag(it.grave, flagGrave))
		b = binary.BigEndian.AppendUint64(b, it.inc.Start)
		b = binary.BigEndian.AppendUint32(b, it.inc.Bump)
		b = binary.BigEndian.AppendUint64(b, it.seq)
		h.Write(b) // never fails, by hash.Hash's contract
	}
	return h.Sum64()
}

// compare holds a peer's digest against what is known here. It returns messages
// with what the peer lacks, whether the peer has something this node lacks, and
// whether the peer had a version of this node that had to be outbid.
func (r *replica) compare(items []digestItem) (answer [][]byte, lacking, refuted bool) {
	theirs := make(map[string]version, len(items))
	for _, it := range items {
		theirs[it.owner] = it.version
	}
	if v, ok := theirs[r.own.owner]; ok {
		refuted = r.claim(v) == outcomeRefuted
	}
	for _, mine := range r.digest() {
		peer := theirs[mine.owner]
		delete(theirs, mine.owner)
		switch c := mine.compare(peer); {
		case c < 0:
			lacking = true
		case c > 0 && mine.grave:
			g := r.graves[mine.owner]
			answer = append(answer, g.encode())
		case c > 0:
			answer = append(answer, encodeDelta(r.tables[mine.owner].since(peer))...)
		}
	}
	return answer, lacking || len(theirs) > 0, refuted
}
