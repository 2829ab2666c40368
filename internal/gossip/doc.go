// Package gossip keeps one small table per node and copies it to every other
// node of the cluster: a replicated, single-writer key/value service for up to
// about a hundred nodes, on top of hashicorp/memberlist (of which this package
// is the only importer).
//
//	        node a                                   node b
//	Put ─▶ own table (inc 7, seq 41)                copy of a's table
//	          │  1 at once: packets to every member ──────▶ apply, Changed()
//	          │  2 memberlist's broadcast queue ──────────▶ (again, for what was lost)
//	          │  3 every second, to one random peer:
//	          │       probe(hash of all versions) ────────▶ equal? agree
//	          │     ◀──────────────── digest(owner, version)   else
//	          └────── what b lacks, own digest ───────────▶ apply; answer what a lacks
//
// # Order
//
// Only its owner numbers the changes of a table, so there is nothing to merge
// between writers. The version of a table is (incarnation, seq): the
// incarnation grows with every start of the owner, seq by one with every change.
// A copy remembers for each key the seq of its last change, and for the table
// the highest seq below which nothing is missing. Changes are applied in
// whatever order they arrive: the greater seq wins per key, and what lies beyond
// a gap waits for nothing. The digest names the contiguous seq only, so a gap is
// always asked for.
//
// A deletion leaves a tombstone for [TombstoneTTL]; then the owner drops it and
// raises the floor of its table. A copy older than the floor of the node it asks
// gets the whole table, which names by omission what is gone.
//
// # Life of a table
//
//	            new incarnation, its former entries are kept until Complete
//	             ┌──────┐
//	             ▼      │    contact lost
//	(nothing) ─▶ alive ─┴─────────────────▶ suspended ──┐
//	             │  ▲          contact regained │       │ Forget
//	       Leave │  └───────────────────────────┘       │
//	             ▼                                      ▼
//	            grave (owner, incarnation), itself copied to all for GraveTTL
//
// Loss of contact alone never removes a record. A graceful [Node.Leave] does, and
// [Node.Forget], which somebody says who knows that the node is gone. Both write
// a grave: it outranks every table of that owner up to its incarnation, and is
// outranked by any later one. An owner that meets its own grave, or a version of
// itself that it never wrote (a clock set back, a restored disk), outbids it
// with a higher incarnation and publishes its table again.
//
// # Contact
//
// memberlist finds failed nodes but drops them for good after a while, and two
// halves of a healed partition do not look for each other. So each node keeps
// trying the addresses given to [Node.Join] and those of suspended owners, as
// long as they are not members.
//
// # Be aware
//
//   - Everything is encrypted and authenticated with the cluster's keys (AES-GCM);
//     a node without a key cannot be made. Whoever has a key is trusted to forward
//     other nodes' changes, and thus could forge them.
//   - All keys of the ring decrypt, the one with the lowest hash encrypts. Between
//     the arrival of a lower key at one node and at another the second does not
//     understand the first; it catches up when the key arrives.
//   - No order holds between keys, only per key. A reader that needs two values to
//     agree puts them under one key.
//   - Clocks of nodes may differ by hours. One that is behind by more than
//     [GraveTTL] cannot bury: others take its graves for expired.
//   - An incarnation number must not be used twice by one owner.
//   - Tables live in memory on every node: keep values to a few hundred bytes and
//     tables below [MaxTable].
//   - memberlist's probe goroutines outlive [Node.Close] by up to eight seconds
//     (the longest probe of an unhealthy node); they touch nothing any more.
package gossip
