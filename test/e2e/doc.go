// Package e2e tests sluice as its users have it: as a managed plugin in real
// Docker engines that form a swarm, with containers that talk.
//
//	TestMain ─▶ make rootfs ─▶ three hosts ─▶ plugin on each ─▶ swarm ─▶ tests
//
// The cluster is made once; tests use networks and services of their own and
// remove them. When all is done, every host must look as it did before the first
// network: links, namespaces, rules, mounts, addresses.
//
// Needs root and the packages that `make test` installs. Without root nothing
// runs, and the reason is printed.
package e2e
