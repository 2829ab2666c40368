package kernel

import "slices"

// Notices is what the kernel has told of changes, whoever made them. It is a hint:
// what it says is compared with what is remembered, and only a difference is a
// reason to read the kernel back. Of one object the last word counts, so that what
// came and went in between is none.
type Notices struct {
	// Objects are those that were told of with all that there is to say: what each
	// is now, nil if it is gone. Some parts cannot be told and are zero: of a link in a
	// namespace of ours the other end; and of a pair's end in the host's namespace
	// (Netns empty), all but its MTU, which is 0 while it is down.
	Objects map[Key]Value
	// Others are changes by other hands of which only the place is known, such as a
	// table, one text each: whether they matter, only the kernel can say.
	Others []string
}

// maxNotices bounds the objects that wait to be compared, some 200 bytes each. A
// network of a thousand endpoints that goes tells of two thousand.
const maxNotices = 4096

// maxOthers is how many places are named; the rest is of no more use.
const maxOthers = 8

// Empty reports whether nothing was told.
func (n *Notices) Empty() bool { return len(n.Objects) == 0 && len(n.Others) == 0 }

// Tell adds what is known of one object.
func (n *Notices) Tell(k Key, now Value) {
	if n.Objects == nil {
		n.Objects = make(map[Key]Value)
	}
	if len(n.Objects) >= maxNotices {
		n.Objects = make(map[Key]Value)
		n.TellOther("more changes than can be kept") // or enough others already
	}
	n.Objects[k] = now
}

// TellOther adds a change of which only the place is known.
func (n *Notices) TellOther(what string) {
	if len(n.Others) < maxOthers && !slices.Contains(n.Others, what) {
		n.Others = append(n.Others, what)
	}
}

// Contradicts lists what of the notices does not go with the state that is
// remembered, a text for each, in order. Nothing listed: they tell of what is known.
func (n *Notices) Contradicts(have State) []string {
	out := slices.Clone(n.Others)
	var ends map[string]LinkSpec // pairs of ours by the name of their end on the host
	for k, now := range n.Objects {
		if l, ok := k.(Link); ok && l.NS == "" {
			if ends == nil {
				ends = hostEnds(have)
			}
			pair, known := ends[l.Name]
			switch _, orphan := have[k]; {
			case known && fitsEnd(pair, now):
				continue
			case !known && orphan == (now != nil):
				continue
			}
		} else if fits(have, k, now) {
			continue
		}
		what := " changed"
		if now == nil {
			what = " gone"
		}
		out = append(out, k.String()+what)
	}
	slices.Sort(out)
	return out
}

// hostEnds are the pairs that have, or had, an end in the host's namespace.
func hostEnds(have State) map[string]LinkSpec {
	out := make(map[string]LinkSpec)
	for _, v := range have {
		if l, ok := v.(LinkSpec); ok && l.Peer != "" {
			out[l.Peer] = l
		}
	}
	return out
}

// fitsEnd reports whether the end of a pair on the host is as remembered. One that
// is in a task is not here, and one that is not yet is.
func fitsEnd(pair LinkSpec, now Value) bool {
	spec, here := now.(LinkSpec)
	if pair.Kept {
		return here && spec.MTU == pair.MTU
	}
	return here != pair.Taken
}

// fits reports whether the object is as remembered, as far as a notice can tell.
func fits(have State, k Key, now Value) bool {
	was, ok := have[k]
	if now == nil {
		return !ok
	}
	if _, sysctl := k.(Sysctl); sysctl && !ok {
		return true // there is a great number of them, and most are nobody's
	}
	if !ok {
		return false
	}
	w, isLink := was.(LinkSpec)
	n, told := now.(LinkSpec)
	if isLink && told {
		w.Peer, w.PeerMAC, w.Kept, w.Taken = "", n.PeerMAC, false, false
		n.Peer, n.Kept, n.Taken = "", false, false
		return w == n
	}
	return was == now
}

// Same reports whether a found value is the wanted one, as Diff sees it.
func Same(have, want Value) bool { return equal(have, want) }

// Kinds of objects, as people and metrics name them.
const (
	KindNetns     = "netns"
	KindSysctl    = "sysctl"
	KindLink      = "link"
	KindAddress   = "address"
	KindNeighbour = "neighbour"
	KindFDB       = "fdb"
	KindRoute     = "route"
	KindIPTables  = "iptables"
	KindNFTables  = "nftables"
	KindIPVS      = "ipvs"
)

// Kinds lists all of them in the order of their names.
func Kinds() []string {
	return slices.Sorted(slices.Values([]string{
		KindNetns, KindSysctl, KindLink, KindAddress, KindNeighbour, KindFDB, KindRoute, KindIPTables, KindNFTables, KindIPVS,
	}))
}

// KindOf is the kind of an object.
func KindOf(k Key) string {
	switch k.(type) {
	case Netns:
		return KindNetns
	case Sysctl:
		return KindSysctl
	case Link, TaskTunnel:
		return KindLink
	case Addr:
		return KindAddress
	case Neigh:
		return KindNeighbour
	case FDB:
		return KindFDB
	case Route, TaskRoute:
		return KindRoute
	case Filter, FilterPeer, Forward:
		return KindIPTables
	case IPVSService, IPVSDest, IPVSTimeouts:
		return KindIPVS
	}
	return KindNFTables // the rest are objects of tables
}
