package kernel

import (
	"fmt"
	"net/netip"

	"sluice/internal/model"
)

// The source guard: what a container may say that it is, to its network.
//
//	task ─▶ port slv…, from GuardAddr ─────────────▶ bridge, balancer, other nodes
//	                   from an alias, GuardPort ───▶ back to the entry
//	                   from anything else ─▶ dropped, and counted

// GuardTable is the nftables table of a network's namespace that drops what comes in
// by a container's port and is not the container's; the other Guard objects live in
// it. What comes from other nodes was looked at by theirs.
type GuardTable struct{ NS string }

// GuardPort is the port of one container, Dev.
type GuardPort struct{ NS, Dev string }

// GuardAddr is an address that may be the source of what comes in by a port.
type GuardAddr struct {
	NS, Dev string
	IP      netip.Addr
}

// GuardTableSpec is the value of GuardTable.
type GuardTableSpec struct {
	Ports string       // how the names of containers' ports begin; others are not guarded
	Pool  netip.Prefix // all aliases of published ports, masked
	Open  bool         // nothing is dropped: not all containers may be known
}

// GuardPortSpec is the value of GuardPort.
type GuardPortSpec struct {
	MAC model.MAC // the container's
	// Aliases lets answers out to clients of published ports: their sources are in
	// the pool.
	Aliases bool
}

// GuardAddrSpec is the value of GuardAddr.
type GuardAddrSpec struct {
	MAC model.MAC // the container's
	// VIP says that the address is of a service of the container's: it answers from
	// there, and never says by ARP that it has it.
	VIP bool
}

// Phase implements Key.
func (GuardTable) Phase() Phase { return PhaseVIP }
func (GuardPort) Phase() Phase  { return PhaseVIP }
func (GuardAddr) Phase() Phase  { return PhaseVIP }

// Netns implements Key.
func (k GuardTable) Netns() string { return k.NS }
func (k GuardPort) Netns() string  { return k.NS }
func (k GuardAddr) Netns() string  { return k.NS }

func (k GuardTable) String() string { return "guard " + in(k.NS) }
func (k GuardPort) String() string  { return "guard " + in(k.NS) + " port " + k.Dev }
func (k GuardAddr) String() string {
	return "guard " + in(k.NS) + " port " + k.Dev + " from " + k.IP.String()
}

func (v GuardTableSpec) String() string {
	s := fmt.Sprintf("ports %s aliases %s", v.Ports, v.Pool)
	if v.Open {
		s += " open"
	}
	return s
}
func (v GuardPortSpec) String() string {
	s := "mac " + v.MAC.String()
	if v.Aliases {
		s += " aliases"
	}
	return s
}
func (v GuardAddrSpec) String() string {
	s := "mac " + v.MAC.String()
	if v.VIP {
		s += " vip"
	}
	return s
}
