package gossip

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// detection bounds the time until a dead node is suspended in small clusters:
// its turn to be probed (N probes of a second in the worst case), the probe,
// the suspicion, six times as long if nobody confirms it.
const detection = 40 * time.Second

func TestChurnConverges(t *testing.T) {
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			inBubble(t, func(t *testing.T) { churn(t, seed) })
		})
	}
}

// churn drives 25 nodes through random writes, restarts, partitions and loss,
// then heals the network but for 20 % loss.
func churn(t *testing.T, seed uint64) {
	const size = 25
	rng := rand.New(rand.NewPCG(seed, 1))
	c := newCluster(t, seed)
	want := make(map[string]map[string]string) // what each owner holds
	down := make(map[string]bool)
	c.net.SetLoss(0.2)
	for i := range size {
		c.start(nodeName(i))
		want[nodeName(i)] = make(map[string]string)
		advance(time.Duration(rng.IntN(200)) * time.Millisecond)
	}
	restart := func(name string) {
		n := c.start(name)
		for k, v := range want[name] {
			c.put(name, k, v)
			if rng.IntN(20) == 0 {
				advance(time.Second)
			}
		}
		if err := n.Complete(); err != nil {
			t.Fatal(err)
		}
		delete(down, name)
	}
	for step := range 400 {
		name := nodeName(rng.IntN(size))
		switch p := rng.IntN(100); {
		case down[name]:
			if p < 30 {
				restart(name)
			}
		case p < 65:
			k, v := fmt.Sprint("k", rng.IntN(30)), fmt.Sprint("v", step)
			if rng.IntN(20) == 0 {
				v = strings.Repeat(v, 1000) // too large for a packet
			}
			c.put(name, k, v)
			want[name][k] = v
		case p < 85:
			k := fmt.Sprint("k", rng.IntN(30))
			if err := c.nodes[name].Delete(k); err != nil {
				t.Fatal(err)
			}
			delete(want[name], k)
		case p < 88 && len(down) < 5:
			c.kill(name)
			down[name] = true
		case p < 90:
			names := c.names()
			rng.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
			cut := rng.IntN(len(names))
			c.split(names[:cut], names[cut:])
		case p < 92: // one direction only
			c.net.Block(nodeAddr(name).Addr(), nodeAddr(nodeName(rng.IntN(size))).Addr())
		case p < 94:
			c.net.Heal()
		}
		advance(time.Duration(rng.IntN(1000)) * time.Millisecond)
	}
	for i := range size {
		if down[nodeName(i)] {
			restart(nodeName(i))
		}
	}
	c.net.Heal()
	took := c.waitConverged(ConvergenceBound)
	t.Logf("converged after %v", took)

	for owner, entries := range want {
		got := c.nodes["n00"].Snapshot()[owner]
		if len(got.Entries) != len(entries) {
			t.Errorf("%s has %d entries, want %d", owner, len(got.Entries), len(entries))
		}
		for k, v := range entries {
			if string(got.Entries[k]) != v {
				t.Errorf("%s %s = %.20q, want %.20q", owner, k, got.Entries[k], v)
			}
		}
	}
}

// TestHundredNodesConvergeAfterPartitionUnderLoss is what ConvergenceBound says.
func TestHundredNodesConvergeAfterPartitionUnderLoss(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds; run without -short")
	}
	inBubble(t, func(t *testing.T) {
		c := newCluster(t, 1)
		for i := range 100 {
			c.start(nodeName(i))
			advance(20 * time.Millisecond)
		}
		c.waitConverged(ConvergenceBound)
		c.net.SetLoss(0.2)
		names := c.names()
		c.split(names[:50], names[50:])
		for i := range 100 {
			c.put(names[i], fmt.Sprint("k", i%7), fmt.Sprint(i))
			advance(200 * time.Millisecond)
		}
		// Longer than detection: with half of their probes unanswered the nodes
		// distrust themselves, and probe eight times as slowly.
		c.waitState(2*detection, names[:50], "n99", Suspended)
		c.net.Heal()
		t.Logf("converged after %v", c.waitConverged(ConvergenceBound))
	})
}

