package diag

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/service"
)

// trafficTime bounds the reading of the kernel's counters for one answer, of however
// many namespaces. Who asks waits three times as long.
const trafficTime = 5 * time.Second

// Service answers where the entry of a service is on this node. name is its
// name, its id or the beginning of its id; network, a name or id, chooses one of
// its networks, empty means all. The error says which there are.
func (s *Server) Service(ctx context.Context, name, network string) (Entry, error) {
	ctx, cancel := context.WithTimeout(ctx, trafficTime)
	defer cancel()
	v := s.cfg.Hub.View()
	all := service.Virtuals(v)
	xs, err := find(v, all, name)
	if err != nil {
		return Entry{}, err
	}
	if network != "" {
		if xs, err = on(v, xs, network); err != nil {
			return Entry{}, err
		}
	}
	out := Entry{Name: xs[0].Name, ID: string(xs[0].Service), Problems: []Problem{}}
	p, names, d := planOf(v), s.nodeNames(v), s.doors()
	for _, x := range xs {
		n, ps := s.entry(ctx, v, x, p, names)
		ps = append(ps, d.service(ctx, s, x, p, &n)...)
		for _, o := range all {
			if o.Service != x.Service && o.Network == x.Network && o.VIP == x.VIP && x.VIP.IsValid() {
				ps = append(ps, Problem{
					What: fmt.Sprintf("service %s claims the VIP %s on network %s too", orElse(o.Name, string(o.Service)), x.VIP, n.Network),
					Do:   "normal for seconds, while it passes from a removed service to a new one; if it stays, report it",
				})
			}
		}
		out.Networks, out.Problems = append(out.Networks, n), append(out.Problems, ps...)
	}
	return out, nil
}

// find is the service that a person means, on each of its networks.
func find(v model.View, all []service.Virtual, name string) ([]service.Virtual, error) {
	for _, fits := range []func(service.Virtual) bool{
		func(x service.Virtual) bool { return string(x.Service) == name },
		func(x service.Virtual) bool { return name != "" && x.Name == name },
		func(x service.Virtual) bool { return name != "" && strings.HasPrefix(string(x.Service), name) },
	} {
		var found []service.Virtual
		ids := make(map[model.ServiceID]string)
		for _, x := range all {
			if fits(x) {
				found = append(found, x)
				ids[x.Service] = fmt.Sprintf("%s (%s)", orDash(x.Name), x.Service)
			}
		}
		switch {
		case len(ids) > 1:
			return nil, fmt.Errorf("%q fits several services: %s; name one by its id", name, strings.Join(sorted(ids), ", "))
		case len(ids) == 1:
			return found, nil
		}
	}
	for id, svc := range v.Services {
		if svc.Name == name || string(id) == name {
			return nil, fmt.Errorf("service %q is on no network that this node serves; ask a node with a container of one of its sluice networks", name)
		}
	}
	there := make(map[model.ServiceID]string)
	for _, x := range all {
		there[x.Service] = orElse(x.Name, string(x.Service))
	}
	return nil, fmt.Errorf("no service %q on this node's networks; there is: %s", name, nearest(name, sorted(there)))
}

// on is the service on the network that a person means.
func on(v model.View, xs []service.Virtual, network string) ([]service.Virtual, error) {
	there := make(map[model.NetworkID]string)
	for _, fits := range []func(service.Virtual) bool{
		func(x service.Virtual) bool { return string(x.Network) == network },
		func(x service.Virtual) bool { return v.Networks[x.Network].Name == network },
		func(x service.Virtual) bool { return strings.HasPrefix(string(x.Network), network) },
	} {
		var found []service.Virtual
		for _, x := range xs {
			there[x.Network] = orElse(v.Networks[x.Network].Name, string(x.Network))
			if fits(x) {
				found = append(found, x)
			}
		}
		if len(found) == 1 {
			return found, nil
		}
	}
	return nil, fmt.Errorf("service %s is not on one network %q of this node; it is on: %s", orElse(xs[0].Name, string(xs[0].Service)), network, nearest(network, sorted(there)))
}

