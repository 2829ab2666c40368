package service_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/service"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

const (
	net1 model.NetworkID = "webnetwork00000000000000a"
	net2 model.NetworkID = "dbnetwork000000000000000b"
	web  model.ServiceID = "webservice"
	db   model.ServiceID = "dbservice"
)

var (
	webVIP = addr("10.255.0.10")
	dbVIP  = addr("10.255.0.11")
)

// world is a view under construction, as node 192.168.0.1 sees it.
type world struct{ model.View }

func newWorld() world {
	w := world{model.View{
		Self:      model.Self{Node: "node1", VTEP: addr("192.168.0.1"), VXLANPort: 4799},
		Networks:  map[model.NetworkID]model.Network{},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Remotes:   map[model.EndpointID]model.Remote{},
		Services:  map[model.ServiceID]model.Service{},
	}}
	w.network(net1, "10.255.0.0/20", "10.255.0.1")
	return w
}

// ask makes all networks ask for a datapath.
func (w world) ask(datapath string) {
	for id, n := range w.Networks {
		n.Options.Datapath = datapath
		w.Networks[id] = n
	}
}

func (w world) network(id model.NetworkID, subnet, gateway string) {
	w.Networks[id] = model.Network{
		ID: id, Subnet: netip.MustParsePrefix(subnet), Gateway: addr(gateway), VNI: 7, MTU: 1450,
		Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "rr"},
	}
}

// told records a service as a manager tells it.
func (w world) told(id model.ServiceID, vips map[model.NetworkID]netip.Addr) model.Service {
	s := model.Service{ID: id, Name: string(id), Created: time.Unix(1000, 0), VIPs: vips}
	w.Services[id] = s
	return s
}

func vipOn(n model.NetworkID, vip netip.Addr) map[model.NetworkID]netip.Addr {
	return map[model.NetworkID]netip.Addr{n: vip}
}

// here adds a ready and prepared task of this node, which edit may change.
func (w world) here(id model.EndpointID, s model.ServiceID, vip netip.Addr, ip string, edit ...func(*model.Endpoint)) {
	e := model.Endpoint{
		ID: id, Network: net1, Addr: addr(ip), MAC: model.MACFor(addr(ip)), Phase: model.Taken,
		Sandbox: "/run/docker/netns/" + string(id),
		Task:    model.Task{ID: model.TaskID("task-" + id), Service: s, ServiceName: string(s), VIP: vip, Ready: true}, Prepared: vip,
	}
	for _, f := range edit {
		f(&e)
	}
	w.Endpoints[id] = e
}

// there adds a ready and prepared task of another node.
func (w world) there(id model.EndpointID, s model.ServiceID, vip netip.Addr, ip string, edit ...func(*model.Remote)) {
	r := model.Remote{
		ID: id, Network: net1, Node: "node2", VTEP: addr("192.168.0.2"), Addr: addr(ip), MAC: model.MACFor(addr(ip)),
		Task: model.Task{ID: model.TaskID("task-" + id), Service: s, ServiceName: string(s), VIP: vip, Ready: true}, Prepared: vip,
	}
	for _, f := range edit {
		f(&r)
	}
	w.Remotes[id] = r
}

func planned(v model.View) kernel.State {
	s := kernel.State{}
	service.Plan(v, nil, s)
	return s
}

