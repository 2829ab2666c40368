// Package ipam answers Docker's IPAM requests: which subnet, which address. What
// to answer is decided by ipam/pool; this package holds the lock, tells the two
// address spaces apart and writes each decision to a journal before it answers.
//
//	Swarm's allocator (leader) ── sluice-global ──▶ table, journalled: it decides
//	libnetwork on each node   ── sluice-local  ──▶ says yes to what was decided
//	Bind, Free (AllocateNetwork, FreeNetwork) ───▶ which network a pool belongs to
//	Confirm (background reader of the managers) ─▶ which leases are still true
//
// A node asks once more, in the local space, for every subnet and address that
// the leader has given out; on the leader itself both questions come to the same
// process. So the local space of a plugin with Scope=global remembers nothing:
// the PoolID says all there is to know, and a node that was killed and starts
// over asks for addresses that any memory would still hold.
//
// With Scope=local there is no leader. The local space is the real allocator
// then, and refuses what is in use; the global space is refused as a whole.
//
// A request is one decision, at most one commit, then the change in memory. A
// commit that fails leaves everything as it was and fails the request. There is
// no other I/O in any verb: a verb that waits stops the allocation of the whole
// cluster.
//
// Be aware: pools are never freed by counting. The engine repeats requests at
// each change of leader and releases nothing before, so a count would only rise.
// A network's pool goes with Free, or with ReleasePool while it has no owner.
// IPv4 only; one subnet per network.
package ipam
