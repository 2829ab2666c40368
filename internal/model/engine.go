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
	Active     bool // the node is part of a swarm, and at work in it
	NoSwarm    bool // the node is part of none; one that is locked, pending or in error is neither
	Node       NodeID
	NodeAddr   netip.Addr
	Managers   []netip.Addr // of all managers the engine knows, this node included if it is one
	Manager    bool
	Leader     bool

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
