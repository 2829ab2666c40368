package gossip

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The cases that random histories seldom reach.

// put1, del1 and note are deltas of one change, or of none.
func put1(inc, from, to uint64, key, value string) *delta {
	return &delta{owner: "o", inc: Incarnation{Start: inc}, from: from, to: to, records: []change{{seq: to, key: key, value: []byte(value)}}}
}

func del1(inc, from, to uint64, key string) *delta {
	return &delta{owner: "o", inc: Incarnation{Start: inc}, from: from, to: to, records: []change{{seq: to, key: key, deleted: true}}}
}

func note(inc, from, to, floor, done uint64) *delta {
	return &delta{owner: "o", inc: Incarnation{Start: inc}, from: from, to: to, floor: floor, done: done}
}

func TestTableCases(t *testing.T) {
	for _, tc := range []struct {
		name  string
		steps []*delta
		want  map[string]string
		seq   uint64
		floor uint64
	}{
		{
			name:  "a late put does not bring back what was deleted and collected",
			steps: []*delta{put1(1, 0, 1, "a", "x"), del1(1, 1, 2, "a"), note(1, 2, 3, 2, 0), put1(1, 0, 1, "a", "x")},
			want:  map[string]string{}, seq: 3, floor: 2,
		},
		{
			name:  "a floor above a gap is not taken over: what it collected may be missing",
			steps: []*delta{put1(1, 0, 1, "a", "x"), put1(1, 5, 6, "b", "y"), note(1, 6, 7, 4, 0)},
			want:  map[string]string{"a": "x", "b": "y"}, seq: 1, floor: 0,
		},
		{
			name:  "the floor is taken over when the gap closes",
			steps: []*delta{put1(1, 0, 1, "a", "x"), note(1, 4, 5, 3, 0), del1(1, 1, 4, "a")},
			want:  map[string]string{}, seq: 5, floor: 3,
		},
		{
			name:  "an announced Complete drops nothing before its seq is reached",
			steps: []*delta{put1(1, 0, 1, "a", "x"), put1(2, 0, 1, "b", "y"), note(2, 8, 9, 0, 9)},
			want:  map[string]string{"a": "x", "b": "y"}, seq: 1,
		},
		{
			name:  "Complete drops what was not published again",
			steps: []*delta{put1(1, 0, 1, "a", "x"), note(2, 1, 2, 0, 2), put1(2, 0, 1, "b", "y")},
			want:  map[string]string{"b": "y"}, seq: 2,
		},
		{
			name:  "two restarts without Complete keep the entries of both lives",
			steps: []*delta{put1(1, 0, 1, "a", "x"), put1(2, 0, 1, "b", "y"), put1(3, 0, 1, "c", "z")},
			want:  map[string]string{"a": "x", "b": "y", "c": "z"}, seq: 1,
		},
		{
			name:  "what a life without Complete deleted stays deleted in the next",
			steps: []*delta{put1(1, 0, 1, "a", "x"), del1(2, 0, 1, "a"), put1(3, 0, 1, "c", "z")},
			want:  map[string]string{"c": "z"}, seq: 1,
		},
		{
			name:  "a former life has nothing to say any more",
			steps: []*delta{put1(2, 0, 1, "a", "x"), put1(1, 0, 9, "a", "old"), del1(1, 9, 10, "a")},
			want:  map[string]string{"a": "x"}, seq: 1,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newReplica("me", Incarnation{Start: 1}, netip.AddrPort{})
			for _, d := range tc.steps {
				r.applyDelta(d)
			}
			tab := r.tables["o"]
			if d := cmp.Diff(tc.want, text(tab)); d != "" {
				t.Errorf("entries: want (-) got (+)\n%s", d)
			}
			if tab.seq != tc.seq || tab.floor != tc.floor {
				t.Errorf("seq %d floor %d, want %d and %d", tab.seq, tab.floor, tc.seq, tc.floor)
			}
		})
	}
}

func text(t *table) map[string]string {
	m := make(map[string]string)
	for k, v := range t.entries() {
		m[k] = string(v)
	}
	return m
}

func TestAnswerIncludesChangesBeyondTheGap(t *testing.T) {
	via := newReplica("via", Incarnation{Start: 1}, netip.AddrPort{})
	via.applyDelta(put1(1, 0, 1, "a", "1"))
	via.applyDelta(put1(1, 8, 9, "a", "9")) // it no longer has what seq 1 was
	to := newReplica("to", Incarnation{Start: 1}, netip.AddrPort{})
	answer, _, _ := via.compare(to.digest())
	if err := decode(envelope(answer...), func(m any) { feed(to, m) }); err != nil {
		t.Fatal(err)
	}
	if tab := to.tables["o"]; tab.seq != 1 || text(tab)["a"] != "9" {
		t.Errorf("seq %d, entries %q; want 1 and a=9", tab.seq, text(tab))
	}
}

