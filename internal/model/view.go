package model

import (
	"net/netip"
	"time"
)

// View is all that a plan needs to know, at one revision. It is made by
// internal/view, never changed after that, and shared between goroutines.
type View struct {
	Revision uint64    // grows with every change of any source
	Now      time.Time // when the view was made; plans read no clock
	Self     Self
	// Partial says that something may be missing: this process has started with
	// no records and is still being told. What is absent may not be taken for
	// gone, so nothing that is there is changed or removed.
	Partial bool

	Networks  map[NetworkID]Network   // that exist on this node
	Endpoints map[EndpointID]Endpoint // of this node
	Remotes   map[EndpointID]Remote   // of other nodes, on any network
	Services  map[ServiceID]Service   // of the swarm, also with zero replicas

	// Fresh are the endpoints that have become ready within their service's SlowStart,
	// and since when this process has known that.
	Fresh map[EndpointID]time.Time

	// Published are the networks on which a service publishes ports, here or not, as
	// the leading manager tells them.
	Published map[NetworkID]Network
	// Labels are those that published services ask for, of the nodes that the leading
	// manager knows. Of a node that is not among them nothing has been told.
	Labels map[NodeID]map[string]string
	// Entries are the nodes at which published ports lead into a network, this one
	// included, by what they have claimed there.
	Entries map[NetworkID]map[NodeID]Entry
	// Taken are the published ports of this node that could not be had, with the
	// process that has each, for people.
	Taken map[HostPort]string
	// Tried are the published ports of this node that it has tried to hold: who has
	// one of them is known, by Taken. What is published and not among them may be a
	// process's. Nil: nobody tries, and all count.
	Tried []HostRange
	// Drained: the swarm has this node paused or drained, as the leading manager tells
	// it. Plans do not heed it: what is published goes on being served.
	Drained bool
}

// Entry is what a node has of a network for the ports that are published there:
// an address in the network, and a number that makes a block of addresses out of
// the mesh's pool. Nodes claim both for themselves; two may have taken one.
type Entry struct {
	Addr   netip.Addr // of the part of the subnet that is kept for nodes
	Number uint16     // 1..4095
	VTEP   netip.Addr // of the node
}

// Self is this node.
type Self struct {
	Node      NodeID
	VTEP      netip.Addr // source of our VXLAN packets: the engine's data-path address
	VXLANPort uint16     // UDP destination port of VXLAN, the same on all nodes
	Datapath  string     // the best that this node's kernel has for VIPs: ipvs or nft; empty means nft
	// MeshPool is where the addresses are from by which published ports are told
	// apart, the same on all nodes; invalid: ingress.DefaultPool.
	MeshPool netip.Prefix
	NoMesh   bool // its kernel lacks what published ports need: it has none, nor have its tasks
}

// Network is a network that exists on this node.
type Network struct {
	ID       NetworkID
	Name     string // for people; empty until the engine has told it
	Subnet   netip.Prefix
	Gateway  netip.Addr
	Local    bool // of this engine only: no VXLAN, no peers
	Internal bool
	VNI      VNI // 0 if Local
	MTU      int // of the overlay, in bytes
	Options  NetworkOptions
	// Transit: the engine has not asked for it here. It is here for published ports.
	Transit bool `json:",omitzero"`
}

// NetworkOptions are the values of `docker network create -o sluice.…`.
type NetworkOptions struct {
	Datapath  string // auto, ipvs, nft
	Mode      string // dr, nat, tun
	Scheduler string // a scheduler of ip_vs, by its name there
}

// Phase is how far the engine has brought an endpoint.
type Phase int

const (
	// Created: CreateEndpoint was answered. Nothing is in the kernel yet.
	Created Phase = iota
	// Joined: Join was asked for. The veth pair must exist, its container end
	// still in the host's namespace, where the engine fetches it.
	Joined
	// Taken: the engine has moved the container's end into the task's
	// namespace. The pair is no longer ours to make: if it is gone, so is the task.
	Taken
)

// String is the phase's name.
func (p Phase) String() string {
	switch p {
	case Created:
		return "created"
	case Joined:
		return "joined"
	case Taken:
		return "taken"
	}
	return "unknown"
}

