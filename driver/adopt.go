package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/ipam/pool"
)

// Adopt records what the engine has and this node's records have not: the
// networks and endpoints of running containers. It is how a node whose state
// file was lost comes back to what its kernel still does, without one packet
// lost. It is called once, with the engine's first list after a start; from then
// on the engine's calls tell of every change.
func (d *Driver) Adopt(ctx context.Context, s model.EngineSnapshot) error {
	var errs []error
	for id, c := range s.Containers {
		if _, known := d.cfg.Intents.Endpoint(id); known || !c.Addr.Is4() {
			continue
		}
		listed, ok := s.Networks[c.Network]
		if !ok || listed.Swarm == d.cfg.Local {
			continue
		}
		if err := d.adopt(ctx, id, c, listed); err != nil {
			errs = append(errs, fmt.Errorf("take over endpoint %s of container %s: %w", id.Short(), c.Name, err))
		}
	}
	if len(s.Containers) > 0 {
		d.cfg.Loop.Trigger()
	}
	return errors.Join(errs...)
}

// Recover brings back what the leader's book and pools have lost with the state file,
// by the networks and addresses that the managers list. Swarm's allocator tells of them
// only when another manager leads; until then every new task would be refused its
// address, and another network could get the same subnet or VNI. It is called with a
// snapshot of a leader whose parts are all valid, until it succeeds once; from then on
// the allocator's calls tell of every change. What contradicts what is there by now is
// logged and let be; an error says what may succeed when it is tried again.
func (d *Driver) Recover(ctx context.Context, s model.EngineSnapshot) error {
	var errs []error
	for id, n := range s.Networks {
		if !n.Swarm || !n.Subnet.IsValid() || n.Options[options.Refused] != "" {
			continue
		}
		err := d.bringBack(ctx, n, s)
		switch {
		case err == nil:
		case refusal(err):
			d.cfg.Log.Error("a network of the swarm cannot be brought back; remove it, or what is in its way", "network", id.Short(), "err", err)
		default:
			errs = append(errs, fmt.Errorf("bring back network %s: %w", id.Short(), err))
		}
	}
	return errors.Join(errs...)
}

func (d *Driver) bringBack(ctx context.Context, n model.EngineNetwork, s model.EngineSnapshot) error {
	req, err := options.Network(n.Options)
	if err != nil {
		return fmt.Errorf("%w: %w", errOptions, err)
	}
	lost := pool.Lost{Network: n.ID, Subnet: n.Subnet, Sub: n.Range}
	if n.IPAM == s.Alias { // another driver's addresses are not ours to lease
		lost.Gateway, lost.Live = n.Gateway, s.Live[n.ID]
	}
	if err := d.cfg.Pools.Recover(ctx, lost); err != nil || req.VNI == 0 {
		return err
	}
	_, err = d.cfg.Allocations.VNI(ctx, n.ID, req.VNI)
	return err
}

var errOptions = errors.New("its options are not understood; do all managers run the same version?")

// refusal reports whether trying again changes nothing.
func refusal(err error) bool {
	var refused *pool.Error
	return errors.As(err, &refused) || errors.Is(err, errOptions) || errors.Is(err, errTaken)
}

func (d *Driver) adopt(ctx context.Context, id model.EndpointID, c model.EngineEndpoint, listed model.EngineNetwork) error {
	n, known := d.cfg.Intents.Network(c.Network)
	if !known {
		if !listed.Subnet.IsValid() {
			return fmt.Errorf("the engine does not tell the subnet of network %s", listed.Name)
		}
		var key []byte
		var err error
		n, key, err = d.network(CreateRequest{
			Network: c.Network, Options: listed.Options, Internal: listed.Internal,
			Subnets: []Subnet{{Pool: listed.Subnet, Gateway: netip.PrefixFrom(listed.Gateway, listed.Subnet.Bits())}},
		})
		if err != nil {
			return err
		}
		if !n.Local {
			if err := d.cfg.Keys.Add(ctx, key); err != nil {
				d.cfg.Log.Warn("the gossip key of a network is used, but not recorded; will be retried", "network", c.Network.Short(), "err", err)
			}
		}
		d.cfg.Log.Info("network taken over from the engine", "network", c.Network.Short())
	}
	e := model.Endpoint{
		ID: id, Network: c.Network, Addr: c.Addr, MAC: c.MAC, Phase: model.Taken,
		Sandbox: d.sandbox(c.Sandbox), Task: c.Task,
	}
	if e.MAC.IsZero() {
		e.MAC = model.MACFor(c.Addr)
	}
	if err := d.cfg.Intents.TakeOver(ctx, n, e); err != nil {
		return err
	}
	d.cfg.Log.Info("endpoint taken over from the engine", "network", c.Network.Short(), "endpoint", id.Short())
	return nil
}
