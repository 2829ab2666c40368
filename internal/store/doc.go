// Package store keeps this node's intents on disk: what the engine has asked
// for and was told is done, so that it is still done after a crash.
//
//	Commit ─┐
//	Commit ─┼─▶ writer ──▶ one transaction, one fsync ──▶ <path>           bbolt, format 1
//	Commit ─┘    │                                        <path>.damaged-1 what could not be believed
//	             ▼
//	Load ◀──── memory       what is durable, and nothing else
//
// A record is a kind, a key and bytes; what they mean is the caller's business.
// Changes that are asked for while the disk is busy wait together and share the
// next fsync, so a lone change pays no delay and a burst pays few fsyncs.
//
// A file is believed only after three checks, in this order:
//
//  1. structure: every page that bbolt would follow is inside the file, used
//     once and in order (verify). bbolt trusts its pages: a bad offset in a
//     memory-mapped file is a crash, not an error, and would be one again at
//     every start.
//  2. record: each value carries a checksum over its kind, key and bytes. If some
//     are bad, the others are carried over.
//  3. set: the number of records and the sum of their checksums are written with
//     every transaction. A record that is missing or stale breaks the sum.
//
// A file that fails is renamed to <path>.damaged-<n>, never overwritten or
// deleted, and a fresh one takes its place, with the good records where only
// check 2 failed; Status tells of it.
//
// A disk that takes nothing is tried again every five seconds, and by each change.
// Meanwhile a change that puts something is refused; one that only removes is not,
// and a file that is behind is brought up to memory when it is opened again.
//
// Whoever is told of an error goes on without the change, so none of it stays: the
// writer takes back what it wrote for a caller that had given up. Whoever is told of
// none may find a removal undone, if the process ends before a disk in trouble has
// taken it. Its callers bear that: an endpoint or a network that is back, the view's
// Sweep forgets; a lease, ipam's Confirm; the pool and the VNI of a network that is no
// more, the plugin's follower.
//
// Be aware: the checksums find accidents, not forgery. The whole content is held
// in memory; it is meant for thousands of small records, not for bulk data.
package store
