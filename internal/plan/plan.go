package plan

import (
	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// Host is the wanted state of this host's kernel.
func Host(v model.View) kernel.State {
	// Sizing, as growing the map by doubling would copy it all. A network is about
	// 16 objects, a service two. A task of another node is four (neighbour,
	// forwarding, slot, alive); one of this node has its veth pair, namespace and
	// membership instead of the first two, and one object for its own VIP: seven.
	// Published ports come on top; few services have any.
	want := make(kernel.State, 16*len(v.Networks)+2*len(v.Services)+4*len(v.Remotes)+7*len(v.Endpoints))
	overlay.Plan(v, want)
	service.Plan(v, ingress.Balanced(v), want)
	ingress.Plan(v, want)
	return want
}
