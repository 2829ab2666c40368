package gossip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
)

// The wire format. A packet or stream message of ours is
//
//	version(1) { length(uvarint) kind(1) body }...
//
// Integers are uvarints, strings and byte strings are length-prefixed. Lengths
// make unknown kinds skippable, so a new kind needs no new version; a changed
// body does. memberlist wraps the whole in its own framing and encryption.
const wireVersion = 1

const (
	kindDelta  = 1 // changes of one table
	kindGrave  = 2 // an owner left or was forgotten
	kindProbe  = 3 // hash of all versions the sender knows
	kindAgree  = 4 // answer to a probe with the same hash
	kindDigest = 5 // all versions the sender knows
)

// Limits of what is accepted, from the caller and from the network alike.
const (
	// MaxName bounds a node's name in bytes; swarm node ids have 25, host names
	// at most 64 (Linux HOST_NAME_MAX).
	MaxName = 128
	// MaxKey bounds a key in bytes: a kind and two or three 64-digit ids fit.
	MaxKey = 256
	// MaxValue bounds a value in bytes. Values are meant to fit a packet (see
	// maxPacket); a few KiB cost a stream to each peer; beyond, gossip is the
	// wrong tool.
	MaxValue = 32 << 10
	// MaxTable bounds the keys and values of one table in bytes. A whole table
	// with as much retained from the incarnation before travels as one stream
	// message, for which memberlist's limit is 20 MiB.
	MaxTable = 4 << 20
)

// delta carries the changes of one table in (from, to]: for every key that
// changed there, its last change. Records beyond to may be included; they are
// valid but promise nothing about their neighbours. If full is set, from is 0
// and keys that are not listed do not exist as of to.
type delta struct {
	owner string
	inc   Incarnation
	addr  netip.AddrPort
	from  uint64
	to    uint64
	floor uint64 // tombstones up to here are collected
	done  uint64 // seq of Complete, 0 before
	full  bool
	relay bool // receivers pass it on: the sender did not address everybody

	records  []change
	retained []kept
}

type change struct {
	seq     uint64
	key     string
	value   []byte
	deleted bool
}

// kept is an entry of an incarnation before the delta's own.
type kept struct {
	inc   Incarnation
	seq   uint64
	key   string
	value []byte
}

// grave says that the tables of owner up to inc are void. at is the originator's
// clock in Unix seconds, and only decides when the grave itself is forgotten.
type grave struct {
	owner  string
	inc    Incarnation
	at     int64
	forgot bool // by Forget, else by the owner's own Leave
}

type probe struct {
	from string
	addr netip.AddrPort
	hash uint64
}

type agree struct {
	from string
	hash uint64
}

type digest struct {
	from  string
	addr  netip.AddrPort
	reply bool // answer with a digest too, if the receiver lacks anything
	items []digestItem
}

type digestItem struct {
	owner string
	version
}

const (
	flagFull    = 1 << 0
	flagRelay   = 1 << 1
	flagDeleted = 1 << 0
	flagReply   = 1 << 0
	flagForgot  = 1 << 0
	flagGrave   = 1 << 0
)

// envelope joins encoded messages into one packet or stream message.
func envelope(msgs ...[]byte) []byte {
	size := 1
	for _, m := range msgs {
		size += binary.MaxVarintLen32 + len(m)
	}
	b := append(make([]byte, 0, size), wireVersion)
	for _, m := range msgs {
		b = appendBytes(b, m)
	}
	return b
}

func appendBytes[T string | []byte](b []byte, s T) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func appendInc(b []byte, i Incarnation) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, i.Start), uint64(i.Bump))
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	b = appendBytes(b, a.Addr().Unmap().AsSlice())
	return binary.BigEndian.AppendUint16(b, a.Port())
}

func flag(on bool, f byte) byte {
	if on {
		return f
	}
	return 0
}

func (d *delta) appendHeader(b []byte) []byte {
	b = append(b, kindDelta, flag(d.full, flagFull)|flag(d.relay, flagRelay))
	b = appendBytes(b, d.owner)
	b = appendInc(b, d.inc)
	b = appendAddr(b, d.addr)
	for _, n := range [...]uint64{d.from, d.to, d.floor, d.done} {
		b = binary.AppendUvarint(b, n)
	}
	return b
}

