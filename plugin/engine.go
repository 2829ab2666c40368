package main

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"sluice/internal/diag"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/ipam/pool"
)

// follower carries what the local engine tells to who needs it, and decides what
// only the passing of time tells: that the engine has told enough to take over
// what runs, and that a network is gone. All of it is of one goroutine.
type follower struct {
	scope  string
	now    func() time.Time
	hub    engineHub
	driver adopter
	pools  poolKeeper
	keys   keyKeeper
	wake   func()      // the gossiper
	named  chan string // capacity 1: the name of the diagnosis socket, once it is known
	log    *slog.Logger

	knownAs string                        // what was sent to named
	adopted bool                          // the engine's containers were compared with the records
	listed  time.Time                     // when it first listed them
	left    time.Time                     // when it last left a swarm; zero: it has not
	gone    map[model.NetworkID]time.Time // since when the swarm lacks a network that owns a pool
}

// engineHub is what the follower asks of the view.
type engineHub interface {
	Self() model.Self
	SetEngine(context.Context, model.EngineSnapshot) error
	Adopted()
	Settle() bool
	Claim(context.Context) error
}

type adopter interface {
	Adopt(context.Context, model.EngineSnapshot) error
}

// poolKeeper is the owner of the address pools.
type poolKeeper interface {
	Snapshot() []pool.Status
	Free(context.Context, model.NetworkID) error
	Confirm(ctx context.Context, network model.NetworkID, live []netip.Addr) (pool.Confirmation, error)
}

type keyKeeper interface {
	Add(context.Context, []byte) error
	ForgetBefore(context.Context, time.Time) error
}

const (
	// sandboxWait is how long the engine may take to tell the network namespace of
	// each container that it lists; it is asked container by container.
	sandboxWait = 10 * time.Second

	// goneFor is how long a network must be missing in what the managers list before
	// its pool is freed. The list is at most some seconds old.
	goneFor = time.Minute

	// newsAge is how late this process may learn that its node has changed the
	// swarm: dockerapi asks every 10 s, and an engine that has just joined may take
	// some seconds to answer. A key that is younger may be the new swarm's.
	newsAge = 15 * time.Second
)

// follow takes one snapshot.
func (f *follower) follow(ctx context.Context, s model.EngineSnapshot) {
	f.name(s)
	before := f.hub.Self().Node
	if err := f.hub.SetEngine(ctx, s); err != nil {
		f.log.Error("state could not be recorded, will be retried", "err", err)
	}
	f.forgetKeys(ctx, before, s)
	f.takeKeys(ctx, s)
	f.adopt(ctx, s)
	f.confirm(ctx, s)
	f.hub.Settle()
	if err := f.hub.Claim(ctx); err != nil {
		f.log.Error("claims for published ports could not be recorded, will be retried", "err", err)
	}
	f.wake()
}

// name tells the diagnosis socket what the engine calls the plugin. The engine
// renames no plugin that runs.
func (f *follower) name(s model.EngineSnapshot) {
	if name := diag.SocketName(s.Alias); name != "" && f.knownAs == "" {
		f.knownAs = name
		f.named <- name
	}
}

// forgetKeys drops the keys of a swarm that this node is in no more. With one of
// them as the key to send with, the next swarm would not understand this node.
func (f *follower) forgetKeys(ctx context.Context, before model.NodeID, s model.EngineSnapshot) {
	moved := before != "" && before != f.hub.Self().Node
	if !moved && !(s.SwarmValid && s.NoSwarm) {
		return
	}
	f.left = f.now()
	if err := f.keys.ForgetBefore(ctx, f.now().Add(-newsAge)); err != nil {
		f.log.Error("gossip keys of the former swarm are kept", "err", err)
	}
}

// takeKeys takes the gossip keys that the options of the swarm's networks carry. A
// manager lists all networks: it has the key without a task of its own, and after
// its state file was lost.
func (f *follower) takeKeys(ctx context.Context, s model.EngineSnapshot) {
	// What is listed just after a change of swarm may be the former one's.
	if f.scope == scopeLocal || !s.NetworksValid || !f.left.IsZero() && f.now().Sub(f.left) < newsAge {
		return
	}
	for id, n := range s.Networks {
		text := n.Options[options.SecretKey]
		if text == "" {
			continue
		}
		key, err := options.DecodeKey(text)
		if err == nil {
			err = f.keys.Add(ctx, key)
		}
		if err != nil {
			f.log.Error("the gossip key of a network was not taken", "network", id.Short(), "err", err)
		}
	}
}

// adopt takes over once what the engine has and the records lack.
func (f *follower) adopt(ctx context.Context, s model.EngineSnapshot) {
	if f.adopted || !s.ContainersValid || !s.NetworksValid {
		return
	}
	if f.listed.IsZero() {
		f.listed = f.now()
	}
	for _, c := range s.Containers {
		if c.Sandbox == "" && f.now().Sub(f.listed) < sandboxWait {
			return
		}
	}
	f.adopted = true
	if err := f.driver.Adopt(ctx, s); err != nil {
		f.log.Error("what the engine has could not be taken over", "err", err)
	}
	f.hub.Adopted()
}

// confirm compares this node's pools with what the managers know: leases that a
// change of leader has left in doubt with the addresses in use, and owners with
// the networks there are. A manager that does not lead is told of no release.
func (f *follower) confirm(ctx context.Context, s model.EngineSnapshot) {
	if f.scope == scopeLocal || !s.Manager || !s.NetworksValid {
		return
	}
	for _, p := range f.pools.Snapshot() {
		if p.Network == "" {
			continue
		}
		if _, listed := s.Networks[p.Network]; !listed {
			f.missing(ctx, p.Network)
			continue
		}
		delete(f.gone, p.Network)
		live, known := s.Live[p.Network]
		if p.Unconfirmed == 0 || !known || !s.Leader || !s.ServicesValid {
			continue
		}
		if _, err := f.pools.Confirm(ctx, p.Network, live); err != nil {
			f.log.Error("leases could not be compared with the swarm's", "network", p.Network.Short(), "err", err)
		}
	}
}

// missing notes that the swarm does not list a network, and frees its pool if
// that has lasted.
func (f *follower) missing(ctx context.Context, id model.NetworkID) {
	since, known := f.gone[id]
	if !known {
		f.gone[id] = f.now()
		return
	}
	if f.now().Sub(since) < goneFor {
		return
	}
	if err := f.pools.Free(ctx, id); err != nil {
		f.log.Error("pool not freed, will be retried", "network", id.Short(), "err", err)
		return
	}
	delete(f.gone, id)
	f.log.Info("pool freed: the swarm no longer has its network", "network", id.Short())
}
