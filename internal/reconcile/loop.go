package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
}

// Limits of a round and of its repetition.
const (
	// maxDeletes bounds the deletions of one round: deleting a veth waits for an
	// RCU grace period of 17-20 ms, and Docker's calls wait for the round to end.
	maxDeletes = 16
	// Backoff after a failed round: the first retry is quick, because the usual
	// cause (a task's namespace not there yet) lasts some 100 ms.
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
	// minDumpGap keeps notices that our own changes cause from making every
	// round a dump.
	minDumpGap = 50 * time.Millisecond
	// lastTime bounds the work after the end was asked for. The engine gives a
	// plugin 10 s between SIGTERM and SIGKILL, for everything.
	lastTime = 3 * time.Second
)

// Loop is the reconciler. Its methods may be called from any goroutine; Run
// only once.
type Loop struct {
	cfg     Config
	trigger chan struct{} // capacity 1: a pending "look again"
	inspect chan chan<- inspection

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu    sync.Mutex
	dirty bool // the remembered state is in doubt
	last  Round
	done  uint64        // revision that the last round worked on
	ended chan struct{} // closed and replaced when a round ends
	stats Stats
}

// New makes a loop; Run starts it.
func New(cfg Config) *Loop {
	if cfg.Interval == 0 {
		cfg.Interval = 5 * time.Second
	}
	return &Loop{
		cfg: cfg, trigger: make(chan struct{}, 1), inspect: make(chan chan<- inspection),
		dirty: true, ended: make(chan struct{}),
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

// Doubt asks for a round that reads the kernel back first.
func (l *Loop) Doubt() {
	l.mu.Lock()
	l.dirty = true
	l.mu.Unlock()
	l.Trigger()
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
	return l.stats
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
		case <-l.trigger:
		case <-w.timer.C:
		}
		w.timer.Reset(w.round(work))
	}
}

// finish does what no round has done yet.
func (w *worker) finish(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lastTime)
	defer cancel()
	for ctx.Err() == nil && !w.dumped.IsZero() && w.rev != w.cfg.View().Revision {
		before := w.Stats().Failures
		w.round(ctx)
		if w.Stats().Failures != before || w.stale {
			return // the next start tries again
		}
	}
}

// worker is what only the loop's goroutine touches.
type worker struct {
	*Loop
	timer   *time.Timer
	have    kernel.State
	dumped  time.Time // of have
	stale   bool      // have must be read back, whatever its age
	backoff time.Duration
	due     time.Time // of the next repetition, while backoff is not 0
	rev     uint64    // of the last round without failure
	failing map[kernel.Key]string
}

// round does one pass and returns when the next is due at the latest.
func (w *worker) round(ctx context.Context) time.Duration {
	start := time.Now()
	view := w.cfg.View()
	want := w.cfg.Plan(view)

	w.mu.Lock()
	age := start.Sub(w.dumped) // huge before the first
	// Age counts in every round, not only in those of the timer, which a steady
	// flow of triggers would put off for ever.
	fresh := w.stale || age >= w.cfg.Interval || w.dirty && age >= minDumpGap
	if fresh {
		w.dirty = false
	}
	later := w.dirty
	w.mu.Unlock()

	if fresh {
		have, err := w.cfg.Kernel.Dump(ctx, sandboxes(view))
		w.mu.Lock()
		w.stats.DumpError = ""
		if err != nil {
			w.stats.DumpError = err.Error()
		}
		w.mu.Unlock()
		if err != nil {
			if ctx.Err() == nil {
				w.cfg.Log.Warn("kernel could not be read, nothing is changed", "err", err)
			}
			w.stale = true
			return w.retry()
		}
		w.have, w.dumped, w.stale = have, start, false
	}

	var read kernel.State
	if fresh {
		read = w.have
	}
	ops := kernel.Diff(w.have, want)
	if view.Partial {
		ops = slices.DeleteFunc(ops, func(o kernel.Op) bool { return o.Have != nil })
	}
	ops, postponed := postpone(ops)
	if len(ops) == 0 && len(w.have) == len(want) {
		// Nothing differs: one map serves as both. A large swarm's has some ten
		// thousand objects, which would be held twice.
		w.have = want
	}
	failed := w.apply(ctx, ops)
	drift := 0
	if fresh && view.Revision == w.rev {
		for _, o := range ops {
			if failed[o.Key] == nil {
				drift++
				w.cfg.Log.Info("drift mended", "op", o.String())
			}
		}
	}

	round := Round{View: view, Want: want, Have: w.have, Read: read, Failed: failed, Drift: drift}
	w.mu.Lock()
	w.last, w.done = round, view.Revision
	w.last.Read = nil // for observers, who are told now; kept, it would hold a third copy
	w.stats.Rounds++
	if fresh {
		w.stats.Dumps++
		w.stats.LastDump = w.dumped
	}
	w.stats.Ops += uint64(len(ops))
	w.stats.Failures += uint64(len(failed))
	w.stats.Drift += uint64(drift)
	w.stats.LastRound = time.Since(start)
	close(w.ended)
	w.ended = make(chan struct{})
	w.mu.Unlock()
	if w.cfg.Observe != nil {
		w.cfg.Observe(round)
	}

	if len(failed) > 0 {
		return w.retry()
	}
	w.backoff = 0
	if postponed {
		w.Trigger()
	} else {
		w.rev = view.Revision
	}
	if later {
		return minDumpGap
	}
	return w.cfg.Interval - time.Since(w.dumped)
}

