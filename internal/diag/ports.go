package diag

import (
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Ports are the published ports of a node.
type Ports struct {
	Asked    string    `json:"asked,omitempty"` // the port, as it was asked for; empty: all
	Ports    []Port    `json:"ports"`           // those that services have, then those that they have lost
	Problems []Problem `json:"problems"`
}

// Port is a run of ports that a service publishes on a node, and what became of it.
type Port struct {
	Port      string `json:"port"`           // 81/tcp, or 8000-8010/udp
	Addr      string `json:"addr,omitempty"` // of the node; empty: all
	To        string `json:"to"`             // the task's: 80, or 9000-9010
	Service   string `json:"service"`
	ServiceID string `json:"serviceId"`
	Network   string `json:"network"`
	NetworkID string `json:"networkId"`
	State     string `json:"state"`
	Why       string `json:"why,omitempty"`   // the state is what it is
	Owner     *Owner `json:"owner,omitempty"` // who has it instead
	Path      *Path  `json:"path,omitempty"`  // of a port that was asked for by its number
}

// States of a published port.
const (
	PortServed  = "served"    // it leads to a task
	PortRefuses = "refuses"   // it leads to none, and says so at once
	PortLost    = "lost"      // another has it
	PortWaits   = "waits"     // something is not there yet
	PortFailed  = "failed"    // the kernel refuses something, or there is no room
	PortAbsent  = "elsewhere" // the address is another node's
)

// Owner is who has a port.
type Owner struct {
	Kind string `json:"kind"` // service or process
	Name string `json:"name"`
	ID   string `json:"id,omitempty"` // of a service
}

// Kinds of an Owner.
const (
	OwnerService = "service"
	OwnerProcess = "process"
)

// Path is the way of a connection to a published port of this node: in, and back.
type Path struct {
	Alias  string `json:"alias"` // what the port is translated to
	Block  string `json:"block"` // this node's of the mesh's pool, for the network
	Number uint16 `json:"number"`
	Entry  string `json:"entry"`  // this node's address in the network
	MAC    string `json:"mac"`    // of that address: where answers are sent
	Device string `json:"device"` // the host's end of the way into the network
	Peer   string `json:"peer"`   // the other end, in Netns
	Netns  string `json:"netns"`  // its name below /run/netns
	// Transit: the network is on this node for published ports only.
	Transit        bool     `json:"transit"`
	VIP            string   `json:"vip,omitempty"` // of the service; empty: endpoint mode dnsrr
	Datapath       string   `json:"datapath"`
	DatapathReason string   `json:"datapathReason"`
	Scheduler      string   `json:"scheduler"`
	Source         string   `json:"source"`          // keep or masquerade
	Allow          []string `json:"allow,omitempty"` // clients; none: all

	Hops []Hop `json:"hops"` // in the order of a packet, and back

	Traffic   *Traffic    `json:"traffic,omitempty"`   // of the alias: all published ports of the service here
	Uncounted string      `json:"uncounted,omitempty"` // why Traffic is absent here or at the backends
	Backends  []PathEnd   `json:"backends"`
	IPVS      []EntryIPVS `json:"ipvs"`    // on datapath ipvs, what ipvsadm shows for the alias
	Compare   []string    `json:"compare"` // commands for root that print what the kernel itself has
}

// Hop is one place on the way.
type Hop struct {
	At     string `json:"at"`
	Does   string `json:"does"`
	Kernel string `json:"kernel"` // whether the kernel has what does it
}

// PathEnd is a task behind a published port.
type PathEnd struct {
	EntryBackend
	Port string `json:"port"` // the task's
	Way  string `json:"way"`  // from the bridge of this node's namespace
}

// Found implements Answer.
func (p Ports) Found() []Problem { return p.Problems }

// Text implements Answer.
func (p Ports) Text() string {
	var b strings.Builder
	if p.Asked == "" {
		portTable(&b, p.Ports)
	}
	for i := range p.Ports {
		if p.Asked != "" {
			if i > 0 {
				b.WriteString("\n")
			}
			p.Ports[i].text(&b)
		}
	}
	problems(&b, p.Problems)
	return b.String()
}

// portTable is a table of ports, which says so if there is none.
func portTable(b *strings.Builder, ps []Port) {
	if len(ps) == 0 {
		b.WriteString("no service publishes a port on this node\n")
		return
	}
	t := table(b)
	fmt.Fprintln(t, "PORT\tADDRESS\tTO\tSERVICE\tNETWORK\tSTATE\tOWNER\tWHY")
	for _, x := range ps {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", x.Port, orElse(x.Addr, "all"), x.To, orElse(x.Service, x.ServiceID), x.Network, x.State, x.owner(), x.Why)
	}
	t.Flush()
}

// size is how many ports x is.
func (x *Port) size() int {
	ports, _, _ := strings.Cut(x.Port, "/")
	lo, hi, ranged := strings.Cut(ports, "-")
	a, errA := strconv.Atoi(lo)
	b, errB := strconv.Atoi(hi)
	if !ranged || errA != nil || errB != nil {
		return 1
	}
	return b - a + 1
}

// owner is who has a port, in words.
func (x *Port) owner() string {
	if x.Owner == nil {
		return "service " + orElse(x.Service, x.ServiceID)
	}
	return x.Owner.Kind + " " + orElse(x.Owner.Name, x.Owner.ID)
}

func (x *Port) text(b *strings.Builder) {
	t := table(b)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	at := "all addresses"
	if x.Addr != "" {
		at = x.Addr
	}
	row("port", "%s of %s, to port %s of a task", x.Port, at, x.To)
	row("service", "%s (%s)", orElse(x.Service, x.ServiceID), x.ServiceID)
	row("network", "%s (%s)", x.Network, x.NetworkID)
	state := x.State
	if x.Why != "" {
		state += ": " + x.Why
	}
	row("state", "%s", state)
	row("owner", "%s", x.owner())
	if x.Path != nil {
		x.Path.rows(row)
	}
	t.Flush()
	if x.Path != nil {
		x.Path.text(b)
	}
}

func (p *Path) rows(row func(name, format string, args ...any)) {
	here := "for tasks here, too"
	if p.Transit {
		here = "for published ports only"
	}
	row("namespace", "%s, %s", p.Netns, here)
	row("entry", "%s, number %d: block %s", p.Entry, p.Number, p.Block)
	row("alias", "%s", p.Alias)
	row("VIP", "%s", orElse(p.VIP, "none (dnsrr)"))
	row("datapath", "%s: %s", p.Datapath, p.DatapathReason)
	row("scheduler", "%s", p.Scheduler)
	row("source", "%s", p.Source)
	if len(p.Allow) > 0 {
		row("clients", "%s", strings.Join(p.Allow, " "))
	}
	row("counted", "%s", countedText(p.Traffic, p.Uncounted, "for the alias, which is all published ports of the service here"))
}

func (p *Path) text(b *strings.Builder) {
	b.WriteString("\n")
	t := table(b)
	fmt.Fprintln(t, "\tHOP\tDOES\tKERNEL")
	for i, h := range p.Hops {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\n", i+1, h.At, h.Does, h.Kernel)
	}
	t.Flush()
	b.WriteString("\n")
	t = table(b)
	fmt.Fprintln(t, "BACKEND\tNODE\tTASK\tWAY\tMETHOD\tWEIGHT\tSTATE\t"+nowHead+"\t"+totalHead)
	for _, x := range p.Backends {
		fmt.Fprintf(t, "%s:%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", x.Addr, x.Port, x.Node, orDash(x.Task), x.Way, orDash(x.Method), x.Weight, x.State, x.Traffic.now(), x.Traffic.total())
	}
	if len(p.Backends) == 0 {
		fmt.Fprintln(t, "none")
	}
	t.Flush()
	if len(p.IPVS) > 0 {
		b.WriteString("\n")
		ipvsTable(table(b), p.IPVS)
	}
	for _, c := range p.Compare {
		b.WriteString("\ncompare with: " + c)
	}
	b.WriteString("\n")
}

// ipvsTable prints services of IPVS, and flushes t.
func ipvsTable(t *tabwriter.Writer, all []EntryIPVS) {
	fmt.Fprintln(t, "IPVS\tFOR\tSCHEDULER\tWEIGHT\t"+nowHead+"\t"+totalHead)
	for _, s := range all {
		// Signed, as ipvsadm prints a mark: larger ones are negative there.
		fmt.Fprintf(t, "FWM %d\t%s\t%s\t\t\t\t%s\n", int32(s.Mark), s.clients(), strings.TrimSuffix(s.Scheduler+" "+s.Flags, " "), s.Traffic.total())
		for _, d := range s.Destinations {
			fmt.Fprintf(t, "-> %s\t\t%s\t%d\t%s\t%s\n", d.Addr, d.Method, d.Weight, d.Traffic.now(), d.Traffic.total())
		}
	}
	t.Flush()
}

// countedText says what was counted, and whose it is.
func countedText(c *Traffic, uncounted, whose string) string {
	if c == nil {
		return uncounted
	}
	text := fmt.Sprintf("%d connections begun", c.Connections)
	if c.PacketsIn > 0 || c.PacketsOut > 0 {
		text += fmt.Sprintf(", %d packets (%d bytes) in, %d (%d) out", c.PacketsIn, c.BytesIn, c.PacketsOut, c.BytesOut)
	}
	text += ", " + whose
	if uncounted != "" {
		text += "; " + uncounted
	}
	return text
}
