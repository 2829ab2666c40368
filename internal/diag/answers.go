package diag

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sluice/lb/service"
)

// Problem is something that a person should know, and what to do about it.
type Problem struct {
	What string `json:"what"`
	Do   string `json:"do,omitempty"`
}

// Answer is what every question is answered with.
type Answer interface {
	// Text is for people: tables, ending in a newline.
	Text() string
	// Found are the problems that it names; none if all is well.
	Found() []Problem
}

// Status is how a node is.
type Status struct {
	Version  string `json:"version"`
	Alias    string `json:"alias,omitempty"` // the plugin's name in the engine
	Scope    string `json:"scope"`           // global or local
	Node     string `json:"node,omitempty"`  // swarm's id of it
	Host     string `json:"host,omitempty"`
	Role     string `json:"role"` // leader, manager, worker, or no swarm
	VTEP     string `json:"vtep,omitempty"`
	Port     uint16 `json:"vxlanPort,omitempty"`
	Engine   string `json:"engine,omitempty"` // version, empty while it does not answer
	Datapath string `json:"datapath"`
	Why      string `json:"datapathReason"`

	Kernel []KernelAbility `json:"kernel"`

	Networks  int `json:"networks"`
	Transit   int `json:"transitNetworks"` // of these: here for published ports only
	Endpoints int `json:"endpoints"`
	Services  int `json:"services"`

	Published Published `json:"published"`
	Guard     Guard     `json:"guard"`

	// Addresses are those of the pools that this node decides on.
	Addresses []AddressUse `json:"addresses"`

	Firewall string    `json:"firewall,omitempty"` // what a firewall manager has for this node
	Gossip   Gossip    `json:"gossip"`
	Loop     LoopState `json:"loop"`
	Calls    []Call    `json:"calls"` // by method, those that came
	State    StateFile `json:"stateFile"`
	Memory   uint64    `json:"residentBytes"` // of the plugin process

	Problems []Problem `json:"problems"`
}

// StateFile is how the file is that keeps a node's records.
type StateFile struct {
	Saved   bool      `json:"saved"`          // what is in memory is on disk
	Since   time.Time `json:"since,omitzero"` // since when it is not
	Damaged int       `json:"damagesFound"`   // files and records that were not believed, since the start
}

// Published counts the ports that services publish on a node.
type Published struct {
	Served int `json:"served"` // lead to tasks
	Lost   int `json:"lost"`   // another service or a process has them
	Idle   int `json:"idle"`   // neither
	// Missed counts connections that came past the rules, and were reset.
	Missed uint64 `json:"missed"`
	// Drained: the swarm has the node paused or drained. Its ports go on being
	// served, but health checks say no.
	Drained bool `json:"drained"`
}

// AddressUse is the use of one pool.
type AddressUse struct {
	Network string `json:"network,omitempty"` // empty: none has taken it yet
	Subnet  string `json:"subnet"`
	Used    int    `json:"used"` // leased, and not leaked
	Free    int    `json:"free"`
	Leaked  int    `json:"leaked"` // leased, and nobody's
}

// KernelAbility is something that the node's kernel may lack.
type KernelAbility struct {
	Name  string `json:"name"`
	Use   string `json:"use"`
	Lacks string `json:"lacks,omitempty"` // why it is lacking; empty: it is there
}

// Call is what became of the engine's calls of one method since the start.
type Call struct {
	Method  string        `json:"method"`
	Calls   uint64        `json:"calls"`
	Failed  uint64        `json:"failed"` // answered with an error, whatever the reason
	Late    uint64        `json:"late"`   // of these: took longer than the budget
	Panics  uint64        `json:"panics"` // of these: a mistake in sluice
	Total   time.Duration `json:"totalNs"`
	Longest time.Duration `json:"longestNs"`
}

// Gossip is the state of the control plane.
type Gossip struct {
	State string `json:"state"` // running, or why it is not
	Peers []Peer `json:"peers"`
}

// Peer is another node.
type Peer struct {
	Node      string `json:"node"`
	Host      string `json:"host,omitempty"`
	VTEP      string `json:"vtep,omitempty"`
	State     string `json:"state"`
	Endpoints int    `json:"endpoints"`
}

