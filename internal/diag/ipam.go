package diag

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// IPAM is who has which address.
type IPAM struct {
	Source   string     `json:"source"` // what the answer is made of, one of the sources below
	Pools    []IPAMPool `json:"pools"`
	Problems []Problem  `json:"problems"`
}

// Sources of an IPAM answer.
const (
	IPAMLeases     = "leases"     // this node decides: its leases, compared with the managers' lists
	IPAMLists      = "lists"      // a manager that does not lead: the lists
	IPAMContainers = "containers" // a worker: the containers that it knows of
)

// IPAMPool is one subnet.
type IPAMPool struct {
	Network   string `json:"network,omitempty"` // empty: no network has taken it yet
	NetworkID string `json:"networkId,omitempty"`
	Pool      string `json:"pool,omitempty"`   // its id; empty: there are no leases of it here
	Driver    string `json:"driver,omitempty"` // who gives its addresses, if not sluice
	Subnet    string `json:"subnet,omitempty"`
	Range     string `json:"range,omitempty"` // --ip-range
	Gateway   string `json:"gateway,omitempty"`
	Nodes     string `json:"nodes,omitempty"` // kept for nodes

	Used   int `json:"used"`   // leased, and not leaked; without leases: had by somebody
	Free   int `json:"free"`   // can be handed out; known where the leases are
	Kept   int `json:"kept"`   // for nodes; known where the leases are
	Leaked int `json:"leaked"` // leased, and nobody's
	Double int `json:"double"` // had by two

	Addresses []IPAMAddress `json:"addresses"`
}

// IPAMAddress is an address and who has it.
type IPAMAddress struct {
	Address string `json:"address"`
	State   string `json:"state"` // used, listed, unclaimed, leaked, unconfirmed, not leased, double
	Owner   string `json:"owner,omitempty"`
	Node    string `json:"node,omitempty"`
	// Since is when nobody was first found to have it.
	Since time.Time `json:"since,omitzero"`
}

// Found implements Answer.
func (a IPAM) Found() []Problem { return a.Problems }