func (c *change) append(b []byte) []byte {
	b = append(b, flag(c.deleted, flagDeleted))
	b = binary.AppendUvarint(b, c.seq)
	b = appendBytes(b, c.key)
	if !c.deleted {
		b = appendBytes(b, c.value)
	}
	return b
}

func (d *delta) encode() []byte {
	size := 256
	for i := range d.records {
		size += 16 + len(d.records[i].key) + len(d.records[i].value)
	}
	for i := range d.retained {
		size += 32 + len(d.retained[i].key) + len(d.retained[i].value)
	}
	b := d.appendHeader(make([]byte, 0, size))
	b = binary.AppendUvarint(b, uint64(len(d.records)))
	for i := range d.records {
		b = d.records[i].append(b)
	}
	b = binary.AppendUvarint(b, uint64(len(d.retained)))
	for _, k := range d.retained {
		b = appendInc(b, k.inc)
		b = binary.AppendUvarint(b, k.seq)
		b = appendBytes(b, k.key)
		b = appendBytes(b, k.value)
	}
	return b
}

func (g *grave) encode() []byte {
	b := []byte{kindGrave, flag(g.forgot, flagForgot)}
	b = appendBytes(b, g.owner)
	b = appendInc(b, g.inc)
	return binary.AppendUvarint(b, uint64(max(g.at, 0)))
}

func (p *probe) encode() []byte {
	b := appendBytes([]byte{kindProbe}, p.from)
	b = appendAddr(b, p.addr)
	return binary.BigEndian.AppendUint64(b, p.hash)
}

func (a *agree) encode() []byte {
	b := appendBytes([]byte{kindAgree}, a.from)
	return binary.BigEndian.AppendUint64(b, a.hash)
}

func (d *digest) encode() []byte {
	b := []byte{kindDigest, flag(d.reply, flagReply)}
	b = appendBytes(b, d.from)
	b = appendAddr(b, d.addr)
	b = binary.AppendUvarint(b, uint64(len(d.items)))
	for i := range d.items {
		it := &d.items[i]
		b = append(b, flag(it.grave, flagGrave))
		b = appendBytes(b, it.owner)
		b = appendInc(b, it.inc)
		b = binary.AppendUvarint(b, it.seq)
	}
	return b
}

// Reasons to reject a message.
var (
	errVersion   = errors.New("unknown wire version")
	errTruncated = errors.New("truncated")
	errTooLong   = errors.New("field too long")
	errInvalid   = errors.New("invalid field")
)

// decode parses one envelope and calls handle with a *delta, *grave, *probe,
// *agree or *digest for each of its messages, in order, until one does not
// parse. Nothing that handle gets points into b. Unknown kinds are passed over.
func decode(b []byte, handle func(msg any)) error {
	if len(b) == 0 {
		return errTruncated
	}
	if b[0] != wireVersion {
		return fmt.Errorf("%w: %d, this node speaks %d", errVersion, b[0], wireVersion)
	}
	for r := (reader{b: b[1:]}); len(r.b) > 0; {
		body := reader{b: r.take(len(r.b))}
		if r.err != nil {
			return r.err
		}
		kind := body.byte()
		var msg any
		switch kind {
		case kindDelta:
			msg = body.delta()
		case kindGrave:
			msg = body.grave()
		case kindProbe:
			msg = &probe{from: body.name(), addr: body.peer(), hash: body.fixed64()}
		case kindAgree:
			msg = &agree{from: body.name(), hash: body.fixed64()}
		case kindDigest:
			msg = body.digest()
		default:
			if body.err == nil {
				continue
			}
		}
		if body.err == nil && len(body.b) > 0 {
			body.err = fmt.Errorf("%w: %d bytes too many", errInvalid, len(body.b))
		}
		if body.err != nil {
			return fmt.Errorf("message of kind %d: %w", kind, body.err)
		}
		handle(msg)
	}
	return nil
}

// reader consumes a message. After the first error it returns zero values.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.b = nil
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.fail(errTruncated)
		return 0
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail(errTruncated)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) fixed64() uint64 {
	if len(r.b) < 8 {
		r.fail(errTruncated)
		return 0
	}
	v := binary.BigEndian.Uint64(r.b)
	r.b = r.b[8:]
	return v
}

