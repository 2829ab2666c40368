// Package reconcile is the loop that makes the kernel what the plan says.
//
//	trigger ─▶ view ─▶ plan ─▶ (dump) ─▶ diff ─▶ apply ─▶ status ─▶ observers
//	   ▲                                                        │
//	   └──────────── retry with backoff, interval ◀─────────────┘
//
// It is level-triggered: a trigger says "look again", never what happened, so
// triggers may be lost, doubled or merged. Start-up, a Docker call, gossip news,
// an engine event, a deleted link and the timer all take the same path, which is
// why recovery needs no code of its own.
//
// What the kernel holds is remembered between rounds and read back at the
// start, after an error, when the kernel tells of something that does not go with
// it, and every Interval: a Docker call pays for the change it asks for, not for a
// dump of everything. What others changed is mended by the same path, and counted
// (drift.go).
//
// While the view is partial, objects are made and none is changed or removed.
//
// Nothing is concluded from a failed or interrupted dump: such a round changes
// nothing and is repeated.
package reconcile
