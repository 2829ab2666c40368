// Package view joins what three sources tell into one immutable model.View.
//
//	engine's calls ──▶ intents, durable ─┐
//	gossip tables ──▶ remote endpoints,  ├─▶ View, one revision ─▶ plan
//	                  managers' records  │
//	local engine's API ─▶ tasks, health ─┘──▶ this node's own gossip records
//	the loop's read-back ─▶ taken, prepared ┘
//
// Hub is the owner of all of it: one mutex, no goroutine. Sources push, each
// push may make a new revision, and a listener is told that there is one.
//
// Who says what about a service: its VIP, name and options come from the
// manager that leads; that a task is ready comes from the engine that runs it;
// that it is leaving comes from the leader or from its own engine, whoever is
// first. Where no leader's records are known, the VIP that each task's engine
// knows is used.
//
// Who leads: a manager whose engine is the swarm's leader claims one more than the
// highest claim it knows. A reader goes by one claimant's word until a later claim is
// confirmed by its claimant's engine, and changes over, or takes news, once all of the
// new word is there: records come one by one, and a service of which they have not told
// yet would end. A claimant that is contradicted asks its engine before it believes that
// or says more.
//
// Be aware: silence is never evidence. A node that gossip has lost keeps its
// records here, and a restarted process starts from the records it had; only
// the owner of a record, or a manager that says the node is gone, removes it. Nor
// does an older copy of its table, which another node may have. Silence and the
// leader's word that the swarm misses the node are evidence of less: then Remote.Lost
// says so, and the record stays for when it comes back.
package view
