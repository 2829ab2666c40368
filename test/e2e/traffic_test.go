package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"sluice/test/cluster"
)

// asked is what becomes of requests that are made all the time, until end is called
// or the test ends.
type asked struct {
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup
	mu   sync.Mutex
	sums map[string]summary
	runs map[string]int
	late map[string]int // of the runs: with an answer after lateAfter
}

// lateAfter is when the kernel sends the first packet of a connection again, in
// milliseconds (RFC 6298, 2.1).
const lateAfter = 1000

// waits is how long a request waits for its answer: a process stands still for more than
// a second at times on a busy machine, and an emulated processor does. What is late is
// told; what never comes is a failure, and so is what was sent twice.
const waits = "5s"

// emulated says whether this kernel is a process of another, see test/vm.
func emulated() bool {
	info, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && strings.Contains(string(info), "User Mode Linux")
}

// asking begins with no requests.
func asking(t *testing.T) *asked {
	t.Helper()
	a := &asked{sums: make(map[string]summary), runs: make(map[string]int), late: make(map[string]int)}
	a.ctx, a.stop = context.WithCancel(t.Context())
	t.Cleanup(func() { a.stop(); a.wg.Wait() })
	return a
}

// by makes requests by one way. once runs `probe get` for a second, and again: a run
// ends by itself, for one that is killed would not say what it saw.
func (a *asked) by(t *testing.T, who string, once func(ctx context.Context, args ...string) (string, error), args ...string) {
	a.wg.Go(func() {
		for a.ctx.Err() == nil {
			out, err := once(context.WithoutCancel(a.ctx), append([]string{"get", "--summary", "--for", "1s", "--timeout", waits}, args...)...)
			var s summary
			if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
				t.Errorf("%s: %v, %v", who, jerr, err)
				return
			}
			a.mu.Lock()
			sum := a.sums[who]
			sum.OK, sum.Failed, sum.Resent = sum.OK+s.OK, sum.Failed+s.Failed, sum.Resent+s.Resent
			if sum.Errors == nil {
				sum.Errors = make(map[string]int)
			}
			for text, n := range s.Errors {
				sum.Errors[text] += n
			}
			a.sums[who] = sum
			a.runs[who]++
			if s.Slowest > lateAfter && s.Failed == 0 {
				a.late[who]++
			}
			a.mu.Unlock()
		}
	})
}

// inside makes requests from a container to a virtual IP: new connections, and single
// datagrams, of which none may be lost.
func (a *asked) inside(t *testing.T, i int, container, vip string) {
	h := lab.Host(i)
	once := func(ctx context.Context, args ...string) (string, error) {
		return h.InContainer(ctx, container, append([]string{"/probe"}, args...)...)
	}
	a.by(t, "connections of "+h.Name()+" to the virtual IP", once, "--every", "50ms", vip)
	a.by(t, "datagrams of "+h.Name()+" to the virtual IP", once, "--udp", "--every", "25ms", vip)
	a.by(t, "requests of "+h.Name()+" on connections that are kept, to the virtual IP", once, "--keep", "--for", longRun, "--every", "25ms", vip)
}

// longRun is how long a client that keeps its connection asks before it says what it
// saw, and begins anew.
const longRun = "5s"

// outside makes requests from a client outside to a port that a node publishes.
func (a *asked) outside(t *testing.T, c *cluster.Client, h *cluster.Host, port int, args ...string) {
	a.by(t, strings.Join(append([]string{"requests to port", strconv.Itoa(port), "of", h.Name()}, args...), " "), func(ctx context.Context, args ...string) (string, error) {
		return c.Exec(ctx, append([]string{probe()}, args...)...)
	}, append(append([]string{"--every", "50ms"}, args...), netip.AddrPortFrom(h.Addr(), uint16(port)).String())...)
}

// keepAsking makes requests from a client outside by all nodes.
func keepAsking(t *testing.T, c *cluster.Client, port int, args ...string) *asked {
	t.Helper()
	a := asking(t)
	for _, h := range lab.Hosts() {
		a.outside(t, c, h, port, args...)
	}
	return a
}

// failed is how many requests have failed so far, of those that ended a second ago.
func (a *asked) failed() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	sum := 0
	for _, s := range a.sums {
		sum += s.Failed
	}
	return sum
}

// why is what the failed ones said, by who made them.
func (a *asked) why() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out strings.Builder
	for _, who := range slices.Sorted(maps.Keys(a.sums)) {
		if s := a.sums[who]; s.Failed > 0 {
			fmt.Fprintf(&out, "\n%s: %v", who, s.Errors)
		}
	}
	return out.String()
}

// end stops the requests and demands that none has failed.
func (a *asked) end(t *testing.T, during string) {
	t.Helper()
	a.stop()
	a.wg.Wait()
	for who, s := range a.sums {
		t.Logf("%s, %s: %d requests, in %d runs, of which %d had a late one", during, who, s.OK, a.runs[who], a.late[who])
		// A processor that stands still does so now and then; packets that get lost
		// make requests late again and again.
		if a.late[who] > 1+a.runs[who]/10 {
			t.Errorf("%s, %s: late in %d of %d runs", during, who, a.late[who], a.runs[who])
		}
		if !s.lossless() {
			t.Errorf("%s, %s: %+v", during, who, s)
		}
	}
}
