package kernel

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"

	"sluice/internal/model"
)

// State is a set of kernel objects. Both sides of an entry are comparable: two
// states are equal if maps.Equal says so.
type State map[Key]Value

// Key names one kernel object. Its String says kind and place, and is unique on
// a host: a task's namespace stands in it by the last element of its path, and
// an engine keeps the namespaces of all its tasks in one directory.
type Key interface {
	fmt.Stringer
	// Phase orders creation; objects of a later phase may refer to those of an earlier one.
	Phase() Phase
	// Netns is the network namespace the object lives in: its name, "task:" and
	// its path for a task's, empty for the host's own.
	Netns() string
}

// Value is what an object should be. Its String is the part behind the key in the text form.
type Value interface{ fmt.Stringer }

// Phase is a place in the order of creation; deletion runs backwards.
type Phase int

// The phases. What guards the host from the networks that published ports lead into
// comes before there is a way from one, and goes after it. Addresses come after links; the nftables objects of a namespace,
// which are changed in one transaction with their deletions, after the
// addresses they speak for; then task namespaces, because a backend counts as
// prepared only when all else of it is done; published ports last, and they go first.
const (
	PhaseGuard Phase = iota
	PhaseNetns
	PhaseSysctl
	PhaseBridge
	PhaseVXLAN
	PhaseVeth
	PhaseAddr
	PhaseNeigh
	PhaseFilter
	PhaseVIP
	PhaseTask
	PhaseMesh
)

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

// TaskTable is the nftables table in a task's namespace. There is one for each
// namespace, however many networks the task is on: Sandbox is the path of the
// namespace, not an endpoint.
type TaskTable struct{ Sandbox string }

// TaskVIP is the translation of a VIP to the task's own address on the VIP's
// network, in the task's namespace at path Sandbox.
type TaskVIP struct {
	Sandbox string
	VIP     netip.Addr
}

// TaskPort is the translation of one port of a VIP to another port of the task,
// before TaskVIP's of all others.
type TaskPort struct {
	Sandbox string
	VIP     netip.Addr
	Proto   model.Proto
	Port    uint16
}

// TaskTunnel is a device in a task's namespace that takes IPIP packets (RFC 2003)
// to the task's own address Addr.
type TaskTunnel struct {
	Sandbox string
	Addr    netip.Addr
}

// TaskTunnelPrefix starts the names of the devices of TaskTunnels, and of no others
// in a task's namespace: its table (TaskTable) tells them by it.
const TaskTunnelPrefix = "slt"

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
	// Drains says that the backend gets nothing new: it leaves, or its weight is 0.
	// Clients that a VIP keeps (VIPSpec.Persist) get another.
	Drains bool
}

// OtherSpec is the value of Other.
type OtherSpec struct{ MAC model.MAC }

// TaskTableSpec is the value of TaskTable; there is nothing to choose.
type TaskTableSpec struct{}

// TaskVIPSpec is the value of TaskVIP.
type TaskVIPSpec struct {
	Addr netip.Addr // the task's own on that network
	// Loop also translates what the task itself sends to the VIP: it is the only backend.
	Loop bool
}

// TaskPortSpec is the value of TaskPort.
type TaskPortSpec struct {
	Addr netip.Addr // the task's own on that network
	To   uint16     // its port
	Loop bool       // as TaskVIPSpec's
}

// TaskTunnelSpec is the value of TaskTunnel; there is nothing to choose.
type TaskTunnelSpec struct{}

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
func (Addr) Phase() Phase        { return PhaseAddr }
func (Neigh) Phase() Phase       { return PhaseNeigh }
func (FDB) Phase() Phase         { return PhaseNeigh }
func (Filter) Phase() Phase      { return PhaseFilter }
func (FilterPeer) Phase() Phase  { return PhaseFilter }
func (BridgeTable) Phase() Phase { return PhaseVIP }
func (Member) Phase() Phase      { return PhaseVIP }
func (VIP) Phase() Phase         { return PhaseVIP }
func (Slot) Phase() Phase        { return PhaseVIP }
func (Alive) Phase() Phase       { return PhaseVIP }
func (Other) Phase() Phase       { return PhaseVIP }
func (TaskTable) Phase() Phase   { return PhaseTask }
func (TaskVIP) Phase() Phase     { return PhaseTask }
func (Port) Phase() Phase        { return PhaseVIP }
func (Real) Phase() Phase        { return PhaseVIP }
func (TaskPort) Phase() Phase    { return PhaseTask }
func (TaskTunnel) Phase() Phase  { return PhaseTask }

