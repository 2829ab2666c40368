// Package kernel describes what sluice wants in, or found in, the Linux kernel
// of one host: as a State, a set of typed keys with comparable values.
//
//	plan.Host(view) ─▶ want State ─┐
//	                               ├─▶ Diff ─▶ []Op ─▶ internal/linux
//	internal/linux Dump ─▶ have ───┘
//
// The package is pure: it computes differences and prints states, and never
// touches a kernel. State.Text is the one text form: golden files, the fake
// kernel, `sluice diff` and the documents all show it.
//
// Be aware: a State holds owned objects only. What is not in it is not absent
// from the host; it is not ours.
package kernel
