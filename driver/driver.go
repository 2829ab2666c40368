package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/internal/reconcile"
	"sluice/ipam/pool"
)

// Intents is this node's record of what the engine asked for. Puts and deletes
// are durable when they return; the number is the view's revision that has them.
type Intents interface {
	Self() model.Self
	Network(model.NetworkID) (model.Network, bool)
	// PutNetwork also deletes the endpoints of a network that is known: both or neither.
	PutNetwork(context.Context, model.Network) (uint64, error)
	// DeleteNetwork also deletes the network's endpoints.
	DeleteNetwork(context.Context, model.NetworkID) (uint64, error)
	Endpoint(model.EndpointID) (model.Endpoint, bool)
	PutEndpoint(context.Context, model.Endpoint) (uint64, error)
	DeleteEndpoint(context.Context, model.EndpointID) (uint64, error)
	// SetVTEP records this node's address of the data path.
	SetVTEP(context.Context, netip.Addr) error
	// TakeOver records an endpoint that runs already, and its network. That it
	// cannot be made durable yet is no error, nor is it of a delete, of an endpoint
	// that was left, or of the VTEP: what has happened is not refused.
	TakeOver(context.Context, model.Network, model.Endpoint) error
}

// Allocations is the leader's book of networks of the whole swarm.
type Allocations interface {
	// VNI gives network a VXLAN identifier: the wished one if it is not 0, else
	// the one it has, else a free one. It fails if another network has the wished one.
	VNI(ctx context.Context, network model.NetworkID, wish model.VNI) (model.VNI, error)
	// Owner is the network that has an identifier, or empty.
	Owner(model.VNI) model.NetworkID
	// Networks are those that have one.
	Networks() []model.NetworkID
	Free(ctx context.Context, network model.NetworkID) error
}

// Pools is the owner of the address pools.
type Pools interface {
	// Bind says whose a pool is; again: a leader has allocated the network before.
	Bind(ctx context.Context, network model.NetworkID, pool netip.Prefix, again bool) error
	Free(ctx context.Context, network model.NetworkID) error
	// Recover makes a pool again whose record was lost. One that is there stays.
	Recover(ctx context.Context, lost pool.Lost) error
	// Follow says that another manager led at a time: pools that were bound before may be
	// of networks that are no more.
	Follow(at time.Time)
	// Owners are the networks that have a pool, and whether each was bound since another
	// manager led last.
	Owners() map[model.NetworkID]bool
}

// Keys is the ring of gossip keys.
type Keys interface {
	// Current is the swarm's key, made anew if none is known yet.
	Current(context.Context) ([]byte, error)
	Add(context.Context, []byte) error
}

// Loop brings the kernel to an intent.
type Loop interface {
	Trigger()
	Wait(ctx context.Context, revision uint64) (reconcile.Round, error)
}

// Config is what a Driver is made of.
type Config struct {
	Intents     Intents
	Allocations Allocations
	Pools       Pools
	Keys        Keys
	Loop        Loop
	// UnderlayMTU is the MTU of the device that has the address, in bytes.
	UnderlayMTU func(netip.Addr) (int, error)
	// Hint is told the address of another node of the swarm; it must not block.
	Hint func(netip.Addr)
	// Abilities is what this node's kernel has for virtual IPs.
	Abilities Abilities
	// Local makes networks of this engine only (setting SCOPE=local).
	Local bool
	// HostRun is where this process sees the host's /run.
	HostRun string
	Log     *slog.Logger
}

// Driver answers the verbs. It is safe for concurrent use; the engine calls it
// for several endpoints at a time.
type Driver struct{ cfg Config }

// New makes a driver.
func New(cfg Config) *Driver { return &Driver{cfg: cfg} }

// Subnet is one pool of a network as the engine hands it over.
type Subnet struct {
	Pool    netip.Prefix
	Gateway netip.Prefix // address with the pool's length; invalid if none
}

