package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"sluice/internal/gossip"
	"sluice/internal/keyring"
	"sluice/internal/model"
	"sluice/internal/view"
)

// gossiper keeps a gossip node running as soon as this node has a name, an
// address and a key, and carries records between it and the hub: the hub's own
// into the node, all others' into the hub.
type gossiper struct {
	cfg   Config
	hub   *view.Hub
	ring  *keyring.Ring
	asked func() string                             // how the asking for a key goes; empty: nobody asks
	open  func(gossip.Config) (*gossip.Node, error) // gossip.New
	log   *slog.Logger
	woken chan struct{} // capacity 1

	// Of run alone:
	node    *gossip.Node  // nil while it does not run
	started gossip.Config // what node was made of
	large   string        // the records that gossip does not take, as logged

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu    sync.Mutex
	hints []netip.Addr // nodes that the engine spoke of
	up    bool         // the node runs
	text  string       // where, or why it does not
}

// maxHints bounds the addresses kept from node discovery; a swarm's nodes reach
// each other through any of them.
const maxHints = 16

// restPeriod is between two looks without a reason, for what gives no notice: a
// start that failed because the port was taken.
const restPeriod = 2 * time.Second

func newGossiper(cfg Config, hub *view.Hub, ring *keyring.Ring, asked func() string, log *slog.Logger) *gossiper {
	return &gossiper{cfg: cfg, hub: hub, ring: ring, asked: asked, open: gossip.New, log: log, woken: make(chan struct{}, 1), text: "starting"}
}

// wake asks for a look at what has changed.
func (g *gossiper) wake() {
	select {
	case g.woken <- struct{}{}:
	default:
	}
}

// hint takes the address of another node of the swarm.
func (g *gossiper) hint(a netip.Addr) {
	g.mu.Lock()
	if !slices.Contains(g.hints, a) {
		g.hints = append(g.hints, a)
		if len(g.hints) > maxHints {
			g.hints = g.hints[1:]
		}
	}
	g.mu.Unlock()
	g.wake()
}

// state says whether the node runs, and where, or why it does not.
func (g *gossiper) state() (up bool, text string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.up, g.text
}

// setState reports whether the state is news.
func (g *gossiper) setState(up bool, text string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	news := g.up != up || g.text != text
	g.up, g.text = up, text
	return news
}

// run works until ctx ends.
func (g *gossiper) run(ctx context.Context) {
	if g.cfg.Scope == scopeLocal {
		g.setState(false, "not used: networks of this engine only")
		return
	}
	// Not Leave: the process ends, the node and its containers do not.
	defer g.stop()
	tick := time.NewTicker(restPeriod)
	defer tick.Stop()
	for {
		var changed <-chan struct{}
		if g.node != nil {
			changed = g.node.Changed()
		}
		select {
		case <-ctx.Done():
			return
		case <-g.woken:
		case <-changed:
		case <-tick.C:
		}
		g.look(ctx)
	}
}

// look makes the node what it should be by now, and exchanges records.
func (g *gossiper) look(ctx context.Context) {
	want, why := g.config()
	if g.node != nil && (g.left() || string(g.hub.Self().Node) != g.started.Name) {
		// The node is not what it was to the others, and has none of the containers
		// that it had: a new id comes only with another joining of a swarm. Say so,
		// rather than fall silent, which would keep its records with the others.
		if err := g.node.Leave(ctx); err != nil {
			g.log.Warn("the others were not told that this node left", "err", err)
		}
	}
	if why != "" || want.Name != g.started.Name || want.BindAddr != g.started.BindAddr {
		g.stop()
	}
	if why != "" {
		g.setState(false, why)
		return
	}
	if g.node == nil && !g.start(want) {
		return
	}
	if err := g.exchange(ctx, g.node, want); err != nil && ctx.Err() == nil {
		g.log.Error("gossip records not exchanged, will be retried", "err", err)
	}
	g.hub.Settle(ctx)
	if err := g.hub.Claim(ctx); err != nil && ctx.Err() == nil {
		g.log.Error("claims for published ports could not be recorded, will be retried", "err", err)
	}
}

// start makes the node. A failure is told once, and tried again at every look.
func (g *gossiper) start(want gossip.Config) bool {
	node, err := g.open(want)
	if err != nil {
		if g.setState(false, "not running: "+err.Error()) {
			g.log.Error("gossip does not start, will be retried", "err", err)
		}
		return false
	}
	g.node, g.started = node, want
	g.log.Info("gossip runs", "node", want.Name, "addr", want.BindAddr.String())
	g.setState(true, "running on "+want.BindAddr.String())
	return true
}

// stop ends the node if there is one; the others keep its records.
func (g *gossiper) stop() {
	if g.node == nil {
		return
	}
	if err := g.node.Close(); err != nil {
		g.log.Warn("gossip did not end cleanly", "err", err)
	}
	g.node = nil
}

