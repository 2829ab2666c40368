package expiry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Sockets lists and ends connections; internal/linux/sockets does.
type Sockets interface {
	// Probe says whether the kernel can; the error wraps kernel.ErrUnsupported if
	// it cannot, any other says that it could not be found out.
	Probe() error
	// Accepted lists the connections that clients have opened to addr in the
	// namespace at path sandbox, Served or not; kernel.ErrNotExist: there is no such
	// namespace.
	Accepted(ctx context.Context, sandbox string, addr netip.Addr) ([]kernel.Conn, error)
	// End ends those of conns that have said nothing since for more than their Idle,
	// and says how many, also with an error.
	End(ctx context.Context, sandbox string, conns []kernel.Conn) (int, error)
}

// Config is what an Ender is made of.
type Config struct {
	View    func() model.View // the newest view; must not block
	Sockets Sockets
	Log     *slog.Logger
}

// probeAgain is between two probes of a kernel that lacks what is needed, or did
// not answer: a module may be loaded by then.
const probeAgain = 30 * time.Second

// viewGap is between two looks at views: each new one has to be made, which a node
// with ten thousand endpoints around it feels, and limits are in seconds.
const viewGap = time.Second

// Ender ends connections. Its methods may be called from any goroutine, Run
// only once.
type Ender struct {
	cfg   Config
	woken chan struct{} // capacity 1: a pending "look again"

	// Of Run alone:
	able   bool                 // the kernel was probed and can
	probe  time.Time            // before this the kernel is not probed again
	due    map[Target]time.Time // the next look at each
	failed map[Target]string    // why the last look at it failed

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu    sync.Mutex
	asked bool  // some service of this node's tasks has a limit
	why   error // why limits are not kept; nil if they are
	ended map[model.ServiceID]uint64
}

// New makes an Ender; Run starts it.
func New(cfg Config) *Ender {
	return &Ender{
		cfg: cfg, woken: make(chan struct{}, 1),
		due: map[Target]time.Time{}, failed: map[Target]string{}, ended: map[model.ServiceID]uint64{},
	}
}

// Wake says that the view has changed. It does not wait.
func (e *Ender) Wake() {
	select {
	case e.woken <- struct{}{}:
	default:
	}
}

// State says whether a service of this node's tasks has a limit, and why limits are
// not kept here: nil if they are, or if none has been asked for so far. It wraps
// kernel.ErrUnsupported if the kernel cannot end connections.
func (e *Ender) State() (asked bool, why error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.asked, e.why
}

// Ended counts the connections that were ended since the start, by service. A
// service of which nobody knows any more is left out.
func (e *Ender) Ended() map[model.ServiceID]uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.ended)
}

// Run works until ctx ends. While no service of this node's tasks has a limit, it
// only looks at views that are new.
func (e *Ender) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var woken <-chan struct{} // nil while a look is near anyway
	for {
		select {
		case <-ctx.Done():
			return
		case <-woken:
			// The first of many: the rest is waited for.
			timer.Reset(viewGap)
			woken = nil
			continue
		case <-timer.C:
		}
		woken = e.woken
		if next, some := e.look(ctx); some {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
	}
}

// look visits the targets that are due, and says when the next one is; there is
// none if no service has a limit.
func (e *Ender) look(ctx context.Context) (next time.Time, some bool) {
	v := e.cfg.View()
	targets := Targets(v)
	e.forget(v, targets)
	if len(targets) == 0 {
		return time.Time{}, false
	}
	if !e.ready() {
		return e.probe, true
	}
	for _, t := range targets {
		// One that is new is looked at now: after a restart its connections are old.
		if !time.Now().Before(e.due[t]) && ctx.Err() == nil {
			e.visit(ctx, t)
			e.due[t] = t.next(time.Now())
		}
		if at := e.due[t]; !some || at.Before(next) {
			next, some = at, true
		}
	}
	return next, some
}

// forget drops what is kept of targets and services that have gone.
func (e *Ender) forget(v model.View, targets []Target) {
	there, serves := make(map[Target]bool, len(targets)), map[model.ServiceID]bool{}
	for _, t := range targets {
		there[t], serves[t.Service] = true, true
	}
	maps.DeleteFunc(e.due, func(t Target, _ time.Time) bool { return !there[t] })
	maps.DeleteFunc(e.failed, func(t Target, _ string) bool { return !there[t] })
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = len(targets) > 0
	maps.DeleteFunc(e.ended, func(id model.ServiceID, _ uint64) bool {
		_, known := v.Services[id]
		return !known && !serves[id]
	})
}

// ready reports whether the kernel can end connections. It is asked when that is
// first needed, and again later if it cannot.
func (e *Ender) ready() bool {
	if e.able {
		return true
	}
	if time.Now().Before(e.probe) {
		return false
	}
	err := e.cfg.Sockets.Probe()
	e.able, e.probe = err == nil, time.Now().Add(probeAgain)
	e.mu.Lock()
	before := e.why
	e.why = err
	e.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		e.cfg.Log.Error("connections are not ended; services on this node have an idle timeout, or tasks to drain", "err", err)
	case err == nil && before != nil:
		e.cfg.Log.Info("connections are ended from now on")
	}
	return e.able
}

// visit ends what is over the limit in one task.
func (e *Ender) visit(ctx context.Context, t Target) {
	conns, err := e.cfg.Sockets.Accepted(ctx, t.Sandbox, t.Addr)
	n := 0
	if over := t.Over(conns, time.Now()); err == nil && len(over) > 0 {
		n, err = e.cfg.Sockets.End(ctx, t.Sandbox, over)
	}
	if n > 0 {
		e.mu.Lock()
		e.ended[t.Service] += uint64(n)
		e.mu.Unlock()
		e.cfg.Log.Debug("connections ended", "service", t.Service, "op", fmt.Sprintf("%d to %s", n, t.Addr))
	}
	if errors.Is(err, kernel.ErrNotExist) || ctx.Err() != nil {
		err = nil // the task has just ended, which the view is yet to tell; or this process ends
	}
	if err == nil {
		delete(e.failed, t)
		return
	}
	if e.failed[t] != err.Error() {
		e.failed[t] = err.Error()
		e.cfg.Log.Warn("connections could not be ended, will be retried", "service", t.Service, "op", t.Addr.String(), "err", err)
	}
}
