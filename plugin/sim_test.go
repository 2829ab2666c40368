package main

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/gossip"
	"sluice/internal/gossip/memnet"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/model"
)

// Seeds of TestWhateverTheNetworkDoes: -sim.seeds=5000 for a longer look,
// -sim.seed=17 for one, with what happened in it.
var (
	simSeeds = flag.Int("sim.seeds", 200, "seeds of the simulated swarm to run")
	simSeed  = flag.Int64("sim.seed", -1, "the one seed to run; -1 for as many as sim.seeds says")
)

// Bounds of the simulation, from the moment in which every node reaches every other
// and every process runs, until all nodes have the same tables and every kernel balances
// over the same backends.
const (
	// agreement is what gossip promises for its tables, and what a node needs from
	// there: one look at its engine (restPeriod) and one round of the loop, which
	// is at most as late as a read-back (5 s).
	agreement = gossip.ConvergenceBound + restPeriod + 5*time.Second
	// settling is view's settleTime: two nodes that have lost their state wait for
	// each other's whole word, and give that up after it.
	settling = time.Minute
	// keying is how long a node that has one key of two may not hear the leader
	// before it asks for the other, and the longest pause of the asking.
	keying = apartFor + lastPause
	// setBack is view's setBackAfter: a node whose clock was set back seems to tell what
	// was before to those that knew it in a former life.
	setBack = 30 * time.Second
	// forgetting is what a plugin that was not told of a container's end waits until
	// it believes the engine's list: view's lostEndpoint, and a read-back.
	forgetting = 35 * time.Second
	// linger is how long memberlist's goroutines outlive a node; see gossip's tests.
	linger = 10 * time.Second
)

// world is a swarm with its hosts, and what happened to it.
type world struct {
	t    *testing.T
	seed uint64
	rng  *rand.Rand
	net  *memnet.Net

	mu       sync.Mutex // guards what snapshot and giveKeys read
	hosts    []*simHost
	leader   *simHost
	services []*simService
	tasks    []*simTask
	keys     int
	healed   bool

	loss              float64 // that stays when all else is healed
	untold            bool    // a plugin was not told that a container ended
	number, addresses int
	had               map[*simHost]map[*simTask]bool    // backends that its kernel balances over
	led               map[*simHost]map[*simService]bool // services that its kernel leads a published port to
	knows             map[*process]map[*simTask]knowledge
	begun             time.Time
	log               []string
	failed            bool
}

func (w *world) locked(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *world) note(format string, args ...any) {
	w.log = append(w.log, fmt.Sprintf("%8.3fs ", time.Since(w.begun).Seconds())+fmt.Sprintf(format, args...))
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.note(format, args...)
	w.failed = true
	w.t.Errorf(format, args...)
}

// pass lets virtual time pass.
func (w *world) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// TestWhateverTheNetworkDoes runs swarms of three to seven nodes through random cuts,
// loss, freezes, crashes and changes of the swarm, in virtual time. At every moment, no
// backend may go that nobody has spoken against, and none that has gone may come back, and
// no port of a service that is there may lead nowhere;
// once all is healed, all nodes must agree within the bounds above, without a restart.
//
// What happens follows from the seed. The nodes' own dice (whom to gossip with) and the
// order of goroutines do not, so a failure may take some runs of its seed to show again.
func TestWhateverTheNetworkDoes(t *testing.T) {
	// Worlds are small and make much garbage: a third of the time otherwise.
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	first, last := uint64(0), uint64(*simSeeds)
	if *simSeed >= 0 {
		first, last = uint64(*simSeed), uint64(*simSeed)+1
	}
	var mu sync.Mutex
	var slowest time.Duration
	var wg sync.WaitGroup
	seeds := make(chan uint64)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := range seeds {
				t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						took := simulate(t, seed)
						mu.Lock()
						defer mu.Unlock()
						slowest = max(slowest, took)
					})
				})
			}
		})
	}
	for seed := first; seed < last; seed++ {
		seeds <- seed
	}
	close(seeds)
	wg.Wait()
	t.Logf("%d seeds; the slowest agreed %v after the end of all faults", last-first, slowest)
}

