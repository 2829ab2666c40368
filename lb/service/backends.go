package service

import (
	"cmp"
	"net/netip"
	"slices"

	"sluice/internal/model"
)

// The forwarding modes, by their LVS names.
const (
	DR  = "dr"  // by layer 2; the task translates
	NAT = "nat" // with the backend's address; nothing is asked of the task
	TUN = "tun" // as dr, in another IP packet
)

// maxWeight bounds the number of slots; it is the largest weight that an option can have.
const maxWeight = 255

// Backend is a task's endpoint in the role of a service's backend.
type Backend struct {
	Endpoint model.EndpointID
	Node     model.NodeID // empty: this node
	Task     model.TaskID
	Addr     netip.Addr
	MAC      model.MAC
	Weight   int // 1..255
	// Mode is the one that the task was started with: its node has prepared it so,
	// and what is open to it goes on so, while an update gives new tasks another.
	Mode   string
	Ports  model.Ports // likewise
	Ready  bool        // takes new connections
	Local  bool        // on this node
	Tunnel bool        // takes packets in IPIP
	// Meshed is Ready for published ports: they ask other things of the task.
	Meshed bool
	// WhyUnmeshed is to Meshed what Why is to Ready.
	WhyUnmeshed string
	// gone says that nothing may be sent there, not what is open either: its address is
	// another endpoint's by now, or its node is down.
	gone bool
	// Why is the reason for not being Ready, for people; empty if it is.
	Why string
}

// to is the task's own port behind a port of the VIP: by the options that it was
// started with, else by the service's.
func (b *Backend) to(p model.PortMap) uint16 {
	if b.Ports != "" {
		for _, own := range b.Ports.List() {
			if own.Proto == p.Proto && own.From == p.From {
				return own.To
			}
		}
	}
	return p.To
}

// Virtual is a service on one network: its VIP and backends.
type Virtual struct {
	Service   model.ServiceID
	Name      string
	Network   model.NetworkID
	VIP       netip.Addr           // invalid: endpoint mode dnsrr, nothing to balance
	Scheduler string               // asked for; see the function Scheduler
	Mode      string               // asked for; what holds for a task is its own
	Options   model.ServiceOptions // the rest of what is asked for
	Backends  []Backend            // sorted by address
}

// Ready returns the backends that take new connections, for reading only: if
// that is all of them, which is the rule, it is the same slice.
func (v Virtual) Ready() []Backend {
	unready := func(b Backend) bool { return !b.Ready }
	if !slices.ContainsFunc(v.Backends, unready) {
		return v.Backends
	}
	return slices.DeleteFunc(slices.Clone(v.Backends), unready)
}

// Virtuals lists every service that has a VIP or a backend on one of the view's
// networks, sorted by network, name and id.
//
// A manager's record of a service decides its name, VIP and options. Where no
// manager has told of it, the VIP that its tasks' own nodes read from their
// engines is used, and the options of its smallest ready endpoint id.
func Virtuals(v model.View) []Virtual {
	out := virtuals(v, members(v))
	slices.SortFunc(out, func(a, b Virtual) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Service, b.Service))
	})
	return out
}

// virtuals is Virtuals in no order. It links the members of each place.
func virtuals(v model.View, all []member) []Virtual {
	out := make([]Virtual, 0, len(v.Services))
	first := make([]*member, 0, len(v.Services)) // of the members of out's, by index
	found := make(map[place]int, len(v.Services))
	at := func(p place) int {
		i, known := found[p]
		if !known {
			i = len(out)
			found[p] = i
			out, first = append(out, blank(v, p)), append(first, nil)
		}
		return i
	}
	for id, s := range v.Services {
		for net, vip := range s.VIPs {
			if _, here := v.Networks[net]; here {
				out[at(place{id, net})].VIP = vip
			}
		}
	}
	for i := range all {
		if m := &all[i]; m.place.service != "" {
			x := at(m.place)
			m.next, first[x] = first[x], m
		}
	}
	var ms []*member // of one service, reused
	for i := range out {
		ms = ms[:0]
		for m := first[i]; m != nil; m = m.next {
			ms = append(ms, m)
		}
		out[i].Backends = backends(v, &out[i], ms)
	}
	return out
}

// blank is a service of which no member has been looked at.
func blank(v model.View, p place) Virtual {
	n := v.Networks[p.network].Options
	s := v.Services[p.service]
	opts := s.Options[p.network]
	return Virtual{
		Service: p.service, Name: s.Name, Network: p.network,
		Scheduler: cmp.Or(opts.Scheduler, n.Scheduler, RR), Mode: cmp.Or(opts.Mode, n.Mode, DR), Options: opts,
	}
}

// backends makes the backends of a service, after filling in from its members
// what no manager has told of it. It sorts ms.
func backends(v model.View, x *Virtual, ms []*member) []Backend {
	if len(ms) == 0 {
		return nil
	}
	slices.SortFunc(ms, func(a, b *member) int {
		if c := a.Addr.Compare(b.Addr); c != 0 {
			return c
		}
		return cmp.Compare(a.Endpoint, b.Endpoint)
	})
	if _, told := v.Services[x.Service]; !told {
		hearsay(v, x, ms)
	}
	out := make([]Backend, len(ms))
	for i, m := range ms {
		b := &out[i]
		*b = m.Backend
		// The task's own, which during an update may differ from the service's.
		// Bounded here too: the number is another node's, and slots are made of it.
		b.Weight = min(max(1, cmp.Or(m.Weight, x.Options.Weight)), maxWeight)
		// Not the service's: a task that was started without one has the network's.
		b.Mode = cmp.Or(m.Mode, v.Networks[x.Network].Options.Mode, DR)
		b.gone = m.beaten != nil || m.lost
		b.Why = m.unready(x.VIP, b.Mode)
		b.Ready = b.Why == ""
		b.WhyUnmeshed = m.unmeshed()
		b.Meshed = b.WhyUnmeshed == ""
	}
	if x.Options.SlowStart > 0 {
		slowStart(v, x, out)
	}
	return out
}

// hearsay fills in name, VIP and options of a service that no manager has told
// of, from its tasks.
func hearsay(v model.View, x *Virtual, ms []*member) {
	var from *member
	for _, m := range ms {
		t, _ := m.told(v)
		x.Name = cmp.Or(x.Name, t.ServiceName)
		if !x.VIP.IsValid() {
			x.VIP = t.VIP
		}
		if m.running && (from == nil || m.Endpoint < from.Endpoint) {
			from = m
		}
	}
	if from != nil {
		_, x.Options = from.told(v)
		x.Scheduler, x.Mode = cmp.Or(x.Options.Scheduler, x.Scheduler), cmp.Or(x.Options.Mode, x.Mode)
	}
}
