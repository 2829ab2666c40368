package kernel

import (
	"fmt"
	"net/netip"
	"path"

	"sluice/internal/model"
)

// The objects of the routing mesh: published ports of a host lead into a network,
// as connections to an alias, an address that only this node's balancer serves.
// The alias as the source of an answer says which node it has to leave by.
//
//	client ─▶ MeshPort: alias, the task's port ─▶ Route of the block ─▶ pair slm…/mesh0
//	         ─▶ br0: VIP{alias} as any other ─▶ [vxlan0] ─▶ task: TaskMesh, alias → own address
//	client ◀─ host: conntrack ◀─ mesh0 ◀─ Back: block → MAC ◀─ [vxlan0] ◀─ br0 ◀─ TaskRoute: by eth0
//
// A published port is nothing but MeshPort, and a range of ports that are the task's
// too nothing but MeshRange; the rest is there once for each network.

// Forward is the host's chain that lets through what is forwarded from and to the
// mesh's devices, whatever the policy of the chain FORWARD.
type Forward struct{}

// Route is a route by a device of ours: in the host's namespace, or in a network's.
type Route struct {
	NS, Dev string
	Prefix  netip.Prefix // masked
}

// MeshTable is the nftables table of the host's namespace that translates published
// ports, and keeps all else that networks send from the host and from others; the
// other Mesh objects live in it.
type MeshTable struct{}

// MeshNet is a network that published ports lead into, by the host's end of its pair.
type MeshNet struct{ Dev string }

// MeshPort is a published port of the host.
type MeshPort struct {
	Bind  netip.Addr // the one address of the host that has it; invalid: all of them
	Proto model.Proto
	Port  uint16
}

// MeshRange is a range of published ports of the host, at all its addresses, that
// tasks have under the same numbers. However many ports it has, it is one element of
// a map. A state has no port in two ranges of a protocol.
type MeshRange struct {
	Proto  model.Proto
	Lo, Hi uint16 // both included
}

// MeshMasq says that the tasks behind an alias see the node's mesh address as the
// client.
type MeshMasq struct{ Alias netip.Addr }

// MeshAllow says who may connect to an alias from outside the host. Without it,
// everybody may.
type MeshAllow struct{ Alias netip.Addr }

// BackTable is the nftables table of a network's namespace that sends answers of
// the mesh to the node that they leave by; Backs live in it.
type BackTable struct{ NS string }

// Back is the block of aliases of one node.
type Back struct {
	NS    string
	Block netip.Addr // its first address
}

// TaskRoute has all that a task sends from its address Addr leave by the device
// that has it: a rule and a table of routes, whose number is the address.
type TaskRoute struct {
	Sandbox string
	Addr    netip.Addr
}

// TaskMesh is the translation of aliases to the task's own address Addr. It is part
// of the TaskTable.
type TaskMesh struct {
	Sandbox string
	Addr    netip.Addr
}

// ForwardSpec is the value of Forward.
type ForwardSpec struct{ Devices string } // how the names of the mesh's devices begin

// RouteSpec is the value of Route.
type RouteSpec struct {
	Via   netip.Addr // the next hop, taken to be on the device; none for a local route
	Local bool       // the prefix is the namespace's own: its stack takes all of it
}

// MeshTableSpec is the value of MeshTable.
type MeshTableSpec struct{ Devices string } // as ForwardSpec's

// MeshNetSpec is the value of MeshNet.
type MeshNetSpec struct {
	Source netip.Addr   // the node's mesh address, for clients whose own does not do
	Subnet netip.Prefix // of the network: addresses in it do not do
}

// MeshPortSpec is the value of MeshPort.
type MeshPortSpec struct {
	Alias netip.Addr
	To    uint16 // the task's port
}

// MeshRangeSpec is the value of MeshRange.
type MeshRangeSpec struct{ Alias netip.Addr }

// MeshMasqSpec is the value of MeshMasq.
type MeshMasqSpec struct{}

// MeshAllowSpec is the value of MeshAllow.
type MeshAllowSpec struct{ From string } // masked prefixes, separated by blanks

// BackTableSpec is the value of BackTable.
type BackTableSpec struct {
	Router model.MAC    // of the bridge itself: where tasks send their answers
	Pool   netip.Prefix // all aliases of all nodes, masked
	Bits   int          // the length of one node's block
}

// BackSpec is the value of Back: the node's mesh address as a MAC.
type BackSpec struct{ MAC model.MAC }

// TaskRouteSpec is the value of TaskRoute.
type TaskRouteSpec struct {
	Subnet  netip.Prefix // of the network, masked
	Gateway netip.Addr   // the bridge's address
	// Loose also takes packets whose answer would leave by another device
	// (rp_filter 2). Found where it is not wanted, it is no difference: a kernel may
	// give it to every device.
	Loose bool
	// Last has UDP leave by that device too which the task has no other way for:
	// servers that are bound to no address answer so where all networks are internal.
	Last bool
}

