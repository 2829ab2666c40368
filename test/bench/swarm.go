package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"sluice/internal/model"
	"sluice/internal/view"
)

// The swarm of all goals: so many services, of so many tasks each, on one
// network and on so many nodes.
const (
	services = 1000
	tasks    = 10
	nodes    = 10
)

const (
	vxlanPort  = 4799
	gossipPort = 7947
	networkID  = "netbench00000000000000000a"
)

var (
	subnet  = netip.MustParsePrefix("10.240.0.0/16")
	gateway = netip.MustParseAddr("10.240.0.1")
	// underlay is TEST-NET-1 (RFC 5737): no real network has it. This node is .1,
	// the others are .11 and following.
	underlay = netip.MustParsePrefix("192.0.2.0/24")
	self     = netip.MustParseAddr("192.0.2.1")
)

func overlayNetwork() model.Network {
	return model.Network{
		ID: networkID, Subnet: subnet, Gateway: gateway, VNI: 1<<20 + 1, MTU: 1450,
		Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "rr"},
	}
}

// Of the subnet, 10.240.1.0 and following are containers without a service,
// 10.240.16.0 and following VIPs, 10.240.32.0 and following tasks.
func containerAddr(i int) netip.Addr { return offset(1<<8 + i) }
func vip(service int) netip.Addr     { return offset(16<<8 + service) }
func taskAddr(n int) netip.Addr      { return offset(32<<8 + n) }

func offset(n int) netip.Addr {
	b := subnet.Addr().As4()
	return netip.AddrFrom4([4]byte{b[0], b[1], byte(n >> 8), byte(n)})
}

func serviceID(s int) model.ServiceID { return model.ServiceID(fmt.Sprintf("service%018d", s)) }

// endpointID is 64 digits of which the first differ, as those of real ids do.
func endpointID(n int) model.EndpointID {
	h := fmt.Sprintf("%016x", uint64(n+1)*0x9e3779b97f4a7c15) // 2^64 divided by the golden ratio
	return model.EndpointID(h + fmt.Sprintf("%048x", n))
}

// task is the n-th task's endpoint as its own node has it, ready and prepared.
func task(n int) model.Endpoint {
	s := n / tasks
	id := endpointID(n)
	return model.Endpoint{
		ID: id, Network: networkID, Addr: taskAddr(n), MAC: model.MACFor(taskAddr(n)), Phase: model.Taken,
		Sandbox: "/run/docker/netns/" + id.Short(), Prepared: vip(s),
		Task: model.Task{
			ID: model.TaskID(fmt.Sprintf("task%021d", n)), Service: serviceID(s), ServiceName: fmt.Sprintf("web-%d", s),
			VIP: vip(s), Ready: true,
		},
	}
}

// amnesia is a journal for what need not last.
type amnesia struct{}

func (amnesia) Commit(context.Context, []model.Record, []model.RecordKey) error { return nil }

// member is a node of the swarm with every nth task of it, beginning with the
// node's own number. Node 0 leads, and tells of the services.
func member(ctx context.Context, node, of int, addr netip.Addr) (*view.Hub, error) {
	h, err := view.New(view.Config{Journal: amnesia{}, Now: time.Now, VXLANPort: vxlanPort, Log: slog.New(slog.DiscardHandler)}, nil)
	if err != nil {
		return nil, err
	}
	if _, err := h.PutNetwork(ctx, overlayNetwork()); err != nil {
		return nil, err
	}
	for n := node; n < services*tasks; n += of {
		if _, err := h.PutEndpoint(ctx, task(n)); err != nil {
			return nil, err
		}
	}
	name := model.NodeID(fmt.Sprintf("node%021d", node))
	e := model.EngineSnapshot{HostName: string(name), SwarmValid: true, Active: true, Node: name, NodeAddr: addr}
	if node == 0 {
		e.Manager, e.Leader, e.ServicesValid = true, true, true
		e.Services = make(map[model.ServiceID]model.Service, services)
		for s := range services {
			e.Services[serviceID(s)] = model.Service{
				ID: serviceID(s), Name: fmt.Sprintf("web-%d", s), Created: time.Unix(1000, 0),
				VIPs: map[model.NetworkID]netip.Addr{networkID: vip(s)},
			}
		}
	}
	return h, h.SetEngine(ctx, e)
}

// swarm is the view of node 0, which has a tenth of all tasks.
func swarm(ctx context.Context) (model.View, error) {
	hub, err := member(ctx, 0, nodes, self)
	if err != nil {
		return model.View{}, err
	}
	var tables []view.Table
	for i := 1; i < nodes; i++ {
		h, err := member(ctx, i, nodes, peerAddr(i))
		if err != nil {
			return model.View{}, err
		}
		tables = append(tables, view.Table{Owner: h.Self().Node, Present: true, Whole: true, Entries: h.Records()})
	}
	if err := hub.SetTables(ctx, tables); err != nil {
		return model.View{}, err
	}
	return hub.View(), nil
}

func peerAddr(i int) netip.Addr {
	b := underlay.Addr().As4()
	return netip.AddrFrom4([4]byte{b[0], b[1], b[2], byte(11 + i)})
}
