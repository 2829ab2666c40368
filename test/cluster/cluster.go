package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	// maxHosts keeps addresses inside the underlay's /24 and leaves room above
	// for clients from outside.
	maxHosts = 150
	// maxSocketPath is sizeof(sockaddr_un.sun_path) less its final zero (unix(7)).
	maxSocketPath = 107
	// downTimeout bounds Down: SIGKILL and rmdir take well under a second; what
	// takes longer hangs in the kernel.
	downTimeout = 30 * time.Second
)

// ErrNotRoot says that the caller cannot make namespaces and mounts.
var ErrNotRoot = errors.New("simulated Docker hosts need root")

// Options say what cluster to make.
type Options struct {
	// Hosts is the number of hosts, 1 to 150.
	Hosts int
	// Dir holds everything of the cluster: engines' data, logs, sockets. It is
	// removed by Down. Whatever an earlier run with the same Dir left is ended
	// and removed first, so tests should always use the same, short one; it may
	// not be under /run. Empty means sluice-PREFIX in the directory for
	// temporary files.
	Dir string
	// Prefix begins the hosts' names: h1, h2 and so on if it is "h" or empty.
	Prefix string
	// Engine is the root of a tree with another engine (see EngineTree), which
	// is never written to; empty means the machine's own dockerd.
	Engine string
	// EngineArgs are more arguments for every dockerd.
	EngineArgs []string
	// NoEngine leaves the engines stopped; see Host.StartEngine.
	NoEngine bool
	// Log receives what is done, at Info and Debug; nil means nobody listens.
	Log *slog.Logger
}

// Cluster is a set of hosts that reach each other. Its methods may be called
// concurrently, but for Down, which must come last.
type Cluster struct {
	o        Options
	log      *slog.Logger
	claimed  *os.File // holds the lock on Dir
	book     *ledger
	underlay *box
	hosts    []*Host

	cutMu sync.Mutex  // guards cuts and drops, and the underlay's filter while it is written
	cuts  [][2]string // pairs of ports between which nothing passes
	drops []string    // rules of what is lost besides
}

// Up makes the hosts and starts their engines. On an error nothing is left.
// ctx bounds Up alone, not the life of the cluster.
func Up(ctx context.Context, o Options) (c *Cluster, err error) {
	if o, err = o.complete(); err != nil {
		return nil, fmt.Errorf("start cluster: %w", err)
	}
	begun := time.Now()
	claimed, err := claim(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("start cluster: %w", err)
	}
	c = &Cluster{o: o, log: o.Log, claimed: claimed, book: &ledger{path: filepath.Join(o.Dir, ledgerFile)}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start cluster in %s: %w", o.Dir, err), c.Down())
			c = nil
		}
	}()
	if err := sweep(ctx, o.Dir); err != nil {
		return c, fmt.Errorf("clean up after an earlier run: %w", err)
	}
	if err := os.MkdirAll(c.path("docker-config"), 0o700); err != nil {
		return c, err
	}
	if c.underlay, err = startUnderlay(ctx, c.book, c.path(underlayName+".log")); err != nil {
		return c, err
	}
	for i := 1; i <= o.Hosts; i++ {
		c.hosts = append(c.hosts, newHost(c, i))
	}
	err = c.Each(ctx, func(ctx context.Context, h *Host) error {
		if err := h.boot(ctx); err != nil || o.NoEngine {
			return err
		}
		return h.StartEngine(ctx)
	})
	if err != nil {
		return c, err
	}
	c.log.InfoContext(ctx, "cluster is up", "hosts", o.Hosts, "dir", o.Dir, "took", time.Since(begun))
	return c, nil
}

