// Package arch holds the house rules as tests: which package may import which,
// what the pure core must not do, and what every package must have.
//
//	L4  plugin, cmd/…                  roots: wire everything, are imported by nobody
//	L3  driver, ipam, internal/view …  shells: declare the interfaces they need
//	L2  internal/linux, gossip …       adapters: one outside library each
//	L1  internal/plan, lb/service …    pure: no clock, no goroutine, no system
//	L0  internal/model                 the nouns
//
// Arrows point inwards: shells and adapters both point at the core and never at
// each other; only the roots see both. T is for packages that only tests use.
//
// The rules parse the files themselves rather than ask `go list`: the test cache
// tracks the files that a test opens, not those that a child process reads, so
// a forbidden import would go unseen until something else changed.
//
// Be aware: a package in no layer fails. Adding one means saying where it belongs,
// in layers of rules.go.
package arch
