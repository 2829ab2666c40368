package kernel_test

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

func TestApplyingADifferenceLeadsToWhatIsWanted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := states().Draw(t, "have"), states().Draw(t, "want")
		before := maps.Clone(have)
		got := kernel.Apply(have, kernel.Diff(have, want))
		if d := cmp.Diff(want.Text(), got.Text()); d != "" {
			t.Fatalf("want (-) and got (+) differ:\n%s", d)
		}
		if !maps.Equal(before, have) {
			t.Fatal("the state that the difference was applied to has changed")
		}
		if ops := kernel.Diff(got, want); len(ops) > 0 {
			t.Fatalf("there is still something to do: %v", ops)
		}
	})
}

func TestNothingDiffersFromItself(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := states().Draw(t, "state")
		if ops := kernel.Diff(s, maps.Clone(s)); len(ops) > 0 {
			t.Fatalf("found %v", ops)
		}
	})
}

// stands lists what an object needs to be there before it.
func stands(k kernel.Key) []kernel.Key {
	bridge := func(ns string) kernel.Key { return kernel.Link{NS: ns, Name: "br0", Kind: kernel.Bridge} }
	switch k := k.(type) {
	case kernel.Sysctl:
		if k.Dev() != "" {
			return []kernel.Key{on(k.NS, k.Dev())}
		}
		return []kernel.Key{kernel.Netns{Name: k.NS}}
	case kernel.Link:
		if k.Kind == kernel.Bridge {
			return []kernel.Key{kernel.Netns{Name: k.NS}}
		}
		return []kernel.Key{kernel.Netns{Name: k.NS}, bridge(k.NS)}
	case kernel.Addr:
		return []kernel.Key{on(k.NS, k.Dev)}
	case kernel.Neigh:
		return []kernel.Key{on(k.NS, k.Dev)}
	case kernel.Route:
		return []kernel.Key{on(k.NS, k.Dev)}
	case kernel.FDB:
		return []kernel.Key{on(k.NS, k.Dev)}
	case kernel.FilterPeer:
		return []kernel.Key{kernel.Filter{}}
	case kernel.Member:
		return []kernel.Key{kernel.BridgeTable{NS: k.NS}}
	case kernel.VIP:
		return []kernel.Key{kernel.BridgeTable{NS: k.NS}}
	case kernel.Slot:
		return []kernel.Key{kernel.VIP{NS: k.NS, IP: k.VIP}}
	case kernel.Alive:
		return []kernel.Key{kernel.VIP{NS: k.NS, IP: k.VIP}}
	case kernel.Other:
		return []kernel.Key{kernel.VIP{NS: k.NS, IP: k.VIP}}
	case kernel.Mark:
		return []kernel.Key{kernel.MarkTable{NS: k.NS}}
	case kernel.IPVSDest:
		return []kernel.Key{kernel.IPVSService{NS: k.NS, Mark: k.Mark}}
	case kernel.TaskVIP:
		return []kernel.Key{kernel.TaskTable{Sandbox: k.Sandbox}}
	case kernel.TaskMesh:
		return []kernel.Key{kernel.TaskTable{Sandbox: k.Sandbox}}
	case kernel.Back:
		return []kernel.Key{kernel.BackTable{NS: k.NS}}
	case kernel.GuardPort:
		return []kernel.Key{kernel.GuardTable{NS: k.NS}}
	case kernel.GuardAddr:
		return []kernel.Key{kernel.GuardTable{NS: k.NS}}
	case kernel.MeshNet, kernel.MeshPort, kernel.MeshRange, kernel.MeshMasq, kernel.MeshAllow:
		return []kernel.Key{kernel.MeshTable{}}
	}
	return nil
}

// on is the device of that name, or the pair whose end it is.
func on(ns, name string) kernel.Key {
	if of, ok := strings.CutPrefix(name, "slm"); ok && ns == "" {
		return kernel.Link{NS: of, Name: "mesh0", Kind: kernel.Veth}
	}
	kind := map[string]kernel.LinkKind{"br0": kernel.Bridge, "vxlan0": kernel.VXLAN}[name]
	if kind == "" {
		kind = kernel.Veth
	}
	return kernel.Link{NS: ns, Name: name, Kind: kind}
}

