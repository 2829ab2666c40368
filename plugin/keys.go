package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"sluice/internal/diag"
	"sluice/internal/keyring"
	"sluice/internal/keyshare"
	"sluice/internal/model"
	"sluice/internal/view"
)

// A node that no network has brought the gossip key to gets it from a manager, and so
// does one whose keys are not those that the leader sends with: a keyAsker asks, on workers, and a keyGiver lets managers answer. A manager has the
// key from the list of networks. With the setting GOSSIP_KEY neither does anything.

// unused says that this process neither gives nor asks.
func unused(c Config) bool { return c.Scope == scopeLocal || c.GossipKey != "" }

// proofEvery is between two looks whether this manager can still prove itself:
// autolock may be switched on while it serves.
const proofEvery = 10 * time.Second

// keyGiver has a keyshare.Server listen while this node is a manager.
type keyGiver struct {
	cfg      Config
	hub      *view.Hub
	identity func() (keyshare.Identity, error)
	server   *keyshare.Server
	log      *slog.Logger

	// Of run alone:
	at     netip.AddrPort
	stop   context.CancelFunc // nil while it does not serve
	ended  chan error         // of the server that stop ends
	proved time.Time

	// mu guards err. Rank: nothing else is locked while it is held.
	mu  sync.Mutex
	err error // why it does not serve, though it should
}

func newKeyGiver(cfg Config, hub *view.Hub, ring *keyring.Ring, identity func() (keyshare.Identity, error), log *slog.Logger) *keyGiver {
	g := &keyGiver{cfg: cfg, hub: hub, identity: identity, log: log}
	g.server = keyshare.NewServer(keyshare.ServerConfig{Identity: identity, Keys: ring.Keys, Member: g.member, Log: log})
	return g
}

// run works until ctx ends and the server has.
func (g *keyGiver) run(ctx context.Context) {
	if unused(g.cfg) {
		return
	}
	defer g.end()
	tick := time.NewTicker(restPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			g.look(ctx)
		}
	}
}

// look has the server listen where it should by now, or nowhere.
func (g *keyGiver) look(ctx context.Context) {
	at := g.where()
	if g.stop != nil {
		select {
		case err := <-g.ended:
			g.stop()
			g.stop = nil
			g.log.Warn("the server of the gossip key ended, and is started again", "err", err)
		default:
		}
	}
	if at != g.at {
		g.end()
	}
	if !at.IsValid() {
		g.tell(nil)
		return
	}
	if g.stop != nil && time.Since(g.proved) < proofEvery {
		return
	}
	if err := g.prove(); err != nil {
		g.end()
		g.tell(err)
		return
	}
	g.proved = time.Now()
	if g.stop == nil {
		g.tell(g.start(ctx, at))
	}
}

// where the server should listen; invalid: nowhere. It is where nodes know this
// manager by, as that is where they ask.
func (g *keyGiver) where() netip.AddrPort {
	e := g.hub.Engine()
	addr := g.cfg.GossipBind
	if !addr.IsValid() {
		addr = e.NodeAddr
	}
	if !e.Active || !e.Manager || !addr.Is4() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr, g.cfg.KeyPort)
}

func (g *keyGiver) prove() error {
	id, err := g.identity()
	if err == nil && !id.Manager {
		err = errors.New("this node's certificate is a worker's still; swarm renews it after a promotion")
	}
	return err
}

func (g *keyGiver) start(ctx context.Context, at netip.AddrPort) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp4", at.String())
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(ctx)
	g.at, g.stop, g.ended = at, stop, make(chan error, 1)
	go func() { g.ended <- g.server.Serve(serving, l) }()
	g.log.Info("nodes without the gossip key can get it here", "addr", at.String())
	return nil
}

// end ends the server if there is one.
func (g *keyGiver) end() {
	if g.stop == nil {
		return
	}
	g.stop()
	if err := <-g.ended; err != nil {
		g.log.Warn("the server of the gossip key did not end cleanly", "err", err)
	}
	g.stop, g.at = nil, netip.AddrPort{}
}

