package reconcile_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kernel"
)

// told is what the kernel tells a loop.
type told struct {
	mu sync.Mutex
	n  kernel.Notices
}

func (o *told) take() kernel.Notices {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.n
	o.n = kernel.Notices{}
	return n
}

// tell has the kernel say what an object is now.
func (f *fixture) tell(k kernel.Key, now kernel.Value) {
	f.told.mu.Lock()
	f.told.n.Tell(k, now)
	f.told.mu.Unlock()
	f.Notice()
}

func (f *fixture) dumps() int {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	return len(f.kernel.dumps)
}

func (f *fixture) damage(i int) {
	f.kernel.with(func() { delete(f.kernel.state, object(i)) })
}

func TestOnlyANoticeOfSomethingElseIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Second)
		before := f.dumps()
		for range 100 {
			f.tell(object(1), kernel.SysctlSpec{Value: "1"}) // as it is
			f.tell(object(2), kernel.SysctlSpec{Value: "1"}) // nobody's
			time.Sleep(time.Millisecond)
		}
		if n := f.dumps() - before; n != 0 {
			t.Errorf("%d dumps for notices of what is known", n)
		}
		f.damage(1)
		f.tell(object(1), nil)
		synctest.Wait()
		if !f.has(1) {
			t.Error("not mended at once")
		}
	})
}

func TestAStormOfNoticesIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Second)
		before, rounds := f.dumps(), f.Stats().Rounds
		for range 10000 {
			f.tell(object(1), nil) // a lie, again and again
			time.Sleep(100 * time.Microsecond)
		}
		n := f.dumps() - before
		if n < 10 || n > 21 {
			t.Errorf("%d dumps in a second, want one in 50 ms", n)
		}
		if r := f.Stats().Rounds - rounds; r > uint64(n)+1 {
			t.Errorf("%d rounds for %d dumps: a notice that has to wait is a round", r, n)
		}
	})
}

func TestADumpThatTakesLongIsDoneLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.kernel.slow = 100 * time.Millisecond
		f.wait(t, f.wish(add(1)))
		f.Doubt()
		time.Sleep(time.Second)
		before := f.dumps()
		for range 1000 {
			f.tell(object(1), nil)
			time.Sleep(2 * time.Millisecond)
		}
		if n := f.dumps() - before; n < 4 || n > 6 {
			t.Errorf("%d dumps of 100 ms in two seconds, want one in 400 to 500 ms", n)
		}
	})
}

func TestDriftIsCountedByKindAmidOwnChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1, 2)))
		time.Sleep(time.Second)
		f.damage(1)
		f.tell(object(1), nil)
		f.wait(t, f.wish(add(3))) // perhaps the same round
		synctest.Wait()
		st := f.Stats()
		if st.Drift != 1 || st.Drifts[kernel.KindSysctl] != 1 || len(st.Drifts) != len(kernel.Kinds()) {
			t.Errorf("drift %d, by kind %v; want one sysctl and every kind named", st.Drift, st.Drifts)
		}
	})
}

// TestADefaultRouteThatGoesIsNoDrift: a task that ends loses it first.
func TestADefaultRouteThatGoesIsNoDrift(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		mesh := kernel.TaskMesh{Sandbox: "/run/a", Addr: netip.MustParseAddr("10.0.0.2")}
		spec := kernel.TaskMeshSpec{Pool: netip.MustParsePrefix("250.0.0.0/8"), UDP: true}
		f.wait(t, f.wish(func(want kernel.State) { want[mesh] = spec }))
		found := func(change func(*kernel.TaskMeshSpec)) uint64 {
			other := spec
			change(&other)
			f.kernel.with(func() { f.kernel.state[mesh] = other })
			f.Doubt()
			time.Sleep(time.Second)
			synctest.Wait()
			f.kernel.with(func() {
				if got := f.kernel.state[mesh]; got != spec {
					t.Errorf("%v is not mended", got)
				}
			})
			return f.Stats().Drift
		}
		if n := found(func(s *kernel.TaskMeshSpec) { s.Default = netip.MustParseAddr("172.18.0.6") }); n != 0 {
			t.Errorf("counted %d changes of the engine's own", n)
		}
		if n := found(func(s *kernel.TaskMeshSpec) { s.Pool = netip.MustParsePrefix("251.0.0.0/8") }); n != 1 {
			t.Errorf("counted %d changes by another hand, want 1", n)
		}
	})
}

func TestDriftIsLoggedOnceWithItsCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		var many []int
		for i := range 20 {
			many = append(many, i)
		}
		f.wait(t, f.wish(add(many...)))
		time.Sleep(time.Second)
		for _, i := range many {
			f.damage(i)
			f.tell(object(i), nil)
		}
		time.Sleep(time.Second)
		f.damage(1)
		time.Sleep(interval)
		synctest.Wait()
		lines := f.logged("drift mended")
		if len(lines) != 1 || !strings.Contains(lines[0], "objects=20") || !strings.Contains(lines[0], "object0 gone") || !strings.Contains(lines[0], "first=") {
			t.Errorf("want one line with cause, number and the first ones, and the next within a minute only counted:\n%s", strings.Join(lines, "\n"))
		}
		if n := f.Stats().Drift; n != 21 {
			t.Errorf("counted %d, want 21", n)
		}
	})
}

func TestAFightIsSummedUpAndTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Second)
		const minutes = 5
		for i := range minutes * 60 {
			if i == 3 && len(f.Stats().Fights) > 0 {
				t.Error("three times is no fight yet")
			}
			f.damage(1)
			f.tell(object(1), nil)
			time.Sleep(time.Second)
		}
		synctest.Wait()
		lines := f.logged("drift mended")
		if n := len(lines); n < minutes || n > minutes+2 {
			t.Errorf("%d lines in %d minutes, want one in each:\n%s", n, minutes, strings.Join(lines, "\n"))
		}
		fights := f.Stats().Fights
		if len(fights) != 1 || fights[0].Times != minutes*60 || fights[0].What != "sysctl in namespace sluice-a" {
			t.Errorf("fights: %+v", fights)
		}
		time.Sleep(3 * time.Minute)
		if fights := f.Stats().Fights; len(fights) > 0 {
			t.Errorf("it has ended, and is told: %+v", fights)
		}
		if last := f.logged("drift mended"); len(last) > minutes+3 {
			t.Errorf("%d lines, after its end too", len(last))
		}
		total := 1
		for _, l := range f.logged("again and again") {
			var n int
			if _, err := fmt.Sscanf(l[strings.Index(l, "times="):], "times=%d", &n); err != nil {
				t.Error(err)
			}
			total += n
		}
		if total != minutes*60 {
			t.Errorf("the lines tell of %d, want %d", total, minutes*60)
		}
	})
}

// logged are the lines of the loop's log with the text.
func (f *fixture) logged(text string) []string {
	f.log.mu.Lock()
	defer f.log.mu.Unlock()
	var out []string
	for l := range strings.Lines(f.log.b.String()) {
		if strings.Contains(l, text) {
			out = append(out, strings.TrimSpace(l))
		}
	}
	return out
}

// logBook is a log that is read while it is written.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *logBook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(b, nil)) }
