package driver_test

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"testing"
	"time"

	"sluice/driver"
	"sluice/internal/kernel"
	"sluice/internal/keyring"
	"sluice/internal/model"
	"sluice/internal/reconcile"
	"sluice/internal/view"
	"sluice/ipam/pool"
)

// journal is a store in memory that fails on demand.
type journal struct {
	mu      sync.Mutex
	records map[model.RecordKey][]byte
	fail    error
}

func newJournal() *journal { return &journal{records: map[model.RecordKey][]byte{}} }

func (j *journal) Commit(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := cmp.Or(ctx.Err(), j.fail); err != nil {
		return err
	}
	for _, r := range puts {
		j.records[model.RecordKey{Kind: r.Kind, Key: r.Key}] = r.Value
	}
	for _, k := range deletes {
		delete(j.records, k)
	}
	return nil
}

func (j *journal) list() []model.Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []model.Record
	for k, v := range j.records {
		out = append(out, model.Record{Kind: k.Kind, Key: k.Key, Value: v})
	}
	return out
}

var errDisk = errors.New("no space left on device")

// pools remembers which network has which pool.
type pools struct {
	bound map[model.NetworkID]netip.Prefix
	lost  []pool.Lost // what was brought back
	fail  error

	former map[model.NetworkID]bool // of bound: another manager led since
}

func (p *pools) Follow(time.Time) {
	p.former = make(map[model.NetworkID]bool)
	for id := range p.bound {
		p.former[id] = true
	}
}

func (p *pools) Owners() map[model.NetworkID]bool {
	out := make(map[model.NetworkID]bool)
	for id := range p.bound {
		out[id] = !p.former[id]
	}
	return out
}

func (p *pools) Recover(_ context.Context, l pool.Lost) error {
	if p.fail == nil {
		p.lost = append(p.lost, l)
	}
	return p.fail
}

func (p *pools) Bind(_ context.Context, n model.NetworkID, subnet netip.Prefix, _ bool) error {
	if p.fail != nil {
		return p.fail
	}
	p.bound[n] = subnet
	delete(p.former, n)
	return nil
}

func (p *pools) Free(_ context.Context, n model.NetworkID) error {
	delete(p.bound, n)
	return nil
}

// loop is a reconciler whose rounds fail as the test says.
type loop struct {
	failed   map[kernel.Key]error
	stuck    bool // no round ever ends
	triggers int
	waited   []uint64
}

func (l *loop) Trigger() { l.triggers++ }

func (l *loop) Wait(ctx context.Context, rev uint64) (reconcile.Round, error) {
	l.waited = append(l.waited, rev)
	if l.stuck {
		<-ctx.Done()
		return reconcile.Round{}, ctx.Err()
	}
	return reconcile.Round{Failed: maps.Clone(l.failed)}, nil
}

// host is a node with its driver, its own records and the fakes around them.
type host struct {
	*driver.Driver
	hub     *view.Hub
	book    *driver.Book
	ring    *keyring.Ring
	journal *journal
	pools   *pools
	loop    *loop
	mtu     error // what asking for the underlay's MTU fails with
	hints   []netip.Addr
}

func newHost(t *testing.T, local bool) *host { return newHostThat(t, local, driver.Abilities{}) }

// newHostThat is a node whose kernel lacks something.
func newHostThat(t *testing.T, local bool, lacks driver.Abilities) *host {
	t.Helper()
	h := &host{
		journal: newJournal(),
		pools:   &pools{bound: map[model.NetworkID]netip.Prefix{}},
		loop:    &loop{failed: map[kernel.Key]error{}},
	}
	log := slog.New(slog.DiscardHandler)
	var err error
	h.hub, err = view.New(view.Config{Journal: h.journal, Now: time.Now, VXLANPort: 4799, Log: log}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if h.book, err = driver.NewBook(h.journal, nil); err != nil {
		t.Fatal(err)
	}
	h.ring = keyring.New(h.journal, nil, nil, nil)
	h.Driver = driver.New(driver.Config{
		Intents: h.hub, Allocations: h.book, Pools: h.pools, Keys: h.ring, Loop: h.loop,
		UnderlayMTU: func(netip.Addr) (int, error) { return 1500, h.mtu },
		Hint:        func(a netip.Addr) { h.hints = append(h.hints, a) },
		Abilities:   lacks,
		Local:       local, HostRun: "/host/run", Log: log,
	})
	if err := h.Discovered(t.Context(), driver.Node{Address: "192.168.0.1", Self: true}); err != nil {
		t.Fatal(err)
	}
	return h
}

const (
	web    model.NetworkID  = "webnetwork00000000000000a"
	webEnd model.EndpointID = "aaaaaaaaaaaa1111111111111111111111111111111111111111111111111111"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// subnet is a pool with the gateway that the engine chooses.
func subnet(pool, gateway string) driver.Subnet {
	return driver.Subnet{Pool: prefix(pool), Gateway: prefix(gateway)}
}

var plain = []driver.Subnet{subnet("10.255.0.0/20", "10.255.0.1/20")}

// allocated is what the leader tells nodes of network web.
func (h *host) allocated(t *testing.T, options map[string]string) map[string]string {
	t.Helper()
	out, err := h.Allocate(t.Context(), driver.AllocateRequest{Network: web, Options: options, Subnets: plain})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// created is a node on which network web exists.
func created(t *testing.T) *host {
	t.Helper()
	h := newHost(t, false)
	if err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: plain}); err != nil {
		t.Fatal(err)
	}
	return h
}

// joined is a node with one endpoint on network web.
func joined(t *testing.T) *host {
	t.Helper()
	h := created(t)
	if _, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20")}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd, Sandbox: "/var/run/docker/netns/1234"}); err != nil {
		t.Fatal(err)
	}
	return h
}
