package model

import (
	"net/netip"
	"time"
)

// EngineSnapshot is what the local Docker engine tells, read in the background.
// It is immutable. Each part has a flag that says whether it was ever read and
// is still believed; a part that is not valid is as it was last, or empty, and
// its emptiness is evidence of nothing.
type EngineSnapshot struct {
	Alias    string // the plugin's own name, like sluice:latest; empty until known
	HostName string
	Version  string // of the engine
	DataRoot string // the engine's data directory, as its own process sees it

	// Swarm, from GET /info.
	SwarmValid bool
	SwarmAt    time.Time // when it was asked for
	Active     bool      // the node is part of a swarm, and at work in it
	NoSwarm    bool      // the node is part of none; one that is locked, pending or in error is neither
	Node       NodeID
	NodeAddr   netip.Addr
	Managers   []netip.Addr // of all managers the engine knows, this node included if it is one
	Manager    bool
	Leader     bool
	LeaderAt   time.Time // when a manager was asked which node leads, as Leader has it; zero if not Leader
	// Follows is when a manager was asked which node leads, if that is another; zero if
	// it is not known to be. It is no later than the answer: this one may lead since.
	Follows time.Time

	// Containers, from GET /containers/json.
	ContainersValid bool
	ContainersAt    time.Time                     // when the listing was asked for
	Containers      map[EndpointID]EngineEndpoint // endpoints on networks of our driver

	// Networks of our driver that the engine lists, from GET /networks. A manager
	// lists all of the swarm, a worker those in use on it.
	NetworksValid bool
	// Unallocated are the names of swarm networks that the leader could not
	// allocate, or has not yet: the engine does not tell whose they are to be.
	Unallocated map[NetworkID]string
	Networks    map[NetworkID]EngineNetwork

	// The leading manager's word, from GET /services, /tasks and /nodes.
	ServicesValid bool
	ServicesAt    time.Time // when they were asked for: what was given out later may be missing in Live
	Services      map[ServiceID]Service
	Leaving       []TaskID                   // desired state beyond running, observed not yet
	Live          map[NetworkID][]netip.Addr // addresses in use: gateways, VIPs, live tasks
	Holders       map[NetworkID][]Holder     // who has those of Live, in their order
	Nodes         map[NodeID]EngineNode      // of the swarm
}

// EngineEndpoint is a container's attachment, as the engine lists it.
type EngineEndpoint struct {
	Network   NetworkID
	Addr      netip.Addr
	MAC       MAC
	Container string // id
	Name      string // of the container
	Sandbox   string // the host's path of its network namespace; empty if not asked yet
	Task      Task   // with VIP by verbose inspect; Ready as docker ps shows it
}

// EngineNetwork is a network as the engine lists it.
type EngineNetwork struct {
	ID       NetworkID
	Name     string
	Swarm    bool // scope swarm
	Internal bool
	Subnet   netip.Prefix
	Gateway  netip.Addr
	Range    netip.Prefix // of the addresses that are given unasked; zero: all of Subnet
	IPAM     string       // the driver of its addresses, which need not be ours
	Options  map[string]string
	Peers    []netip.Addr // gossip addresses of the nodes that have it, by verbose inspect

	// Services by name, by verbose inspect: the engines' own gossip, which workers
	// have too. A task is in it from when it is ready until it has stopped.
	Services map[string]EngineService
}

// EngineService is what the engines' gossip says of a service on one network.
type EngineService struct {
	VIP   netip.Addr // invalid for endpoint mode dnsrr
	Tasks map[EndpointID]netip.Addr
}

// EngineNode is a node of the swarm.
type EngineNode struct {
	Name string
	Addr netip.Addr
	Down bool
	// Drained: its availability is pause or drain.
	Drained bool
	// Labels are those that people gave it (docker node update --label-add).
	Labels map[string]string
}

// Holder is who has an address of a network.
type Holder struct {
	Addr netip.Addr
	Kind HolderKind
	ID   string // of the service, of the task; of an endpoint's task, if it has one

	Service   ServiceID // of a task
	Slot      int       // of a task; 0 for one of a global service
	Node      NodeID    // of a task or endpoint; empty: not placed yet
	Container string    // id, of a task that is a container which somebody attached
}

// HolderKind is what a Holder is.
type HolderKind string

// Kinds of holders.
const (
	HolderGateway  HolderKind = "gateway"
	HolderService  HolderKind = "service" // the address is its virtual IP
	HolderTask     HolderKind = "task"
	HolderEndpoint HolderKind = "endpoint" // of a container, by its node's word
)
