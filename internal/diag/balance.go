package diag

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// balancer is what the kernel of this node has at one address of a service, its
// virtual IP or the alias of its published ports.
type balancer struct {
	ipvs    []EntryIPVS
	traffic *Traffic     // of the address; nil: not known
	why     string       // traffic is not known, here or at the backends
	counts  []kernel.Key // objects that the kernel counts at for certain
	taken   bool         // by somebody: new connections
}

// planned is what this node's kernel should have, by the newest view.
type planned struct {
	want kernel.State
	ways []service.Way
}

func planOf(v model.View) planned {
	return planned{want: plan.Host(v), ways: service.Ways(v, ingress.Balanced(v))}
}

// balance is what balances a service at one of its addresses, which is called name.
// It adds to backends, which are those of x in order.
func balance(datapath, ns, name string, addr netip.Addr, x service.Virtual, p planned, traffic map[kernel.Key]kernel.Traffic, backends []EntryBackend) balancer {
	if datapath != service.IPVS {
		return byNFT(ns, name, addr, x.Backends, p.want, traffic, backends)
	}
	var ways []service.Way
	for _, w := range p.ways {
		if w.Network == x.Network && w.At == addr {
			ways = append(ways, w)
		}
	}
	return byIPVS(ns, ways, x.Backends, p.want, traffic, backends)
}

// compare is what prints the balancers of a network, in its namespace.
func compare(datapath string) string {
	if datapath == service.IPVS {
		return "ipvsadm -Ln --stats"
	}
	return "nft list table bridge sluice"
}

// byIPVS is what IPVS has for an address, by the marks that the plan gives it: ways
// are those to the address. It adds to backends, which are those of at in order.
func byIPVS(ns string, ways []service.Way, at []service.Backend, want kernel.State, traffic map[kernel.Key]kernel.Traffic, backends []EntryBackend) balancer {
	out := balancer{ipvs: []EntryIPVS{}}
	index := make(map[netip.Addr]*EntryBackend)
	for i, b := range at {
		index[b.Addr] = &backends[i]
	}
	// By port, and for each the service for everybody first: an invalid address is
	// before all others. Those without a mark come last.
	marked := func(w service.Way) bool {
		return want[kernel.Mark{NS: ns, VIP: w.At, Client: w.Client, Proto: w.Port.Proto, Port: w.Port.From}] != nil
	}
	slices.SortFunc(ways, func(a, b service.Way) int {
		if x, y := marked(a), marked(b); x != y {
			if x {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.Port.From, b.Port.From), cmp.Compare(a.Port.Proto, b.Port.Proto), a.Client.Compare(b.Client))
	})
	dests := destinations(ns, want)
	for _, w := range ways {
		key := kernel.IPVSService{NS: ns, Mark: w.Mark}
		unmarked := !marked(w)
		if want[key] == nil || unmarked && len(dests[w.Mark]) == 0 {
			continue // it has nothing open
		}
		spec, _ := want[key].(kernel.IPVSServiceSpec)
		svc := EntryIPVS{
			Mark: w.Mark, Unmarked: unmarked, Scheduler: spec.Scheduler,
			Flags:   strings.TrimSpace(strings.TrimPrefix(spec.String(), spec.Scheduler)),
			Traffic: counted(traffic, key), Destinations: []EntryDest{},
		}
		if w.Client.IsValid() {
			svc.Client = w.Client.String()
		}
		if w.Port.From != 0 {
			svc.Port = fmt.Sprintf("%d/%s", w.Port.From, w.Port.Proto)
		} else {
			svc.Proto = string(w.Port.Proto)
		}
		out.counts = append(out.counts, key)
		for _, k := range dests[w.Mark] {
			spec, _ := want[k].(kernel.IPVSDestSpec)
			t := counted(traffic, k)
			svc.Destinations = append(svc.Destinations, EntryDest{
				Addr: netip.AddrPortFrom(k.IP, k.Port).String(), Method: string(spec.Method), Weight: spec.Weight, Traffic: t,
			})
			out.counts = append(out.counts, k)
			if b := index[k.IP]; b != nil {
				b.Method, b.Traffic = string(spec.Method), b.Traffic.plus(t)
			}
			out.taken = out.taken || !unmarked && spec.Weight > 0
		}
		out.ipvs, out.traffic = append(out.ipvs, svc), out.traffic.plus(svc.Traffic)
	}
	return out
}

// destinations are those of a namespace's IPVS services by mark, sorted.
func destinations(ns string, want kernel.State) map[uint32][]kernel.IPVSDest {
	out := make(map[uint32][]kernel.IPVSDest)
	for k := range want {
		if d, ok := k.(kernel.IPVSDest); ok && d.NS == ns {
			out[d.Mark] = append(out[d.Mark], d)
		}
	}
	for _, ds := range out {
		slices.SortFunc(ds, func(a, b kernel.IPVSDest) int {
			return cmp.Or(a.IP.Compare(b.IP), cmp.Compare(a.Port, b.Port))
		})
	}
	return out
}

// byNFT is what nftables has for an address, which is called name. It adds to backends.
func byNFT(ns, name string, addr netip.Addr, at []service.Backend, want kernel.State, traffic map[kernel.Key]kernel.Traffic, backends []EntryBackend) balancer {
	key := kernel.VIP{NS: ns, IP: addr}
	spec, planned := want[key].(kernel.VIPSpec)
	if !planned {
		return balancer{}
	}
	for i := range backends {
		backends[i].Method = string(kernel.IPVSDR)
		if spec.NAT && want[kernel.Real{NS: ns, MAC: at[i].MAC}] != nil {
			backends[i].Method = string(kernel.IPVSNAT)
		}
	}
	out := balancer{traffic: counted(traffic, key), why: "nftables has counted nothing", taken: spec.Slots > 0}
	if out.traffic != nil {
		out.why = "nftables counts for the " + name + ", not for each backend"
	}
	return out
}