// AllocateRequest is what the swarm's leader asks of a new or replayed network.
type AllocateRequest struct {
	Network model.NetworkID
	Options map[string]string // the user's, and on replay also what Allocate returned
	Subnets []Subnet          // IPv4, and wrongly IPv6 too (swarmkit puts both into IPv4Data)
	V6      int               // IPv6 subnets declared as such
}

// Allocate decides a swarm network's VNI, MTU and gossip key, and returns the
// options that every node will get. It returns an error only for what makes the
// pools unusable; see the package's comment for the rest.
func (d *Driver) Allocate(ctx context.Context, r AllocateRequest) (map[string]string, error) {
	out := make(map[string]string, len(r.Options)+4)
	for k, v := range r.Options {
		if k != options.Refused {
			out[k] = v
		}
	}
	refuse := func(err error) (map[string]string, error) {
		d.cfg.Log.Error("network refused; its tasks will be rejected with this text", "network", r.Network.Short(), "err", err)
		out[options.Refused] = err.Error()
		return out, nil
	}
	req, err := options.Network(out)
	if err == nil {
		err = oneSubnet(r.Subnets, r.V6)
	}
	if err != nil {
		return refuse(err)
	}
	again := req.Key != "" // part of every answer but a refusal, and told to every leader after
	if err := d.cfg.Pools.Bind(ctx, r.Network, r.Subnets[0].Pool.Masked(), again); err != nil {
		return nil, fmt.Errorf("allocate network %s: %w", r.Network.Short(), err)
	}
	if again {
		if err := d.makeWay(ctx, r.Network, req.VNI); err != nil {
			return nil, fmt.Errorf("allocate network %s: %w", r.Network.Short(), err)
		}
	}
	vni, err := d.cfg.Allocations.VNI(ctx, r.Network, req.VNI)
	if err != nil {
		return refuse(err)
	}
	out[options.VNI] = fmt.Sprint(vni)
	if req.MTU == 0 {
		if mtu, err := d.underlayMTU(); err == nil {
			out[options.MTU] = fmt.Sprint(mtu - overlay.VXLANOverhead)
		} else {
			d.cfg.Log.Info("MTU left to each node", "network", r.Network.Short(), "err", err)
		}
	}
	if req.Key == "" {
		key, err := d.cfg.Keys.Current(ctx)
		if err != nil {
			return nil, fmt.Errorf("allocate network %s: %w", r.Network.Short(), err)
		}
		out[options.SecretKey] = options.EncodeKey(key)
	} else if err := d.cfg.Keys.Add(ctx, req.Key.Bytes()); err != nil {
		return nil, fmt.Errorf("allocate network %s: %w", r.Network.Short(), err)
	}
	return out, nil
}

// makeWay frees the VNI that a leader has given a network before, if here another has it
// that the swarm has not told of since another manager led, or whose pool went the same
// way: it was ended then, or its VNI could not have been given away.
func (d *Driver) makeWay(ctx context.Context, network model.NetworkID, wish model.VNI) error {
	owner := d.cfg.Allocations.Owner(wish)
	if owner == "" || owner == network || d.cfg.Pools.Owners()[owner] {
		return nil
	}
	d.cfg.Log.Info("VNI of a network of a former lead goes to another", "network", owner.Short(), "vni", wish, "to", network.Short())
	return d.Free(ctx, owner)
}

// Follow notes that another manager led the swarm at a time, by this process's clock.
// What networks were allocated here before then may be gone, or be another's.
func (d *Driver) Follow(at time.Time) { d.cfg.Pools.Follow(at) }

// Allocated are the networks that have a pool or a VNI here.
func (d *Driver) Allocated() []model.NetworkID {
	all := slices.AppendSeq(d.cfg.Allocations.Networks(), maps.Keys(d.cfg.Pools.Owners()))
	slices.Sort(all)
	return slices.Compact(all)
}

