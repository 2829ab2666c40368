package view

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"iter"
	"maps"
	"net/netip"
	"strings"
	"time"
	"unique"

	"sluice/internal/model"
)

// Keys of the gossip records of one node. Those with a slash end in an id.
const (
	keyNode     = "node"
	keyLead     = "lead"
	keyLeaving  = "leaving"
	keyMembers  = "members"
	keyDrained  = "drained"
	keyDown     = "down"
	keyEndpoint = "endpoint/"
	keyService  = "service/"

	// Of published ports. The first ends in a network's id and is of every node, the
	// others, which end in a network's and in a node's, are of the leading manager.
	keyEntry   = "entry/"
	keyNetwork = "network/"
	keyLabels  = "labels/"
)

// isBequest reports whether a record is of the kinds that stay when a leading manager
// has left: what it has said of services, and not of nodes, which come and go.
func isBequest(key string) bool {
	return key == keyLead || key == keyLeaving ||
		strings.HasPrefix(key, keyService) || strings.HasPrefix(key, keyNetwork) || strings.HasPrefix(key, keyLabels)
}

// nodeRecord is what a node says of itself.
type nodeRecord struct {
	VTEP netip.Addr `json:"vtep"`
	Name string     `json:"name,omitempty"` // host name, for people
}

// leadRecord is published by the manager that leads, until it has heard that another
// does. A new leader claims one more than the highest it has seen,
// so that readers agree on whose records of services count.
type leadRecord struct {
	Claim uint64 `json:"claim"`
	// Confirmed says that the claimant's engine calls it the leader, as last asked in this
	// life of the process. Another claim may have been overtaken, unheard.
	Confirmed bool `json:"confirmed,omitempty"`
	// Sum is that of the records that come with the claim; see Summed. 0: it was not made.
	Sum uint64 `json:"sum,omitempty"`
}

// Summed completes what Records returns, once it is known which of it is published: the
// claim of a leading manager then has a sum of all that it says of services, networks and
// labels. Records reach other nodes one by one and in any order, and a leader's word of
// which some is missing, or old, would end what the rest is about; see table.told.
func Summed(records map[string][]byte) map[string][]byte {
	raw, leads := records[keyLead]
	if !leads {
		return records
	}
	r, err := parse[leadRecord](raw)
	if err != nil {
		return records // Records does not make such a one
	}
	r.Sum = sumOf(maps.All(records))
	records[keyLead] = encode(r)
	return records
}

// sumOf is the sum of a leading manager's word, never 0. The order of records is of no
// account; against chance 64 bits are plenty, and who would forge it has the gossip key.
// What tasks are leaving is not in it: it counts as soon as it is heard.
func sumOf(records iter.Seq2[string, []byte]) uint64 {
	var sum uint64
	for key, raw := range records {
		if key == keyLead || key == keyLeaving || !isBequest(key) {
			continue
		}
		f := fnv.New64a()
		f.Write([]byte(key))
		f.Write([]byte{0})
		f.Write(raw)
		sum += f.Sum64()
	}
	return max(sum, 1)
}

// leavingRecord lists the tasks that a manager wants gone and that still run.
type leavingRecord struct {
	Tasks []model.TaskID `json:"tasks"`
}

// membersRecord lists the nodes of the swarm, down or not. A node out of contact
// that is not among them has been removed, and its records end.
type membersRecord struct {
	Nodes []model.NodeID `json:"nodes"`
}

// drainedRecord lists the nodes that the swarm has paused or drained. There is none
// if it has none.
type drainedRecord struct {
	Nodes []model.NodeID `json:"nodes"`
}

// downRecord lists the nodes that the swarm takes for lost: their engines have not
// spoken to it for some 15 s. There is none if it misses none.
type downRecord struct {
	Nodes []model.NodeID `json:"nodes"`
}

// endpointRecord is an endpoint as its node tells it.
type endpointRecord struct {
	Network  model.NetworkID      `json:"network"`
	Addr     netip.Addr           `json:"addr"`
	MAC      model.MAC            `json:"mac"`
	Options  model.ServiceOptions `json:"options,omitzero"`
	Task     model.Task           `json:"task,omitzero"`
	Prepared netip.Addr           `json:"prepared,omitzero"`
	Tunnel   bool                 `json:"tunnel,omitzero"`
	Meshed   bool                 `json:"meshed,omitzero"`
}

// serviceRecord is a service as the leading manager tells it.
type serviceRecord struct {
	Name    string                                   `json:"name"`
	Created time.Time                                `json:"created"`
	VIPs    map[model.NetworkID]netip.Addr           `json:"vips,omitempty"`
	Options map[model.NetworkID]model.ServiceOptions `json:"options,omitempty"`
}

// Table is one node's gossip records.
type Table struct {
	Owner   model.NodeID
	Present bool // false: contact is lost
	// Whole says that nothing is missing: what Entries lacks, the owner has
	// deleted. It is false while this or the owner's process has just started.
	Whole   bool
	Entries map[string][]byte
	// Version is that up to which nothing is missing; Last, at least Version.Seq, is the
	// number of the last change that Entries shows.
	Version Version
	Last    uint64
}

// decoded is one gossip record, read.
type decoded struct {
	raw   []byte // as gossip and the journal have it: shared with them, never changed
	value any    // nodeRecord, …; nil if unreadable
}

// decode reads the value of one record. Keys that are unknown give nil: they
// are of a later version.
func decode(key string, raw []byte) (any, error) {
	var err error
	var v any
	switch {
	case key == keyNode:
		v, err = parse[nodeRecord](raw)
	case key == keyLead:
		v, err = parse[leadRecord](raw)
	case key == keyLeaving:
		v, err = parse[leavingRecord](raw)
	case key == keyMembers:
		v, err = parse[membersRecord](raw)
	case key == keyDrained:
		v, err = parse[drainedRecord](raw)
	case key == keyDown:
		v, err = parse[downRecord](raw)
	case strings.HasPrefix(key, keyEndpoint):
		var r endpointRecord
		err = json.Unmarshal(raw, &r)
		if err == nil && (r.Network == "" || !r.Addr.Is4() || r.MAC.IsZero()) {
			err = fmt.Errorf("network, IPv4 address and MAC are needed")
		}
		// Thousands of endpoints name a few networks and services: one copy of
		// each name is kept, and comparing two is comparing pointers.
		r.Network, r.Task.Service, r.Task.ServiceName = intern(r.Network), intern(r.Task.Service), intern(r.Task.ServiceName)
		r.Options.Ports = intern(r.Options.Ports)
		v = r
	case strings.HasPrefix(key, keyService):
		v, err = parse[serviceRecord](raw)
	case strings.HasPrefix(key, keyEntry):
		var r entryRecord
		err = json.Unmarshal(raw, &r)
		if err == nil && (!r.Addr.Is4() || r.Number == 0) {
			err = errors.New("IPv4 address and number are needed")
		}
		v = r
	case strings.HasPrefix(key, keyNetwork):
		var r networkRecord
		if err = json.Unmarshal(raw, &r); err == nil {
			err = r.check()
		}
		v = r
	case strings.HasPrefix(key, keyLabels):
		v, err = parse[labelsRecord](raw)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("gossip record %s: %w", key, err)
	}
	return v, nil
}

// parse reads a record of type T.
func parse[T any](raw []byte) (r T, err error) {
	err = json.Unmarshal(raw, &r)
	return r, err
}

// intern returns the process's one copy of a string.
func intern[S ~string](s S) S { return unique.Make(s).Value() }

// encode writes a record. These types always marshal.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("view: a record type that does not marshal: " + err.Error())
	}
	return b
}
