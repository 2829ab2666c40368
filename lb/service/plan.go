package service

import (
	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Plan adds the balancers of the view's networks and the translations of this
// node's tasks to want.
func Plan(v model.View, want kernel.State) {
	netns := make(map[model.NetworkID]string, len(v.Networks))
	by := make(map[model.NetworkID]string, len(v.Networks))
	for id, n := range v.Networks {
		netns[id] = overlay.NetnsName(n)
		by[id] = Datapath(v.Self, n)
		if by[id] == IPVS {
			ipvsBalancer(netns[id], want)
		} else {
			balancer(n, want)
		}
	}
	all := members(v)
	for i := range all {
		m := &all[i]
		net := m.place.network
		if by[net] == NFT && m.Local && m.beaten == nil && v.Endpoints[m.Endpoint].Phase != model.Created {
			want[kernel.Member{NS: netns[net], IP: m.Addr}] = kernel.MemberSpec{MAC: m.MAC}
		}
	}
	xs := virtuals(v, all)
	owner := owners(v, xs)
	for i := range xs {
		x := &xs[i]
		if !x.VIP.IsValid() {
			continue
		}
		ns := netns[x.Network]
		ready := x.Ready()
		if owner[site{x.Network, x.VIP}] == i {
			want[kernel.Addr{NS: ns, Dev: overlay.BridgeName, Prefix: host(x.VIP)}] = kernel.AddrSpec{}
			if by[x.Network] == IPVS {
				ipvsVirtual(v.Networks[x.Network], x, want)
			} else {
				virtual(ns, x, ready, want)
			}
		}
		for j := range x.Backends {
			b := &x.Backends[j]
			if by[x.Network] == NFT {
				want[kernel.Alive{NS: ns, VIP: x.VIP, MAC: b.MAC}] = kernel.AliveSpec{}
			}
			if b.Local {
				task(v.Endpoints[b.Endpoint], x, len(ready) == 1 && b.Ready, want)
			}
		}
	}
	// Once the services of all owners are there.
	for i := range xs {
		if x := &xs[i]; x.VIP.IsValid() && by[x.Network] == IPVS {
			ipvsKeep(v.Networks[x.Network], x, want)
		}
	}
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

func balancer(n model.Network, want kernel.State) {
	spec := kernel.BridgeTableSpec{Router: overlay.RouterMAC(n)}
	if !n.Local {
		spec.Uplink = overlay.VXLANName
	}
	want[kernel.BridgeTable{NS: overlay.NetnsName(n)}] = spec
}

// virtual adds what a service's VIP is on this node, if nftables balances it.
func virtual(ns string, x *Virtual, ready []Backend, want kernel.State) {
	slots := Slots(x.Scheduler, ready)
	want[kernel.VIP{NS: ns, IP: x.VIP}] = kernel.VIPSpec{Scheduler: x.Scheduler, Slots: len(slots)}
	for i, b := range slots {
		want[kernel.Slot{NS: ns, VIP: x.VIP, Slot: i}] = kernel.SlotSpec{MAC: ready[b].MAC}
	}
	for i := range ready {
		if b := &ready[i]; b.Local && len(ready) > 1 {
			next := &ready[(i+1)%len(ready)]
			want[kernel.Other{NS: ns, VIP: x.VIP, Client: b.Addr}] = kernel.OtherSpec{MAC: next.MAC}
		}
	}
}

// task adds the translation in a task's namespace, once that namespace is there.
// A task on several networks has one table, with a translation for each network
// to its own address there; whether it is alone is a matter of each network.
func task(e model.Endpoint, x *Virtual, alone bool, want kernel.State) {
	if e.Phase != model.Taken || e.Sandbox == "" {
		return
	}
	want[kernel.TaskTable{Sandbox: e.Sandbox}] = kernel.TaskTableSpec{}
	key, spec := kernel.TaskVIP{Sandbox: e.Sandbox, VIP: x.VIP}, kernel.TaskVIPSpec{Addr: e.Addr, Loop: alone}
	// Networks with one subnet may give a task the same VIP twice. It cannot tell
	// them apart either; the smaller address has it, in whatever order they come.
	if other, twice := want[key].(kernel.TaskVIPSpec); twice {
		switch c := other.Addr.Compare(spec.Addr); {
		case c < 0:
			return
		case c == 0:
			spec.Loop = spec.Loop || other.Loop
		}
	}
	want[key] = spec
}