// look compares the kernel with the plan.
func (w *worker) look(ctx context.Context) inspection {
	view := w.cfg.View()
	have, err := w.cfg.Kernel.Dump(ctx, sandboxes(view))
	if err != nil {
		return inspection{err: err}
	}
	return inspection{ops: kernel.Diff(have, w.cfg.Plan(view))}
}

// apply does ops, keeps the remembered state true to what was done, and
// returns what failed. A failure puts the whole state in doubt.
func (w *worker) apply(ctx context.Context, ops []kernel.Op) map[kernel.Key]error {
	failed := make(map[kernel.Key]error)
	failing := make(map[kernel.Key]string)
	results := w.cfg.Kernel.Apply(ctx, ops)
	good := make([]kernel.Op, 0, len(ops))
	debug := w.cfg.Log.Enabled(ctx, slog.LevelDebug) // a start makes some 10,000 lines
	for i, op := range ops {
		if err := results[i]; err != nil {
			failed[op.Key] = err
			failing[op.Key] = err.Error()
			if w.failing[op.Key] != err.Error() {
				w.logFailure(op, err)
				w.backoff = 0 // what fails for the first time is tried again soon
			}
			continue
		}
		good = append(good, op)
		if debug {
			w.cfg.Log.Debug("applied", "op", op.String())
		}
	}
	w.failing = failing
	w.have = kernel.Apply(w.have, good)
	if len(failed) > 0 {
		w.stale = true
	}
	return failed
}

// logFailure tells of a new failure once. That something is not there yet is
// how a task's start looks from here, and heals itself.
func (w *worker) logFailure(op kernel.Op, err error) {
	level := slog.LevelWarn
	if errors.Is(err, kernel.ErrNotExist) {
		level = slog.LevelDebug
	}
	w.cfg.Log.Log(context.Background(), level, "kernel change refused, will be retried", "op", op.String(), "err", err)
}

// retry is the time to the next repetition. A round that a trigger brought
// before it was due does not put it off.
func (w *worker) retry() time.Duration {
	now := time.Now()
	if w.backoff == 0 || !now.Before(w.due) {
		w.backoff = min(max(2*w.backoff, minBackoff), maxBackoff)
		w.due = now.Add(w.backoff)
	}
	return w.due.Sub(now)
}

// postpone cuts the deletions of a round to maxDeletes. Deletions of VIP
// objects are part of a transaction and stay.
func postpone(ops []kernel.Op) ([]kernel.Op, bool) {
	n := 0
	kept := slices.DeleteFunc(slices.Clone(ops), func(o kernel.Op) bool {
		if o.Want != nil || o.Key.Phase() == kernel.PhaseVIP {
			return false
		}
		n++
		return n > maxDeletes
	})
	return kept, n > maxDeletes
}

// sandboxes lists the paths of the tasks' namespaces that are worth looking
// into, in order, each once: that of a task on several networks is the place of
// as many endpoints.
func sandboxes(v model.View) []string {
	out := make([]string, 0, len(v.Endpoints))
	for _, e := range v.Endpoints {
		if e.Phase == model.Taken && e.Sandbox != "" {
			out = append(out, e.Sandbox)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