// TaskMeshSpec is the value of TaskMesh.
type TaskMeshSpec struct {
	Pool   netip.Prefix // all aliases, masked
	MAC    model.MAC    // of the task's device: which network a packet came by
	Subnet netip.Prefix // of the network, masked
	// UDP has servers answer that are bound to no address. At most one TaskMesh of
	// a task may have it.
	UDP bool
	// Default is what such a server would answer from. A plan leaves it out: whoever
	// applies finds it, and a dump shows it only where it is not the task's any more.
	Default netip.Addr
}

// Follows says whether an operation only follows the task's default route, which the
// engine gives and takes: nobody has changed what the host was given.
func (o Op) Follows() bool {
	have, ok1 := o.Have.(TaskMeshSpec)
	want, ok2 := o.Want.(TaskMeshSpec)
	differs := have.Default != want.Default
	have.Default = want.Default
	return ok1 && ok2 && differs && have == want
}

// Phase implements Key.
func (Forward) Phase() Phase   { return PhaseFilter }
func (Route) Phase() Phase     { return PhaseNeigh }
func (MeshTable) Phase() Phase { return PhaseGuard }
func (MeshNet) Phase() Phase   { return PhaseMesh }
func (MeshPort) Phase() Phase  { return PhaseMesh }
func (MeshRange) Phase() Phase { return PhaseMesh }
func (MeshMasq) Phase() Phase  { return PhaseMesh }
func (MeshAllow) Phase() Phase { return PhaseMesh }
func (BackTable) Phase() Phase { return PhaseVIP }
func (Back) Phase() Phase      { return PhaseVIP }
func (TaskRoute) Phase() Phase { return PhaseTask }
func (TaskMesh) Phase() Phase  { return PhaseTask }

// Netns implements Key.
func (Forward) Netns() string     { return "" }
func (k Route) Netns() string     { return k.NS }
func (MeshTable) Netns() string   { return "" }
func (MeshNet) Netns() string     { return "" }
func (MeshPort) Netns() string    { return "" }
func (MeshRange) Netns() string   { return "" }
func (MeshMasq) Netns() string    { return "" }
func (MeshAllow) Netns() string   { return "" }
func (k BackTable) Netns() string { return k.NS }
func (k Back) Netns() string      { return k.NS }
func (k TaskRoute) Netns() string { return "task:" + k.Sandbox }
func (k TaskMesh) Netns() string  { return "task:" + k.Sandbox }

func (Forward) String() string   { return "filter host forward" }
func (k Route) String() string   { return "route " + in(k.NS) + " " + k.Dev + " " + k.Prefix.String() }
func (MeshTable) String() string { return "mesh host" }
func (k MeshNet) String() string { return "mesh host net " + k.Dev }
func (k MeshPort) String() string {
	s := fmt.Sprintf("mesh host port %d/%s", k.Port, k.Proto)
	if k.Bind.IsValid() {
		s += " of " + k.Bind.String()
	}
	return s
}
func (k MeshRange) String() string {
	return fmt.Sprintf("mesh host ports %d-%d/%s", k.Lo, k.Hi, k.Proto)
}
func (k MeshMasq) String() string  { return "mesh host masquerade " + k.Alias.String() }
func (k MeshAllow) String() string { return "mesh host allow " + k.Alias.String() }
func (k BackTable) String() string { return "back " + in(k.NS) }
func (k Back) String() string      { return "back " + in(k.NS) + " " + k.Block.String() }
func (k TaskRoute) String() string {
	return "route task " + path.Base(k.Sandbox) + " from " + k.Addr.String()
}
func (k TaskMesh) String() string {
	return "translate task " + path.Base(k.Sandbox) + " mesh to " + k.Addr.String()
}

func (v ForwardSpec) String() string { return "devices " + v.Devices }
func (v RouteSpec) String() string {
	if v.Local {
		return "local"
	}
	return "via " + v.Via.String()
}
func (v MeshTableSpec) String() string { return "devices " + v.Devices }
func (v MeshNetSpec) String() string {
	return fmt.Sprintf("source %s subnet %s", v.Source, v.Subnet)
}
func (v MeshPortSpec) String() string  { return fmt.Sprintf("-> %s port %d", v.Alias, v.To) }
func (v MeshRangeSpec) String() string { return "-> " + v.Alias.String() }
func (MeshMasqSpec) String() string    { return "" }
func (v MeshAllowSpec) String() string { return "from " + v.From }
func (v BackTableSpec) String() string {
	return fmt.Sprintf("router %s pool %s blocks %d", v.Router, v.Pool, v.Bits)
}
func (v BackSpec) String() string { return "-> " + v.MAC.String() }
func (v TaskRouteSpec) String() string {
	s := fmt.Sprintf("subnet %s via %s", v.Subnet, v.Gateway)
	if v.Loose {
		s += " loose"
	}
	if v.Last {
		s += " last"
	}
	return s
}
func (v TaskMeshSpec) String() string {
	s := fmt.Sprintf("pool %s mac %s subnet %s", v.Pool, v.MAC, v.Subnet)
	if v.UDP {
		s += " udp"
	}
	if v.Default.IsValid() {
		s += " default " + v.Default.String()
	}
	return s
}
