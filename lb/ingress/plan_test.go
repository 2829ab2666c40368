package ingress_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/ingress"
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
		Entries:   map[model.NetworkID]map[model.NodeID]model.Entry{},
		Labels:    map[model.NodeID]map[string]string{"node1": {"zone": "a"}},
		Taken:     map[model.HostPort]string{},
	}}
	w.network(net1, "10.255.0.0/20", "10.255.0.1")
	w.entry(net1, "node1", "10.255.15.1", 1, "192.168.0.1")
	w.entry(net1, "node2", "10.255.15.2", 2, "192.168.0.2")
	return w
}

func (w world) network(id model.NetworkID, subnet, gateway string) {
	w.Networks[id] = model.Network{
		ID: id, Subnet: netip.MustParsePrefix(subnet), Gateway: addr(gateway), VNI: 7, MTU: 1450,
		Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "rr"},
	}
	w.Entries[id] = map[model.NodeID]model.Entry{}
}

func (w world) mode(id model.NetworkID, mode string) {
	n := w.Networks[id]
	n.Options.Mode = mode
	w.Networks[id] = n
}

func (w world) entry(id model.NetworkID, node model.NodeID, ip string, number uint16, vtep string) {
	w.Entries[id][node] = model.Entry{Addr: addr(ip), Number: number, VTEP: addr(vtep)}
}

// publish records a service as a manager tells it.
func (w world) publish(id model.ServiceID, n model.NetworkID, vip netip.Addr, o model.ServiceOptions) {
	s, told := w.Services[id]
	if !told {
		s = model.Service{
			ID: id, Name: string(id), Created: time.Unix(1000, 0),
			VIPs: map[model.NetworkID]netip.Addr{}, Options: map[model.NetworkID]model.ServiceOptions{},
		}
	}
	if vip.IsValid() {
		s.VIPs[n] = vip
	}
	s.Options[n] = o
	w.Services[id] = s
}

// here adds a ready task of this node, which edit may change.
func (w world) here(id model.EndpointID, s model.ServiceID, n model.NetworkID, vip netip.Addr, ip string, edit ...func(*model.Endpoint)) {
	e := model.Endpoint{
		ID: id, Network: n, Addr: addr(ip), MAC: model.MACFor(addr(ip)), Phase: model.Taken,
		Sandbox: "/run/docker/netns/" + string(id),
		Task:    model.Task{ID: model.TaskID("task-" + id), Service: s, ServiceName: string(s), VIP: vip, Ready: true}, Prepared: vip, Meshed: true,
	}
	for _, f := range edit {
		f(&e)
	}
	w.Endpoints[id] = e
}

// there adds a ready task of another node.
func (w world) there(id model.EndpointID, s model.ServiceID, n model.NetworkID, vip netip.Addr, ip string, edit ...func(*model.Remote)) {
	r := model.Remote{
		ID: id, Network: n, Node: "node2", VTEP: addr("192.168.0.2"), Addr: addr(ip), MAC: model.MACFor(addr(ip)),
		Task: model.Task{ID: model.TaskID("task-" + id), Service: s, ServiceName: string(s), VIP: vip, Ready: true}, Prepared: vip, Meshed: true,
	}
	for _, f := range edit {
		f(&r)
	}
	w.Remotes[id] = r
}

// planned is the mesh, and what is balanced.
func planned(v model.View) kernel.State {
	s := kernel.State{}
	service.Plan(v, ingress.Balanced(v), s)
	ingress.Plan(v, s)
	for k := range s {
		if _, is := k.(kernel.Sysctl); is && k.Netns() != "" {
			delete(s, k) // as in all networks
		}
	}
	return s
}

