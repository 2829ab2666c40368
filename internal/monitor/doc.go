// Package monitor answers machines over HTTP, on a port of the host: balancers,
// whether this node serves a published port, and collectors, how much of
// everything there is.
//
//	balancer  ── GET /healthz?port=81 ──▶ ┐
//	collector ── GET /metrics ──────────▶ ┴ Monitor ──▶ Node (internal/diag)
//
// It says no for a node that is to be left alone before the node stops to serve:
// while the swarm has it drained or paused, and from the moment that the process
// is asked to end until it has.
//
// Everything here reads. Be aware: whoever reaches the port may ask; names of
// services, networks and processes are in the answers, and no secret is. What one
// can take is bounded: the number of connections, and the time and size of a request.
package monitor
