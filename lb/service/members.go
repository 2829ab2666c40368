package service

import (
	"net/netip"

	"sluice/internal/model"
)

// place is a service on a network.
type place struct {
	service model.ServiceID
	network model.NetworkID
}

// site is an address on a network.
type site struct {
	network model.NetworkID
	addr    netip.Addr
}

// member is an endpoint on one of the view's networks, on its way to being a
// Backend if it is a service's.
type member struct {
	Backend             // Weight, Mode and Ports are the endpoint's own options, zero if it has none
	place    place      // its service is empty if it has none
	running  bool       // by the word of its engine
	leaving  bool       // by that of a manager
	lost     bool       // with its node
	prepared netip.Addr // the VIP that its namespace translates
	meshed   bool       // its namespace takes connections of published ports
	beaten   *member    // by whom, in the claim to its address; see holder
	next     *member    // of the same place
}

// members lists every endpoint of the view's networks that frames can reach,
// and settles who has each address.
//
// Two records may speak of one address while it moves from task to task; the
// frames go where overlay.Plan sends them, which is to an endpoint of this node
// before any other, then to one in service, then to the smaller id.
func members(v model.View) []member {
	all := make([]member, 0, len(v.Endpoints)+len(v.Remotes)) // never grows: pointers into it stay good
	held := make(map[site]*member, cap(all))
	add := func(network model.NetworkID, t *model.Task, prepared netip.Addr, meshed, lost bool, b Backend, own *model.ServiceOptions) {
		if _, here := v.Networks[network]; !here {
			return
		}
		b.Task, b.Weight, b.Mode, b.Ports = t.ID, own.Weight, own.Mode, own.Ports
		all = append(all, member{
			Backend: b, place: place{t.Service, network}, running: t.Ready && !lost, leaving: t.Leaving, lost: lost,
			prepared: prepared, meshed: meshed,
		})
		m := &all[len(all)-1]
		at := site{network, b.Addr}
		switch o := held[at]; {
		case o == nil:
			held[at] = m
		case m.beats(o):
			held[at], o.beaten = m, m
		default:
			m.beaten = o
		}
	}
	for id, e := range v.Endpoints {
		add(e.Network, &e.Task, e.Prepared, e.Meshed, false, Backend{Endpoint: id, Addr: e.Addr, MAC: e.MAC, Local: true, Tunnel: e.Tunnel}, &e.Options)
	}
	for id, r := range v.Remotes {
		// overlay.Plan makes no way to a node without a VTEP, nor to this one under
		// another name.
		if r.VTEP.IsValid() && r.VTEP != v.Self.VTEP {
			add(r.Network, &r.Task, r.Prepared, r.Meshed, r.Lost, Backend{Endpoint: id, Node: r.Node, Addr: r.Addr, MAC: r.MAC, Tunnel: r.Tunnel}, &r.Options)
		}
	}
	return all
}

// beats reports whether m has an address that o claims too.
func (m *member) beats(o *member) bool {
	switch {
	case m.Local != o.Local:
		return m.Local
	case m.running != o.running:
		return m.running
	}
	return m.Endpoint < o.Endpoint
}

// holder is the endpoint that gets what is sent to m's address.
func (m *member) holder() *member {
	for m.beaten != nil { // who has beaten m may have been beaten later
		m = m.beaten
	}
	return m
}

// unready says why a member gets no new connections to vip; empty if it does.
func (m *member) unready(vip netip.Addr, mode string) string {
	if why := m.out(); why != "" {
		return why
	}
	if vip.IsValid() && m.prepared != vip && mode != NAT {
		return preparing
	}
	return ""
}

// unmeshed says why a member gets no new connections of published ports; empty if
// it does.
func (m *member) unmeshed() string {
	if why := m.out(); why != "" || m.meshed {
		return why
	}
	return preparing
}

// preparing is why a member is not ready whose namespace lacks what is needed.
const preparing = "being prepared"

// out says why a member gets no new connections, to whatever address.
func (m *member) out() string {
	switch {
	case m.lost:
		return "its node is down"
	case m.leaving:
		return "leaving"
	case !m.running:
		return "not ready"
	case m.beaten != nil:
		return "its address belongs to endpoint " + m.holder().Endpoint.Short()
	}
	return ""
}

// told returns what the endpoint's record says of its task, and its options.
func (m *member) told(v model.View) (model.Task, model.ServiceOptions) {
	if m.Local {
		e := v.Endpoints[m.Endpoint]
		return e.Task, e.Options
	}
	r := v.Remotes[m.Endpoint]
	return r.Task, r.Options
}
