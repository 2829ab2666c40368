package service

import (
	"net/netip"
	"slices"

	"sluice/internal/model"
)

// Alias is another address of a service in a network's namespace on this node, at
// which only what has come in by published ports arrives; see lb/ingress. Its
// packets go to the backend as they are, in whatever mode the service is: they
// have the task's port already, and the task translates. So an alias has all
// ports, and it may have one for a service that has no VIP.
type Alias struct {
	Network model.NetworkID
	Service model.ServiceID
	Addr    netip.Addr
}

// Publishes returns what the service of this node's endpoint publishes on its
// network, on whatever nodes, and whether its task has to do anything for that: it
// does once its namespace is there. Where no manager has told of the service, the
// endpoint's own options count.
func Publishes(v model.View, e model.Endpoint) (model.ServiceOptions, bool) {
	if v.Self.NoMesh || e.Task.Service == "" || e.Phase != model.Taken || e.Sandbox == "" {
		return model.ServiceOptions{}, false
	}
	n, here := v.Networks[e.Network]
	if !here || n.Local || !n.Subnet.Addr().Is4() || !n.Gateway.Is4() || !e.Addr.Is4() {
		return model.ServiceOptions{}, false
	}
	o := e.Options
	if s, told := v.Services[e.Task.Service]; told {
		o = s.Options[e.Network]
	}
	return o, o.Published != ""
}

// meshedVirtual is a service as it is balanced at an alias.
type meshedVirtual struct {
	Virtual // VIP is still the service's: what is chosen by it is the same at both
	at      netip.Addr
}

// meshedAt makes what is balanced at the aliases.
func meshedAt(v model.View, aliases []Alias, xs []Virtual) []meshedVirtual {
	if len(aliases) == 0 {
		return nil
	}
	at := make(map[place]int, len(xs))
	for i := range xs {
		at[place{xs[i].Service, xs[i].Network}] = i
	}
	out := make([]meshedVirtual, 0, len(aliases))
	for _, a := range aliases {
		p := place{a.Service, a.Network}
		if _, here := v.Networks[a.Network]; !here {
			continue
		}
		m := meshedVirtual{at: a.Addr}
		if i, known := at[p]; known {
			m.Virtual = xs[i]
		} else {
			m.Virtual = blank(v, p) // no VIP and no task: it refuses
		}
		m.Mode, m.Options.Ports = DR, ""
		m.Backends = slices.Clone(m.Backends)
		for j := range m.Backends {
			b := &m.Backends[j]
			b.Mode, b.Ports, b.Ready = DR, "", b.Meshed // whatever the task was started with
		}
		out = append(out, m)
	}
	return out
}
