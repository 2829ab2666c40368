package diag

import (
	"fmt"
	"strings"

	"sluice/internal/kernel"
)

// Entry is where a service is entered: what its virtual IP leads to on this
// node, and what the kernel has counted.
type Entry struct {
	Name     string         `json:"name"`
	ID       string         `json:"id"`
	Networks []EntryNetwork `json:"networks"` // of this node that have the service, or the one asked for
	Problems []Problem      `json:"problems"`
}

// EntryNetwork is the entry of a service on one network.
type EntryNetwork struct {
	Network string   `json:"network"`
	ID      string   `json:"id"`
	Netns   string   `json:"netns"`         // its name below /run/netns
	VIP     string   `json:"vip,omitempty"` // empty: endpoint mode dnsrr, or not known
	Ports   []string `json:"ports"`         // that the VIP has, as of sluice.ports; none: all
	Mode    string   `json:"mode"`          // asked for; what is used is each backend's Method

	Scheduler       string `json:"scheduler"`     // asked for
	SchedulerUsed   string `json:"schedulerUsed"` // by this node
	SchedulerReason string `json:"schedulerReason,omitempty"`
	Datapath        string `json:"datapath"`
	DatapathReason  string `json:"datapathReason"`

	Persist     int  `json:"persistSeconds,omitempty"`
	PersistBits int  `json:"persistBits,omitempty"`
	OnePacket   bool `json:"onePacket,omitempty"`
	Upper       int  `json:"upperConnections,omitempty"`
	Lower       int  `json:"lowerConnections,omitempty"`
	Idle        int  `json:"idleSeconds,omitempty"`
	Drain       int  `json:"drainSeconds,omitempty"`
	SlowStart   int  `json:"slowStartSeconds,omitempty"`
	// Ended is how many connections to tasks on this node were silent for Idle, or
	// open when a task had left for Drain, since the plugin started.
	Ended uint64 `json:"idleEnded,omitempty"`

	// Traffic is that of the VIP: of all its IPVS services, or of nftables, which
	// counts choices only. Absent: not known.
	Traffic *Traffic `json:"traffic,omitempty"`
	// Published are the ports of this node that the service publishes on the network,
	// Alias is what those that it has lead to, and AliasTraffic is that of it.
	Published    []Port   `json:"published"`
	Alias        string   `json:"alias,omitempty"`
	AliasTraffic *Traffic `json:"aliasTraffic,omitempty"`
	// Uncounted is why Traffic is absent here or at the backends.
	Uncounted string         `json:"uncounted,omitempty"`
	Backends  []EntryBackend `json:"backends"`
	IPVS      []EntryIPVS    `json:"ipvs"` // on datapath ipvs, what ipvsadm shows
	// Compare is a command for root that prints what the kernel itself has.
	Compare string `json:"compare"`
}

// EntryBackend is a backend, and its traffic in all IPVS services of the VIP.
type EntryBackend struct {
	Backend
	Method  string   `json:"method,omitempty"` // dr, nat or tun; empty: it has no place here
	Traffic *Traffic `json:"traffic,omitempty"`
}

// EntryIPVS is a service of IPVS, which is what one mark leads to.
type EntryIPVS struct {
	Mark         uint32      `json:"mark"`               // FWM in ipvsadm, which prints it signed
	Unmarked     bool        `json:"unmarked,omitempty"` // no packet gets the mark: open connections go on, nobody takes new ones
	Client       string      `json:"client,omitempty"`   // the backend of this node that it is for; empty: all others
	Port         string      `json:"port,omitempty"`     // like 80/tcp; empty: all
	Proto        string      `json:"proto,omitempty"`    // of all ports; empty: all that have no service of their own
	Scheduler    string      `json:"scheduler"`
	Flags        string      `json:"flags,omitempty"`
	Traffic      *Traffic    `json:"traffic,omitempty"` // absent: not read, or not in the kernel
	Destinations []EntryDest `json:"destinations"`
}

// EntryDest is a destination of a service of IPVS.
type EntryDest struct {
	Addr    string   `json:"addr"` // with port, as ipvsadm writes it; 0 is the client's
	Method  string   `json:"method"`
	Weight  int      `json:"weight"`
	Traffic *Traffic `json:"traffic,omitempty"`
}

// Traffic is what the kernel has counted, since it has had the object. Its
// fields are kernel.Traffic's, so that one converts to the other.
type Traffic struct {
	Connections uint64 `json:"connections"`
	PacketsIn   uint64 `json:"packetsIn"`
	PacketsOut  uint64 `json:"packetsOut"`
	BytesIn     uint64 `json:"bytesIn"`
	BytesOut    uint64 `json:"bytesOut"`
	Active      int    `json:"active"` // now
	Inactive    int    `json:"inactive"`
}

// plus is the sum of what was counted at two objects; nil is not known.
func (t *Traffic) plus(o *Traffic) *Traffic {
	if t == nil || o == nil {
		if t == nil {
			return o
		}
		return t
	}
	return &Traffic{
		Connections: t.Connections + o.Connections,
		PacketsIn:   t.PacketsIn + o.PacketsIn, PacketsOut: t.PacketsOut + o.PacketsOut,
		BytesIn: t.BytesIn + o.BytesIn, BytesOut: t.BytesOut + o.BytesOut,
		Active: t.Active + o.Active, Inactive: t.Inactive + o.Inactive,
	}
}

