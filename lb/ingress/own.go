package ingress

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sluice/internal/model"
)

// Port is a range of this node's ports that a service publishes.
type Port struct {
	Service model.ServiceID
	Network model.NetworkID // the service may be on several
	Addr    netip.Addr      // of the node; invalid: all
	model.PortRange
}

// Want is a Port with what decides who has it.
type Want struct {
	Port
	Name    string // of the service
	Created time.Time
}

// Loss is what a service publishes and does not have.
type Loss struct {
	Port
	Owner     model.ServiceID // empty: a process has it
	OwnerName string          // of the service or of the process
}

// String says what is lost, and to whom.
func (l Loss) String() string {
	at := ""
	if l.Addr.IsValid() {
		at = " of " + l.Addr.String()
	}
	ports, _, _ := strings.Cut(model.PortRange{Proto: l.Proto, Lo: l.Lo, Hi: l.Hi, To: l.Lo}.String(), "/")
	if l.Owner == "" {
		return fmt.Sprintf("port %s/%s%s is held by %s", ports, l.Proto, at, l.OwnerName)
	}
	if l.Owner == l.Service {
		return fmt.Sprintf("port %s/%s%s is published by the same service on another network", ports, l.Proto, at)
	}
	return fmt.Sprintf("port %s/%s%s belongs to service %s, which is older", ports, l.Proto, at, cmp.Or(l.OwnerName, string(l.Owner)))
}

// Wants lists what the services of the view publish on this node.
func Wants(v model.View) []Want {
	var out []Want
	for id, s := range v.Services {
		for network, o := range s.Options {
			if !enters(v, o) {
				continue
			}
			addrs := o.Bind.List()
			if o.Bind == "" {
				addrs = []netip.Addr{{}}
			}
			// Of a list that cannot be read, as another version may have told it, there is
			// no address: better a port that is not open than one that should not be.
			for _, r := range o.Published.List() {
				for _, a := range addrs {
					out = append(out, Want{Port{id, network, a, r}, s.Name, s.Created})
				}
			}
		}
	}
	return out
}

// age compares two wants by who comes first, and puts those of one service into
// an order.
func age(a, b Want) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Service, b.Service), compare(a.Port, b.Port))
}

func compare(a, b Port) int {
	return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Lo, b.Lo), a.Addr.Compare(b.Addr),
		cmp.Compare(a.Hi, b.Hi), cmp.Compare(a.To, b.To), cmp.Compare(a.Service, b.Service), cmp.Compare(a.Network, b.Network))
}

// Own decides who has each port, and what that leaves: won has no port twice, at
// one address or at all and at one; what is in wants is in either. Of services the
// older has a port; from the one that would have it, a process takes it: held says
// which. The order of wants does not matter, and both results are sorted.
func Own(wants []Want, held map[model.HostPort]string) (won []Port, lost []Loss) {
	byAge := slices.SortedFunc(slices.Values(wants), age)
	services := newTaken()
	for i, w := range byAge {
		free, gone := services.without(w.Port)
		for _, g := range gone {
			p, owner := w.cut(g.span), byAge[g.by]
			lost = append(lost, Loss{p, owner.Service, owner.Name})
		}
		for _, f := range free {
			services.add(w.Port, span{f.lo, f.hi}, i)
			won = append(won, w.cut(f))
		}
	}

	inOrder := slices.SortedFunc(maps.Keys(held), model.HostPort.Compare)
	processes := newTaken()
	for i, h := range inOrder {
		p := Port{Addr: h.Addr, PortRange: model.PortRange{Proto: h.Proto, Lo: h.Port, Hi: h.Port}}
		processes.add(p, spanOf(p), i)
	}
	var left []Port
	for _, w := range won {
		free, gone := processes.without(w)
		for _, g := range gone {
			lost = append(lost, Loss{Port: w.cut(g.span), OwnerName: held[inOrder[g.by]]})
		}
		for _, f := range free {
			left = append(left, w.cut(f))
		}
	}
	slices.SortFunc(left, compare)
	slices.SortFunc(lost, func(a, b Loss) int {
		return cmp.Or(compare(a.Port, b.Port), cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.OwnerName, b.OwnerName))
	})
	return left, inRuns(lost)
}

// inRuns makes one loss of those that continue each other: a process has its ports one
// by one, and people are told of each loss. lost is sorted.
func inRuns(lost []Loss) []Loss {
	var out []Loss
	at := make(map[Loss]int) // where the last of its kind is in out; without its numbers
	for _, l := range lost {
		kind := l
		kind.Lo, kind.Hi, kind.To = 0, 0, 0
		if i, ok := at[kind]; ok {
			p := &out[i]
			if p.Hi < l.Lo && p.Hi+1 == l.Lo && p.To+(l.Lo-p.Lo) == l.To {
				p.Hi = l.Hi
				continue
			}
		}
		at[kind] = len(out)
		out = append(out, l)
	}
	return out
}

