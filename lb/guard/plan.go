package guard

import (
	"net/netip"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// Plan adds the guard of each of the view's networks, and what the containers of this
// node may send, to want.
func Plan(v model.View, want kernel.State) {
	for _, n := range v.Networks {
		want[kernel.GuardTable{NS: overlay.NetnsName(n)}] = kernel.GuardTableSpec{
			Ports: overlay.HostEndPrefix, Pool: ingress.PoolOf(v.Self),
			// A table that is there stays closed, as it has all that it had.
			Open: v.Partial,
		}
	}
	heard := hearsay(v)
	for id, e := range v.Endpoints {
		n, here := v.Networks[e.Network]
		if !here || e.Phase == model.Created {
			continue
		}
		ns, dev := overlay.NetnsName(n), overlay.HostEnd(id)
		_, published := service.Publishes(v, e)
		// What the namespace still translates may still be answered.
		want[kernel.GuardPort{NS: ns, Dev: dev}] = kernel.GuardPortSpec{MAC: e.MAC, Aliases: published || e.Meshed}
		answers := func(vip netip.Addr) {
			at := kernel.GuardAddr{NS: ns, Dev: dev, IP: vip}
			if vip.Is4() && vip != n.Gateway && want[at] == nil {
				want[at] = kernel.GuardAddrSpec{MAC: e.MAC, VIP: true}
			}
		}
		answers(v.Services[e.Task.Service].VIPs[e.Network])
		answers(e.Task.VIP)
		answers(e.Prepared)
		for _, vip := range heard[place{e.Task.Service, e.Network}] {
			answers(vip)
		}
		want[kernel.GuardAddr{NS: ns, Dev: dev, IP: e.Addr}] = kernel.GuardAddrSpec{MAC: e.MAC}
	}
}

// place is a service on a network.
type place struct {
	service model.ServiceID
	network model.NetworkID
}

// hearsay lists the virtual IPs that tasks on any node know of their services, where no
// manager has told of those: lb/service takes one of them for all.
func hearsay(v model.View) map[place][]netip.Addr {
	out := make(map[place][]netip.Addr)
	add := func(t *model.Task, n model.NetworkID) {
		if _, told := v.Services[t.Service]; !told && t.Service != "" && t.VIP.IsValid() {
			out[place{t.Service, n}] = append(out[place{t.Service, n}], t.VIP)
		}
	}
	for _, e := range v.Endpoints {
		add(&e.Task, e.Network)
	}
	for _, r := range v.Remotes {
		add(&r.Task, r.Network)
	}
	return out
}
