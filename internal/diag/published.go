package diag

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
	"sluice/lb/ingress"
	"sluice/lb/publish"
	"sluice/lb/service"
)

// Sockets is what is asked of who holds published ports; lb/publish does.
type Sockets interface {
	// Failed says which ports are not held here, and why.
	Failed() map[model.HostPort]error
	// Absent are the addresses of ports that this host does not have.
	Absent() map[netip.Addr]bool
	// Missed counts connections that came to a socket, past the rules.
	Missed() uint64
}

// site is a service on a network.
type site struct {
	service model.ServiceID
	network model.NetworkID
}

// doors are the published ports of this node at one moment.
type doors struct {
	v      model.View
	last   reconcile.Round
	full   map[model.NetworkID]error // that have no room for this node
	failed map[model.HostPort]error  // that no socket holds
	absent map[netip.Addr]bool
	alias  map[site]netip.Addr
	entry  map[model.NetworkID]model.Entry // of this node, that hold
	at     map[site]service.Virtual
	won    []ingress.Port
	lost   []ingress.Loss
}

func (s *Server) doors() *doors {
	v := s.cfg.Hub.View()
	d := &doors{
		v: v, last: s.cfg.Loop.Last(), full: s.cfg.Hub.Unclaimed(), failed: s.cfg.Sockets.Failed(), absent: s.cfg.Sockets.Absent(),
		alias: make(map[site]netip.Addr), entry: make(map[model.NetworkID]model.Entry), at: make(map[site]service.Virtual),
	}
	d.won, d.lost = ingress.Own(ingress.Wants(v), v.Taken)
	// Networks of one engine have no nodes to publish on.
	local := func(id model.NetworkID) bool { return v.Networks[id].Local }
	d.won = slices.DeleteFunc(d.won, func(p ingress.Port) bool { return local(p.Network) })
	d.lost = slices.DeleteFunc(d.lost, func(l ingress.Loss) bool { return local(l.Network) })
	for _, a := range ingress.Balanced(v) {
		d.alias[site{a.Service, a.Network}] = a.Addr
	}
	for _, id := range ingress.Entered(v) {
		if e, ok := ingress.Claimed(v, id)[v.Self.Node]; ok {
			d.entry[id] = e
		}
	}
	if len(d.won) > 0 {
		for _, x := range service.Virtuals(v) {
			d.at[site{x.Service, x.Network}] = x
		}
	}
	return d
}

// ports lists those that services have, and then those that they have lost, for
// which those that fit count.
func (d *doors) ports(fits func(ingress.Port) bool) []Port {
	out := []Port{}
	for _, p := range d.won {
		if fits(p) {
			x := d.port(p)
			x.State, x.Why = d.judge(p)
			out = append(out, x)
		}
	}
	for _, l := range d.lost {
		if fits(l.Port) {
			out = append(out, d.loss(l))
		}
	}
	return out
}

func (d *doors) port(p ingress.Port) Port {
	x := Port{
		Port: portText(p.Lo, p.Hi) + "/" + string(p.Proto), To: portText(p.To, p.To+(p.Hi-p.Lo)),
		Service: d.v.Services[p.Service].Name, ServiceID: string(p.Service), Network: d.network(p.Network), NetworkID: string(p.Network),
	}
	if p.Addr.IsValid() {
		x.Addr = p.Addr.String()
	}
	return x
}

func (d *doors) loss(l ingress.Loss) Port {
	x := d.port(l.Port)
	if why, nobody := strings.CutPrefix(l.OwnerName, publish.Nobody); nobody {
		x.State, x.Why = PortFailed, why
		return x
	}
	x.State, x.Owner, x.Why = PortLost, &Owner{Kind: OwnerProcess, Name: l.OwnerName}, "it is held by "+l.OwnerName
	if l.Owner != "" {
		x.Owner = &Owner{Kind: OwnerService, Name: l.OwnerName, ID: string(l.Owner)}
		x.Why = "service " + orElse(l.OwnerName, string(l.Owner)) + " is older"
		if l.Owner == l.Service {
			x.Why = "the service has it on another network"
		}
	}
	return x
}

