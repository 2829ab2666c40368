package view

import (
	"cmp"
	"time"

	"sluice/internal/model"
)

// This file is about tables that are older than what is known of them. Within one life
// gossip never goes back. But it starts with nothing, and the first to answer may be a
// node that was cut off: its copy lacks what came after, and has what went since. What
// the journal has of a former life is newer then, and stays.

// Version orders the states of one node's table.
type Version struct {
	Start uint64 `json:"start"` // of the process that wrote it
	Bump  uint32 `json:"bump,omitzero"`
	Seq   uint64 `json:"seq"`
}

func (v Version) compare(o Version) int {
	return cmp.Or(cmp.Compare(v.Start, o.Start), cmp.Compare(v.Bump, o.Bump), cmp.Compare(v.Seq, o.Seq))
}

// For how long a node must be in contact, and no newer table of it come, until one that
// is older than the journal's counts all the same.
const (
	// setBackAfter is for one of a process that seems to have started before: the
	// node's clock was set back, perhaps, while nobody ran who would tell it. Gossip
	// brings the newest table of a node that all can reach within 30 s
	// (gossip.ConvergenceBound).
	setBackAfter = 30 * time.Second
	// rewoundAfter is for one of the same process, which can only be a copy. A node that
	// has only the first of two gossip keys is heard and does not hear, so that its own
	// table does not come; it asks for the second after 70 s.
	rewoundAfter = 2 * time.Minute
)

// age is how old the known records of a node are.
type age struct {
	known Version   // of the records, also durable; the last change that they show
	floor Version   // known of a former life; zero once a table as new has come
	since time.Time // since when the node has been in contact with an older one; zero: it is not
}

// stale reports whether a table is older than what is known from a former life.
func (a *age) stale(in Table, now time.Time) bool {
	switch {
	case a.floor == Version{} || in.Version.compare(a.floor) >= 0:
		*a = age{known: a.known}
		return false
	case !in.Present:
		a.since = time.Time{}
	case a.since.IsZero():
		a.since = now
	case now.Sub(a.since) >= a.patience(in.Version):
		*a = age{known: a.known}
		return false
	}
	return true
}

func (a *age) patience(v Version) time.Duration {
	if v.Start == a.floor.Start && v.Bump == a.floor.Bump {
		return rewoundAfter
	}
	return setBackAfter
}

// taken notes that the records are a table's now, and returns what has to become durable.
func (a *age) taken(in Table) []model.Record {
	v := in.Version
	v.Seq = max(v.Seq, in.Last)
	if v == a.known {
		return nil
	}
	a.known = v
	return []model.Record{record(kindHeard, string(in.Owner), v)}
}
