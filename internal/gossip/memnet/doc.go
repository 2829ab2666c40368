// Package memnet is a network in memory for tests of gossip, fit for virtual time
// (testing/synctest): it starts no goroutine of its own, and every end can be shut
// down. What blocks, blocks on a timer or a channel.
//
//	WriteTo ─▶ cut? lost? twice? ─▶ delay, another for each ─▶ packets of the other end
//	Dial    ─▶ cut: until it times out; loss: a try each 1, 2, 4 s ─▶ a pipe
//
// Links can be cut in one direction; a stream needs both. A host can be frozen, as a
// process is by SIGSTOP: nothing leaves it, and what comes waits in its socket.
//
// Be aware: once it is there, a stream loses nothing, whatever the loss.
package memnet
