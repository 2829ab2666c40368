package ingress

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"sluice/internal/model"
)

func TestWhichNetworksANodeEnters(t *testing.T) {
	on := func(network model.NetworkID, o model.ServiceOptions) model.Service {
		return model.Service{Name: "s", Created: begin, Options: map[model.NetworkID]model.ServiceOptions{network: o}}
	}
	v := model.View{
		Self:     model.Self{Node: "n1"},
		Networks: map[model.NetworkID]model.Network{"here": {ID: "here"}, "came": {ID: "came", Transit: true}, "alone": {ID: "alone", Local: true}},
		Published: map[model.NetworkID]model.Network{
			"here": {ID: "here"}, "came": {ID: "came"}, "far": {ID: "far", VNI: 7}, "zoned": {ID: "zoned"}, "slow": {ID: "slow"},
		},
		Services: map[model.ServiceID]model.Service{
			"1": on("here", model.ServiceOptions{Published: "80/tcp", Bind: "192.0.2.1;192.0.2.2"}),
			"2": on("far", model.ServiceOptions{Published: "80/tcp"}), // loses its port, and yet
			"3": on("zoned", model.ServiceOptions{Published: "81/tcp", Nodes: "Zone=a"}),
			"4": on("slow", model.ServiceOptions{Published: "82/tcp", Nodes: "disk=slow"}),
			"5": on("quiet", model.ServiceOptions{Ports: "80/tcp"}),
			"6": on("alone", model.ServiceOptions{Published: "83/tcp"}),
			"7": on("untold", model.ServiceOptions{Published: "84/tcp"}),
			"8": on("came", model.ServiceOptions{Published: "85/tcp"}),
			"9": on("slow", model.ServiceOptions{Published: "86/tcp", Nodes: "disk!=slow;zone=b"}),
		},
		Labels: map[model.NodeID]map[string]string{"n1": {"zone": "A"}, "n2": {"disk": "slow"}},
	}
	if got, want := Entered(v), []model.NetworkID{"came", "far", "here", "untold", "zoned"}; !slices.Equal(got, want) {
		t.Errorf("enters %v, want %v", got, want)
	}
	if got, want := Transit(v), []model.Network{{ID: "came", Transit: true}, {ID: "far", VNI: 7, Transit: true}, {ID: "zoned", Transit: true}}; !slices.Equal(got, want) {
		t.Errorf("transit %v, want %v", got, want)
	}
	if got := len(Wants(v)); got != 7 {
		t.Errorf("%d ports wanted: %v", got, Wants(v))
	}
	asked := LabelsAsked(v.Services)
	if !slices.Equal(asked, []string{"disk", "zone"}) {
		t.Errorf("asked for %v", asked)
	}
	if got := LabelsOf(map[string]string{"Zone": "A", "rack": "1"}, asked); !maps.Equal(got, map[string]string{"Zone": "A"}) {
		t.Errorf("told %v", got)
	}
	// No condition is that long, so none is met by another value than before.
	long := map[string]string{"zone": strings.Repeat("a", 100_000)}
	cut := LabelsOf(long, asked)
	for _, text := range []string{"zone=a", "zone!=a", "zone=" + strings.Repeat("a", 249), "zone!=" + strings.Repeat("a", 249)} {
		ls, err := model.ParseLabels(text)
		if err != nil || ls.Match(cut) != ls.Match(long) || len(cut["zone"]) > 1000 {
			t.Errorf("%.20s…: %v, %t, %t of %d bytes", text, err, ls.Match(long), ls.Match(cut), len(cut["zone"]))
		}
	}
	// Nobody has told of this node: it is of no zone, and of no other either.
	delete(v.Labels, "n1")
	if got, want := Entered(v), []model.NetworkID{"came", "far", "here", "untold"}; !slices.Equal(got, want) {
		t.Errorf("enters %v, want %v", got, want)
	}
}
