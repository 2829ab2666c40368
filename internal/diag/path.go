package diag

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// Ports answers which ports services publish on this node and who has each. asked,
// which is 81 or 81/udp, chooses one, and has the whole way of its connections
// told; empty is all. The error says what is wrong with asked, or what there is.
func (s *Server) Ports(ctx context.Context, asked string) (Ports, error) {
	ctx, cancel := context.WithTimeout(ctx, trafficTime)
	defer cancel()
	d := s.doors()
	if asked == "" {
		out := Ports{Ports: d.ports(func(ingress.Port) bool { return true })}
		out.Problems = append([]Problem{}, d.problems(s, out.Ports)...)
		return out, nil
	}
	number, proto, err := ParsePort(asked)
	if err != nil {
		return Ports{}, err
	}
	fits := func(p ingress.Port) bool {
		return p.Lo <= number && number <= p.Hi && (proto == "" || p.Proto == proto)
	}
	out := Ports{Asked: asked, Ports: []Port{}, Problems: []Problem{}}
	var p planned
	names := s.nodeNames(d.v)
	for _, w := range d.won {
		if !fits(w) {
			continue
		}
		run := w
		w.To += number - w.Lo
		w.Lo, w.Hi = number, number
		x := d.port(w)
		x.State, x.Why = d.judge(run)
		if n, here := d.v.Networks[w.Network]; here && d.alias[site{w.Service, w.Network}].IsValid() {
			if p.want == nil {
				p = planOf(d.v)
			}
			x.Path = s.path(ctx, d, run, number, n, p, names)
		}
		if x.State == PortRefuses {
			out.Problems = append(out.Problems, Problem{
				What: fmt.Sprintf("connections to port %s are refused: %s", x.Port, x.Why),
				Do:   "see docker service ps --no-trunc " + orElse(x.Service, x.ServiceID),
			})
		}
		out.Ports = append(out.Ports, x)
	}
	for _, l := range d.lost {
		if fits(l.Port) {
			l.To += number - l.Lo
			l.Lo, l.Hi = number, number
			out.Ports = append(out.Ports, d.loss(l))
		}
	}
	if len(out.Ports) == 0 {
		return Ports{}, d.none(asked, number, proto)
	}
	out.Problems = append(out.Problems, d.problems(s, out.Ports)...)
	return out, nil
}

// ParsePort reads 81, or 81/udp; without one, the protocol is empty.
func ParsePort(s string) (uint16, model.Proto, error) {
	text, name, given := strings.Cut(s, "/")
	n, err := strconv.ParseUint(text, 10, 16)
	proto := model.Proto(strings.ToLower(name))
	if err != nil || n == 0 || given && proto.Number() == 0 {
		return 0, "", fmt.Errorf("%q is no port; want a number from 1 to 65535, and perhaps a protocol: 81, 81/tcp, 81/udp, 81/sctp", s)
	}
	return uint16(n), proto, nil
}

// none says that nobody publishes a port here, and who does elsewhere.
func (d *doors) none(asked string, number uint16, proto model.Proto) error {
	for id, s := range d.v.Services {
		for _, o := range s.Options {
			for _, r := range o.Published.List() {
				if r.Lo <= number && number <= r.Hi && (proto == "" || r.Proto == proto) {
					why := "this node's kernel lacks what published ports need"
					if !d.v.Self.NoMesh {
						why = fmt.Sprintf("sluice.publish.nodes=%s does not fit this node's labels", o.Nodes)
					}
					return fmt.Errorf("service %s publishes port %s, but not on this node: %s", orElse(s.Name, string(id)), asked, why)
				}
			}
		}
	}
	var there []string
	for _, p := range d.won {
		there = append(there, portText(p.Lo, p.Hi)+"/"+string(p.Proto))
	}
	return fmt.Errorf("no service publishes port %s; there is: %s", asked, nearest(asked, slices.Compact(there)))
}

