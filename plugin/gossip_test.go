package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/gossip"
	"sluice/internal/keyring"
	"sluice/internal/model"
	"sluice/internal/view"
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func testKey(b byte) []byte { return bytes.Repeat([]byte{b}, keyring.Size) }

// speaker is a node's gossiper with the hub and the ring it works for.
type speaker struct {
	*gossiper
	hub  *view.Hub
	ring *keyring.Ring
}

// newSpeaker is a node of which nothing is known yet.
func newSpeaker(t *testing.T, cfg Config) *speaker {
	t.Helper()
	var s speaker
	wake := func() {
		if s.gossiper != nil {
			s.wake()
		}
	}
	d := &disk{records: make(map[model.RecordKey][]byte)}
	log := slog.New(slog.DiscardHandler)
	var err error
	if s.hub, err = view.New(view.Config{Journal: d, Now: time.Now, VXLANPort: 4799, Log: log, Changed: func(bool) { wake() }}, nil); err != nil {
		t.Fatal(err)
	}
	s.ring = keyring.New(d, nil, nil, wake)
	s.gossiper = newGossiper(cfg, s.hub, s.ring, func() string { return "" }, log)
	return &s
}

func (s *speaker) engine(t *testing.T, e model.EngineSnapshot) {
	t.Helper()
	if err := s.hub.SetEngine(t.Context(), e); err != nil {
		t.Fatal(err)
	}
}

func (s *speaker) key(t *testing.T, k []byte) {
	t.Helper()
	if err := s.ring.Add(t.Context(), k); err != nil {
		t.Fatal(err)
	}
}

// inSwarm is the engine of a node of a swarm.
func inSwarm(id model.NodeID, addr string, others ...string) model.EngineSnapshot {
	s := model.EngineSnapshot{
		HostName: "host-" + string(id), SwarmValid: true, Active: true, Node: id, NodeAddr: ip(addr),
		ContainersValid: true, NetworksValid: true,
	}
	for _, o := range others {
		s.Managers = append(s.Managers, ip(o))
	}
	return s
}

// TestWhatGossipWaitsFor: each thing that is missing is told, and nothing runs.
func TestWhatGossipWaitsFor(t *testing.T) {
	for _, c := range []struct {
		name   string
		bind   string
		engine model.EngineSnapshot
		keys   int
		why    string // "" if it may run
		at     string // then
	}{
		{"nothing", "", model.EngineSnapshot{}, 0, "the node's id", ""},
		{"no swarm", "", model.EngineSnapshot{SwarmValid: true, NoSwarm: true}, 1, "in no swarm", ""},
		{"a locked swarm", "", model.EngineSnapshot{SwarmValid: true}, 1, "the node's id", ""},
		{"no address", "", model.EngineSnapshot{SwarmValid: true, Active: true, Node: "a"}, 1, "the node's address yet", ""},
		{"an IPv6 address", "", inSwarm("a", "fd00::1"), 1, "fd00::1, and sluice needs IPv4", ""},
		{"no key", "", inSwarm("a", "192.0.2.1"), 0, "no key yet", ""},
		{"all", "", inSwarm("a", "192.0.2.1"), 1, "", "192.0.2.1:7947"},
		{"all and two keys", "", inSwarm("a", "192.0.2.1"), 2, "", "192.0.2.1:7947"},
		{"an address of the operator's", "198.51.100.1", inSwarm("a", "192.0.2.1"), 1, "", "198.51.100.1:7947"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := Config{GossipPort: 7947}
			if c.bind != "" {
				cfg.GossipBind = ip(c.bind)
			}
			s := newSpeaker(t, cfg)
			s.engine(t, c.engine)
			for i := range c.keys {
				s.key(t, testKey(byte(i+1)))
			}
			want, why := s.config()
			if c.why != "" {
				if !strings.Contains(why, c.why) || want.Name != "" {
					t.Errorf("%q, want %q", why, c.why)
				}
				s.look(t.Context())
				if up, text := s.state(); up || text != why || s.node != nil {
					t.Errorf("state %t %q", up, text)
				}
				return
			}
			if why != "" || want.Name != "a" || want.BindAddr.String() != c.at || len(want.Keys) != c.keys || want.Incarnation == 0 {
				t.Errorf("%+v, %q", want, why)
			}
		})
	}
}

