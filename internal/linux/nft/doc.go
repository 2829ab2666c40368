// Package nft is the data path for virtual IPs that needs nothing but nftables:
// it turns the VIP objects of a kernel.State into tables, and tables back into
// objects.
//
// Two tables work together. In the namespace of a network, table bridge sluice
// chooses a backend for each connection and writes its Ethernet address into the
// frame; the IP packet stays as it is. In the namespace of a task, table ip
// sluice translates the VIP to the task's own address. The answer comes with the
// VIP as its source, straight to the client, and needs no table. What a tunnel of the
// task's (kernel.TaskTunnel) has taken out of other packets, and is for no VIP of the
// task's, is dropped there.
//
//	client ─veth─▶ br0 ─────────────────────▶ veth ─▶ task       local backend
//	                │  bridge sluice:                  ip sluice:
//	                │  MAC of the backend              VIP → own address
//	                └────▶ vxlan0 ═▶ vxlan0 ─▶ br0 ─▶ veth ─▶ task  remote one
//
// Frames that come from the uplink were balanced by the node that sent them.
//
// # How table bridge sluice decides
//
//	prerouting  IPv4, to a VIP, not from the uplink
//	 └▶ vip     ─▶ fragment   later ones follow the first by their id (frags)
//	     └▶ balance   ─▶ named-port  a VIP with named ports: one of them? go on : refuse
//	         ├▶ tcp-packet    in tcp-flows ──▶ tcp-open     alive? go on : tcp-lost
//	         │                SYN          ──▶ tcp-new      choose, remember
//	         │                in tcp-closing ▶ tcp-closing  alive? go on : refuse
//	         │                else         ──▶ refuse
//	         ├▶ udp-packet    one-packet   ──▶ choose
//	         │                in udp-flows ──▶ udp-known    alive, stays? go on : udp-new
//	         │                else         ──▶ udp-new      choose, remember
//	         ├▶ icmp-packet   echo: next slot; error: to the backend that it is about
//	         └▶ rest-packet   as UDP, by client, VIP and protocol
//	choose      ─▶ vip-10.255.0.100   one chain for each VIP: the number of the next slot,
//	            │                     or the backend of a known client (persist)
//	            slots: VIP . number ─▶ MAC
//	            ─▶ self  the client picked itself: the next, or a known other
//	refuse      to the bridge's own MAC; the namespace's stack has the VIP as an
//	            address without a socket: RST, port unreachable
//
// A flow is client, VIP and both ports. It keeps its backend as long as that is
// alive: while it is ready, and while it leaves. When it is not alive any more,
// TCP connections are reset. UDP chooses again with its next datagram, and does so
// already when its backend leaves (AliveSpec.Drains): nothing tells when a question
// has had its answer, and the next one need not wait until nobody is there. The
// client's FIN moves its connection to tcp-closing, so a port that is used again
// gets a new choice. Echo requests are not remembered: each goes to the next in
// turn, which makes ping show a backend that does not answer.
//
// If a map is full, new TCP connections are reset, because their next segment
// would not find its backend, and closing ones may be; every UDP datagram chooses
// for itself, which a question and its answer survive.
//
// # Ports, persistence, one packet, counts
//
// A VIP with named ports serves only those; the stack refuses the rest, and what was
// open to a port that has gone, at the client's next packet. A task translates a
// port of the VIP to its own before it translates the VIP.
//
// A VIP that keeps its clients remembers the backend of each, or of each prefix of
// addresses, over all ports and protocols. The time begins anew with each
// connection. LVS besides keeps a client as long as a connection of it is open; here
// one that has been open for longer than that time does not count, and the client's
// next may go to another backend. A backend that takes nothing new
// (AliveSpec.Drains) loses its clients at once. A member whose prefix is kept by
// the member itself gets its known other.
//
// With one-packet, each UDP datagram chooses and nothing is remembered.
//
// The chain of a VIP counts the connections that began, one-packet's datagrams each;
// see Traffic. A change of the VIP reads the number and hands it to the new rule.
//
// # Packets with the backend's address
//
// For a VIP that asks for it (VIPSpec.NAT), the namespace of the task needs no
// table: a second chain, right behind the first, writes the address of the backend
// that was chosen, and its port, and the VIP's into the answers. It remembers a
// flow by what answers show: backend, client and both ports. See nat.go.
//
//	client ─▶ br0: choose, then VIP → backend ─▶ … ─▶ task
//	client ◀─ br0: backend → VIP ◀───────────── … ◀─ task
//
// # Beside IPVS
//
// Where the kernel's ip_vs balances, a network's namespace has table ip sluice
// instead, which marks packets to VIPs for it, see markRuleset and
// sluice/internal/linux/ipvs. The tasks' tables are the same. Where IPVS gives
// packets the backend's address, table bridge sluice-lift takes the answers out of
// the bridge for it, see liftRuleset.
//
// # The source guard
//
// Before all of these, table bridge sluice-guard drops what comes in by a container's
// port and is not the container's: see guardRuleset.
//
// # The routing mesh
//
// Published ports of the host lead to an alias of a VIP, which is a VIP as any other
// to the balancer of the network, of whichever kind. Three tables are besides:
//
//	client ─▶ host   ip sluice-mesh     port → alias . the task's port       meshRuleset
//	           └▶ slm…/mesh0 ─▶ br0: the balancer chooses ─▶ task
//	                             ip sluice, in the task   alias → own address  taskmesh.go
//	client ◀─ host ◀─ mesh0 ◀─ br0 ◀─ bridge sluice-back ◀─ task             backRuleset
//	                                   alias → MAC of the node that it belongs to
//
// A port is one element of a map, and so is a range of them that tasks have under the
// same numbers (ranges.go): a thousand cost what one does. A block of
// aliases belongs to one node: of two nodes that the same client port comes by, each
// has its own alias, and the task's conntrack can tell them apart.
//
// # How it is changed
//
// Apply makes one transaction: packets meet the state before or the state after. It
// makes two where ranges of published ports change, see ranges.go: packets meet what
// was and what will be in between.
// It returns when the kernel has also freed what was deleted, one RCU grace
// period later (4 to 16 ms at 250 Hz); packets do not wait for that. At 1,000
// services of 10 backends, all from nothing takes 70 ms, and one backend more or
// less takes effect after 0.6 ms. A chain for each VIP, which an exact round
// robin needs, is affordable because these chains look nothing up, see pickRules.
//
// Every rule carries a comment with its purpose and a fingerprint of its
// expressions. Dump compares them, and reads the elements, so whatever somebody
// changes by hand shows. A repair keeps the maps: connections outlive it.
//
// # Limits
//
//   - Be aware: IPv4 only, and no VLAN tags.
//   - A connection that is silent for three hours, or what BridgeTableSpec.Open
//     says, is forgotten, and reset when it speaks again. TCP keepalive with Linux's
//     defaults, 2 h, prevents that. Of a half-closed one, the same is true after 60 s.
//   - The first two datagrams of a UDP flow, if two CPUs handle them at the same
//     moment, may go to two backends; all others follow the first.
//   - A later fragment that overtakes the first of its datagram goes to the stack,
//     and the datagram is lost. Linux sends the first one first.
//   - ICMP errors find their backend if the packet that they quote has no IP
//     options; without a flow they end in the namespace's stack.
//   - ICMP errors about datagrams of one-packet VIPs end in the namespace's stack.
//   - A dump that is made while a map with thousands of new elements still grows may
//     miss some, about once in a hundred times: they are put in again.
//   - One chain and counter serve all ports of a VIP, and each node counts for its
//     own clients.
//   - With the backend's address, two connections of one client port are one to the
//     backend if they are to the VIP and to the backend itself, or to two ports of
//     the VIP that lead to one: the last that is opened goes on. Datagrams from one
//     client port to two such ports of a VIP are all answered from the first.
//   - SCTP gets the backend's address, but never another port: its checksum is
//     one that kernels before 5.15 cannot mend.
//   - Published ports: UDP is for one network of a task, as TaskMeshSpec says. A
//     container of this host is known by its bridge's name (docker…, br- and 12 more); one behind
//     another is seen with its own address. Other tables of a task that drop or
//     translate 250.0.0.0/8 come in between. A range of ports is an element for each
//     port if it is published at single addresses, or under other numbers than tasks have.
//   - A datagram's flow that is older than the publication of its port, or than its
//     end, goes on as it was while it lasts: conntrack knows it, and whoever publishes
//     has to delete it there (sluice/internal/linux does).
//   - In a task, conntrack gives a connection to the VIP that has the same client
//     port as one to the task itself another port in the server's eyes.
package nft
