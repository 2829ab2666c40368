// Package pool decides which addresses are given to whom: subnets, sub-pools,
// leases, the networks that own them, and what Swarm's replays do to all that.
//
// Every decision is a value. A Plan method reads a Table and returns a Change;
// the caller makes the Change durable and only then calls Apply, which cannot
// fail. Reading a journal back is Apply as well, so the state after a restart
// is the state before it by construction:
//
//	request ──▶ Table.Plan… ──▶ Change ──▶ journal (ipam) ──▶ Table.Apply
//	                                          │
//	                    restart ──▶ Restore ◀─┘
//
// A subnet of the swarm, 10.255.0.0/20 as the example:
//
//	10.255.0.0                                                  10.255.15.255
//	├─┬──────────────────────────────────────────────┬──────────────────────┤
//	│0│ .0.1 gateway, then next-fit ─▶ cursor ─▶ wrap │ .15.0/24 kept for    │
//	│ │ (inside --ip-range if there is one)           │ nodes, top 1/16      │
//	└─┴──────────────────────────────────────────────┴──────────────────────┘
//
// Next-fit instead of lowest-free, for addresses and for subnets alike: Swarm
// gives an address back while its container is still stopping on another node
// (engine 20.10 to 28.5), so a freed address has to rest before it is reused.
//
// A Table works in one of two modes. Replayed is for the address space of
// Swarm's allocator: it says everything again at each change of leader and at
// each start of a manager, without releasing anything first, and a request
// names no network. So the same pool, and once the same address, are accepted again,
// nothing is counted that a replay could count twice, and Bind tells later to
// which network a pool belongs. Exclusive is for the networks of one engine:
// every request is new, and a pool or an address in use is refused.
//
// The lists of the managers say who has an address. PlanConfirm compares the leases
// with them, finds those that nobody has, and Accounts tells of all.
//
// Be aware: IPv4 only, subnets from /8 to /30. A Table is not safe for
// concurrent use; package ipam holds the lock. Nothing here reads a clock, the
// host or the disk: times are given.
package pool