func TestSeedsAreAllThatMayBeOthers(t *testing.T) {
	s := newSpeaker(t, Config{GossipPort: 7947})
	e := inSwarm("a", "192.0.2.1", "192.0.2.1", "192.0.2.2")
	e.Networks = map[model.NetworkID]model.EngineNetwork{web: {Peers: []netip.Addr{ip("192.0.2.3"), ip("192.0.2.2"), ip("192.0.2.1")}}}
	s.engine(t, e)
	if err := s.hub.SetTables(t.Context(), []view.Table{
		{Owner: "b", Entries: map[string][]byte{"node": []byte(`{"vtep":"192.0.2.4"}`)}},
		{Owner: "c", Entries: map[string][]byte{}}, // it has not told its address
	}); err != nil {
		t.Fatal(err)
	}
	s.hint(ip("192.0.2.5"))
	s.hint(ip("192.0.2.5"))
	s.key(t, testKey(1))
	want, _ := s.config()
	if got := fmt.Sprint(want.Seeds); got != "[192.0.2.2:7947 192.0.2.3:7947 192.0.2.4:7947 192.0.2.5:7947]" {
		t.Errorf("%s", got)
	}
	for i := range 3 * maxHints {
		s.hint(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}))
	}
	if len(s.hints) != maxHints || s.hints[maxHints-1] != ip("198.51.100.47") {
		t.Errorf("hints: %v", s.hints)
	}
}

func TestWhoIsRemoved(t *testing.T) {
	nodes := map[model.NodeID]model.EngineNode{"a": {}, "b": {Down: true}}
	lead := model.EngineSnapshot{Node: "a", Leader: true, ServicesValid: true, Nodes: nodes}
	with := func(edit func(*model.EngineSnapshot)) model.EngineSnapshot {
		s := lead
		edit(&s)
		return s
	}
	for _, c := range []struct {
		name   string
		engine model.EngineSnapshot
		node   model.NodeID
		want   bool
	}{
		{"not listed", lead, "c", true},
		{"listed, though down", lead, "b", false},
		{"itself", lead, "a", false},
		{"a follower's word", with(func(s *model.EngineSnapshot) { s.Leader = false }), "c", false},
		{"an old list", with(func(s *model.EngineSnapshot) { s.ServicesValid = false }), "c", false},
		{"no list", with(func(s *model.EngineSnapshot) { s.Nodes = nil }), "c", false},
	} {
		if got := removed(c.engine, c.node); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}

// TestALargeRecordDoesNotKeepTheOthers, and is told once each time it comes.
func TestALargeRecordDoesNotKeepTheOthers(t *testing.T) {
	var log strings.Builder
	g := &gossiper{log: slog.New(slog.NewTextHandler(&log, nil))}
	large := make([]byte, gossip.MaxValue+1)
	for range 3 {
		got := g.fitting(map[string][]byte{"node": {1}, "service/a": large, "service/b": large[1:]})
		if len(got) != 2 || got["service/a"] != nil {
			t.Errorf("%d records are left", len(got))
		}
	}
	g.fitting(map[string][]byte{"node": {1}})
	g.fitting(map[string][]byte{"service/a": large})
	if n := strings.Count(log.String(), "service/a (32769 bytes)"); n != 2 {
		t.Errorf("told %d times: %s", n, &log)
	}
}

func TestLocalNetworksNeedNoGossip(t *testing.T) {
	s := newSpeaker(t, Config{Scope: scopeLocal})
	s.run(t.Context()) // returns at once
	if up, text := s.state(); up || !strings.Contains(text, "not used") {
		t.Errorf("%t %q", up, text)
	}
}

// freePort is a port that is free on two addresses of the loopback device.
func freePort(t *testing.T) uint16 {
	t.Helper()
	for range 10 {
		a, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := a.Addr().(*net.TCPAddr).Port
		b, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.2:%d", port))
		if err == nil {
			err = b.Close()
		}
		if cerr := a.Close(); err == nil && cerr == nil {
			return uint16(port)
		}
	}
	t.Fatal("no port is free on both 127.0.0.1 and 127.0.0.2")
	return 0
}

// eventually waits until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second) // of a busy machine; it takes about a second
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not in time: %s", what)
		}
	}
}