// left reports whether the engine says that the node is in no swarm.
func (g *gossiper) left() bool {
	e := g.hub.Engine()
	return e.SwarmValid && e.NoSwarm
}

// config is the configuration of the node, or why there can be none yet.
func (g *gossiper) config() (gossip.Config, string) {
	self, engine, keys := g.hub.Self(), g.hub.Engine(), g.ring.Keys()
	addr := g.cfg.GossipBind
	if !addr.IsValid() {
		addr = self.VTEP
	}
	switch {
	case g.left():
		return gossip.Config{}, "not running: the node is in no swarm"
	case self.Node == "":
		return gossip.Config{}, "not running: the engine has not told the node's id yet"
	case !addr.IsValid() && engine.NodeAddr.Is6():
		return gossip.Config{}, "not running: the node's address in the swarm is " + engine.NodeAddr.String() + ", and sluice needs IPv4"
	case !addr.IsValid():
		return gossip.Config{}, "not running: the engine has not told the node's address yet"
	case len(keys) == 0:
		return gossip.Config{}, noKey(engine.Manager, g.asked())
	}
	return gossip.Config{
		Name:        string(self.Node),
		Incarnation: uint64(time.Now().UnixNano()),
		BindAddr:    netip.AddrPortFrom(addr, g.cfg.GossipPort),
		Keys:        keys,
		Seeds:       g.seeds(addr, engine),
		Logger:      g.log,
	}, ""
}

// noKey says why there is no key, and what is done about it.
func noKey(manager bool, asked string) string {
	text := "not running: no key yet; it comes with the first network of the swarm"
	switch {
	case manager: // which lists all networks
	case asked != "":
		text += ", from a manager: " + asked
	default:
		text += " that this node serves"
	}
	return text
}

// seeds is where other nodes may be: the managers, the nodes that the engine
// says have one of our networks, those of node discovery, and those whose
// records are known.
func (g *gossiper) seeds(self netip.Addr, e model.EngineSnapshot) []netip.AddrPort {
	all := slices.Clone(e.Managers)
	for _, n := range e.Networks {
		all = append(all, n.Peers...)
	}
	for _, p := range g.hub.Peers() {
		if a, err := netip.ParseAddr(p.VTEP); err == nil {
			all = append(all, a)
		}
	}
	g.mu.Lock()
	all = append(all, g.hints...)
	g.mu.Unlock()
	slices.SortFunc(all, netip.Addr.Compare)
	var out []netip.AddrPort
	for _, a := range slices.Compact(all) {
		if a.IsValid() && a != self {
			out = append(out, netip.AddrPortFrom(a, g.cfg.GossipPort))
		}
	}
	return out
}

// exchange brings node and hub up to date with each other.
func (g *gossiper) exchange(ctx context.Context, node *gossip.Node, want gossip.Config) error {
	errs := []error{node.SetKeys(want.Keys)}
	node.Join(want.Seeds)
	if !g.hub.Partial() {
		// The hub's records are whole: the node may say so at once, and peers drop
		// what a former life has published and this has not. Until then they keep it.
		errs = append(errs, node.Replace(view.Summed(g.fitting(g.hub.Records()))), node.Complete())
	}
	tables := node.Snapshot()
	in := make([]view.Table, 0, len(tables))
	engine := g.hub.Engine()
	for name, t := range tables {
		if t.State == gossip.Suspended && removed(engine, model.NodeID(name)) {
			// Its records end here.
			if err := node.Forget(name); err != nil && !errors.Is(err, gossip.ErrAlive) {
				errs = append(errs, err)
			}
			continue
		}
		in = append(in, view.Table{
			Owner: model.NodeID(name), Present: t.State == gossip.Alive, Whole: t.Complete, Entries: t.Entries,
			Version: view.Version{Start: t.Incarnation.Start, Bump: t.Incarnation.Bump, Seq: t.Seq}, Last: t.Last,
		})
	}
	return errors.Join(append(errs, g.hub.SetTables(ctx, in))...)
}

// fitting leaves out records that gossip does not take, and tells of them once: one
// would keep all others from the other nodes.
func (g *gossiper) fitting(records map[string][]byte) map[string][]byte {
	var large []string
	for key, value := range records {
		if len(key) > gossip.MaxKey || len(value) > gossip.MaxValue {
			large = append(large, fmt.Sprintf("%.64s (%d bytes)", key, len(value)))
			delete(records, key)
		}
	}
	slices.Sort(large)
	if text := strings.Join(large, ", "); text != g.large {
		g.large = text
		if text != "" {
			g.log.Error("the other nodes are not told some records, which are too large; give that service shorter options or fewer networks", "op", text)
		}
	}
	return records
}

// removed reports whether the swarm has removed a node, by the word of its
// leader. A list that lacks the leader itself has not been read.
func removed(e model.EngineSnapshot, id model.NodeID) bool {
	_, member := e.Nodes[id]
	_, self := e.Nodes[e.Node]
	return e.Leader && e.ServicesValid && self && !member
}
