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
// Be aware: the checksums find accidents, not forgery. The whole content is held
// in memory; it is meant for thousands of small records, not for bulk data.
package store
