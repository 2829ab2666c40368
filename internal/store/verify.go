package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// The on-disk format of bbolt, version 2, as go.etcd.io/bbolt/internal/common
// defines it. Little-endian on every machine that sluice is built for; a file
// from one of the other byte order fails at the magic number.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	pageHeader = 16 // id u64, flags u16, count u16, overflow u32
	elemSize   = 16 // of a branch element and of a leaf element
	bucketHead = 16 // root page u64, sequence u64
	metaSize   = 64 // of a meta page's content, of which the last 8 bytes are the checksum

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10
	leafBucket   = 0x01 // flag of a leaf element: its value is a bucket

	firstDataPage = 2 // pages 0 and 1 are the meta pages
)

// maxFile bounds the time and memory of a check: 256 MiB is a hundred thousand
// records of 2 KiB with room to spare, and is read in about a second.
const maxFile = 256 << 20

// maxDepth of the page tree. With the least fan-out that bbolt leaves, two, a
// file of maxFile has fewer than 17 levels.
const maxDepth = 32

// foundation is what verify found out about a sound file.
type foundation struct {
	// lostMeta says why one of the two meta pages is unusable; nil if both are
	// good. The other then tells a complete state, perhaps one change older.
	lostMeta error
}

// verify checks that bbolt can open, read and write a file of this size without
// leaving it or looping in it, and that it has the shape that this package
// writes: buckets at the top, plain values in them. It reads each page at most
// once.
func verify(r io.ReaderAt, size int64) (foundation, error) {
	if size == 0 {
		return foundation{}, errors.New("the file is empty")
	}
	if size > maxFile {
		return foundation{}, fmt.Errorf("the file has %d bytes, more than the %d that sluice ever writes", size, maxFile)
	}
	m, found, err := newestMeta(r, size)
	if err != nil {
		return foundation{}, err
	}
	if m.hwm <= firstDataPage || m.hwm > uint64(size)/uint64(m.pageSize) {
		return foundation{}, fmt.Errorf("the file has %d bytes, but its meta page speaks of %d pages of %d: it was cut short", size, m.hwm, m.pageSize)
	}
	v := &verifier{r: r, meta: m, use: make([]pageUse, m.hwm)}
	v.use[0], v.use[1] = inUse, inUse
	if err := v.freelist(); err != nil {
		return foundation{}, fmt.Errorf("free list: %w", err)
	}
	if err := v.tree(m.root, keyRange{}, v.topEntry, 0); err != nil {
		return foundation{}, err
	}
	for id, u := range v.use {
		if u == unknown {
			return foundation{}, fmt.Errorf("page %d is neither used nor free", id)
		}
	}
	return found, nil
}

type meta struct {
	pageSize            uint32
	root, freelist, hwm uint64
	txid                uint64
}

var errNoMeta = errors.New("no valid meta page: this is not a bbolt database, or its beginning is lost")

// errHeader: a meta page is good but for its header. bbolt does not look there and
// would use it, so it must not be passed over for the other one.
var errHeader = errors.New("good content behind a bad page header")

// newestMeta reads the meta pages the way bbolt does: the page size is told by
// the first, or else by the second, which is looked for at each possible place.
func newestMeta(r io.ReaderAt, size int64) (meta, foundation, error) {
	m0, err0 := readMeta(r, 0)
	if errors.Is(err0, errHeader) {
		return meta{}, foundation{}, err0
	}
	if err0 == nil {
		m1, err1 := readMeta(r, int64(m0.pageSize))
		if errors.Is(err1, errHeader) {
			return meta{}, foundation{}, err1
		}
		if err1 == nil && m1.pageSize != m0.pageSize {
			err1 = fmt.Errorf("meta page 1: page size %d, but meta page 0 says %d", m1.pageSize, m0.pageSize)
			return meta{}, foundation{}, err1
		}
		if err1 == nil && m1.txid > m0.txid {
			m0 = m1
		}
		return m0, foundation{lostMeta: err1}, nil
	}
	// 1 KiB to 16 MiB are the page sizes that bbolt tries.
	for at := int64(1 << 10); at <= 16<<20 && at < size-1<<10; at <<= 1 {
		m1, err := readMeta(r, at)
		if errors.Is(err, errHeader) { // also where its place is not the one that its page size tells
			return meta{}, foundation{}, err
		}
		if err == nil {
			return m1, foundation{lostMeta: err0}, nil
		}
	}
	return meta{}, foundation{}, errNoMeta
}

