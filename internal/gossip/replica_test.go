package gossip

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// epoch is the time of tests that need one but no clock.
var epoch = time.Unix(1_800_000_000, 0)

// TestReplicasConvergeWhateverTheNetworkDoes drives the pure state of four nodes
// through writes, restarts, graves and a network that delays, repeats, reorders
// and loses. Then everything still under way arrives, and all compare digests.
func TestReplicasConvergeWhateverTheNetworkDoes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 4
		var (
			nodes [size]*replica
			lives [size]uint64
			want  [size]map[string]string
			now   = epoch
			air   []flying
		)
		boot := func(i int) {
			lives[i]++
			nodes[i] = newReplica(nodeName(i), Incarnation{Start: lives[i]}, netip.AddrPort{})
			want[i] = make(map[string]string)
		}
		for i := range size {
			boot(i)
		}
		deliver := func(f flying) {
			if err := decode(f.b, func(m any) {
				switch m := m.(type) {
				case *delta:
					nodes[f.to].applyDelta(m)
				case *grave:
					nodes[f.to].applyGrave(m, now)
				}
			}); err != nil {
				t.Fatalf("own message: %v", err)
			}
		}
		publish := func(i int) {
			d, ok := nodes[i].own.unpublished()
			if !ok {
				return
			}
			for _, m := range encodeDelta(d) {
				for to := range size {
					if to != i {
						air = append(air, flying{to, envelope(m)})
					}
				}
			}
		}
		// pull brings to what from has, or has it under way.
		pull := func(from, to int) [][]byte {
			answer, _, _ := nodes[from].compare(nodes[to].digest())
			return answer
		}
		node := rapid.IntRange(0, size-1)
		key := rapid.Custom(func(t *rapid.T) string { return fmt.Sprint("k", rapid.IntRange(0, 5).Draw(t, "k")) })
		count := 0

		t.Repeat(map[string]func(*rapid.T){
			"put": func(t *rapid.T) {
				i, k := node.Draw(t, "node"), key.Draw(t, "key")
				count++
				v := fmt.Sprint("v", count)
				if _, err := nodes[i].own.put(k, []byte(v)); err != nil {
					t.Fatal(err)
				}
				want[i][k] = v
			},
			"delete": func(t *rapid.T) {
				i, k := node.Draw(t, "node"), key.Draw(t, "key")
				nodes[i].own.remove(k, now)
				delete(want[i], k)
			},
			"complete": func(t *rapid.T) { nodes[node.Draw(t, "node")].own.finish() },
			"publish":  func(t *rapid.T) { publish(node.Draw(t, "node")) },
			"arrive": func(t *rapid.T) {
				if len(air) == 0 {
					t.Skip("nothing under way")
				}
				i := rapid.IntRange(0, len(air)-1).Draw(t, "which")
				deliver(air[i])
				if rapid.Bool().Draw(t, "once") {
					air = append(air[:i], air[i+1:]...)
				}
			},
			"sync": func(t *rapid.T) {
				from, to := node.Draw(t, "from"), node.Draw(t, "to")
				for _, m := range pull(from, to) {
					if rapid.Bool().Draw(t, "at once") {
						deliver(flying{to, envelope(m)})
					} else {
						air = append(air, flying{to, envelope(m)})
					}
				}
			},
			"restart": func(t *rapid.T) { boot(node.Draw(t, "node")) },
			"forget": func(t *rapid.T) {
				by, who := node.Draw(t, "by"), node.Draw(t, "who")
				nodes[by].forget(nodeName(who), now)
			},
			"wait": func(t *rapid.T) {
				now = now.Add(TombstoneTTL)
				for _, n := range nodes {
					n.expire(now)
				}
			},
		})

		for i := range size {
			nodes[i].own.finish()
			publish(i)
		}
		for _, f := range air {
			deliver(f)
		}
		// Once around is enough for what one node has and another lacks; an owner
		// that has to outbid a claim needs a second time.
		for range 3 {
			for from := range size {
				for to := range size {
					for _, m := range pull(from, to) {
						deliver(flying{to, envelope(m)})
					}
				}
			}
		}
		for i := range size {
			for owner := range size {
				got := make(map[string]string)
				tab := nodes[i].tables[nodeName(owner)]
				if tab == nil {
					t.Fatalf("%s has no table of %s", nodeName(i), nodeName(owner))
				}
				for k, v := range tab.entries() {
					got[k] = string(v)
				}
				if d := cmp.Diff(want[owner], got); d != "" {
					t.Errorf("table of %s on %s: want (-) got (+)\n%s", nodeName(owner), nodeName(i), d)
				}
			}
			if nodes[i].hash() != nodes[0].hash() {
				t.Errorf("digests differ: %+v and %+v", nodes[0].digest(), nodes[i].digest())
			}
		}
	})
}

type flying struct {
	to int
	b  []byte
}