// cases are views that plans are known of.
func cases() []planCase {
	return []planCase{
		{"no-services", func(w world) { w.here("e1", "", netip.Addr{}, "10.255.0.2") }},
		{"zero-replicas", func(w world) { w.told(web, vipOn(net1, webVIP)) }},
		{"two-nodes", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("client", "", netip.Addr{}, "10.255.0.2")
			w.here("e1", web, webVIP, "10.255.0.3")
			w.there("e2", web, webVIP, "10.255.0.4")
		}},
		{"self-call-of-two", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("e1", web, webVIP, "10.255.0.3")
			w.here("e2", web, webVIP, "10.255.0.4")
		}},
		{"self-call-of-one", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("e1", web, webVIP, "10.255.0.3")
		}},
		{"leaving", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("e1", web, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Task.Leaving = true })
			w.there("e2", web, webVIP, "10.255.0.4")
			w.there("e3", web, webVIP, "10.255.0.5", func(r *model.Remote) { r.Task.Leaving = true })
		}},
		// One serves UDP to nobody else's loss; the other goes on with what is open.
		{"leaving-with-named-ports", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Ports: "53/udp;80/tcp"}}
			w.Services[web] = s
			w.here("e1", web, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Task.Leaving = true })
			w.there("e2", web, webVIP, "10.255.0.4")
		}},
		// TCP and UDP of one client stay with one backend, to its end.
		{"leaving-with-persistence", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Persist: 300, PersistBits: 32}}
			w.Services[web] = s
			w.there("e1", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Task.Leaving = true })
			w.there("e2", web, webVIP, "10.255.0.4")
		}},
		// Nobody takes what it has.
		{"the-last-one-leaves", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Ports: "53/udp"}}
			w.Services[web] = s
			w.there("e2", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Task.Leaving = true })
		}},
		// Also what is open to it ends: nobody would answer.
		{"a-node-is-down", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("e1", web, webVIP, "10.255.0.3")
			w.there("e2", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Lost, r.Task.Leaving = true, true })
		}},
		// Its namespace must be prepared before it gets anything: the translation is
		// planned, the slot is not.
		{"being-prepared", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("e1", web, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Prepared = netip.Addr{} })
			w.there("e2", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Prepared = addr("10.255.0.99") })
		}},
		{"not-taken-yet", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			unready := func(e *model.Endpoint) { e.Prepared, e.Task.Ready = netip.Addr{}, false }
			w.here("e1", web, webVIP, "10.255.0.3", unready, func(e *model.Endpoint) { e.Phase = model.Created })
			w.here("e2", web, webVIP, "10.255.0.4", unready, func(e *model.Endpoint) { e.Phase = model.Joined })
			w.here("e3", web, webVIP, "10.255.0.5", unready, func(e *model.Endpoint) { e.Sandbox = "" })
		}},
		{"dnsrr", func(w world) {
			w.told(web, nil)
			w.here("e1", web, netip.Addr{}, "10.255.0.3")
			w.there("e2", web, netip.Addr{}, "10.255.0.4")
		}},
		{"weights", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: "wrr"}}
			w.Services[web] = s
			w.there("e2", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Options.Weight = 20 })
			w.there("e3", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Options.Weight = 60 })
			w.there("e4", web, webVIP, "10.255.0.5", func(r *model.Remote) { r.Options.Weight = 20 })
		}},
		// No manager has told of it: its tasks' engines know the VIP.
		{"unknown-to-managers", func(w world) {
			w.here("e1", web, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Options.Scheduler = "sh" })
			w.there("e2", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Task.VIP = netip.Addr{} })
		}},
		{"two-services", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.told(db, vipOn(net1, dbVIP))
			w.here("e1", web, webVIP, "10.255.0.3")
			w.there("e2", db, dbVIP, "10.255.0.4")
		}},
		{"two-networks", func(w world) {
			w.network(net2, "10.255.16.0/20", "10.255.16.1")
			w.told(web, map[model.NetworkID]netip.Addr{net1: webVIP, net2: addr("10.255.16.10")})
			w.here("e1", web, webVIP, "10.255.0.3")
			w.here("e2", web, addr("10.255.16.10"), "10.255.16.3", func(e *model.Endpoint) { e.Network = net2 })
		}},
		// A task on two networks has one namespace for both: one table with a
		// translation for each. It is alone on the first only.
		{"one-task-on-two-networks", func(w world) {
			w.network(net2, "10.255.16.0/20", "10.255.16.1")
			w.told(web, map[model.NetworkID]netip.Addr{net1: webVIP, net2: addr("10.255.16.10")})
			on2 := func(e *model.Endpoint) { e.Network, e.Sandbox = net2, "/run/docker/netns/e1" }
			w.here("e1", web, webVIP, "10.255.0.3")
			w.here("e2", web, addr("10.255.16.10"), "10.255.16.3", on2)
			w.there("e3", web, addr("10.255.16.10"), "10.255.16.4", func(r *model.Remote) { r.Network = net2 })
		}},
		{"a-network-that-is-not-here", func(w world) {
			w.told(web, vipOn(net2, addr("10.255.16.10")))
			w.there("e2", web, addr("10.255.16.10"), "10.255.16.3", func(r *model.Remote) { r.Network = net2 })
		}},
		{"local-network", func(w world) {
			n := w.Networks[net1]
			n.Local = true
			w.Networks[net1] = n
			w.here("e1", "", netip.Addr{}, "10.255.0.2")
		}},
		// A node that is out of reach still tells of a task whose address a new
		// one, here, has got: one backend, and alone.
		{"an-address-twice", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			w.here("e1", web, webVIP, "10.255.0.3")
			w.there("e2", web, webVIP, "10.255.0.3")
		}},
		// The old service is gone, but its tasks are not; the new one has its VIP.
		{"a-vip-passes-on", func(w world) {
			w.there("e1", "oldservice", webVIP, "10.255.0.3", func(r *model.Remote) { r.Task.Leaving = true })
			w.here("e2", "oldservice", webVIP, "10.255.0.4", func(e *model.Endpoint) { e.Task.Leaving = true })
			w.told(web, vipOn(net1, webVIP))
			w.here("e3", web, webVIP, "10.255.0.5")
		}},
		// Neither service knows of the other: the newer has it, and none of the
		// older's places are left.
		{"a-vip-claimed-twice", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Created = s.Created.Add(time.Hour)
			w.Services[web] = s
			w.told(db, vipOn(net1, webVIP))
			w.there("e1", db, webVIP, "10.255.0.3")
			w.there("e2", db, webVIP, "10.255.0.4")
			w.there("e3", web, webVIP, "10.255.0.5")
		}},
		// What another node says is bounded.
		{"a-weight-out-of-bounds", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: "wrr"}}
			w.Services[web] = s
			w.there("e2", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Options.Weight = -4 })
			w.there("e3", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Options.Weight = 0 })
		}},
		// Everything but a scheduler that a service may ask for, in each mode.
		{"mode-nat", func(w world) { allOptions(w, "nat") }},
		{"mode-tun", func(w world) { allOptions(w, "tun") }},
		{"mode-dr", func(w world) { allOptions(w, "dr") }},
		{"named-ports-of-one-task", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Ports: "80/tcp;81:8080/tcp"}}
			w.Services[web] = s
			w.here("e1", web, webVIP, "10.255.0.2")
		}},
		{"destination-hash", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: "dh"}}
			w.Services[web] = s
			w.here("e1", web, webVIP, "10.255.0.2")
			w.there("e2", web, webVIP, "10.255.0.3")
			w.there("e3", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Task.Leaving = true })
		}},
		{"failover", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: "fo"}}
			w.Services[web] = s
			w.here("e1", web, webVIP, "10.255.0.2", func(e *model.Endpoint) { e.Options.Weight = 2 })
			w.there("e2", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Options.Weight = 3 })
		}},
	}
}

