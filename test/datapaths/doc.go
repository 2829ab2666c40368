// Command datapaths measures service VIPs and published ports: Docker's own, of its
// overlay and ingress networks, and those of sluice by each datapath and mode, on the
// same engines, in one run.
//
//	make bench-vm                           under a kernel with ip_vs
//	go run ./test/datapaths                 on a machine whose kernel has it
//	... -only mesh-nft                      some of it
//	... -write docs/benchmarks.md           puts the tables there
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
//
// Published ports are asked of host 1 by a client outside. A process in host 1's own
// network says what the way to any of them costs at least:
//
//	          ┌ host 1 ─────────────────────────────┐      ┌ host 2 ┐
//	client ──▶│ port 8001: process                  │      │        │
//	          │ port 8002: Docker's ─▶ near         │      │        │
//	          │ port 8003: Docker's ────────────────┼─────▶│ far    │
//	          │ … the same with sluice's            │      │        │
//	          └─────────────────────────────────────┘      └────────┘
//
// There a thinner client asks thinner servers (probe turns, probe echo): of what a
// connection takes in a VM, most is system calls, and the way would hardly show. All
// ports are of TCP and UDP, and tasks behind sluice's must see the client's address.
package main
