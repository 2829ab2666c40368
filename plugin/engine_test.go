package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/keyring"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/ipam/pool"
)

// around is a follower with fakes around it, at a time that the test moves.
type around struct {
	*follower
	at       time.Time
	self     model.Self
	adopts   int // calls of Adopt
	hubTold  bool
	settled  int
	claimed  int
	had      []model.NetworkID // networks with a pool or a VNI
	followed []time.Time
	freed    []model.NetworkID
	brought  int // calls of Recover
	whole    bool
	compared map[model.NetworkID][]netip.Addr
	forgot   []time.Time
	added    []string // keys, in hexadecimal
	woken    int
	fail     error
}

func (a *around) Self() model.Self { return a.self }
func (a *around) SetEngine(_ context.Context, s model.EngineSnapshot) error {
	if s.SwarmValid && s.Active {
		a.self.Node = s.Node
	}
	return a.fail
}
func (a *around) Adopted()                    { a.hubTold = true }
func (a *around) Settle(context.Context) bool { a.settled++; return true }

func (a *around) Claim(context.Context) error { a.claimed++; return nil }
func (a *around) Adopt(context.Context, model.EngineSnapshot) error {
	a.adopts++
	return a.fail
}
func (a *around) Recover(context.Context, model.EngineSnapshot) error {
	a.brought++
	return a.fail
}
func (a *around) Recovered()                   { a.whole = true }
func (a *around) Follow(at time.Time)          { a.followed = append(a.followed, at) }
func (a *around) Allocated() []model.NetworkID { return slices.Clone(a.had) }
func (a *around) Free(_ context.Context, id model.NetworkID) error {
	if a.fail == nil {
		a.freed = append(a.freed, id)
		a.had = slices.DeleteFunc(a.had, func(n model.NetworkID) bool { return n == id })
	}
	return a.fail
}
func (a *around) Confirm(_ context.Context, id model.NetworkID, live []netip.Addr, _ time.Time) (pool.Confirmation, error) {
	a.compared[id] = live
	return pool.Confirmation{}, a.fail
}
func (a *around) Add(_ context.Context, key []byte) error {
	a.added = append(a.added, options.EncodeKey(key))
	return a.fail
}
func (a *around) ForgetBefore(_ context.Context, t time.Time) error {
	a.forgot = append(a.forgot, t)
	return a.fail
}

func newAround() *around {
	a := &around{at: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), compared: make(map[model.NetworkID][]netip.Addr)}
	a.follower = &follower{
		scope: scopeGlobal, now: func() time.Time { return a.at }, hub: a, driver: a, pools: a, keys: a, wake: func() { a.woken++ },
		named: make(chan string, 1), log: slog.New(slog.DiscardHandler), gone: make(map[model.NetworkID]time.Time),
	}
	return a
}

// after takes a snapshot when some time has passed.
func (a *around) after(t *testing.T, d time.Duration, s model.EngineSnapshot) {
	t.Helper()
	a.at = a.at.Add(d)
	a.follow(t.Context(), s)
}

// TestAdoptionWaitsForWhatIsNeeded: a container whose namespace is not known
// would be taken over without its translation.
func TestAdoptionWaitsForWhatIsNeeded(t *testing.T) {
	lists := func(sandbox string) model.EngineSnapshot {
		return model.EngineSnapshot{ContainersValid: true, NetworksValid: true, Containers: map[model.EndpointID]model.EngineEndpoint{
			"a": {Sandbox: "/run/docker/netns/a"}, "b": {Sandbox: sandbox},
		}}
	}
	complete, half := lists("/run/docker/netns/b"), lists("")
	noNetworks := complete
	noNetworks.NetworksValid = false
	for _, c := range []struct {
		name  string
		steps []model.EngineSnapshot // 4 s apart
		want  int                    // adopted at this step; -1: never
	}{
		{"at once", []model.EngineSnapshot{complete}, 0},
		{"nothing runs", []model.EngineSnapshot{{ContainersValid: true, NetworksValid: true}}, 0},
		{"the engine does not answer", []model.EngineSnapshot{{}, {}, {}, {}, {}}, -1},
		{"networks are not known", []model.EngineSnapshot{noNetworks, noNetworks, noNetworks, noNetworks}, -1},
		{"a namespace comes late", []model.EngineSnapshot{{}, half, half, complete, complete}, 3},
		{"a namespace never comes", []model.EngineSnapshot{half, half, half, half, half}, 3}, // 12 s, the first over sandboxWait
		{"the wait begins with the first list", []model.EngineSnapshot{{}, {}, {}, half, half, half, half}, 6},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAround()
			for i, s := range c.steps {
				a.after(t, 4*time.Second, s)
				if want := c.want >= 0 && i >= c.want; a.hubTold != want || (a.adopts == 1) != want {
					t.Fatalf("step %d: adopted %t, %d calls", i, a.hubTold, a.adopts)
				}
			}
		})
	}
}

