package kernel_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/model"
)

func TestNoticesOfWhatIsKnownSayNothing(t *testing.T) {
	have := kerneltest.Full("/run/docker/netns/task", true)
	var n kernel.Notices
	for k, v := range have {
		if l, ok := v.(kernel.LinkSpec); ok {
			l.Peer, l.PeerMAC, l.Kept = "", model.MAC{}, false // a notice cannot tell
			v = l
		}
		n.Tell(k, v)
	}
	if got := n.Contradicts(have); len(got) > 0 {
		t.Errorf("contradicts: %q", got)
	}
	if len(n.Objects) < 20 {
		t.Errorf("only %d objects", len(n.Objects))
	}
}

func TestNoticesThatContradict(t *testing.T) {
	fdb := kernel.FDB{NS: "n", Dev: "vxlan0", MAC: model.MAC{2, 0, 0, 0, 0, 1}}
	bridge := kernel.Link{NS: "n", Name: "br0", Kind: kernel.Bridge}
	forward := kernel.Sysctl{NS: "n", Name: "net.ipv4.ip_forward"}
	vtep, wrong := kernel.FDBSpec{VTEP: netip.MustParseAddr("192.0.2.2")}, kernel.FDBSpec{VTEP: netip.MustParseAddr("192.0.2.9")}
	pair := func(peer string, taken, kept bool) kernel.LinkSpec {
		return kernel.LinkSpec{MTU: 1450, Peer: peer, Taken: taken, Kept: kept}
	}
	have := kernel.State{
		fdb: vtep, bridge: kernel.LinkSpec{MTU: 1450}, forward: kernel.SysctlSpec{Value: "0"},
		kernel.Link{NS: "n", Name: "slv1", Kind: kernel.Veth}:       pair("slc1", false, false),
		kernel.Link{NS: "n", Name: "slv2", Kind: kernel.Veth}:       pair("slc2", true, false),
		kernel.Link{NS: "n", Name: "mesh0", Kind: kernel.Veth}:      pair("slm1", false, true),
		kernel.Link{Name: "slcorphan", Kind: kernel.Veth}:           kernel.LinkSpec{},
		kernel.Neigh{NS: "n", Dev: "br0", IP: netip.IPv6Loopback()}: kernel.NeighSpec{},
	}
	end := func(name string) kernel.Key { return kernel.Link{Name: name, Kind: kernel.Veth} }
	for _, c := range []struct {
		name string
		key  kernel.Key
		now  kernel.Value
		want bool
	}{
		{"an entry is gone", fdb, nil, true},
		{"an entry leads elsewhere", fdb, wrong, true},
		{"an entry is as it was", fdb, vtep, false},
		{"an entry of nobody", kernel.FDB{NS: "n", Dev: "vxlan0"}, vtep, true},
		{"what is not known is gone", kernel.FDB{NS: "n", Dev: "vxlan0"}, nil, false},
		{"a bridge is down", bridge, kernel.LinkSpec{}, true},
		{"a bridge is as it was", bridge, kernel.LinkSpec{MTU: 1450}, false},
		{"a sysctl of ours", forward, kernel.SysctlSpec{Value: "1"}, true},
		{"a sysctl of nobody", kernel.Sysctl{NS: "n", Name: "other"}, kernel.SysctlSpec{Value: "1"}, false},
		{"an end is taken", end("slc1"), nil, true},
		{"an end is here still", end("slc1"), kernel.LinkSpec{MTU: 1400}, false},
		{"a taken end is not here", end("slc2"), nil, false},
		{"a taken end comes back", end("slc2"), kernel.LinkSpec{}, true},
		{"a kept end is gone", end("slm1"), nil, true},
		{"a kept end is down", end("slm1"), kernel.LinkSpec{}, true},
		{"a kept end is as it was", end("slm1"), kernel.LinkSpec{MTU: 1450}, false},
		{"an orphan comes", end("slc9"), kernel.LinkSpec{}, true},
		{"an unknown end is gone", end("slc9"), nil, false},
		{"a known orphan", end("slcorphan"), kernel.LinkSpec{}, false},
		{"a known orphan is gone", end("slcorphan"), nil, true},
	} {
		var n kernel.Notices
		n.Tell(c.key, c.now)
		if got := n.Contradicts(have); len(got) > 0 != c.want {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func TestOnlyTheLastNoticeOfAnObjectCounts(t *testing.T) {
	k := kernel.Addr{NS: "n", Dev: "br0", Prefix: netip.MustParsePrefix("10.0.0.1/24")}
	var n kernel.Notices
	n.Tell(k, nil)
	n.Tell(k, kernel.AddrSpec{})
	if got := n.Contradicts(kernel.State{k: kernel.AddrSpec{}}); len(got) > 0 {
		t.Errorf("%q", got)
	}
}

func TestNoticesAreBounded(t *testing.T) {
	var n kernel.Notices
	for i := range 100000 {
		n.Tell(kernel.Sysctl{Name: fmt.Sprint(i)}, nil)
		n.TellOther(fmt.Sprint(i))
	}
	if len(n.Objects) > 5000 || len(n.Others) > 10 {
		t.Errorf("%d objects and %d others wait", len(n.Objects), len(n.Others))
	}
	if got := n.Contradicts(nil); len(got) == 0 {
		t.Error("that some were lost is no reason to look")
	}
}

func TestEveryObjectHasAKind(t *testing.T) {
	have := kerneltest.Full("/run/docker/netns/task", true)
	seen := map[string]bool{}
	for k := range have {
		kind := kernel.KindOf(k)
		if !slices.Contains(kernel.Kinds(), kind) {
			t.Errorf("%s is of kind %q, which is not listed", k, kind)
		}
		if word, _, _ := strings.Cut(k.String(), " "); word == "ipvs" && kind != kernel.KindIPVS {
			t.Errorf("%s is of kind %q", k, kind)
		}
		seen[kind] = true
	}
	for _, k := range kernel.Kinds() {
		if !seen[k] {
			t.Errorf("kind %s: the example has none: %v", k, slices.Sorted(maps.Keys(seen)))
		}
	}
}
