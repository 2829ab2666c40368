package plan

import (
	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/guard"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// Host is the wanted state of this host's kernel.
func Host(v model.View) kernel.State {
	// Sizing, as growing the map by doubling would copy it all. A network is about
	// 16 objects, a service two. A task of another node is four (neighbour,
	// forwarding, slot, alive); one of this node has its veth pair, namespace and
	// membership instead of the first two, one object for its own VIP, and three of the
	// guard: ten. With ip_vs, each has a place for TCP and one for UDP, and both again
	// for a task of the service here as client: up to two more for a task, and three for
	// a service. Published ports come on top; few services have any.
	size := 16*len(v.Networks) + 2*len(v.Services) + 4*len(v.Remotes) + 10*len(v.Endpoints)
	if v.Self.Datapath == service.IPVS {
		size += 3*len(v.Services) + 2*(len(v.Remotes)+len(v.Endpoints))
	}
	want := make(kernel.State, size)
	overlay.Plan(v, want)
	service.Plan(v, ingress.Balanced(v), want)
	ingress.Plan(v, want)
	guard.Plan(v, want)
	return want
}
