package plan_test

import (
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/lb/service"
)

// swarm is a view of one network with services of as many tasks each, on ten
// nodes of which this is the first.
func swarm(services, tasks int) model.View {
	const network model.NetworkID = "netbig000000000000000000a"
	const nodes = 10
	v := model.View{
		Self: model.Self{Node: "node0", VTEP: vtep(0), VXLANPort: 4799},
		Networks: map[model.NetworkID]model.Network{network: {
			ID: network, Subnet: netip.MustParsePrefix("10.0.0.0/8"), Gateway: netip.MustParseAddr("10.0.0.1"),
			VNI: 1<<20 + 1, MTU: 1450, Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "rr"},
		}},
		Endpoints: make(map[model.EndpointID]model.Endpoint),
		Remotes:   make(map[model.EndpointID]model.Remote),
		Services:  make(map[model.ServiceID]model.Service),
	}
	for s := range services {
		id := model.ServiceID(fmt.Sprintf("service%018d", s))
		vip := netip.AddrFrom4([4]byte{10, 200, byte(s >> 8), byte(s)})
		v.Services[id] = model.Service{ID: id, Name: fmt.Sprintf("web-%d", s), VIPs: map[model.NetworkID]netip.Addr{network: vip}}
		for i := range tasks {
			n := s*tasks + i
			eid := model.EndpointID(fmt.Sprintf("%064x", uint64(n+1)*0x9e3779b97f4a7c15))
			eid = eid[48:] + eid[:48] // the first digits differ, as those of real ids do
			addr := netip.AddrFrom4([4]byte{10, byte(1 + n>>16), byte(n >> 8), byte(n)})
			task := model.Task{ID: model.TaskID(fmt.Sprintf("task%021d", n)), Service: id, ServiceName: v.Services[id].Name, VIP: vip, Ready: true}
			if node := n % nodes; node > 0 {
				v.Remotes[eid] = model.Remote{
					ID: eid, Network: network, Node: model.NodeID(fmt.Sprintf("node%d", node)), VTEP: vtep(node),
					Addr: addr, MAC: model.MACFor(addr), Task: task, Prepared: vip,
				}
				continue
			}
			v.Endpoints[eid] = model.Endpoint{
				ID: eid, Network: network, Addr: addr, MAC: model.MACFor(addr), Phase: model.Taken,
				Sandbox: "/run/docker/netns/" + string(eid[:12]), Task: task, Prepared: vip,
			}
		}
	}
	return v
}

func vtep(node int) netip.Addr { return netip.AddrFrom4([4]byte{192, 168, 0, byte(1 + node)}) }

// BenchmarkHost plans 1,000 services of 10 tasks on 10 nodes.
func BenchmarkHost(b *testing.B) {
	v := swarm(1000, 10)
	b.ReportMetric(float64(len(plan.Host(v))), "objects")
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		plan.Host(v)
	}
}

// BenchmarkHostWithIPVS is the same on a node that has ip_vs, where each backend of
// the node itself has a service of its own.
func BenchmarkHostWithIPVS(b *testing.B) {
	v := swarm(1000, 10)
	v.Self.Datapath = service.IPVS
	b.ReportMetric(float64(len(plan.Host(v))), "objects")
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		plan.Host(v)
	}
}

// withPorts has each service of a swarm publish a port, on a hundred nodes.
func withPorts(v model.View) model.View {
	for network := range v.Networks {
		port := 10000
		for id, s := range v.Services {
			s.Options = map[model.NetworkID]model.ServiceOptions{network: {Published: model.Published(fmt.Sprintf("%d:80/tcp", port))}}
			v.Services[id] = s
			port++
		}
		v.Entries = map[model.NetworkID]map[model.NodeID]model.Entry{network: {}}
		for n := range 100 {
			v.Entries[network][model.NodeID(fmt.Sprintf("node%d", n))] = model.Entry{
				Addr: netip.AddrFrom4([4]byte{10, 255, 0, byte(1 + n)}), Number: uint16(1 + n), VTEP: vtep(n),
			}
		}
	}
	for id, e := range v.Endpoints {
		e.Meshed = true
		v.Endpoints[id] = e
	}
	for id, r := range v.Remotes {
		r.Meshed = true
		v.Remotes[id] = r
	}
	return v
}

// BenchmarkHostWithPorts is BenchmarkHost with a published port of each service.
func BenchmarkHostWithPorts(b *testing.B) {
	v := withPorts(swarm(1000, 10))
	b.ReportMetric(float64(len(plan.Host(v))), "objects")
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		plan.Host(v)
	}
}

// BenchmarkHostWithPortsAndIPVS is that on a node that has ip_vs.
func BenchmarkHostWithPortsAndIPVS(b *testing.B) {
	v := withPorts(swarm(1000, 10))
	v.Self.Datapath = service.IPVS
	b.ReportMetric(float64(len(plan.Host(v))), "objects")
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		plan.Host(v)
	}
}

// BenchmarkDiff finds the one backend that is no longer ready.
func BenchmarkDiff(b *testing.B) {
	v := swarm(1000, 10)
	have := plan.Host(v)
	for id, r := range v.Remotes {
		r.Task.Ready = false
		v.Remotes[id] = r
		break
	}
	want := plan.Host(v)
	b.ReportMetric(float64(len(kernel.Diff(have, want))), "ops")
	b.ReportAllocs()
	defer processorTime(b)()
	for b.Loop() {
		kernel.Diff(have, want)
	}
}

// processorTime reports what the loop costs this process, garbage collection
// included: on a busy machine the wall clock tells of the others.
func processorTime(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric((used()-before).Seconds()*1e3/float64(b.N), "cpu-ms/op") }
}