// TestAdoptionThatFailsIsOver: what could not be taken over is told, and the
// node serves the rest rather than wait for ever.
func TestAdoptionThatFailsIsOver(t *testing.T) {
	a := newAround()
	a.fail = errNoDisk
	a.after(t, 0, model.EngineSnapshot{ContainersValid: true, NetworksValid: true})
	a.after(t, 0, model.EngineSnapshot{ContainersValid: true, NetworksValid: true})
	if a.adopts != 1 || !a.hubTold || a.settled != 2 || a.claimed != 2 || a.woken != 2 {
		t.Errorf("%d calls, hub told %t, settled %d, claimed %d, woken %d", a.adopts, a.hubTold, a.settled, a.claimed, a.woken)
	}
}

const web model.NetworkID = "webnetwork00000000000000a"

func manager(listed bool) model.EngineSnapshot {
	s := model.EngineSnapshot{SwarmValid: true, Active: true, Manager: true, NetworksValid: true, ServicesValid: true, Networks: map[model.NetworkID]model.EngineNetwork{}}
	if listed {
		s.Networks[web] = model.EngineNetwork{ID: web}
	}
	return s
}

// TestAPoolIsFreedWhenItsNetworkStaysAway, and only then.
func TestAPoolIsFreedWhenItsNetworkStaysAway(t *testing.T) {
	there, away := manager(true), manager(false)
	unread := away
	unread.NetworksValid = false
	worker := away
	worker.Manager = false
	stopping := away
	stopping.ServicesValid = false
	for _, c := range []struct {
		name  string
		scope string
		steps []model.EngineSnapshot // 20 s apart
		want  int                    // freed at this step; -1: never
	}{
		{"listed", scopeGlobal, []model.EngineSnapshot{there, there, there, there, there}, -1},
		{"gone", scopeGlobal, []model.EngineSnapshot{there, away, away, away, away}, 4},
		{"missed once", scopeGlobal, []model.EngineSnapshot{away, away, there, away, away, away}, -1},
		{"nobody could be asked", scopeGlobal, []model.EngineSnapshot{unread, unread, unread, unread, unread}, -1},
		{"an engine that is no manager any more lists its own", scopeGlobal, []model.EngineSnapshot{away, stopping, away, stopping, away, away}, -1},
		{"a worker lists what it uses only", scopeGlobal, []model.EngineSnapshot{worker, worker, worker, worker, worker}, -1},
		{"local networks are freed by the engine's call", scopeLocal, []model.EngineSnapshot{away, away, away, away, away}, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newAround()
			a.scope = c.scope
			a.had = []model.NetworkID{web}
			for i, s := range c.steps {
				a.after(t, 20*time.Second, s)
				if want := c.want >= 0 && i >= c.want; (len(a.freed) == 1) != want {
					t.Fatalf("step %d: freed %v", i, a.freed)
				}
			}
			if c.want >= 0 && len(a.gone) > 0 {
				t.Errorf("remembered for ever: %v", a.gone)
			}
		})
	}
}

func TestAPoolThatIsNotFreedIsFreedLater(t *testing.T) {
	a := newAround()
	a.had = []model.NetworkID{web}
	a.after(t, 0, manager(false))
	a.fail = errNoDisk
	a.after(t, goneFor, manager(false))
	a.fail = nil
	a.after(t, time.Second, manager(false))
	if !slices.Equal(a.freed, []model.NetworkID{web}) {
		t.Errorf("freed %v", a.freed)
	}
}

