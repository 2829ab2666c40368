package view

import (
	"maps"
	"testing"
	"time"
)

// at is a table of node B as of a change of its process.
func (n *node) at(t fatal, start, seq uint64, present bool) Table {
	t.Helper()
	in := n.table(present)
	in.Entries = maps.Clone(in.Entries)
	in.Version, in.Last = Version{Start: start, Seq: seq}, seq
	return in
}

// TestAnOlderCopyTakesNothingBack: after a start, the first to answer may be a node that
// was cut off. What it has of a third one is complete, and from before.
func TestAnOlderCopyTakesNothingBack(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	before := b.at(t, 100, 7, false)
	delete(before.Entries, keyEndpoint+string(two))
	older := b.at(t, 99, 50, false)
	delete(older.Entries, keyEndpoint+string(two))
	newest := b.at(t, 100, 8, true)
	ok(t, a.SetTables(t.Context(), []Table{newest}))
	has := func(n *node, want bool, when string) {
		t.Helper()
		if _, known := n.View().Remotes[two]; known != want {
			t.Errorf("%s: the endpoint is known: %t", when, known)
		}
	}
	for _, in := range []Table{before, older} {
		a = a.restarted(t)
		ok(t, a.SetTables(t.Context(), []Table{in}))
		has(a, true, "an older copy")
		a = a.restarted(t)
		has(a, true, "and a restart after it")
		ok(t, a.SetTables(t.Context(), []Table{newest}))
		has(a, true, "the newest copy")
	}
	gone := b.at(t, 100, 9, true)
	delete(gone.Entries, keyEndpoint+string(two))
	ok(t, a.SetTables(t.Context(), []Table{gone}))
	has(a, false, "its owner removed it")
	a = a.restarted(t)
	ok(t, a.SetTables(t.Context(), []Table{newest}))
	has(a, false, "a copy from before that, after a restart")
	later := b.at(t, 101, 1, true)
	ok(t, a.SetTables(t.Context(), []Table{later}))
	has(a, true, "its owner started anew and has it")
}

// TestAChangeBeyondAGapIsNotTakenBack: what was heard out of order counts as heard.
func TestAChangeBeyondAGapIsNotTakenBack(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	gap := b.at(t, 100, 5, true)
	gap.Last = 8
	ok(t, a.SetTables(t.Context(), []Table{gap}))
	a = a.restarted(t)
	before := b.at(t, 100, 7, true)
	delete(before.Entries, keyEndpoint+string(two))
	ok(t, a.SetTables(t.Context(), []Table{before}))
	if _, known := a.View().Remotes[two]; !known {
		t.Error("forgotten")
	}
}

// TestAClockThatWasSetBackIsBelievedInTheEnd: all were restarted, so nobody tells the
// node that it has had greater numbers.
func TestAClockThatWasSetBackIsBelievedInTheEnd(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	b := member(t, "nodeB", "192.168.0.2", two, "10.255.0.3")
	ok(t, a.SetTables(t.Context(), []Table{b.at(t, 100, 8, true)}))
	a = a.restarted(t)
	back := b.at(t, 50, 1, true)
	delete(back.Entries, keyEndpoint+string(two))
	hear := func(present bool, d time.Duration, want bool) {
		t.Helper()
		a.clock.now = a.clock.now.Add(d)
		back.Present = present
		ok(t, a.SetTables(t.Context(), []Table{back}))
		if _, known := a.View().Remotes[two]; known != want {
			t.Errorf("after %v, in contact %t: the former record is there: %t", d, present, known)
		}
	}
	hear(true, 0, true)
	hear(true, setBackAfter-time.Second, true)
	hear(false, time.Second, true) // out of contact, it may be another's copy
	hear(true, time.Hour, true)
	hear(true, setBackAfter, false)
	a = a.restarted(t)
	back = b.at(t, 50, 0, true) // of the same process, which counts up
	hear(true, 0, false)
	hear(true, setBackAfter, false)
	hear(true, rewoundAfter-setBackAfter-time.Second, false)
	hear(true, time.Second, true)
}