// oneSubnet says what is wrong with a swarm network's subnets. The engine's
// allocator picks a pool at random for each address, and asks for IPv6 addresses
// node by node with no coordination (engine 20.10 to 28.5), so one IPv4 subnet
// is all that can be served rightly.
func oneSubnet(subnets []Subnet, v6 int) error {
	v4 := 0
	for _, s := range subnets {
		if s.Pool.Addr().Is4() {
			v4++
		} else {
			v6++
		}
	}
	switch {
	case v6 > 0:
		return errors.New("an IPv6 subnet was asked for, but Docker swarm does not coordinate IPv6 addresses between nodes; create the network without --ipv6 and without an IPv6 --subnet")
	case v4 != 1:
		return fmt.Errorf("%d IPv4 subnets were asked for, but a swarm network can have one; create the network with a single --subnet (a larger one, such as /16)", v4)
	}
	return nil
}

// Free forgets a network of the swarm.
func (d *Driver) Free(ctx context.Context, id model.NetworkID) error {
	return errors.Join(d.cfg.Allocations.Free(ctx, id), d.cfg.Pools.Free(ctx, id))
}

// CreateRequest is what a node asks when it needs a network.
type CreateRequest struct {
	Network  model.NetworkID
	Options  map[string]string // the driver's options: Allocate's answer, or the user's on a local network
	Internal bool
	IPv6     bool
	Subnets  []Subnet // IPv4
	Subnets6 []Subnet
}

// CreateNetwork records a network and waits until the kernel has it. For one
// that is known it starts over: the engine asks again only after it has
// forgotten the network, so endpoints recorded before are of a former life. What
// cannot be recorded leaves the network and its endpoints as they were.
func (d *Driver) CreateNetwork(ctx context.Context, r CreateRequest) error {
	n, key, err := d.network(r)
	if err == nil {
		err = d.fits(n)
	}
	if err == nil {
		err = d.cfg.Abilities.network(n.Options)
	}
	if err == nil && !n.Local {
		err = d.cfg.Keys.Add(ctx, key)
	}
	if err != nil {
		return fmt.Errorf("network %s: %w", r.Network.Short(), err)
	}
	if n.Local {
		// On a swarm the leader has bound the pool in Allocate.
		if err := d.cfg.Pools.Bind(ctx, n.ID, n.Subnet, false); err != nil {
			return fmt.Errorf("network %s: %w", r.Network.Short(), err)
		}
	}
	rev, err := d.cfg.Intents.PutNetwork(ctx, n)
	if err != nil {
		return fmt.Errorf("record network %s: %w", r.Network.Short(), err)
	}
	ns := overlay.NetnsName(n)
	if err := d.settle(ctx, rev, func(k kernel.Key) bool { return infrastructure(k, ns) }); err != nil {
		undo := d.DeleteNetwork(context.WithoutCancel(ctx), n.ID)
		return fmt.Errorf("create network %s: %w", r.Network.Short(), errors.Join(err, undo))
	}
	return nil
}