// tell keeps why nothing is served, and logs what is new.
func (g *keyGiver) tell(err error) {
	g.mu.Lock()
	before := g.err
	g.err = err
	g.mu.Unlock()
	if err != nil && (before == nil || before.Error() != err.Error()) {
		g.log.Error("nodes without the gossip key cannot get it from this manager; tried again", "err", err)
	}
}

// problem is what a person should know of it, if anything. Where all nodes are
// managers, nobody asks.
func (g *keyGiver) problem() []diag.Problem {
	g.mu.Lock()
	err := g.err
	g.mu.Unlock()
	if e := g.hub.Engine(); err == nil || len(e.Nodes) <= len(e.Managers) {
		return nil
	}
	do := "it is tried again; a key in the setting GOSSIP_KEY, on all nodes, does without it"
	switch {
	case errors.Is(err, keyshare.ErrLocked):
		do = "give all nodes one key in the setting GOSSIP_KEY (openssl rand -hex 32 makes one)"
	case errors.Is(err, syscall.EADDRINUSE):
		do = "end what has the port, or choose another KEY_PORT on all nodes"
	}
	return []diag.Problem{{What: "workers without a network of sluice's do not get the gossip key from this manager: " + err.Error(), Do: do}}
}

// member says why a node is none of the swarm's now, by this manager's list.
func (g *keyGiver) member(node string) error {
	e := g.hub.Engine()
	if !e.Manager || !e.ServicesValid {
		return errors.New("this manager cannot tell now who is a node of the swarm")
	}
	if _, ok := e.Nodes[model.NodeID(node)]; !ok {
		return fmt.Errorf("the swarm has no node %s, or this manager does not list it yet", node)
	}
	return nil
}

// Pauses of a keyAsker: after a round in which a manager has answered, and at most,
// doubled with each in which none has. A hundred nodes then cause ten connections a
// second in all.
const (
	firstPause = time.Second
	lastPause  = 10 * time.Second
)

// unheardFor is how long no manager answers before a person is told. A node that
// has just joined, or a swarm that just starts, takes seconds.
const unheardFor = time.Minute

// apartFor is how long a node with a key does not hear the leading manager before it
// asks whether there is another key, and between two times that it asks then. Two keys
// can arise (see internal/keyring), and no network may bring the second to this node.
// A change of leaders, or a restart there, takes less.
const apartFor = time.Minute

// keyAsker asks the managers for the gossip key while this node has none, or none that
// serves.
type keyAsker struct {
	cfg      Config
	hub      *view.Hub
	ring     *keyring.Ring
	identity func() (keyshare.Identity, error)
	ask      func(context.Context, keyshare.Identity, netip.AddrPort) ([][]byte, error) // keyshare.Ask
	log      *slog.Logger

	// Of run alone:
	heard time.Time // when the leading manager was last heard, or asked instead

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu    sync.Mutex
	text  string
	since time.Time // since when no manager has answered; zero: one has
}

// state is how the asking goes; empty if there is no reason to ask.
func (a *keyAsker) state() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.text
}

func (a *keyAsker) tell(parts ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.text = strings.Join(parts, "; ")
}

// unheard notes whether a round ended without any answer.
func (a *keyAsker) unheard(failed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !failed:
		a.since = time.Time{}
	case a.since.IsZero():
		a.since = time.Now()
	}
}

// problem is what a person should know of it, if anything.
func (a *keyAsker) problem() []diag.Problem {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.since.IsZero() || time.Since(a.since) < unheardFor {
		return nil
	}
	return []diag.Problem{{
		What: "no manager gives this node the gossip key: " + a.text,
		Do:   fmt.Sprintf("sluice must run on the managers, and port %d/tcp be open there; sluice status there may say more. Until then this node has no port of the mesh", a.cfg.KeyPort),
	}}
}