// States of a Peer.
const (
	PeerPresent = "present"
	PeerLost    = "out of contact"
)

// LoopState is the state of the reconciler.
type LoopState struct {
	Rounds    uint64        `json:"rounds"`
	Changes   uint64        `json:"changes"`
	Failures  uint64        `json:"failures"`
	Drift     uint64        `json:"drift"` // objects mended that others had changed
	LastRound time.Duration `json:"lastRoundNs"`
	ReadBack  time.Time     `json:"readBack"` // when the kernel was last read
	// DriftByKind is Drift by kind of object: link, fdb, neighbour, route, address,
	// nftables, iptables, ipvs, sysctl, netns.
	DriftByKind map[string]uint64 `json:"driftByKind,omitempty"`
}

// Found implements Answer.
func (s Status) Found() []Problem { return s.Problems }

// Text implements Answer.
func (s Status) Text() string {
	var b strings.Builder
	t := table(&b)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("node", "%s (%s), %s", orDash(s.Host), orDash(s.Node), s.Role)
	row("plugin", "%s, version %s, scope %s, %.1f MiB resident", orDash(s.Alias), s.Version, s.Scope, float64(s.Memory)/(1<<20))
	row("engine", "%s", orElse(s.Engine, "does not answer"))
	if s.Scope == "global" {
		row("data path", "VTEP %s, UDP port %d", orDash(s.VTEP), s.Port)
	}
	row("service VIPs", "%s: %s", s.Datapath, s.Why)
	for _, k := range s.Kernel {
		if k.Lacks == "" {
			row("kernel has", "%s: %s", k.Name, k.Use)
		} else {
			row("kernel lacks", "%s: %s (%s)", k.Name, k.Use, k.Lacks)
		}
	}
	transit := ""
	if s.Transit > 0 {
		transit = fmt.Sprintf(" (%d for published ports only)", s.Transit)
	}
	row("serving", "%d networks%s, %d endpoints here, %d services", s.Networks, transit, s.Endpoints, s.Services)
	if p := s.Published; p != (Published{}) {
		row("published", "%s", p.text())
	}
	if s.Guard.Dropped > 0 {
		row("guard", "%s", s.Guard.text())
	}
	row("kernel", "%d changes made, %d refused, drift mended %s, read back %s", s.Loop.Changes, s.Loop.Failures, s.Loop.drift(), ago(s.Loop.ReadBack))
	if len(s.Calls) > 0 {
		row("calls", "%s", calls(s.Calls))
	}
	if s.Scope == "global" {
		row("gossip", "%s", s.Gossip.State)
	}
	if s.Firewall != "" {
		row("firewall", "%s", s.Firewall)
	}
	t.Flush()
	if len(s.Gossip.Peers) > 0 {
		b.WriteString("\n")
		t = table(&b)
		fmt.Fprintln(t, "PEER\tHOST\tVTEP\tSTATE\tENDPOINTS")
		for _, p := range s.Gossip.Peers {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\n", p.Node, orDash(p.Host), orDash(p.VTEP), p.State, p.Endpoints)
		}
		t.Flush()
	}
	problems(&b, s.Problems)
	return b.String()
}

// drift is the count, with its parts if there are any.
func (l LoopState) drift() string {
	text := strconv.FormatUint(l.Drift, 10)
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(l.DriftByKind)) {
		if n := l.DriftByKind[kind]; n > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", kind, n))
		}
	}
	if len(parts) > 0 {
		text += " (" + strings.Join(parts, ", ") + ")"
	}
	return text
}

// text is one line about published ports.
func (p Published) text() string {
	text := fmt.Sprintf("%d ports served, %d lost to others, %d that lead nowhere now", p.Served, p.Lost, p.Idle)
	if p.Missed > 0 {
		text += fmt.Sprintf(", %d connections missed", p.Missed)
	}
	if p.Drained {
		text += "; the swarm has the node paused or drained, so health checks say no"
	}
	return text
}

// published counts ports, each of a range by itself.
func published(ps []Port, missed uint64, drained bool) Published {
	out := Published{Missed: missed, Drained: drained}
	for _, p := range ps {
		n := p.size()
		switch p.State {
		case PortServed:
			out.Served += n
		case PortLost:
			out.Lost += n
		default:
			out.Idle += n
		}
	}
	return out
}

