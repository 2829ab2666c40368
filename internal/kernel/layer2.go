package kernel

import (
	"fmt"
	"net/netip"
	"strings"

	"sluice/internal/model"
)

// The network itself: a namespace with its devices and their tables, and what the host
// lets in of VXLAN.

// Netns is a named network namespace, pinned under /run/netns.
type Netns struct{ Name string }

// Sysctl is one key below /proc/sys in a namespace, with dots; a dot inside a
// device name is written as a slash, as sysctl(8) does.
type Sysctl struct{ NS, Name string }

// Link is a network device by the name it has in its namespace.
type Link struct {
	NS, Name string
	Kind     LinkKind
}

// LinkKind is the type of a device.
type LinkKind string

// The kinds of device that sluice makes.
const (
	Bridge LinkKind = "bridge"
	VXLAN  LinkKind = "vxlan"
	Veth   LinkKind = "veth"
)

// Addr is an IP address on a device. Prefix is the address with its length, not masked.
type Addr struct {
	NS, Dev string
	Prefix  netip.Prefix
}

// Neigh is a permanent neighbour entry (ARP) on a device.
type Neigh struct {
	NS, Dev string
	IP      netip.Addr
}

// FDB is a forwarding entry: on the VXLAN device, which VTEP has this MAC, and
// on its bridge, that this MAC is behind the VXLAN device. On the network's end of
// a pair that is kept (LinkSpec.Kept), it is the bridge's alone, without a VTEP.
type FDB struct {
	NS, Dev string // Dev is the VXLAN device, or that end
	MAC     model.MAC
}

// Filter is the host's chain for VXLAN packets: it accepts those from peers
// (see FilterPeer) and drops all others to the port.
type Filter struct{}

// FilterPeer lets VXLAN packets of one peer in.
type FilterPeer struct{ VTEP netip.Addr }

// NetnsSpec is the value of Netns; there is nothing to choose.
type NetnsSpec struct{}

// SysctlSpec is the value of Sysctl.
type SysctlSpec struct{ Value string }

// LinkSpec is the value of Link. Fields that do not belong to the kind are zero.
type LinkSpec struct {
	Alias string // ifalias: "sluice <network id>" or "sluice <endpoint id>"; ownership and what it is for
	MTU   int    // bytes
	MAC   model.MAC

	Master string // bridge it is a port of

	// Quiet marks a bridge port that learns nothing, floods nothing (unknown,
	// multicast, broadcast), and for which the bridge answers ARP from its own
	// neighbour table: the VXLAN device.
	// A bridge that is quiet does not learn from frames to the groups that bridges
	// keep for themselves (01:80:c2:00:00:00 to :0f): no table sees them.
	Quiet bool

	// VXLAN
	VNI   model.VNI
	Port  uint16     // UDP destination port
	Local netip.Addr // source address, our VTEP

	// Veth: the container's end
	Peer    string // its name in the host's namespace; found empty once the engine has taken it
	PeerMAC model.MAC
	// Kept says that the other end is no container's: it stays in the host's
	// namespace, up, with the same MTU.
	Kept bool
	// Taken says that the pair must not be made anew: its other end is, or was,
	// in a task. If it is missing, the endpoint is lost.
	Taken bool
}

// AddrSpec is the value of Addr.
type AddrSpec struct{}

// NeighSpec is the value of Neigh.
type NeighSpec struct{ MAC model.MAC }

// FDBSpec is the value of FDB.
type FDBSpec struct{ VTEP netip.Addr }

// FilterSpec is the value of Filter.
type FilterSpec struct{ Port uint16 }

// FilterPeerSpec is the value of FilterPeer.
type FilterPeerSpec struct{}

// Phase implements Key.
func (Netns) Phase() Phase { return PhaseNetns }

// Phase implements Key. What is of one device comes when there is that.
func (k Sysctl) Phase() Phase {
	if k.Dev() != "" {
		return PhaseAddr
	}
	return PhaseSysctl
}