func TestBelowTheFloorTheWholeTableIsSent(t *testing.T) {
	ahead := newReplica("ahead", Incarnation{Start: 1}, netip.AddrPort{})
	for _, d := range []*delta{put1(1, 0, 1, "a", "x"), put1(1, 1, 2, "b", "y"), del1(1, 2, 3, "a"), note(1, 3, 4, 3, 0)} {
		ahead.applyDelta(d)
	}
	for _, tc := range []struct {
		seq  uint64
		full bool
	}{{0, true}, {1, true}, {2, true}, {3, false}} {
		d := ahead.tables["o"].since(version{inc: Incarnation{Start: 1}, seq: tc.seq})
		if d.full != tc.full {
			t.Errorf("a copy at %d gets full %t, want %t; the floor is 3", tc.seq, d.full, tc.full)
		}
	}
	behind := newReplica("behind", Incarnation{Start: 1}, netip.AddrPort{})
	behind.applyDelta(put1(1, 0, 1, "a", "x"))
	answer, _, _ := ahead.compare(behind.digest())
	if err := decode(envelope(answer...), func(m any) { feed(behind, m) }); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]string{"b": "y"}, text(behind.tables["o"])); d != "" {
		t.Errorf("want (-) got (+)\n%s", d)
	}
}

func TestGraveOutranksItsOwnIncarnationOnly(t *testing.T) {
	r := newReplica("me", Incarnation{Start: 1}, netip.AddrPort{})
	r.applyDelta(put1(2, 0, 1, "a", "x"))
	for _, step := range []struct {
		inc  uint64
		want outcome
	}{{1, outcomeStale}, {2, outcomeApplied}, {2, outcomeStale}} {
		if got := r.applyGrave(&grave{owner: "o", inc: Incarnation{Start: step.inc}, at: epoch.Unix()}, epoch); got != step.want {
			t.Errorf("grave of incarnation %d: outcome %d, want %d", step.inc, got, step.want)
		}
	}
	if got := r.applyDelta(put1(2, 1, 2, "b", "late")); got != outcomeStale || r.tables["o"] != nil {
		t.Errorf("a late packet of the buried incarnation: outcome %d, table %v", got, r.tables["o"])
	}
	if got := r.applyDelta(put1(3, 0, 1, "a", "back")); got != outcomeApplied || len(r.graves) != 0 {
		t.Errorf("the next incarnation: outcome %d, graves %v", got, r.graves)
	}
}

func TestSplitPromisesNothingBeyondTheGap(t *testing.T) {
	d := delta{owner: "o", to: 3}
	for i := range uint64(50) {
		d.records = append(d.records, change{seq: 2 * (i + 1), key: fmt.Sprint("k", i), value: []byte(strings.Repeat("v", 100))})
	}
	parts := d.split()
	for _, p := range parts {
		if p.to > d.to || p.from > p.to {
			t.Errorf("a part covers (%d, %d], the whole (%d, %d]", p.from, p.to, d.from, d.to)
		}
		if _, err := decodeAll(envelope(p.encode())); err != nil {
			t.Error(err)
		}
	}
	if len(parts) < 2 {
		t.Error("nothing was split")
	}
}

func TestOutbidKeepsDeletionsThatAPeerHasNotHeardOf(t *testing.T) {
	owner := newReplica("o", Incarnation{Start: 2}, netip.AddrPort{})
	owner.own.remove("a", epoch)
	owner.claim(version{inc: Incarnation{Start: 2}, grave: true})
	peer := newReplica("peer", Incarnation{Start: 1}, netip.AddrPort{})
	peer.applyDelta(put1(1, 0, 1, "a", "x"))
	d, _ := owner.own.unpublished()
	peer.applyDelta(&d)
	if got := text(peer.tables["o"]); len(got) != 0 {
		t.Errorf("peer shows %q", got)
	}
}

func TestOwnTableCountsItsSize(t *testing.T) {
	o := newOwnTable("o", Incarnation{Start: 1}, netip.AddrPort{})
	must := func(_ bool, err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(o.put("key", []byte("value")))
	must(o.put("key", []byte("v")))
	must(o.put("other", nil))
	o.remove("key", epoch)
	o.outbid(o.inc)
	if want := len("other"); o.size != want {
		t.Errorf("size %d, want %d; records %v", o.size, want, maps.Collect(maps.All(o.records)))
	}
}
