package nft

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// change is what one transaction shall make of a table: the net effect of a row
// of operations.
type change struct {
	remove bool     // delete the table first
	create *ruleset // make the fixed part anew

	elems map[string]map[string]elem // by set and key
	picks map[string][]rule          // chains of single VIPs: their rules, or nil to delete it

	// counted are the chains among picks that have a number which outlives the change.
	counted map[string]bool

	// ranges are the ranges of ports to be (the alias) or not to be (nil), by rangeKey.
	ranges map[model.Proto]map[string]*string

	// alone lists, by set, beginnings of keys of which there is to be one only.
	alone map[string][]string

	// sure is false if an operation does not say what is there. Then it must be
	// read first.
	sure bool
}

// elem is what is expected of an element, and what it shall be. Absent is nil;
// an element of a set has empty data.
type elem struct{ have, want *string }

func newChange() change {
	return change{
		elems: map[string]map[string]elem{}, picks: map[string][]rule{}, counted: map[string]bool{},
		alone: map[string][]string{}, ranges: map[model.Proto]map[string]*string{}, sure: true,
	}
}

// put says that an element shall have this data, and what it has so far.
// Of several words about one element, the first have and the last want count.
func (c *change) put(set, key string, have, want *string) {
	m := c.elems[set]
	if m == nil {
		m = map[string]elem{}
		c.elems[set] = m
	}
	if e, ok := m[key]; ok {
		have = e.have
	}
	m[key] = elem{have, want}
}

// onlyDeletes reports whether nothing is to be there afterwards, which needs no table.
func (c *change) onlyDeletes() bool {
	for _, m := range c.elems {
		for _, e := range m {
			if e.want != nil {
				return false
			}
		}
	}
	for _, r := range c.picks {
		if r != nil {
			return false
		}
	}
	for _, m := range c.ranges {
		for _, alias := range m {
			if alias != nil {
				return false
			}
		}
	}
	return c.create == nil
}

// observe replaces what the operations believed by what was found.
func (c *change) observe(f found) {
	for set, m := range c.elems {
		for key, e := range m {
			e.have = nil
			if d, ok := f.elems[set][key]; ok {
				e.have = &d
			}
			m[key] = e
		}
	}
	for set, prefixes := range c.alone {
		for key, data := range f.elems[set] {
			one := func(prefix string) bool { return strings.HasPrefix(key, prefix) }
			if _, named := c.elems[set][key]; !named && slices.ContainsFunc(prefixes, one) {
				c.put(set, key, &data, nil)
			}
		}
	}
	for name, r := range c.picks {
		if _, ok := f.chains[name]; r == nil && !ok {
			delete(c.picks, name)
		}
	}
}

// commit makes the change, in one transaction, or in two if ranges of ports change
// (swap). First it believes the operations
// about what is there, which costs one exchange with the kernel. The kernel
// refuses a transaction as a whole if that is wrong; then it looks for itself.
func commit(nsFD int, rs ruleset, configured []string, c change) error {
	missing := fmt.Errorf("nftables table %s: %w; make it first", rs.table, kernel.ErrNotExist)
	if c.remove && c.create == nil {
		if !c.onlyDeletes() {
			return missing
		}
		return removeTable(nsFD, rs)
	}
	if err := c.carry(nsFD, rs); err != nil {
		return err
	}
	if c.sure && c.create == nil {
		err := send(nsFD, rs, c, nil, nil)
		if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	f, err := read(nsFD, rs.family, rs.table, configured)
	if err != nil {
		return err
	}
	if !f.exists && c.create == nil {
		if c.onlyDeletes() {
			return nil
		}
		return missing
	}
	if f.exists && (c.remove || c.create != nil && !rs.setsFit(f)) {
		c.remove = true
		f = found{}
	}
	c.observe(f)
	swaps := c.swaps(f)
	if len(swaps) == 0 {
		return send(nsFD, rs, c, &f, nil)
	}
	gone := c.holdBack()
	if err := send(nsFD, rs, c, &f, swaps); err != nil {
		return err
	}
	return discard(nsFD, rs, swaps, gone)
}

// removeTable deletes the table with all that is in it.
func removeTable(nsFD int, rs ruleset) error {
	b, err := newBatch(nsFD, rs)
	if err != nil {
		return err
	}
	b.dropTable()
	return b.flush()
}

// dropTable deletes the table, whether there is one or not.
func (b *batch) dropTable() {
	b.conn.AddTable(b.table)
	b.conn.DelTable(b.table)
}

// batch collects the messages of one transaction.
type batch struct {
	conn  *nftables.Conn
	table *nftables.Table
	sets  map[string]*nftables.Set
}

func newBatch(nsFD int, rs ruleset) (*batch, error) {
	if nsFD <= 0 {
		return nil, fmt.Errorf("nftables: %d is no file descriptor of a network namespace", nsFD)
	}
	conn, err := nftables.New(nftables.WithNetNSFd(nsFD), nftables.WithSockOptions(sockOptions))
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	b := &batch{conn: conn, table: rs.kernelTable(), sets: map[string]*nftables.Set{}}
	for i, s := range rs.sets {
		ks, err := s.kernelSet(b.table, uint32(i+1))
		if err != nil {
			return nil, err
		}
		b.sets[s.name] = ks
	}
	return b, nil
}

// flush sends the transaction and waits until it is done.
func (b *batch) flush() error {
	if err := b.conn.Flush(); err != nil {
		return fmt.Errorf("nftables table %s: %w", b.table.Name, distinct(err))
	}
	return nil
}

// distinct says each of many errors once. The kernel goes on with a transaction
// that has failed, and thousands of its messages may fail for the same reason.
func distinct(err error) error {
	var out []error
	seen := map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		var many interface{ Unwrap() []error }
		if errors.As(err, &many) {
			for _, e := range many.Unwrap() {
				walk(e)
			}
			return
		}
		if text := err.Error(); !seen[text] {
			seen[text] = true
			out = append(out, err)
		}
	}
	walk(err)
	return errors.Join(out...)
}

