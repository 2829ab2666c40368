package service

import (
	"net/netip"
	"slices"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Plan adds the balancers of the view's networks and the translations of this
// node's tasks to want. Services are balanced at their aliases, too.
func Plan(v model.View, aliases []Alias, want kernel.State) {
	all := members(v)
	xs := virtuals(v, all)
	owner := owners(v, xs)
	nets := networks(v, xs)
	meshed := meshedAt(v, aliases, xs)
	ways, waysIn := waysToAll(nets, xs, owner, meshed)
	for _, n := range nets {
		want[kernel.Sysctl{NS: n.ns, Name: forwarding}] = kernel.SysctlSpec{Value: "0"}
		if n.by == IPVS {
			ipvsBalancer(n.ns, n.open, want)
		} else {
			balancer(n, want)
		}
	}
	for i := range xs {
		x := &xs[i]
		if !x.VIP.IsValid() {
			continue
		}
		n := nets[x.Network]
		ready := x.Ready()
		o, served := owner[site{x.Network, x.VIP}], len(ready) > 0
		if o != i {
			served = len(xs[o].Ready()) > 0
		}
		if o == i {
			want[kernel.Addr{NS: n.ns, Dev: overlay.BridgeName, Prefix: host(x.VIP)}] = kernel.AddrSpec{}
			switch {
			case n.by == NFT:
				virtual(n.ns, x.VIP, x, ready, want)
			default:
				ipvsVirtual(n.ns, x, ways[i], want)
			}
		}
		for j := range x.Backends {
			b := &x.Backends[j]
			if n.by == NFT {
				alive(n.ns, x.VIP, b, (o != i || !b.Ready) && served, want)
			}
			if b.Local {
				task(v.Endpoints[b.Endpoint], x, b, len(ready) == 1 && b.Ready, want)
			}
		}
	}
	// Once the services of all owners are there.
	for i := range xs {
		if x := &xs[i]; x.VIP.IsValid() && nets[x.Network].by == IPVS {
			o := owner[site{x.Network, x.VIP}]
			ipvsKeep(nets[x.Network].ns, &xs[o], x, ways[o], want)
			ipvsLift(nets[x.Network], x, want)
		}
	}
	for i := range meshed {
		m := &meshed[i]
		if n := nets[m.Network]; n.by == NFT {
			virtual(n.ns, m.at, &m.Virtual, m.Ready(), want)
			served := len(m.Ready()) > 0
			for j := range m.Backends {
				alive(n.ns, m.at, &m.Backends[j], !m.Backends[j].Ready && served, want)
			}
		} else {
			ipvsVirtual(n.ns, &m.Virtual, waysIn[i], want)
			ipvsKeep(n.ns, &m.Virtual, &m.Virtual, waysIn[i], want)
		}
	}
	for _, e := range v.Endpoints {
		if _, published := Publishes(v, e); published {
			want[kernel.TaskTable{Sandbox: e.Sandbox}] = kernel.TaskTableSpec{}
		}
	}
	for i := range all {
		m := &all[i]
		if n := nets[m.place.network]; m.Local && m.beaten == nil && v.Endpoints[m.Endpoint].Phase != model.Created {
			if n.by == NFT {
				want[kernel.Member{NS: n.ns, IP: m.Addr}] = kernel.MemberSpec{MAC: m.MAC}
			} else if want[kernel.LiftTable{NS: n.ns}] != nil {
				want[kernel.LiftTo{NS: n.ns, IP: m.Addr}] = kernel.LiftToSpec{}
			}
		}
	}
}

// forwarding is the sysctl of a network's namespace that says whether it routes.
// Containers reach each other over the bridge, so it does not, but for answers
// that IPVS gives the VIP back on their way through.
const forwarding = "net.ipv4.ip_forward"

// idleSlack is how much longer than a service's own limit its connections are
// remembered, in seconds: the node of the task looks for silent ones every 30 s at
// most, and the client shall hear of their end.
const idleSlack = 60

// network is a network on this node, on its way to being planned.
type network struct {
	model.Network
	ns   string
	by   string // its datapath
	open int    // for how many seconds a silent TCP connection is remembered
}

func networks(v model.View, xs []Virtual) map[model.NetworkID]*network {
	out := make(map[model.NetworkID]*network, len(v.Networks))
	for id, n := range v.Networks {
		out[id] = &network{Network: n, ns: overlay.NetnsName(n), by: Datapath(v.Self, n), open: openLife}
	}
	for i := range xs {
		n := out[xs[i].Network]
		if idle := xs[i].Options.Idle; idle > 0 {
			n.open = max(n.open, idle+idleSlack)
		}
	}
	return out
}

// waysToAll lists the ways to each service, by index, that IPVS balances: those
// that have their VIP, and those at an alias.
func waysToAll(nets map[model.NetworkID]*network, xs []Virtual, owner map[site]int, meshed []meshedVirtual) (out, aliases [][]way) {
	out, aliases = make([][]way, len(xs)), make([][]way, len(meshed))
	all := make(map[model.NetworkID][]*way)
	for i := range xs {
		x := &xs[i]
		if nets[x.Network].by != IPVS || !x.VIP.IsValid() || owner[site{x.Network, x.VIP}] != i {
			continue
		}
		out[i] = waysTo(x)
		for j := range out[i] {
			all[x.Network] = append(all[x.Network], &out[i][j])
		}
	}
	for i := range meshed {
		if m := &meshed[i]; nets[m.Network].by == IPVS {
			aliases[i] = waysInto(m)
			for j := range aliases[i] {
				all[m.Network] = append(all[m.Network], &aliases[i][j])
			}
		}
	}
	for _, ways := range all {
		mark(ways)
	}
	return out, aliases
}

// owners says which of the services, by index, has each VIP. Two may claim one
// when it passes from a removed service to a new one and news of that are not in
// yet: the one with ready backends has it, then the one that a manager told of
// last, then the smaller id. The other's tasks keep their established connections.
func owners(v model.View, all []Virtual) map[site]int {
	out := make(map[site]int, len(all))
	for i := range all {
		at := site{all[i].Network, all[i].VIP}
		if o, taken := out[at]; !taken || before(v, &all[i], &all[o]) {
			out[at] = i
		}
	}
	return out
}

func before(v model.View, a, b *Virtual) bool {
	readyA, readyB := len(a.Ready()) > 0, len(b.Ready()) > 0
	if readyA != readyB {
		return readyA
	}
	if c := v.Services[a.Service].Created.Compare(v.Services[b.Service].Created); c != 0 {
		return c > 0
	}
	return a.Service < b.Service
}

func balancer(n *network, want kernel.State) {
	spec := kernel.BridgeTableSpec{Router: overlay.RouterMAC(n.Network), Open: n.open}
	if !n.Local {
		spec.Uplink = overlay.VXLANName
	}
	want[kernel.BridgeTable{NS: n.ns}] = spec
}

// virtual adds what an address of a service, its VIP or an alias, is on this node,
// if nftables balances it.
func virtual(ns string, at netip.Addr, x *Virtual, ready []Backend, want kernel.State) {
	scheduler, _ := Scheduler(x, NFT)
	slots, hashed := Slots(scheduler, x.VIP, ready)
	if hashed {
		scheduler = SH // to the adapter: by the client's address
	} else if scheduler != WRR {
		scheduler = RR
	}
	ports := x.Options.Ports.List()
	want[kernel.VIP{NS: ns, IP: at}] = kernel.VIPSpec{
		Scheduler: scheduler, Slots: len(slots),
		Named: ports != nil, NAT: translates(x), OnePacket: onePacket(x),
		Persist: x.Options.Persist, PersistBits: x.Options.PersistBits,
	}
	for _, p := range ports {
		want[kernel.Port{NS: ns, VIP: at, Proto: p.Proto, Port: p.From}] = kernel.PortSpec{To: p.To}
	}
	for i, b := range slots {
		want[kernel.Slot{NS: ns, VIP: at, Slot: i}] = kernel.SlotSpec{MAC: ready[b].MAC}
	}
	for i := range ready {
		if b := &ready[i]; b.Local && len(ready) > 1 {
			next := &ready[(i+1)%len(ready)]
			want[kernel.Other{NS: ns, VIP: at, Client: b.Addr}] = kernel.OtherSpec{MAC: next.MAC}
		}
	}
}

// translates reports whether some of a service's backends get packets with their
// own address.
func translates(x *Virtual) bool {
	return slices.ContainsFunc(x.Backends, func(b Backend) bool { return b.Mode == NAT })
}

// alive adds what lets a backend go on with what it serves, if nftables balances. It
// drains if it leaves or if the VIP is another service's by now, and somebody else is
// there to take what it has to give up.
func alive(ns string, at netip.Addr, b *Backend, drains bool, want kernel.State) {
	if b.gone {
		return // and its MAC may be its successor's, who does not drain
	}
	want[kernel.Alive{NS: ns, VIP: at, MAC: b.MAC}] = kernel.AliveSpec{Drains: drains}
	if b.Mode == NAT {
		want[kernel.Real{NS: ns, MAC: b.MAC}] = kernel.RealSpec{IP: b.Addr}
	}
}

// task adds what a task's namespace has to do for its service, once that
// namespace is there. A task on several networks has one table, with a translation
// for each network to its own address there; whether it is alone is a matter of
// each network. The translations are there in mode nat too, where only a task that
// calls itself needs them.
func task(e model.Endpoint, x *Virtual, b *Backend, alone bool, want kernel.State) {
	if e.Phase != model.Taken || e.Sandbox == "" {
		return
	}
	want[kernel.TaskTable{Sandbox: e.Sandbox}] = kernel.TaskTableSpec{}
	if b.Mode == TUN {
		want[kernel.TaskTunnel{Sandbox: e.Sandbox, Addr: e.Addr}] = kernel.TaskTunnelSpec{}
	}
	// Networks with one subnet may give a task the same VIP twice. It cannot tell
	// them apart either; the smaller address has it, in whatever order they come.
	first := func(other netip.Addr) bool { return !other.IsValid() || !other.Less(e.Addr) }

	ports := x.Options.Ports.List()
	key, spec := kernel.TaskVIP{Sandbox: e.Sandbox, VIP: x.VIP}, kernel.TaskVIPSpec{Addr: e.Addr, Loop: alone && ports == nil}
	other, _ := want[key].(kernel.TaskVIPSpec)
	if first(other.Addr) {
		spec.Loop = spec.Loop || other.Loop && other.Addr == spec.Addr
		want[key] = spec
	}
	for _, p := range ports {
		to := b.to(p)
		if p.From == to && !alone {
			continue // as all others
		}
		key := kernel.TaskPort{Sandbox: e.Sandbox, VIP: x.VIP, Proto: p.Proto, Port: p.From}
		other, _ := want[key].(kernel.TaskPortSpec)
		if first(other.Addr) {
			want[key] = kernel.TaskPortSpec{Addr: e.Addr, To: to, Loop: alone}
		}
	}
}