// TestEveryStepOfADifferenceCanBeDone walks the operations one by one, as a
// strict kernel would: nothing is made before what it stands on, nothing is
// changed or deleted that is not there.
func TestEveryStepOfADifferenceCanBeDone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now, want := states().Draw(t, "have"), states().Draw(t, "want")
		for _, op := range kernel.Diff(now, want) {
			_, there := now[op.Key]
			switch {
			case op.Want == nil && !there:
				t.Fatalf("%s: it is not there", op)
			case op.Have != nil && now[op.Key] != op.Have:
				t.Fatalf("%s: there is %v", op, now[op.Key])
			}
			if op.Want != nil {
				for _, k := range stands(op.Key) {
					if _, ok := now[k]; !ok {
						t.Fatalf("%s: %s is not there yet", op, k)
					}
				}
			}
			now = kernel.Apply(now, []kernel.Op{op})
		}
	})
}

func TestADifferenceIsTheSameEachTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := states().Draw(t, "have"), states().Draw(t, "want")
		first := kernel.Diff(have, want)
		if again := kernel.Diff(maps.Clone(have), maps.Clone(want)); !slices.Equal(first, again) {
			t.Fatalf("first %v\nthen  %v", first, again)
		}
	})
}

var (
	ns     = kernel.Netns{Name: "sluice-a"}
	bridge = kernel.Link{NS: "sluice-a", Name: "br0", Kind: kernel.Bridge}
	vxlan  = kernel.Link{NS: "sluice-a", Name: "vxlan0", Kind: kernel.VXLAN}
	pair   = kernel.Link{NS: "sluice-a", Name: "slv1", Kind: kernel.Veth}
	ip     = netip.MustParseAddr("10.0.0.2")
	vip    = netip.MustParseAddr("10.0.0.9")
	hw     = model.MACFor(ip)
)

