package kernel

import (
	"cmp"
	"maps"
	"slices"
)

// Op is one change to one object.
type Op struct {
	Key  Key
	Want Value // nil: delete
	Have Value // nil: create; otherwise what is there now
}

// String is the object's line behind + (create), ~ (change) or - (delete), as `sluice diff` prints it.
func (o Op) String() string {
	switch {
	case o.Want == nil:
		return "- " + Line(o.Key, o.Have)
	case o.Have == nil:
		return "+ " + Line(o.Key, o.Want)
	}
	return "~ " + Line(o.Key, o.Want) + "  (is: " + o.Have.String() + ")"
}

// Diff computes what leads from have to want, in an order that can be applied
// as it stands: what others refer to is made first; deletions follow, backwards.
// The VIP objects of a namespace are the exception: their deletions stand right
// behind their creations, so that an adapter can change a namespace's nftables
// in one transaction and no packet sees a half-changed service.
//
// Three rules keep it from asking for the impossible or the needless:
//   - A veth pair marked Taken is never created: it ended with its task.
//   - Objects inside a namespace that is to go are not deleted one by one, but
//     for its VXLAN device: the kernel destroys a namespace's devices late, and
//     until then the VNI would be refused to a new network.
//   - Translations in a task's namespace are not deleted one by one when its
//     table goes: the table takes them with it. Nor are the destinations of an
//     IPVS service that goes. Published ports are: they are the first to go, and
//     their table is the last.
//
// And one makes up for what the kernel does: a VXLAN device whose VNI, port or
// source changes is made anew and loses its forwarding entries, so they are set
// again right behind it.
func Diff(have, want State) []Op {
	var sets, dels []Op
	anew := remade(have, want)
	gone := len(have) // objects that are not wanted: as many as are left over
	for k, w := range want {
		h, ok := have[k]
		if ok {
			gone--
		}
		if f, isFDB := k.(FDB); isFDB && anew[Link{f.NS, f.Dev, VXLAN}] {
			ok = false
		}
		if ok && equal(h, w) {
			continue
		}
		if !ok {
			if l, isLink := w.(LinkSpec); isLink && l.Taken {
				continue
			}
			h = nil
		}
		sets = append(sets, Op{Key: k, Want: w, Have: h})
	}
	for k, h := range have {
		if gone == 0 {
			break // half of the time of a difference is looking for what is not there
		}
		if _, ok := want[k]; ok {
			continue
		}
		gone--
		if dies(have, want, k) {
			continue
		}
		dels = append(dels, Op{Key: k, Have: h})
	}
	slices.SortFunc(sets, func(a, b Op) int { return byPhase(a.Key, b.Key) })
	slices.SortFunc(dels, func(a, b Op) int { return -byPhase(a.Key, b.Key) })

	// Deletions of VIP objects move to the end of that phase's creations.
	isVIP := func(o Op) bool { return o.Key.Phase() == PhaseVIP }
	after := slices.IndexFunc(sets, func(o Op) bool { return o.Key.Phase() > PhaseVIP })
	if after < 0 {
		after = len(sets)
	}
	ops := make([]Op, 0, len(sets)+len(dels))
	ops = append(ops, sets[:after]...)
	for _, o := range dels {
		if isVIP(o) {
			ops = append(ops, o)
		}
	}
	ops = append(ops, sets[after:]...)
	for _, o := range dels {
		if !isVIP(o) {
			ops = append(ops, o)
		}
	}
	return ops
}

// equal compares a found value with a wanted one. Taken is a word of the plan
// that no kernel can show; and a container's end that the engine has taken is
// the task's now, whatever the plan still says of it. For TaskRouteSpec.Loose, see there.
func equal(have, want Value) bool {
	h, ok1 := have.(LinkSpec)
	w, ok2 := want.(LinkSpec)
	if ok1 && ok2 {
		h.Taken = w.Taken
		if !w.Kept && (w.Taken || h.Peer == "") {
			h.Peer, h.PeerMAC = w.Peer, w.PeerMAC
		}
		return h == w
	}
	if h, ok := have.(TaskRouteSpec); ok {
		if w, ok := want.(TaskRouteSpec); ok && !w.Loose {
			h.Loose = false
			return h == w
		}
	}
	return have == want
}

// remade lists the VXLAN devices that cannot become what is wanted without being
// made anew; nil if there is none, which is the rule.
func remade(have, want State) map[Link]bool {
	var out map[Link]bool
	for k, v := range have {
		l, isLink := k.(Link)
		if !isLink || l.Kind != VXLAN {
			continue
		}
		h, ok1 := v.(LinkSpec)
		w, ok2 := want[k].(LinkSpec)
		if ok1 && ok2 && (h.VNI != w.VNI || h.Port != w.Port || h.Local != w.Local) {
			if out == nil {
				out = make(map[Link]bool)
			}
			out[l] = true
		}
	}
	return out
}

