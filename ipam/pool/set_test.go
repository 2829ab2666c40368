package pool

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// sizes around the borders of the levels: a word, a word of words, and so on.
var sizes = []uint32{1, 4, 63, 64, 65, 128, 4095, 4096, 4097, 65536, 262144, 262145}

func TestSetIsASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom(sizes).Draw(t, "size")
		s, model := NewSet(size), map[uint32]bool{}
		number := rapid.Uint32Range(0, size-1)
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				i := number.Draw(t, "i")
				if got := s.Add(i); got == model[i] {
					t.Fatalf("Add(%d) = %t", i, got)
				}
				model[i] = true
			},
			"fill": func(t *rapid.T) {
				i := number.Draw(t, "i")
				for j := i; j < min(size, i+200); j++ {
					s.Add(j)
					model[j] = true
				}
			},
			"remove": func(t *rapid.T) {
				i := number.Draw(t, "i")
				if got := s.Remove(i); got != model[i] {
					t.Fatalf("Remove(%d) = %t", i, got)
				}
				delete(model, i)
			},
			"next": func(t *rapid.T) {
				i := number.Draw(t, "i")
				want := i
				for want < size && model[want] {
					want++
				}
				if got, ok := s.NextFree(i); ok != (want < size) || ok && got != want {
					t.Fatalf("NextFree(%d) = %d, %t; want %d", i, got, ok, want)
				}
			},
			"": func(t *rapid.T) {
				if err := s.check(); err != nil {
					t.Fatal(err)
				}
				if s.Len() != len(model) {
					t.Fatalf("Len = %d, want %d", s.Len(), len(model))
				}
				for i := range s.All() {
					if !model[i] {
						t.Fatalf("All yields %d, which is not in the set", i)
					}
				}
			},
		})
	})
}

func TestSetFullAtEveryLevel(t *testing.T) {
	for _, size := range sizes {
		s := NewSet(size)
		for i := range size {
			if !s.Add(i) {
				t.Fatalf("size %d: %d was there already", size, i)
			}
		}
		if i, ok := s.NextFree(0); ok {
			t.Errorf("size %d: full set has %d free", size, i)
		}
		if s.Add(0) || s.Has(size) {
			t.Errorf("size %d: number counted twice, or out of range", size)
		}
		s.Remove(size - 1)
		if i, ok := s.NextFree(0); !ok || i != size-1 {
			t.Errorf("size %d: NextFree = %d, %t after removing the last", size, i, ok)
		}
		if _, ok := s.NextFree(size); ok {
			t.Errorf("size %d: free number out of range", size)
		}
		if err := s.check(); err != nil {
			t.Errorf("size %d: %v", size, err)
		}
	}
}

func TestSetAllStopsWhenTold(t *testing.T) {
	s := NewSet(100)
	s.Add(3)
	s.Add(70)
	for i := range s.All() {
		if i != 3 {
			t.Errorf("first = %d", i)
		}
		break
	}
	if got := slices.Collect(s.All()); !slices.Equal(got, []uint32{3, 70}) {
		t.Errorf("All = %v", got)
	}
}
