package view

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"sync"
	"testing"
	"time"

	"sluice/internal/model"
)

// journal is a store in memory that fails on demand.
type journal struct {
	mu      sync.Mutex
	records map[model.RecordKey][]byte
	fail    error
}

func newJournal() *journal { return &journal{records: map[model.RecordKey][]byte{}} }

func (j *journal) Commit(_ context.Context, puts []model.Record, deletes []model.RecordKey) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fail != nil {
		return j.fail
	}
	for _, r := range puts {
		j.records[model.RecordKey{Kind: r.Kind, Key: r.Key}] = r.Value
	}
	for _, k := range deletes {
		delete(j.records, k)
	}
	return nil
}

// list is what a process that starts now finds.
func (j *journal) list() []model.Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	out := make([]model.Record, 0, len(j.records))
	for k, v := range j.records {
		out = append(out, model.Record{Kind: k.Kind, Key: k.Key, Value: v})
	}
	return out
}

var errDisk = errors.New("no space left on device")

// clock is a time that the test moves.
type clock struct{ now time.Time }

func newClock() *clock { return &clock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

// node is a Hub with what it stands on.
type node struct {
	*Hub
	journal *journal
	clock   *clock
	changed int // calls of Changed
}

// fatal is what testing.T and rapid.T share.
type fatal interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// life starts a process on a journal.
func life(t fatal, j *journal, c *clock) *node {
	t.Helper()
	n := &node{journal: j, clock: c}
	h, err := New(Config{
		Journal: j, Now: func() time.Time { return c.now }, VXLANPort: 4799,
		Log: slog.New(slog.DiscardHandler), Changed: func(bool) { n.changed++ },
	}, j.list())
	if err != nil {
		t.Fatal(err)
	}
	n.Hub = h
	return n
}

// fresh is a node that has never run before.
func fresh(t fatal) *node { return life(t, newJournal(), newClock()) }

func (n *node) restarted(t fatal) *node { return life(t, n.journal, n.clock) }

func must[T any](t fatal) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t fatal, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

const (
	web model.NetworkID  = "webnetwork00000000000000a"
	one model.EndpointID = "1111111111110000000000000000000000000000000000000000000000000001"
	two model.EndpointID = "2222222222220000000000000000000000000000000000000000000000000002"
	svc model.ServiceID  = "svc000000000000000000000a"
)

var vip = addr("10.255.0.9")

func network(id model.NetworkID) model.Network {
	return model.Network{ID: id, Subnet: netip.MustParsePrefix("10.255.0.0/20"), Gateway: addr("10.255.0.1"), VNI: 7, MTU: 1450}
}

// sandbox is the path of the namespace of an endpoint's task.
func sandbox(id model.EndpointID) string { return "/run/docker/netns/" + id.Short() }

func endpoint(id model.EndpointID, ip string, p model.Phase) model.Endpoint {
	return model.Endpoint{ID: id, Network: web, Addr: addr(ip), MAC: model.MACFor(addr(ip)), Phase: p, Sandbox: sandbox(id)}
}

// swarm is a valid snapshot of a node of a swarm, with nothing running.
func swarm(id model.NodeID, ip string) model.EngineSnapshot {
	return model.EngineSnapshot{
		HostName: string(id), SwarmValid: true, Active: true, Node: id, NodeAddr: addr(ip),
		ContainersValid: true, NetworksValid: true,
	}
}

// runs adds a container with a ready task to a snapshot.
func runs(s model.EngineSnapshot, id model.EndpointID) model.EngineSnapshot {
	s.Containers = maps.Clone(s.Containers)
	if s.Containers == nil {
		s.Containers = map[model.EndpointID]model.EngineEndpoint{}
	}
	s.Containers[id] = model.EngineEndpoint{Network: web, Task: model.Task{
		ID: model.TaskID("task-" + id.Short()), Service: svc, ServiceName: "web", VIP: vip, Ready: true,
	}}
	return s
}

// leads makes a snapshot the leader's, with one service.
func leads(s model.EngineSnapshot, name string, leaving ...model.TaskID) model.EngineSnapshot {
	s.Leader, s.Manager, s.ServicesValid = true, true, true
	s.LeaderAt = newClock().now.AddDate(1, 0, 0) // after all that was heard
	s.Services = map[model.ServiceID]model.Service{svc: {
		ID: svc, Name: name, Created: time.Unix(1000, 0).UTC(), VIPs: map[model.NetworkID]netip.Addr{web: vip},
		Options: map[model.NetworkID]model.ServiceOptions{web: {Scheduler: "sh"}},
	}}
	s.Leaving = leaving
	return s
}

// table is what gossip brings of a node.
func (n *node) table(present bool) Table {
	return Table{Owner: n.Self().Node, Present: present, Whole: true, Entries: n.Records()}
}

// member is a node of the swarm with one network and one running endpoint.
func member(t fatal, id model.NodeID, ip string, eid model.EndpointID, at string) *node {
	t.Helper()
	n := fresh(t)
	must[uint64](t)(n.PutNetwork(context.Background(), network(web)))
	must[uint64](t)(n.PutEndpoint(context.Background(), endpoint(eid, at, model.Taken)))
	ok(t, n.SetEngine(context.Background(), runs(swarm(id, ip), eid)))
	return n
}

var _ fatal = (*testing.T)(nil)
