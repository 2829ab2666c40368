package expiry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

const (
	network = model.NetworkID("net")
	web     = model.ServiceID("web")
	db      = model.ServiceID("db")
)

func addr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 0, byte(n)}) }

// endpoint is a running task of a service, in a namespace named by its number.
func endpoint(n int, s model.ServiceID, idle int) model.Endpoint {
	return model.Endpoint{
		Network: network, Addr: addr(n), Phase: model.Taken, Sandbox: fmt.Sprint("/ns/", n),
		Task: model.Task{Service: s, Ready: true}, Options: model.ServiceOptions{Idle: idle},
	}
}

func viewOf(endpoints ...model.Endpoint) model.View {
	v := model.View{Endpoints: map[model.EndpointID]model.Endpoint{}, Services: map[model.ServiceID]model.Service{}}
	for i, e := range endpoints {
		e.ID = model.EndpointID(fmt.Sprint("e", i))
		v.Endpoints[e.ID] = e
	}
	return v
}

// tells adds a manager's word on a service.
func tells(v model.View, s model.ServiceID, idle int) model.View {
	v.Services = maps.Clone(v.Services)
	v.Services[s] = model.Service{ID: s, Options: map[model.NetworkID]model.ServiceOptions{network: {Idle: idle}}}
	return v
}