func TestOperations(t *testing.T) {
	joined := kernel.LinkSpec{Alias: "sluice e", MTU: 1450, Master: "br0", Peer: "slc1", PeerMAC: hw}
	taken := joined
	taken.Taken = true
	found := kernel.LinkSpec{Alias: "sluice e", MTU: 1450, Master: "br0"} // as a dump shows it once the engine has the other end
	device := kernel.LinkSpec{Alias: "sluice a", MTU: 1450, Master: "br0", Quiet: true, VNI: 5, Port: 4799, Local: netip.MustParseAddr("192.168.0.1")}
	moved := device
	moved.Local = netip.MustParseAddr("192.168.0.7")
	wider := device
	wider.MTU = 8950
	entry := kernel.FDB{NS: "sluice-a", Dev: "vxlan0", MAC: hw}
	there := kernel.FDBSpec{VTEP: netip.MustParseAddr("192.168.0.2")}
	kept := kernel.Link{NS: "sluice-a", Name: "mesh0", Kind: kernel.Veth}
	keptSpec := kernel.LinkSpec{Alias: "sluice a", MTU: 1450, Master: "br0", Quiet: true, Peer: "slm1", PeerMAC: hw, Kept: true}

	for _, c := range []struct {
		name       string
		have, want kernel.State
		ops        []string
	}{
		{"a pair is made at Join", kernel.State{}, kernel.State{pair: joined},
			[]string{`+ veth sluice-a slv1 master br0 mtu 1450 peer slc1 peer-mac 02:42:0a:00:00:02 alias "sluice e"`}},
		{"a pair that the engine has taken is never made anew", kernel.State{}, kernel.State{pair: taken}, nil},
		{"a pair whose end the engine has taken is as it should be", kernel.State{pair: found}, kernel.State{pair: taken}, nil},
		{"so it is before the view knows", kernel.State{pair: found}, kernel.State{pair: joined}, nil},
		{"and while the engine has moved the end back", kernel.State{pair: joined}, kernel.State{pair: taken}, nil},
		{"but its port is mended", kernel.State{pair: kernel.LinkSpec{Alias: "sluice e", MTU: 1450}}, kernel.State{pair: taken},
			[]string{`~ veth sluice-a slv1 master br0 mtu 1450 peer slc1 peer-mac 02:42:0a:00:00:02 taken alias "sluice e"  (is: mtu 1450 alias "sluice e")`}},
		{"what is in a namespace goes with it, but for the VXLAN device",
			kernel.State{ns: kernel.NetnsSpec{}, bridge: kernel.LinkSpec{}, vxlan: device, entry: there, pair: found,
				kernel.BridgeTable{NS: "sluice-a"}: kernel.BridgeTableSpec{}, kernel.VIP{NS: "sluice-a", IP: vip}: kernel.VIPSpec{}},
			kernel.State{},
			[]string{
				`- vxlan sluice-a vxlan0 vni 5 port 4799 local 192.168.0.1 master br0 quiet mtu 1450 alias "sluice a"`,
				`- netns sluice-a`,
			}},
		{"a published port is the last to come",
			kernel.State{kernel.TaskTable{Sandbox: "/run/e1"}: kernel.TaskTableSpec{}},
			kernel.State{
				kernel.TaskTable{Sandbox: "/run/e1"}:                kernel.TaskTableSpec{},
				kernel.MeshPort{Proto: model.TCP, Port: 81}:         kernel.MeshPortSpec{Alias: vip, To: 80},
				kernel.MeshRange{Proto: model.UDP, Lo: 8, Hi: 9}:    kernel.MeshRangeSpec{Alias: vip},
				kernel.MeshAllow{Alias: vip}:                        kernel.MeshAllowSpec{From: "192.0.2.0/24"},
				kernel.MeshTable{}:                                  kernel.MeshTableSpec{Devices: "slm"},
				kernel.TaskMesh{Sandbox: "/run/e1", Addr: ip}:       kernel.TaskMeshSpec{Pool: netip.MustParsePrefix("250.0.0.0/8"), MAC: hw, Subnet: netip.MustParsePrefix("10.0.0.0/20")},
				kernel.Sysctl{Name: "net.ipv4.conf.slm1.rp_filter"}: kernel.SysctlSpec{Value: "1"},
				kept: keptSpec,
			},
			[]string{
				`+ mesh host devices slm`, // and before there is a way into the host
				`+ veth sluice-a mesh0 master br0 quiet mtu 1450 peer slm1 peer-mac 02:42:0a:00:00:02 kept alias "sluice a"`,
				`+ sysctl host net.ipv4.conf.slm1.rp_filter = 1`,
				`+ translate task e1 mesh to 10.0.0.2 pool 250.0.0.0/8 mac 02:42:0a:00:00:02 subnet 10.0.0.0/20`,
				`+ mesh host allow 10.0.0.9 from 192.0.2.0/24`,
				`+ mesh host port 81/tcp -> 10.0.0.9 port 80`,
				`+ mesh host ports 8-9/udp -> 10.0.0.9`,
			}},
		{"and the first to go",
			kernel.State{
				kernel.TaskRoute{Sandbox: "/run/e1", Addr: ip}: kernel.TaskRouteSpec{Subnet: netip.MustParsePrefix("10.0.0.0/20"), Gateway: ip},
				kernel.MeshPort{Proto: model.TCP, Port: 81}:    kernel.MeshPortSpec{Alias: vip, To: 80},
				kernel.MeshTable{}:                             kernel.MeshTableSpec{Devices: "slm"},
			},
			kernel.State{kernel.MeshTable{}: kernel.MeshTableSpec{Devices: "slm"}},
			[]string{
				`- mesh host port 81/tcp -> 10.0.0.9 port 80`,
				`- route task e1 from 10.0.0.2 subnet 10.0.0.0/20 via 10.0.0.2`,
			}},
		{"the host is guarded from a network until there is no way from it",
			kernel.State{ns: kernel.NetnsSpec{}, kept: keptSpec,
				kernel.MeshTable{}: kernel.MeshTableSpec{Devices: "slm"}, kernel.MeshPort{Proto: model.TCP, Port: 81}: kernel.MeshPortSpec{Alias: vip, To: 80}},
			kernel.State{},
			[]string{
				`- mesh host port 81/tcp -> 10.0.0.9 port 80`,
				`- netns sluice-a`,
				`- mesh host devices slm`,
			}},
		{"a pair that is kept has no end to take",
			kernel.State{kept: kernel.LinkSpec{Alias: "sluice a", MTU: 1450, Master: "br0", Quiet: true}}, kernel.State{kept: keptSpec},
			[]string{`~ veth sluice-a mesh0 master br0 quiet mtu 1450 peer slm1 peer-mac 02:42:0a:00:00:02 kept alias "sluice a"  (is: master br0 quiet mtu 1450 alias "sluice a")`}},
		{"a device that is looser than asked for is left so",
			kernel.State{kernel.TaskRoute{Sandbox: "/run/e1", Addr: ip}: kernel.TaskRouteSpec{Gateway: ip, Loose: true}},
			kernel.State{kernel.TaskRoute{Sandbox: "/run/e1", Addr: ip}: kernel.TaskRouteSpec{Gateway: ip}}, nil},
		{"translations go with their table",
			kernel.State{kernel.TaskTable{Sandbox: "/run/e1"}: kernel.TaskTableSpec{}, kernel.TaskVIP{Sandbox: "/run/e1", VIP: vip}: kernel.TaskVIPSpec{Addr: ip}},
			kernel.State{},
			[]string{`- translate task e1`}},
		{"one of two translations goes by itself",
			kernel.State{kernel.TaskTable{Sandbox: "/run/e1"}: kernel.TaskTableSpec{}, kernel.TaskVIP{Sandbox: "/run/e1", VIP: vip}: kernel.TaskVIPSpec{Addr: ip},
				kernel.TaskVIP{Sandbox: "/run/e1", VIP: netip.MustParseAddr("10.1.0.9")}: kernel.TaskVIPSpec{Addr: netip.MustParseAddr("10.1.0.2")}},
			kernel.State{kernel.TaskTable{Sandbox: "/run/e1"}: kernel.TaskTableSpec{}, kernel.TaskVIP{Sandbox: "/run/e1", VIP: vip}: kernel.TaskVIPSpec{Addr: ip}},
			[]string{`- translate task e1 vip 10.1.0.9 to 10.1.0.2`}},
		{"a translation without a table goes by itself",
			kernel.State{kernel.TaskVIP{Sandbox: "/run/e1", VIP: vip}: kernel.TaskVIPSpec{Addr: ip}}, kernel.State{},
			[]string{`- translate task e1 vip 10.0.0.9 to 10.0.0.2`}},
		{"a backend is replaced in one run of VIP objects",
			kernel.State{
				kernel.Alive{NS: "sluice-a", VIP: vip, MAC: model.MAC{1}}: kernel.AliveSpec{},
				kernel.Slot{NS: "sluice-a", VIP: vip, Slot: 0}:            kernel.SlotSpec{MAC: model.MAC{1}},
				kernel.Slot{NS: "sluice-a", VIP: vip, Slot: 1}:            kernel.SlotSpec{MAC: model.MAC{2}},
				kernel.VIP{NS: "sluice-a", IP: vip}:                       kernel.VIPSpec{Scheduler: "rr", Slots: 2},
				kernel.TaskVIP{Sandbox: "/run/e1", VIP: vip}:              kernel.TaskVIPSpec{Addr: ip},
			},
			kernel.State{
				kernel.Alive{NS: "sluice-a", VIP: vip, MAC: model.MAC{3}}: kernel.AliveSpec{},
				kernel.Slot{NS: "sluice-a", VIP: vip, Slot: 0}:            kernel.SlotSpec{MAC: model.MAC{3}},
				kernel.VIP{NS: "sluice-a", IP: vip}:                       kernel.VIPSpec{Scheduler: "rr", Slots: 1},
				kernel.TaskVIP{Sandbox: "/run/e1", VIP: vip}:              kernel.TaskVIPSpec{Addr: ip, Loop: true},
			},
			[]string{
				`~ vip sluice-a 10.0.0.9 rr slots 1  (is: rr slots 2)`,
				`+ alive sluice-a 10.0.0.9 03:00:00:00:00:00`,
				`~ slot sluice-a 10.0.0.9 0 -> 03:00:00:00:00:00  (is: -> 01:00:00:00:00:00)`,
				`- slot sluice-a 10.0.0.9 1 -> 02:00:00:00:00:00`,
				`- alive sluice-a 10.0.0.9 01:00:00:00:00:00`,
				`~ translate task e1 vip 10.0.0.9 to 10.0.0.2 loop  (is: to 10.0.0.2)`,
			}},
		{"a service of IPVS is there before packets are marked for it, and they are not before it goes",
			kernel.State{
				kernel.MarkTable{NS: "sluice-a"}: kernel.MarkTableSpec{}, kernel.IPVSTimeouts{NS: "sluice-a"}: kernel.IPVSTimeoutsSpec{TCP: 10800, FIN: 60, UDP: 120},
				kernel.Mark{NS: "sluice-a", VIP: vip}:              kernel.MarkSpec{Mark: 9},
				kernel.IPVSService{NS: "sluice-a", Mark: 9}:        kernel.IPVSServiceSpec{Scheduler: "wlc"},
				kernel.IPVSDest{NS: "sluice-a", Mark: 9, IP: ip}:   kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR},
				kernel.IPVSService{NS: "sluice-a", Mark: 10}:       kernel.IPVSServiceSpec{Scheduler: "rr"},
				kernel.IPVSDest{NS: "sluice-a", Mark: 10, IP: ip}:  kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR},
				kernel.IPVSDest{NS: "sluice-a", Mark: 10, IP: vip}: kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR},
			},
			kernel.State{
				kernel.MarkTable{NS: "sluice-a"}: kernel.MarkTableSpec{}, kernel.IPVSTimeouts{NS: "sluice-a"}: kernel.IPVSTimeoutsSpec{TCP: 10800, FIN: 60, UDP: 120},
				kernel.Mark{NS: "sluice-a", VIP: vip, Client: ip}: kernel.MarkSpec{Mark: 131081},
				kernel.IPVSService{NS: "sluice-a", Mark: 131081}:  kernel.IPVSServiceSpec{Scheduler: "sh", Fallback: true, Persist: 60, PersistBits: 24},
				kernel.IPVSService{NS: "sluice-a", Mark: 10}:      kernel.IPVSServiceSpec{Scheduler: "rr"},
				kernel.IPVSDest{NS: "sluice-a", Mark: 10, IP: ip}: kernel.IPVSDestSpec{Weight: 0, Method: kernel.IPVSDR, Upper: 9, Lower: 5},
			},
			[]string{
				`+ ipvs sluice-a fwm 131081 sh fallback persist 60 bits 24`,
				`~ ipvs sluice-a fwm 10 -> 10.0.0.2 weight 0 dr upper 9 lower 5  (is: weight 1 dr)`,
				`+ mark sluice-a 10.0.0.9 client 10.0.0.2 fwm 131081`,
				`- mark sluice-a 10.0.0.9 fwm 9`,
				`- ipvs sluice-a fwm 10 -> 10.0.0.9 weight 1 dr`,
				`- ipvs sluice-a fwm 9 wlc`,
			}},
		{"the balancers of both datapaths go each by itself",
			kernel.State{
				kernel.BridgeTable{NS: "sluice-a"}: kernel.BridgeTableSpec{}, kernel.VIP{NS: "sluice-a", IP: vip}: kernel.VIPSpec{Scheduler: "rr"},
				kernel.MarkTable{NS: "sluice-a"}: kernel.MarkTableSpec{}, kernel.IPVSService{NS: "sluice-a", Mark: 9}: kernel.IPVSServiceSpec{Scheduler: "rr"},
			},
			kernel.State{kernel.MarkTable{NS: "sluice-a"}: kernel.MarkTableSpec{}, kernel.IPVSService{NS: "sluice-a", Mark: 9}: kernel.IPVSServiceSpec{Scheduler: "rr"}},
			[]string{`- vip sluice-a 10.0.0.9 rr slots 0`, `- balancer sluice-a router 00:00:00:00:00:00`}},
		{"a VXLAN device that is made anew gets its entries again",
			kernel.State{vxlan: device, entry: there}, kernel.State{vxlan: moved, entry: there},
			[]string{
				`~ vxlan sluice-a vxlan0 vni 5 port 4799 local 192.168.0.7 master br0 quiet mtu 1450 alias "sluice a"  (is: vni 5 port 4799 local 192.168.0.1 master br0 quiet mtu 1450 alias "sluice a")`,
				`+ fdb sluice-a vxlan0 02:42:0a:00:00:02 dst 192.168.0.2`,
			}},
		{"one that is changed in place keeps them",
			kernel.State{vxlan: device, entry: there}, kernel.State{vxlan: wider, entry: there},
			[]string{
				`~ vxlan sluice-a vxlan0 vni 5 port 4799 local 192.168.0.1 master br0 quiet mtu 8950 alias "sluice a"  (is: vni 5 port 4799 local 192.168.0.1 master br0 quiet mtu 1450 alias "sluice a")`,
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, op := range kernel.Diff(c.have, c.want) {
				got = append(got, op.String())
			}
			if d := cmp.Diff(c.ops, got); d != "" {
				t.Errorf("want (-) and got (+) differ:\n%s", d)
			}
		})
	}
}