// dies reports whether the object goes by itself when something else does.
func dies(have, want State, k Key) bool {
	switch k := k.(type) {
	case Netns, Filter, FilterPeer, Forward, TaskTable:
		return false
	case IPVSDest:
		_, there := have[IPVSService{k.NS, k.Mark}]
		_, wanted := want[IPVSService{k.NS, k.Mark}]
		if there && !wanted {
			return true
		}
	case Link:
		if k.Kind == VXLAN {
			return false
		}
	case TaskVIP:
		return tableDies(have, want, k.Sandbox)
	case TaskPort:
		return tableDies(have, want, k.Sandbox)
	case TaskMesh:
		return tableDies(have, want, k.Sandbox)
	}
	if k.Netns() == "" {
		return false
	}
	_, there := have[Netns{k.Netns()}]
	_, wanted := want[Netns{k.Netns()}]
	return there && !wanted
}

// tableDies reports whether the table of a task's namespace goes.
func tableDies(have, want State, sandbox string) bool {
	_, there := have[TaskTable{sandbox}]
	_, wanted := want[TaskTable{sandbox}]
	return there && !wanted
}

// byPhase orders by phase, then by the order of the text form, with a table
// before what is in it.
func byPhase(a, b Key) int {
	return cmp.Or(
		cmp.Compare(a.Phase(), b.Phase()),
		cmp.Compare(a.Netns(), b.Netns()),
		cmp.Compare(rank(a), rank(b)),
		naturalCompare(a.String(), b.String()),
	)
}

// rank orders kinds that share a phase.
func rank(k Key) int {
	switch k.(type) {
	case BridgeTable, TaskTable, TaskTunnel, TaskRoute, Filter, MarkTable, LiftTable, BackTable, IPVSTimeouts:
		return 0
	case GuardTable, GuardPort, GuardAddr:
		return 0 // in one go: a guard that knows nobody yet would let nobody speak
	case VIP, IPVSService, LiftFrom, LiftTo, Back, MeshNet, MeshMasq, MeshAllow:
		return 1 // answers have a way before there are any
	case Mark, MeshPort, MeshRange:
		return 3 // a packet comes to a service that has all its backends
	}
	return 2
}

// Apply is what a perfect kernel does with ops: the state that results. have
// is not changed. The loop's memory, the fake kernel and the property tests
// share it.
func Apply(have State, ops []Op) State {
	if len(ops) == 0 {
		return have
	}
	out := maps.Clone(have)
	if out == nil {
		out = State{}
	}
	for _, o := range ops {
		if o.Want != nil {
			out[o.Key] = o.Want
			continue
		}
		delete(out, o.Key)
		switch o.Key.(type) {
		case Netns, TaskTable, BridgeTable, MarkTable, LiftTable, BackTable, GuardTable, MeshTable, IPVSService:
			maps.DeleteFunc(out, func(k Key, _ Value) bool { return inside(k, o.Key) })
		}
	}
	return out
}

// inside reports whether k is destroyed with the deleted object of key gone.
func inside(k, gone Key) bool {
	switch gone := gone.(type) {
	case Netns:
		return k.Netns() == gone.Name
	case TaskTable:
		switch k := k.(type) {
		case TaskVIP:
			return k.Sandbox == gone.Sandbox
		case TaskPort:
			return k.Sandbox == gone.Sandbox
		case TaskMesh:
			return k.Sandbox == gone.Sandbox
		}
	case BackTable:
		b, ok := k.(Back)
		return ok && b.NS == gone.NS
	case GuardTable:
		switch k.(type) {
		case GuardPort, GuardAddr:
			return k.Netns() == gone.NS
		}
	case MeshTable:
		switch k.(type) {
		case MeshNet, MeshPort, MeshRange, MeshMasq, MeshAllow:
			return true
		}
	case BridgeTable:
		switch k.(type) {
		case Member, VIP, Port, Real, Slot, Alive, Other:
			return k.Netns() == gone.NS
		}
	case LiftTable:
		switch k.(type) {
		case LiftFrom, LiftTo:
			return k.Netns() == gone.NS
		}
	case MarkTable:
		m, ok := k.(Mark)
		return ok && m.NS == gone.NS
	case IPVSService:
		d, ok := k.(IPVSDest)
		return ok && d.NS == gone.NS && d.Mark == gone.Mark
	}
	return false
}