// now and total are columns of a table, under nowHead and totalHead.
func (t *Traffic) now() string {
	if t == nil {
		return "-\t-"
	}
	return fmt.Sprintf("%d\t%d", t.Active, t.Inactive)
}

func (t *Traffic) total() string {
	if t == nil {
		return "-\t-\t-\t-\t-"
	}
	return fmt.Sprintf("%d\t%d\t%d\t%d\t%d", t.Connections, t.PacketsIn, t.PacketsOut, t.BytesIn, t.BytesOut)
}

// The names of ipvsadm's columns, in its order: a person has both side by side.
const (
	nowHead   = "ACTIVE\tINACT"
	totalHead = "CONNS\tINPKTS\tOUTPKTS\tINBYTES\tOUTBYTES"
)

// Found implements Answer.
func (e Entry) Found() []Problem { return e.Problems }

// Text implements Answer.
func (e Entry) Text() string {
	var b strings.Builder
	for i := range e.Networks {
		if i > 0 {
			b.WriteString("\n")
		}
		e.Networks[i].text(&b, orElse(e.Name, e.ID)+" ("+e.ID+")")
	}
	problems(&b, e.Problems)
	return b.String()
}

func (n *EntryNetwork) text(b *strings.Builder, title string) {
	t := table(b)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("service", "%s", title)
	row("network", "%s (%s), namespace %s", n.Network, n.ID, n.Netns)
	switch {
	case n.VIP == "":
		row("VIP", "none")
	case len(n.Ports) == 0:
		row("VIP", "%s, all ports", n.VIP)
	default:
		row("VIP", "%s, ports %s", n.VIP, strings.Join(n.Ports, " "))
	}
	row("mode", "%s", n.Mode)
	row("scheduler", "%s", scheduling(n.Scheduler, n.SchedulerUsed, n.SchedulerReason))
	row("datapath", "%s: %s", n.Datapath, n.DatapathReason)
	head := "options"
	for _, o := range n.options() {
		row(head, "%s", o)
		head = ""
	}
	if n.VIP != "" {
		row("counted", "%s", countedText(n.Traffic, n.Uncounted, "by clients on this node"))
	}
	if n.Alias != "" {
		row("published", "alias %s: %s; see sluice entry", n.Alias, orElse(countedText(n.AliasTraffic, "", "by published ports of this node"), "not counted"))
	}
	t.Flush()
	if len(n.Published) > 0 {
		b.WriteString("\n")
		portTable(b, n.Published)
	}

	b.WriteString("\n")
	t = table(b)
	fmt.Fprintln(t, "BACKEND\tNODE\tTASK\tMETHOD\tWEIGHT\tSTATE\t"+nowHead+"\t"+totalHead)
	for _, x := range n.Backends {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", x.Addr, x.Node, orDash(x.Task), orDash(x.Method), x.Weight, x.State, x.Traffic.now(), x.Traffic.total())
	}
	if len(n.Backends) == 0 {
		fmt.Fprintln(t, "none")
	}
	t.Flush()
	if len(n.IPVS) > 0 {
		b.WriteString("\n")
		ipvsTable(table(b), n.IPVS)
	}
	if n.VIP != "" {
		b.WriteString("\ncompare with: " + n.Compare + "\n")
	}
}

// options are those that say how long and how many, for people.
func (n *EntryNetwork) options() []string {
	var out []string
	if n.Persist > 0 {
		out = append(out, fmt.Sprintf("a client, which is a /%d, keeps its backend for %d s", n.PersistBits, n.Persist))
	}
	if n.OnePacket {
		out = append(out, "each UDP packet is balanced by itself")
	}
	if n.Upper > 0 {
		limit := fmt.Sprintf("a backend gets at most %d connections", n.Upper)
		if n.Lower > 0 {
			limit += fmt.Sprintf(" and then none until it has fewer than %d", n.Lower)
		}
		out = append(out, limit)
	}
	if n.Idle > 0 {
		out = append(out, fmt.Sprintf("connections that are silent for %d s are ended", n.Idle))
	}
	if n.Drain > 0 {
		out = append(out, fmt.Sprintf("connections of a task are ended when it has been leaving for %d s", n.Drain))
	}
	if n.SlowStart > 0 {
		out = append(out, fmt.Sprintf("a task gets up to its share over %d s", n.SlowStart))
	}
	if n.Idle > 0 || n.Drain > 0 {
		out = append(out, fmt.Sprintf("connections ended so far to tasks on this node: %d", n.Ended))
	}
	return out
}

// clients says whose packets have the mark.
func (s *EntryIPVS) clients() string {
	who := "everybody"
	switch {
	case s.Unmarked && s.Client != "":
		who = "what is open of client " + s.Client
	case s.Unmarked:
		who = "what is open"
	case s.Client != "":
		who = "client " + s.Client
	}
	if s.Port != "" {
		who += " port " + s.Port
	}
	if s.Proto != "" {
		who += ", " + s.Proto
	}
	return who
}

// scheduling is what was asked for, and what is used if that is another.
func scheduling(asked, used, why string) string {
	if used == asked {
		return asked
	}
	return fmt.Sprintf("%s; here %s: %s", asked, used, why)
}

// counted converts what the kernel has counted for an object, if it has it.
func counted(all map[kernel.Key]kernel.Traffic, k kernel.Key) *Traffic {
	t, there := all[k]
	if !there {
		return nil
	}
	out := Traffic(t)
	return &out
}
