// Package overlay plans the layer-2 part of a host: for each network a
// namespace with a bridge, a VXLAN device to the other nodes, a veth pair for
// each container, and static entries for every remote endpoint.
//
//	task netns            network's netns "sluice-<id>"            other node
//	┌───────┐  veth   ┌──────────────────────────────────┐
//	│ eth0 ─┼─────────┼─ slv…  ┐                         │
//	└───────┘         │        ├─ br0 ── vxlan0 ═════════╪══▶ VTEP:port ══▶ vxlan0 ── br0 ── …
//	┌───────┐         │        │  gateway/20, VIPs/32    │
//	│ eth0 ─┼─────────┼─ slv…  ┘                         │
//	└───────┘         └──────────────────────────────────┘
//
// Nothing is learned and nothing is flooded over VXLAN: who is where comes from
// gossip, as an FDB entry (MAC → VTEP) and a neighbour entry (IP → MAC) from
// which the bridge answers ARP on the spot. The gateway's and the virtual IPs'
// addresses are local on every node, so ARP for them never crosses the VXLAN.
//
// The VXLAN device is made in the host's namespace, where its UDP socket stays,
// and then moved.
//
// The package is pure. Be aware: it plans what is sluice's only; the
// container's end of a veth pair belongs to the engine once it has taken it.
package overlay