// calls is one line about the engine's calls.
func calls(cs []Call) string {
	var sum, longest Call
	for _, c := range cs {
		sum.Calls, sum.Failed, sum.Late, sum.Panics = sum.Calls+c.Calls, sum.Failed+c.Failed, sum.Late+c.Late, sum.Panics+c.Panics
		if c.Longest >= longest.Longest {
			longest = c
		}
	}
	text := fmt.Sprintf("%d of the engine, %d with an error (%d late), longest %s %s", sum.Calls, sum.Failed, sum.Late, longest.Method, longest.Longest.Round(time.Millisecond))
	if sum.Panics > 0 {
		text += fmt.Sprintf("; %d by a mistake in sluice, see its log", sum.Panics)
	}
	return text
}

// Networks lists the networks of a node, and those of the swarm that were refused.
type Networks struct {
	Networks []Network `json:"networks"`
	Problems []Problem `json:"problems"`
}

// Network is one network.
type Network struct {
	ID        string `json:"id"`
	Name      string `json:"name,omitempty"`
	State     string `json:"state"` // here, transit (here for published ports only), elsewhere (known to the manager only), refused, not allocated
	Subnet    string `json:"subnet,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
	VNI       uint32 `json:"vni,omitempty"`
	MTU       int    `json:"mtu,omitempty"`
	Scheduler string `json:"scheduler,omitempty"`
	Netns     string `json:"netns,omitempty"`
	Local     int    `json:"localEndpoints"`
	Remote    int    `json:"remoteEndpoints"`
	Used      int    `json:"addressesUsed,omitempty"` // known to the leader only
	Size      int    `json:"addresses,omitempty"`
	Refused   string `json:"refused,omitempty"`
	Entry     string `json:"entry,omitempty"` // this node's address in it, for published ports
	Number    uint16 `json:"entryNumber,omitempty"`
}

// Found implements Answer.
func (n Networks) Found() []Problem { return n.Problems }

// Text implements Answer.
func (n Networks) Text() string {
	var b strings.Builder
	t := table(&b)
	fmt.Fprintln(t, "NETWORK\tID\tSTATE\tSUBNET\tVNI\tMTU\tSCHEDULER\tHERE\tREMOTE\tADDRESSES\tENTRY\tNAMESPACE")
	for _, x := range n.Networks {
		vni, mtu, used, entry := "-", "-", "-", "-"
		if x.Entry != "" {
			entry = fmt.Sprintf("%s number %d", x.Entry, x.Number)
		}
		if x.VNI != 0 {
			vni = fmt.Sprint(x.VNI)
		}
		if x.MTU != 0 {
			mtu = fmt.Sprint(x.MTU)
		}
		if x.Size != 0 {
			used = fmt.Sprintf("%d of %d", x.Used, x.Size)
		}
		fmt.Fprintf(t, "%s\t%.12s\t%s\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n",
			orDash(x.Name), x.ID, x.State, orDash(x.Subnet), vni, mtu, orDash(x.Scheduler), x.Local, x.Remote, used, entry, orDash(x.Netns))
	}
	t.Flush()
	problems(&b, n.Problems)
	return b.String()
}

// Services lists the services on the networks of a node.
type Services struct {
	Services []Service `json:"services"`
	Ports    []Port    `json:"published"` // of this node, those that services have and those that they have lost
	Problems []Problem `json:"problems"`
}

// Service is a service on one network.
type Service struct {
	Name      string    `json:"name"`
	ID        string    `json:"id"`
	Network   string    `json:"network"`
	VIP       string    `json:"vip,omitempty"` // empty: endpoint mode dnsrr
	Datapath  string    `json:"datapath"`
	Mode      string    `json:"mode"`
	Scheduler string    `json:"scheduler"` // asked for
	Backends  []Backend `json:"backends"`

	SchedulerUsed   string `json:"schedulerUsed"` // by this node
	SchedulerReason string `json:"schedulerReason,omitempty"`
}

// Backend is a task of a service.
type Backend struct {
	Addr   string `json:"addr"`
	Task   string `json:"task"`
	Node   string `json:"node"`
	Weight int    `json:"weight"`
	State  string `json:"state"` // StateReady, or why not
}

// StateReady is that of a backend that gets new connections.
const StateReady = "ready"

// Found implements Answer.
func (s Services) Found() []Problem { return s.Problems }

// Text implements Answer.
func (s Services) Text() string {
	var b strings.Builder
	t := table(&b)
	fmt.Fprintln(t, "SERVICE\tNETWORK\tVIP\tDATAPATH\tMODE\tSCHEDULER\tBACKEND\tNODE\tWEIGHT\tSTATE")
	for _, x := range s.Services {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t", orElse(x.Name, x.ID), x.Network, orElse(x.VIP, "none (dnsrr)"), x.Datapath, x.Mode, x.SchedulerUsed)
		if len(x.Backends) == 0 {
			fmt.Fprintln(t, "-\t-\t-\trefuses: no backends")
		}
		for i, be := range x.Backends {
			if i > 0 {
				fmt.Fprint(t, "\t\t\t\t\t\t")
			}
			fmt.Fprintf(t, "%s\t%s\t%d\t%s\n", be.Addr, be.Node, be.Weight, be.State)
		}
	}
	t.Flush()
	if len(s.Ports) > 0 {
		b.WriteString("\n")
		portTable(&b, s.Ports)
	}
	notes := "\n"
	for _, x := range s.Services {
		if x.SchedulerUsed != x.Scheduler {
			b.WriteString(notes + "note: " + orElse(x.Name, x.ID) + " on " + x.Network + " asks for scheduler " + scheduling(x.Scheduler, x.SchedulerUsed, x.SchedulerReason) + "\n")
			notes = ""
		}
	}
	problems(&b, s.Problems)
	return b.String()
}

// Diff is the difference between what the kernel should have and what it has.
type Diff struct {
	Changes  []string  `json:"changes"` // + to be made, ~ to be changed, - to be removed
	Problems []Problem `json:"problems"`
}

// Found implements Answer.
func (d Diff) Found() []Problem { return d.Problems }

// Text implements Answer.
func (d Diff) Text() string {
	var b strings.Builder
	if len(d.Changes) == 0 {
		b.WriteString("no difference: the kernel has what it should\n")
	}
	for _, c := range d.Changes {
		b.WriteString(c + "\n")
	}
	problems(&b, d.Problems)
	return b.String()
}

// Settings lists the plugin's settings.
type Settings struct {
	Settings []Setting `json:"settings"`
}

// Setting is one setting of the plugin.
type Setting struct {
	Name    string `json:"name"`
	Value   string `json:"value"`   // redacted if it is a secret
	Default bool   `json:"default"` // nobody set it
	Doc     string `json:"doc"`
}

// Found implements Answer; settings that are wrong keep the plugin from answering.
func (Settings) Found() []Problem { return nil }

// Text implements Answer.
func (s Settings) Text() string {
	var b strings.Builder
	t := table(&b)
	fmt.Fprintln(t, "SETTING\tVALUE\tSET BY")
	for _, x := range s.Settings {
		by := "you"
		if x.Default {
			by = "default"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", x.Name, orDash(x.Value), by)
	}
	t.Flush()
	return b.String()
}

func table(b *strings.Builder) *tabwriter.Writer { return tabwriter.NewWriter(b, 0, 8, 2, ' ', 0) }

func problems(b *strings.Builder, ps []Problem) {
	if len(ps) > 0 {
		b.WriteString("\nPROBLEMS\n")
	}
	for _, p := range ps {
		b.WriteString("- " + p.What + "\n")
		if p.Do != "" {
			b.WriteString("  " + p.Do + "\n")
		}
	}
}

func orDash(s string) string { return orElse(s, "-") }

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// ago is a time as a distance, in whole seconds.
func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return time.Since(t).Round(time.Second).String() + " ago"
}

// backend converts a planned backend; names are those of the nodes.
func backend(b service.Backend, names map[string]string) Backend {
	node := b.Node
	if b.Local {
		node = ""
	}
	return Backend{Addr: b.Addr.String(), Task: string(b.Task), Node: orElse(names[string(node)], string(node)), Weight: b.Weight, State: orElse(b.Why, StateReady)}
}
