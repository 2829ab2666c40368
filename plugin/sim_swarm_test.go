package main

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"sluice/driver"
	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/options"
)

// This file is the swarm of the simulation: the engines' truth, which is not cut by
// what cuts the plugins from each other but where it says so.

const (
	simNet    model.NetworkID = "simnetwork000000000000000"
	simOther  model.NetworkID = "othernetwork0000000000000" // brings a second key, to managers alone
	simSubnet                 = "10.255.0.0/20"
)

// simService is a service of the swarm.
type simService struct {
	id        model.ServiceID
	name      string
	vip       netip.Addr
	created   time.Time
	published model.Published
	gone      bool
}

// simTask is a task and its one endpoint.
type simTask struct {
	id       model.TaskID
	endpoint model.EndpointID
	service  *simService
	host     *simHost
	addr     netip.Addr
	wanted   bool // by the swarm
	reaped   bool // not listed by managers any more
	runs     bool // its container
	listed   bool // by its engine: from CreateEndpoint on
	ended    bool // container and endpoint are no more
	// doomed: somebody whose word counts has said, or may have, that it gets no
	// new connections.
	doomed bool
}

func (x *simTask) mac() model.MAC  { return model.MACFor(x.addr) }
func (x *simTask) sandbox() string { return "/run/docker/netns/" + x.endpoint.Short() }

// reach says whether two hosts have contact, as the engines see it.
func (w *world) reach(a, b *simHost) bool {
	return a == b || !w.net.Blocked(a.addr, b.addr) && !w.net.Blocked(b.addr, a.addr)
}

// obeys says whether the swarm reaches a node.
func (w *world) obeys(h *simHost) bool { return w.leader != nil && w.reach(w.leader, h) && !h.removed }

// snapshot is what a host's engine tells its plugin; false while that is frozen.
func (w *world) snapshot(h *simHost) (model.EngineSnapshot, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if h.frozen {
		return model.EngineSnapshot{}, false
	}
	now := time.Now()
	s := model.EngineSnapshot{
		HostName: "host-" + string(h.id), Version: "28.5", SwarmValid: true, Active: true, Node: h.id, NodeAddr: h.addr,
		Manager: h.manager, Leader: w.leader == h,
		ContainersValid: true, ContainersAt: now, Containers: make(map[model.EndpointID]model.EngineEndpoint),
		NetworksValid: true, Networks: make(map[model.NetworkID]model.EngineNetwork),
	}
	if h.removed && w.healed { // its engine has heard of it by now
		s.Active, s.NoSwarm, s.Node, s.NodeAddr = false, true, "", netip.Addr{}
		return s, true
	}
	for _, m := range w.hosts {
		if m.manager {
			s.Managers = append(s.Managers, m.addr)
		}
	}
	uses := func(x *simHost) bool {
		for _, t := range w.tasks {
			if t.host == x && t.listed {
				return true
			}
		}
		return false
	}
	if h.manager || uses(h) {
		n := model.EngineNetwork{
			ID: simNet, Name: "web", Swarm: true, Subnet: netip.MustParsePrefix(simSubnet), Gateway: netip.MustParseAddr("10.255.0.1"),
			Options: w.options(0),
		}
		for _, x := range w.hosts {
			if uses(x) && w.reach(h, x) {
				n.Peers = append(n.Peers, x.addr)
			}
		}
		s.Networks[simNet] = n
	}
	if h.manager && w.keys > 1 {
		s.Networks[simOther] = model.EngineNetwork{
			ID: simOther, Name: "other", Swarm: true, Subnet: netip.MustParsePrefix("10.255.16.0/20"), Gateway: netip.MustParseAddr("10.255.16.1"),
			Options: w.options(1),
		}
	}
	for _, t := range w.tasks {
		if t.host != h || !t.listed {
			continue
		}
		s.Containers[t.endpoint] = model.EngineEndpoint{
			Network: simNet, Addr: t.addr, MAC: t.mac(), Container: string(t.id), Name: string(t.id), Sandbox: t.sandbox(),
			Task: model.Task{ID: t.id, Service: t.service.id, ServiceName: t.service.name, VIP: t.service.vip, Ready: t.runs},
		}
	}
	if w.leader != h {
		return s, true
	}
	s.ServicesValid, s.ServicesAt, s.LeaderAt = true, now, now
	s.Services, s.Nodes = make(map[model.ServiceID]model.Service), make(map[model.NodeID]model.EngineNode)
	for _, x := range w.services {
		if x.gone {
			continue
		}
		s.Services[x.id] = model.Service{
			ID: x.id, Name: x.name, Created: x.created, VIPs: map[model.NetworkID]netip.Addr{simNet: x.vip},
			Options: map[model.NetworkID]model.ServiceOptions{simNet: {Published: x.published}},
		}
	}
	for _, t := range w.tasks {
		if !t.wanted && !t.reaped && !t.ended {
			s.Leaving = append(s.Leaving, t.id)
		}
	}
	for _, x := range w.hosts {
		if !x.removed {
			s.Nodes[x.id] = model.EngineNode{}
		}
	}
	return s, true
}

