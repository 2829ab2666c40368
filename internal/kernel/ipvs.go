package kernel

import (
	"fmt"
	"net/netip"
	"strings"

	"sluice/internal/model"
)

// The objects of the datapath that balances with the kernel's ip_vs. In a
// network's namespace, an nftables table marks packets to virtual IPs; the mark
// tells IPVS which service they are for, whatever their port.
//
//	packet to VIP ─▶ Mark ─▶ IPVSService ─▶ IPVSDest ─▶ frame to the backend's MAC
//	client ◀─ IPVS ◀─ LiftTable ◀─ answer of a backend that is sent to by IPVSNAT

// MarkTable is the nftables table of a network's namespace that marks packets to
// virtual IPs; Marks live in it.
type MarkTable struct{ NS string }

// Mark is what packets to a VIP are marked with.
type Mark struct {
	NS  string
	VIP netip.Addr
	// Client is the source of packets that have a mark of their own: a member
	// that must not be given itself. Invalid: all others.
	Client netip.Addr
	// Proto and Port are those that packets are to; none: all of them. Port 0 is all
	// ports of Proto that have no mark of their own.
	Proto model.Proto
	Port  uint16
}

// IPVSTimeouts are how long IPVS remembers silent connections in a namespace.
// Absent, they are the kernel's: 900, 120 and 300 seconds.
type IPVSTimeouts struct{ NS string }

// IPVSService is a service that IPVS balances: all packets with a mark. Its
// destinations go with it.
type IPVSService struct {
	NS   string
	Mark uint32
}

// IPVSDest is a backend of an IPVSService.
type IPVSDest struct {
	NS   string
	Mark uint32
	IP   netip.Addr
	// Port is where packets go that get another address (IPVSNAT); 0: the port that
	// the client asks for.
	Port uint16
}

// LiftTable is the nftables table of a network's namespace that takes answers out
// of the bridge, into the namespace's stack, where IPVS gives them their address
// back: those of LiftFrom to LiftTo.
type LiftTable struct{ NS string }

// LiftFrom is a backend that IPVS sends packets to with another address (IPVSNAT).
type LiftFrom struct {
	NS string
	IP netip.Addr
}

// LiftTo is an endpoint of this node, whose packets IPVS here has sent.
type LiftTo struct {
	NS string
	IP netip.Addr
}

// MarkTableSpec is the value of MarkTable; there is nothing to choose.
type MarkTableSpec struct{}

// MarkSpec is the value of Mark: a number that is not 0, of one service.
type MarkSpec struct{ Mark uint32 }

// IPVSTimeoutsSpec is the value of IPVSTimeouts, in seconds, more than 0.
type IPVSTimeoutsSpec struct {
	TCP int // open connections
	FIN int // TCP connections of which one side has closed
	UDP int // the rest
}

// IPVSServiceSpec is the value of IPVSService.
type IPVSServiceSpec struct {
	Scheduler string // its name in the kernel, such as rr or wlc: ipvsadm(8)
	// Fallback has sh and mh choose another backend where the hash's has weight 0
	// or too many connections; without it they refuse.
	Fallback bool
	// Persist is for how many seconds a client's next connection goes where its
	// last one went; 0: each is chosen for itself.
	Persist int
	// PersistBits is the length of the prefix of addresses that are one client;
	// 0 unless Persist is set.
	PersistBits int
	// OnePacket chooses a backend for each UDP packet.
	OnePacket bool
}

// LiftTableSpec is the value of LiftTable: the MAC of the bridge itself.
type LiftTableSpec struct{ Router model.MAC }

// LiftFromSpec is the value of LiftFrom.
type LiftFromSpec struct{}

// LiftToSpec is the value of LiftTo.
type LiftToSpec struct{}

// IPVSDestSpec is the value of IPVSDest.
type IPVSDestSpec struct {
	Weight int // 0..65535; 0 keeps what is open and takes nothing new
	Method IPVSMethod
	// Upper and Lower are numbers of connections: none come beyond Upper, until
	// there are fewer than Lower. 0: no limit.
	Upper, Lower int
}

// IPVSMethod is how a packet is sent on to a backend.
type IPVSMethod string