// TestWhatALeaderLostIsBroughtBackOnce, with its first whole snapshot: from then on the
// allocator tells of every change, also to one that comes to lead.
func TestWhatALeaderLostIsBroughtBackOnce(t *testing.T) {
	unread, lead, follows := manager(true), manager(true), manager(true)
	unread.ServicesValid, lead.Leader = false, true
	worker := model.EngineSnapshot{SwarmValid: true, NetworksValid: true, Active: true}
	for _, c := range []struct {
		name  string
		steps []model.EngineSnapshot
		fails int // times
		want  int // calls
		whole int // from this step
		told  int // from this step
	}{
		{"a leader", []model.EngineSnapshot{{}, unread, lead, lead}, 0, 1, 2, 2},
		{"one of the managers, which comes to lead", []model.EngineSnapshot{follows, lead}, 0, 0, 0, 0},
		{"a worker", []model.EngineSnapshot{{}, worker}, 0, 0, 1, 1},
		{"a full disk", []model.EngineSnapshot{lead, lead, lead, lead}, 2, 3, 2, 0},
	} {
		a := newAround()
		for i, s := range c.steps {
			a.fail = nil
			if i < c.fails {
				a.fail = errNoDisk
			}
			a.after(t, time.Second, s)
			if a.follower.whole != (i >= c.whole) || a.whole != (i >= c.told) {
				t.Errorf("%s, step %d: whole: %t, told: %t", c.name, i, a.follower.whole, a.whole)
			}
		}
		if a.brought != c.want {
			t.Errorf("%s: brought back %d times, want %d", c.name, a.brought, c.want)
		}
	}
	a := newAround()
	a.scope = scopeLocal
	a.after(t, 0, lead)
	if a.brought > 0 {
		t.Error("networks of this engine only: brought back")
	}
}

// TestLeasesAreComparedByTheLeader: nobody else has the whole list.
func TestLeasesAreComparedByTheLeader(t *testing.T) {
	live := []netip.Addr{netip.MustParseAddr("10.255.0.2")}
	lead := manager(true)
	lead.Leader, lead.ServicesValid = true, true
	lead.Live = map[model.NetworkID][]netip.Addr{web: live}
	for _, c := range []struct {
		name string
		edit func(*model.EngineSnapshot)
		want bool
	}{
		{"leader", func(*model.EngineSnapshot) {}, true},
		{"addresses of another driver", func(s *model.EngineSnapshot) { s.Alias = "sluice:latest" }, false},
		{"another leads", func(s *model.EngineSnapshot) { s.Leader = false }, false},
		{"services were not read", func(s *model.EngineSnapshot) { s.ServicesValid = false }, false},
		{"a network of which nothing was read", func(s *model.EngineSnapshot) { s.Live = nil }, false},
	} {
		a, s := newAround(), lead
		a.had = []model.NetworkID{web}
		c.edit(&s)
		a.after(t, 0, s)
		if got, asked := a.compared[web]; asked != c.want || asked && !slices.Equal(got, live) {
			t.Errorf("%s: %v", c.name, a.compared)
		}
	}
}

