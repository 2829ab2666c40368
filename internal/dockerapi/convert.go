package dockerapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/swarm"

	"sluice/internal/model"
	"sluice/internal/options"
)

// This file turns bodies of the engine into plain values. All of it is pure, and
// all of it takes any bytes.

// Labels that swarm puts on a task's container.
const (
	labelService     = "com.docker.swarm.service.id"
	labelServiceName = "com.docker.swarm.service.name"
	labelTask        = "com.docker.swarm.task.id"
)

// address reads 10.0.0.2 and 10.0.0.2/24; anything else is invalid.
func address(s string) netip.Addr {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Addr().Unmap()
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return a.Unmap()
	}
	return netip.Addr{}
}

type info struct {
	hostName, version string
	dataRoot          string
	node              model.NodeID
	addr              netip.Addr
	managers          []netip.Addr
	active, manager   bool
	none              bool // in no swarm: not locked, pending or in error either
}

// parseInfo reads GET /info.
func parseInfo(body []byte) (info, error) {
	var in struct {
		Name          string
		ServerVersion string
		DockerRootDir string
		Swarm         struct {
			NodeID           model.NodeID
			NodeAddr         string
			LocalNodeState   swarm.LocalNodeState
			ControlAvailable bool
			RemoteManagers   []swarm.Peer
		}
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return info{}, fmt.Errorf("decode info: %w", err)
	}
	if in.Swarm.LocalNodeState == "" {
		return info{}, errors.New("decode info: it says nothing of a swarm, not even that there is none")
	}
	out := info{
		hostName: in.Name,
		version:  in.ServerVersion,
		dataRoot: in.DockerRootDir,
		node:     in.Swarm.NodeID,
		addr:     address(in.Swarm.NodeAddr),
		active:   in.Swarm.LocalNodeState == swarm.LocalNodeStateActive,
		none:     in.Swarm.LocalNodeState == swarm.LocalNodeStateInactive,
		manager:  in.Swarm.ControlAvailable,
	}
	for _, p := range in.Swarm.RemoteManagers {
		if a, err := netip.ParseAddrPort(p.Addr); err == nil && !a.Addr().IsUnspecified() {
			out.managers = append(out.managers, a.Addr().Unmap())
		}
	}
	if out.manager && out.addr.IsValid() {
		out.managers = append(out.managers, out.addr)
	}
	slices.SortFunc(out.managers, netip.Addr.Compare)
	out.managers = slices.Compact(out.managers)
	return out, nil
}

// parseContainers reads GET /containers/json: the endpoints of running
// containers, on networks of any driver.
func parseContainers(body []byte) (map[model.EndpointID]model.EngineEndpoint, error) {
	var list []container.Summary
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("decode containers: %w", err)
	}
	out := make(map[model.EndpointID]model.EngineEndpoint, len(list))
	for _, c := range list {
		if c.NetworkSettings == nil {
			continue
		}
		for _, n := range c.NetworkSettings.Networks {
			if n == nil || n.EndpointID == "" {
				continue // attached by name, not by an endpoint (yet)
			}
			e := model.EngineEndpoint{
				Network:   model.NetworkID(n.NetworkID),
				Addr:      address(n.IPAddress),
				Container: c.ID,
				Task: model.Task{
					ID:          model.TaskID(c.Labels[labelTask]),
					Service:     model.ServiceID(c.Labels[labelService]),
					ServiceName: c.Labels[labelServiceName],
					Ready:       ready(string(c.State), c.Status),
				},
			}
			if len(c.Names) > 0 {
				e.Name = strings.TrimPrefix(c.Names[0], "/")
			}
			if mac, err := model.ParseMAC(n.MacAddress); err == nil {
				e.MAC = mac
			}
			out[model.EndpointID(n.EndpointID)] = e
		}
	}
	return out, nil
}

// ready says whether a container serves: it runs, is not paused, and is healthy
// where it has a health check. status is what `docker ps` shows, which is the
// only place of the list that tells health: "Up 5 minutes (healthy)",
// "(unhealthy)", "(health: starting)"; without a health check nothing is in
// brackets, or "(none)" where the image's was switched off.
func ready(state, status string) bool {
	if state != "running" || !strings.HasPrefix(status, "Up ") {
		return false
	}
	open := strings.LastIndexByte(status, '(')
	if open < 0 {
		return true
	}
	switch strings.TrimSuffix(status[open+1:], ")") {
	case "healthy", "none":
		return true
	}
	return false // starting, unhealthy, Paused, and whatever a later engine may invent
}

