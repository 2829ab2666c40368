// Package managers tests what happens to sluice's networks while the lead of a
// swarm moves: three hosts, all of them managers.
//
//	scale down ─▶ leader demoted ─▶ new leader allocates ─▶ old tasks end
//
// It has a cluster of its own, since the other end-to-end tests count on host 1
// to lead. Needs root and what `make test` installs; without root nothing runs.
package managers
