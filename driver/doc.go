// Package driver holds the network verbs of the libnetwork remote driver
// protocol: what dockerd asks of sluice, call by call.
//
//	leader of the swarm      each node, for a task
//	AllocateNetwork          CreateNetwork ─▶ CreateEndpoint ─▶ Join
//	FreeNetwork              Leave ─▶ DeleteEndpoint ─▶ DeleteNetwork
//
// Every verb does the same: check, record the intent durably, and where the
// engine needs the result (CreateNetwork, Join) wait until the loop has brought
// the kernel to that intent. No verb changes the kernel itself, calls the Docker
// API, or takes longer than its context allows.
//
// All verbs are idempotent. Deleting what is unknown succeeds.
//
// Be aware: errors of AllocateNetwork reach nobody but the leader's log, and
// leave a network that never comes to life. What is wrong with a request's
// options is therefore accepted there and refused on the nodes, where
// `docker service ps` shows the text.
package driver