// simulate runs one seed and returns how long the nodes took to agree.
func simulate(t *testing.T, seed uint64) time.Duration {
	w := &world{
		t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 7)), net: memnet.New(seed), keys: 1, addresses: 10,
		had: make(map[*simHost]map[*simTask]bool), led: make(map[*simHost]map[*simService]bool), knows: make(map[*process]map[*simTask]knowledge), begun: time.Now(),
	}
	size := 3 + w.rng.IntN(5)
	managers := 1 + w.rng.IntN(min(3, size))
	for i := range size {
		h := &simHost{
			id: model.NodeID(fmt.Sprintf("node%d00000000000000000000", i)), addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}),
			manager: i < managers, kernel: kerneltest.NewFake(), disk: newSimDisk(),
		}
		w.hosts = append(w.hosts, h)
		w.had[h], w.led[h] = make(map[*simTask]bool), make(map[*simService]bool)
	}
	w.leader = w.hosts[0]
	for _, h := range w.hosts {
		w.boot(h)
	}
	w.pass(time.Second)
	for range 2 {
		x := w.serve()
		for _, h := range w.hosts {
			if w.rng.IntN(3) > 0 {
				w.start(x, h)
			}
		}
	}
	w.news()
	defer func() {
		for _, h := range w.hosts {
			w.net.Thaw(h.addr)
		}
		for _, h := range w.hosts {
			if h.proc != nil {
				w.kill(h)
			}
		}
		w.pass(linger)
		if w.failed {
			t.Logf("what happened to the %d nodes, %d of them managers:\n%s", size, managers, strings.Join(w.log, "\n"))
		}
	}()
	if _, ok := w.agree(agreement); !ok {
		return 0
	}

	for range 25 + w.rng.IntN(25) {
		w.fault()
		for range 1 + w.rng.IntN(4) {
			w.obey()
			w.news()
			w.pass(time.Duration(100+w.rng.IntN(1400)) * time.Millisecond)
			if w.watch(); w.failed {
				return 0
			}
		}
	}

	bound := agreement
	for _, h := range w.hosts {
		if h.blank {
			bound = agreement + settling
		}
	}
	if w.keys > 1 {
		bound += keying
	}
	if slices.ContainsFunc(w.hosts, func(h *simHost) bool { return h.skew < 0 }) {
		bound += setBack
	}
	if w.untold {
		bound += forgetting
	}
	// What gossip promises, it does also while a fifth of all packets is lost.
	w.loss = []float64{0, 0.2}[w.rng.IntN(2)]
	lost := 0
	for _, h := range w.hosts {
		if h.proc != nil {
			for _, p := range h.proc.hub.Peers() {
				if !p.Present {
					lost++
				}
			}
		}
	}
	w.heal()
	took, _ := w.agree(bound)
	t.Logf("%d nodes with %d contacts lost agreed after %v; the bound is %v", size, lost, took, bound)
	return took
}

// heal ends every fault; what the swarm wants gone, goes.
func (w *world) heal() {
	w.note("all is healed")
	w.net.Heal()
	w.net.SetLoss(w.loss)
	w.net.SetTwice(0)
	w.net.SetDelay(time.Millisecond)
	for _, h := range w.hosts {
		if h.frozen {
			w.locked(func() { h.frozen = false })
			w.net.Thaw(h.addr)
		}
		if h.proc == nil {
			w.boot(h)
		}
	}
	w.locked(func() {
		w.healed = true
		if w.leader == nil {
			w.leader = w.hosts[0]
		}
	})
	w.obey()
}

// agree waits until the nodes agree with each other and with the swarm, and returns
// how long that took.
func (w *world) agree(bound time.Duration) (time.Duration, bool) {
	begun := time.Now()
	for {
		d := w.disagreement()
		took := time.Since(begun)
		if d == "" {
			return took, true
		}
		if took >= bound {
			w.fail("no agreement after %v: %s", took, d)
			return took, false
		}
		w.obey()
		w.pass(250 * time.Millisecond)
		if w.watch(); w.failed {
			return took, false
		}
	}
}
