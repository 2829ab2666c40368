package main

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
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
	whole   bool                          // so were the pools with the managers' networks, if this one leads
	listed  time.Time                     // when it first listed them
	worker  time.Time                     // since when it says that it is no manager; zero: it does not
	left    time.Time                     // when it last left a swarm; zero: it has not
	gone    map[model.NetworkID]time.Time // since when the swarm lacks a network that owns a pool or a VNI
	told    map[string]string             // what was complained of, by subject: every look tries again, and the log shall not grow with that
}

// complain logs what is wrong with a subject when that changes; nil: all is well again.
func (f *follower) complain(subject, text string, err error) {
	if err == nil {
		delete(f.told, subject)
		return
	}
	if f.told == nil {
		f.told = make(map[string]string)
	}
	if f.told[subject] != err.Error() {
		f.told[subject] = err.Error()
		f.log.Error(text, "err", err)
	}
}

// engineHub is what the follower asks of the view.
type engineHub interface {
	Self() model.Self
	SetEngine(context.Context, model.EngineSnapshot) error
	Adopted()
	Settle(context.Context) bool
	Claim(context.Context) error
}

type adopter interface {
	Adopt(context.Context, model.EngineSnapshot) error
	Recover(context.Context, model.EngineSnapshot) error
	Follow(time.Time)
	Allocated() []model.NetworkID
	Free(context.Context, model.NetworkID) error
}

// poolKeeper is the owner of the address pools.
type poolKeeper interface {
	Recovered()
	Confirm(ctx context.Context, network model.NetworkID, live []netip.Addr, asked time.Time) (pool.Confirmation, error)
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

	// workerFor is how long an engine must have said that it is no manager, in two readings
	// at least: those of a swarm that is at work are 10 s apart. That a manager which leads
	// says so was not seen for longer than half a second.
	workerFor = 5 * time.Second

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
	f.followLeader(s)
	f.recover(ctx, s)
	f.confirm(ctx, s)
	f.hub.Settle(ctx)
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
		f.complain("key of "+string(id), "the gossip key of network "+id.Short()+" was not taken, or could not be recorded", err)
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

// followLeader tells the driver of a time at which this node did not lead: another
// manager did, by the managers' word, or it was none. A node that unlocks its swarm or
// starts leads it for a moment before its engine calls it a manager.
func (f *follower) followLeader(s model.EngineSnapshot) {
	if f.scope == scopeLocal || !s.SwarmValid || s.Manager || !s.Active && !s.NoSwarm {
		f.worker = time.Time{}
	} else if f.worker.IsZero() {
		f.worker = s.SwarmAt
	}
	switch {
	case f.scope == scopeLocal:
	case !f.worker.IsZero() && s.SwarmAt.Sub(f.worker) >= workerFor:
		f.driver.Follow(f.worker)
	case s.SwarmValid && !s.Follows.IsZero():
		f.driver.Follow(s.Follows)
	}
}

// recover brings back once what the records lack of the swarm's networks, if this
// manager leads: to one that comes to lead, Swarm's allocator tells all of them.
func (f *follower) recover(ctx context.Context, s model.EngineSnapshot) {
	if f.whole || f.scope == scopeLocal || !s.SwarmValid || !s.NetworksValid || s.Manager && !s.ServicesValid {
		return
	}
	var err error
	if s.Leader {
		err = f.driver.Recover(ctx, s)
		f.complain("networks", "not all networks of the swarm could be brought back, will be retried", err)
	}
	f.whole = err == nil
	f.pools.Recovered() // what is brought back later was refused by the disk, or is asked for
}

// confirm compares what is allocated on this node with what the managers know: leases
// with the addresses in use, and owners with the networks there are. A manager that does
// not lead is told of no release, and compares no leases.
func (f *follower) confirm(ctx context.Context, s model.EngineSnapshot) {
	if f.scope == scopeLocal || !s.Manager || !s.NetworksValid {
		return
	}
	ids := f.driver.Allocated()
	maps.DeleteFunc(f.gone, func(id model.NetworkID, _ time.Time) bool { return !slices.Contains(ids, id) })
	for _, id := range ids {
		n, listed := s.Networks[id]
		switch live, known := s.Live[id]; {
		case listed:
			delete(f.gone, id)
			// Of addresses that another driver gives, this one hears nothing: it would lease
			// them, and call each a leak that was given back.
			if known && s.Leader && s.ServicesValid && n.IPAM == s.Alias {
				_, err := f.pools.Confirm(ctx, id, live, s.ServicesAt)
				f.complain("leases of "+string(id), "leases of network "+id.Short()+" could not be compared with the swarm's", err)
			}
		case s.SwarmValid && s.ServicesValid:
			f.missing(ctx, id)
		default:
			// An engine whose managers do not answer lists its own networks only.
			delete(f.gone, id)
		}
	}
}

// missing notes that the swarm does not list a network, and frees its pool and its
// VNI if that has lasted: who frees them while another manager leads tells only that
// one, and what was freed on a disk that took nothing is back after a crash.
func (f *follower) missing(ctx context.Context, id model.NetworkID) {
	since, known := f.gone[id]
	if !known {
		f.gone[id] = f.now()
		return
	}
	if f.now().Sub(since) < goneFor {
		return
	}
	if err := f.driver.Free(ctx, id); err != nil {
		f.log.Error("pool and VNI not freed, will be retried", "network", id.Short(), "err", err)
		return
	}
	delete(f.gone, id)
	f.log.Info("pool and VNI freed: the swarm no longer has its network", "network", id.Short())
}
