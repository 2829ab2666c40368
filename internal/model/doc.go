// Package model holds the nouns of sluice: networks, endpoints, services,
// backends, and the View, the one immutable value that plans are made from.
//
//	intents (store) ─┐
//	gossip tables  ──┼──▶ View ──▶ plan.Host ──▶ kernel.State
//	Docker engine  ──┘
//
// Everything here is a plain value: comparable where it is used as a key, with
// addresses as net/netip types, so that == means equal and two goroutines may
// read one View without a lock. Nothing here reads a clock or the system.
package model
