package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"sluice/ipam/pool"
)

// PoolRequest is IpamDriver.RequestPool.
type PoolRequest struct {
	Space   string
	Pool    string // --subnet; "" to get one
	SubPool string // --ip-range
	Options map[string]string
	V6      bool // not reliable: false for IPv6 subnets of a swarm network
}

// PoolReply is the answer to a PoolRequest.
type PoolReply struct {
	PoolID string
	Pool   netip.Prefix
	Data   map[string]string // nothing: the engine asks for the gateway by itself
}

// AddressRequest is IpamDriver.RequestAddress.
type AddressRequest struct {
	PoolID  string
	Address string // --ip, --gateway, or what the leader decided; "" to get one
	Options map[string]string
}

// AddressReply is the answer to an AddressRequest. Address has the mask of the
// pool: Swarm's allocator keys its leases by the text of both.
type AddressReply struct{ Address netip.Prefix }

// ReleasePoolRequest is IpamDriver.ReleasePool.
type ReleasePoolRequest struct{ PoolID string }

// ReleaseAddressRequest is IpamDriver.ReleaseAddress.
type ReleaseAddressRequest struct{ PoolID, Address string }

// RequestPool gives a subnet to a network that is about to be made. Errors: what
// the user has to change, as *pool.Error; or the journal's.
func (a *Allocator) RequestPool(ctx context.Context, r PoolRequest) (PoolReply, error) {
	table, err := a.serves(r.Space)
	if err != nil {
		return PoolReply{}, err
	}
	if !table {
		return relayPool(r)
	}
	opts, err := pool.ParseOptions(r.Options)
	if err != nil {
		return PoolReply{}, err
	}
	if r.Pool == "" {
		return a.freshPool(ctx, r, opts)
	}
	// sluice.size and sluice.pool mean nothing with a subnet, but are no mistake
	// either: a new leader asks for the subnet that the old one chose, with the
	// options of the network.
	subnet, sub, err := parsePool(r)
	if err != nil {
		return PoolReply{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	id, change, err := a.table.PlanClaim(subnet, sub)
	if err != nil {
		return PoolReply{}, err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return PoolReply{}, fmt.Errorf("request pool %s: %w", r.Pool, err)
	}
	return PoolReply{PoolID: id.String(), Pool: id.Subnet}, nil
}

// freshPool serves a request that leaves the choice to us.
func (a *Allocator) freshPool(ctx context.Context, r PoolRequest, opts pool.Options) (PoolReply, error) {
	switch {
	case r.V6:
		return PoolReply{}, refuse("an IPv6 subnet was asked for; sluice networks are IPv4 only; leave out --ipv6")
	case r.SubPool != "":
		return PoolReply{}, refuse("sub-pool %s needs a pool; give --subnet together with --ip-range", r.SubPool)
	}
	list, err := opts.List(a.list)
	if err != nil {
		return PoolReply{}, err
	}
	if !a.awaitRecovery(ctx) { // it could be one that the swarm has
		return PoolReply{}, refuse("no subnet can be chosen yet: the networks that the swarm has were not read since the state file was made; try again in some seconds, or give --subnet")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	id, change, err := a.table.PlanFresh(list, a.routes())
	if err != nil {
		return PoolReply{}, err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return PoolReply{}, fmt.Errorf("request a pool: %w", err)
	}
	return PoolReply{PoolID: id.String(), Pool: id.Subnet}, nil
}

// ReleasePool takes a subnet back. One that is not known is no error.
func (a *Allocator) ReleasePool(ctx context.Context, r ReleasePoolRequest) error {
	id, err := pool.ParseID(r.PoolID)
	if err != nil {
		return err
	}
	if id.Space != a.space {
		return nil // nothing of the other space is ever kept
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.commitLocked(ctx, a.table.PlanReleasePool(id)); err != nil {
		return fmt.Errorf("release pool %s: %w", r.PoolID, err)
	}
	return nil
}

// RequestAddress leases an address to a gateway, a virtual IP or a container,
// which of them only the gateway's request tells. Errors as RequestPool's.
func (a *Allocator) RequestAddress(ctx context.Context, r AddressRequest) (AddressReply, error) {
	id, err := pool.ParseID(r.PoolID)
	if err != nil {
		return AddressReply{}, err
	}
	table, err := a.serves(id.Space)
	if err != nil {
		return AddressReply{}, err
	}
	w := pool.Want{Gateway: r.Options[pool.KeyAddressType] == pool.TypeGateway}
	_, w.Serial = r.Options[pool.KeySerial]
	if r.Address != "" {
		if w.Address, err = parseAddress(r.Address); err != nil {
			return AddressReply{}, err
		}
	}
	if !table {
		return relayAddress(id, w.Address)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	got, change, err := a.table.PlanAddress(id, w)
	if errors.Is(err, pool.ErrUnknownPool) {
		a.mu.Unlock()
		_ = a.awaitRecovery(ctx) // if it did not come, the answer is the same
		a.mu.Lock()
		got, change, err = a.table.PlanAddress(id, w)
	}
	if err != nil {
		return AddressReply{}, err
	}
	if err := a.commitLocked(ctx, change); err != nil {
		return AddressReply{}, fmt.Errorf("request address %s of %s: %w", got, r.PoolID, err)
	}
	return AddressReply{Address: netip.PrefixFrom(got, id.Subnet.Bits())}, nil
}

// ReleaseAddress takes an address back. One that is not leased is no error.
func (a *Allocator) ReleaseAddress(ctx context.Context, r ReleaseAddressRequest) error {
	id, err := pool.ParseID(r.PoolID)
	if err != nil {
		return err
	}
	addr, err := parseAddress(r.Address)
	if err != nil {
		return err
	}
	if id.Space != a.space {
		return nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.commitLocked(ctx, a.table.PlanReleaseAddress(id, addr, a.now())); err != nil {
		return fmt.Errorf("release address %s of %s: %w", r.Address, r.PoolID, err)
	}
	return nil
}

// serves reports whether requests for a space go to the table; false with no
// error means the relay.
func (a *Allocator) serves(space string) (table bool, err error) {
	switch {
	case space == a.space:
		return true, nil
	case space == LocalSpace:
		return false, nil
	case space == GlobalSpace:
		return false, refuse("this plugin has SCOPE=local and serves networks of one engine; use the plugin with SCOPE=global for networks of the swarm")
	}
	return false, refuse("unknown address space %q; there are %s and %s", space, LocalSpace, GlobalSpace)
}

// relayPool says yes to a subnet that the leader has decided on.
func relayPool(r PoolRequest) (PoolReply, error) {
	switch {
	case r.V6:
		return PoolReply{}, refuse("an IPv6 subnet was asked for; sluice networks are IPv4 only; leave out --ipv6")
	case r.Pool == "":
		return PoolReply{}, refuse("this plugin has SCOPE=global: its subnets are chosen by the swarm's leader; for a network of this engine alone use the plugin alias with SCOPE=local")
	}
	subnet, sub, err := parsePool(r)
	if err != nil {
		return PoolReply{}, err
	}
	id := pool.ID{Space: LocalSpace, Subnet: subnet, Sub: sub}
	return PoolReply{PoolID: id.String(), Pool: subnet}, nil
}

// relayAddress says yes to an address that the leader has decided on, also to
// one that somebody on this node seems to have: after a crash of the engine its
// old containers are gone without a release.
func relayAddress(id pool.ID, addr netip.Addr) (AddressReply, error) {
	switch {
	case !addr.IsValid():
		return AddressReply{}, refuse("this plugin has SCOPE=global: addresses of pool %s are chosen by the swarm's leader; for a network of this engine alone use the plugin alias with SCOPE=local", id)
	case !id.Subnet.Contains(addr):
		return AddressReply{}, refuse("address %s is outside of pool %s; choose one inside", addr, id.Subnet)
	}
	return AddressReply{Address: netip.PrefixFrom(addr, id.Subnet.Bits())}, nil
}

// parsePool reads the subnet and, if there is one, the sub-pool of a request.
func parsePool(r PoolRequest) (subnet, sub netip.Prefix, err error) {
	if subnet, err = pool.ParseSubnet(r.Pool); err != nil || r.SubPool == "" {
		return subnet, sub, err
	}
	sub, err = pool.ParseSub(r.SubPool, subnet)
	return subnet, sub, err
}

// parseAddress reads an address of a request.
func parseAddress(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil || !addr.Unmap().Is4() {
		return netip.Addr{}, refuse("address %q is not an IPv4 address; write it as 10.255.0.5, without a mask", s)
	}
	return addr.Unmap(), nil
}

// refuse returns an error for the person behind a request.
func refuse(text string, args ...any) error {
	return &pool.Error{Kind: pool.ErrInvalid, Text: fmt.Sprintf(text, args...)}
}