// The forwarding methods, by the names of the plugin's modes.
const (
	IPVSDR  IPVSMethod = "dr"  // in a frame to the backend's MAC, as it is
	IPVSNAT IPVSMethod = "nat" // with another destination address
	IPVSTun IPVSMethod = "tun" // in another IP packet
)

// Phase implements Key.
func (MarkTable) Phase() Phase    { return PhaseVIP }
func (Mark) Phase() Phase         { return PhaseVIP }
func (IPVSTimeouts) Phase() Phase { return PhaseVIP }
func (IPVSService) Phase() Phase  { return PhaseVIP }
func (IPVSDest) Phase() Phase     { return PhaseVIP }
func (LiftTable) Phase() Phase    { return PhaseVIP }
func (LiftFrom) Phase() Phase     { return PhaseVIP }
func (LiftTo) Phase() Phase       { return PhaseVIP }

// Netns implements Key.
func (k MarkTable) Netns() string    { return k.NS }
func (k Mark) Netns() string         { return k.NS }
func (k IPVSTimeouts) Netns() string { return k.NS }
func (k IPVSService) Netns() string  { return k.NS }
func (k IPVSDest) Netns() string     { return k.NS }
func (k LiftTable) Netns() string    { return k.NS }
func (k LiftFrom) Netns() string     { return k.NS }
func (k LiftTo) Netns() string       { return k.NS }

func (k MarkTable) String() string { return "marks " + in(k.NS) }
func (k Mark) String() string {
	s := "mark " + in(k.NS) + " " + k.VIP.String()
	switch {
	case k.Port != 0:
		s += fmt.Sprintf(" port %d/%s", k.Port, k.Proto)
	case k.Proto != "":
		s += " " + string(k.Proto)
	}
	if k.Client.IsValid() {
		s += " client " + k.Client.String()
	}
	return s
}
func (k IPVSTimeouts) String() string { return "ipvs " + in(k.NS) + " timeouts" }
func (k IPVSService) String() string  { return fmt.Sprintf("ipvs %s fwm %d", in(k.NS), k.Mark) }
func (k IPVSDest) String() string {
	s := fmt.Sprintf("ipvs %s fwm %d -> %s", in(k.NS), k.Mark, k.IP)
	if k.Port != 0 {
		s += fmt.Sprintf(" port %d", k.Port)
	}
	return s
}
func (k LiftTable) String() string { return "lift " + in(k.NS) }
func (k LiftFrom) String() string  { return "lift " + in(k.NS) + " from " + k.IP.String() }
func (k LiftTo) String() string    { return "lift " + in(k.NS) + " to " + k.IP.String() }

func (MarkTableSpec) String() string { return "" }
func (v MarkSpec) String() string    { return fmt.Sprintf("fwm %d", v.Mark) }
func (v IPVSTimeoutsSpec) String() string {
	return fmt.Sprintf("tcp %d fin %d udp %d", v.TCP, v.FIN, v.UDP)
}
func (v IPVSServiceSpec) String() string {
	var b strings.Builder
	b.WriteString(v.Scheduler)
	if v.Fallback {
		b.WriteString(" fallback")
	}
	if v.Persist > 0 {
		fmt.Fprintf(&b, " persist %d bits %d", v.Persist, v.PersistBits)
	}
	if v.OnePacket {
		b.WriteString(" one-packet")
	}
	return b.String()
}
func (v LiftTableSpec) String() string { return "router " + v.Router.String() }
func (LiftFromSpec) String() string    { return "" }
func (LiftToSpec) String() string      { return "" }
func (v IPVSDestSpec) String() string {
	s := fmt.Sprintf("weight %d %s", v.Weight, v.Method)
	if v.Upper > 0 || v.Lower > 0 {
		s += fmt.Sprintf(" upper %d lower %d", v.Upper, v.Lower)
	}
	return s
}

// IsIPVS reports whether an object is in IPVS; the others of PhaseVIP are in nftables.
func IsIPVS(k Key) bool {
	switch k.(type) {
	case IPVSTimeouts, IPVSService, IPVSDest:
		return true
	}
	return false
}
