package linux

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Conntrack forgets the flows of ports that lead elsewhere than before, and no others,
// whatever objects the ports are part of.
func TestFlowsThatAreForgotten(t *testing.T) {
	a, b := netip.MustParseAddr("250.0.16.1"), netip.MustParseAddr("250.0.16.2")
	ports := func(p model.Proto, lo, hi uint16, alias netip.Addr) kernel.State {
		return kernel.State{kernel.MeshRange{Proto: p, Lo: lo, Hi: hi}: kernel.MeshRangeSpec{Alias: alias}}
	}
	port := func(p uint16, alias netip.Addr, to uint16) kernel.State {
		return kernel.State{kernel.MeshPort{Proto: model.UDP, Port: p}: kernel.MeshPortSpec{Alias: alias, To: to}}
	}
	join := func(of ...kernel.State) kernel.State {
		out := kernel.State{}
		for _, st := range of {
			maps.Copy(out, st)
		}
		return out
	}
	udp := func(lo, hi uint16, alias netip.Addr) kernel.State { return ports(model.UDP, lo, hi, alias) }
	for _, c := range []struct {
		name       string
		have, want kernel.State
		forgotten  []uint16
	}{
		{"published", nil, udp(8000, 8002, a), []uint16{8000, 8001, 8002}},
		{"gone", udp(65534, 65535, a), nil, []uint16{65534, 65535}},
		{"at the end", udp(8000, 8003, a), udp(8000, 8002, a), []uint16{8003}},
		{"at the beginning", udp(8000, 8003, a), udp(8001, 8003, a), []uint16{8000}},
		{"split by another", udp(8000, 8004, a), join(udp(8000, 8001, a), port(8002, b, 80), udp(8003, 8004, a)), []uint16{8002}},
		{"all that is left is one", udp(8000, 8001, a), port(8000, a, 8000), []uint16{8001}},
		{"of another service", udp(8000, 8001, a), udp(8000, 8001, b), []uint16{8000, 8001}},
		{"the task's port", port(80, a, 80), port(80, a, 8080), []uint16{80}},
		{"no UDP", ports(model.TCP, 1, 2, a), nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := slices.Sorted(maps.Keys(changedDatagrams(kernel.Diff(c.have, c.want))))
			if d := cmp.Diff(c.forgotten, got); d != "" {
				t.Errorf("forgotten, -want +got:\n%s", d)
			}
		})
	}
}