// network makes the intent of a request, and tells the gossip key that it carries;
// none on a local network.
func (d *Driver) network(r CreateRequest) (n model.Network, key []byte, err error) {
	if text := r.Options[options.Refused]; text != "" {
		return model.Network{}, nil, errors.New(text)
	}
	req, err := options.Network(r.Options)
	if err != nil {
		return model.Network{}, nil, err
	}
	if r.IPv6 || len(r.Subnets6) > 0 {
		return model.Network{}, nil, errors.New("IPv6 was asked for, but sluice serves IPv4 only; create the network without --ipv6")
	}
	if len(r.Subnets) != 1 {
		return model.Network{}, nil, fmt.Errorf("%d IPv4 subnets were given, want one; create the network with a single --subnet", len(r.Subnets))
	}
	if pool := r.Subnets[0].Pool; !pool.Addr().Is4() {
		return model.Network{}, nil, fmt.Errorf("subnet %s is not IPv4, which is all that sluice serves; choose an IPv4 --subnet", pool)
	}
	n = model.Network{
		ID:       r.Network,
		Subnet:   r.Subnets[0].Pool.Masked(),
		Gateway:  r.Subnets[0].Gateway.Addr(),
		Local:    d.cfg.Local,
		Internal: r.Internal,
		MTU:      req.MTU,
		Options:  req.Options,
	}
	if !n.Gateway.IsValid() {
		n.Gateway = n.Subnet.Addr().Next()
	}
	if !n.Subnet.Contains(n.Gateway) {
		return model.Network{}, nil, fmt.Errorf("gateway %s is not in the subnet %s; choose a --gateway inside it", n.Gateway, n.Subnet)
	}
	if n.Local {
		if n.MTU == 0 {
			n.MTU = localMTU
		}
		return n, nil, nil
	}
	if n.VNI = req.VNI; n.VNI == 0 || req.Key == "" {
		return model.Network{}, nil, errors.New("this is no swarm network: the swarm's leader has not allocated it; join a swarm first, or use an alias of the plugin with SCOPE=local for a network of this engine only")
	}
	if n.MTU == 0 {
		mtu, err := d.underlayMTU()
		if err != nil {
			return model.Network{}, nil, err
		}
		n.MTU = mtu - overlay.VXLANOverhead
	}
	return n, req.Key.Bytes(), nil
}

// DeleteNetwork forgets a network of this node, with its endpoints.
func (d *Driver) DeleteNetwork(ctx context.Context, id model.NetworkID) error {
	if _, err := d.cfg.Intents.DeleteNetwork(ctx, id); err != nil {
		return fmt.Errorf("delete network %s: %w", id.Short(), err)
	}
	d.cfg.Loop.Trigger()
	if !d.cfg.Local {
		return nil // the leader frees the pool in Free
	}
	if err := d.cfg.Pools.Free(ctx, id); err != nil {
		return fmt.Errorf("delete network %s: %w", id.Short(), err)
	}
	return nil
}

// infrastructure tells the objects that every endpoint of a network stands on.
func infrastructure(k kernel.Key, ns string) bool {
	switch k := k.(type) {
	case kernel.Netns:
		return k.Name == ns
	case kernel.Link:
		return k.NS == ns && k.Kind != kernel.Veth
	case kernel.BridgeTable:
		return k.NS == ns
	case kernel.MarkTable:
		return k.NS == ns
	case kernel.LiftTable:
		return k.NS == ns
	case kernel.GuardTable:
		return k.NS == ns
	}
	return false
}

// settle waits until the loop has worked on revision rev, and returns what
// went wrong with the objects that matter.
func (d *Driver) settle(ctx context.Context, rev uint64, matters func(kernel.Key) bool) error {
	round, err := d.cfg.Loop.Wait(ctx, rev)
	if err != nil {
		return err
	}
	var errs []error
	for k, err := range round.Failed {
		if matters(k) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Node is what the engine tells of a node of the swarm.
type Node struct {
	Address     string // the data-path address of this node; the gossip address of others
	BindAddress string
	Self        bool
	Gone        bool
}

// Discovered takes note of a node. Only what the engine says of this node
// itself is believed; the rest is not replayed after a restart and is sometimes
// wrong, so it serves as a hint where to look for peers.
func (d *Driver) Discovered(ctx context.Context, n Node) error {
	if n.Gone {
		return nil
	}
	addr, err := netip.ParseAddr(n.Address)
	if err != nil {
		return fmt.Errorf("node discovery: address %q: %w", n.Address, err)
	}
	if addr = addr.Unmap(); !addr.Is4() {
		return fmt.Errorf("node discovery: address %s is not IPv4, which is all that sluice serves; let the node join the swarm with an IPv4 --advertise-addr and --data-path-addr", addr)
	}
	if !n.Self {
		d.cfg.Hint(addr)
		return nil
	}
	if d.cfg.Local {
		return nil
	}
	if err := d.cfg.Intents.SetVTEP(ctx, addr); err != nil {
		return err
	}
	d.cfg.Loop.Trigger()
	return nil
}
