package ipam

import (
	"context"
	"fmt"
	"net/netip"

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
// kind pool.ErrConflict; what the engine then releases does not touch the
// owner's pool. A pool that was never requested is made.
func (a *Allocator) Bind(ctx context.Context, network model.NetworkID, subnet netip.Prefix) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	change, err := a.table.PlanBind(network, subnet, a.held(network))
	if err != nil {
		return err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return fmt.Errorf("bind pool %s to network %s: %w", subnet, network, err)
	}
	return nil
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
// leased. One that an endpoint holds still (Config.Held) is not dropped. The list
// has to be whole: what could not be read must not be confirmed.
//
// A network that owns no pool is an *pool.Error of kind pool.ErrUnknownNetwork:
// Bind it, and call again.
func (a *Allocator) Confirm(ctx context.Context, network model.NetworkID, live []netip.Addr) (pool.Confirmation, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	found, change, err := a.table.PlanConfirm(network, live, a.held(network))
	if err != nil {
		return pool.Confirmation{}, err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return pool.Confirmation{}, fmt.Errorf("confirm leases of network %s: %w", network, err)
	}
	if len(found.Dropped)+len(found.Adopted) > 0 {
		a.log.InfoContext(ctx, "leases corrected after a change of leader", "network", network,
			"dropped", len(found.Dropped), "adopted", len(found.Adopted))
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

// Leases returns the addresses in use of a pool, in rising order.
func (a *Allocator) Leases(id pool.ID) []pool.Lease {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.table.Leases(id)
}
