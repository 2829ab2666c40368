// Package keyring keeps the keys that gossip is encrypted with.
//
// A swarm has one key. It comes, in this order of use:
//
//	a setting (GOSSIP_KEY)            the operator brought it
//	a network's options               the leader put it there when it allocated the network
//	this node's records               it had the key before a restart
//	a manager                         asked by a worker that none of these told, or
//	                                  that does not hear the leading manager
//	a new random one                  made by the leader for the first network
//
// Two keys can arise: a leader may allocate a network before it is told of older
// ones. The ring is therefore the union of all that were seen, and every node
// takes the same one for sending: the one with the smallest hash.
//
// Be aware: a key in a network's options can be read by whoever may read the
// engine's API. It keeps out those who reach the gossip port only.
package keyring
