// Package options reads the `sluice.*` keys that people write at `docker
// network create -o KEY=VALUE` and `docker service create --network
// name=NET,driver-opt=KEY=VALUE`, and the few keys that sluice itself adds to a
// network for the nodes of a swarm.
//
//	network create -o ──▶ leader: AllocateNetwork ──Encode──▶ swarm's store ──▶ node: CreateNetwork
//	                            │ Network                                          │ Network
//	service create driver-opt ──────────────────────────────▶ node: CreateEndpoint ┴ Service
//
// One table per kind (table.go) holds key, default, what is allowed, meaning
// and parser; the parsers, the error texts and the tables of the manual
// (Markdown) are all made from it.
//
// Reading is lenient in form and strict in content. The docker command
// lower-cases keys and values of driver-opt, a stack file does not, so keys and
// words compare without case, and values may carry %XX escapes for what a
// command line would spoil. A key or value that means nothing here is refused,
// with all other mistakes of the same map, because an option that is silently
// ignored is found months later. So are values that mean nothing together, of one
// map (Network, Service) or of a service and its network (Fits).
//
// Be aware: the engine copies network options to every node and shows them to
// whoever may read its API. The gossip key travels this way; Redact is for
// everything that prints options.
package options