// Dev is the device that a key of net.ipv4.conf or net.ipv6.conf is about; empty:
// none, or all.
func (k Sysctl) Dev() string {
	rest, ok := strings.CutPrefix(k.Name, "net.ipv4.conf.")
	if !ok {
		rest, ok = strings.CutPrefix(k.Name, "net.ipv6.conf.")
	}
	dev, _, _ := strings.Cut(rest, ".")
	if !ok || dev == "all" || dev == "default" {
		return ""
	}
	return strings.ReplaceAll(dev, "/", ".")
}

// Phase implements Key.
func (k Link) Phase() Phase {
	switch k.Kind {
	case Bridge:
		return PhaseBridge
	case VXLAN:
		return PhaseVXLAN
	}
	return PhaseVeth
}
func (Addr) Phase() Phase       { return PhaseAddr }
func (Neigh) Phase() Phase      { return PhaseNeigh }
func (FDB) Phase() Phase        { return PhaseNeigh }
func (Filter) Phase() Phase     { return PhaseFilter }
func (FilterPeer) Phase() Phase { return PhaseFilter }

// Netns implements Key. A named namespace is an object of the host.
func (Netns) Netns() string      { return "" }
func (k Sysctl) Netns() string   { return k.NS }
func (k Link) Netns() string     { return k.NS }
func (k Addr) Netns() string     { return k.NS }
func (k Neigh) Netns() string    { return k.NS }
func (k FDB) Netns() string      { return k.NS }
func (Filter) Netns() string     { return "" }
func (FilterPeer) Netns() string { return "" }

func (k Netns) String() string  { return "netns " + k.Name }
func (k Sysctl) String() string { return "sysctl " + in(k.NS) + " " + k.Name }
func (k Link) String() string   { return string(k.Kind) + " " + in(k.NS) + " " + k.Name }
func (k Addr) String() string   { return "addr " + in(k.NS) + " " + k.Dev + " " + k.Prefix.String() }
func (k Neigh) String() string  { return "neigh " + in(k.NS) + " " + k.Dev + " " + k.IP.String() }
func (k FDB) String() string    { return "fdb " + in(k.NS) + " " + k.Dev + " " + k.MAC.String() }
func (Filter) String() string   { return "filter host vxlan" }
func (k FilterPeer) String() string {
	return "filter host vxlan peer " + k.VTEP.String()
}

func (NetnsSpec) String() string    { return "" }
func (v SysctlSpec) String() string { return "= " + v.Value }
func (v LinkSpec) String() string {
	var b strings.Builder
	field := func(name string, val any) { fmt.Fprintf(&b, " %s %v", name, val) }
	if v.VNI != 0 {
		field("vni", v.VNI)
		field("port", v.Port)
		field("local", v.Local)
	}
	if v.Master != "" {
		field("master", v.Master)
	}
	if v.Quiet {
		b.WriteString(" quiet")
	}
	if v.MTU != 0 {
		field("mtu", v.MTU)
	}
	if !v.MAC.IsZero() {
		field("mac", v.MAC)
	}
	if v.Peer != "" {
		field("peer", v.Peer)
		field("peer-mac", v.PeerMAC)
	}
	if v.Kept {
		b.WriteString(" kept")
	}
	if v.Taken {
		b.WriteString(" taken")
	}
	if v.Alias != "" {
		fmt.Fprintf(&b, " alias %q", v.Alias)
	}
	return strings.TrimPrefix(b.String(), " ")
}
func (AddrSpec) String() string    { return "" }
func (v NeighSpec) String() string { return "lladdr " + v.MAC.String() }
func (v FDBSpec) String() string {
	if !v.VTEP.IsValid() {
		return ""
	}
	return "dst " + v.VTEP.String()
}
func (v FilterSpec) String() string   { return fmt.Sprintf("port %d", v.Port) }
func (FilterPeerSpec) String() string { return "" }
