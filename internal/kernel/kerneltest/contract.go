package kerneltest

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Kernel is what the contract is about; reconcile declares the same.
type Kernel interface {
	Dump(ctx context.Context, sandboxes []string) (kernel.State, error)
	Apply(ctx context.Context, ops []kernel.Op) []error
}

// World is the kernel from the side of everybody else: the engine, an operator, a
// firewall. Its methods fail the test themselves.
type World interface {
	// Spoil undoes an object in the given way, without sluice's doing.
	Spoil(t *testing.T, key kernel.Key, how Damage)
	// Take moves the container's end called peer out of the host's namespace.
	Take(t *testing.T, l kernel.Link, peer string)
	// AddVXLAN makes a device that is not sluice's in the host's namespace.
	AddVXLAN(t *testing.T, name string, vni model.VNI, port uint16)
	// AddForeign puts things that are not sluice's next to those that are, in the
	// host and in namespace ns; what it returns fails the test if they changed.
	AddForeign(t *testing.T, ns string) (intact func(t *testing.T))
	// Sandbox makes a task's namespace and returns its path.
	Sandbox(t *testing.T) string
}

// Damage is a way to spoil an object.
type Damage string

// The ways; which of them fit an object follows from its kind.
const (
	Deleted   Damage = "deleted"   // any object: it is gone
	Changed   Damage = "changed"   // a sysctl, a tunnel's too, the MTU of a link, the MAC of a neighbour, the VTEP of an FDB entry, anything of IPVS, a task's routes, the MAC of a guard's element
	Down      Damage = "down"      // a link, a tunnel
	Flushed   Damage = "flushed"   // the chain of a filter, of a MeshNet or a MeshAllow; one chain of the mesh's table
	Reordered Damage = "reordered" // the filter: DROP comes first; the mesh's: the jump comes last
	Intruded  Damage = "intruded"  // a filter: a rule of somebody else's in the chain
	Halved    Damage = "halved"    // an FDB entry: the bridge's half is gone; a tunnel: its device has no address; a kept pair: the host's end is down; a task's routes: its default is gone
	Replaced  Damage = "replaced"  // a tunnel: its device takes other packets
)

// Subject is one kernel under test, empty, with its world.
type Subject struct {
	Kernel  Kernel
	World   World
	Tables  bool // it has nftables: objects of PhaseVIP and PhaseTask
	IPVS    bool // it has IPVS besides
	Tunnels bool // it has tunnels in tasks
	Mesh    bool // it has what the routing mesh needs, besides Tables
}

// maxRounds bounds how often a difference may be worked on until it must be gone.
// One does nearly always; a device that is made anew loses what was on it, which
// the next round mends.
const maxRounds = 3

// Contract is what every kernel must keep. newSubject makes one for each part.
func Contract(t *testing.T, newSubject func(t *testing.T) Subject) {
	parts := []struct {
		name string
		run  func(t *testing.T, c *check)
	}{
		{"creates every kind in one round", creates},
		{"changes every kind", changes},
		{"deletes in order", deletes},
		{"deletes one object at a time", deletesEach},
		{"deleting what is absent succeeds", deletesAbsent},
		{"creating what exists succeeds", createsTwice},
		{"names what is missing", namesMissing},
		{"leaves foreign objects alone", sparesForeign},
		{"mends drift", mendsDrift},
		{"refuses a VNI that is taken", refusesVNI},
		{"a taken end is no difference", acceptsTaken},
		{"a deleted namespace frees its VNI at once", freesVNI},
		{"a namespace goes with all it holds", deletesNamespace},
		{"does nothing when told to stop", obeysContext},
	}
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			c := &check{Subject: newSubject(t), t: t}
			p.run(t, c)
		})
	}
}

// check is one part's kernel with the steps that all parts are made of.
type check struct {
	Subject
	t       *testing.T
	sandbox string // of the example's task; empty: there are neither tables nor tunnels
}

func (c *check) sandboxes() []string {
	if c.sandbox == "" {
		return nil
	}
	return []string{c.sandbox}
}

func (c *check) dump() kernel.State {
	c.t.Helper()
	s, err := c.Kernel.Dump(c.t.Context(), c.sandboxes())
	if err != nil {
		c.t.Fatalf("dump: %v", err)
	}
	return s
}

