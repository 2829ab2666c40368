package view

import (
	"encoding/json"
	"errors"
	"fmt"
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
	keyEndpoint = "endpoint/"
	keyService  = "service/"

	// Of published ports. The first ends in a network's id and is of every node, the
	// others, which end in a network's and in a node's, are of the leading manager.
	keyEntry   = "entry/"
	keyNetwork = "network/"
	keyLabels  = "labels/"
)

// nodeRecord is what a node says of itself.
type nodeRecord struct {
	VTEP netip.Addr `json:"vtep"`
	Name string     `json:"name,omitempty"` // host name, for people
}

// leadRecord is published by the manager that leads, for as long as it knows
// of no higher claim. A new leader claims one more than the highest it has seen,
// so that readers agree on whose records of services count.
type leadRecord struct {
	Claim uint64 `json:"claim"`
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
		var r nodeRecord
		err = json.Unmarshal(raw, &r)
		v = r
	case key == keyLead:
		var r leadRecord
		err = json.Unmarshal(raw, &r)
		v = r
	case key == keyLeaving:
		var r leavingRecord
		err = json.Unmarshal(raw, &r)
		v = r
	case key == keyMembers:
		var r membersRecord
		err = json.Unmarshal(raw, &r)
		v = r
	case key == keyDrained:
		var r drainedRecord
		err = json.Unmarshal(raw, &r)
		v = r
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
		var r serviceRecord
		err = json.Unmarshal(raw, &r)
		v = r
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
		var r labelsRecord
		err = json.Unmarshal(raw, &r)
		v = r
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("gossip record %s: %w", key, err)
	}
	return v, nil
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
