package kernel

import (
	"fmt"
	"net/netip"
	"path"

	"sluice/internal/model"
)

// What a task's namespace has for the virtual IPs that the task serves; for published
// ports see mesh.go.

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
func (TaskTable) Phase() Phase  { return PhaseTask }
func (TaskVIP) Phase() Phase    { return PhaseTask }
func (TaskPort) Phase() Phase   { return PhaseTask }
func (TaskTunnel) Phase() Phase { return PhaseTask }

// Netns implements Key.
func (k TaskTable) Netns() string  { return "task:" + k.Sandbox }
func (k TaskVIP) Netns() string    { return "task:" + k.Sandbox }
func (k TaskPort) Netns() string   { return "task:" + k.Sandbox }
func (k TaskTunnel) Netns() string { return "task:" + k.Sandbox }

func (k TaskTable) String() string { return "translate task " + path.Base(k.Sandbox) }
func (k TaskVIP) String() string {
	return "translate task " + path.Base(k.Sandbox) + " vip " + k.VIP.String()
}
func (k TaskPort) String() string {
	return fmt.Sprintf("translate task %s vip %s port %d/%s", path.Base(k.Sandbox), k.VIP, k.Port, k.Proto)
}
func (k TaskTunnel) String() string {
	return "tunnel task " + path.Base(k.Sandbox) + " to " + k.Addr.String()
}

func (TaskTableSpec) String() string { return "" }
func (v TaskVIPSpec) String() string {
	if v.Loop {
		return "to " + v.Addr.String() + " loop"
	}
	return "to " + v.Addr.String()
}
func (v TaskPortSpec) String() string {
	s := fmt.Sprintf("to %s port %d", v.Addr, v.To)
	if v.Loop {
		s += " loop"
	}
	return s
}
func (TaskTunnelSpec) String() string { return "" }