// apply does ops, all of which must succeed.
func (c *check) apply(ops []kernel.Op) {
	c.t.Helper()
	for i, err := range c.Kernel.Apply(c.t.Context(), ops) {
		if err != nil {
			c.t.Fatalf("%s: %v", ops[i], err)
		}
	}
}

// converge leads to want within n rounds.
func (c *check) converge(want kernel.State, n int) {
	c.t.Helper()
	var ops []kernel.Op
	for range n {
		if ops = kernel.Diff(c.dump(), want); len(ops) == 0 {
			return
		}
		c.apply(ops)
	}
	c.same(want)
}

// same fails the test if there is any difference to want.
func (c *check) same(want kernel.State) {
	c.t.Helper()
	have := c.dump()
	if ops := kernel.Diff(have, want); len(ops) != 0 {
		c.t.Fatalf("after the last round there is still a difference, first %s\n(-want +have)\n%s", ops[0], cmp.Diff(want.Text(), have.Text()))
	}
}

// example is every kind of object: a network between hosts and one of this host.
func (c *check) example() kernel.State {
	s := Example()
	if c.Tables || c.Tunnels {
		c.sandbox = c.World.Sandbox(c.t)
	}
	if c.Tables {
		addTables(s, c.sandbox)
	}
	if c.Tunnels {
		addTunnels(s, c.sandbox)
	}
	if c.Mesh {
		addMesh(s, c.sandbox)
	}
	if c.IPVS {
		addIPVS(s)
	}
	return s
}

// tables is the path of the task's namespace where there are tables, else empty.
func (c *check) tables() string {
	if !c.Tables {
		return ""
	}
	return c.sandbox
}

func (c *check) changeCases() []changeCase {
	cases := changeCases(c.tables(), c.IPVS)
	if c.Tunnels {
		cases = append(cases, tunnelChanges(c.sandbox)...)
	}
	if c.Mesh {
		cases = append(cases, meshChanges(c.sandbox)...)
	}
	return cases
}

func (c *check) driftCases() []driftCase {
	cases := driftCases(c.tables(), c.IPVS)
	if c.Tunnels {
		cases = append(cases, tunnelDrifts(c.sandbox)...)
	}
	if c.Mesh {
		cases = append(cases, meshDrifts(c.sandbox)...)
	}
	return cases
}

func creates(t *testing.T, c *check) {
	if s := c.dump(); len(s) != 0 {
		t.Fatalf("the new kernel is not empty:\n%s", s.Text())
	}
	want := c.example()
	c.converge(want, 1)
	// The second time from an empty memory: all must be read back.
	if diff := cmp.Diff(want.Text(), c.dump().Text()); diff != "" {
		t.Errorf("dump differs (-want +have)\n%s", diff)
	}
}

func changes(t *testing.T, c *check) {
	base := c.example()
	c.converge(base, 1)
	for _, tc := range c.changeCases() {
		want := maps.Clone(base)
		tc.change(want)
		if maps.Equal(want, base) {
			t.Fatalf("%s: changes nothing", tc.name)
		}
		t.Logf("change %s", tc.name)
		c.converge(want, maxRounds)
		c.converge(base, maxRounds)
	}
}

func deletes(t *testing.T, c *check) {
	c.converge(c.example(), 1)
	c.converge(kernel.State{}, 1)
}

func deletesEach(t *testing.T, c *check) {
	base := c.example()
	c.converge(base, 1)
	for _, key := range base.Keys() {
		if _, ok := key.(kernel.Sysctl); ok {
			continue // has no absence
		}
		want := maps.Clone(base)
		delete(want, key)
		dropDependents(want, key)
		c.converge(want, maxRounds)
		c.converge(base, maxRounds)
	}
}

func deletesAbsent(t *testing.T, c *check) {
	s := c.example()
	ops := kernel.Diff(s, kernel.State{}) // as if all were there
	for k, v := range s {
		ops = append(ops, kernel.Op{Key: k, Have: v})
	}
	c.apply(ops)
	c.same(kernel.State{})
}

