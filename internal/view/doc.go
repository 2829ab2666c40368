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
// Be aware: silence is never evidence. A node that gossip has lost keeps its
// records here, and a restarted process starts from the records it had; only
// the owner of a record, or a manager that says the node is gone, removes it.
package view