// take returns a length-prefixed part of the input itself, not a copy.
func (r *reader) take(limit int) []byte {
	n := r.uvarint()
	if r.err != nil {
		return nil
	}
	if n > uint64(limit) {
		r.fail(errTooLong)
		return nil
	}
	if n > uint64(len(r.b)) {
		r.fail(errTruncated)
		return nil
	}
	part := r.b[:n]
	r.b = r.b[n:]
	return part
}

func (r *reader) text(limit int) string {
	s := string(r.take(limit))
	if s == "" {
		r.fail(errInvalid)
	}
	return s
}

func (r *reader) name() string { return r.text(MaxName) }
func (r *reader) key() string  { return r.text(MaxKey) }

// value copies: memberlist may reuse the input, and a value must not keep the
// rest of a large message alive.
func (r *reader) value() []byte { return append([]byte{}, r.take(MaxValue)...) }

func (r *reader) inc() Incarnation {
	start, bump := r.uvarint(), r.uvarint()
	if bump > 1<<32-1 {
		r.fail(errInvalid)
	}
	return Incarnation{Start: start, Bump: uint32(bump)}
}

func (r *reader) addr() netip.AddrPort {
	raw := r.take(16)
	if len(r.b) < 2 {
		r.fail(errTruncated)
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16(r.b)
	r.b = r.b[2:]
	ip, ok := netip.AddrFromSlice(raw)
	if !ok && len(raw) > 0 {
		r.fail(errInvalid)
	}
	return netip.AddrPortFrom(ip.Unmap(), port)
}

// peer reads an address that can be answered to.
func (r *reader) peer() netip.AddrPort {
	a := r.addr()
	if !a.IsValid() || a.Port() == 0 {
		r.fail(errInvalid)
	}
	return a
}

// count reads the length of a list whose elements take at least size bytes: a
// list cannot be longer than the input. Callers still grow their slices as they
// go, from prealloc: an element in memory is larger than on the wire.
func (r *reader) count(size int) int {
	n := r.uvarint()
	if n > uint64(len(r.b)/size) {
		r.fail(errTruncated)
		return 0
	}
	return int(n)
}

// prealloc is the number of elements a list gets room for on its word alone: all
// nodes of a cluster, most changes.
const prealloc = 256

func (r *reader) delta() *delta {
	f := r.byte()
	d := &delta{full: f&flagFull != 0, relay: f&flagRelay != 0}
	d.owner, d.inc, d.addr = r.name(), r.inc(), r.addr()
	d.from, d.to, d.floor, d.done = r.uvarint(), r.uvarint(), r.uvarint(), r.uvarint()
	if d.from > d.to || d.full && d.from != 0 {
		r.fail(errInvalid)
	}
	if n := r.count(4); n > 0 { // flags, seq, a key of one byte
		d.records = make([]change, 0, min(n, prealloc))
		for range n {
			c := change{deleted: r.byte()&flagDeleted != 0, seq: r.uvarint(), key: r.key()}
			if !c.deleted {
				c.value = r.value()
			}
			if c.seq <= d.from {
				r.fail(errInvalid)
			}
			if r.err != nil {
				return nil
			}
			d.records = append(d.records, c)
		}
	}
	if n := r.count(6); n > 0 { // start, bump, seq, a key of one byte, an empty value
		d.retained = make([]kept, 0, min(n, prealloc))
		for range n {
			k := kept{inc: r.inc(), seq: r.uvarint(), key: r.key(), value: r.value()}
			if k.inc.Compare(d.inc) >= 0 {
				r.fail(errInvalid)
			}
			if r.err != nil {
				return nil
			}
			d.retained = append(d.retained, k)
		}
	}
	return d
}

func (r *reader) grave() *grave {
	g := &grave{forgot: r.byte()&flagForgot != 0, owner: r.name(), inc: r.inc()}
	at := r.uvarint()
	if at > 1<<40 { // beyond the year 36000
		r.fail(errInvalid)
	}
	g.at = int64(at)
	return g
}

func (r *reader) digest() *digest {
	d := &digest{reply: r.byte()&flagReply != 0, from: r.name(), addr: r.peer()}
	if n := r.count(6); n > 0 { // flags, a name of one byte, start, bump, seq
		d.items = make([]digestItem, 0, min(n, prealloc))
		for range n {
			var it digestItem
			it.grave = r.byte()&flagGrave != 0
			it.owner, it.inc, it.seq = r.name(), r.inc(), r.uvarint()
			if r.err != nil {
				return nil
			}
			d.items = append(d.items, it)
		}
	}
	return d
}