func TestTargetsAreTasksOfServicesWithALimit(t *testing.T) {
	change := func(f func(*model.Endpoint)) model.Endpoint {
		e := endpoint(3, web, 60)
		f(&e)
		return e
	}
	at := func(limit time.Duration) []Target {
		return []Target{{Service: web, Sandbox: "/ns/3", Addr: addr(3), Idle: limit}}
	}
	leaves := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	drains := func(e *model.Endpoint) { e.Options.Idle, e.Options.Drain, e.Leaves = 0, 30, leaves }
	for _, c := range []struct {
		name string
		view model.View
		want []Target
	}{
		{"the manager's word decides", tells(viewOf(endpoint(3, web, 60)), web, 90), at(90 * time.Second)},
		{"also if it is that there is no limit", tells(viewOf(endpoint(3, web, 60)), web, 0), nil},
		{"the task's own options, where none has told", viewOf(endpoint(3, web, 60)), at(time.Minute)},
		{"no limit", viewOf(endpoint(3, web, 0)), nil},
		{"less than no limit", viewOf(endpoint(3, web, -1)), nil},
		{"a limit that no number can hold", viewOf(endpoint(3, web, 1<<62)), at(maxLimit)},
		{"a container of no service", viewOf(endpoint(3, "", 60)), nil},
		{"a task that the engine has not fetched", viewOf(change(func(e *model.Endpoint) { e.Phase = model.Joined })), nil},
		{"a task without a namespace", viewOf(change(func(e *model.Endpoint) { e.Sandbox = "" })), nil},
		{"a leaving task", viewOf(change(func(e *model.Endpoint) { e.Left = true })), at(time.Minute)},
		{"one task with two records", viewOf(endpoint(3, web, 60), endpoint(3, web, 60)), at(time.Minute)},
		{"two", viewOf(endpoint(3, web, 60), endpoint(4, db, 10)), []Target{
			{Service: db, Sandbox: "/ns/4", Addr: addr(4), Idle: 10 * time.Second},
			{Service: web, Sandbox: "/ns/3", Addr: addr(3), Idle: time.Minute},
		}},
		{"one that drains", viewOf(change(drains)), []Target{{Service: web, Sandbox: "/ns/3", Addr: addr(3), End: leaves.Add(30 * time.Second)}}},
		{"of which the manager says that it need not", tells(viewOf(change(drains)), web, 0), nil},
		{"one that would, if it left", viewOf(change(func(e *model.Endpoint) { e.Options.Idle, e.Options.Drain = 0, 30 })), nil},
		{"one that leaves, and need not", viewOf(change(func(e *model.Endpoint) { e.Options.Idle, e.Leaves = 0, leaves })), nil},
		{"a time to drain that no number can hold", viewOf(change(func(e *model.Endpoint) { drains(e); e.Options.Drain = 1 << 62 })), []Target{
			{Service: web, Sandbox: "/ns/3", Addr: addr(3), End: leaves.Add(maxLimit)},
		}},
	} {
		if d := cmp.Diff(c.want, Targets(c.view), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
}

func TestPeriodFollowsLimit(t *testing.T) {
	for limit, want := range map[time.Duration]time.Duration{
		time.Second: time.Second, 10 * time.Second: time.Second, time.Minute: 6 * time.Second,
		5 * time.Minute: 30 * time.Second, 3 * time.Hour: 30 * time.Second, maxLimit: 30 * time.Second,
	} {
		if got := period(limit); got != want {
			t.Errorf("%s: every %s, want %s", limit, got, want)
		}
	}
}

// world is a kernel with connections, a view, and a log. mu guards all of it.
type world struct {
	mu        sync.Mutex
	view      model.View
	views     int // times that the view was asked for
	probes    int
	lists     map[string]int // by sandbox
	noProbe   error
	noList    error
	noEnd     error
	sandboxes map[string]bool
	last      map[kernel.Conn]time.Time // when data last went, by what does not change
	where     map[kernel.Conn]string
	log       bytes.Buffer
}

func newWorld(v model.View) *world {
	w := &world{view: v, lists: map[string]int{}, sandboxes: map[string]bool{}, last: map[kernel.Conn]time.Time{}, where: map[kernel.Conn]string{}}
	for _, e := range v.Endpoints {
		w.sandboxes[e.Sandbox] = true
	}
	return w
}

// open makes a connection to task n.
func (w *world) open(n int) kernel.Conn {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := kernel.Conn{Local: netip.AddrPortFrom(addr(n), 80), Cookie: uint64(len(w.where) + 1), Served: true}
	w.last[c], w.where[c] = time.Now(), fmt.Sprint("/ns/", n)
	return c
}

// still is c without what changes.
func still(c kernel.Conn) kernel.Conn {
	c.Idle = 0
	return c
}

func (w *world) speak(c kernel.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last[c] = time.Now()
}

func (w *world) lives(c kernel.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, there := w.last[c]
	return there
}

func (w *world) Probe() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.probes++
	return w.noProbe
}

func (w *world) Accepted(_ context.Context, sandbox string, a netip.Addr) ([]kernel.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lists[sandbox]++
	if w.noList != nil {
		return nil, w.noList
	}
	if !w.sandboxes[sandbox] {
		return nil, kernel.ErrNotExist
	}
	var out []kernel.Conn
	for c, at := range w.last {
		if w.where[c] == sandbox && c.Local.Addr() == a {
			c.Idle = time.Since(at)
			out = append(out, c)
		}
	}
	return out, nil
}

func (w *world) End(_ context.Context, sandbox string, conns []kernel.Conn) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for _, c := range conns {
		if c.Idle > 0 && time.Since(w.last[still(c)]) < c.Idle {
			continue
		}
		c = still(c)
		if _, there := w.last[c]; there && w.where[c] == sandbox {
			delete(w.last, c)
			n++
		}
	}
	return n, w.noEnd
}

func (w *world) View() model.View {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.views++
	return w.view
}

// Write makes world the place of the log, which tests read.
func (w *world) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(b)
}

// set changes the world.
func (w *world) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// logged are the lines of the log that have text.
func (w *world) logged(text string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for l := range strings.Lines(w.log.String()) {
		if strings.Contains(l, text) {
			n++
		}
	}
	return n
}

// run runs f beside an Ender, in time that passes at once.
func run(t *testing.T, w *world, f func(*Ender)) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		e := New(Config{View: w.View, Sockets: w, Log: slog.New(slog.NewTextHandler(w, nil))})
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.Run(ctx)
		}()
		synctest.Wait()
		f(e)
		cancel()
		<-done
	})
}

