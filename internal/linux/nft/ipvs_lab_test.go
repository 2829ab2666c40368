package nft_test

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/model"
	"sluice/internal/netnstest"
	lb "sluice/lb/service"
)

// labNetwork is the lab as a network of the model.
var labNetwork = model.Network{
	ID: "labnetwork0000000000000000", Subnet: netip.MustParsePrefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1"),
	VNI: 4097, MTU: mtu, Options: model.NetworkOptions{Datapath: lb.IPVS, Mode: "dr", Scheduler: "rr"},
}

// onBoth runs a test of what both datapaths promise on each.
func onBoth(t *testing.T, test func(t *testing.T, l *lab)) {
	t.Run("nft", func(t *testing.T) { test(t, newLab(t)) })
	t.Run("ipvs", func(t *testing.T) { test(t, newIPVSLab(t)) })
}

// newIPVSLab is newLab with hosts that balance with IPVS, as the plan has it.
func newIPVSLab(t testing.TB) *lab {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.IPVS)
	l := newLab(t)
	for _, h := range []*host{l.one, l.two} {
		h.name, h.ipvs = overlay.NetnsName(labNetwork), ipvs.New()
		do(t, h.fd, func() error {
			for key, v := range l.plan(h) {
				if k, ok := key.(kernel.Sysctl); ok {
					path := "/proc/sys/" + strings.ReplaceAll(k.Name, ".", "/")
					if err := os.WriteFile(path, []byte(v.(kernel.SysctlSpec).Value), 0); err != nil {
						return err
					}
				}
			}
			return nil
		})
		// The stack sends what IPVS has chosen: like the clients, it knows the
		// remote tasks statically.
		br, err := h.h.LinkByName("br0")
		must(t, err)
		for _, k := range l.tasks {
			if k.on != h {
				must(t, h.h.NeighSet(&netlink.Neigh{
					LinkIndex: br.Attrs().Index, IP: k.ip.AsSlice(), HardwareAddr: k.mac[:], State: netlink.NUD_PERMANENT,
				}))
			}
		}
	}
	return l
}

// plan is what the plan says of services on a host. Each is planned by itself: in
// the lab, unlike in a swarm, a task may serve two.
func (l *lab) plan(h *host, services ...service) kernel.State {
	st := kernel.State{}
	lb.Plan(l.view(), st)
	for _, s := range services {
		v := l.view()
		vip := netip.MustParseAddr(s.vip)
		const id = "service"
		v.Services[id] = model.Service{
			ID: id, VIPs: map[model.NetworkID]netip.Addr{labNetwork.ID: vip},
			Options: map[model.NetworkID]model.ServiceOptions{labNetwork.ID: {Scheduler: s.scheduler}},
		}
		weight := map[*task]int{} // one that is named twice has two shares
		for _, k := range s.ready {
			weight[k]++
		}
		for _, k := range s.leaving {
			weight[k] += 0
		}
		for k, w := range weight {
			at := model.EndpointID(k.name)
			t := model.Task{Service: id, VIP: vip, Ready: true, Leaving: w == 0}
			opts := model.ServiceOptions{Weight: w}
			if k.on == h {
				v.Endpoints[at] = model.Endpoint{
					ID: at, Network: labNetwork.ID, Addr: k.ip, MAC: k.mac, Phase: model.Taken, Task: t, Options: opts, Prepared: vip,
				}
			} else {
				v.Remotes[at] = model.Remote{
					ID: at, Network: labNetwork.ID, Node: "that", VTEP: netip.MustParseAddr("192.0.2.2"),
					Addr: k.ip, MAC: k.mac, Task: t, Options: opts, Prepared: vip,
				}
			}
		}
		lb.Plan(v, st)
	}
	return st
}

// view is one that knows the network, and that this node has ip_vs.
func (l *lab) view() model.View {
	return model.View{
		Self:      model.Self{Node: "this", VTEP: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4799, Datapath: lb.IPVS},
		Networks:  map[model.NetworkID]model.Network{labNetwork.ID: labNetwork},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Remotes:   map[model.EndpointID]model.Remote{},
		Services:  map[model.ServiceID]model.Service{},
	}
}

// turns is the order in which a round robin takes tasks: nftables as they are
// given, IPVS the one that was made last first.
func (l *lab) turns(names string) string {
	if l.one.ipvs == nil {
		return names
	}
	b := []byte(names)
	slices.Reverse(b)
	return string(b)
}

// planned is what of the plan is in the tables.
func (l *lab) planned(h *host, services ...service) kernel.State {
	st := l.plan(h, services...)
	for k := range st {
		if k.Phase() != kernel.PhaseVIP {
			delete(st, k)
		}
	}
	return st
}
