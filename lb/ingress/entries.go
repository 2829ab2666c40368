package ingress

import (
	"maps"
	"slices"
	"strings"

	"sluice/internal/model"
)

// enters reports whether what a service publishes is for this node. Conditions
// on labels are not met while the node's labels are not told.
func enters(v model.View, o model.ServiceOptions) bool {
	if o.Published == "" || v.Self.NoMesh {
		return false
	}
	labels, told := v.Labels[v.Self.Node]
	return o.Nodes == "" || told && o.Nodes.Match(labels)
}

// Entered are the networks into which published ports of this node lead, sorted,
// whether the node is part of them or not. A port that the node does not get
// counts as well: networks do not come and go with processes and older services.
func Entered(v model.View) []model.NetworkID {
	found := make(map[model.NetworkID]bool)
	for _, s := range v.Services {
		for network, o := range s.Options {
			if enters(v, o) && !v.Networks[network].Local {
				found[network] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// Transit are the networks that this node has to be part of only because
// published ports lead there, sorted by id.
func Transit(v model.View) []model.Network {
	var out []model.Network
	for _, id := range Entered(v) {
		n, told := v.Published[id]
		if had, here := v.Networks[id]; told && (!here || had.Transit) {
			n.Transit = true
			out = append(out, n)
		}
	}
	return out
}

// LabelsAsked are the labels of nodes that services ask for, sorted: no others need
// be told to the swarm.
func LabelsAsked(services map[model.ServiceID]model.Service) []string {
	found := make(map[string]bool)
	for _, s := range services {
		for _, o := range s.Options {
			if o.Published == "" {
				continue
			}
			for _, k := range o.Nodes.Keys() {
				found[k] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// LabelsOf are those of a node's labels that are asked for, without case. A value that
// is longer than any condition is cut, and still meets none: all nodes have it in
// their gossip.
func LabelsOf(labels map[string]string, asked []string) map[string]string {
	out := make(map[string]string)
	for k, v := range labels {
		if _, is := slices.BinarySearch(asked, strings.ToLower(k)); is {
			out[k] = v[:min(len(v), model.MaxLabel+1)]
		}
	}
	return out
}
