package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/keyshare"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/internal/view"
)

// asking is a worker's keyAsker, with managers that say what they are told to.
type asking struct {
	*keyAsker
	s *speaker

	mu     sync.Mutex
	asked  []string
	answer func(ctx context.Context, manager string) ([][]byte, error)
	log    bytes.Buffer
}

// asks runs an asker of a worker w1 for as long as f takes, in a bubble.
func asks(t *testing.T, cfg Config, e model.EngineSnapshot, answer func(context.Context, string) ([][]byte, error), f func(a *asking)) {
	synctest.Test(t, func(t *testing.T) {
		a := &asking{s: newSpeaker(t, cfg), answer: answer}
		a.s.engine(t, e)
		a.keyAsker = &keyAsker{
			cfg: cfg, hub: a.s.hub, ring: a.s.ring,
			identity: func() (keyshare.Identity, error) { return keyshare.Identity{Node: "w1"}, nil },
			ask: func(ctx context.Context, id keyshare.Identity, to netip.AddrPort) ([][]byte, error) {
				a.mu.Lock()
				a.asked = append(a.asked, to.String())
				a.mu.Unlock()
				return a.answer(ctx, to.Addr().String())
			},
			log: slog.New(slog.NewTextHandler(&a.log, nil)),
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { a.run(ctx) })
		f(a)
		cancel()
		wg.Wait()
		for _, k := range a.s.ring.Keys() {
			if strings.Contains(a.log.String(), options.EncodeKey(k)) {
				t.Error("a key is in the log")
			}
		}
	})
}

// leader has a manager m1 say that it leads, and be in contact or not.
func (a *asking) leader(t *testing.T, present bool) {
	t.Helper()
	if err := a.s.hub.SetTables(t.Context(), []view.Table{{Owner: "m1", Present: present, Whole: true, Entries: map[string][]byte{
		"node": []byte(`{"name":"m1","vtep":"192.0.2.1"}`), "lead": []byte(`{"claim":1}`),
	}}}); err != nil {
		t.Fatal(err)
	}
}

func (a *asking) times() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.asked)
}

func refuses(_ context.Context, manager string) ([][]byte, error) {
	return nil, errors.New("ask manager " + manager + ": connection refused")
}

var keyCfg = Config{Scope: scopeGlobal, KeyPort: 7948, GossipPort: 7947}

func TestAWorkerAsksItsManagersForTheKey(t *testing.T) {
	one := func(ctx context.Context, manager string) ([][]byte, error) {
		if manager == "192.0.2.3" {
			return [][]byte{testKey(1), testKey(2)}, nil
		}
		return refuses(ctx, manager)
	}
	asks(t, keyCfg, inSwarm("w1", "192.0.2.9", "192.0.2.1", "192.0.2.2", "192.0.2.3"), one, func(a *asking) {
		time.Sleep(firstPause)
		synctest.Wait()
		if n := len(a.s.ring.Keys()); n != 2 || a.state() != "" {
			t.Errorf("%d keys, %q", n, a.state())
		}
		a.leader(t, true)
		before := a.times()
		if time.Sleep(time.Hour); a.times() != before || before > 3 {
			t.Errorf("asked %v", a.asked)
		}
	})
}

