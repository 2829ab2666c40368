// Package linux reads and changes the kernel of one host for sluice: it turns
// kernel.Op into netlink messages, mounts, sysctl writes and iptables calls, and
// what it finds back into a kernel.State.
//
//	        the host's namespace                     namespace sluice-<id>
//	┌───────────────────────────────┐   ┌─────────────────────────────────────────┐
//	│ INPUT ─▶ SLUICE-VXLAN         │   │  addresses, neighbours                  │
//	│           ACCEPT peer VTEPs   │   │        │                                │
//	│           DROP                │   │      bridge ──── vxlan (FDB: MAC─▶VTEP) │
//	│   UDP socket of the VXLAN ════╪═══╪════════╪═══════════╝                    │
//	│ slc… container's end ─────────╪───╪─── veth (host end)                      │
//	│   (until the engine takes it) │   │        nftables: Tables (VIPs)          │
//	└───────────────────────────────┘   └─────────────────────────────────────────┘
//
// In a task's namespace there are nftables (Tables) and, for packets that IPVS sends
// in others, a tunnel for each of the task's addresses (tunnel.go).
//
// A network that published ports lead into has a pair besides, of which the host keeps
// its end, and a task behind such a port a rule and a table of routes (taskroute.go):
//
//	the host's namespace                          namespace sluice-<id>
//	FORWARD ─▶ DOCKER-USER, then SLUICE-MESH: ACCEPT
//	ip sluice-mesh (Tables)                       default route, local routes of aliases
//	slm… ── address, route of the aliases ─── veth ─── mesh0, quiet port of the bridge
//
// What is ours, and nothing else is reported or changed:
//
//   - namespaces under Config.NetnsDir whose name starts with Config.NetnsPrefix;
//   - devices in them whose ifalias starts with "sluice ", and what is on those;
//   - the chains SLUICE-VXLAN and SLUICE-MESH, and the jumps to them;
//   - the host's end of a network, by Config.MeshPrefix and our ifalias, and what is on it;
//   - routes by devices of ours, and rules and routes in a task's namespace, that are
//     marked with protocol 115;
//   - a container's end in the host's namespace that carries our prefix and our
//     ifalias while none of our namespaces has its other end (an orphan);
//   - devices of kind ipip in a task's namespace, called slt and their address in
//     hexadecimal, whose ifalias starts with "sluice ";
//   - sysctls that this process has set: the kernel keeps no mark of who wrote
//     one, so after a restart each is written once more.
//
// How faults show in a dump, so that a difference is never hidden: a device that
// is down is reported without MTU (it carries no packet of any size); a
// forwarding entry of which one half is missing is reported with the zero
// address as VTEP; a filter chain with foreign, doubled or misplaced rules, or
// without its jump, is reported with port 0, that of the mesh without devices; a
// tunnel that lacks anything is not reported; a pair whose end on the host is down or
// has another MTU is reported as one that is not kept; a task's routes of which one is
// missing are reported with the zero value.
//
// Be aware: the MAC of a kernel.LinkSpec belongs to bridges only (the kernel
// chooses the others), addresses are IPv4, and deleting a sysctl forgets it but
// restores nothing. The jump is put first in INPUT when it is made; it is not
// moved back if another program later puts a rule above it, because two programs
// that both insist on the first place never rest.
package linux
