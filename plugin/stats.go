package main

import (
	"cmp"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"sluice/internal/diag"
)

// methodStats counts the calls of one method. Safe for concurrent use.
type methodStats struct {
	calls, failed, late, panics atomic.Uint64
	total, longest              atomic.Int64 // nanoseconds
}

// count makes the counter of a method; newSocket's only.
func (s *socket) count(method string) *methodStats {
	st := new(methodStats)
	s.stats[method] = st
	return st
}

func (st *methodStats) add(took time.Duration, err error) {
	st.calls.Add(1)
	st.total.Add(int64(took))
	for old := st.longest.Load(); int64(took) > old && !st.longest.CompareAndSwap(old, int64(took)); {
		old = st.longest.Load()
	}
	if err == nil {
		return
	}
	st.failed.Add(1)
	var l late
	if errors.As(err, &l) {
		st.late.Add(1)
	}
	var p panicked
	if errors.As(err, &p) {
		st.panics.Add(1)
	}
}

// counts lists the methods that were called, by name. A row that changes while
// it is read may be off by the calls of that moment.
func (s *socket) counts() []diag.Call {
	var out []diag.Call
	for method, st := range s.stats {
		if st.calls.Load() == 0 {
			continue
		}
		out = append(out, diag.Call{
			Method: method,
			Calls:  st.calls.Load(), Failed: st.failed.Load(), Late: st.late.Load(), Panics: st.panics.Load(),
			Total: time.Duration(st.total.Load()), Longest: time.Duration(st.longest.Load()),
		})
	}
	slices.SortFunc(out, func(a, b diag.Call) int { return cmp.Compare(a.Method, b.Method) })
	return out
}