func readMeta(r io.ReaderAt, at int64) (meta, error) {
	var b [pageHeader + metaSize]byte
	if _, err := r.ReadAt(b[:], at); err != nil {
		return meta{}, fmt.Errorf("meta page at byte %d: %w", at, err)
	}
	c := b[pageHeader:]
	le := binary.LittleEndian
	h := fnv.New64a()
	_, _ = h.Write(c[:metaSize-8])
	switch {
	case le.Uint32(c) != boltMagic:
		return meta{}, fmt.Errorf("meta page at byte %d: wrong magic number", at)
	case le.Uint32(c[4:]) != boltVersion:
		return meta{}, fmt.Errorf("meta page at byte %d: bbolt format %d, want %d", at, le.Uint32(c[4:]), boltVersion)
	case le.Uint64(c[metaSize-8:]) != h.Sum64():
		return meta{}, fmt.Errorf("meta page at byte %d: checksum does not match", at)
	}
	m := meta{pageSize: le.Uint32(c[8:]), root: le.Uint64(c[16:]), freelist: le.Uint64(c[32:]), hwm: le.Uint64(c[40:]), txid: le.Uint64(c[48:])}
	if le.Uint16(b[8:]) != flagMeta || le.Uint64(b[:]) > 1 || le.Uint64(b[:]) != uint64(at)/uint64(max(m.pageSize, 1)) {
		return meta{}, fmt.Errorf("meta page at byte %d: %w", at, errHeader)
	}
	if m.pageSize < 1<<10 || m.pageSize > 16<<20 || m.pageSize&(m.pageSize-1) != 0 {
		return meta{}, fmt.Errorf("meta page at byte %d: page size %d", at, m.pageSize)
	}
	return m, nil
}

type pageUse uint8

const (
	unknown pageUse = iota
	inUse
	isFree
)

type verifier struct {
	r    io.ReaderAt
	meta meta
	use  []pageUse // by page id, up to the high-water mark
}

// page reads a page with its overflow pages and marks them used.
func (v *verifier) page(id uint64) ([]byte, error) {
	if id < firstDataPage || id >= v.meta.hwm {
		return nil, fmt.Errorf("page %d: outside of the file's %d pages", id, v.meta.hwm)
	}
	var head [pageHeader]byte
	at := int64(id) * int64(v.meta.pageSize)
	if _, err := v.r.ReadAt(head[:], at); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	if got := binary.LittleEndian.Uint64(head[:]); got != id {
		return nil, fmt.Errorf("page %d: says it is page %d", id, got)
	}
	n := 1 + uint64(binary.LittleEndian.Uint32(head[12:]))
	if n > v.meta.hwm-id {
		return nil, fmt.Errorf("page %d: spans %d pages, beyond the end", id, n)
	}
	for i := id; i < id+n; i++ {
		if v.use[i] != unknown {
			return nil, fmt.Errorf("page %d: used twice, or used and free", i)
		}
		v.use[i] = inUse
	}
	b := make([]byte, n*uint64(v.meta.pageSize))
	if _, err := v.r.ReadAt(b, at); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	return b, nil
}

func (v *verifier) freelist() error {
	b, err := v.page(v.meta.freelist)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	if le.Uint16(b[8:]) != flagFreelist {
		return fmt.Errorf("page %d: flags %#x", v.meta.freelist, le.Uint16(b[8:]))
	}
	ids, n := b[pageHeader:], uint64(le.Uint16(b[10:]))
	if n == 0xFFFF { // the real number does not fit and comes first
		n, ids = le.Uint64(ids), ids[8:]
	}
	if n > uint64(len(ids)/8) {
		return fmt.Errorf("page %d: %d entries do not fit", v.meta.freelist, n)
	}
	last := uint64(firstDataPage - 1)
	for i := range n {
		id := le.Uint64(ids[8*i:])
		if id <= last || id >= v.meta.hwm || v.use[id] != unknown {
			return fmt.Errorf("page %d: entry %d names page %d", v.meta.freelist, i, id)
		}
		v.use[id], last = isFree, id
	}
	return nil
}

