package driver

import (
	"context"
	"fmt"
	"net/netip"
	"path"
	"strings"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/options"
)

// EndpointRequest is CreateEndpoint's.
type EndpointRequest struct {
	Network  model.NetworkID
	Endpoint model.EndpointID
	Addr     netip.Prefix // with the subnet's length
	MAC      model.MAC    // zero unless the user chose one
	Options  map[string]string
}

// EndpointReply is CreateEndpoint's answer.
type EndpointReply struct {
	MAC model.MAC // zero if the request had one: the engine forbids to answer it again
}

// CreateEndpoint records an endpoint. Peers learn of it from here on, so that
// they know the way to the container before it starts.
func (d *Driver) CreateEndpoint(ctx context.Context, r EndpointRequest) (EndpointReply, error) {
	n, ok := d.cfg.Intents.Network(r.Network)
	if !ok {
		return EndpointReply{}, fmt.Errorf("create endpoint %s: network %s is not known on this node: the engine has not created it here since it was last deleted; start the task again, and if that does not help restart docker", r.Endpoint.Short(), r.Network.Short())
	}
	opts, err := options.Service(r.Options)
	if err == nil {
		err = options.Fits(n.Options, opts)
	}
	if err == nil {
		err = d.cfg.Abilities.service(opts)
	}
	if err != nil {
		return EndpointReply{}, fmt.Errorf("create endpoint %s: %w", r.Endpoint.Short(), err)
	}
	addr := r.Addr.Addr()
	if !n.Subnet.Contains(addr) {
		return EndpointReply{}, fmt.Errorf("create endpoint %s: address %s is not in the subnet %s of network %s", r.Endpoint.Short(), r.Addr, n.Subnet, r.Network.Short())
	}
	e := model.Endpoint{ID: r.Endpoint, Network: r.Network, Addr: addr, MAC: r.MAC, Phase: model.Created, Options: opts}
	var reply EndpointReply
	if e.MAC.IsZero() {
		e.MAC = model.MACFor(addr)
		reply.MAC = e.MAC
	}
	if old, known := d.cfg.Intents.Endpoint(r.Endpoint); known {
		if old.Network != e.Network || old.Addr != e.Addr || old.MAC != e.MAC {
			return EndpointReply{}, fmt.Errorf("create endpoint %s: it exists already on network %s with address %s; delete it first", r.Endpoint.Short(), old.Network.Short(), old.Addr)
		}
		return reply, nil
	}
	if _, err := d.cfg.Intents.PutEndpoint(ctx, e); err != nil {
		return EndpointReply{}, fmt.Errorf("record endpoint %s: %w", r.Endpoint.Short(), err)
	}
	return reply, nil
}

// JoinRequest is Join's.
type JoinRequest struct {
	Network  model.NetworkID
	Endpoint model.EndpointID
	Sandbox  string // path of the container's network namespace, as the host sees it; may not exist yet
	Options  map[string]string
}

// JoinReply is Join's answer. It names no gateway, so that the engine attaches
// docker_gwbridge: that is the container's way out, with the engine's own
// masquerade and host-mode ports.
type JoinReply struct {
	SrcName   string // device in the host's namespace that the engine moves into the container
	DstPrefix string // what it is renamed to there, with a number behind
}

// Join makes the endpoint's veth pair and waits until the kernel has it.
func (d *Driver) Join(ctx context.Context, r JoinRequest) (JoinReply, error) {
	n, _ := d.cfg.Intents.Network(r.Network)
	e, ok := d.cfg.Intents.Endpoint(r.Endpoint)
	if !ok || e.Network != r.Network || n.ID != r.Network {
		return JoinReply{}, fmt.Errorf("join endpoint %s: it is not known on network %s; create it first", r.Endpoint.Short(), r.Network.Short())
	}
	e.Phase, e.Left, e.Sandbox = model.Joined, false, d.sandbox(r.Sandbox)
	rev, err := d.cfg.Intents.PutEndpoint(ctx, e)
	if err != nil {
		return JoinReply{}, fmt.Errorf("record endpoint %s: %w", r.Endpoint.Short(), err)
	}
	ns, pair := overlay.NetnsName(n), overlay.HostEnd(e.ID)
	err = d.settle(ctx, rev, func(k kernel.Key) bool {
		switch k := k.(type) {
		case kernel.Link:
			return infrastructure(k, ns) || k.NS == ns && k.Name == pair
		case kernel.GuardPort: // nothing that the container sends would pass
			return k.NS == ns && k.Dev == pair
		case kernel.GuardAddr:
			return k.NS == ns && k.Dev == pair
		}
		return infrastructure(k, ns)
	})
	if err != nil {
		return JoinReply{}, fmt.Errorf("join endpoint %s: %w", r.Endpoint.Short(), err)
	}
	return JoinReply{SrcName: overlay.TaskEnd(n, e.ID), DstPrefix: overlay.TaskDevPrefix}, nil
}

// sandbox turns the engine's path of a namespace into this process's. The engine
// writes /var/run or /run, which are the same directory on the host. No path,
// which is no sandbox, stays none.
func (d *Driver) sandbox(p string) string {
	for _, run := range []string{"/var/run/", "/run/"} {
		if rest, ok := strings.CutPrefix(path.Clean(p), run); ok {
			return path.Join(d.cfg.HostRun, rest)
		}
	}
	return p
}

// Leave takes an endpoint out of service. Its veth pair stays: the engine is
// about to move the container's end back.
func (d *Driver) Leave(ctx context.Context, _ model.NetworkID, id model.EndpointID) error {
	e, ok := d.cfg.Intents.Endpoint(id)
	if !ok || e.Left {
		return nil
	}
	e.Left = true
	if _, err := d.cfg.Intents.PutEndpoint(ctx, e); err != nil {
		return fmt.Errorf("leave endpoint %s: %w", id.Short(), err)
	}
	d.cfg.Loop.Trigger()
	return nil
}

// DeleteEndpoint forgets an endpoint; the loop removes what it had.
func (d *Driver) DeleteEndpoint(ctx context.Context, _ model.NetworkID, id model.EndpointID) error {
	if _, err := d.cfg.Intents.DeleteEndpoint(ctx, id); err != nil {
		return fmt.Errorf("delete endpoint %s: %w", id.Short(), err)
	}
	d.cfg.Loop.Trigger()
	return nil
}