// parseNetworks reads GET /networks: those of the driver, and the names of those
// that the swarm's leader has not allocated, which have no driver yet.
func parseNetworks(body []byte, driver string) (out map[model.NetworkID]model.EngineNetwork, waiting map[model.NetworkID]string, err error) {
	var list []network.Inspect
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, nil, fmt.Errorf("decode networks: %w", err)
	}
	out = make(map[model.NetworkID]model.EngineNetwork)
	waiting = make(map[model.NetworkID]string)
	for _, n := range list {
		if n.Driver == "" && n.Scope == "swarm" && n.ID != "" {
			waiting[model.NetworkID(n.ID)] = n.Name
		}
		if n.Driver != driver || n.ID == "" {
			continue
		}
		e := model.EngineNetwork{
			ID:       model.NetworkID(n.ID),
			Name:     n.Name,
			Swarm:    n.Scope == "swarm",
			Internal: n.Internal,
			IPAM:     n.IPAM.Driver,
			Options:  maps.Clone(n.Options),
		}
		for _, c := range n.IPAM.Config {
			if p, err := netip.ParsePrefix(c.Subnet); err == nil {
				e.Subnet, e.Gateway = p.Masked(), address(c.Gateway)
				if r, err := netip.ParsePrefix(c.IPRange); err == nil {
					e.Range = r.Masked()
				}
				break // sluice's networks have one
			}
		}
		out[e.ID] = e
	}
	return out, waiting, nil
}

// gossip is what verbose inspection tells of a network: the engines' own gossip.
type gossip struct {
	peers    []netip.Addr
	services map[string]model.EngineService
}

// parseGossip reads GET /networks/{id}?verbose=true.
func parseGossip(body []byte) (gossip, error) {
	var n network.Inspect
	if err := json.Unmarshal(body, &n); err != nil {
		return gossip{}, fmt.Errorf("decode network: %w", err)
	}
	var out gossip
	for _, p := range n.Peers {
		if a := address(p.IP); a.IsValid() {
			out.peers = append(out.peers, a)
		}
	}
	slices.SortFunc(out.peers, netip.Addr.Compare)
	out.peers = slices.Compact(out.peers)
	for name, s := range n.Services {
		if name == "" {
			continue // containers that belong to no service
		}
		e := model.EngineService{VIP: address(s.VIP)} // "" and "<nil>" for endpoint mode dnsrr
		for _, t := range s.Tasks {
			if a := address(t.EndpointIP); a.IsValid() && t.EndpointID != "" {
				if e.Tasks == nil {
					e.Tasks = make(map[model.EndpointID]netip.Addr, len(s.Tasks))
				}
				e.Tasks[model.EndpointID(t.EndpointID)] = a
			}
		}
		if out.services == nil {
			out.services = make(map[string]model.EngineService, len(n.Services))
		}
		out.services[name] = e
	}
	return out, nil
}

// parseServices reads GET /services. The second result names options that were
// not understood, by service.
func parseServices(body []byte) (map[model.ServiceID]model.Service, error, error) {
	var list []swarm.Service
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, nil, fmt.Errorf("decode services: %w", err)
	}
	var refused []error
	out := make(map[model.ServiceID]model.Service, len(list))
	for _, s := range list {
		m := model.Service{
			ID:      model.ServiceID(s.ID),
			Name:    s.Spec.Name,
			Created: s.CreatedAt,
			VIPs:    make(map[model.NetworkID]netip.Addr, len(s.Endpoint.VirtualIPs)),
			Options: make(map[model.NetworkID]model.ServiceOptions),
		}
		for _, v := range s.Endpoint.VirtualIPs {
			if v.Addr == "" {
				continue // a network of one node only gives its services none
			}
			a := address(v.Addr)
			if !a.IsValid() {
				return nil, nil, fmt.Errorf("decode services: service %s has virtual IP %q", s.ID, v.Addr)
			}
			m.VIPs[model.NetworkID(v.NetworkID)] = a
		}
		nets := s.Spec.TaskTemplate.Networks
		if len(nets) == 0 {
			nets = s.Spec.Networks //nolint:staticcheck // where clients put them before API 1.25; services live longer
		}
		for _, n := range nets {
			o, err := options.Service(n.DriverOpts)
			if err != nil {
				refused = append(refused, fmt.Errorf("service %s: %w", s.Spec.Name, err))
			}
			m.Options[model.NetworkID(n.Target)] = o
		}
		out[m.ID] = m
	}
	return out, errors.Join(refused...), nil
}

// tasks is what the swarm's tasks come to.
type tasks struct {
	leaving []model.TaskID                     // sorted
	live    map[model.NetworkID][]model.Holder // of addresses that swarm's allocator holds
}