// pass lets time pass, and what is then due be done.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestSilentConnectionsEndAtTheLimit(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 60), endpoint(4, db, 0)))
	run(t, w, func(e *Ender) {
		silent, busy, unlimited := w.open(3), w.open(3), w.open(4)
		pass(30 * time.Second)
		young := w.open(3)
		w.speak(busy)
		pass(29 * time.Second)
		if !w.lives(silent) {
			t.Error("one silent for 59 s has ended")
		}
		pass(7 * time.Second) // to the limit, and a tenth of it
		if w.lives(silent) || !w.lives(busy) || !w.lives(young) || !w.lives(unlimited) {
			t.Errorf("silent lives: %v, busy: %v, young: %v, without a limit: %v",
				w.lives(silent), w.lives(busy), w.lives(young), w.lives(unlimited))
		}
		w.speak(busy)
		pass(36 * time.Second)
		if w.lives(young) || !w.lives(busy) {
			t.Errorf("young lives: %v, busy: %v", w.lives(young), w.lives(busy))
		}
		if got := e.Ended(); len(got) != 1 || got[web] != 2 {
			t.Errorf("ended %v, want 2 of web", got)
		}
		if asked, why := e.State(); !asked || why != nil {
			t.Errorf("state: %v, %v", asked, why)
		}
		if w.lists["/ns/4"] != 0 || w.lists["/ns/3"] != 1+102/6 || w.probes != 1 {
			t.Errorf("looked %v, probed %d", w.lists, w.probes)
		}
	})
}

func TestNothingIsDoneWhereNobodyAsks(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 0)))
	run(t, w, func(e *Ender) {
		pass(24 * time.Hour)
		if asked, why := e.State(); asked || why != nil || w.views != 1 || w.probes != 0 || len(w.lists) != 0 {
			t.Errorf("asked %v, %v; %d views, %d probes, lists %v; want one view and no more", asked, why, w.views, w.probes, w.lists)
		}
		// A limit that comes is kept from the next view on, and one that goes no more.
		c := w.open(3)
		w.set(func() { w.view = tells(w.view, web, 60) })
		e.Wake()
		pass(viewGap + 66*time.Second)
		if w.lives(c) {
			t.Error("a silent connection has not ended")
		}
		c = w.open(3)
		w.set(func() { w.view = tells(w.view, web, 0) })
		e.Wake()
		pass(viewGap)
		before := w.views
		pass(24 * time.Hour)
		if !w.lives(c) || w.views != before {
			t.Errorf("after the limit has gone: the connection lives: %v, %d more views", w.lives(c), w.views-before)
		}
		if got := e.Ended(); got[web] != 1 {
			t.Errorf("ended %v, want 1", got)
		}
		w.set(func() { w.view = viewOf() })
		e.Wake()
		pass(viewGap)
		if got := e.Ended(); len(got) != 0 {
			t.Errorf("of a service that nobody knows any more: %v", got)
		}
	})
}

func TestOldConnectionsEndAtTheStart(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 3600)))
	old := kernel.Conn{Local: netip.AddrPortFrom(addr(3), 80), Cookie: 1, Served: true}
	w.where[old], w.last[old] = "/ns/3", time.Time{} // the bubble's clock starts in the year 2000
	run(t, w, func(*Ender) {
		if w.lives(old) {
			t.Error("it waits for the first period")
		}
	})
}

func TestViewsThatChangeMakeNoLooks(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 3600)))
	run(t, w, func(e *Ender) {
		for range 100 {
			e.Wake()
			pass(100 * time.Millisecond)
		}
		if w.lists["/ns/3"] != 1 || w.views > 11 {
			t.Errorf("%d looks and %d views in 10 s, want one look, and a view each second", w.lists["/ns/3"], w.views)
		}
	})
}

func TestTroubleIsLoggedOncePerReason(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 10)))
	run(t, w, func(e *Ender) {
		w.set(func() { w.noList = errors.New("the kernel sulks") })
		pass(time.Minute)
		if n := w.logged("level=WARN"); n != 1 {
			t.Errorf("logged %d times, want once:\n%s", n, &w.log)
		}
		w.set(func() { w.noList, w.noEnd = nil, errors.New("half of it") })
		c := w.open(3)
		pass(time.Minute)
		if n := w.logged("half of it"); n != 1 || w.lives(c) || e.Ended()[web] != 1 {
			t.Errorf("logged %d times, ended %v", n, e.Ended())
		}
		w.set(func() { w.noEnd, w.noList = nil, errors.New("the kernel sulks") })
		pass(time.Minute)
		if n := w.logged("the kernel sulks"); n != 2 {
			t.Errorf("a trouble that has come again is logged %d times, want twice", n)
		}
		// The task has ended before the view says so.
		w.set(func() { w.noList = nil; w.sandboxes = nil })
		pass(time.Minute)
		if n := w.logged("level=WARN"); n != 3 {
			t.Errorf("logged %d times, want 3:\n%s", n, &w.log)
		}
	})
}

