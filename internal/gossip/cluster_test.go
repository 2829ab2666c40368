package gossip

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/gossip/memnet"
)

// inBubble runs f in virtual time. It is the one place to guard such runs.
func inBubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// advance lets virtual time pass; only for use in a bubble.
func advance(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

var (
	keyA = []byte("0123456789abcdef0123456789abcdef")
	keyB = []byte("fedcba9876543210fedcba9876543210")
)

// cluster is a set of nodes on one memnet.Net.
type cluster struct {
	t     testing.TB
	net   *memnet.Net
	nodes map[string]*Node
	lives map[string]uint64
	log   *slog.Logger
}

func newCluster(t testing.TB, seed uint64) *cluster {
	c := &cluster{t: t, net: memnet.New(seed), nodes: make(map[string]*Node), lives: make(map[string]uint64)}
	c.log = slog.New(slog.DiscardHandler)
	t.Cleanup(c.close)
	return c
}

// linger is how long memberlist's goroutines outlive Shutdown: a probe of a node
// in bad health lasts eight intervals of a second. Time stands still in a bubble
// whose main goroutine has ended, so that one has to wait for them.
const linger = 10 * time.Second

func (c *cluster) close() {
	for _, name := range c.names() {
		c.kill(name)
	}
	advance(linger)
}

// name and address of node i: n00, 10.0.0.1:7947.
func nodeName(i int) string { return fmt.Sprintf("n%02d", i) }

func nodeAddr(name string) netip.AddrPort {
	var i byte
	if _, err := fmt.Sscanf(name, "n%d", &i); err != nil {
		panic(err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, i + 1}), DefaultPort)
}

// start starts a node in its next incarnation, with the first three as seeds.
func (c *cluster) start(name string, opts ...func(*Config)) *Node {
	c.t.Helper()
	c.lives[name]++
	conf := Config{
		Name:        name,
		Incarnation: c.lives[name],
		BindAddr:    nodeAddr(name),
		Keys:        [][]byte{keyA},
		Seeds:       []netip.AddrPort{nodeAddr("n00"), nodeAddr("n01"), nodeAddr("n02")},
		Logger:      c.log.With("self", name),
		Transport:   c.net.Listen(nodeAddr(name)),
	}
	for _, o := range opts {
		o(&conf)
	}
	n, err := New(conf)
	if err != nil {
		c.t.Fatal(err)
	}
	c.nodes[name] = n
	return n
}

// startN starts n nodes and waits until they agree.
func startN(t testing.TB, n int) *cluster {
	t.Helper()
	c := newCluster(t, 1)
	for i := range n {
		c.start(nodeName(i))
	}
	c.waitConverged(ConvergenceBound)
	return c
}

func (c *cluster) kill(name string) {
	c.t.Helper()
	if err := c.nodes[name].Close(); err != nil {
		c.t.Error(err)
	}
	delete(c.nodes, name)
}

func (c *cluster) names() []string { return slices.Sorted(maps.Keys(c.nodes)) }

// split cuts all links between two groups.
func (c *cluster) split(a, b []string) {
	for _, x := range a {
		for _, y := range b {
			c.net.Block(nodeAddr(x).Addr(), nodeAddr(y).Addr())
			c.net.Block(nodeAddr(y).Addr(), nodeAddr(x).Addr())
		}
	}
}

func (c *cluster) put(name, key, value string) {
	c.t.Helper()
	if err := c.nodes[name].Put(key, []byte(value)); err != nil {
		c.t.Fatal(err)
	}
}

// show renders what a node sees, one line per owner and entry.
func show(s Tables) []string {
	var lines []string
	for _, owner := range slices.Sorted(maps.Keys(s)) {
		t := s[owner]
		lines = append(lines, fmt.Sprintf("%s %s %s inc %s seq %d complete %t", owner, t.Addr, t.State, t.Incarnation, t.Seq, t.Complete))
		for _, k := range slices.Sorted(maps.Keys(t.Entries)) {
			lines = append(lines, fmt.Sprintf("%s  %s=%.40s", owner, k, t.Entries[k]))
		}
	}
	return lines
}

// difference compares all nodes' snapshots with that of the first, and each
// node's table with its own; empty if there is none.
func (c *cluster) difference() string {
	var b strings.Builder
	names := c.names()
	first := show(c.nodes[names[0]].Snapshot())
	for _, name := range names[1:] {
		if d := cmp.Diff(first, show(c.nodes[name].Snapshot())); d != "" {
			fmt.Fprintf(&b, "%s (-) and %s (+) differ:\n%s", names[0], name, d)
		}
	}
	for _, name := range names {
		own := c.nodes[name].Snapshot()[name]
		if copied := c.nodes[names[0]].Snapshot()[name]; copied.Incarnation != own.Incarnation || copied.Seq != own.Seq {
			fmt.Fprintf(&b, "%s knows %s as %v/%d, it is %v/%d\n", names[0], name, copied.Incarnation, copied.Seq, own.Incarnation, own.Seq)
		}
	}
	return b.String()
}

// waitConverged waits until all nodes show the same and returns how long it took.
func (c *cluster) waitConverged(bound time.Duration) time.Duration {
	c.t.Helper()
	return c.wait(bound, "same tables everywhere", c.difference)
}

// wait polls until problem returns "", and fails with its text after bound.
func (c *cluster) wait(bound time.Duration, what string, problem func() string) time.Duration {
	c.t.Helper()
	start := time.Now()
	for {
		p := problem()
		took := time.Since(start)
		if p == "" {
			return took
		}
		if took >= bound {
			c.t.Fatalf("%s: not within %v:\n%s", what, bound, p)
		}
		advance(50 * time.Millisecond)
	}
}

// waitEntry waits until all of the named nodes see owner's key with this value;
// "" stands for absent.
func (c *cluster) waitEntry(bound time.Duration, names []string, owner, key, value string) {
	c.t.Helper()
	c.wait(bound, fmt.Sprintf("%s of %s is %q", key, owner, value), func() string {
		for _, name := range names {
			if got := string(c.nodes[name].Snapshot()[owner].Entries[key]); got != value {
				return fmt.Sprintf("on %s it is %q\n%s", name, got, strings.Join(show(c.nodes[name].Snapshot()), "\n"))
			}
		}
		return ""
	})
}

// waitState waits until all of the named nodes see owner in state s; 0 stands
// for no table.
func (c *cluster) waitState(bound time.Duration, names []string, owner string, s State) {
	c.t.Helper()
	c.wait(bound, fmt.Sprintf("%s is in state %v", owner, s), func() string {
		for _, name := range names {
			if got := c.nodes[name].Snapshot()[owner].State; got != s {
				return fmt.Sprintf("on %s it is %v", name, got)
			}
		}
		return ""
	})
}

func (c *cluster) others(name string) []string {
	return slices.DeleteFunc(c.names(), func(s string) bool { return s == name })
}
