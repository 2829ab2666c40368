package dockerapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"sluice/internal/model"
)

// Config is what a Reader needs.
type Config struct {
	Socket   string // path of the engine's API socket as this process sees it; dialled anew for each session
	PluginID string // of this plugin: its name is asked of the engine. Empty: Name is used
	Name     string // of the driver, with its tag (sluice:latest), until the engine has told another
	Log      *slog.Logger

	dial dialer // tests put an engine in memory here
}

// Status is how the reading goes, for people and metrics.
type Status struct {
	Serving bool   // the engine answers and its event stream is open
	API     string // the version agreed upon
	Trouble string // why the last session ended, or did not begin; empty while serving
	Events  uint64
	Parts   []PartStatus
}

// PartStatus is how the reading of one part goes.
type PartStatus struct {
	Name     string
	At       time.Time // when the last good reading was asked for
	Err      string    // of the last reading; empty: it was good
	Reads    uint64
	Failures uint64
}

// Reader follows one engine. Make it with New, start it with Run; the other
// methods may be called from any goroutine at any time and do not block.
type Reader struct {
	cfg     Config
	changed chan struct{}

	// mu guards what follows. Nothing else is locked while it is held, and nothing
	// waits for the engine under it.
	mu     sync.Mutex
	known  known
	snap   model.EngineSnapshot
	status Status
	counts map[string]PartStatus
	parts  []*part // of the session; nil between sessions
}

// New makes a Reader. It fails only if the configuration cannot be right.
func New(cfg Config) (*Reader, error) {
	if cfg.Socket == "" && cfg.dial == nil {
		return nil, errors.New("docker engine: no socket path; set the path of docker.sock as the plugin sees it")
	}
	if cfg.PluginID == "" && cfg.Name == "" {
		return nil, errors.New("docker engine: neither the plugin's id nor its name is known, so its networks cannot be told from others")
	}
	if cfg.dial == nil {
		cfg.dial = unixDialer(cfg.Socket)
	}
	r := &Reader{cfg: cfg, changed: make(chan struct{}, 1), counts: make(map[string]PartStatus)}
	r.known.alias = cfg.Name
	r.snap = r.known.snapshot()
	return r, nil
}

// Snapshot is all that is known now. It shares its maps with other snapshots:
// they are never changed, and must not be.
func (r *Reader) Snapshot() model.EngineSnapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.snap
}

// Changed receives after the snapshot has changed; several changes may be one
// signal. It is for one receiver. The time of a poll alone is no change.
func (r *Reader) Changed() <-chan struct{} { return r.changed }

// Refresh asks for a reading of everything soon: the caller knows of a change
// that the engine may not have told yet.
func (r *Reader) Refresh() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.parts {
		p.look()
	}
}

// Status is how the reading goes.
func (r *Reader) Status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	st := r.status
	for _, name := range partNames {
		if c, ok := r.counts[name]; ok {
			st.Parts = append(st.Parts, c)
		}
	}
	return st
}

// Run follows the engine until ctx ends, through all its restarts. It returns
// when everything that it started has ended, and never for another reason.
func (r *Reader) Run(ctx context.Context) error {
	var backoff time.Duration
	for {
		began := time.Now()
		err := r.session(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// A session that lived long ended because the engine did: try again at once.
		if time.Since(began) > lastBackoff+pingTimeout {
			backoff = 0
		}
		backoff = grow(backoff)
		r.endSession(err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(backoff):
		}
	}
}

// session connects, subscribes and reads until the event stream ends.
func (r *Reader) session(ctx context.Context) error {
	e, err := connect(ctx, r.cfg.dial)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		if err := e.close(); err != nil {
			r.cfg.Log.Warn("connection to the engine was not closed cleanly", "err", err)
		}
	}()
	stream, err := subscribe(ctx, cancel, e) // before anything is read, so that no change falls in between
	if err != nil {
		return err
	}
	s := newSession(r, e)
	r.mu.Lock()
	r.parts = s.parts()
	r.status.Serving, r.status.API, r.status.Trouble = true, e.api, ""
	r.mu.Unlock()
	r.cfg.Log.Info("engine serves", "api", e.api)

	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, p := range s.parts() {
		wg.Go(func() { p.run(ctx) })
	}
	return s.follow(ctx, stream)
}

// endSession keeps all that is known, and believes none of it.
func (r *Reader) endSession(err error) {
	r.mu.Lock()
	was := r.status
	r.parts = nil
	r.status.Serving, r.status.Trouble = false, err.Error()
	r.mu.Unlock()
	if was.Serving || was.Trouble != err.Error() { // once, not at every try
		r.cfg.Log.Warn("engine does not serve; trying again until it does", "err", err)
	}
	r.update(func(k *known) { k.doubt() })
}

// update changes what is known and tells of it.
func (r *Reader) update(change func(*known)) {
	r.mu.Lock()
	change(&r.known)
	next := r.known.snapshot()
	news := !same(r.snap, next)
	r.snap = next
	r.mu.Unlock()
	if news {
		select {
		case r.changed <- struct{}{}:
		default:
		}
	}
}

// pollDone notes a reading of the cluster that was asked for at a time. Two in a
// second find nothing new in most cases, so those are made cheap.
func (r *Reader) pollDone(at time.Time, take func(*known)) {
	r.mu.Lock()
	if take == nil && r.known.clusterValid && r.known.nodesValid {
		r.known.clusterAt = at
		if r.snap.ServicesValid {
			r.snap.ServicesAt = at
		}
		r.mu.Unlock()
		return
	}
	r.mu.Unlock()
	r.update(func(k *known) {
		if take != nil {
			take(k)
		}
		k.clusterAt, k.clusterValid, k.nodesValid = at, true, true
	})
}

// nodesRead notes when the nodes that are known were asked for.
func (r *Reader) nodesRead(at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known.nodesAt = at
	r.snap.Follows = r.known.follows()
	if r.snap.Leader {
		r.snap.LeaderAt = at
	}
}

// count notes how a reading went.
func (r *Reader) count(name string, started time.Time, err error) {
	r.mu.Lock()
	c := r.counts[name]
	was := c.Err
	c.Name = name
	c.Reads++
	if err == nil {
		c.At, c.Err = started, ""
	} else {
		c.Failures++
		c.Err = err.Error()
	}
	r.counts[name] = c
	r.mu.Unlock()
	switch {
	case err != nil && was != err.Error():
		r.cfg.Log.Warn("engine was not understood or did not answer; trying again", "part", name, "err", err)
	case err == nil && was != "":
		r.cfg.Log.Info("engine answers again", "part", name)
	}
}

// describe is for errors that are made of an id.
func describe(id model.NetworkID, err error) error {
	return fmt.Errorf("network %s: %w", id.Short(), err)
}