// Ranges are the runs of ports of a result of Own, each once, by whatever service and
// in its order: what View.Tried becomes once they have been tried.
func Ranges(won []Port) []model.HostRange {
	out := make([]model.HostRange, 0, len(won))
	for _, p := range won {
		out = append(out, model.HostRange{Proto: p.Proto, Addr: p.Addr, Lo: p.Lo, Hi: p.Hi})
	}
	return out
}

// Tried is what of won may be planned: the ports that this node has tried to hold.
// Before that a process may have one, and would lose its connections to a service
// until the attempt fails. Who tried a port of all addresses knows of each.
func Tried(won []Port, tried []model.HostRange) []Port {
	if tried == nil {
		return won
	}
	inOrder := slices.SortedFunc(slices.Values(tried), func(a, b model.HostRange) int { return cmp.Compare(a.Lo, b.Lo) })
	var out []Port
	for _, w := range won {
		var run span // what was tried of w, and is not cut yet; empty: nothing
		end := func() {
			if lo, hi := max(run.lo, int(w.Lo)), min(run.hi, int(w.Hi)); lo <= hi {
				out = append(out, w.cut(span{lo, hi}))
			}
		}
		for _, r := range inOrder {
			switch {
			case r.Proto != w.Proto || r.Addr.IsValid() && r.Addr != w.Addr:
			case int(r.Lo) <= run.hi+1: // one run, so that the kernel's object stays one
				run.hi = max(run.hi, int(r.Hi))
			default:
				end()
				run = span{int(r.Lo), int(r.Hi)}
			}
		}
		end()
	}
	return out
}

// AllTried says whether the node has tried to hold every port that is its, as far as
// the view knows.
func AllTried(v model.View) bool {
	won, _ := Own(Wants(v), nil) // what processes have is known by trying
	return count(Tried(won, v.Tried)) == count(won)
}

func count(ports []Port) int {
	n := 0
	for _, p := range ports {
		n += int(p.Hi-p.Lo) + 1
	}
	return n
}

// HostPorts are the ports of a result of Own one by one, as processes have them.
func HostPorts(won []Port) []model.HostPort {
	out := make([]model.HostPort, 0, count(won))
	for _, p := range won {
		for i := int(p.Lo); i <= int(p.Hi); i++ {
			out = append(out, model.HostPort{Proto: p.Proto, Addr: p.Addr, Port: uint16(i)})
		}
	}
	return out
}

// span is a run of ports, both ends included.
type span struct{ lo, hi int }

func spanOf(p Port) span { return span{int(p.Lo), int(p.Hi)} }

// cut is what a port is within a span of its own.
func (p Port) cut(s span) Port {
	p.To += uint16(s.lo) - p.Lo
	p.Lo, p.Hi = uint16(s.lo), uint16(s.hi)
	return p
}

// had is a span that someone has.
type had struct {
	span
	by int // a smaller number comes first
}

// taken is who has what: by protocol and address, sorted by port. The invalid
// address is all addresses.
type taken map[model.Proto]map[netip.Addr][]had

func newTaken() taken { return make(taken) }

// add takes a span, of what nobody has or of what someone has as well.
func (t taken) add(p Port, s span, by int) {
	if t[p.Proto] == nil {
		t[p.Proto] = make(map[netip.Addr][]had)
	}
	l := t[p.Proto][p.Addr]
	i, _ := slices.BinarySearchFunc(l, s.lo, func(h had, lo int) int { return cmp.Compare(h.lo, lo) })
	t[p.Proto][p.Addr] = slices.Insert(l, i, had{s, by})
}

// without is what is left of p, and what is not with who comes first there.
func (t taken) without(p Port) (free []span, gone []had) {
	var in []had
	want := spanOf(p)
	for addr, l := range t[p.Proto] {
		if addr.IsValid() && p.Addr.IsValid() && addr != p.Addr {
			continue
		}
		// One list has no port twice, so what ends before want begins stands before
		// what does not.
		i, _ := slices.BinarySearchFunc(l, want.lo, func(h had, lo int) int { return cmp.Compare(h.hi, lo) })
		for ; i < len(l) && l[i].lo <= want.hi; i++ {
			in = append(in, l[i])
		}
	}
	slices.SortFunc(in, func(a, b had) int { return cmp.Or(cmp.Compare(a.by, b.by), cmp.Compare(a.lo, b.lo)) })
	free = []span{want}
	for _, h := range in {
		var rest []span
		for _, f := range free {
			lo, hi := max(f.lo, h.lo), min(f.hi, h.hi)
			if lo > hi {
				rest = append(rest, f)
				continue
			}
			gone = append(gone, had{span{lo, hi}, h.by})
			if f.lo < lo {
				rest = append(rest, span{f.lo, lo - 1})
			}
			if hi < f.hi {
				rest = append(rest, span{hi + 1, f.hi})
			}
		}
		free = rest
	}
	return free, gone
}