// allOptions is a service with a task here, one there that can do all, one that
// has no tunnel and is not prepared, and one that leaves.
func allOptions(w world, mode string) {
	s := w.told(web, vipOn(net1, webVIP))
	s.Options = map[model.NetworkID]model.ServiceOptions{net1: {
		Scheduler: "wlc", Mode: mode, Weight: 3, Ports: "53/udp;81:80/tcp", Persist: 300, PersistBits: 24,
		OnePacket: true, Upper: 100, Lower: 80, Idle: 20000,
	}}
	w.Services[web] = s
	own := s.Options[net1]
	w.here("e1", web, webVIP, "10.255.0.2", func(e *model.Endpoint) { e.Options, e.Tunnel = own, true })
	w.there("e2", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Options, r.Tunnel = own, true })
	w.there("e3", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Options, r.Prepared = own, netip.Addr{} })
	w.there("e4", web, webVIP, "10.255.0.5", func(r *model.Remote) { r.Options, r.Task.Leaving = own, true })
}

type planCase struct {
	name  string
	build func(w world)
}

func TestPlans(t *testing.T) {
	for _, c := range cases() {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			c.build(w)
			goldenPlan(t, c.name, w.View)
		})
	}
}

// What of it differs on a node whose kernel has ip_vs.
func TestPlansWithIPVS(t *testing.T) {
	names := []string{
		"no-services", "zero-replicas", "two-nodes", "self-call-of-two", "self-call-of-one", "leaving", "leaving-with-named-ports", "leaving-with-persistence", "the-last-one-leaves", "a-node-is-down", "being-prepared",
		"weights", "one-task-on-two-networks", "local-network", "an-address-twice", "a-vip-passes-on",
		"destination-hash", "mode-nat", "mode-tun", "mode-dr", "named-ports-of-one-task",
	}
	for _, c := range cases() {
		if !slices.Contains(names, c.name) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			c.build(w)
			w.Self.Datapath = service.IPVS
			goldenPlan(t, "ipvs-"+c.name, w.View)
		})
	}
}

// goldenPlan compares a plan with its file, and with itself.
func goldenPlan(t *testing.T, name string, v model.View) {
	t.Helper()
	text := planned(v).Text()
	golden.Check(t, name, text)
	for range 8 { // maps are walked in another order each time
		if again := planned(v).Text(); again != text {
			t.Fatalf("and then:\n%s", again)
		}
	}
}

