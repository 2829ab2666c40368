package pool

import (
	"fmt"
	"iter"
	"math/bits"
)

// word is the number of addresses in one word of a Set.
const word = 64

// Set is a set of the numbers 0 … size-1, made to find a free one fast: level 0
// has one bit per number, and a bit of level k+1 is set when its whole word of
// level k is. A full /16 is ruled out in three steps, a full /8 in four; nothing
// is scanned.
//
// The bits behind size are set at every level, so that they never look free.
// Methods that change a Set take a number below size: they index by it.
type Set struct {
	size   uint32
	n      uint32
	levels [][]uint64
}

// NewSet returns an empty set of the numbers below size.
// A /8 (1<<24 numbers) takes 2 MiB.
func NewSet(size uint32) Set {
	s := Set{size: size}
	for width := size; ; {
		words := (width + word - 1) / word
		level := make([]uint64, words)
		if rest := width % word; rest != 0 {
			level[words-1] = ^uint64(0) << rest
		}
		s.levels = append(s.levels, level)
		if words <= 1 {
			return s
		}
		width = words
	}
}

// Len returns how many numbers are in the set.
func (s *Set) Len() int { return int(s.n) }

// Has reports whether i is in the set; a number out of range is not.
func (s *Set) Has(i uint32) bool {
	return i < s.size && s.levels[0][i/word]&(1<<(i%word)) != 0
}

// Add puts i into the set and reports whether it was new.
func (s *Set) Add(i uint32) bool {
	if s.Has(i) {
		return false
	}
	s.n++
	for _, level := range s.levels {
		level[i/word] |= 1 << (i % word)
		if level[i/word] != ^uint64(0) {
			break // the word is not full yet, so nothing changes above it
		}
		i /= word
	}
	return true
}

// Remove takes i out of the set and reports whether it was there.
func (s *Set) Remove(i uint32) bool {
	if !s.Has(i) {
		return false
	}
	s.n--
	for _, level := range s.levels {
		full := level[i/word] == ^uint64(0)
		level[i/word] &^= 1 << (i % word)
		if !full {
			break // the levels above knew already that there is room
		}
		i /= word
	}
	return true
}

// NextFree returns the lowest number from i upwards that is not in the set.
func (s *Set) NextFree(i uint32) (uint32, bool) {
	if i >= s.size {
		return 0, false
	}
	for k := 0; k < len(s.levels); k++ {
		w := i / word
		if int(w) >= len(s.levels[k]) {
			return 0, false
		}
		if room := ^s.levels[k][w] & (^uint64(0) << (i % word)); room != 0 {
			return s.descend(k, w*word+uint32(bits.TrailingZeros64(room))), true
		}
		i = w + 1 // this word is done: look for the next word with room
	}
	return 0, false
}

// descend follows the first free bit from number i of level k down to level 0.
func (s *Set) descend(k int, i uint32) uint32 {
	for ; k > 0; k-- {
		i = i*word + uint32(bits.TrailingZeros64(^s.levels[k-1][i]))
	}
	return i
}

// All yields the numbers in the set in rising order. The set must not change
// while it is walked.
func (s *Set) All() iter.Seq[uint32] {
	return func(yield func(uint32) bool) {
		if s.n == 0 {
			return
		}
		for w, have := range s.levels[0] {
			for ; have != 0; have &= have - 1 {
				i := uint32(w)*word + uint32(bits.TrailingZeros64(have))
				if i >= s.size {
					return
				}
				if !yield(i) {
					return
				}
			}
		}
	}
}

// check returns what is inconsistent in the set, or nil.
func (s *Set) check() error {
	var n uint32
	for range s.All() {
		n++
	}
	if n != s.n {
		return fmt.Errorf("set holds %d numbers and counts %d", n, s.n)
	}
	for k := 1; k < len(s.levels); k++ {
		for i, below := range s.levels[k-1] {
			said := s.levels[k][i/word]&(1<<(i%word)) != 0
			if full := below == ^uint64(0); full != said {
				return fmt.Errorf("set level %d says full=%t for word %d, which is full=%t", k, said, i, full)
			}
		}
	}
	return nil
}