// path is the way of connections to a port, which is one of a run that a service has.
func (s *Server) path(ctx context.Context, d *doors, p ingress.Port, port uint16, n model.Network, plan planned, names map[string]string) *Path {
	at := site{p.Service, p.Network}
	x, known := d.at[at]
	o := d.v.Services[p.Service].Options[p.Network]
	if !known { // no VIP and no task
		x = service.Virtual{Service: p.Service, Network: p.Network, Scheduler: cmp.Or(o.Scheduler, n.Options.Scheduler, service.RR), Options: o}
	}
	entry, alias := d.entry[p.Network], d.alias[at]
	out := &Path{
		Alias: alias.String(), Block: blockOf(d.v.Self, entry).String(), Number: entry.Number, Entry: entry.Addr.String(), MAC: model.MACFor(entry.Addr).String(),
		Device: overlay.MeshEnd(n), Peer: overlay.MeshName, Netns: overlay.NetnsName(n), Transit: n.Transit,
		Datapath: service.Datapath(d.v.Self, n), DatapathReason: s.whyDatapath(d.v.Self, n),
		Source: "keep", Backends: []PathEnd{}, IPVS: []EntryIPVS{},
	}
	if o.Source == model.Masquerade {
		out.Source = "masquerade"
	}
	used, why := service.Scheduler(&x, out.Datapath)
	out.Scheduler = scheduling(x.Scheduler, used, why)
	if x.VIP.IsValid() {
		out.VIP = x.VIP.String()
	}
	for _, a := range o.Allow.List() {
		out.Allow = append(out.Allow, a.String())
	}
	backends := make([]EntryBackend, 0, len(x.Backends))
	for _, b := range x.Backends {
		e := EntryBackend{Backend: backend(b, names)}
		e.State = orElse(b.WhyUnmeshed, StateReady)
		backends = append(backends, e)
	}
	traffic, err := s.traffic(ctx, out.Netns)
	b := balance(out.Datapath, out.Netns, "alias", alias, x, plan, traffic, backends)
	if out.Traffic, out.Uncounted = b.traffic, b.why; err != nil {
		out.Uncounted = err.Error()
	}
	if b.ipvs != nil {
		out.IPVS = b.ipvs
	}
	for i, e := range backends {
		out.Backends = append(out.Backends, PathEnd{EntryBackend: e, Port: portText(p.To+(port-p.Lo), p.To+(port-p.Lo)), Way: d.way(n, x.Backends[i])})
	}
	out.Hops = d.hops(p, port, n, x, b, plan.want)
	out.Compare = []string{
		"nft list table ip sluice-mesh", "nsenter --net=/run/netns/" + out.Netns + " " + compare(out.Datapath), "nsenter --net=/run/netns/" + out.Netns + " nft list table bridge sluice-back",
	}
	return out
}

// way is how a frame gets from the bridge of a network's namespace to a backend.
func (d *doors) way(n model.Network, b service.Backend) string {
	if b.Local {
		return overlay.HostEnd(b.Endpoint)
	}
	fdb, ok := d.last.Have[kernel.FDB{NS: overlay.NetnsName(n), Dev: overlay.VXLANName, MAC: b.MAC}].(kernel.FDBSpec)
	if !ok {
		return "-"
	}
	return overlay.VXLANName + " to " + fdb.VTEP.String()
}

