package gossip

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// State is what this node thinks of another one.
type State uint8

const (
	// Alive: memberlist reaches it, or it is this node itself.
	Alive State = iota + 1
	// Suspended: contact is lost; its table is kept.
	Suspended
	// Left: it left or was forgotten; it has no table any more.
	Left
)

func (s State) String() string {
	switch s {
	case Alive:
		return "alive"
	case Suspended:
		return "suspended"
	case Left:
		return "left"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// Tables holds the table of every owner, by its name. It and what it refers to
// are shared and must not be changed; they never change by themselves.
type Tables map[string]Table

// Table is one owner's table as this node knows it. Owners that left have none.
type Table struct {
	Owner       string
	Addr        netip.AddrPort // where the owner listens
	State       State          // Alive or Suspended
	Incarnation Incarnation
	Seq         uint64 // number of changes in this incarnation that are known without a gap
	Last        uint64 // number of the last one that is known; above Seq, there are gaps
	Complete    bool   // nothing of a former incarnation is mixed in
	Entries     map[string][]byte
}

// Snapshot returns all tables as of now. It costs nothing if nothing has changed
// since the last call, else time in proportion to the tables that have.
func (n *Node) Snapshot() Tables {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.snapshot == nil {
		n.snapshot = make(Tables, len(n.replica.tables))
		for owner, t := range n.replica.tables {
			n.snapshot[owner] = Table{
				Owner:       owner,
				Addr:        t.addr,
				State:       n.stateLocked(owner),
				Incarnation: t.inc,
				Seq:         t.seq,
				Last:        t.last(),
				Complete:    t.complete(),
				Entries:     t.entries(),
			}
		}
	}
	return n.snapshot
}

func (n *Node) stateLocked(owner string) State {
	if _, ok := n.replica.graves[owner]; ok {
		return Left
	}
	if m := n.members[owner]; owner == n.name || m != nil && m.alive {
		return Alive
	}
	return Suspended
}

// Member is one node of the cluster, for people to look at.
type Member struct {
	Name        string
	Addr        netip.AddrPort
	State       State
	Self        bool
	Since       time.Time // of the last change of contact as seen here; zero if unknown
	Incarnation Incarnation
	Seq         uint64
	Entries     int
	LastSync    time.Time // last exchange of versions with it; zero if none
	LastAgreed  time.Time // last such exchange that found no difference
}

// Members lists this node, all members, all owners of tables and, as long as
// they are remembered, those that left; by name.
func (n *Node) Members() []Member {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.membersLocked()
}

func (n *Node) membersLocked() []Member {
	names := make(map[string]struct{}, len(n.members)+len(n.replica.tables))
	for name := range n.members {
		names[name] = struct{}{}
	}
	for _, it := range n.replica.digest() {
		names[it.owner] = struct{}{}
	}
	list := make([]Member, 0, len(names))
	for name := range names {
		v := n.replica.version(name)
		e := Member{Name: name, State: n.stateLocked(name), Self: name == n.name, Incarnation: v.inc, Seq: v.seq}
		if t := n.replica.tables[name]; t != nil {
			e.Addr, e.Entries = t.addr, len(t.entries())
		}
		if m := n.members[name]; m != nil {
			e.Addr, e.Since, e.LastSync, e.LastAgreed = m.addr, m.since, m.heard, m.agreed
		}
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// Status is a diagnosis of the node. It holds no secrets.
type Status struct {
	Name    string
	Addr    netip.AddrPort
	Members []Member
	// Digest stands for the versions of all tables: nodes with equal digests hold
	// the same.
	Digest uint64
	// Agreed of Peers living members found no difference when they last compared.
	Agreed, Peers int
	// KeyIDs name the keys of the ring, the encrypting one first.
	KeyIDs []string
	// Health is memberlist's view of this node's own timeliness, 0 is best; above,
	// it gives others more time before it suspects them.
	Health   int
	Queued   int // packets in the broadcast queue
	Streams  int // stream messages under way
	Counters Counters
}

// Counters count since the start of the node.
type Counters struct {
	Published  uint64 // changes of the own table sent
	Applied    uint64 // messages that brought news
	Stale      uint64 // messages that brought none
	Malformed  uint64 // messages that did not parse
	Rejected   uint64 // owners beyond the limit
	Refuted    uint64 // claims about this node that it outbid
	Rounds     uint64 // anti-entropy rounds begun
	Answers    uint64 // differences answered
	PacketsOut uint64
	StreamsOut uint64
	SendErrors uint64
	Deferred   uint64 // stream messages left to anti-entropy, too many were under way
	Joins      uint64 // tries to get in contact
	JoinErrors uint64
	Conflicts  uint64 // two addresses with one name
}

type counters struct {
	published, applied, stale, malformed, rejected, refuted,
	rounds, answers, packetsOut, streamsOut, sendErrors, deferred,
	joins, joinErrors, conflicts atomic.Uint64
}

func (c *counters) read() Counters {
	return Counters{
		Published:  c.published.Load(),
		Applied:    c.applied.Load(),
		Stale:      c.stale.Load(),
		Malformed:  c.malformed.Load(),
		Rejected:   c.rejected.Load(),
		Refuted:    c.refuted.Load(),
		Rounds:     c.rounds.Load(),
		Answers:    c.answers.Load(),
		PacketsOut: c.packetsOut.Load(),
		StreamsOut: c.streamsOut.Load(),
		SendErrors: c.sendErrors.Load(),
		Deferred:   c.deferred.Load(),
		Joins:      c.joins.Load(),
		JoinErrors: c.joinErrors.Load(),
		Conflicts:  c.conflicts.Load(),
	}
}

// Status returns a diagnosis of the node.
func (n *Node) Status() Status {
	s := Status{
		Name:     n.name,
		Addr:     n.addr,
		KeyIDs:   n.keys.ids(),
		Health:   n.ml.GetHealthScore(),
		Queued:   n.queue.NumQueued(),
		Counters: n.counters.read(),
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s.Members = n.membersLocked()
	s.Digest = n.replica.hash()
	for _, m := range n.members {
		if m.alive {
			s.Peers++
			if !m.agreed.IsZero() && m.agreed.Equal(m.heard) {
				s.Agreed++
			}
		}
	}
	for _, c := range n.streams {
		s.Streams += c
	}
	return s
}
