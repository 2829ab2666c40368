// Package ingress decides what published ports come to on this node: who has
// each port, which networks the node must be part of, and which addresses its
// connections have there. It plans the way of those to tasks and back.
//
//	client ── port 81 ──▶ this node ── alias of the service ──▶ network's netns ──▶ a task
//	                      Own          Claims, Aliases          Transit
//
//	         subnet 10.255.0.0/20                 pool 250.0.0.0/8
//	├──────────────────────────┬────────┤   ├────┬─────┬─────┬──────────┤
//	│ containers, virtual IPs  │ nodes  │   │ -  │ 1   │ 2   │ … 4095   │ blocks of /20
//	└──────────────────────────┴───┬────┘   └────┴──┬──┴─────┴──────────┘
//	            Entry.Addr ────────┘                └── Entry.Number; in it, an
//	                                                    address for each service
//
// A node that published ports lead into a network by is an entry of that network.
// It claims an address there, from the part that the pool keeps for nodes, and a
// number, which makes a block of addresses. What goes to an address of its block
// is for a service, and what comes from one is an answer that goes back to it.
// Blocks are of no network, so that networks with equal subnets can be told apart
// on the host: therefore the number is unique among the entries of a network, and
// among the networks of a node.
//
// Nobody gives claims out: each node takes what it does not see taken, from a
// place that follows from its id, so that few meet; of two that took the same,
// the one with the smaller id keeps it, and the other takes something else.
//
// Of the services that publish a port on a node, the oldest has it: by time of
// creation, then by id. What is decided is decided on every node by itself, and is
// the same on all but for processes of the node that have a port. Those do not
// decide between services: a younger service does not get the port of an older
// one for as long as a process has it, or it would change hands twice.
//
// Plan makes kernel objects of it:
//
//	client ─▶ MeshPort, MeshRange ─▶ slm… ║ mesh0 ─▶ br0: alias ─▶ task: TaskMesh
//	                                Host  ║   every node of the network
//	client ◀─ conntrack ◀─────────── slm… ║ mesh0 ◀─ br0: Back ◀─ [vxlan0] ◀─ TaskRoute
//
// The alias is balanced by lb/service, to which Balanced tells it, as a virtual IP
// is, but always by layer 2. Nobody has its address: the whole block is the
// namespace's own, so that what no service takes is refused at once. How frames get
// to the other entries' addresses, and that those are let in, is driver/overlay's.
//
// A range of ports that tasks have under the same numbers is one object, MeshRange,
// and one element in the kernel, however long it is. What a process or an older service
// has of it makes it two. It is an object for each port, MeshPort, where tasks have it
// under other numbers (81-90:8081-8090), where the service has it at single addresses
// (sluice.publish.bind), and where it is one port long: see internal/linux/nft for why.
//
// Tasks of internal networks answer too, and are led nowhere else: TaskRouteSpec.Last.
//
// The package is pure. Be aware: subnets smaller than a /24 keep nothing for
// nodes, and so cannot have published ports; a /24 has room for 15 entries.
package ingress
