// Package expiry ends connections to services that have had all the time that their
// service gives them, on the node of the task that serves them: those that have been
// silent for longer than it allows (sluice.idle-timeout), and those of a task that has
// been leaving for longer than it allows (sluice.drain).
//
//	view ──▶ Targets: task, address, limits ──▶ due? ──▶ Accepted ──▶ Over ──▶ End
//	              pure                          timer    the kernel   pure   the kernel
//
// What balances a connection, IPVS or nftables, remembers it on the client's node,
// for one time that holds for all services of a network; a shorter one of a service
// cannot be said there. So the connection itself is ended, where the task is:
// both sides are told, and what is remembered of it anywhere is of no use
// any more.
//
// It is level-triggered: each look asks the kernel what is there. Nothing is
// remembered of connections, so a restart forgets nothing; since when a task leaves is
// in the node's durable record of it.
//
// # Limits
//
//   - Be aware: TCP only. UDP has no connection that could be ended: what is
//     remembered of silent UDP expires on the client's node, and the next packet is
//     balanced as a new one.
//   - The limits hold for all connections that clients have opened to the task's
//     address on the service's network, also for those to that address itself: the
//     task's kernel sees no difference.
//   - A silent connection is ended late by a tenth of the limit, and by 30 s at most;
//     see period. One of a leaving task is ended late by a second at most: news of the
//     view are looked at once a second.
//   - Since when a task leaves is told by the wall clock, as it has to outlive this
//     process: a clock that is set meanwhile moves the end.
//   - A server that listens no more on a port that the kernel also gives to connections
//     of a task's own (net.ipv4.ip_local_port_range, 32768 and up by default) keeps
//     them until it ends; see sluice/internal/linux/sockets.
package expiry