// TestTwoNodes runs two gossipers with real sockets through the life of a swarm.
func TestTwoNodes(t *testing.T) {
	port := freePort(t)
	a, b := newSpeaker(t, Config{GossipPort: port}), newSpeaker(t, Config{GossipPort: port})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, s := range []*speaker{a, b} {
		wg.Go(func() { s.run(ctx) })
	}
	defer wg.Wait()
	defer cancel()
	up := func(s *speaker) func() bool {
		return func() bool { up, _ := s.state(); return up }
	}
	sees := func(s *speaker, want string) func() bool {
		return func() bool {
			s.wake()
			var got []string
			for _, p := range s.hub.Peers() {
				got = append(got, fmt.Sprintf("%s %s %s %t", p.Node, p.Name, p.VTEP, p.Present))
			}
			return strings.Join(got, ", ") == want
		}
	}

	a.key(t, testKey(1))
	b.key(t, testKey(1))
	a.engine(t, inSwarm("a", "127.0.0.1"))
	b.engine(t, inSwarm("b", "127.0.0.2", "127.0.0.1"))
	eventually(t, "a sees b", sees(a, "b host-b 127.0.0.2 true"))
	eventually(t, "b sees a", sees(b, "a host-a 127.0.0.1 true"))

	// A second key, on one node first: it goes on, with the same node.
	b.key(t, testKey(2))
	a.key(t, testKey(2))
	renamed := inSwarm("b", "127.0.0.2", "127.0.0.1")
	renamed.HostName = "other"
	b.engine(t, renamed)
	eventually(t, "news under two keys", sees(a, "b other 127.0.0.2 true"))

	// b leaves the swarm: its records go.
	b.engine(t, model.EngineSnapshot{SwarmValid: true, NoSwarm: true, ContainersValid: true, NetworksValid: true})
	eventually(t, "b is gone", sees(a, ""))
	eventually(t, "b is silent", func() bool { return !up(b)() })
	if _, text := b.state(); !strings.Contains(text, "in no swarm") {
		t.Errorf("state %q", text)
	}

	// It joins again, as docker has it: under a new id.
	b.engine(t, inSwarm("b2", "127.0.0.2", "127.0.0.1"))
	eventually(t, "a sees b again", sees(a, "b2 host-b2 127.0.0.2 true"))
	eventually(t, "b sees a again", sees(b, "a host-a 127.0.0.1 true"))

	// And once more, too quickly for the engine's state between to be seen.
	b.engine(t, inSwarm("b3", "127.0.0.2", "127.0.0.1"))
	eventually(t, "a sees b under its third name alone", sees(a, "b3 host-b3 127.0.0.2 true"))
}

// TestATakenPortIsToldAndTriedAgain: what holds it gives no notice of its end.
func TestATakenPortIsToldAndTriedAgain(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newSpeaker(t, Config{GossipPort: uint16(l.Addr().(*net.TCPAddr).Port)})
	defer s.stop()
	s.key(t, testKey(1))
	s.engine(t, inSwarm("a", "127.0.0.1"))
	s.look(t.Context())
	if up, text := s.state(); up || !strings.Contains(text, "address already in use") {
		t.Errorf("%t %q", up, text)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s.look(t.Context())
	if up, text := s.state(); !up {
		t.Errorf("still %q", text)
	}
}