// options are a network's, with a key of the swarm's.
func (w *world) options(key int) map[string]string {
	return map[string]string{
		options.VNI: strconv.Itoa(1<<20 + 7 + key), options.MTU: "1450", options.SecretKey: options.EncodeKey(testKey(byte(w.seed) + byte(key)*77 + 1)),
	}
}

// news tells the plugins that their engines have something new.
func (w *world) news() {
	for _, h := range w.hosts {
		if h.proc != nil && !h.frozen {
			wakeUp(h.proc.woken)
		}
	}
}

func wakeUp(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// serve makes a service.
func (w *world) serve() *simService {
	w.number++
	x := &simService{
		id: model.ServiceID(fmt.Sprintf("service%02d0000000000000000", w.number)), name: fmt.Sprint("s", w.number),
		vip: w.address(), created: time.Now(),
	}
	if w.rng.IntN(2) == 0 {
		x.published = model.Published(strconv.Itoa(8000 + w.number))
	}
	w.services = append(w.services, x)
	return x
}

// address gives one that was never given.
func (w *world) address() netip.Addr {
	w.addresses++
	return netip.AddrFrom4([4]byte{10, 255, byte(w.addresses >> 8), byte(w.addresses)})
}

// call is the engine's call of a plugin, which must answer within its time.
func (w *world) call(what string, f func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := f(ctx); err != nil {
		w.fail("%s: %v", what, err)
	}
}

// start runs a task of a service on a host, as its engine does.
func (w *world) start(x *simService, h *simHost) {
	w.number++
	t := &simTask{
		id: model.TaskID(fmt.Sprintf("task%03d", w.number)), endpoint: model.EndpointID(fmt.Sprintf("%012d%052d", w.number, 0)),
		service: x, host: h, addr: w.address(), wanted: true,
	}
	d := h.proc.driver
	if _, known := h.proc.hub.Network(simNet); !known {
		w.call("create network", func(ctx context.Context) error {
			subnet := netip.MustParsePrefix(simSubnet)
			return d.CreateNetwork(ctx, driver.CreateRequest{
				Network: simNet, Options: w.options(0),
				Subnets: []driver.Subnet{{Pool: subnet, Gateway: netip.PrefixFrom(netip.MustParseAddr("10.255.0.1"), 20)}},
			})
		})
	}
	w.call("create endpoint", func(ctx context.Context) error {
		o := map[string]string{}
		if x.published != "" {
			o["sluice.publish"] = string(x.published)
		}
		_, err := d.CreateEndpoint(ctx, driver.EndpointRequest{Network: simNet, Endpoint: t.endpoint, Addr: netip.PrefixFrom(t.addr, 20), Options: o})
		return err
	})
	w.locked(func() { w.tasks = append(w.tasks, t); t.listed = true })
	w.call("join", func(ctx context.Context) error {
		_, err := d.Join(ctx, driver.JoinRequest{Network: simNet, Endpoint: t.endpoint, Sandbox: t.sandbox()})
		return err
	})
	n, _ := h.proc.hub.Network(simNet)
	h.kernel.AddSandbox(t.sandbox())
	h.kernel.Take(kernel.Link{NS: overlay.NetnsName(n), Name: overlay.HostEnd(t.endpoint), Kind: kernel.Veth})
	h.proc.loop.Doubt()
	w.locked(func() { t.runs = true })
}

// end ends a task's container, and tells the plugin if it can be told.
func (w *world) end(t *simTask) {
	h := t.host
	told := h.proc != nil && !h.frozen
	if told {
		w.call("leave", func(ctx context.Context) error { return h.proc.driver.Leave(ctx, simNet, t.endpoint) })
	}
	w.locked(func() { t.runs, t.listed, t.ended, t.wanted, t.doomed = false, false, true, false, true })
	h.kernel.RemoveSandbox(t.sandbox())
	// The pair goes with the namespace in which one end is.
	link := kernel.Link{NS: overlay.NetnsName(model.Network{ID: simNet}), Name: overlay.HostEnd(t.endpoint), Kind: kernel.Veth}
	h.kernel.Alter(func(s kernel.State) { delete(s, link) })
	if !told {
		w.untold = true
		return // the engine does not speak of it again
	}
	h.proc.loop.Doubt()
	w.call("delete endpoint", func(ctx context.Context) error { return h.proc.driver.DeleteEndpoint(ctx, simNet, t.endpoint) })
	for _, other := range w.tasks {
		if other.host == h && other.listed {
			return
		}
	}
	w.call("delete network", func(ctx context.Context) error { return h.proc.driver.DeleteNetwork(ctx, simNet) })
}

// obey has the engines that the swarm reaches end what it does not want.
func (w *world) obey() {
	for _, t := range w.tasks {
		h := t.host
		if t.ended || t.wanted || h.proc == nil || h.frozen || !(w.obeys(h) || h.removed && w.healed) {
			continue
		}
		w.end(t)
	}
}
