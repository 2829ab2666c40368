// Package diag answers the questions people ask of a running sluice: how is
// this node, which networks and services does it serve, does the kernel have
// what it should.
//
//	sluice status ──▶ /run/sluice/….sock ──▶ Server ──▶ view, plan, loop, gossip, the kernel's counters
//	              ◀── one JSON document ◀──┘
//
// Server.Healthy and Server.Serves are the same judgement in one word, for
// internal/monitor.
//
// The answers are plain types with a Text method; the command prints either
// the text or the JSON, so both say the same. An answer with problems makes the
// command exit with status 1.
//
// Everything here reads. Be aware: no secret may enter an answer; gossip keys
// and the options that carry them are left out where the answer is made.
package diag