func TestWhatManagersSayIsTold(t *testing.T) {
	asks(t, keyCfg, inSwarm("w1", "192.0.2.9", "192.0.2.1", "192.0.2.2"), refuses, func(a *asking) {
		time.Sleep(firstPause)
		synctest.Wait()
		want := "ask manager 192.0.2.1: connection refused; ask manager 192.0.2.2: connection refused"
		if a.state() != want || a.problem() != nil {
			t.Errorf("%q, want %q; %v", a.state(), want, a.problem())
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		// Every 10 s in the end, and logged once, in whatever order they are asked.
		if n := a.times(); n < 2*58 || n > 2*64 {
			t.Errorf("asked %d times", n)
		}
		if n := strings.Count(a.log.String(), "\n"); n != 1 || !strings.Contains(a.log.String(), want) {
			t.Errorf("log: %s", a.log.String())
		}
		if p := a.problem(); len(p) != 1 || !strings.Contains(p[0].What, want) || !strings.Contains(p[0].Do, "7948/tcp") {
			t.Errorf("%v", p)
		}
		// A network brings the key: there is nothing to ask for.
		a.s.key(t, testKey(1))
		a.leader(t, true)
		time.Sleep(lastPause)
		before := a.times()
		if time.Sleep(time.Hour); a.times() != before || a.state() != "" || a.problem() != nil {
			t.Errorf("asked still: %q, %v", a.state(), a.problem())
		}
	})
}

// TestAKeyThatTheLeaderDoesNotUseIsNotTheLast: a node that has one of two keys, and no
// network that brings the other, asks for it, and makes no trouble of it.
func TestAKeyThatTheLeaderDoesNotUseIsNotTheLast(t *testing.T) {
	var up atomic.Bool
	both := func(ctx context.Context, manager string) ([][]byte, error) {
		if !up.Load() {
			return refuses(ctx, manager)
		}
		return [][]byte{testKey(1), testKey(2)}, nil
	}
	asks(t, keyCfg, inSwarm("w1", "192.0.2.9", "192.0.2.1"), both, func(a *asking) {
		a.s.key(t, testKey(1))
		a.leader(t, true)
		if time.Sleep(time.Hour); a.times() > 0 {
			t.Fatal("asked, though it hears the leader")
		}
		a.leader(t, false)
		time.Sleep(apartFor / 2)
		if a.times() > 0 {
			t.Error("asked at once")
		}
		time.Sleep(10 * apartFor)
		synctest.Wait()
		if n := a.times(); n < 8 || n > 11 || a.state() != "" || a.problem() != nil || a.log.Len() > 0 {
			t.Errorf("asked %d times, %q, %v, %s", n, a.state(), a.problem(), &a.log)
		}
		up.Store(true)
		time.Sleep(2 * apartFor)
		synctest.Wait()
		if n := len(a.s.ring.Keys()); n != 2 {
			t.Errorf("%d keys", n)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := strings.Count(a.log.String(), "gossip key taken from a manager"); n != 1 {
			t.Errorf("told %d times", n)
		}
	})
}

// TestAManagerWithoutTheKeyIsNoFailure: it lets wait for a minute, and is asked
// again.
func TestAManagerWithoutTheKeyIsNoFailure(t *testing.T) {
	waits := func(ctx context.Context, manager string) ([][]byte, error) {
		if manager == "192.0.2.2" {
			return refuses(ctx, manager)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Minute):
			return nil, nil
		}
	}
	asks(t, keyCfg, inSwarm("w1", "192.0.2.9", "192.0.2.1", "192.0.2.2"), waits, func(a *asking) {
		time.Sleep(firstPause + time.Second)
		if !strings.Contains(a.state(), "asks manager 192.0.2.1:7948") {
			t.Errorf("%q", a.state())
		}
		time.Sleep(time.Hour)
		if n := a.times(); n < 2*55 || n > 2*62 || a.problem() != nil || a.log.Len() > 0 {
			t.Errorf("asked %d times, %v, %s", n, a.problem(), a.log.String())
		}
	})
}

func TestWhoHasNoReasonToAsk(t *testing.T) {
	with := func(f func(*model.EngineSnapshot)) model.EngineSnapshot {
		e := inSwarm("w1", "192.0.2.9", "192.0.2.1")
		f(&e)
		return e
	}
	set, local := keyCfg, keyCfg
	set.GossipKey, local.Scope = options.Key(testKey(1)), scopeLocal
	worker := with(func(*model.EngineSnapshot) {})
	for name, c := range map[string]struct {
		cfg Config
		e   model.EngineSnapshot
	}{
		"no swarm":           {keyCfg, with(func(e *model.EngineSnapshot) { e.Active, e.NoSwarm = false, true })},
		"a manager":          {keyCfg, with(func(e *model.EngineSnapshot) { e.Manager = true })},
		"no manager's known": {keyCfg, with(func(e *model.EngineSnapshot) { e.Managers = nil })},
		"a key is set":       {set, worker},
		"networks of one":    {local, worker},
	} {
		t.Run(name, func(t *testing.T) {
			asks(t, c.cfg, c.e, refuses, func(a *asking) {
				if time.Sleep(time.Hour); a.times() > 0 || a.state() != "" || a.problem() != nil {
					t.Errorf("asked %v, %q", a.asked, a.state())
				}
			})
		})
	}
}

// TestAKeyOfTheSwarmThatWasLeftIsNotTaken: to ask may take a minute, in which the
// node joins another swarm.
func TestAKeyOfTheSwarmThatWasLeftIsNotTaken(t *testing.T) {
	moves := func(context.Context, string) ([][]byte, error) {
		time.Sleep(30 * time.Second)
		return [][]byte{testKey(1)}, nil
	}
	asks(t, keyCfg, inSwarm("w1", "192.0.2.9", "192.0.2.1"), moves, func(a *asking) {
		time.Sleep(firstPause + time.Second)
		a.s.engine(t, inSwarm("w2", "192.0.2.9", "192.0.2.1"))
		time.Sleep(time.Hour)
		if n := len(a.s.ring.Keys()); n != 0 || a.times() != 1 || !strings.Contains(a.state(), "certificate is of node w1") {
			t.Errorf("%d keys, asked %d times, %q", n, a.times(), a.state())
		}
	})
}

func TestTheGossipersStateSaysHowTheAskingGoes(t *testing.T) {
	s := newSpeaker(t, keyCfg)
	s.asked = func() string { return "asks manager 192.0.2.1:7948" }
	e := inSwarm("w1", "192.0.2.9", "192.0.2.1")
	s.engine(t, e)
	if _, why := s.config(); !strings.Contains(why, "no key yet; it comes with the first network of the swarm, from a manager: asks manager 192.0.2.1:7948") {
		t.Errorf("%q", why)
	}
	e.Manager = true
	s.engine(t, e)
	if _, why := s.config(); !strings.HasSuffix(why, "no key yet; it comes with the first network of the swarm") {
		t.Errorf("%q", why)
	}
}

// giving is a manager's keyGiver at an address of the loopback network.
type giving struct {
	*keyGiver
	s   *speaker
	id  keyshare.Identity
	err error
}

// leads is the engine of a manager m1, with one worker.
func leads(addr string) model.EngineSnapshot {
	e := inSwarm("m1", addr, addr)
	e.Manager, e.ServicesValid = true, true
	e.Nodes = map[model.NodeID]model.EngineNode{"m1": {}, "w1": {}}
	return e
}

func newGiving(t *testing.T, cfg Config) *giving {
	t.Helper()
	g := &giving{s: newSpeaker(t, cfg), id: keyshare.Identity{Node: "m1", Manager: true}}
	g.keyGiver = newKeyGiver(cfg, g.s.hub, g.s.ring, func() (keyshare.Identity, error) { return g.id, g.err }, slog.New(slog.DiscardHandler))
	t.Cleanup(g.end)
	return g
}

// holdPort is a TCP port at an address, and what has it.
func holdPort(t *testing.T, addr string) (uint16, net.Listener) {
	t.Helper()
	l, err := net.Listen("tcp4", addr+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return uint16(l.Addr().(*net.TCPAddr).Port), l
}

// open reports whether something listens.
func open(addr string, port uint16) bool {
	c, err := net.Dial("tcp4", netip.AddrPortFrom(ip(addr), port).String())
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func TestAManagerGivesWhileItIsOne(t *testing.T) {
	port, l := holdPort(t, "127.0.0.5")
	g := newGiving(t, Config{Scope: scopeGlobal, KeyPort: port})
	look := func(what string, want bool, why string) {
		t.Helper()
		g.proved = time.Time{}
		g.look(t.Context())
		if got := open("127.0.0.5", port); got != want {
			t.Errorf("%s: listens %t", what, got)
		}
		switch p := g.problem(); {
		case why == "" && len(p) > 0, why != "" && (len(p) != 1 || !strings.Contains(p[0].What+p[0].Do, why)):
			t.Errorf("%s: %v, want %q", what, p, why)
		}
	}
	g.s.engine(t, leads("127.0.0.5"))
	look("the port is taken", true, "another KEY_PORT")
	l.Close()
	look("it is free again", true, "")
	look("nothing is new", true, "")
	g.err = fmt.Errorf("read: %w", keyshare.ErrLocked)
	look("autolock", false, "GOSSIP_KEY (openssl rand -hex 32 makes one)")
	g.err = nil
	look("no autolock", true, "")
	g.id.Manager = false
	look("just promoted", false, "a worker's still")
	g.id.Manager = true
	look("and with its certificate", true, "")
	worker := leads("127.0.0.5")
	worker.Manager = false
	g.s.engine(t, worker)
	look("a worker", false, "")
	g.s.engine(t, leads("127.0.0.5"))
	look("a manager again", true, "")
	g.s.engine(t, leads("127.0.0.6"))
	look("elsewhere", false, "")
	if !open("127.0.0.6", port) {
		t.Error("it does not listen at its new address")
	}
	g.err = keyshare.ErrLocked
	alone := leads("127.0.0.6")
	alone.Nodes = map[model.NodeID]model.EngineNode{"m1": {}}
	g.s.engine(t, alone)
	look("nobody would ask", false, "")
	g.err = nil
	look("a worker may come", false, "")
	g.end()
	if open("127.0.0.6", port) {
		t.Error("it listens still")
	}
}

func TestWhereAManagerGives(t *testing.T) {
	bound := Config{KeyPort: 7948, GossipBind: ip("198.51.100.1")}
	for name, c := range map[string]struct {
		cfg  Config
		e    model.EngineSnapshot
		want string
	}{
		"at its address":       {keyCfg, leads("192.0.2.1"), "192.0.2.1:7948"},
		"at the operator's":    {bound, leads("192.0.2.1"), "198.51.100.1:7948"},
		"IPv6":                 {keyCfg, leads("fd00::1"), ""},
		"no swarm":             {bound, model.EngineSnapshot{SwarmValid: true, NoSwarm: true, Manager: true}, ""},
		"a worker":             {bound, inSwarm("w1", "192.0.2.9"), ""},
		"nothing is known yet": {bound, model.EngineSnapshot{}, ""},
	} {
		g := newGiving(t, c.cfg)
		g.s.engine(t, c.e)
		if got := g.where(); got.IsValid() != (c.want != "") || got.IsValid() && got.String() != c.want {
			t.Errorf("%s: %s, want %q", name, got, c.want)
		}
	}
}

func TestWhoIsANode(t *testing.T) {
	g := newGiving(t, keyCfg)
	if err := g.member("w1"); err == nil {
		t.Error("nothing is known yet")
	}
	g.s.engine(t, leads("192.0.2.1"))
	if err := g.member("w1"); err != nil {
		t.Error(err)
	}
	if err := g.member("gone"); err == nil || !strings.Contains(err.Error(), "no node gone") {
		t.Error(err)
	}
	// The list of before is no word on who is a node now.
	doubt := leads("192.0.2.1")
	doubt.ServicesValid = false
	g.s.engine(t, doubt)
	if err := g.member("w1"); err == nil || !strings.Contains(err.Error(), "cannot tell now") {
		t.Error(err)
	}
}

func TestWithAKeySetNothingListens(t *testing.T) {
	cfg := keyCfg
	cfg.GossipKey = options.Key(testKey(1))
	g := newGiving(t, cfg)
	g.s.engine(t, leads("127.0.0.5"))
	g.run(t.Context()) // returns at once
	if g.stop != nil {
		t.Error("it listens")
	}
}
