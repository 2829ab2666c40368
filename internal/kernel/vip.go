package kernel

import (
	"fmt"
	"net/netip"
	"strings"

	"sluice/internal/model"
)

// The balancer of virtual IPs in a network's namespace, as nftables has it; for that of
// IPVS see ipvs.go.

// BridgeTable is the nftables table of a network's namespace that spreads the
// connections to virtual IPs; the other VIP objects live in it.
type BridgeTable struct{ NS string }

// Member is an endpoint of this node in its network's namespace: it is not
// given itself as backend while there is another.
type Member struct {
	NS string
	IP netip.Addr
}

// VIP is a virtual IP in a network's namespace.
type VIP struct {
	NS string
	IP netip.Addr
}

// Slot is one of the places that a VIP's scheduler picks from, 0 … Slots-1.
type Slot struct {
	NS   string
	VIP  netip.Addr
	Slot int
}

// Alive says that frames of established connections may still go to a backend:
// every ready backend and every leaving one is alive.
type Alive struct {
	NS  string
	VIP netip.Addr
	MAC model.MAC
}

// Other is the backend that a member gets for its own VIP when the scheduler's
// picks were itself.
type Other struct {
	NS     string
	VIP    netip.Addr
	Client netip.Addr
}

// Port is one that a VIP has, if it has not all of them (VIPSpec.Named).
type Port struct {
	NS    string
	VIP   netip.Addr
	Proto model.Proto
	Port  uint16
}

// Real is the address of the backend with a MAC, for VIPs whose packets get that
// address (VIPSpec.NAT).
type Real struct {
	NS  string
	MAC model.MAC
}

// BridgeTableSpec is the value of BridgeTable.
type BridgeTableSpec struct {
	Router model.MAC // of the bridge itself: what is sent there is answered by the namespace's own stack
	Uplink string    // the VXLAN device, empty on a local network: its frames were balanced by their sender
	Open   int       // for how many seconds an open connection without packets is remembered
}

// MemberSpec is the value of Member.
type MemberSpec struct{ MAC model.MAC }

// VIPSpec is the value of VIP.
type VIPSpec struct {
	Scheduler string // rr, wrr: slots in turn; sh: slot by hash of the client's address
	Slots     int    // number of slots; 0 refuses every connection
	Named     bool   // only its Ports are served, all others refuse
	// NAT gives packets the address of their backend's Real, if it has one, and
	// answers the VIP.
	NAT bool
	// OnePacket chooses a slot for each UDP packet.
	OnePacket bool
	// Persist is for how many seconds a client's next connection goes where its
	// last one went; 0: each is chosen for itself. PersistBits is the length of the
	// prefix of addresses that are one client; 0 unless Persist is set.
	Persist, PersistBits int
}

// PortSpec is the value of Port: the backend's port, where packets get its address.
type PortSpec struct{ To uint16 }

// RealSpec is the value of Real.
type RealSpec struct{ IP netip.Addr }

// SlotSpec is the value of Slot.
type SlotSpec struct{ MAC model.MAC }

// AliveSpec is the value of Alive.
type AliveSpec struct {
	// Drains says that the backend gets nothing new, and that there is another: clients
	// that a VIP keeps (VIPSpec.Persist) get that, and so does the next datagram of a
	// flow of UDP, which has no end that could be waited for.
	Drains bool
}

// OtherSpec is the value of Other.
type OtherSpec struct{ MAC model.MAC }

// Phase implements Key.
func (BridgeTable) Phase() Phase { return PhaseVIP }
func (Member) Phase() Phase      { return PhaseVIP }
func (VIP) Phase() Phase         { return PhaseVIP }
func (Slot) Phase() Phase        { return PhaseVIP }
func (Alive) Phase() Phase       { return PhaseVIP }
func (Other) Phase() Phase       { return PhaseVIP }
func (Port) Phase() Phase        { return PhaseVIP }
func (Real) Phase() Phase        { return PhaseVIP }

// Netns implements Key.
func (k BridgeTable) Netns() string { return k.NS }
func (k Member) Netns() string      { return k.NS }
func (k VIP) Netns() string         { return k.NS }
func (k Slot) Netns() string        { return k.NS }
func (k Alive) Netns() string       { return k.NS }
func (k Other) Netns() string       { return k.NS }
func (k Port) Netns() string        { return k.NS }
func (k Real) Netns() string        { return k.NS }

func (k BridgeTable) String() string { return "balancer " + in(k.NS) }
func (k Member) String() string      { return "member " + in(k.NS) + " " + k.IP.String() }
func (k VIP) String() string         { return "vip " + in(k.NS) + " " + k.IP.String() }
func (k Slot) String() string {
	return fmt.Sprintf("slot %s %s %d", in(k.NS), k.VIP, k.Slot)
}
func (k Alive) String() string {
	return "alive " + in(k.NS) + " " + k.VIP.String() + " " + k.MAC.String()
}
func (k Other) String() string {
	return "other " + in(k.NS) + " " + k.VIP.String() + " client " + k.Client.String()
}
func (k Port) String() string {
	return fmt.Sprintf("port %s %s %d/%s", in(k.NS), k.VIP, k.Port, k.Proto)
}
func (k Real) String() string { return "real " + in(k.NS) + " " + k.MAC.String() }

func (v BridgeTableSpec) String() string {
	s := "router " + v.Router.String()
	if v.Uplink != "" {
		s += " uplink " + v.Uplink
	}
	if v.Open != 0 {
		s += fmt.Sprintf(" open %d", v.Open)
	}
	return s
}
func (v MemberSpec) String() string { return "mac " + v.MAC.String() }
func (v VIPSpec) String() string {
	var s strings.Builder
	s.WriteString(fmt.Sprintf("%s slots %d", v.Scheduler, v.Slots))
	if v.Persist > 0 {
		s.WriteString(fmt.Sprintf(" persist %d bits %d", v.Persist, v.PersistBits))
	}
	for _, f := range []struct {
		name string
		set  bool
	}{{"named", v.Named}, {"nat", v.NAT}, {"one-packet", v.OnePacket}} {
		if f.set {
			s.WriteString(" " + f.name)
		}
	}
	return s.String()
}
func (v PortSpec) String() string { return fmt.Sprintf("-> %d", v.To) }
func (v RealSpec) String() string { return "-> " + v.IP.String() }
func (v SlotSpec) String() string { return "-> " + v.MAC.String() }
func (v AliveSpec) String() string {
	if v.Drains {
		return "drains"
	}
	return ""
}
func (v OtherSpec) String() string { return "-> " + v.MAC.String() }