// network is a network's name.
func (d *doors) network(id model.NetworkID) string {
	return cmp.Or(d.v.Networks[id].Name, d.v.Published[id].Name, id.Short())
}

// portText is 80, or 80-89.
func portText(lo, hi uint16) string {
	if lo == hi {
		return strconv.Itoa(int(lo))
	}
	return fmt.Sprintf("%d-%d", lo, hi)
}

// judge says what became of ports that a service has, and why.
func (d *doors) judge(p ingress.Port) (state, why string) {
	at := site{p.Service, p.Network}
	n, here := d.v.Networks[p.Network]
	switch {
	case p.Addr.IsValid() && d.absent[p.Addr]:
		return PortAbsent, "this node does not have the address"
	case d.full[p.Network] != nil:
		return PortFailed, d.full[p.Network].Error()
	case !here:
		return PortWaits, "the network is not known here yet"
	case d.entry[p.Network] == model.Entry{}:
		return PortWaits, "this node has no address in the network yet"
	case !d.alias[at].IsValid():
		return PortFailed, "more services publish ports on the network than a node has addresses for"
	}
	keys := wayIn(n, d.entry[p.Network], blockOf(d.v.Self, d.entry[p.Network]))
	if state, why := d.lacks(keys); state != "" {
		return state, why
	}
	if state, why := d.translated(p); state != "" {
		return state, why
	}
	x := d.at[at]
	switch {
	case d.leads(overlay.NetnsName(n), d.alias[at], p.Proto, x):
		meshed := 0
		for _, b := range x.Backends {
			if b.Meshed {
				meshed++
			}
		}
		return PortServed, fmt.Sprintf("%d of %d tasks", meshed, len(x.Backends))
	case len(x.Backends) == 0:
		return PortRefuses, "the service has no tasks"
	}
	return PortRefuses, fmt.Sprintf("none of %d tasks takes connections: %s", len(x.Backends), orElse(x.Backends[0].WhyUnmeshed, "the kernel is told of it"))
}

// lacks says what the kernel has not of what it should have, if anything.
func (d *doors) lacks(keys []kernel.Key) (state, why string) {
	for _, k := range keys {
		if err := d.last.Failed[k]; err != nil {
			return PortFailed, err.Error()
		}
		if d.last.Have[k] == nil {
			return PortWaits, k.String() + " is not in the kernel yet"
		}
	}
	return "", ""
}

// translated says what is wrong with the host's translation of a run of ports.
func (d *doors) translated(p ingress.Port) (state, why string) {
	want := d.alias[site{p.Service, p.Network}]
	for i := range int(p.Hi-p.Lo) + 1 {
		k := rule(p, p.Lo+uint16(i))
		if err := d.last.Failed[k]; err != nil {
			return PortFailed, err.Error()
		}
		alias, to, there := leadsTo(d.last.Have, p, p.Lo+uint16(i))
		if !there || alias != want || to != p.To+uint16(i) {
			return PortWaits, k.String() + " is not in the kernel yet"
		}
	}
	return "", ""
}

// rule is the kernel's object that translates a published port, which is one of a
// run that a service has.
func rule(run ingress.Port, port uint16) kernel.Key {
	if run.Lo < run.Hi && run.To == run.Lo && !run.Addr.IsValid() {
		return kernel.MeshRange{Proto: run.Proto, Lo: run.Lo, Hi: run.Hi}
	}
	return kernel.MeshPort{Bind: run.Addr, Proto: run.Proto, Port: port}
}

