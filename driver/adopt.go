package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"sluice/internal/model"
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

func (d *Driver) adopt(ctx context.Context, id model.EndpointID, c model.EngineEndpoint, listed model.EngineNetwork) error {
	if _, known := d.cfg.Intents.Network(c.Network); !known {
		if !listed.Subnet.IsValid() {
			return fmt.Errorf("the engine does not tell the subnet of network %s", listed.Name)
		}
		n, err := d.network(ctx, CreateRequest{
			Network: c.Network, Options: listed.Options, Internal: listed.Internal,
			Subnets: []Subnet{{Pool: listed.Subnet, Gateway: netip.PrefixFrom(listed.Gateway, listed.Subnet.Bits())}},
		})
		if err != nil {
			return err
		}
		if _, err := d.cfg.Intents.PutNetwork(ctx, n); err != nil {
			return err
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
	if _, err := d.cfg.Intents.PutEndpoint(ctx, e); err != nil {
		return err
	}
	d.cfg.Log.Info("endpoint taken over from the engine", "network", c.Network.Short(), "endpoint", id.Short())
	return nil
}
