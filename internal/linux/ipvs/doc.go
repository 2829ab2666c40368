// Package ipvs is the half of the datapath for virtual IPs that balances with the
// kernel's ip_vs: it makes IPVS services and destinations of the objects of a
// kernel.State, and objects of what IPVS has. The other half, the marks, is of
// nftables: see sluice/internal/linux/nft.
//
//	client ─veth─▶ br0 ─▶ the namespace's stack, as the frame is for the bridge's MAC
//	                        │ prerouting  table ip sluice: VIP → mark
//	                        │ input       IPVS: mark → service → scheduler → backend
//	                        │ output      table ip sluice: no mark
//	                        ▼
//	                       br0 ─▶ veth ─▶ task            local backend, by its own MAC
//	                        └───▶ vxlan0 ═▶ ... ─▶ task   remote one
//
// Forwarding is per destination:
//
//   - dr, direct routing: the packet keeps its addresses and gets the backend's
//     MAC, and the task's namespace translates the VIP to its own address, as on the
//     other datapath. The answer goes straight to the client, so IPVS sees one
//     direction of a connection only, and knows how to go by that.
//   - tun: the packet, as it is, goes in another IP packet to the backend's address.
//     A device in the task's namespace takes it out (kernel.TaskTunnel); from there
//     on it is dr.
//   - nat: the packet gets the backend's address, and its port if IPVSDest has one.
//     The answer has to come back here: see kernel.LiftTable.
//
// A service stands for what its Mark is for: one port, all of UDP, or all else that is
// for the VIP, TCP, UDP and SCTP alike. Where one service has TCP and UDP, a flow of UDP
// stays with a backend until that is gone; so they are apart wherever that is not to
// be: see package lb/service. Echo requests to a VIP are answered by the
// namespace itself.
//
// # What the library leaves out
//
// github.com/moby/ipvs changes IPVS, and reads it for Dump. Of its gaps, these are
// closed here:
//
//   - It looks for IPVS once in the life of a process, after modprobe, and fails
//     from then on if that was too early: nothing is asked of it before the family
//     is there (Balancer.look), which loads the module by itself.
//   - It waits for ever for an answer: its socket is closed after sessionTimeout.
//   - A handle serves one goroutine: each call has its own.
//   - Its counters have 32 bits: Traffic has a request of its own for those of 64.
//
// And these do not matter:
//
//   - It sends no address family of a destination: the kernel then takes the
//     service's, and here both are IPv4. IPv6 services are nobody's here.
//   - It sends no tunnel type and port: without, the kernel takes IPIP.
//   - It overlooks that a dump was interrupted. IPVS does not say so either (Linux
//     up to 7.2): its lists are read by position, and one that is changed meanwhile
//     may lack an entry. Only sluice changes IPVS in its namespaces, not while it
//     dumps. Traffic would see the sign, and reads again.
//   - It knows neither backup daemons nor the resetting of counters: nobody asks.
//
// # Limits
//
//   - Be aware: IPv4 only, and only services by mark. Others are somebody else's and
//     are left alone.
//   - The library reads the first two octets of a weight of four: on a big-endian
//     machine every weight would read back as 0.
//   - Each Mark is a service of its own: persistence, thresholds and what schedulers
//     count are of one named port, not of its VIP, and of one client where that has a
//     service for itself. Schedulers that go by open connections count those of TCP and
//     the flows of UDP apart. On the other datapath a client is kept over all ports.
//   - With nat, a client's port that was used to the VIP cannot be used to the same
//     backend itself while the connection is remembered: answers get the VIP's
//     address. That is 10 s after RST, 120 s after both sides' FIN, whatever
//     IPVSTimeouts says (tcp_timeouts in net/netfilter/ipvs/ip_vs_proto_tcp.c).
//   - Nothing bounds how many connections are remembered: struct ip_vs_conn has 296
//     octets, and its slab gives it 320 (Linux 7.2, 64 bits). That version brought
//     net.ipv4.vs.conn_max, by default 2^30, which nobody sets here.
//   - IPVS has no transactions. Every operation is one, and a packet may come
//     between two; Diff orders them so that it finds nothing half-made.
//   - If the module is loaded, but the command modprobe is not there, the library
//     says so once, in a line of its own on standard error.
package ipvs
