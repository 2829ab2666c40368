// Command demo shows the main job of sluice on one machine: three Docker hosts,
// each a set of namespaces with an engine of its own (see test/cluster), form a
// swarm; sluice is installed on them; a service of three replicas answers on its
// virtual IP from every container of its network, and a machine outside at a port of
// every host. It prints what it does as a
// story of commands and results, checks each result, and takes everything down.
//
//	go run ./test/demo              the demo; KEEP=1 leaves it up and says how to look around
//	go run ./test/demo -down        takes down what was kept
//	go run ./test/demo -driver overlay
//	                                the same with the engine's own overlay and the
//	                                tasks' addresses, without sluice: shows that
//	                                the machine is fit for the demo
//
// It needs root, runs from the top of the checkout, and expects what `make
// build` leaves in build/. The exit code is the verdict.
package main