func TestKernelWithoutTheFeatureIsSaid(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 10)))
	w.noProbe = fmt.Errorf("ending %w", kernel.ErrUnsupported)
	run(t, w, func(e *Ender) {
		c := w.open(3)
		for range 100 {
			e.Wake()
			pass(time.Second)
		}
		asked, why := e.State()
		if !asked || !errors.Is(why, kernel.ErrUnsupported) || !w.lives(c) || len(w.lists) != 0 {
			t.Errorf("state: %v, %v; lists %v", asked, why, w.lists)
		}
		if n := w.logged("level=ERROR"); n != 1 || w.probes != 4 {
			t.Errorf("logged %d times, probed %d times in 100 s; want once and 4 times", n, w.probes)
		}
		w.set(func() { w.noProbe = nil }) // its module is loaded
		pass(probeAgain + time.Second)
		if asked, why := e.State(); !asked || why != nil || w.lives(c) {
			t.Errorf("state: %v, %v, the connection lives: %v", asked, why, w.lives(c))
		}
	})
}

func TestOverIsWhatHasHadItsTime(t *testing.T) {
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		name     string
		idle     time.Duration
		end      time.Time
		want     []uint64 // cookies
		whatever bool     // they have said since
	}{
		{"silent for the limit", 10 * time.Second, time.Time{}, []uint64{1, 3}, false},
		{"at the end, all", 0, now, []uint64{1, 2, 3, 4}, true},
		{"after it, all, silent or not", 10 * time.Second, now.Add(-time.Hour), []uint64{1, 2, 3, 4}, true},
		{"before it, none", 0, now.Add(1), nil, false},
		{"before it, the silent", 10 * time.Second, now.Add(1), []uint64{1, 3}, false},
	} {
		conns := []kernel.Conn{
			{Cookie: 1, Idle: 10 * time.Second, Served: true}, {Cookie: 2, Idle: 10*time.Second - 1, Served: true},
			{Cookie: 3, Idle: time.Hour, Served: true}, {Cookie: 4, Idle: time.Hour},
		}
		var got []uint64
		for _, o := range (Target{Idle: c.idle, End: c.end}).Over(conns, now) {
			got = append(got, o.Cookie)
			if (o.Idle == 0) != c.whatever {
				t.Errorf("%s: %+v", c.name, o)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestConnectionsOfALeavingTaskEndWithItsDrain(t *testing.T) {
	w := newWorld(viewOf(endpoint(3, web, 0), endpoint(4, web, 0)))
	run(t, w, func(e *Ender) {
		busy, silent, other := w.open(3), w.open(3), w.open(4)
		pass(time.Minute)
		leaves := time.Now()
		w.set(func() {
			for id, e := range w.view.Endpoints {
				if e.Options.Drain = 30; e.Addr == addr(3) {
					e.Leaves = leaves
				}
				w.view.Endpoints[id] = e
			}
		})
		e.Wake()
		pass(29 * time.Second)
		if !w.lives(busy) || !w.lives(silent) {
			t.Error("ended before its time")
		}
		w.speak(busy)
		pass(time.Second)
		if w.lives(busy) || w.lives(silent) || !w.lives(other) {
			t.Errorf("after the drain: busy %t, silent %t, of another task %t", w.lives(busy), w.lives(silent), w.lives(other))
		}
		late := w.open(3)
		pass(2 * time.Second)
		if w.lives(late) || e.Ended()[web] != 3 {
			t.Errorf("one that came late lives: %t; ended %v", w.lives(late), e.Ended())
		}
		if n := w.lists["/ns/4"]; n != 0 {
			t.Errorf("a task that stays was looked at %d times", n)
		}
	})
}