// complete checks the options and fills in the defaults.
func (o Options) complete() (Options, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Prefix == "" {
		o.Prefix = "h"
	}
	if strings.Trim(o.Prefix, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return o, fmt.Errorf("prefix %q: it begins host names; use lower-case letters, digits and -", o.Prefix)
	}
	if o.Hosts < 1 || o.Hosts > maxHosts {
		return o, fmt.Errorf("%d hosts asked for; 1 to %d are possible", o.Hosts, maxHosts)
	}
	if o.Dir == "" {
		o.Dir = filepath.Join(os.TempDir(), "sluice-"+o.Prefix)
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return o, err
	}
	o.Dir = dir
	if rel, err := filepath.Rel("/run", dir); err == nil && !strings.HasPrefix(rel, "..") {
		return o, fmt.Errorf("directory %s: hosts have a /run of their own; choose a directory elsewhere", dir)
	}
	if n := len(filepath.Join(dir, fmt.Sprintf("%s%d", o.Prefix, o.Hosts), socketName)); n > maxSocketPath {
		return o, fmt.Errorf("directory %s: the path of an engine's socket would have %d bytes, at most %d are possible; choose a shorter directory", dir, n, maxSocketPath)
	}
	if o.Engine != "" && !executable(filepath.Join(o.Engine, "usr/sbin/dockerd")) && !executable(filepath.Join(o.Engine, "usr/bin/dockerd")) {
		return o, fmt.Errorf("engine tree %s has no dockerd; make one with cluster.EngineTree", o.Engine)
	}
	if os.Geteuid() != 0 {
		return o, ErrNotRoot
	}
	return o, nil
}

// Down ends all hosts at once and removes everything of the cluster. It may be
// called again, and after a failed Up.
func (c *Cluster) Down() error {
	if c == nil || c.claimed == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), downTimeout)
	defer cancel()
	begun := time.Now()
	if err := remove(ctx, c.o.Dir); err != nil {
		return err
	}
	// Closing unlocks; the directory has no name any more by now.
	err := c.claimed.Close()
	c.claimed = nil
	c.log.Info("cluster is down", "dir", c.o.Dir, "took", time.Since(begun))
	return err
}

// Release lets the process end without taking the cluster down; [Remove] does
// that later. The Cluster must not be used afterwards.
func (c *Cluster) Release() error {
	err := c.claimed.Close()
	c.claimed = nil
	return err
}

// Remove takes down a cluster by its directory: one that was released, or that
// a killed process left. None there is a success; one that belongs to a running
// process is an error.
func Remove(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	claimed, err := claim(dir)
	if err != nil {
		return err
	}
	return errors.Join(remove(ctx, dir), claimed.Close())
}

// remove sweeps a claimed directory and removes it.
func remove(ctx context.Context, dir string) error {
	if err := sweep(ctx, dir); err != nil {
		return fmt.Errorf("take down cluster in %s: %w", dir, err)
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("take down cluster: %w", err)
	}
	return nil
}

// Host returns host i, counted from 1; a host that was not asked for is a
// mistake of the test and panics as an index does.
func (c *Cluster) Host(i int) *Host { return c.hosts[i-1] }

// Hosts returns all hosts in order.
func (c *Cluster) Hosts() []*Host { return append([]*Host(nil), c.hosts...) }

// Dir is the directory of the cluster.
func (c *Cluster) Dir() string { return c.o.Dir }

// Each calls do for all hosts at the same time, and returns the errors of the
// hosts joined. The first error cancels the others; what they say after that
// would only bury it, and is left out.
func (c *Cluster) Each(ctx context.Context, do func(context.Context, *Host) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex // guards errs
		errs []error
	)
	for _, h := range c.hosts {
		wg.Go(func() {
			err := do(ctx, h)
			if err == nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if len(errs) == 0 || !errors.Is(err, context.Canceled) {
				errs = append(errs, err)
			}
			cancel()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (c *Cluster) path(name string) string { return filepath.Join(c.o.Dir, name) }

// Wait calls check again and again until it returns nil. When ctx ends first,
// the error says what was waited for and what the last check objected to, and
// is the context's error too.
func Wait(ctx context.Context, what string, check func(context.Context) error) error {
	// Between two questions to an engine: short beside everything that is
	// waited for here (100 ms and more), long beside one question (1 to 5 ms).
	// Where a question takes longer, as in a VM with one processor, twice as long
	// is left to what is waited for.
	const pause = 30 * time.Millisecond
	begun := time.Now()
	var last error
	for {
		asked := time.Now()
		err := check(ctx)
		if err == nil {
			return nil
		}
		// A check that was itself cut short has nothing to say.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		rest := time.NewTimer(max(pause, 2*time.Since(asked)))
		select {
		case <-ctx.Done():
			rest.Stop()
			return fmt.Errorf("%s: %w after %s: %w", what, ctx.Err(), time.Since(begun).Round(time.Millisecond), last)
		case <-rest.C:
		}
	}
}
