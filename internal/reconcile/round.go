package reconcile

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Limits of a round and of its repetition.
const (
	// maxDeletes bounds the deletions of one round: deleting a veth waits for an
	// RCU grace period of 17-20 ms, and Docker's calls wait for the round to end.
	maxDeletes = 16
	// Backoff after a failed round: the first retry is quick, because the usual
	// cause (a task's namespace not there yet) lasts some 100 ms.
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
	// Dumps that are asked for come with a pause of dumpShare times what the last one
	// took, so that a storm of notices costs a fifth of one processor: a node with 100
	// endpoints takes some milliseconds, iptables included. The pause is not shorter than
	// what tells of one change take to come, nor longer than leaves a change mended
	// within a second: where a dump takes more than an eighth of one, a storm costs more.
	minDumpGap = 50 * time.Millisecond
	maxDumpGap = 500 * time.Millisecond
	dumpShare  = 4
	// lastTime bounds the work after the end was asked for. The engine gives a
	// plugin 10 s between SIGTERM and SIGKILL, for everything.
	lastTime = 3 * time.Second
)

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
	took    time.Duration // the last dump
	causes  []string      // why the next dump is needed, as far as notices told
}

// judge compares what the kernel told with what is remembered. If they differ it
// is needed to read the kernel back, not before the time returned.
func (w *worker) judge(now time.Time) (in time.Duration, needed bool) {
	told := w.cfg.Notices()
	if w.dumped.IsZero() {
		return 0, false // the first round reads it anyway
	}
	causes := told.Contradicts(w.have)
	if len(causes) == 0 {
		return 0, false
	}
	for _, c := range causes {
		if len(w.causes) < maxCauses && !slices.Contains(w.causes, c) {
			w.causes = append(w.causes, c)
		}
	}
	w.mu.Lock()
	w.dirty = true
	w.mu.Unlock()
	return max(0, w.gap()-now.Sub(w.dumped)), true
}

// gap is the time from one dump to the next that is asked for.
func (w *worker) gap() time.Duration {
	return w.took + min(max(minDumpGap, dumpShare*w.took), maxDumpGap)
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
	fresh := w.stale || age >= w.cfg.Interval || w.dirty && age >= w.gap()
	if fresh {
		w.dirty = false
		w.causes = append(w.causes, w.suspicions...)
		w.suspicions = nil
	}
	later := w.dirty
	w.mu.Unlock()

	before, sure := w.have, !w.stale && !w.dumped.IsZero() // what was remembered, and whether it was right
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
		w.have, w.dumped, w.stale, w.took = have, start, false, time.Since(start)
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
	drifted := ops[:0:0]
	if fresh {
		for _, o := range ops {
			// Another revision asks for changes of its own: drift is what would have been
			// right by what was remembered, and what the engine does is none.
			if failed[o.Key] == nil && !o.Follows() && (view.Revision == w.rev || sure && w.rev != 0 && right(before, o)) {
				drifted = append(drifted, o)
			}
		}
		w.tell(drifted, start)
		w.causes = nil
	}
	drift := len(drifted)

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
		if pause := w.retry(); !later || pause < minDumpGap {
			return pause
		}
		return minDumpGap
	}
	w.backoff = 0
	if postponed {
		w.Trigger()
	} else {
		w.rev = view.Revision
	}
	if later {
		return max(0, w.gap()-time.Since(w.dumped))
	}
	return w.cfg.Interval - time.Since(w.dumped)
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