// send makes the transaction. What was found is nil if nothing was looked for.
//
// The order: what is referred to before what refers to it, deletions of elements
// before additions, because the data of an element cannot be changed, and the
// deletion of chains last, when no element points there any more.
func send(nsFD int, rs ruleset, c change, f *found, ranges []swap) error {
	b, err := newBatch(nsFD, rs)
	if err != nil {
		return err
	}
	if c.remove {
		b.dropTable()
	}
	if c.create != nil {
		if err := b.build(*c.create, f); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.picks)) {
		if c.picks[name] == nil {
			continue
		}
		b.addChain(chain{name: name})
		b.flushChain(name)
		for _, r := range c.picks[name] {
			if err := b.addRule(rs, r); err != nil {
				return err
			}
		}
	}
	for _, s := range rs.sets {
		var gone, fresh []nftables.SetElement
		for key, e := range c.elems[s.name] {
			if e.have != nil && e.want != nil && *e.have == *e.want {
				continue
			}
			if e.have != nil {
				gone = append(gone, nftables.SetElement{Key: []byte(key)})
			}
			if e.want != nil {
				fresh = append(fresh, element(s, key, *e.want))
			}
		}
		if err := b.elements(b.conn.SetDeleteElements, s, gone); err != nil {
			return err
		}
		if err := b.elements(b.conn.SetAddElements, s, fresh); err != nil {
			return err
		}
	}
	if err := b.fill(rs, ranges); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(c.picks)) {
		if c.picks[name] == nil {
			b.flushChain(name)
			b.delChain(name)
		}
	}
	return b.flush()
}

// element is the library's form of an element.
func element(s set, key, data string) nftables.SetElement {
	e := nftables.SetElement{Key: []byte(key)}
	switch {
	case s.isVerdictMap():
		e.VerdictData = &expr.Verdict{Kind: expr.VerdictJump, Chain: strings.TrimPrefix(data, jumpTo(""))}
	case s.isMap():
		e.Val = []byte(data)
	}
	return e
}

