// Package kerneltest holds the fake kernel and the contract that every kernel
// must keep, the fake and the real one alike.
//
//	Contract ─── drives ───▶ Kernel (Dump, Apply)
//	   │                        │
//	   └─── World: what others do to the same kernel:
//	        delete, flush, reorder, take a device away
//
// The fake is strict about order and existence, as the kernel is: a veth pair
// needs its namespace and its bridge, a forwarding entry its VXLAN device, a slot
// its VIP; a VNI is given once. On request it fails by a seed: an op is refused,
// or done and reported as failed, the rest of a round is lost, a dump is
// interrupted.
//
// Be aware: the fake has no packets, and each change of it is at once complete.
// What the kernel destroys late (the devices of a namespace) only the real one shows.
package kerneltest