func TestTextOrdersNumbersByValue(t *testing.T) {
	s := kernel.State{}
	for i := range 12 {
		s[kernel.Slot{NS: "sluice-a", VIP: vip, Slot: i}] = kernel.SlotSpec{}
	}
	var got []string
	for line := range strings.Lines(s.Text()) {
		got = append(got, strings.Fields(line)[3])
	}
	if want := []string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"}; !slices.Equal(got, want) {
		t.Errorf("slots in the order %v", got)
	}
}

func TestCompareIsAnOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keys := states().Draw(t, "state").Keys()
		if len(keys) == 0 {
			return
		}
		pick := func(name string) kernel.Key { return rapid.SampledFrom(keys).Draw(t, name) }
		a, b, c := pick("a"), pick("b"), pick("c")
		if kernel.Compare(a, b) != -kernel.Compare(b, a) {
			t.Fatalf("%v and %v: not the reverse in reverse", a, b)
		}
		if (kernel.Compare(a, b) == 0) != (a == b) {
			t.Fatalf("%v and %v: equal in one sense only", a, b)
		}
		if kernel.Compare(a, b) <= 0 && kernel.Compare(b, c) <= 0 && kernel.Compare(a, c) > 0 {
			t.Fatalf("%v, %v, %v: a round trip", a, b, c)
		}
	})
}
