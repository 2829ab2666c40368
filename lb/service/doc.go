// Package service plans the virtual IPs: from services and endpoints to the
// balancer of each network on this node and the translation in each of its
// tasks.
//
//	client task ── frame to VIP ──▶ network's netns of the client's node
//	                                  VIP → scheduler → slot → MAC of a backend
//	                                  (the frame keeps its addresses)
//	               ── by layer 2, local port or VXLAN ──▶ backend task's netns
//	                                  VIP → its own address (TaskVIP)
//	client task ◀── reply from VIP, straight back, by layer 2 ──┘
//
// The client's node chooses, the backend's own namespace translates; so the
// backend sees the client's own address, and no node is on the way back.
//
// # Modes
//
//	dr   as in the picture
//	tun  the same, but IPVS puts the packet into another (IPIP), to the task's own
//	     address; a device in the task's namespace takes it out (TaskTunnel). A node
//	     without IPVS, and a task without the device, do with dr.
//	nat  the packet gets the backend's address and port, and nothing is asked of the
//	     task's namespace. The answer comes back to the client's node, which gives
//	     it the VIP: IPVS in the namespace's stack (LiftTable), or nftables in the
//	     bridge (Real).
//
// Published ports lead to an alias of a service, not to its VIP: see Alias and
// lb/ingress. In all modes, those packets go as in dr.
//
// # Backends
//
// A backend takes part when its task is ready, nobody has told it to leave, and,
// unless the mode is nat, its node has read back that its namespace translates
// this VIP; of published ports, that it has what those need (Meshed). A leaving backend keeps its established connections (Alive, weight 0)
// until its endpoint goes.
//
// The package is pure. Be aware: which scheduler a kernel can do is the
// adapter's to say; the plan names what was asked for, but on a node that has
// nftables only, see Scheduler.
package service
