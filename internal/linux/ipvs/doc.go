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
// Forwarding is direct routing (dr): the packet keeps its addresses and gets the
// backend's MAC, and the task's namespace translates the VIP to its own address,
// as on the other datapath. The answer goes straight to the client, so IPVS sees
// one direction of a connection only, and knows how to go by that.
//
// A service stands for all ports of a VIP, for TCP, UDP and SCTP alike. Echo
// requests to a VIP are answered by the namespace itself.
//
// # Limits
//
//   - Be aware: IPv4 only, and only services by mark. Others, and destinations
//     with a port, are somebody else's and are left alone.
//   - IPVS has no transactions. Every operation is one, and a packet may come
//     between two; Diff orders them so that it finds nothing half-made.
//   - IPVS does not say that a dump was interrupted. It is whole if nobody else
//     changes IPVS in sluice's namespaces meanwhile.
//   - If the module is loaded, but the command modprobe is not there, the library
//     says so once, in a line of its own on standard error.
package ipvs
