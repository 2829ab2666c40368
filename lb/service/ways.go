package service

import (
	"net/netip"

	"sluice/internal/model"
)

// Way is what IPVS has a service of its own for: an address of a service, its
// virtual IP or an alias, one port of it, all of UDP or all there is, from one client
// or all others.
type Way struct {
	Network model.NetworkID
	At      netip.Addr
	Client  netip.Addr    // of this node; invalid: all others
	Port    model.PortMap // zero: all; with a protocol alone: all of that
	Mark    uint32        // by which IPVS knows it
}

// Ways lists those that Plan gives IPVS on this node for the same arguments, in no
// order: for people, who see marks in what the kernel tells.
func Ways(v model.View, aliases []Alias) []Way {
	xs := virtuals(v, members(v))
	meshed := meshedAt(v, aliases, xs)
	ways, in := waysToAll(networks(v, xs), xs, owners(v, xs), meshed)
	var out []Way
	add := func(n model.NetworkID, ws []way) {
		for _, w := range ws {
			out = append(out, Way{Network: n, At: w.vip, Client: w.client, Port: w.port, Mark: w.mark})
		}
	}
	for i := range xs {
		add(xs[i].Network, ways[i])
	}
	for i := range meshed {
		add(meshed[i].Network, in[i])
	}
	return out
}