func TestDatapathOfANetwork(t *testing.T) {
	for _, c := range []struct{ node, option, subnet, want string }{
		{"", "auto", "10.255.0.0/20", service.NFT},
		{"nft", "auto", "10.255.0.0/20", service.NFT},
		{"nft", "ipvs", "10.255.0.0/20", service.NFT}, // from before the kernel lost it; the driver refuses new ones
		{"ipvs", "auto", "10.255.0.0/20", service.IPVS},
		{"ipvs", "ipvs", "10.255.0.0/16", service.IPVS},
		{"ipvs", "nft", "10.255.0.0/20", service.NFT},
		{"ipvs", "ipvs", "10.0.0.0/8", service.IPVS},
		{"ipvs", "ipvs", "fd00::/64", service.NFT},
	} {
		n := model.Network{Subnet: netip.MustParsePrefix(c.subnet), Options: model.NetworkOptions{Datapath: c.option}}
		if got := service.Datapath(model.Self{Datapath: c.node}, n); got != c.want {
			t.Errorf("node %q, option %q, subnet %s: %q, want %q", c.node, c.option, c.subnet, got, c.want)
		}
	}
}

// TestSchedulerOfADatapath pins what stands in for what a kernel without ip_vs cannot do.
func TestSchedulerOfADatapath(t *testing.T) {
	for _, c := range []struct{ asked, nft string }{
		{"rr", "rr"}, {"wrr", "wrr"}, {"sh", "sh"}, {"mh", "mh"}, {"dh", "dh"}, {"fo", "fo"},
		{"lc", "rr"}, {"wlc", "wrr"}, {"sed", "wrr"}, {"nq", "wrr"}, {"ovf", "wrr"}, {"lblc", "dh"}, {"lblcr", "dh"},
	} {
		x := &service.Virtual{Scheduler: c.asked}
		ipvs := c.asked
		if c.asked == "dh" {
			ipvs = "fo"
		}
		if used, why := service.Scheduler(x, service.IPVS); used != ipvs || (why == "") != (used == c.asked) {
			t.Errorf("%s on ipvs: %s, %q; want %s, and a reason if it is another", c.asked, used, why, ipvs)
		}
		if used, why := service.Scheduler(x, service.NFT); used != c.nft || (why == "") != (used == c.asked) {
			t.Errorf("%s on nft: %s, %q; want %s, and a reason if it is another", c.asked, used, why, c.nft)
		}
	}
}

// TestWhyABackendWaits pins the words that people read.
func TestWhyABackendWaits(t *testing.T) {
	w := newWorld()
	w.told(web, vipOn(net1, webVIP))
	w.there("e2", web, webVIP, "10.255.0.2")
	w.there("e3", web, webVIP, "10.255.0.3", func(r *model.Remote) { r.Task.Leaving = true })
	w.there("e4", web, webVIP, "10.255.0.4", func(r *model.Remote) { r.Task.Ready = false })
	w.there("e5", web, webVIP, "10.255.0.5", func(r *model.Remote) { r.Prepared = netip.Addr{} })
	w.there("e6", web, webVIP, "10.255.0.2")
	w.there("e7", web, webVIP, "10.255.0.7", func(r *model.Remote) { r.VTEP = netip.Addr{} })
	var got []string
	for _, b := range service.Virtuals(w.View)[0].Backends {
		got = append(got, fmt.Sprintf("%s %s", b.Endpoint, b.Why))
	}
	want := []string{"e2 ", "e6 its address belongs to endpoint e2", "e3 leaving", "e4 not ready", "e5 being prepared"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("want (-) and got (+) differ:\n%s", d)
	}
}

func TestOptions(t *testing.T) {
	sh := model.ServiceOptions{Scheduler: "sh", Weight: 9}
	for _, c := range []struct {
		name      string
		build     func(w world)
		scheduler string
		weight    int
	}{
		{"the network's", func(w world) { w.told(web, vipOn(net1, webVIP)) }, "rr", 1},
		{"the spec's", func(w world) {
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: sh}
			w.Services[web] = s
		}, "sh", 9},
		{"a task's scheduler does not count beside the spec", func(w world) {
			w.told(web, vipOn(net1, webVIP))
			e := w.Endpoints["e5"]
			e.Options = model.ServiceOptions{Scheduler: "sh"}
			w.Endpoints["e5"] = e
		}, "rr", 1},
		{"the smallest ready task's", func(w world) {
			w.there("e1", web, webVIP, "10.255.0.9", func(r *model.Remote) { r.Task.Ready, r.Options.Scheduler = false, "wrr" })
			w.there("e2", web, webVIP, "10.255.0.8", func(r *model.Remote) { r.Options = sh })
		}, "sh", 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			w.here("e5", web, webVIP, "10.255.0.3")
			c.build(w)
			x := service.Virtuals(w.View)[0]
			if x.Scheduler != c.scheduler || x.Backends[0].Weight != c.weight {
				t.Errorf("scheduler %q weight %d, want %q %d", x.Scheduler, x.Backends[0].Weight, c.scheduler, c.weight)
			}
		})
	}
}