// The order of a task's states, as swarm numbers them.
var rank = map[swarm.TaskState]int{
	swarm.TaskStateNew: 0, swarm.TaskStateAllocated: 1, swarm.TaskStatePending: 1, swarm.TaskStateAssigned: 2,
	swarm.TaskStateAccepted: 3, swarm.TaskStatePreparing: 4, swarm.TaskStateReady: 5, swarm.TaskStateStarting: 6,
	swarm.TaskStateRunning:  rankRunning,
	swarm.TaskStateComplete: 8, swarm.TaskStateShutdown: 9, swarm.TaskStateFailed: 10, swarm.TaskStateRejected: 11,
	swarm.TaskStateRemove: 12, swarm.TaskStateOrphaned: 13,
}

const rankRunning = 7

// beyond says whether a state is later than running; a state that is not known
// is not.
func beyond(s swarm.TaskState) bool { return rank[s] > rankRunning }

// parseTasks reads GET /tasks, of all runtimes.
//
// A task is leaving while it may still run and is wanted otherwise; "complete" is
// what a job's task is wanted to be from its start. Its addresses are free once
// it is neither wanted nor observed up to running, which is swarm's own rule.
func parseTasks(body []byte) (tasks, error) {
	var list []swarm.Task
	if err := json.Unmarshal(body, &list); err != nil {
		return tasks{}, fmt.Errorf("decode tasks: %w", err)
	}
	out := tasks{live: make(map[model.NetworkID][]model.Holder)}
	for _, t := range list {
		wanted := !beyond(t.DesiredState)
		over := beyond(t.Status.State)
		if !wanted && !over && t.DesiredState != swarm.TaskStateComplete {
			out.leaving = append(out.leaving, model.TaskID(t.ID))
		}
		if !wanted && over {
			continue
		}
		for _, n := range t.NetworksAttachments {
			for _, s := range n.Addresses {
				a := address(s)
				if !a.IsValid() {
					return tasks{}, fmt.Errorf("decode tasks: task %s has address %q", t.ID, s)
				}
				h := model.Holder{
					Addr: a, Kind: model.HolderTask, ID: t.ID,
					Service: model.ServiceID(t.ServiceID), Slot: t.Slot, Node: model.NodeID(t.NodeID),
				}
				if t.Spec.NetworkAttachmentSpec != nil {
					h.Container = t.Spec.NetworkAttachmentSpec.ContainerID
				}
				id := model.NetworkID(n.Network.ID)
				out.live[id] = append(out.live[id], h)
			}
		}
	}
	slices.Sort(out.leaving)
	return out, nil
}

// nodes is what the swarm's nodes come to.
type nodes struct {
	all    map[model.NodeID]model.EngineNode
	leader model.NodeID // empty while there is none
}

// parseNodes reads GET /nodes.
func parseNodes(body []byte) (nodes, error) {
	var list []swarm.Node
	if err := json.Unmarshal(body, &list); err != nil {
		return nodes{}, fmt.Errorf("decode nodes: %w", err)
	}
	out := nodes{all: make(map[model.NodeID]model.EngineNode, len(list))}
	for _, n := range list {
		id := model.NodeID(n.ID)
		out.all[id] = model.EngineNode{
			Name: n.Description.Hostname,
			Addr: address(n.Status.Addr),
			Down: n.Status.State == swarm.NodeStateDown,
			// What is not told is active, as for the engine itself.
			Drained: n.Spec.Availability == swarm.NodeAvailabilityPause || n.Spec.Availability == swarm.NodeAvailabilityDrain,

			Labels: n.Spec.Labels,
		}
		if n.ManagerStatus != nil && n.ManagerStatus.Leader {
			out.leader = id
		}
	}
	return out, nil
}

// parseSandbox reads GET /containers/{id}/json: the path of the container's
// network namespace on the host.
func parseSandbox(body []byte) (string, error) {
	var c struct{ NetworkSettings struct{ SandboxKey string } }
	if err := json.Unmarshal(body, &c); err != nil {
		return "", fmt.Errorf("decode container: %w", err)
	}
	return c.NetworkSettings.SandboxKey, nil
}

// parsePlugin reads GET /plugins/{id}/json: the plugin's name, with its tag.
func parsePlugin(body []byte) (string, error) {
	var p struct{ Name string }
	if err := json.Unmarshal(body, &p); err != nil {
		return "", fmt.Errorf("decode plugin: %w", err)
	}
	if p.Name == "" {
		return "", errors.New("decode plugin: it has no name")
	}
	return p.Name, nil
}