// elements adds or deletes elements, so many in one message that their
// attribute, whose length has 16 bits, is not full: none is longer than 100 octets.
func (b *batch) elements(do func(*nftables.Set, []nftables.SetElement) error, s set, list []nftables.SetElement) error {
	for part := range slices.Chunk(list, 600) {
		if err := do(b.sets[s.name], part); err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	return nil
}

// build makes the fixed part. A table that is there already keeps its sets with
// all that is in them, connections too; chains get their rules anew, and what is
// not ours goes.
func (b *batch) build(rs ruleset, f *found) error {
	b.conn.AddTable(b.table) // wakes a dormant one
	for _, s := range rs.sets {
		if err := b.conn.AddSet(b.sets[s.name], nil); err != nil {
			return fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	want := make(map[string]chain, len(rs.chains))
	for _, ch := range rs.chains {
		want[ch.name] = ch
	}
	// Rules first, as they refer to chains. Then chains of the wrong kind, which
	// cannot be changed, and foreign ones, but not those of single objects.
	have := slices.Sorted(maps.Keys(f.chains))
	foreign := func(name string) bool {
		_, ours := want[name]
		return !ours && !rs.isSingle(name)
	}
	for _, name := range have {
		if _, ok := want[name]; ok || foreign(name) {
			b.flushChain(name)
		}
	}
	for _, name := range have {
		if ch, ok := want[name]; ok && ch != f.chains[name] || foreign(name) {
			b.delChain(name)
		}
	}
	for _, ch := range rs.chains {
		b.addChain(ch)
	}
	for _, r := range rs.rules {
		if err := b.addRule(rs, r); err != nil {
			return err
		}
	}
	return nil
}

func (b *batch) addChain(c chain) {
	kc := &nftables.Chain{Name: c.name, Table: b.table}
	if c.typ != "" {
		hook, prio := nftables.ChainHook(c.hook), nftables.ChainPriority(c.priority)
		kc.Type, kc.Hooknum, kc.Priority = c.typ, &hook, &prio
	}
	b.conn.AddChain(kc)
}

func (b *batch) flushChain(name string) {
	b.conn.FlushChain(&nftables.Chain{Name: name, Table: b.table})
}

func (b *batch) delChain(name string) {
	b.conn.DelChain(&nftables.Chain{Name: name, Table: b.table})
}

func (b *batch) addRule(rs ruleset, r rule) error {
	comment, err := r.comment(rs.family)
	if err != nil {
		return err
	}
	b.conn.AddRule(&nftables.Rule{
		Table: b.table, Chain: &nftables.Chain{Name: r.chain, Table: b.table},
		Exprs: r.exprs, UserData: udata(comment),
	})
	return nil
}

// setsFit reports whether every set that is there is as declared.
func (rs ruleset) setsFit(f found) bool {
	for _, s := range rs.sets {
		have, ok := f.sets[s.name]
		if !ok {
			continue
		}
		if want, err := s.shape(); err != nil || have != want {
			return false
		}
	}
	return true
}

// intact reports whether the fixed part is all there and nothing else is.
func (rs ruleset) intact(f found) (bool, error) {
	if !f.exists || f.dormant || !rs.setsFit(f) {
		return false, nil
	}
	for _, s := range rs.sets {
		if _, ok := f.sets[s.name]; !ok {
			return false, nil
		}
	}
	want, err := rs.comments()
	if err != nil {
		return false, err
	}
	for _, ch := range rs.chains {
		if f.chains[ch.name] != ch || !slices.Equal(f.rules[ch.name], want[ch.name]) {
			return false, nil
		}
	}
	for name := range f.chains {
		if !rs.isSingle(name) && !slices.ContainsFunc(rs.chains, func(c chain) bool { return c.name == name }) {
			return false, nil
		}
	}
	return true, nil
}

// hasChain reports whether a chain has exactly these rules, and the element of a
// verdict map leads to it.
func (f found) hasChain(family nftables.TableFamily, set, key, name string, rules []rule) (bool, error) {
	if f.elems[set][key] != jumpTo(name) || f.chains[name] != (chain{name: name}) {
		return false, nil
	}
	var want []string
	for _, r := range rules {
		c, err := r.comment(family)
		if err != nil {
			return false, err
		}
		want = append(want, c)
	}
	return slices.Equal(f.rules[name], want), nil
}

// shape is how the kernel shows the set.
func (s set) shape() (setShape, error) {
	kt, err := s.keyType()
	if err != nil {
		return setShape{}, err
	}
	out := setShape{keyType: kt.GetNFTMagic(), keyLen: kt.Bytes, size: s.size, timeout: s.timeout}
	if len(s.key) > 1 {
		out.flags |= nftables.NFT_SET_CONCAT
	}
	if s.ranges {
		out.flags |= unix.NFT_SET_INTERVAL
	}
	if s.timeout > 0 {
		out.flags |= unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL
	}
	if s.isMap() {
		out.flags |= unix.NFT_SET_MAP
		out.dataType, out.dataLen = s.data.GetNFTMagic(), s.data.Bytes
	}
	if s.isVerdictMap() {
		out.dataType = unix.NFT_DATA_VERDICT
		out.dataLen = 16 // struct nft_verdict on 64-bit machines; not compared elsewhere
	}
	return out, nil
}
