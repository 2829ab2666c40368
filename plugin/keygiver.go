package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
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
// does one whose keys are not those that the leader sends with: a keyAsker asks, on
// workers (keyasker.go), and a keyGiver lets managers answer. A manager has the key from
// the list of networks. With the setting GOSSIP_KEY neither does anything.

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
