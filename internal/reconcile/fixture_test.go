package reconcile_test

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

// interval is the loop's in these tests.
const interval = 5 * time.Second

// fake is a kernel whose objects are sysctls, which need nothing to stand on.
type fake struct {
	mu     sync.Mutex
	state  kernel.State
	fail   map[kernel.Key]error
	dumpTo error         // what a dump fails with
	dumps  []time.Time   // when each was asked for
	rounds [][]kernel.Op // what each Apply was given, if anything
	boxes  []string      // what the last dump was asked to look into
	delay  time.Duration // how long an Apply takes
	slow   time.Duration // how long a Dump takes
}

func (f *fake) Dump(_ context.Context, sandboxes []string) (kernel.State, error) {
	if f.slow > 0 {
		time.Sleep(f.slow) // in virtual time
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dumps = append(f.dumps, time.Now())
	f.boxes = sandboxes
	if f.dumpTo != nil {
		// What it has read so far is a trap for whoever looks at it.
		return kernel.State{object(99): kernel.SysctlSpec{}}, f.dumpTo
	}
	return maps.Clone(f.state), nil
}

func (f *fake) Apply(_ context.Context, ops []kernel.Op) []error {
	if f.delay > 0 {
		time.Sleep(f.delay) // in virtual time
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(ops) > 0 {
		f.rounds = append(f.rounds, ops)
	}
	out := make([]error, len(ops))
	for i, o := range ops {
		if out[i] = f.fail[o.Key]; out[i] == nil {
			f.state = kernel.Apply(f.state, []kernel.Op{o})
		}
	}
	return out
}

func (f *fake) with(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func object(i int) kernel.Key { return kernel.Sysctl{NS: "sluice-a", Name: fmt.Sprintf("object%d", i)} }

// fixture is a loop whose plan is a set of objects that the test changes.
type fixture struct {
	*reconcile.Loop
	kernel *fake
	told   *told
	log    *logBook

	mu       sync.Mutex
	rev      uint64
	want     kernel.State
	observed []reconcile.Round
	unread   bool // what observes rounds asks for another each time
	ended    chan struct{}
	cancel   context.CancelFunc
}

// start runs a loop in the bubble until the test ends.
func start(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{
		kernel: &fake{state: kernel.State{}, fail: map[kernel.Key]error{}},
		told:   &told{}, log: &logBook{},
		want: kernel.State{}, rev: 1, ended: make(chan struct{}),
	}
	f.Loop = reconcile.New(reconcile.Config{
		Kernel: f.kernel,
		View: func() model.View {
			f.mu.Lock()
			defer f.mu.Unlock()
			return model.View{Revision: f.rev}
		},
		Plan: func(model.View) kernel.State {
			f.mu.Lock()
			defer f.mu.Unlock()
			return maps.Clone(f.want)
		},
		Observe: func(r reconcile.Round) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.observed = append(f.observed, r)
			if f.unread {
				f.Doubt()
			}
		},
		Notices: f.told.take, Log: f.log.logger(), Interval: interval,
	})
	ctx, cancel := context.WithCancel(t.Context())
	f.cancel = cancel
	go func() {
		defer close(f.ended)
		f.Run(ctx)
	}()
	t.Cleanup(f.stop)
	synctest.Wait() // the first round, which reads the kernel back
	return f
}

// stop ends the loop and waits for it: the bubble fails if anything is left.
func (f *fixture) stop() {
	f.cancel()
	<-f.ended
}

// wish makes objects wanted, or no longer, in a new revision.
func (f *fixture) wish(change func(want kernel.State)) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f.want)
	f.rev++
	return f.rev
}

func add(objects ...int) func(kernel.State) {
	return func(s kernel.State) {
		for _, i := range objects {
			s[object(i)] = kernel.SysctlSpec{Value: "1"}
		}
	}
}

func (f *fixture) wait(t *testing.T, rev uint64) reconcile.Round {
	t.Helper()
	r, err := f.Wait(t.Context(), rev)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (f *fixture) has(i int) bool {
	f.kernel.mu.Lock()
	defer f.kernel.mu.Unlock()
	_, ok := f.kernel.state[object(i)]
	return ok
}