// Netns implements Key. A named namespace is an object of the host.
func (Netns) Netns() string         { return "" }
func (k Sysctl) Netns() string      { return k.NS }
func (k Link) Netns() string        { return k.NS }
func (k Addr) Netns() string        { return k.NS }
func (k Neigh) Netns() string       { return k.NS }
func (k FDB) Netns() string         { return k.NS }
func (Filter) Netns() string        { return "" }
func (FilterPeer) Netns() string    { return "" }
func (k BridgeTable) Netns() string { return k.NS }
func (k Member) Netns() string      { return k.NS }
func (k VIP) Netns() string         { return k.NS }
func (k Slot) Netns() string        { return k.NS }
func (k Alive) Netns() string       { return k.NS }
func (k Other) Netns() string       { return k.NS }
func (k TaskTable) Netns() string   { return "task:" + k.Sandbox }
func (k TaskVIP) Netns() string     { return "task:" + k.Sandbox }
func (k Port) Netns() string        { return k.NS }
func (k Real) Netns() string        { return k.NS }
func (k TaskPort) Netns() string    { return "task:" + k.Sandbox }
func (k TaskTunnel) Netns() string  { return "task:" + k.Sandbox }

func in(ns string) string {
	if ns == "" {
		return "host"
	}
	return ns
}

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
func (k TaskTable) String() string { return "translate task " + path.Base(k.Sandbox) }
func (k TaskVIP) String() string {
	return "translate task " + path.Base(k.Sandbox) + " vip " + k.VIP.String()
}
func (k Port) String() string {
	return fmt.Sprintf("port %s %s %d/%s", in(k.NS), k.VIP, k.Port, k.Proto)
}
func (k Real) String() string { return "real " + in(k.NS) + " " + k.MAC.String() }
func (k TaskPort) String() string {
	return fmt.Sprintf("translate task %s vip %s port %d/%s", path.Base(k.Sandbox), k.VIP, k.Port, k.Proto)
}
func (k TaskTunnel) String() string {
	return "tunnel task " + path.Base(k.Sandbox) + " to " + k.Addr.String()
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
func (v TaskPortSpec) String() string {
	s := fmt.Sprintf("to %s port %d", v.Addr, v.To)
	if v.Loop {
		s += " loop"
	}
	return s
}
func (TaskTunnelSpec) String() string { return "" }
func (v SlotSpec) String() string     { return "-> " + v.MAC.String() }
func (v AliveSpec) String() string {
	if v.Drains {
		return "drains"
	}
	return ""
}
func (v OtherSpec) String() string   { return "-> " + v.MAC.String() }
func (TaskTableSpec) String() string { return "" }
func (v TaskVIPSpec) String() string {
	if v.Loop {
		return "to " + v.Addr.String() + " loop"
	}
	return "to " + v.Addr.String()
}

// Compare orders keys by namespace, phase and text; it is the order of Text.
func Compare(a, b Key) int {
	return cmp.Or(
		cmp.Compare(a.Netns(), b.Netns()),
		cmp.Compare(a.Phase(), b.Phase()),
		naturalCompare(a.String(), b.String()),
	)
}

// naturalCompare compares runs of digits by value, so that slot 10 follows slot
// 9 and 10.0.0.10 follows 10.0.0.9.
func naturalCompare(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			da, db := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if c := cmp.Or(cmp.Compare(len(da), len(db)), cmp.Compare(da, db), cmp.Compare(na, nb)); c != 0 {
				return c
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return cmp.Compare(a[0], b[0])
		}
		a, b = a[1:], b[1:]
	}
	return cmp.Compare(len(a), len(b))
}

func digits(s string) int {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// Keys returns the keys in the order of Compare.
func (s State) Keys() []Key {
	keys := make([]Key, 0, len(s))
	for k := range s {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, Compare)
	return keys
}

// Text prints one object a line, in the order of Compare, ending in a newline.
func (s State) Text() string {
	var b strings.Builder
	for _, k := range s.Keys() {
		b.WriteString(Line(k, s[k]))
		b.WriteByte('\n')
	}
	return b.String()
}

// Line is one object in the text form, without a newline.
func Line(k Key, v Value) string {
	return strings.TrimSuffix(k.String()+" "+v.String(), " ")
}