func TestChangesBeyondAGapShowAtOnceAndTheGapIsKnown(t *testing.T) {
	tab := newTable("o", Incarnation{Start: 1})
	step := func(from, to uint64, key, value string) {
		tab.apply(&delta{owner: "o", inc: tab.inc, from: from, to: to, records: []change{{seq: to, key: key, value: []byte(value)}}})
	}
	step(0, 1, "a", "1")
	step(2, 3, "c", "3")
	step(4, 5, "a", "5")
	if tab.seq != 1 || string(tab.entries()["c"]) != "3" || string(tab.entries()["a"]) != "5" {
		t.Errorf("seq %d, entries %q", tab.seq, tab.entries())
	}
	step(1, 2, "a", "2") // late, and overtaken
	if tab.seq != 3 || string(tab.entries()["a"]) != "5" {
		t.Errorf("seq %d, entries %q", tab.seq, tab.entries())
	}
	step(3, 4, "d", "4")
	if tab.seq != 5 || len(tab.ahead) != 0 {
		t.Errorf("seq %d, ahead %v", tab.seq, tab.ahead)
	}
}

func TestSpansBeyondAGapAreBounded(t *testing.T) {
	tab := newTable("o", Incarnation{Start: 1})
	for i := range uint64(1000) {
		tab.apply(&delta{owner: "o", inc: tab.inc, from: 2*i + 1, to: 2*i + 2})
	}
	if len(tab.ahead) > maxAhead {
		t.Errorf("%d spans", len(tab.ahead))
	}
}

func TestOwnersAreBounded(t *testing.T) {
	r := newReplica("me", Incarnation{Start: 1}, netip.AddrPort{})
	for i := range 2 * maxOwners {
		r.applyDelta(&delta{owner: fmt.Sprint("t", i), inc: Incarnation{Start: 1}})
		r.applyGrave(&grave{owner: fmt.Sprint("g", i), inc: Incarnation{Start: 1}, at: epoch.Unix()}, epoch)
	}
	if n := len(r.digest()); n > maxOwners {
		t.Errorf("%d owners", n)
	}
}

func TestGravesExpireAndAreNotTaughtAgain(t *testing.T) {
	r := newReplica("me", Incarnation{Start: 1}, netip.AddrPort{})
	g := &grave{owner: "gone", inc: Incarnation{Start: 1}, at: epoch.Add(time.Hour).Unix()} // by a clock ahead of ours
	if got := r.applyGrave(g, epoch); got != outcomeApplied {
		t.Fatalf("outcome %d", got)
	}
	later := epoch.Add(GraveTTL + time.Second)
	r.expire(later)
	if len(r.graves) != 0 {
		t.Errorf("still there: %+v", r.graves)
	}
	g.at = epoch.Unix()
	if got := r.applyGrave(g, later); got != outcomeStale {
		t.Errorf("a peer whose clock is behind brought it back: outcome %d", got)
	}
}

func TestDeletionBeforeCompleteHidesRetainedEntries(t *testing.T) {
	peer := newReplica("peer", Incarnation{Start: 1}, netip.AddrPort{})
	owner := newReplica("o", Incarnation{Start: 1}, netip.AddrPort{})
	send := func() {
		d, _ := owner.own.unpublished()
		peer.applyDelta(&d)
	}
	for _, k := range []string{"a", "b"} {
		if _, err := owner.own.put(k, []byte("old")); err != nil {
			t.Fatal(err)
		}
	}
	send()
	owner = newReplica("o", Incarnation{Start: 2}, netip.AddrPort{})
	owner.own.remove("a", epoch) // this life never had it
	send()
	if got := peer.tables["o"].entries(); !maps.EqualFunc(got, map[string][]byte{"b": []byte("old")}, func(a, b []byte) bool { return string(a) == string(b) }) {
		t.Errorf("peer shows %q", got)
	}
	// A grave for it must be outbid without losing that.
	owner.claim(version{inc: Incarnation{Start: 2}, grave: true})
	send()
	if _, ok := peer.tables["o"].entries()["a"]; ok {
		t.Error("the deleted entry is back")
	}
	owner.own.finish()
	send()
	if got := peer.tables["o"].entries(); len(got) != 0 {
		t.Errorf("after Complete peer shows %q", got)
	}
}

// TestTwoProcessesDoNotOutbidAlike: the clock was set back, and neither knows of the other.
// One incarnation with two tables of the same length would never agree again.
func TestTwoProcessesDoNotOutbidAlike(t *testing.T) {
	seen := make(map[Incarnation]uint64)
	for life := range uint64(200) {
		r := newReplica("me", Incarnation{Start: life}, netip.AddrPort{})
		claimed := version{inc: Incarnation{Start: 1000}, seq: 3}
		if r.claim(claimed) != outcomeRefuted || r.own.inc.Compare(claimed.inc) <= 0 {
			t.Fatalf("process %d became %v", life, r.own.inc)
		}
		if other, twice := seen[r.own.inc]; twice {
			t.Errorf("processes %d and %d both became %v", other, life, r.own.inc)
		}
		seen[r.own.inc] = life
	}
}
