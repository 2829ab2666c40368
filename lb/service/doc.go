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
// A backend takes part when its task is ready, nobody has told it to leave, and
// its node has read back that its namespace translates this VIP. A leaving
// backend keeps its established connections (Alive) until its endpoint goes.
//
// The package is pure. Be aware: which scheduler a kernel can do is the
// adapter's to say; the plan names what was asked for.
package service
