package linux

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

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

// Of the flows that have such a port, those of the host's own addresses are meant, not
// what its containers ask outside; and only UDP, unless there is no way any more.
func TestFlowsThatAreStale(t *testing.T) {
	host, outside, alias := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("250.0.16.1")
	flow := func(proto uint8, to, leads netip.Addr) *netlink.ConntrackFlow {
		return &netlink.ConntrackFlow{
			Forward: netlink.IPTuple{Protocol: proto, DstIP: to.AsSlice(), DstPort: 53},
			Reverse: netlink.IPTuple{Protocol: proto, SrcIP: leads.AsSlice(), SrcPort: 53},
		}
	}
	ports := stale{ports: map[uint16]bool{53: true}, here: func(a netip.Addr) bool { return a == host }}
	of := stale{aliases: map[netip.Addr]bool{alias: true}}
	block := stale{block: netip.MustParsePrefix("250.0.16.0/20")}
	pool := stale{pool: netip.MustParsePrefix("250.0.0.0/8")}
	for _, c := range []struct {
		name string
		s    stale
		f    *netlink.ConntrackFlow
		want bool
	}{
		{"to the host", ports, flow(unix.IPPROTO_UDP, host, alias), true},
		{"to the host, not translated", ports, flow(unix.IPPROTO_UDP, host, host), true},
		{"to the host by TCP", ports, flow(unix.IPPROTO_TCP, host, alias), false},
		{"to elsewhere", ports, flow(unix.IPPROTO_UDP, outside, outside), false},
		{"of the alias", of, flow(unix.IPPROTO_UDP, host, alias), true},
		{"of the alias by TCP", of, flow(unix.IPPROTO_TCP, host, alias), false},
		{"of another", of, flow(unix.IPPROTO_UDP, host, alias.Next()), false},
		{"into the block", block, flow(unix.IPPROTO_TCP, host, alias), true},
		{"into no block", block, flow(unix.IPPROTO_TCP, host, host), false},
		{"of an entry", pool, flow(unix.IPPROTO_UDP, alias, host), true},
		{"of an entry by TCP", pool, flow(unix.IPPROTO_TCP, alias, host), false},
		{"of the task's own", pool, flow(unix.IPPROTO_UDP, outside, outside), false},
	} {
		if got := c.s.MatchConntrackFlow(c.f); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
