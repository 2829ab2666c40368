package reconcile

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Kernel reads and changes the objects of one host; internal/linux is one.
type Kernel interface {
	// Dump reads every owned object, those in the tasks' namespaces at the given
	// paths included.
	Dump(ctx context.Context, sandboxes []string) (kernel.State, error)
	// Apply does ops in order and returns one result for each.
	Apply(ctx context.Context, ops []kernel.Op) []error
}

// Config is what a Loop is made of.
type Config struct {
	Kernel Kernel
	View   func() model.View             // the newest view; must not block
	Plan   func(model.View) kernel.State // plan.Host
	// Observe is told of every finished round, on the loop's goroutine. It may
	// change what View returns and call Trigger, but must not wait for the loop.
	Observe func(Round)
	// Notices takes what the kernel has told of changes since it was called last, see
	// Loop.Notice. All that it tells of an Apply is there when that returns. Nil:
	// nothing is ever told.
	Notices func() kernel.Notices
	Log     *slog.Logger

	// Interval is the longest time between two read-backs of the kernel, for
	// drift that gives no notice. Default 5 s: a read-back of a node with 100
	// endpoints costs a few milliseconds, 0.1 % of one processor.
	Interval time.Duration
}

// Round is the outcome of one pass.
type Round struct {
	View   model.View
	Want   kernel.State
	Have   kernel.State         // after the round, as far as known
	Read   kernel.State         // for Observe: as the kernel had it before this round's changes; nil if it was not read back
	Failed map[kernel.Key]error // wanted objects that could not be made or removed
	Drift  int                  // changes that no change of the view asked for
}

// Stats counts since the loop was made.
type Stats struct {
	Rounds, Dumps, Ops, Failures, Drift uint64
	LastRound                           time.Duration // how long the last round took
	LastDump                            time.Time     // when the kernel was last read back
	DumpError                           string        // why the last dump failed; empty if it did not

	// Drifts is Drift by kind of object, all of kernel.Kinds.
	Drifts map[string]uint64
	// Fights are what others change again and again, in order.
	Fights []Fight
}

// maxCauses is how many causes of a dump are kept; a log line has room for few.
const maxCauses = 3

// Loop is the reconciler. Its methods may be called from any goroutine; Run
// only once.
type Loop struct {
	cfg     Config
	trigger chan struct{} // capacity 1: a pending "look again"
	noticed chan struct{} // capacity 1: Config.Notices has something
	inspect chan chan<- inspection

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu    sync.Mutex
	dirty bool // the remembered state is in doubt
	// suspicions are causes of that doubt, not more than maxCauses.
	suspicions []string
	last       Round
	done       uint64        // revision that the last round worked on
	ended      chan struct{} // closed and replaced when a round ends
	stats      Stats
	drift      drifts
}

// New makes a loop; Run starts it.
func New(cfg Config) *Loop {
	if cfg.Interval == 0 {
		cfg.Interval = 5 * time.Second
	}
	return &Loop{
		cfg: cfg, trigger: make(chan struct{}, 1), noticed: make(chan struct{}, 1), inspect: make(chan chan<- inspection),
		dirty: true, ended: make(chan struct{}), drift: newDrifts(),
	}
}

// inspection is the answer to Inspect.
type inspection struct {
	ops []kernel.Op
	err error
}

// Inspect reads the kernel back and returns what would have to change, and
// changes nothing. It runs between two rounds, so that no half-done round is
// taken for a difference.
func (l *Loop) Inspect(ctx context.Context) ([]kernel.Op, error) {
	answer := make(chan inspection, 1)
	select {
	case l.inspect <- answer:
	case <-ctx.Done():
		return nil, fmt.Errorf("inspect the kernel: the loop is busy: %w", ctx.Err())
	}
	select {
	case a := <-answer:
		return a.ops, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("inspect the kernel: %w", ctx.Err())
	}
}

// Trigger asks for a round, soon.
func (l *Loop) Trigger() {
	select {
	case l.trigger <- struct{}{}:
	default:
	}
}

// Doubt asks for a round that reads the kernel back first. While it is in doubt already,
// such a round is under way or has its time: to ask again from Observe, where something
// is still to be read back, must not turn the wait for that time into rounds without end.
func (l *Loop) Doubt() {
	l.mu.Lock()
	was := l.dirty
	l.dirty = true
	l.mu.Unlock()
	if !was {
		l.Trigger()
	}
}

// Suspect is Doubt with a cause, for the log if there is drift.
func (l *Loop) Suspect(cause string) {
	l.mu.Lock()
	if len(l.suspicions) < maxCauses && !slices.Contains(l.suspicions, cause) {
		l.suspicions = append(l.suspicions, cause)
	}
	l.mu.Unlock()
	l.Doubt()
}

// Notice says that Config.Notices has something. It is compared with what the loop
// remembers; a round that reads the kernel back follows only if it does not go with
// that, which what our own changes cause does.
func (l *Loop) Notice() {
	select {
	case l.noticed <- struct{}{}:
	default:
	}
}

// Wait returns when a round has worked on revision rev or a later one, with
// that round. It asks for the round itself, if it is needed. The error is ctx's.
func (l *Loop) Wait(ctx context.Context, rev uint64) (Round, error) {
	for asked := false; ; asked = true {
		l.mu.Lock()
		done, last, ended := l.done, l.last, l.ended
		l.mu.Unlock()
		if done >= rev {
			return last, nil
		}
		if !asked {
			l.Trigger()
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return Round{}, fmt.Errorf("wait for the kernel to follow revision %d (it is at %d): %w", rev, done, ctx.Err())
		}
	}
}

// Last returns the last finished round.
func (l *Loop) Last() Round {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Stats returns the counters.
func (l *Loop) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := l.stats
	st.Drifts = maps.Clone(l.drift.kinds)
	st.Fights = l.drift.fights(time.Now())
	return st
}

// Run works until ctx ends. What was asked for by then is still done, if the
// kernel takes it within lastTime: a network that is removed just before the
// plugin is disabled must not stay behind.
func (l *Loop) Run(ctx context.Context) {
	w := worker{Loop: l, timer: time.NewTimer(0)}
	defer w.timer.Stop()
	// A round that has begun is finished: half of it would be left otherwise.
	work := context.WithoutCancel(ctx)
	for {
		select {
		case <-ctx.Done():
			w.finish(work)
			return
		case answer := <-l.inspect:
			answer <- w.look(work)
			continue
		case <-l.noticed:
			if in, needed := w.judge(time.Now()); !needed || in > 0 {
				if needed {
					w.timer.Reset(in)
				}
				continue
			}
		case <-l.trigger:
		case <-w.timer.C:
		}
		w.timer.Reset(w.round(work))
	}
}
