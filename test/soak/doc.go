// Command soak lets three managers of a swarm live through random days: operations
// that people do, faults that happen to them, and requests all the time, of which
// every one that fails must be explained by a fault that may hurt it.
//
//	make soak                      ten minutes
//	make soak FOR=2h SEED=7        as long as you like, the same choices again
//
// One line of choices is made from the seed (see plan.go): an operation, a fault,
// perhaps with another operation while it lasts, and then everything must heal:
//
//	operation ─▶ fault begins ─▶ operation ─▶ fault ends ─▶ healed ─▶ operation ...
//	requests ══════════════════╪═══════ may fail, by policy.go ═╪══════════════════
//
// Requests go from a container on each host and from a client outside, by VIPs and by
// published ports of each host, as new connections, connections that are kept, and
// datagrams, to services of two kinds: one with tasks everywhere, and one on each host
// with its only task there. The latter make the judgement sharp: a host without power
// must not hurt a request between the two others.
//
// Healed is: the swarm has its nodes, managers and tasks, `sluice diff` is empty on all
// hosts, and every kind of request has succeeded for two seconds. How long that may
// take is in policy.go too.
//
// At the end all is removed, and the hosts must look as before the first network: no
// link, address, route, rule, namespace or mount, no record of gossip, no address in
// use that was not before, no more descriptors, no memory that grew. The report says
// what was done and found; the exit code is the verdict: 0 all is explained and
// nothing was left, 1 not so, 2 it could not be run. An interrupt ends the run early,
// with the same end and report.
//
// # Limits
//
// The choices are the seed's (and the kernel's, which may lack a mode), the moments are
// not: a failure may need several runs to
// come again. One fault at a time, so that there is one explanation. Hosts share one
// kernel and clock: power off is the loss of everything in the namespaces of one.
// Needs root and what `make build` leaves in build/.
package main