// Text implements Answer.
func (a IPAM) Text() string {
	var b strings.Builder
	t := table(&b)
	fmt.Fprintln(t, "NETWORK\tSUBNET\tRANGE\tGATEWAY\tUSED\tFREE\tKEPT FOR NODES\tLEAKED\tDOUBLE")
	for _, p := range a.Pools {
		free, kept, leaked := "-", "-", "-"
		if p.Pool != "" {
			free, leaked = fmt.Sprint(p.Free), fmt.Sprint(p.Leaked)
			if p.Nodes != "" {
				kept = fmt.Sprintf("%d (%s)", p.Kept, p.Nodes)
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%d\n", orElse(p.Network, "none yet"), orDash(p.Subnet), orElse(p.Range, "all"), orDash(p.Gateway), p.Used, free, kept, leaked, p.Double)
	}
	t.Flush()
	b.WriteString("\n")
	t = table(&b)
	fmt.Fprintln(t, "NETWORK\tADDRESS\tSTATE\tOWNER\tNODE")
	for _, p := range a.Pools {
		for _, x := range p.Addresses {
			owner := orElse(x.Owner, "nobody")
			if !x.Since.IsZero() {
				owner += ", found " + ago(x.Since)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", orElse(p.Network, "none yet"), x.Address, x.State, owner, orDash(x.Node))
		}
	}
	t.Flush()
	for _, p := range a.Pools {
		if p.Driver != "" {
			fmt.Fprintf(&b, "\nnote: the addresses of network %s are given by IPAM driver %q, not by sluice\n", p.Network, p.Driver)
		}
	}
	switch a.Source {
	case IPAMLists:
		b.WriteString("\nnote: this manager does not lead. These are the managers' lists; what is leased, free or leaked, the leader knows\n")
	case IPAMContainers:
		b.WriteString("\nnote: this node is no manager. These are the containers that it knows of; ask the swarm's leader\n")
	}
	problems(&b, a.Problems)
	return b.String()
}

// IPAM answers who has which address.
func (s *Server) IPAM() IPAM {
	v, e := s.cfg.Hub.View(), s.cfg.Hub.Engine()
	out := IPAM{Source: s.ipamSource(e), Pools: []IPAMPool{}, Problems: []Problem{}}
	if s.cfg.Scope == "global" && e.Manager && !e.ServicesValid {
		out.Problems = append(out.Problems, Problem{
			What: "the managers' lists cannot be read now: whether addresses are leaked or double is not known",
			Do:   "docker node ls says whether the swarm has a leader; ask again when it has",
		})
	}
	now := time.Now()
	holding := holding(v)
	done := make(map[model.NetworkID]bool)
	add := func(l pool.Listing) {
		p, bad := s.accounts(v, e, l, out.Source, holding[l.Network], now)
		out.Pools, out.Problems = append(out.Pools, p), append(out.Problems, bad...)
		done[l.Network] = true
	}
	if out.Source == IPAMLeases {
		for _, l := range s.cfg.Leases() {
			add(l)
		}
	}
	for id, n := range e.Networks {
		if !done[id] && n.Subnet.IsValid() {
			add(pool.Listing{Status: pool.Status{ID: pool.ID{Subnet: n.Subnet}, Network: id, Gateway: n.Gateway}})
		}
	}
	for id, n := range v.Networks {
		if !done[id] {
			add(pool.Listing{Status: pool.Status{ID: pool.ID{Subnet: n.Subnet}, Network: id, Gateway: n.Gateway}})
		}
	}
	slices.SortFunc(out.Pools, func(a, b IPAMPool) int {
		return cmp.Or(strings.Compare(a.Network, b.Network), strings.Compare(a.Subnet, b.Subnet))
	})
	slices.SortFunc(out.Problems, func(a, b Problem) int { return strings.Compare(a.What, b.What) })
	return out
}

// ipamSource is what an answer about addresses can be made of.
func (s *Server) ipamSource(e model.EngineSnapshot) string {
	switch {
	case s.cfg.Scope != "global" || e.Leader && e.ServicesValid:
		return IPAMLeases
	case e.Manager:
		return IPAMLists
	}
	return IPAMContainers
}

// holding lists the endpoints of each network as holders of their addresses.
func holding(v model.View) map[model.NetworkID][]model.Holder {
	out := make(map[model.NetworkID][]model.Holder)
	add := func(network model.NetworkID, a netip.Addr, node model.NodeID, t model.Task) {
		out[network] = append(out[network], model.Holder{Addr: a, Kind: model.HolderEndpoint, ID: string(t.ID), Service: t.Service, Node: node})
	}
	for _, x := range v.Endpoints {
		add(x.Network, x.Addr, v.Self.Node, x.Task)
	}
	for _, x := range v.Remotes {
		add(x.Network, x.Addr, x.Node, x.Task)
	}
	return out
}

// accounts answers for one pool.
func (s *Server) accounts(v model.View, e model.EngineSnapshot, l pool.Listing, source string, holding []model.Holder, now time.Time) (IPAMPool, []Problem) {
	p := IPAMPool{
		NetworkID: string(l.Network), Subnet: l.ID.Subnet.String(), Free: l.Free, Addresses: []IPAMAddress{},
	}
	if l.ID.Space != "" {
		p.Pool = l.ID.String()
	}
	if l.Network != "" {
		p.Network = orElse(e.Networks[l.Network].Name, orElse(v.Networks[l.Network].Name, l.Network.Short()))
	}
	if l.ID.Sub.IsValid() {
		p.Range = l.ID.Sub.String()
	}
	if l.Gateway.IsValid() {
		p.Gateway = l.Gateway.String()
	}
	if l.Nodes.IsValid() {
		p.Nodes, p.Kept = l.Nodes.String(), 1<<(32-l.Nodes.Bits())
	}
	listed := e.Holders[l.Network]
	if len(listed) == 0 && l.Gateway.IsValid() {
		listed = []model.Holder{{Addr: l.Gateway, Kind: model.HolderGateway}}
	}
	n, known := e.Networks[l.Network]
	other := known && e.Alias != "" && n.IPAM != e.Alias // who gives its addresses; nothing is leased here then
	if other {
		p.Driver, p.Pool = n.IPAM, ""
	}
	accounts := pool.Accounts(l.Leases, source == IPAMLeases && !other, listed, holding, now)
	names := s.holderNames(v, e)
	var leaked, double []string
	for _, x := range accounts {
		owner, node := names.owner(x)
		p.Addresses = append(p.Addresses, IPAMAddress{Address: x.Address.String(), State: string(x.Verdict), Owner: owner, Node: node, Since: x.Since})
		switch x.Verdict {
		case pool.Leaked:
			leaked = append(leaked, x.Address.String())
		case pool.Double:
			double = append(double, fmt.Sprintf("%s (%s)", x.Address, owner))
		}
	}
	p.Leaked, p.Double = len(leaked), len(double)
	for _, x := range accounts {
		if x.Verdict != pool.Leaked && x.Verdict != pool.NotLeased {
			p.Used++
		}
	}
	var bad []Problem
	if p.Leaked > 0 {
		bad = append(bad, Problem{
			What: fmt.Sprintf("addresses of network %s are leased and nobody has them: %s", p.Network, few(leaked)),
			Do:   fmt.Sprintf("nothing: they are freed when nobody has had them for %s (sluice ipam)", pool.FreeAfter),
		})
	}
	if p.Double > 0 {
		bad = append(bad, Problem{
			What: fmt.Sprintf("addresses of network %s are had by two: %s", p.Network, few(double)),
			Do:   "give one of them another: docker service update --force, or start the container anew; if it comes again, report it",
		})
	}
	return p, bad
}

// few joins texts for a line that a person reads: the first eight, and how many more.
func few(all []string) string {
	if more := len(all) - nearMax; more > 0 {
		return strings.Join(all[:nearMax], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(all, ", ")
}

// holderNames turns holders into words.
type holderNames struct {
	nodes    map[string]string
	self     model.NodeID
	engine   map[model.NodeID]model.EngineNode
	services map[model.ServiceID]model.Service
}

func (s *Server) holderNames(v model.View, e model.EngineSnapshot) holderNames {
	return holderNames{nodes: s.nodeNames(v), self: v.Self.Node, engine: e.Nodes, services: e.Services}
}

func (n holderNames) node(id model.NodeID) string {
	switch {
	case id == "":
		return ""
	case id == n.self:
		return n.nodes[""]
	}
	return orElse(n.engine[id].Name, orElse(n.nodes[string(id)], string(id)))
}

// owner is who has an address, and where.
func (n holderNames) owner(x pool.Account) (owner, node string) {
	var owners, nodes []string
	for _, h := range x.Listed {
		text := string(h.Kind)
		switch {
		case h.Kind == model.HolderService:
			text = "VIP of " + orElse(n.services[model.ServiceID(h.ID)].Name, h.ID)
		case h.Container != "":
			text = fmt.Sprintf("container %.12s", h.Container)
		case h.Kind == model.HolderTask && h.Slot > 0:
			text = fmt.Sprintf("task %s.%d", orElse(n.services[h.Service].Name, string(h.Service)), h.Slot)
		case h.Kind == model.HolderTask:
			text = "task of " + orElse(n.services[h.Service].Name, orElse(string(h.Service), h.ID))
		}
		owners, nodes = append(owners, text), append(nodes, n.node(h.Node))
	}
	for _, h := range x.Holding {
		text := "a container"
		if h.ID != "" {
			text = "the container of task " + h.ID
			if slices.ContainsFunc(x.Listed, func(l model.Holder) bool { return l.ID == h.ID }) {
				continue // said already
			}
		} else if len(x.Listed) > 0 && x.Verdict != pool.Double {
			continue // the task that swarm makes of `docker run`
		}
		owners, nodes = append(owners, text), append(nodes, n.node(h.Node))
	}
	nodes = slices.DeleteFunc(nodes, func(s string) bool { return s == "" })
	slices.Sort(nodes)
	return strings.Join(owners, " and "), strings.Join(slices.Compact(nodes), ", ")
}
