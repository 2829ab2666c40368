// Package plan answers one question: what should this host's kernel look like?
//
//	View ─▶ overlay.Plan ─────────────────────────┐
//	     ─▶ ingress.Balanced ─▶ service.Plan ─────┼▶ kernel.State
//	     ─▶ ingress.Plan ─────────────────────────┘
//
// Host is pure and order-blind: equal views give equal states. Every kernel
// object has one planner; a test holds their keys disjoint.
package plan
