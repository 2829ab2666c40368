// Command datapaths measures service VIPs: Docker's own, of its overlay networks,
// and those of sluice by each datapath and mode, on the same engines, in one run.
//
//	make bench-vm                           under a kernel with ip_vs
//	go run ./test/datapaths                 on a machine whose kernel has it
//	... -write docs/benchmarks.md           puts the table there
//
// Three hosts form a swarm (see sluice/test/cluster). Every network has two
// services of one task each, and the client is on all:
//
//	┌ host 1 ─────────────────┐        ┌ host 2 ───┐
//	│ client ──▶ VIP ─▶ near  │        │           │
//	│    └─────▶ VIP ─────────┼─vxlan─▶│ far       │
//	└─────────────────────────┘        └───────────┘
//
// One process (probe load) asks all VIPs in turns of some milliseconds, so that what
// else the machine does falls on all alike: ratios can be believed, single figures
// less. Afterwards the counters of IPVS must have grown by as many connections as
// were made, in the namespace of each network that should be served by it.
package main
