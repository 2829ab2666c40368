package nft_test

import (
	"cmp"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/model"
	"sluice/internal/netnstest"
	"sluice/lb/guard"
	lb "sluice/lb/service"
)

// variant is a way to balance: what the nodes do it with, and how packets reach
// their backends.
type variant struct{ name, datapath, mode string }

func as(datapath, mode string) variant { return variant{datapath + "/" + mode, datapath, mode} }

// variants are all that must mean the same.
func variants() []variant {
	return []variant{
		as(lb.NFT, lb.DR), as(lb.NFT, lb.NAT), as(lb.NFT, lb.TUN),
		as(lb.IPVS, lb.DR), as(lb.IPVS, lb.NAT), as(lb.IPVS, lb.TUN),
	}
}

// byNFT and byIPVS are the ordinary ways, for tests that look into one datapath.
func byNFT() variant  { return as(lb.NFT, lb.DR) }
func byIPVS() variant { return as(lb.IPVS, lb.DR) }

// onAll runs a test of what all variants promise on each.
func onAll(t *testing.T, test func(t *testing.T, l *lab)) {
	t.Helper()
	onThose(t, func(variant) bool { return true }, test)
}

// onThose runs a test on the variants that keep takes. The test says why not on all.
func onThose(t *testing.T, keep func(variant) bool, test func(t *testing.T, l *lab)) {
	t.Helper()
	for _, v := range variants() {
		if keep(v) {
			t.Run(v.name, func(t *testing.T) { test(t, newLab(t, v)) })
		}
	}
}

func isIPVS(v variant) bool { return v.datapath == lb.IPVS }

// labNetwork is the lab as a network of the model.
func labNetwork(v variant) model.Network {
	return model.Network{
		ID: "labnetwork0000000000000000", Subnet: netip.MustParsePrefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1"),
		VNI: 4097, MTU: mtu, Options: model.NetworkOptions{Datapath: v.datapath, Mode: v.mode, Scheduler: "rr"},
	}
}

// service is a VIP, who serves it and how.
type service struct {
	vip       string
	scheduler string  // empty: the lab's, rr
	mode      string  // empty: the lab's
	ready     []*task // one that is named twice has two shares
	leaving   []*task
	fresh     []*task              // of ready: they have just become so
	options   model.ServiceOptions // all else
}

// plan is what the plan says of services on a host and in its tasks. Each is
// planned by itself: in the lab, unlike in a swarm, a task may serve two.
func (l *lab) plan(h *host, services ...service) kernel.State {
	st := kernel.State{}
	each := func(v model.View) {
		lb.Plan(v, nil, st)
		guard.Plan(v, st)
	}
	each(l.view(h))
	for _, s := range services {
		if h.network.Subnet.Contains(netip.MustParseAddr(s.vip)) {
			each(l.view(h, s))
		}
	}
	for key, spec := range st { // the addresses of a guest are of its host's port
		switch k := key.(type) {
		case kernel.GuardPort:
			if strings.Contains(k.Dev, guestAt) {
				delete(st, k)
			}
		case kernel.GuardAddr:
			if dev, _, is := strings.Cut(k.Dev, guestAt); is {
				delete(st, k)
				k.Dev = dev
				st[k] = spec
			}
		}
	}
	if st[kernel.LiftTable{NS: h.name}] != nil { // for the one of them that needs it
		st[kernel.Sysctl{NS: h.name, Name: "net.ipv4.ip_forward"}] = kernel.SysctlSpec{Value: "1"}
	}
	return st
}

// view is what a host knows: its network, all who are on it, and at most one
// service. A task is prepared as far as its own tables have been read to say so.
func (l *lab) view(h *host, services ...service) model.View {
	v := model.View{
		Self:      model.Self{Node: "this", VTEP: h.vtep, VXLANPort: vxlanPort, Datapath: h.datapath},
		Networks:  map[model.NetworkID]model.Network{h.network.ID: h.network},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Remotes:   map[model.EndpointID]model.Remote{},
		Services:  map[model.ServiceID]model.Service{},
		Fresh:     map[model.EndpointID]time.Time{},
	}
	add := func(k *task, t model.Task, o model.ServiceOptions) {
		if k.on.network.ID != h.network.ID {
			return
		}
		at, prepared, tunnel := model.EndpointID(k.name), netip.Addr{}, false
		if t.VIP.IsValid() {
			space := l.tasks[k.name]
			tunnel = space.have[kernel.TaskTunnel{Sandbox: space.sandbox(), Addr: k.ip}] != nil
			if space.translates(t.VIP) {
				prepared = t.VIP
			}
		}
		if k.on == h {
			v.Endpoints[at] = model.Endpoint{
				ID: at, Network: h.network.ID, Addr: k.ip, MAC: k.mac, Phase: model.Taken, Sandbox: k.sandbox(),
				Task: t, Options: o, Prepared: prepared, Tunnel: tunnel,
			}
		} else {
			v.Remotes[at] = model.Remote{
				ID: at, Network: h.network.ID, Node: "that", VTEP: k.on.vtep, Addr: k.ip, MAC: k.mac,
				Task: t, Options: o, Prepared: prepared, Tunnel: tunnel,
			}
		}
	}
	for _, k := range l.tasks {
		add(k, model.Task{}, model.ServiceOptions{})
	}
	for _, k := range l.extra {
		add(k, model.Task{}, model.ServiceOptions{})
	}
	for _, s := range services {
		const id = "service"
		vip, opts := netip.MustParseAddr(s.vip), s.options
		opts.Scheduler, opts.Mode = cmp.Or(s.scheduler, opts.Scheduler), cmp.Or(s.mode, opts.Mode)
		v.Services[id] = model.Service{
			ID: id, VIPs: map[model.NetworkID]netip.Addr{h.network.ID: vip},
			Options: map[model.NetworkID]model.ServiceOptions{h.network.ID: opts},
		}
		weight := map[*task]int{}
		for _, k := range s.ready {
			weight[k]++
		}
		for _, k := range s.leaving {
			weight[k] += 0
		}
		for _, k := range s.fresh {
			v.Fresh[model.EndpointID(k.name)] = v.Now
		}
		for k, w := range weight {
			each := opts
			each.Weight = w
			add(k, model.Task{Service: id, VIP: vip, Ready: true, Leaving: w == 0}, each)
		}
	}
	return v
}

