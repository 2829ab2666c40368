// Package firewalld opens in the host's firewalld, if it has one, the ports by which
// the nodes talk to each other, and tells when that has made its rules anew.
//
//	system bus ── signals, owner of the name ──▶ Keeper: wanted − had ─▶ addPort
//
// firewalld sees packets in a table of its own, behind everybody else's: what an
// iptables chain has accepted it still rejects, unless a zone has the port. So
// sluice does what the engine does, it asks firewalld. Packets of published ports
// need nothing: firewalld lets pass what was translated.
//
// It is level-triggered: what the zones have is read at the start, after each signal
// and every half a minute, and what is missing is added, at run time only: nothing is
// written into firewalld's configuration, and after a reload it is added again.
// Nothing is ever closed.
//
// A port is opened in the zones that a node's packets may come by: that of the
// device with the node's own address, or the default zone if it is in none, and
// those that have a node's address among their sources. While that device is not
// known nothing is opened. Sources that are ipsets do not count: many a set is of
// those to keep out.
//
// A host without D-Bus or firewalld is the rule, and no error.
package firewalld
