// Package keyshare brings the gossip key to a node that no network has brought it
// to: a manager gives it, to whoever proves to be a node of its swarm.
//
//	node without a key                       manager
//	Ask ── TLS 1.3 ── GET /v1/keys ────────▶ Server
//	  its own certificate of the swarm         its own certificate of the swarm
//	  the other: same swarm, a manager         the other: same swarm, a node that
//	                                           the manager lists at this moment
//	    ◀── 200 {"keys":["…"]} ─────────────── it has keys
//	    ◀── 204, after a minute ────────────── it still has none
//
// Both sides prove themselves with what swarm gave each node when it joined (see
// swarmkit, ca): a key, a certificate with the node's id as CN, the role as OU and
// as name (swarm-manager, swarm-worker), and the swarm's id as O, and the roots.
// Files finds them by the engine itself: who listens on its socket, and what that
// process sees below its data directory. They are read anew, as swarm renews them.
//
// A manager without keys lets those who ask wait, so that nodes without a network
// neither poll nor learn late.
//
// # Limits
//
//   - Be aware: a certificate is good until it ends, three months as a rule, and swarm
//     has no list of revoked ones. A removed node is refused because the manager does
//     not list it. A manager that was demoted can pose as one until then, to nodes that
//     still have its address.
//   - In an autolocked swarm, managers have their keys encrypted on disk. They cannot
//     prove themselves, and give nothing: ErrLocked.
//   - Who may read the process of the engine (CAP_SYS_PTRACE, and the process
//     namespace in which the engine is) may read the files.
//   - Connections are bounded, for each address and in all, and each ends after 80 s
//     at the latest. Who can come from many addresses can keep others out.
package keyshare