// want is the state of a host's tables for services.
func (l *lab) want(h *host, services ...service) kernel.State {
	st := l.plan(h, services...)
	maps.DeleteFunc(st, func(k kernel.Key, _ kernel.Value) bool { return k.Phase() != kernel.PhaseVIP })
	return st
}

// wantTask is the state of a task's table for the services that it is in, on
// whatever networks.
func (l *lab) wantTask(k *task, services ...service) kernel.State {
	st := kernel.State{}
	for _, h := range l.hosts {
		maps.Copy(st, l.plan(h, services...))
	}
	maps.DeleteFunc(st, func(key kernel.Key, _ kernel.Value) bool {
		return key.Netns() != "task:"+k.sandbox() || k.on.noTunnel && isTunnel(key) // which the kernel refuses
	})
	return st
}

// set makes services so everywhere, and checks that the dump says so: first in
// the tasks, then on the hosts, which use no task before it says that it is ready.
func (l *lab) set(services ...service) {
	t := l.t
	t.Helper()
	for range 2 { // again, as only who is ready can be alone
		for _, k := range l.prepared() {
			k.apply(t, l.wantTask(k, services...))
		}
	}
	for _, h := range l.hosts {
		h.setUp(t, l.plan(h, services...))
		h.apply(t, l.want(h, services...))
	}
}

// prepared are the tasks that their nodes prepare.
func (l *lab) prepared() map[string]*task {
	if l.bare {
		return nil
	}
	return l.tasks
}

// setUp sets the sysctls and adds the VIPs' addresses that a plan has.
func (h *host) setUp(t testing.TB, st kernel.State) {
	t.Helper()
	for key, v := range st {
		switch k := key.(type) {
		case kernel.Sysctl:
			do(t, h.fd, func() error { return sysctl(k.Name, v.(kernel.SysctlSpec).Value) })
		case kernel.Addr:
			br, err := h.h.LinkByName(k.Dev)
			must(t, err)
			addr, err := netlink.ParseAddr(k.Prefix.String())
			must(t, err)
			must(t, h.h.AddrReplace(br, addr))
		}
	}
}

// sysctl sets a key of the calling thread's namespace. One of br_netfilter is
// there only if that is loaded, and what it would forbid is not done if not.
func sysctl(name, value string) error {
	err := os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value), 0)
	if os.IsNotExist(err) && strings.HasPrefix(name, "net.bridge.") {
		return nil
	}
	return err
}

// newHost makes a host of a network, with the bridge and all that its plan sets.
func newHost(t testing.TB, n model.Network, vtep string) *host {
	h := &host{
		name: overlay.NetnsName(n), network: n, datapath: n.Options.Datapath, vtep: netip.MustParseAddr(vtep),
		fd: newNetns(t), have: kernel.State{},
	}
	h.noTunnel = netnstest.Has(netnstest.IPIP) != nil
	if h.datapath == lb.IPVS {
		netnstest.Need(t, netnstest.IPVS)
		if n.Options.Mode == lb.TUN {
			netnstest.Need(t, netnstest.IPIP)
		}
		h.ipvs = ipvs.New()
	}
	var err error
	h.h, err = netlink.NewHandleAt(netns.NsHandle(h.fd))
	must(t, err)
	t.Cleanup(h.h.Close)
	st := kernel.State{}
	overlay.Plan(model.View{Self: model.Self{VTEP: h.vtep, VXLANPort: vxlanPort}, Networks: map[model.NetworkID]model.Network{n.ID: n}}, st)
	for key, v := range st {
		if k, ok := key.(kernel.Sysctl); ok { // before the bridge, as some are defaults for it
			do(t, h.fd, func() error { return sysctl(k.Name, v.(kernel.SysctlSpec).Value) })
		}
	}
	mac := overlay.RouterMAC(n)
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: overlay.BridgeName, MTU: mtu, HardwareAddr: mac[:]}}
	must(t, h.h.LinkAdd(br))
	must(t, h.h.LinkSetUp(br))
	h.setUp(t, st)
	return h
}

// turns is the order in which a round robin takes tasks: nftables by address,
// IPVS the one that was made last first.
func (l *lab) turns(names string) string {
	b := []byte(names)
	slices.Sort(b)
	if l.one.ipvs != nil {
		slices.Reverse(b)
	}
	return string(b)
}