// run works until ctx ends.
func (a *keyAsker) run(ctx context.Context) {
	if unused(a.cfg) {
		return
	}
	pause, before := firstPause, ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		failed := a.round(ctx)
		a.unheard(len(failed) > 0)
		if len(failed) == 0 {
			pause, before = firstPause, ""
			continue
		}
		if ctx.Err() != nil {
			return
		}
		pause = min(2*pause, lastPause)
		if text := strings.Join(failed, "; "); text != before {
			before = text
			a.log.Warn("no manager gives the gossip key; asking again", "err", text)
		}
	}
}

// managers are those to ask; none if there is no reason to.
func (a *keyAsker) managers() []netip.Addr {
	e := a.hub.Engine()
	if !e.Active || e.Manager || len(a.ring.Keys()) > 0 && !a.apart() {
		return nil
	}
	return e.Managers
}

// apart reports whether this node does not understand the leading manager, by its keys
// perhaps.
func (a *keyAsker) apart() bool {
	if a.heard.IsZero() || a.hub.HearsLeader() {
		a.heard = time.Now()
	}
	return time.Since(a.heard) >= apartFor
}

// round asks the managers one after the other, until one gives keys. It returns
// what each has said if none has answered; nothing if this node had a key, as there are
// other reasons then not to hear the others.
func (a *keyAsker) round(ctx context.Context) []string {
	if had := len(a.ring.Keys()); had > 0 {
		if len(a.managers()) == 0 {
			a.tell()
			return nil
		}
		said := a.askAll(ctx)
		a.heard = time.Now()
		a.tell()
		a.log.Debug("the leading manager is not heard, so managers were asked for another gossip key", "op", strings.Join(said, "; "))
		return nil
	}
	return a.askAll(ctx)
}

// askAll is a round without regard to what this node has.
func (a *keyAsker) askAll(ctx context.Context) []string {
	managers := slices.Clone(a.managers())
	// Not all nodes the same one.
	rand.Shuffle(len(managers), func(i, j int) { managers[i], managers[j] = managers[j], managers[i] })
	var said []string
	failed := 0
	for _, m := range managers {
		if len(a.managers()) == 0 || ctx.Err() != nil {
			break
		}
		manager := netip.AddrPortFrom(m, a.cfg.KeyPort)
		a.tell(append(slices.Clone(said), "asks manager "+manager.String())...)
		keys, err := a.one(ctx, manager)
		switch {
		case err != nil:
			said = append(said, err.Error())
			failed++
		case keys == 0:
			said = append(said, "manager "+manager.String()+" has none yet")
		default:
			a.tell()
			return nil
		}
	}
	answered := failed < len(said)
	slices.Sort(said) // the order of asking is by chance, and no news
	said = slices.Compact(said)
	a.tell(said...)
	if answered {
		return nil
	}
	return said
}

// one asks one manager, and keeps what it gives. It returns how many keys that was.
func (a *keyAsker) one(ctx context.Context, manager netip.AddrPort) (int, error) {
	id, err := a.identity()
	if err != nil {
		return 0, err
	}
	if err := a.own(id); err != nil {
		return 0, err
	}
	keys, err := a.ask(ctx, id, manager)
	if err != nil {
		return 0, err
	}
	// It may have taken a minute.
	if err := a.own(id); err != nil {
		return 0, err
	}
	had := len(a.ring.Keys())
	for _, k := range keys {
		if err := a.ring.Add(ctx, k); err != nil {
			return 0, err
		}
	}
	if n := len(a.ring.Keys()) - had; n > 0 {
		a.log.Info("gossip key taken from a manager", "addr", manager.String())
	}
	return len(keys), nil
}

// own tells apart a swarm that the node is about to leave: what its managers give
// would be of no use in the next one.
func (a *keyAsker) own(id keyshare.Identity) error {
	if node := a.hub.Self().Node; string(node) != id.Node {
		return fmt.Errorf("this node's certificate is of node %s of a swarm, and the engine calls it %s; one of them is about to change", id.Node, node)
	}
	return nil
}