// entry is a service on one network, and what is wrong with it.
func (s *Server) entry(ctx context.Context, v model.View, x service.Virtual, p planned, names map[string]string) (EntryNetwork, []Problem) {
	net := v.Networks[x.Network]
	opts := x.Options
	out := EntryNetwork{
		Network: orElse(net.Name, x.Network.Short()), ID: string(x.Network), Netns: overlay.NetnsName(net),
		Ports: []string{}, Mode: x.Mode, Scheduler: x.Scheduler, Datapath: service.Datapath(v.Self, net), DatapathReason: s.whyDatapath(v.Self, net),
		Persist: opts.Persist, PersistBits: opts.PersistBits, OnePacket: opts.OnePacket, Upper: opts.Upper, Lower: opts.Lower, Idle: opts.Idle, Drain: opts.Drain, SlowStart: opts.SlowStart, Ended: s.cfg.Ended()[x.Service],
		Backends: []EntryBackend{}, IPVS: []EntryIPVS{}, Published: []Port{},
	}
	out.SchedulerUsed, out.SchedulerReason = service.Scheduler(&x, out.Datapath)
	for _, p := range opts.Ports.List() {
		out.Ports = append(out.Ports, p.String())
	}
	for _, b := range x.Backends {
		out.Backends = append(out.Backends, EntryBackend{Backend: backend(b, names)})
	}
	if !x.VIP.IsValid() {
		return out, s.withoutVIP(v, x)
	}
	out.VIP = x.VIP.String()
	out.Compare = "nsenter --net=/run/netns/" + out.Netns + " "

	// Objects that the last round wanted and did not fail with are in the kernel;
	// those that the next makes may not be yet. Asked before and after the reading,
	// so that a round meanwhile is not taken for damage.
	before := s.cfg.Loop.Last()
	traffic, err := s.traffic(ctx, out.Netns)
	after := s.cfg.Loop.Last()
	missing := func(k kernel.Key) bool {
		_, there := traffic[k]
		return err == nil && !there && before.Want[k] != nil && after.Want[k] != nil && after.Failed[k] == nil
	}

	out.Compare += compare(out.Datapath)
	b := balance(out.Datapath, out.Netns, "VIP", x.VIP, x, p, traffic, out.Backends)
	out.Traffic, out.Uncounted = b.traffic, b.why
	if b.ipvs != nil {
		out.IPVS = b.ipvs
	}

	ps := failures(after, "network "+out.Network+": ", func(k kernel.Key) bool {
		return k.Netns() == out.Netns || k == kernel.Netns{Name: out.Netns}
	})
	if err != nil {
		out.Uncounted = err.Error()
		if s.cfg.Traffic != nil {
			ps = append(ps, Problem{What: "the kernel's counters cannot be read: " + err.Error(), Do: "sluice diff says what the kernel lacks"})
		}
	}
	for _, k := range b.counts {
		if missing(k) {
			ps = append(ps, Problem{What: k.String() + " is not in the kernel", Do: "it is made again within seconds; if not, sluice status says what refuses"})
		}
	}
	if !b.taken {
		ps = append(ps, refusing(x))
	}
	return out, ps
}

// traffic reads what the kernel has counted in a network's namespace.
func (s *Server) traffic(ctx context.Context, ns string) (map[kernel.Key]kernel.Traffic, error) {
	if s.cfg.Traffic == nil {
		return nil, errors.New("this plugin does not read the kernel's counters")
	}
	out, err := within(ctx, s.counts, func() (map[kernel.Key]kernel.Traffic, error) { return s.cfg.Traffic(ctx, ns) })
	if errors.Is(err, errNoAnswer) {
		return nil, fmt.Errorf("counters of namespace %s: %w within %s; see the kernel's log (dmesg) for tasks that hang", ns, err, trafficTime)
	}
	return out, err
}

// withoutVIP lists what is wrong with a service that has no VIP on a network.
func (s *Server) withoutVIP(v model.View, x service.Virtual) []Problem {
	told, known := v.Services[x.Service]
	switch {
	case !known:
		return []Problem{{
			What: "no manager has told of the service yet, and no task's engine names a VIP",
			Do:   "normal for seconds after its creation; if it stays, see sluice status here and on the leader",
		}}
	case len(told.VIPs) > 0 && !v.Networks[x.Network].Local:
		return []Problem{{
			What: fmt.Sprintf("the service has VIPs on other networks, but none on %s", orElse(v.Networks[x.Network].Name, x.Network.Short())),
			Do:   "see docker service inspect, Endpoint: VirtualIPs; docker service update --force " + x.Name,
		}}
	case len(x.Ready()) == 0:
		return []Problem{refusing(x)}
	}
	return nil
}

// refusing is the problem of a service that takes no new connections.
func refusing(x service.Virtual) Problem {
	name := orElse(x.Name, string(x.Service))
	effect := "connections to it are refused"
	if !x.VIP.IsValid() {
		effect = "its name leads to none" // dnsrr: the engine's DNS decides
	}
	ready := "none is ready"
	if len(x.Ready()) > 0 {
		ready = "none takes new connections: their weight is 0"
	}
	return Problem{
		What: fmt.Sprintf("service %s has %d tasks and %s: %s", name, len(x.Backends), ready, effect),
		Do:   "see docker service ps --no-trunc " + name,
	}
}

// whyDatapath is why a network has the datapath on this node that it has.
func (s *Server) whyDatapath(self model.Self, n model.Network) string {
	switch used := service.Datapath(self, n); used {
	case n.Options.Datapath:
		return "the network asks for it"
	case service.IPVS:
		return "this node has ip_vs"
	}
	for _, a := range s.cfg.Abilities() {
		if a.Name == AbilityIPVS && a.Err != nil {
			return "this node has no ip_vs: " + a.Err.Error()
		}
	}
	return "this node has no ip_vs"
}

// nodeNames are the names of the nodes by id; that of "" is this node's.
func (s *Server) nodeNames(v model.View) map[string]string {
	names := map[string]string{"": orElse(s.cfg.Hub.Engine().HostName, string(v.Self.Node))}
	for _, p := range s.cfg.Hub.Peers() {
		names[string(p.Node)] = p.Name
	}
	return names
}

// sorted are the values, in order.
func sorted[K comparable](m map[K]string) []string {
	out := make([]string, 0, len(m))
	for _, s := range m {
		out = append(out, s)
	}
	slices.Sort(out)
	return out
}

// nearMax is how many names a person is shown who has mistyped one: a line or two.
const nearMax = 8

// nearest lists names, those most like what was typed first.
func nearest(typed string, names []string) string {
	if len(names) == 0 {
		return "none"
	}
	near := slices.Clone(names)
	slices.SortStableFunc(near, func(a, b string) int { return cmp.Compare(distance(typed, a), distance(typed, b)) })
	if more := len(near) - nearMax; more > 0 {
		return strings.Join(near[:nearMax], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(near, ", ")
}

// distance is how many bytes must be put in, taken out or changed to make b of a
// (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			d := diagonal
			if a[i] != b[j] {
				d++
			}
			diagonal = row[j+1]
			row[j+1] = min(d, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
