// Package netnstest gives tests network namespaces of their own, and small LANs
// of several hosts made of them:
//
//	          underlay namespace
//	      ┌────────── br0 ──────────┐
//	    veth        veth          veth
//	     │           │             │
//	    eth0        eth0          eth0
//	host 1        host 2        host 3
//	192.0.2.1     192.0.2.2     192.0.2.3
//
// Everything goes with the test, also when it fails. Nothing is done to the
// namespace that the test was started in.
//
// Be aware: Need comes first in every test that uses these; it skips, by name,
// what this machine cannot run.
package netnstest
