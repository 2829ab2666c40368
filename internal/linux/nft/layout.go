package nft

import (
	"fmt"

	"sluice/internal/kernel"
)

// layout is how a table holds objects: its own, whose value V decides the fixed part
// and stands in the text of the first rule, and others in its sets.
type layout[V kernel.Value] struct {
	key   kernel.Key // the table's own object
	rules func(V) ruleset
	parse func(text string) (V, bool) // reads the text of the first rule
	check func(V) error               // refuses what cannot be in a table, or would not read back as it was given; nil: nothing
	sets  []string                    // those that Apply writes; others belong to packets

	owns func(kernel.Key) bool                           // nil: every object
	load func(f found, ns string, st kernel.State) error // adds the other objects
	op   func(c *change, op kernel.Op) error             // adds an operation on one of them
}

// table is a layout, whatever its value.
type table interface {
	holds(k kernel.Key) bool
	dump(nsFD int) (kernel.State, error)
	apply(nsFD int, ops []kernel.Op) error
}

// holds reports whether the table is an object's place.
func (l layout[V]) holds(k kernel.Key) bool { return l.owns == nil || l.owns(k) }

// dump returns what the table holds. Unless its fixed part is intact there is no object
// of its own, but what is in the sets, as far as they can be read.
func (l layout[V]) dump(nsFD int) (kernel.State, error) {
	var none V
	rs := l.rules(none)
	f, err := read(nsFD, rs.family, rs.table, l.sets)
	if err != nil {
		return nil, err
	}
	return l.state(f)
}

// state says what the table holds.
func (l layout[V]) state(f found) (kernel.State, error) {
	st := kernel.State{}
	if rules := f.rules[chainPrerouting]; len(rules) > 0 {
		if spec, ok := l.parse(uncomment(rules[0])); ok {
			ok, err := l.rules(spec).intact(f)
			if err != nil {
				return nil, err
			}
			if ok {
				st[l.key] = spec
			}
		}
	}
	var none V
	if !l.rules(none).setsFit(f) {
		return st, nil // keys and data of another version cannot be read
	}
	return st, l.load(f, l.key.Netns(), st)
}

// apply changes the table in one transaction, or as commit says.
func (l layout[V]) apply(nsFD int, ops []kernel.Op) error {
	var none V
	c, rs := newChange(), l.rules(none)
	for _, op := range ops {
		if op.Key != l.key {
			if err := l.op(&c, op); err != nil {
				return err
			}
			continue
		}
		_, spec, err := cast[V](op)
		if err != nil {
			return err
		}
		if op.Want == nil {
			c = newChange() // what was said of its contents is void
			c.remove = true
			continue
		}
		if l.check != nil {
			if err := l.check(spec); err != nil {
				return fmt.Errorf("%s: %w", op.Key, err)
			}
		}
		rs = l.rules(spec)
		c.create = &rs
	}
	return commit(nsFD, rs, l.sets, c)
}