// Endpoint is an attachment of one of this node's containers to a network.
type Endpoint struct {
	ID      EndpointID
	Network NetworkID
	Addr    netip.Addr
	MAC     MAC
	Phase   Phase
	Sandbox string // path of the task's network namespace as this process sees it
	Options ServiceOptions
	Left    bool // Leave was asked for: no new connections, the pair stays until DeleteEndpoint

	Task     Task       // zero for a container that is no swarm task
	Prepared netip.Addr // the VIP that the task's namespace translates, read back; invalid: none
	Tunnel   bool       // the task's namespace takes IPIP packets to Addr, read back
	Meshed   bool       `json:",omitzero"` // it takes connections from entries and answers by them, read back
	// Leaves is when this node first heard that a manager wants the task gone; zero:
	// it has not.
	Leaves time.Time `json:",omitzero"`
}

// ServiceOptions are the values of `--network name=N,driver-opt=sluice.…`. In
// records, what is not set is left out.
type ServiceOptions struct {
	Scheduler string `json:",omitzero"` // empty: the network's
	Mode      string `json:",omitzero"` // empty: the network's
	Weight    int    `json:",omitzero"` // 1..255; 0 means not set, which is 1
	Ports     Ports  `json:",omitzero"` // that the VIP has; empty: all

	// Persist is for how many seconds a client's next connection goes where its
	// last one went; 0: each is chosen for itself. PersistBits is the length of the
	// prefix of addresses that are one client, 1..32, and 0 if Persist is.
	Persist     int `json:",omitzero"`
	PersistBits int `json:",omitzero"`
	// OnePacket balances each UDP packet by itself.
	OnePacket bool `json:",omitzero"`
	// Upper and Lower are numbers of connections of one task, as each client's node
	// counts them: none come beyond Upper, until there are fewer than Lower. 0: no limit.
	Upper int `json:",omitzero"`
	Lower int `json:",omitzero"`
	// Idle is for how many seconds a connection may be silent; 0: the default.
	Idle int `json:",omitzero"`
	// Drain is for how many seconds the connections of a leaving task go on; 0: as
	// long as the task.
	Drain int `json:",omitzero"`
	// SlowStart is over how many seconds a task that has become ready gets up to its
	// share; 0: it has it at once.
	SlowStart int `json:",omitzero"`

	// Published are the ports of nodes that lead to the service's tasks. The four
	// below are empty if it is.
	Published Published `json:",omitzero"`
	Bind      Addrs     `json:",omitzero"` // of the nodes, at which they do; empty: all
	Nodes     Labels    `json:",omitzero"` // of the nodes that have them; empty: all
	Allow     Prefixes  `json:",omitzero"` // of the clients; empty: all
	Source    Source    `json:",omitzero"` // as whose a task sees a connection to them
}

// Task is what the engine says of the swarm task behind an endpoint.
type Task struct {
	ID          TaskID
	Service     ServiceID
	ServiceName string
	VIP         netip.Addr // on the endpoint's network, as the local engine tells it; invalid if it does not
	Ready       bool       // running, and healthy where it has a health check
	Leaving     bool       // a manager wants it gone: no new connections
}

// Remote is an endpoint of another node, as that node's gossip record says.
type Remote struct {
	ID       EndpointID
	Network  NetworkID
	Node     NodeID
	VTEP     netip.Addr
	Addr     netip.Addr
	MAC      MAC
	Options  ServiceOptions
	Task     Task
	Prepared netip.Addr // the VIP that the task's namespace translates; invalid: none
	Tunnel   bool       // the task's namespace takes IPIP packets to Addr
	Meshed   bool       // it takes connections from entries and answers by them
	// Lost: the swarm takes its node for lost, and it is out of contact, too.
	Lost bool
}

// Service is a swarm service, as a manager told it.
type Service struct {
	ID      ServiceID
	Name    string
	Created time.Time
	VIPs    map[NetworkID]netip.Addr     // none for endpoint mode dnsrr
	Options map[NetworkID]ServiceOptions // the spec's driver options
}
