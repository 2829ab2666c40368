package main

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"sluice/internal/diag"
	"sluice/internal/keyring"
	"sluice/internal/keyshare"
	"sluice/internal/view"
)

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