// hops are the places on the way to a task, and on the way back. What each does is
// told from the plan's objects, and whether the kernel has them, from the last round.
func (d *doors) hops(p ingress.Port, port uint16, n model.Network, x service.Virtual, b balancer, want kernel.State) []Hop {
	ns, end, entry := overlay.NetnsName(n), overlay.MeshEnd(n), d.entry[n.ID]
	alias, block := d.alias[site{p.Service, p.Network}], blockOf(d.v.Self, entry)
	hp := model.HostPort{Proto: p.Proto, Addr: p.Addr, Port: port}
	var out []Hop
	add := func(at, does string, keys ...kernel.Key) {
		out = append(out, Hop{At: at, Does: does, Kernel: d.has(want, keys...)})
	}
	host, network := "host", "namespace "+ns

	// In.
	out = append(out, Hop{At: host, Does: "a socket holds " + hp.String() + ", and gets nothing", Kernel: d.claim(hp)})
	does := "translates it to nothing yet"
	if alias, to, planned := leadsTo(want, p, port); planned {
		does = fmt.Sprintf("%s becomes %s port %d", hp, alias, to)
	}
	add("host, table ip sluice-mesh, "+elementOf(rule(p, port)), does, kernel.MeshTable{}, rule(p, port))
	route, _ := want[kernel.Route{Dev: end, Prefix: block}].(kernel.RouteSpec)
	add(host, fmt.Sprintf("routes %s by %s to %s", block, end, route.Via), kernel.Route{Dev: end, Prefix: block}, kernel.Neigh{Dev: end, IP: n.Gateway})
	add("host, chain SLUICE-MESH", "lets through what goes by "+overlay.MeshPrefix+"…, whatever the policy of FORWARD", kernel.Forward{})
	if spec, ok := want[kernel.MeshAllow{Alias: alias}].(kernel.MeshAllowSpec); ok {
		add("host, table ip sluice-mesh, map allow", "drops what is from outside and not from "+orElse(spec.From, "anywhere"), kernel.MeshAllow{Alias: alias})
	}
	source, _ := want[kernel.MeshNet{Dev: end}].(kernel.MeshNetSpec)
	_, masked := want[kernel.MeshMasq{Alias: alias}]
	if masked {
		add("host, table ip sluice-mesh, set masked", fmt.Sprintf("the source of all clients becomes %s", source.Source), kernel.MeshNet{Dev: end}, kernel.MeshMasq{Alias: alias})
	} else {
		add("host, table ip sluice-mesh, chain net-"+end, fmt.Sprintf("the client's address is kept; that of the host, of its containers and of clients in %s becomes %s", source.Subnet, source.Source), kernel.MeshNet{Dev: end})
	}
	add(end+" = "+overlay.MeshName, "leads into "+network+", to "+overlay.BridgeName,
		kernel.Link{NS: ns, Name: overlay.MeshName, Kind: kernel.Veth}, kernel.Addr{Dev: end, Prefix: netip.PrefixFrom(entry.Addr, 32)})
	add(d.balances(network, alias, p.Proto, n, b, want))

	// There.
	for _, e := range x.Backends {
		if !e.Local {
			continue
		}
		sandbox := d.v.Endpoints[e.Endpoint].Sandbox
		if spec, ok := want[kernel.TaskMesh{Sandbox: sandbox, Addr: e.Addr}].(kernel.TaskMeshSpec); ok {
			does := fmt.Sprintf("%s becomes %s", spec.Pool, e.Addr)
			if spec.UDP && p.Proto == model.UDP {
				does += ", or the address that the server is bound to"
			}
			add("task "+string(e.Task), does, kernel.TaskMesh{Sandbox: sandbox, Addr: e.Addr})
		}
		// What is from the network itself is answered by its device anyway.
		if spec, ok := want[kernel.TaskRoute{Sandbox: sandbox, Addr: e.Addr}].(kernel.TaskRouteSpec); ok && !masked {
			add("task "+string(e.Task), fmt.Sprintf("answers from %s leave by %s", e.Addr, spec.Gateway), kernel.TaskRoute{Sandbox: sandbox, Addr: e.Addr})
		}
	}
	if remote := slices.ContainsFunc(x.Backends, func(b service.Backend) bool { return !b.Local }); remote {
		out = append(out, Hop{At: "tasks of other nodes", Does: "do the same there; each node tells when its task does", Kernel: "see STATE"})
	}

	// Back.
	back, _ := want[kernel.Back{NS: ns, Block: block.Addr()}].(kernel.BackSpec)
	add("table bridge sluice-back on the task's node", fmt.Sprintf("an answer from %s goes to %s, which is %s here", block, back.MAC, overlay.MeshName),
		kernel.BackTable{NS: ns}, kernel.Back{NS: ns, Block: block.Addr()}, kernel.FDB{NS: ns, Dev: overlay.MeshName, MAC: model.MACFor(entry.Addr)})
	out = append(out, Hop{At: host, Does: "conntrack gives the answer the port's address back", Kernel: "with the connection"})
	return out
}

// balances is the hop that chooses a task.
func (d *doors) balances(network string, alias netip.Addr, proto model.Proto, n model.Network, b balancer, want kernel.State) (at, does string, keys kernel.Key) {
	ns := overlay.NetnsName(n)
	if !b.taken {
		k := kernel.Route{NS: ns, Dev: overlay.BridgeName, Prefix: blockOf(d.v.Self, d.entry[n.ID])}
		return network, "nobody takes " + alias.String() + ": the stack refuses", k
	}
	if spec, ok := want[kernel.VIP{NS: ns, IP: alias}].(kernel.VIPSpec); ok {
		return network + ", table bridge sluice", fmt.Sprintf("chooses a task for %s: %s", alias, spec), kernel.VIP{NS: ns, IP: alias}
	}
	mark := markOf(want, ns, alias, proto)
	spec, _ := want[mark].(kernel.MarkSpec)
	return network + ", ip_vs", fmt.Sprintf("firewall mark %d for %s chooses a task", int32(spec.Mark), alias), mark
}

// claim says how a port is held on this host.
func (d *doors) claim(p model.HostPort) string {
	switch err := d.failed[p]; {
	case p.Addr.IsValid() && d.absent[p.Addr]:
		return "no: this node does not have the address"
	case err != nil:
		return "no: " + err.Error()
	}
	return "held"
}

// has says whether the kernel has what the plan wants, in words.
func (d *doors) has(want kernel.State, keys ...kernel.Key) string {
	for _, k := range keys {
		if err := d.last.Failed[k]; err != nil {
			return err.Error()
		}
		if want[k] == nil || d.last.Have[k] == nil {
			return "not there: " + k.String()
		}
		if len(kernel.Diff(kernel.State{k: d.last.Have[k]}, kernel.State{k: want[k]})) > 0 {
			return "another is there: " + k.String()
		}
	}
	return "there"
}