// elementOf is where table ip sluice-mesh has such an object.
func elementOf(k kernel.Key) string {
	switch k := k.(type) {
	case kernel.MeshRange:
		return fmt.Sprintf("maps %s-ranges", k.Proto) // the adapter has two, of which one is empty
	case kernel.MeshPort:
		if k.Bind.IsValid() {
			return "map bound"
		}
	}
	return "map published"
}

// leadsTo is what a state of the kernel translates such a port to.
func leadsTo(s kernel.State, run ingress.Port, port uint16) (alias netip.Addr, to uint16, there bool) {
	switch spec := s[rule(run, port)].(type) {
	case kernel.MeshPortSpec:
		return spec.Alias, spec.To, true
	case kernel.MeshRangeSpec:
		return spec.Alias, port, true
	}
	return netip.Addr{}, 0, false
}

// leads reports whether the kernel gives new connections of a protocol at an alias to
// anybody.
func (d *doors) leads(ns string, alias netip.Addr, proto model.Proto, x service.Virtual) bool {
	if spec, ok := d.last.Have[kernel.VIP{NS: ns, IP: alias}].(kernel.VIPSpec); ok {
		return spec.Slots > 0
	}
	mark, ok := d.last.Have[markOf(d.last.Have, ns, alias, proto)].(kernel.MarkSpec)
	return ok && slices.ContainsFunc(x.Backends, func(b service.Backend) bool {
		spec, there := d.last.Have[kernel.IPVSDest{NS: ns, Mark: mark.Mark, IP: b.Addr}].(kernel.IPVSDestSpec)
		return there && spec.Weight > 0
	})
}

// markOf is which mark of a state packets of a protocol to an alias get.
func markOf(s kernel.State, ns string, alias netip.Addr, proto model.Proto) kernel.Mark {
	own := kernel.Mark{NS: ns, VIP: alias, Proto: proto}
	if s[own] != nil {
		return own
	}
	return kernel.Mark{NS: ns, VIP: alias}
}

// blockOf is the addresses that an entry of this node has for services.
func blockOf(self model.Self, e model.Entry) netip.Prefix {
	return ingress.Block(ingress.PoolOf(self), e.Number)
}

// wayIn are the kernel's objects that lead from the host to a network's bridge,
// in the order of a packet.
func wayIn(n model.Network, e model.Entry, block netip.Prefix) []kernel.Key {
	ns, end := overlay.NetnsName(n), overlay.MeshEnd(n)
	return []kernel.Key{
		kernel.MeshTable{},
		kernel.Addr{Dev: end, Prefix: netip.PrefixFrom(e.Addr, 32)},
		kernel.Route{Dev: end, Prefix: block},
		kernel.Neigh{Dev: end, IP: n.Gateway},
		kernel.Forward{},
		kernel.MeshNet{Dev: end},
		kernel.Link{NS: ns, Name: overlay.MeshName, Kind: kernel.Veth},
		kernel.Route{NS: ns, Dev: overlay.BridgeName, Prefix: block},
		kernel.FDB{NS: ns, Dev: overlay.MeshName, MAC: model.MACFor(e.Addr)},
		kernel.Back{NS: ns, Block: block.Addr()},
	}
}

