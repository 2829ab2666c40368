package ipam

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// Bind says which network a pool belongs to. The driver calls it in
// AllocateNetwork on the leader, and in CreateNetwork of a plugin with
// Scope=local, and not in CreateNetwork on the nodes of a swarm.
//
// The same network and subnet again is a replay by a new leader: the leases are
// unconfirmed from now on, until they are requested again or Confirm looks at
// them. Another network's subnet, or one that overlaps it, is an *pool.Error of
// kind pool.ErrConflict; what the engine then releases does not touch the owner's
// pool. If a leader has allocated the network before (again), an owner that was told
// of before another manager led (Follow), and not since, loses the pool to it. A pool
// that was never requested is made.
func (a *Allocator) Bind(ctx context.Context, network model.NetworkID, subnet netip.Prefix, again bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	change, err := a.table.PlanBind(network, subnet, a.held(network), again)
	if err != nil {
		return err
	}
	err = a.commitLocked(ctx, change)
	// The swarm has the network, whether this could be recorded or not.
	a.table.Apply(a.table.PlanTold(network, a.now()))
	if err != nil {
		return fmt.Errorf("bind pool %s to network %s: %w", subnet, network, err)
	}
	return nil
}

// Follow says that another manager led at a time, by this process's clock: pools of
// networks that were told of before may be another's, see Bind. They stay with their
// leases until that is told, as most are told of again.
func (a *Allocator) Follow(at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.table.Apply(a.table.PlanFollow(at)) // nothing of it is journalled
}

// Owners are the networks that have a pool, and whether each was told of since another
// manager led last (Follow).
func (a *Allocator) Owners() map[model.NetworkID]bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.table.Owners()
}

// Recover makes the pool of a network again whose record was lost, see
// pool.PlanRecover. One that is there is no error, and stays.
func (a *Allocator) Recover(ctx context.Context, l pool.Lost) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l.Live != nil {
		// Swarm may have forgotten a task whose container still runs.
		l.Live = append(slices.Clone(l.Live), a.held(l.Network)...)
	}
	change, err := a.table.PlanRecover(l)
	if err != nil {
		return err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return fmt.Errorf("recover pool %s of network %s: %w", l.Subnet, l.Network, err)
	}
	if len(change.Pools) > 0 {
		a.log.InfoContext(ctx, "pool made again: the swarm has its network, and its record was lost", "network", l.Network.Short(),
			"pool", l.Subnet, "leases", len(change.Leases))
	}
	return nil
}

// Recovered says that the managers' networks were read, and what could be brought back
// of them was; calls after the first do nothing. With Config.Blank, requests that a
// missing pool could mislead wait for it.
func (a *Allocator) Recovered() { a.whole.Do(func() { close(a.recovered) }) }

// recoverWait bounds that. The managers' networks are read within half a second of this
// process's start; while the engine starts, they cannot be, and it waits for the answer.
// A call has 0.9 s in all, of which the commit needs some.
const recoverWait = 600 * time.Millisecond

// awaitRecovery waits for Recovered, but not for long, and reports whether it came.
func (a *Allocator) awaitRecovery(ctx context.Context) bool {
	select {
	case <-a.recovered:
		return true
	default:
	}
	limit := time.NewTimer(recoverWait)
	defer limit.Stop()
	select {
	case <-a.recovered:
		return true
	case <-limit.C:
	case <-ctx.Done():
	}
	return false
}

// Free drops the pool of a network with all its leases. The driver calls it in
// FreeNetwork (Scope=local: DeleteNetwork); on a manager that is not the leader,
// and gets no FreeNetwork, the background reader does once the network is gone.
// A network that owns nothing is no error.
func (a *Allocator) Free(ctx context.Context, network model.NetworkID) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.commitLocked(ctx, a.table.PlanFree(network)); err != nil {
		return fmt.Errorf("free pools of network %s: %w", network, err)
	}
	return nil
}

// Confirm compares the leases of a network with all addresses of it that the
// managers know of: virtual IPs of services, addresses of tasks (those of
// `docker run` on an attachable network too, which are tasks of no service) and
// the gateway. Unconfirmed leases that are not among them are dropped; addresses
// without a lease, which happens if the plugin was away during a replay, are
// leased. One that an endpoint holds still (Config.Held) is not dropped. Confirmed
// ones that nobody has are leaks after pool.LeakAfter, by Pools, and dropped after
// pool.FreeAfter. The list has to be whole: what could not be read must not be
// confirmed. asked is when the managers were asked for it, by this process's clock.
//
// A network that owns no pool is an *pool.Error of kind pool.ErrUnknownNetwork:
// Bind it, and call again.
func (a *Allocator) Confirm(ctx context.Context, network model.NetworkID, live []netip.Addr, asked time.Time) (pool.Confirmation, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	found, change, err := a.table.PlanConfirm(network, live, a.held(network), asked)
	if err != nil {
		return pool.Confirmation{}, err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return pool.Confirmation{}, fmt.Errorf("confirm leases of network %s: %w", network, err)
	}
	if len(found.Dropped)+len(found.Adopted) > 0 {
		a.log.InfoContext(ctx, "leases corrected by what the managers list", "network", network,
			"dropped", len(found.Dropped), "adopted", len(found.Adopted))
	}
	if len(found.Freed) > 0 {
		a.log.WarnContext(ctx, "leaked addresses freed: nobody has had them for long", "network", network,
			"freed", found.Freed, "after", pool.FreeAfter)
	}
	return found, nil
}

// Snapshot returns all pools of the space that this plugin decides on, in the
// order of their subnets. One without a network is being made, belongs to
// another driver's network, or is a leak: if it stays, and no network the
// managers know has its subnet, ReleasePool with its ID drops it.
func (a *Allocator) Snapshot() []pool.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.table.Status()
}

// Pools returns the same with the addresses in use.
func (a *Allocator) Pools() []pool.Listing {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.table.List()
}

// Leases returns the addresses in use of a pool, in rising order.
func (a *Allocator) Leases(id pool.ID) []pool.Lease {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.table.Leases(id)
}