func TestLossOfContactSuspendsAndHeals(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 9)
		for _, name := range c.names() {
			c.put(name, "k", "v1")
		}
		c.waitConverged(3 * time.Second)
		a, b := c.names()[:4], c.names()[4:]
		c.split(a, b)
		for _, name := range b {
			c.waitState(detection, a, name, Suspended)
		}
		// Long enough for memberlist to forget the dead entirely.
		advance(5 * time.Minute)
		c.put("n00", "k", "v2")
		c.put("n08", "k", "v2")
		c.waitEntry(3*time.Second, a, "n00", "k", "v2")
		c.waitEntry(0, a, "n08", "k", "v1")
		c.net.Heal()
		took := c.waitConverged(ConvergenceBound)
		t.Logf("converged %v after a partition of 5 minutes", took)
		c.waitState(0, c.names(), "n08", Alive)
		c.waitEntry(0, c.names(), "n08", "k", "v2")
	})
}

func TestSuspendedNodeResumesWithoutRestart(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 4)
		c.put("n03", "k", "v")
		advance(time.Second)
		c.split([]string{"n03"}, c.others("n03"))
		c.waitState(detection, c.others("n03"), "n03", Suspended)
		advance(time.Hour)
		c.waitEntry(0, c.others("n03"), "n03", "k", "v")
		c.net.Heal()
		c.waitState(ConvergenceBound, c.others("n03"), "n03", Alive)
		if inc := c.nodes["n00"].Snapshot()["n03"].Incarnation; inc != (Incarnation{Start: 1}) {
			t.Errorf("it changed its incarnation to %v", inc)
		}
	})
}

func TestOneWayPartitionStillSpreadsChanges(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 5)
		c.net.Block(nodeAddr("n00").Addr(), nodeAddr("n01").Addr())
		for i := range 20 {
			c.put("n00", fmt.Sprint("k", i), "v")
			advance(100 * time.Millisecond)
		}
		c.waitEntry(ConvergenceBound, c.names(), "n00", "k19", "v")
	})
}

func TestNodeReturnsUnderAnotherAddress(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 5)
		c.put("n04", "k", "old")
		advance(time.Second)
		c.kill("n04")
		moved := netip.MustParseAddrPort("10.0.9.9:7947")
		c.start("n04", func(conf *Config) {
			conf.BindAddr = moved
			conf.Transport = c.net.Listen(moved)
		})
		c.put("n04", "k", "new")
		c.waitEntry(3*time.Second, c.names(), "n04", "k", "new")
		// memberlist takes the new address once the old one is dead.
		advance(detection)
		c.waitConverged(ConvergenceBound)
		if s := c.nodes["n00"].Snapshot()["n04"]; s.Addr != moved || s.State != Alive {
			t.Errorf("n04 is %v at %v, want alive at %v", s.State, s.Addr, moved)
		}
	})
}

func TestIncarnationSetBackIsOutbid(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 3)
		c.lives["n02"] = 1000
		c.kill("n02")
		c.start("n02")
		c.put("n02", "k", "1001")
		c.waitConverged(ConvergenceBound)
		c.kill("n02")
		c.lives["n02"] = 5 // its clock was set back
		n := c.start("n02")
		c.put("n02", "k", "6")
		if err := n.Complete(); err != nil {
			t.Fatal(err)
		}
		c.waitEntry(ConvergenceBound, c.names(), "n02", "k", "6")
		c.waitConverged(ConvergenceBound)
		if got := n.Snapshot()["n02"].Incarnation; got != (Incarnation{Start: 1001}).next(6) {
			t.Errorf("incarnation %v, want the next of 1001 for process 6", got)
		}
	})
}

func TestTombstonesAreCollectedAndDoNotResurrect(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 4)
		for i := range 50 {
			c.put("n00", fmt.Sprint("k", i), "v")
		}
		advance(3 * time.Second)
		c.split([]string{"n03"}, c.others("n03"))
		for i := range 49 {
			if err := c.nodes["n00"].Delete(fmt.Sprint("k", i)); err != nil {
				t.Fatal(err)
			}
		}
		advance(TombstoneTTL + time.Minute)
		c.put("n00", "last", "v") // carries the floor
		advance(3 * time.Second)
		for _, name := range []string{"n00", "n01", "n02"} {
			n := c.nodes[name]
			n.mu.Lock()
			if got := len(n.replica.tables["n00"].records); got != 2 {
				t.Errorf("%s still holds %d records, want 2", name, got)
			}
			n.mu.Unlock()
		}
		c.net.Heal()
		c.waitConverged(ConvergenceBound)
		if e := c.nodes["n03"].Snapshot()["n00"].Entries; len(e) != 2 {
			t.Errorf("n03 has %d entries, want 2", len(e))
		}
	})
}
