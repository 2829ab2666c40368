package gossip

import (
	"cmp"
	"fmt"
	"math"
)

// Incarnation numbers the lives of one owner. Greater is later.
type Incarnation struct {
	// Start is Config.Incarnation of the owner's process: a persisted counter or
	// the nanoseconds of its start.
	Start uint64
	// Bump grows each time the owner has to outbid a claim about itself.
	Bump uint32
}

// Compare returns -1, 0 or +1, as i is earlier than, equal to or later than j.
func (i Incarnation) Compare(j Incarnation) int {
	return cmp.Or(cmp.Compare(i.Start, j.Start), cmp.Compare(i.Bump, j.Bump))
}

// String returns the incarnation as "start.bump".
func (i Incarnation) String() string { return fmt.Sprintf("%d.%d", i.Start, i.Bump) }

// next is an incarnation above i, for the process that started as life. Two processes
// of one owner that outbid the same claim, each cut off from who knows of the other, must
// not both become its next: one incarnation with two tables never agrees again. So each
// goes its own step beyond, of 65,536 ones.
func (i Incarnation) next(life uint64) Incarnation {
	step := 1 + uint32(life*0x9e3779b97f4a7c15>>48) // Fibonacci hashing
	if i.Bump > math.MaxUint32-step {
		return Incarnation{Start: i.Start + 1, Bump: step}
	}
	return Incarnation{Start: i.Start, Bump: i.Bump + step}
}

// version is what one node knows of one owner. The zero version is "nothing".
// A grave outranks every table of its own and of earlier incarnations, a table
// of a later incarnation outranks the grave: hence the order of the fields.
type version struct {
	inc   Incarnation
	grave bool
	seq   uint64
}

func (v version) compare(w version) int {
	if c := v.inc.Compare(w.inc); c != 0 {
		return c
	}
	if v.grave != w.grave {
		if v.grave {
			return 1
		}
		return -1
	}
	return cmp.Compare(v.seq, w.seq)
}