// keyRange is what a parent says of a page's keys: the first of them, and what
// all are below; nil says nothing. bbolt keeps a parent's key equal to its
// child's first, and writes a second entry for the child where it is not.
type keyRange struct{ first, below []byte }

// tree checks the pages below and including id, whose keys must be in keys, and
// hands each entry to entry.
func (v *verifier) tree(id uint64, keys keyRange, entry func(flags uint32, value []byte) error, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("page %d: more than %d levels deep", id, maxDepth)
	}
	b, err := v.page(id)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	flags := le.Uint16(b[8:])
	switch flags {
	case flagLeaf:
		if err := leaf(b, keys, entry); err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		return nil
	case flagBranch:
	default:
		return fmt.Errorf("page %d: flags %#x in a tree", id, flags)
	}
	elems, err := elements(b, keys, false)
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	if len(elems) == 0 {
		return fmt.Errorf("page %d: a branch without a child", id)
	}
	for i, e := range elems {
		child := keyRange{first: e.key, below: keys.below}
		if i+1 < len(elems) {
			child.below = elems[i+1].key
		}
		if err := v.tree(e.child, child, entry, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func leaf(b []byte, keys keyRange, entry func(flags uint32, value []byte) error) error {
	elems, err := elements(b, keys, true)
	if err != nil {
		return err
	}
	for i, e := range elems {
		if err := entry(e.flags, e.value); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return nil
}

type element struct {
	key, value []byte
	flags      uint32 // of a leaf's
	child      uint64 // of a branch's
}

// elements reads the entries of a page, b, and checks that they lie within it
// and that their keys ascend and are as keys says.
func elements(b []byte, keys keyRange, isLeaf bool) ([]element, error) {
	le := binary.LittleEndian
	n := int(le.Uint16(b[10:]))
	if pageHeader+n*elemSize > len(b) {
		return nil, fmt.Errorf("%d entries do not fit", n)
	}
	out := make([]element, 0, n)
	var last []byte
	for i := range n {
		at := pageHeader + i*elemSize
		h := b[at : at+elemSize]
		var e element
		var pos, ksize, vsize uint64
		if isLeaf {
			e.flags = le.Uint32(h)
			pos, ksize, vsize = uint64(le.Uint32(h[4:])), uint64(le.Uint32(h[8:])), uint64(le.Uint32(h[12:]))
		} else {
			pos, ksize, e.child = uint64(le.Uint32(h)), uint64(le.Uint32(h[4:])), le.Uint64(h[8:])
		}
		from := uint64(at) + pos
		if from < uint64(pageHeader+n*elemSize) || from+ksize+vsize > uint64(len(b)) {
			return nil, fmt.Errorf("entry %d: lies outside of its page", i)
		}
		e.key, e.value = b[from:from+ksize], b[from+ksize:from+ksize+vsize]
		if ksize == 0 || i > 0 && bytes.Compare(last, e.key) >= 0 {
			return nil, fmt.Errorf("entry %d: keys do not ascend", i)
		}
		if keys.below != nil && bytes.Compare(e.key, keys.below) >= 0 {
			return nil, fmt.Errorf("entry %d: its key belongs to another page", i)
		}
		last = e.key
		out = append(out, e)
	}
	if keys.first != nil && (n == 0 || !bytes.Equal(out[0].key, keys.first)) {
		return nil, errors.New("its first key is not the one its parent tells")
	}
	return out, nil
}

var errShape = errors.New("not in the shape of a sluice state file")

// topEntry checks an entry of the root bucket: a bucket of plain entries, in a
// page tree of its own or, while it is small, inline in the value.
func (v *verifier) topEntry(flags uint32, value []byte) error {
	if flags != leafBucket || len(value) < bucketHead {
		return errShape
	}
	if root := binary.LittleEndian.Uint64(value); root != 0 {
		return v.tree(root, keyRange{}, plainEntry, 1)
	}
	page := value[bucketHead:]
	le := binary.LittleEndian
	if len(page) < pageHeader || le.Uint64(page) != 0 || le.Uint16(page[8:]) != flagLeaf || le.Uint32(page[12:]) != 0 {
		return fmt.Errorf("inline bucket: %w", errShape)
	}
	return leaf(page, keyRange{}, plainEntry)
}

func plainEntry(flags uint32, _ []byte) error {
	if flags != 0 {
		return errShape
	}
	return nil
}