// TestWhoFollowedIsTold: with a time at which another led for sure, as a lead may have
// begun since.
func TestWhoFollowedIsTold(t *testing.T) {
	at := func(sec int) time.Time { return time.Date(2026, 1, 2, 3, 4, sec, 0, time.UTC) }
	read := func(sec int, s model.EngineSnapshot) model.EngineSnapshot {
		s.SwarmValid, s.SwarmAt = true, at(sec)
		return s
	}
	manages, active, none, locked := manager(true), model.EngineSnapshot{Active: true}, model.EngineSnapshot{NoSwarm: true}, model.EngineSnapshot{}
	follows := manages
	follows.Follows = at(7)
	unheard := follows
	unheard.SwarmValid = false
	for _, c := range []struct {
		name, scope string
		steps       []model.EngineSnapshot
		want        []time.Time
	}{
		{"another leads", scopeGlobal, []model.EngineSnapshot{read(9, follows)}, []time.Time{at(7)}},
		{"this one leads, or nobody, or it is not known", scopeGlobal, []model.EngineSnapshot{read(9, manages)}, nil},
		{"an engine that does not answer", scopeGlobal, []model.EngineSnapshot{unheard, unheard}, nil},
		{"networks of this engine only", scopeLocal, []model.EngineSnapshot{read(9, follows), read(20, active), read(30, active)}, nil},
		{"a worker", scopeGlobal, []model.EngineSnapshot{read(10, active), read(10, active), read(20, active), read(30, active)}, []time.Time{at(10), at(10)}},
		{"a node that left", scopeGlobal, []model.EngineSnapshot{read(10, active), read(20, none)}, []time.Time{at(10)}},
		{"a manager that starts", scopeGlobal, []model.EngineSnapshot{read(10, active), read(20, manages), read(30, active)}, nil},
		{"one that was locked", scopeGlobal, []model.EngineSnapshot{read(10, locked), read(20, locked), read(30, active), read(31, manages)}, nil},
	} {
		a := newAround()
		a.scope = c.scope
		for _, s := range c.steps {
			a.after(t, 0, s)
		}
		if !slices.Equal(a.followed, c.want) {
			t.Errorf("%s: told %v, want %v", c.name, a.followed, c.want)
		}
	}
}

// TestKeysOfAFormerSwarmAreForgotten, and those that may be the next one's not.
func TestKeysOfAFormerSwarmAreForgotten(t *testing.T) {
	in := func(id model.NodeID) model.EngineSnapshot {
		return model.EngineSnapshot{SwarmValid: true, Active: true, Node: id}
	}
	none := model.EngineSnapshot{SwarmValid: true, NoSwarm: true}
	for _, c := range []struct {
		name  string
		steps []model.EngineSnapshot
		want  []bool // keys are forgotten at this step
	}{
		{"first swarm", []model.EngineSnapshot{{}, in("a"), in("a")}, []bool{false, false, false}},
		{"leave and join", []model.EngineSnapshot{in("a"), none, none, in("b"), in("b")}, []bool{false, true, true, true, false}},
		{"too quick to be seen", []model.EngineSnapshot{in("a"), in("b"), in("b")}, []bool{false, true, false}},
		{"locked, pending or in error", []model.EngineSnapshot{in("a"), {SwarmValid: true}, in("a")}, []bool{false, false, false}},
		{"the engine does not answer", []model.EngineSnapshot{in("a"), {NoSwarm: true}, in("a")}, []bool{false, false, false}},
	} {
		a := newAround()
		for i, s := range c.steps {
			before := len(a.forgot)
			a.after(t, time.Second, s)
			if got := len(a.forgot) > before; got != c.want[i] {
				t.Errorf("%s, step %d: forgotten %t", c.name, i, got)
			}
			if len(a.forgot) > before && a.at.Sub(a.forgot[before]) != newsAge {
				t.Errorf("%s: keys of %s and before", c.name, a.forgot[before])
			}
		}
	}
}

// TestKeysAreTakenFromTheNetworksListed: on a manager without a task of its own,
// and nowhere where they may be a former swarm's.
func TestKeysAreTakenFromTheNetworksListed(t *testing.T) {
	key := strings.Repeat("5a", 32)
	in := func(id model.NodeID) model.EngineSnapshot {
		return model.EngineSnapshot{
			SwarmValid: true, Active: true, Node: id, NetworksValid: true,
			Networks: map[model.NetworkID]model.EngineNetwork{
				"n": {Options: map[string]string{options.SecretKey: key}}, "other": {}, "bad": {Options: map[string]string{options.SecretKey: "x"}},
			},
		}
	}
	a := newAround()
	a.after(t, 0, in("a"))
	if !slices.Equal(a.added, []string{key}) {
		t.Fatalf("took %q", a.added)
	}
	a.added = nil
	a.after(t, time.Second, in("b")) // another swarm, with what the engine listed in the former
	a.after(t, newsAge-time.Millisecond, in("b"))
	if len(a.added) > 0 {
		t.Errorf("took %q just after the node had changed its swarm", a.added)
	}
	a.after(t, time.Millisecond, in("b"))
	if !slices.Equal(a.added, []string{key}) {
		t.Errorf("took %q in the new swarm", a.added)
	}
	unread := in("a")
	unread.NetworksValid = false
	local := newAround()
	local.scope = scopeLocal
	local.after(t, 0, in("a"))
	fresh := newAround()
	fresh.after(t, 0, unread)
	if len(local.added)+len(fresh.added) > 0 {
		t.Errorf("took %q with SCOPE=local, %q from a list that is not valid", local.added, fresh.added)
	}
}

