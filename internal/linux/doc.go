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
// What is ours, and nothing else is reported or changed:
//
//   - namespaces under Config.NetnsDir whose name starts with Config.NetnsPrefix;
//   - devices in them whose ifalias starts with "sluice ", and what is on those;
//   - the chain SLUICE-VXLAN and the jumps to it;
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
// without its jump, is reported with port 0; a tunnel that lacks anything is not
// reported.
//
// Be aware: the MAC of a kernel.LinkSpec belongs to bridges only (the kernel
// chooses the others), addresses are IPv4, and deleting a sysctl forgets it but
// restores nothing. The jump is put first in INPUT when it is made; it is not
// moved back if another program later puts a rule above it, because two programs
// that both insist on the first place never rest.
package linux