// cases are views that plans are known of.
var cases = []struct {
	name string
	edit func(*world)
}{
	{"nothing-published", func(w *world) {
		clear(w.Entries)
		w.publish(web, net1, webVIP, model.ServiceOptions{})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"an-entry-with-tasks", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "81:80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
		w.there("e2", web, net1, webVIP, "10.255.0.4")
	}},
	// Neither VIP nor alias needs what the other does. The VIP's ports are of the VIP.
	{"named-ports-and-mode-nat", func(w *world) {
		w.mode(net1, "nat")
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "81:8080/tcp", Ports: "80:8080/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
		w.there("e2", web, net1, webVIP, "10.255.0.4")
	}},
	{"mode-tun", func(w *world) {
		w.mode(net1, "tun")
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.there("e2", web, net1, webVIP, "10.255.0.4", func(r *model.Remote) { r.Tunnel = true })
	}},
	{"in-transit", func(w *world) {
		n := w.Networks[net1]
		n.Transit = true
		w.Networks[net1] = n
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.there("e2", web, net1, webVIP, "10.255.0.4")
		w.there("e3", web, net1, webVIP, "10.255.0.5", func(r *model.Remote) { r.Task.Leaving = true })
	}},
	// Other nodes have the ports: answers must find them.
	{"published-elsewhere", func(w *world) {
		delete(w.Entries[net1], "node1")
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp", Nodes: "zone=b"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"zero-replicas", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.publish(db, net1, netip.Addr{}, model.ServiceOptions{Published: "81/tcp"})
	}},
	// A VIP serves what is prepared, an alias what is meshed.
	{"being-prepared", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Meshed = false })
		w.there("e2", web, net1, webVIP, "10.255.0.4", func(r *model.Remote) { r.Prepared = netip.Addr{} })
	}},
	{"not-taken-yet", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Phase, e.Meshed = model.Joined, false })
		w.here("e2", web, net1, webVIP, "10.255.0.4", func(e *model.Endpoint) { e.Sandbox, e.Meshed = "", false })
	}},
	{"udp-and-filters", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{
			Published: "53:1053/udp;80/tcp", Bind: "192.0.2.1;192.0.2.2", Allow: "192.0.2.0/24;203.0.113.7/32", Nodes: "zone=a",
		})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"masquerade", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "53/udp;5000-5002:6000-6002/tcp", Source: model.Masquerade})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"dnsrr", func(w *world) {
		w.publish(web, net1, netip.Addr{}, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, netip.Addr{}, "10.255.0.3")
		w.there("e2", web, net1, netip.Addr{}, "10.255.0.4")
	}},
	// The other has its alias all the same, and open connections.
	{"ports-that-are-lost", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80-82/tcp"})
		w.publish(db, net1, dbVIP, model.ServiceOptions{Published: "80/tcp"})
		s := w.Services[db]
		s.Created = s.Created.Add(-time.Second)
		w.Services[db] = s
		w.Taken[model.HostPort{Proto: model.TCP, Port: 81}] = "nginx (pid 7)"
	}},
	// What has not been tried may be a process's: its port is not led anywhere.
	{"ports-that-were-not-tried", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80-82/tcp"})
		w.Tried = []model.HostRange{{Proto: model.TCP, Lo: 81, Hi: 82}}
	}},
	// One object for what stays in one piece and keeps its numbers, at all addresses.
	{"ranges", func(w *world) {
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "8000-8999/tcp;8000-8999/udp;9000-9002:9001-9003/tcp;65534-65535/sctp"})
		w.publish(db, net1, dbVIP, model.ServiceOptions{Published: "8500/tcp;7000-7001/tcp", Bind: "192.0.2.1"})
		s := w.Services[db]
		s.Created = s.Created.Add(-time.Second)
		w.Services[db] = s
		w.Taken[model.HostPort{Proto: model.TCP, Port: 8001}] = "nginx (pid 7)"
		w.Taken[model.HostPort{Proto: model.UDP, Port: 8999}] = "named (pid 8)"
	}},
	// The smaller id has it. Until this node has another, its ports lead nowhere.
	{"a-claim-that-does-not-hold", func(w *world) {
		w.entry(net1, "node0", "10.255.15.1", 9, "192.168.0.9")
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	// With one subnet; one network of a task has what UDP needs.
	{"a-task-on-two-networks", func(w *world) {
		w.network(net2, "10.255.0.0/20", "10.255.0.1")
		w.entry(net2, "node1", "10.255.15.1", 3, "192.168.0.1")
		same := func(e *model.Endpoint) { e.Sandbox = "/run/docker/netns/e1" }
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "53/udp"})
		w.publish(web, net2, webVIP, model.ServiceOptions{Published: "54/udp"})
		w.here("e1", web, net1, webVIP, "10.255.0.4", same)
		w.here("e2", web, net2, webVIP, "10.255.0.3", same)
		w.here("e3", web, net2, webVIP, "10.255.0.4", same) // as good as none
	}},
	// The task has no other way out: what a server sends that is bound to no address.
	{"an-internal-network", func(w *world) {
		n := w.Networks[net1]
		n.Internal = true
		w.Networks[net1] = n
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "53/udp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"no-manager-has-told", func(w *world) {
		w.here("e1", web, net1, webVIP, "10.255.0.3", func(e *model.Endpoint) { e.Options.Published = "80/tcp" })
	}},
	{"another-pool", func(w *world) {
		w.Self.MeshPool = netip.MustParsePrefix("100.0.0.0/8")
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"a-kernel-without", func(w *world) {
		w.Self.NoMesh = true
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
	{"a-local-network", func(w *world) {
		n := w.Networks[net1]
		n.Local = true
		w.Networks[net1] = n
		w.publish(web, net1, webVIP, model.ServiceOptions{Published: "80/tcp"})
		w.here("e1", web, net1, webVIP, "10.255.0.3")
	}},
}

func TestPlans(t *testing.T) {
	for _, c := range cases {
		for prefix, datapath := range map[string]string{"": service.NFT, "ipvs-": service.IPVS} {
			t.Run(prefix+c.name, func(t *testing.T) {
				w := newWorld()
				w.Self.Datapath = datapath
				c.edit(&w)
				w.View.Self.Datapath = datapath
				text := planned(w.View).Text()
				golden.Check(t, prefix+c.name, text)
				for range 8 { // maps are walked in another order each time
					if again := planned(w.View).Text(); again != text {
						t.Fatalf("and then:\n%s", cmp.Diff(text, again))
					}
				}
			})
		}
	}
}
