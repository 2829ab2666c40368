package diag_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/internal/golden"
	"sluice/internal/model"
	"sluice/ipam/pool"
)

// decides is the leader of a swarm with its leases and the managers' lists, which
// agree: a gateway, a virtual IP, two tasks and a container of `docker run`.
func decides() *world {
	w := leader()
	w.engine.ServicesValid = true
	w.engine.Services = w.view.Services
	w.engine.Nodes = map[model.NodeID]model.EngineNode{"node1": {Name: "h1"}, "node2": {Name: "h2"}}
	w.engine.Holders = map[model.NetworkID][]model.Holder{web: {
		{Addr: addr("10.255.0.1"), Kind: model.HolderGateway},
		{Addr: addr("10.255.0.2"), Kind: model.HolderTask, ID: "shop.1", Service: shop, Slot: 1, Node: "node1"},
		{Addr: addr("10.255.0.3"), Kind: model.HolderTask, ID: "shop.2", Service: shop, Slot: 2, Node: "node2"},
		{Addr: addr("10.255.0.4"), Kind: model.HolderTask, ID: "run1", Container: "0123456789abcdef", Node: "node2"},
		{Addr: addr("10.255.0.9"), Kind: model.HolderService, ID: string(shop)},
	}}
	w.leases("1", "2", "3", "4", "9")
	return w
}

// leases gives the world's pool leases of addresses of 10.255.0.0, the first of
// them the gateway's. A ? behind one is doubt, a ! a leak, a , an orphan of a moment.
func (w *world) leases(last ...string) {
	l := pool.Listing{Status: pool.Status{
		ID: pool.ID{Space: "sluice-global", Subnet: w.view.Networks[web].Subnet}, Network: web, Gateway: addr("10.255.0.1"),
		Used: len(last), Free: 3838 - len(last),
	}}
	l.Nodes, _ = pool.NodeRange(l.ID.Subnet)
	for i, x := range last {
		lease := pool.Lease{Address: addr("10.255.0." + strings.TrimRight(x, "?!,")), Gateway: i == 0, Unconfirmed: strings.HasSuffix(x, "?")}
		switch {
		case strings.HasSuffix(x, "!"):
			lease.Orphaned = time.Now().Add(-pool.LeakAfter)
		case strings.HasSuffix(x, ","):
			lease.Orphaned = time.Now().Add(-time.Second)
		}
		l.Leases = append(l.Leases, lease)
	}
	w.cfg.Leases = func() []pool.Listing { return []pool.Listing{l} }
}

// TestIPAMTellsLeaksAndDoubles, in words, and as status does.
func TestIPAMTellsLeaksAndDoubles(t *testing.T) {
	var texts strings.Builder
	for _, c := range []struct {
		name string
		edit func(*world)
		bad  []string // a beginning of each problem
	}{
		{"all have their own", func(*world) {}, nil},
		{"leaked", func(w *world) { w.leases("1", "2", "3", "4", "7!", "8,", "9") },
			[]string{"addresses of network web are leased and nobody has them: 10.255.0.7"}},
		{"in doubt, or not leased", func(w *world) { w.leases("1", "2?", "3", "9") }, nil},
		{"double by the lists", func(w *world) {
			w.engine.Holders[web][2].Addr = addr("10.255.0.2")
		}, []string{"addresses of network web are had by two: 10.255.0.2 (task shop.1 and task shop.2)"}},
		{"an old container still has it", func(w *world) {
			e := w.view.Endpoints[here]
			e.Task.ID = "shop.1.old"
			w.view.Endpoints[here] = e
		}, []string{"addresses of network web are had by two: 10.255.0.2 (task shop.1 and the container of task shop.1.old)"}},
		{"a container has the virtual IP", func(w *world) {
			r := w.view.Remotes[there]
			r.Addr, r.Task = addr("10.255.0.9"), model.Task{}
			w.view.Remotes[there] = r
		}, []string{"addresses of network web are had by two: 10.255.0.9 (VIP of shop and a container)"}},
		{"the swarm forgot a task whose container runs", func(w *world) {
			w.engine.Holders[web] = append(w.engine.Holders[web][:1:1], w.engine.Holders[web][2:]...)
			w.leases("1", "2?", "3", "4", "9")
		}, nil},
		{"addresses of another driver", func(w *world) {
			n := w.engine.Networks[web]
			n.IPAM = "default"
			w.engine.Networks[web] = n
			w.leases()
		}, nil},
		{"another manager", func(w *world) { w.engine.Leader = false }, nil},
		{"another manager sees a double", func(w *world) {
			w.engine.Leader = false
			w.engine.Holders[web][2].Addr = addr("10.255.0.2")
		}, []string{"addresses of network web are had by two"}},
		{"the lists are not read", func(w *world) { w.engine.ServicesValid, w.engine.Leader = false, false }, []string{"the managers' lists cannot be read now"}},
		{"worker", func(w *world) { w.engine.Manager, w.engine.Leader, w.engine.Holders = false, false, nil }, nil},
		{"networks of one engine", func(w *world) {
			w.cfg.Scope, w.engine.Holders, w.engine.Manager, w.engine.Leader = "local", nil, false, false
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := decides()
			c.edit(w)
			var a diag.IPAM
			w.ask(t, diag.PathIPAM, &a)
			texts.WriteString("== " + c.name + "\n" + a.Text() + "\n")
			var s diag.Status
			w.ask(t, diag.PathStatus, &s)
			if len(a.Problems) != len(c.bad) {
				t.Fatalf("problems %+v, want %q", a.Problems, c.bad)
			}
			for i, want := range c.bad {
				if !strings.HasPrefix(a.Problems[i].What, want) {
					t.Errorf("problem %q, want %q", a.Problems[i].What, want)
				}
			}
			// What another driver gives is no matter of status.
			ours := slices.ContainsFunc(a.Pools, func(p diag.IPAMPool) bool { return p.Pool != "" })
			if told := a.Source == diag.IPAMLeases && ours; told != (len(s.Addresses) > 0) || told && len(c.bad) > 0 && !slices.Contains(s.Problems, a.Problems[0]) {
				t.Errorf("status has %+v and problems %+v", s.Addresses, s.Problems)
			}
		})
	}
	golden.Check(t, "ipam", texts.String())
}
