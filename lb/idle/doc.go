// Package idle ends connections to services that have been silent for longer than
// the service allows (sluice.idle-timeout), on the node of the task that serves
// them.
//
//	view ──▶ Targets: task, address, limit ──▶ due? ──▶ Accepted ──▶ Over ──▶ End
//	              pure                         timer    the kernel   pure   the kernel
//
// What balances a connection, IPVS or nftables, remembers it on the client's node,
// for one time that holds for all services of a network; a shorter one of a service
// cannot be said there. So the connection itself is ended, where the task is:
// both sides are told, and what is remembered of it anywhere is of no use
// any more.
//
// It is level-triggered: each look asks the kernel what is there. Nothing is
// remembered of connections, so a restart forgets nothing.
//
// # Limits
//
//   - Be aware: TCP only. UDP has no connection that could be ended: what is
//     remembered of silent UDP expires on the client's node, and the next packet is
//     balanced as a new one.
//   - The limit holds for all connections that clients have opened to the task's
//     address on the service's network, also for those to that address itself: the
//     task's kernel sees no difference.
//   - A connection is ended late by a tenth of the limit, and by 30 s at most; see
//     period.
package idle
