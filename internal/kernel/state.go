package kernel

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// State is a set of kernel objects. Both sides of an entry are comparable: two
// states are equal if maps.Equal says so.
type State map[Key]Value

// Key names one kernel object. Its String says kind and place, and is unique on
// a host: a task's namespace stands in it by the last element of its path, and
// an engine keeps the namespaces of all its tasks in one directory.
type Key interface {
	fmt.Stringer
	// Phase orders creation; objects of a later phase may refer to those of an earlier one.
	Phase() Phase
	// Netns is the network namespace the object lives in: its name, "task:" and
	// its path for a task's, empty for the host's own.
	Netns() string
}

// Value is what an object should be. Its String is the part behind the key in the text form.
type Value interface{ fmt.Stringer }

// Phase is a place in the order of creation; deletion runs backwards.
type Phase int

// The phases. What guards the host from the networks that published ports lead into
// comes before there is a way from one, and goes after it. Addresses come after links;
// the nftables objects of a namespace, which are changed in one transaction with their
// deletions, after the addresses they speak for; then task namespaces, because a backend
// counts as prepared only when all else of it is done; published ports last, and they go
// first.
const (
	PhaseGuard Phase = iota
	PhaseNetns
	PhaseSysctl
	PhaseBridge
	PhaseVXLAN
	PhaseVeth
	PhaseAddr
	PhaseNeigh
	PhaseFilter
	PhaseVIP
	PhaseTask
	PhaseMesh
)

// in is how texts of keys name a namespace.
func in(ns string) string {
	if ns == "" {
		return "host"
	}
	return ns
}

// Compare orders keys by namespace, phase and text; it is the order of Text.
func Compare(a, b Key) int {
	return cmp.Or(
		cmp.Compare(a.Netns(), b.Netns()),
		cmp.Compare(a.Phase(), b.Phase()),
		naturalCompare(a.String(), b.String()),
	)
}

// naturalCompare compares runs of digits by value, so that slot 10 follows slot
// 9 and 10.0.0.10 follows 10.0.0.9.
func naturalCompare(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			da, db := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if c := cmp.Or(cmp.Compare(len(da), len(db)), cmp.Compare(da, db), cmp.Compare(na, nb)); c != 0 {
				return c
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// Keys returns the keys in the order of Compare.
func (s State) Keys() []Key {
	keys := make([]Key, 0, len(s))
	for k := range s {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, Compare)
	return keys
}

// Text prints one object a line, in the order of Compare, ending in a newline.
func (s State) Text() string {
	var b strings.Builder
	for _, k := range s.Keys() {
		b.WriteString(Line(k, s[k]))
		b.WriteByte('\n')
	}
	return b.String()
}

// Line is one object in the text form, without a newline.
func Line(k Key, v Value) string {
	return strings.TrimSuffix(k.String()+" "+v.String(), " ")
}
