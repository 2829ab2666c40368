package pool

import (
	"net/netip"
	"slices"
	"time"

	"sluice/internal/model"
)

// Verdict is what became of an address.
type Verdict string

// Verdicts.
const (
	InUse     Verdict = "used"        // leased, and somebody has it
	Listed    Verdict = "listed"      // somebody has it; whether it is leased is for another to know
	Unclaimed Verdict = "unclaimed"   // leased; nobody has it, yet or any more
	Leaked    Verdict = "leaked"      // that for longer than LeakAfter
	Doubtful  Verdict = "unconfirmed" // leased; not heard of since the last change of leader
	NotLeased Verdict = "not leased"  // somebody has it who was not given it: the next PlanConfirm leases it
	Double    Verdict = "double"      // two have it
)

// Account is one address and who has it.
type Account struct {
	Address netip.Addr
	Verdict Verdict
	Listed  []model.Holder // by the managers
	Holding []model.Holder // endpoints, by the nodes
	Since   time.Time      // of Unclaimed and Leaked
}

// Accounts joins what is leased, what the managers list and what the nodes have,
// in the order of the addresses. leases counts only with decides: a manager that
// does not lead, or has not heard all that the leader has, has old ones.
func Accounts(leases []Lease, decides bool, listed, holding []model.Holder, now time.Time) []Account {
	by := make(map[netip.Addr]*Account)
	get := func(a netip.Addr) *Account {
		if by[a] == nil {
			by[a] = &Account{Address: a, Verdict: Listed}
			if decides {
				by[a].Verdict = NotLeased
			}
		}
		return by[a]
	}
	for _, h := range listed {
		x := get(h.Addr)
		x.Listed = append(x.Listed, h)
	}
	for _, h := range holding {
		x := get(h.Addr)
		x.Holding = append(x.Holding, h)
	}
	for _, l := range leases {
		if !decides {
			break
		}
		x := get(l.Address)
		switch {
		case l.Unconfirmed:
			x.Verdict = Doubtful
		case l.Leaked(now):
			x.Verdict, x.Since = Leaked, l.Orphaned
		case l.Gateway || len(x.Listed)+len(x.Holding) > 0:
			x.Verdict = InUse
		default:
			x.Verdict, x.Since = Unclaimed, l.Orphaned
		}
	}
	out := make([]Account, 0, len(by))
	for _, x := range by {
		if x.double() {
			x.Verdict = Double
		}
		out = append(out, *x)
	}
	slices.SortFunc(out, func(a, b Account) int { return a.Address.Compare(b.Address) })
	return out
}

// double reports whether two have the address: two by the managers' lists, a
// task by those and another task's container by a node's word, or containers of
// two nodes. Two endpoints of one node are one container that was started anew.
func (x *Account) double() bool {
	listed, nodes := make(map[[2]string]bool), make(map[model.NodeID]bool)
	for _, h := range x.Listed {
		listed[[2]string{string(h.Kind), h.ID}] = true
	}
	for _, e := range x.Holding {
		nodes[e.Node] = true
		for _, h := range x.Listed {
			// What has no task of its own here, as `docker run`, has one in the lists.
			if h.Kind == model.HolderTask && e.ID != "" && e.ID != h.ID || h.Kind == model.HolderGateway || h.Kind == model.HolderService {
				return true
			}
		}
	}
	return len(listed) > 1 || len(nodes) > 1
}