func createsTwice(t *testing.T, c *check) {
	want := c.example()
	ops := kernel.Diff(kernel.State{}, want)
	c.apply(ops)
	c.apply(ops)
	c.same(want)
}

func namesMissing(t *testing.T, c *check) {
	s := c.example()
	for _, key := range s.Keys() {
		switch key.(type) {
		case kernel.Netns, kernel.Filter, kernel.Forward, kernel.MeshTable, kernel.TaskTable, kernel.TaskTunnel:
			continue // need nothing of ours
		case kernel.TaskVIP, kernel.TaskPort, kernel.TaskRoute:
			continue // its task is there
		}
		err := c.Kernel.Apply(t.Context(), []kernel.Op{{Key: key, Want: s[key]}})[0]
		if !errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("create %s in an empty kernel: %v, want %v", key, err, kernel.ErrNotExist)
		}
	}
	c.same(kernel.State{})
}

func sparesForeign(t *testing.T, c *check) {
	want := c.example()
	c.converge(want, 1)
	intact := c.World.AddForeign(t, netA)
	c.same(want) // not reported
	delete(want, kernel.Addr{NS: netA, Dev: bridge, Prefix: vipPrefix})
	c.converge(want, 1)
	intact(t)
	// Foreign things in a namespace of ours go with it; those of the host stay.
	c.converge(kernel.State{}, 1)
}

func mendsDrift(t *testing.T, c *check) {
	want := c.example()
	c.converge(want, 1)
	for _, d := range c.driftCases() {
		t.Logf("%s is %s", d.key, d.how)
		c.World.Spoil(t, d.key, d.how)
		if ops := kernel.Diff(c.dump(), want); len(ops) == 0 {
			t.Errorf("%s was %s, and no difference is seen", d.key, d.how)
		}
		c.converge(want, maxRounds)
	}
}

func refusesVNI(t *testing.T, c *check) {
	want := c.example()
	key := kernel.Link{NS: netA, Name: vxlan, Kind: kernel.VXLAN}
	spec := want[key].(kernel.LinkSpec)
	c.World.AddVXLAN(t, "other0", spec.VNI, spec.Port)
	ops := kernel.Diff(c.dump(), want)
	errs := c.Kernel.Apply(t.Context(), ops)
	for i, o := range ops {
		if o.Key != key {
			continue
		}
		if !errors.Is(errs[i], kernel.ErrTaken) {
			t.Fatalf("%s: %v, want %v", o, errs[i], kernel.ErrTaken)
		}
		for _, word := range []string{"4097", "4799", "other0", "choose"} {
			if !strings.Contains(errs[i].Error(), word) {
				t.Errorf("error %q does not say %q", errs[i], word)
			}
		}
	}
	// All else is done, and the device once the VNI is another.
	spec.VNI++
	want[key] = spec
	c.converge(want, maxRounds)
}

func acceptsTaken(t *testing.T, c *check) {
	want := c.example()
	c.converge(want, 1)
	key := kernel.Link{NS: netA, Name: hostEndA, Kind: kernel.Veth}
	spec := want[key].(kernel.LinkSpec)
	c.World.Take(t, key, spec.Peer)
	got := c.dump()[key].(kernel.LinkSpec)
	if got.Peer != "" || !got.PeerMAC.IsZero() {
		t.Errorf("taken pair: peer %q %s, want none", got.Peer, got.PeerMAC)
	}
	c.same(want)
	spec.Taken = true
	want[key] = spec
	c.same(want)
	// What is left of it is still kept right, and goes when it is not wanted.
	spec.MTU -= 100
	want[key] = spec
	c.converge(want, 1)
	delete(want, key)
	c.converge(want, 1)
}

func freesVNI(t *testing.T, c *check) {
	want := c.example()
	c.converge(want, 1)
	for range 3 {
		c.converge(kernel.State{}, 1)
		c.converge(want, 1)
	}
}

func deletesNamespace(t *testing.T, c *check) {
	want := c.example()
	c.converge(want, 1)
	// By itself, with all it holds: not as Diff would.
	c.apply([]kernel.Op{{Key: kernel.Netns{Name: netA}, Have: kernel.NetnsSpec{}}})
	for key := range c.dump() {
		if key == (kernel.Netns{Name: netA}) || key.Netns() == netA {
			t.Errorf("%s is still there", key)
		}
	}
	c.converge(want, 1)
}

