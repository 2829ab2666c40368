package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"sluice/driver"
	"sluice/internal/gossip"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/keyring"
	"sluice/internal/keyshare"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/internal/reconcile"
	"sluice/internal/view"
	"sluice/ipam/pool"
	"sluice/lb/publish"
)

// simDisk is a state file in memory. What it holds outlives the process.
type simDisk struct {
	mu      sync.Mutex
	records map[model.RecordKey][]byte
}

func newSimDisk() *simDisk { return &simDisk{records: make(map[model.RecordKey][]byte)} }

func (d *simDisk) Commit(_ context.Context, puts []model.Record, dels []model.RecordKey) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range puts {
		d.records[model.RecordKey{Kind: r.Kind, Key: r.Key}] = r.Value
	}
	for _, k := range dels {
		delete(d.records, k)
	}
	return nil
}

func (d *simDisk) list() []model.Record {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]model.Record, 0, len(d.records))
	for k, v := range d.records {
		out = append(out, model.Record{Kind: k.Kind, Key: k.Key, Value: v})
	}
	return out
}

// simPools decides nothing: the swarm of the simulation gives addresses itself.
type simPools struct{}

func (simPools) Bind(context.Context, model.NetworkID, netip.Prefix, bool) error { return nil }
func (simPools) Free(context.Context, model.NetworkID) error                     { return nil }
func (simPools) Recover(context.Context, pool.Lost) error                        { return nil }
func (simPools) Follow(time.Time)                                                {}
func (simPools) Owners() map[model.NetworkID]bool                                { return nil }
func (simPools) Recovered()                                                      {}
func (simPools) Confirm(context.Context, model.NetworkID, []netip.Addr, time.Time) (pool.Confirmation, error) {
	return pool.Confirmation{}, nil
}

// simSockets are the ports of a host: nobody else has one.
type simSockets struct{}

func (simSockets) Set([]model.HostPort) map[model.HostPort]error { return nil }
func (simSockets) Missed() uint64                                { return 0 }

// simHost is a host: what outlives its plugin's process, and that process.
type simHost struct {
	id      model.NodeID
	addr    netip.Addr
	manager bool

	kernel *kerneltest.Fake
	disk   *simDisk
	skew   time.Duration // of its clock, as the process reads it when it starts

	proc    *process // nil: killed
	frozen  bool
	removed bool // from the swarm
	blank   bool // its state was lost since the last agreement
}

// process is one life of the plugin on a host: the real parts, but for the kernel,
// the network, and the clients of the engine and of the managers' key.
type process struct {
	*parts
	cancel context.CancelFunc
	wg     sync.WaitGroup
	woken  chan struct{} // capacity 1: the engine has news
}

// boot starts the plugin.
func (w *world) boot(h *simHost) {
	h.disk.mu.Lock()
	blank := len(h.disk.records) == 0 && networks(h.kernel.State())
	h.disk.mu.Unlock()
	log := slog.New(slog.DiscardHandler)
	cfg := Config{Scope: scopeGlobal, GossipPort: gossip.DefaultPort, VXLANPort: 4799, KeyPort: 7948}
	p := &parts{cfg: cfg, log: log}
	records := h.disk.list()
	var err error
	p.hub, err = view.New(view.Config{
		Journal: h.disk, Now: time.Now, VXLANPort: cfg.VXLANPort, Datapath: "nft", Blank: blank, Log: log, Changed: p.changed,
		MTU: func(netip.Addr) (int, error) { return 1450, nil },
	}, records)
	if err != nil {
		w.t.Fatal(err)
	}
	p.ring = keyring.New(h.disk, records, nil, p.keyed)
	p.loop = reconcile.New(reconcile.Config{Kernel: h.kernel, View: p.hub.View, Plan: plan.Host, Observe: p.observe, Log: log})
	p.publish = publish.New(publish.Config{View: p.hub.View, Sockets: simSockets{}, Taken: p.hub.SetTaken, Log: log})
	p.asker = &keyAsker{
		cfg: cfg, hub: p.hub, ring: p.ring, log: log,
		identity: func() (keyshare.Identity, error) { return keyshare.Identity{Node: string(h.id)}, nil },
		ask: func(ctx context.Context, _ keyshare.Identity, m netip.AddrPort) ([][]byte, error) {
			return w.giveKeys(ctx, h, m.Addr())
		},
	}
	p.gossip = newGossiper(cfg, p.hub, p.ring, p.asker.state, log)
	p.gossip.open = func(c gossip.Config) (*gossip.Node, error) {
		c.Incarnation = uint64(time.Now().Add(h.skew).UnixNano())
		c.Transport = w.net.Listen(c.BindAddr)
		return gossip.New(c)
	}
	book, err := driver.NewBook(h.disk, records)
	if err != nil {
		w.t.Fatal(err)
	}
	p.driver = driver.New(driver.Config{
		Intents: p.hub, Allocations: book, Pools: simPools{}, Keys: p.ring, Loop: p.loop,
		UnderlayMTU: func(netip.Addr) (int, error) { return 1500, nil }, Hint: p.gossip.hint, HostRun: "/run", Log: log,
	})
	p.follower = &follower{
		scope: cfg.Scope, now: time.Now, hub: p.hub, driver: p.driver, pools: simPools{}, keys: p.ring, wake: p.gossip.wake,
		named: make(chan string, 1), log: log, gone: make(map[model.NetworkID]time.Time),
	}
	x := &process{parts: p, woken: make(chan struct{}, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	x.cancel = cancel
	p.publish.Begin(ctx)
	for _, f := range []func(context.Context){p.loop.Run, p.gossip.run, p.asker.run, p.publish.Run, func(ctx context.Context) { w.follow(ctx, h, x) }} {
		x.wg.Go(func() { f(ctx) })
	}
	w.locked(func() { h.proc = x })
}

// follow is parts.runEngine with the simulated engine.
func (w *world) follow(ctx context.Context, h *simHost, x *process) {
	tick := time.NewTicker(restPeriod)
	defer tick.Stop()
	for {
		if s, ok := w.snapshot(h); ok {
			x.follower.follow(ctx, s)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-x.woken:
		}
	}
}

// kill ends the plugin's process without a word.
func (w *world) kill(h *simHost) {
	proc := h.proc
	w.locked(func() { h.proc = nil })
	proc.cancel()
	proc.wg.Wait()
}

var errSilent = errors.New("no answer")

// giveKeys is what a manager answers to a node that asks for the gossip key.
func (w *world) giveKeys(ctx context.Context, from *simHost, to netip.Addr) ([][]byte, error) {
	w.mu.Lock()
	var m *simHost
	for _, h := range w.hosts {
		if h.addr == to {
			m = h
		}
	}
	var ring *keyring.Ring
	if m.proc != nil && !m.frozen && m.manager && w.reach(from, m) {
		ring = m.proc.ring
	}
	w.mu.Unlock()
	if ring != nil {
		return ring.Keys(), nil
	}
	select {
	case <-ctx.Done():
	case <-time.After(5 * time.Second):
	}
	return nil, errSilent
}
