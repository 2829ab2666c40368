// Command bench measures what the project promises of its speed and size, and
// prints one table: goal, limit, median, 99th percentile, share of the limit,
// verdict, and the load of the machine while it was measured.
//
//	go run ./test/bench              everything
//	go run ./test/bench -only plan   one part: join, address, plan, image, packets, mesh
//
// The parts that touch a kernel need root. As root, the command starts itself
// once more in namespaces of its own, for processes, mounts and the network:
//
//	┌ namespaces of the bench ─────────────────────────────────────────────┐
//	│  bench ── plays the engine, over the sockets ──▶ the plugin's binary │
//	│    │  moves container ends into 100 namespaces     (as `make build`) │
//	│    └─ ten gossip nodes with 10,000 endpoints ═══▶ its gossip         │
//	└──────────────────────────────────────────────────────────────────────┘
//
// It is the first process there, so whatever ends it ends everything else, and
// the kernel removes the rest. Nothing is done to the machine's own namespaces.
//
// Be aware: this is no test. A limit that is missed is a line of the table, not
// a failure, as it says more of a loaded machine than of the code; the exit code
// speaks of whether things could be measured.
package main