func obeysContext(t *testing.T, c *check) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	want := c.example()
	for i, err := range c.Kernel.Apply(ctx, kernel.Diff(kernel.State{}, want)) {
		if !errors.Is(err, context.Canceled) {
			t.Fatalf("op %d: %v, want %v", i, err, context.Canceled)
		}
	}
	c.same(kernel.State{})
}

// dropDependents removes from want what cannot be, or has no sense, without key.
func dropDependents(want kernel.State, key kernel.Key) {
	on := func(ns, dev string) bool {
		l, ok := key.(kernel.Link)
		return ok && l.NS == ns && l.Name == dev
	}
	for k, v := range want {
		drop := false
		switch gone := key.(type) {
		case kernel.Netns:
			drop = k.Netns() == gone.Name
		case kernel.Filter:
			_, drop = k.(kernel.FilterPeer)
		case kernel.BridgeTable:
			switch k.(type) {
			case kernel.Member, kernel.VIP, kernel.Port, kernel.Real, kernel.Slot, kernel.Alive, kernel.Other:
				drop = k.Netns() == gone.NS
			}
		case kernel.BackTable:
			b, ok := k.(kernel.Back)
			drop = ok && b.NS == gone.NS
		case kernel.GuardTable:
			switch k.(type) {
			case kernel.GuardPort, kernel.GuardAddr:
				drop = k.Netns() == gone.NS
			}
		case kernel.MeshTable:
			switch k.(type) {
			case kernel.MeshNet, kernel.MeshPort, kernel.MeshRange, kernel.MeshMasq, kernel.MeshAllow:
				drop = true
			}
		case kernel.LiftTable:
			switch k.(type) {
			case kernel.LiftFrom, kernel.LiftTo:
				drop = k.Netns() == gone.NS
			}
		case kernel.MarkTable:
			m, ok := k.(kernel.Mark)
			drop = ok && m.NS == gone.NS
		case kernel.IPVSService:
			d, ok := k.(kernel.IPVSDest)
			drop = ok && d.NS == gone.NS && d.Mark == gone.Mark
		case kernel.TaskTable:
			switch k.(type) {
			case kernel.TaskVIP, kernel.TaskPort, kernel.TaskMesh:
				drop = k.Netns() == gone.Netns()
			}
		case kernel.VIP:
			drop = vipOf(k) == gone.IP
		}
		switch k := k.(type) {
		case kernel.Addr:
			drop = drop || on(k.NS, k.Dev)
		case kernel.Neigh:
			drop = drop || on(k.NS, k.Dev)
		case kernel.FDB:
			drop = drop || on(k.NS, k.Dev) || on(k.NS, bridge)
		case kernel.Route:
			drop = drop || on(k.NS, k.Dev)
		case kernel.Link:
			drop = drop || v.(kernel.LinkSpec).Master != "" && on(k.NS, v.(kernel.LinkSpec).Master)
		}
		// What is on the host's end of the pair goes with the pair, and that with its bridge.
		pair := on(netA, meshPort) || on(netA, bridge) || key == kernel.Netns{Name: netA}
		drop = drop || pair && hostDev(k) == meshEnd
		if drop {
			delete(want, k)
		}
	}
}

// hostDev is the device of the host that an object is on.
func hostDev(k kernel.Key) string {
	if k.Netns() != "" {
		return ""
	}
	switch k := k.(type) {
	case kernel.Addr:
		return k.Dev
	case kernel.Neigh:
		return k.Dev
	case kernel.Route:
		return k.Dev
	case kernel.Sysctl:
		return k.Dev()
	}
	return ""
}

// vipOf is the VIP that an object belongs to.
func vipOf(k kernel.Key) netip.Addr {
	switch k := k.(type) {
	case kernel.Slot:
		return k.VIP
	case kernel.Alive:
		return k.VIP
	case kernel.Other:
		return k.VIP
	case kernel.Port:
		return k.VIP
	}
	return netip.Addr{}
}