func TestTheNameIsToldOnce(t *testing.T) {
	a := newAround()
	for _, alias := range []string{"", "me/sluice:latest", "me/sluice:latest"} {
		a.after(t, 0, model.EngineSnapshot{Alias: alias})
	}
	if got := <-a.named; got != "me_sluice" {
		t.Errorf("%q", got)
	}
	select {
	case again := <-a.named:
		t.Errorf("and again %q", again)
	default:
	}
}

// disk is a journal in memory.
type disk struct{ records map[model.RecordKey][]byte }

func (d *disk) Commit(_ context.Context, puts []model.Record, dels []model.RecordKey) error {
	for _, r := range puts {
		d.records[model.RecordKey{Kind: r.Kind, Key: r.Key}] = r.Value
	}
	maps.DeleteFunc(d.records, func(k model.RecordKey, _ []byte) bool { return slices.Contains(dels, k) })
	return nil
}

var _ keyKeeper = (*keyring.Ring)(nil)

func TestRefusalsAreRememberedForAWhile(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r := &refusals{now: func() time.Time { return at }}
	if r.note(nil) != nil || len(r.problems()) != 0 {
		t.Error("success is a refusal")
	}
	overlap := errors.New("pool overlaps")
	if r.note(overlap) != overlap {
		t.Error("the error did not pass through")
	}
	at = at.Add(time.Minute)
	r.note(errors.New("pool is full"))
	at = at.Add(time.Minute)
	r.note(overlap) // again: the newest now, and once
	got := r.problems()
	if len(got) != 2 || got[0].What != "refused at 03:05:05: pool is full" || got[1].What != "refused at 03:06:05: pool overlaps" {
		t.Errorf("%+v", got)
	}
	at = at.Add(refusalAge - 30*time.Second)
	if got := r.problems(); len(got) != 1 || got[0].What != "refused at 03:06:05: pool overlaps" {
		t.Errorf("an old one is still told: %+v", got)
	}
	for i := range 2 * maxRefusals {
		r.note(errors.New(string(rune('a' + i))))
	}
	if got := r.problems(); len(got) != maxRefusals {
		t.Errorf("%d are kept", len(got))
	}
}

func TestThePluginsIDIsInItsMounts(t *testing.T) {
	const id = "0c6b1f0f4a0d2a7e0c6b1f0f4a0d2a7e0c6b1f0f4a0d2a7e0c6b1f0f4a0d2a7e"
	for name, c := range map[string]struct{ text, want string }{
		"tmpfs":   {"22 1 0:20 / /proc rw - proc proc rw\n31 22 0:25 /docker/plugins/" + id + " /run/docker/plugins rw,nosuid - tmpfs tmpfs rw\n", id},
		"a disk":  {"31 22 8:1 /run/docker/plugins/" + id + " /run/docker/plugins rw - ext4 /dev/sda1 rw", id},
		"by hand": {"22 1 0:20 / / rw - ext4 /dev/sda1 rw\n", ""},
		"deeper":  {"31 22 8:1 /x /run/docker/plugins/other rw - ext4 /dev/sda1 rw", ""},
		"torn":    {"31 22 8:1", ""},
		"nothing": {"", ""},
	} {
		if got := pluginIDIn(c.text); got != c.want {
			t.Errorf("%s: %q", name, got)
		}
	}
}