// problems are what a person should know of published ports, one for each text.
// What is refused for want of tasks is the service's matter, and left out.
func (d *doors) problems(s *Server, ports []Port) []Problem {
	var out []Problem
	add := func(what, do string) {
		p := Problem{What: what, Do: do}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	for _, x := range ports {
		name := orElse(x.Service, x.ServiceID)
		at := ""
		if x.Addr != "" {
			at = " of " + x.Addr
		}
		switch {
		case x.Owner != nil && x.Owner.Kind == OwnerProcess:
			add(fmt.Sprintf("service %s does not have port %s%s here: it is held by %s", name, x.Port, at, x.Owner.Name),
				"end that process, or publish another port (sluice.publish); it is tried again every few seconds")
		case x.Owner != nil && x.Owner.ID == x.ServiceID:
			add(fmt.Sprintf("service %s publishes port %s%s on several networks; on %s it does not have it", name, x.Port, at, x.Network),
				"publish it on one of them (sluice.publish)")
		case x.Owner != nil:
			add(fmt.Sprintf("service %s does not have port %s%s: it belongs to service %s, which is older", name, x.Port, at, orElse(x.Owner.Name, x.Owner.ID)),
				"publish another port with one of the two (sluice.publish)")
		case x.State == PortFailed && d.full[model.NetworkID(x.NetworkID)] != nil:
			add("published ports of network "+x.Network+" are not served by this node: "+x.Why, "or leave this node out (sluice.publish.nodes)")
		case x.State == PortFailed:
			add(fmt.Sprintf("service %s is not served at port %s%s: %s", name, x.Port, at, x.Why), "it is tried again; sluice diff says what the kernel lacks")
		case x.State == PortWaits:
			add(fmt.Sprintf("service %s is not served at port %s%s yet: %s", name, x.Port, at, x.Why),
				"normal for seconds; if it stays, see sluice status here and on the leader")
		}
	}
	for _, text := range d.unheld() {
		add(text, "the port is served all the same, if the kernel can; modprobe sctp for that protocol")
	}
	if d.v.Self.NoMesh {
		if names := publishers(d.v); len(names) > 0 {
			why := "its kernel lacks what they need"
			for _, a := range s.cfg.Abilities() {
				if a.Name == AbilityMesh && a.Err != nil {
					why = a.Err.Error()
				}
			}
			add(fmt.Sprintf("this node has none of the ports that %s publish: %s", strings.Join(names, ", "), why),
				"use a kernel that has it, or leave this node out (sluice.publish.nodes)")
		}
	}
	return out
}

// unheld are the ports that nobody can hold, the kernel lacking their protocol: one
// for each protocol stands for all.
func (d *doors) unheld() []string {
	first, count := make(map[model.Proto]model.HostPort), make(map[model.Proto]int)
	for p, err := range d.failed {
		if !errors.Is(err, kernel.ErrUnsupported) {
			continue
		}
		if f, known := first[p.Proto]; !known || p.Compare(f) < 0 {
			first[p.Proto] = p
		}
		count[p.Proto]++
	}
	var out []string
	for proto, p := range first {
		text := "published port " + p.String()
		if n := count[proto] - 1; n > 0 {
			text += fmt.Sprintf(", as %d more of %s,", n, proto)
		}
		out = append(out, text+" is not held by a socket: "+d.failed[p].Error())
	}
	slices.Sort(out)
	return out
}

// drained reports whether the swarm has this node paused or drained.
func (d *doors) drained() bool { return d.v.Drained }

// service fills in what a service publishes on a network, and returns what is wrong
// with that.
func (d *doors) service(ctx context.Context, s *Server, x service.Virtual, p planned, out *EntryNetwork) []Problem {
	out.Published = d.ports(func(p ingress.Port) bool { return p.Service == x.Service && p.Network == x.Network })
	if alias := d.alias[site{x.Service, x.Network}]; alias.IsValid() {
		out.Alias = alias.String()
		traffic, err := s.traffic(ctx, out.Netns)
		if err != nil {
			out.Uncounted = err.Error()
		} else {
			ends := make([]EntryBackend, len(x.Backends)) // the table's are of the VIP
			out.AliasTraffic = balance(out.Datapath, out.Netns, "alias", alias, x, p, traffic, ends).traffic
		}
	}
	return slices.DeleteFunc(d.problems(s, out.Published), func(p Problem) bool { return len(out.Published) == 0 })
}

// publishers are the names of the services that publish ports, anywhere.
func publishers(v model.View) []string {
	names := make(map[model.ServiceID]string)
	for id, s := range v.Services {
		for _, o := range s.Options {
			if o.Published != "" {
				names[id] = orElse(s.Name, string(id))
			}
		}
	}
	return sorted(names)
}
