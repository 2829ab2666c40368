package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

// sound waits until nothing of what a restart may leave behind is seen: every node's
// kernel is as planned and nobody complains, all nodes agree on each other's
// endpoints, no address is there twice, and the manager has given as many as there
// are.
func sound(t *testing.T, network string) {
	t.Helper()
	for i := range lab.Hosts() {
		noDiff(t, i+1)
	}
	err := cluster.Wait(within(t), "all nodes agree, and addresses are neither lost nor there twice", func(ctx context.Context) error {
		if err := agreed(ctx); err != nil {
			return err
		}
		return accounted(ctx, network)
	})
	if err != nil {
		t.Error(err)
	}
}

// answer asks the plugin on a host.
func answer[T any](ctx context.Context, h *cluster.Host, question string) (T, error) {
	var out T
	err := h.Sluice(ctx, &out, question)
	return out, err
}

// agreed tells how nodes differ in what they know of each other.
func agreed(ctx context.Context) error {
	own := make(map[string]int)              // endpoints by host
	known := make(map[string]map[string]int) // by host and peer
	for _, h := range lab.Hosts() {
		st, err := answer[diag.Status](ctx, h, "status")
		if err != nil {
			return err
		}
		for _, p := range st.Problems {
			// A file that another test has damaged is told of until somebody deletes it.
			if !strings.Contains(p.What, "damaged") {
				return fmt.Errorf("%s complains: %+v", h.Name(), p)
			}
		}
		own[h.Name()], known[h.Name()] = st.Endpoints, make(map[string]int)
		for _, p := range st.Gossip.Peers {
			if p.State != diag.PeerPresent {
				return fmt.Errorf("%s has %s %s", h.Name(), p.Host, p.State)
			}
			known[h.Name()][p.Host] = p.Endpoints
		}
	}
	for h, peers := range known {
		for peer, n := range own {
			if got, there := peers[peer]; peer != h && (!there || got != n) {
				return fmt.Errorf("%s knows of %d endpoints of %s, which has %d (known: %t)", h, got, peer, n, there)
			}
		}
	}
	return nil
}

// accounted compares the addresses that are in use on a network with those that its
// manager has given away.
func accounted(ctx context.Context, network string) error {
	const gateways = 1 // the network's own address
	holders := make(map[netip.Addr]string)
	note := func(text, who string) error {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("%s: %w", who, err)
		}
		if other := holders[addr]; other != "" {
			return fmt.Errorf("%s is the address of %s and of %s", addr, other, who)
		}
		holders[addr] = who
		return nil
	}
	manager, err := leader(ctx)
	if err != nil {
		return err
	}
	list, err := manager.Docker(ctx, "service", "ls", "--format", "{{.Name}}")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(list) {
		vip, err := lab.VIP(ctx, name, network)
		if err != nil {
			return err
		}
		if err := note(vip.String(), "service "+name); err != nil {
			return err
		}
	}
	for _, h := range lab.Hosts() {
		ids, err := h.Docker(ctx, "ps", "-q", "--filter", "network="+network)
		if err != nil {
			return err
		}
		for id := range strings.FieldsSeq(ids) {
			text, err := h.Docker(ctx, "inspect", "--format", `{{(index .NetworkSettings.Networks "`+network+`").IPAddress}}`, id)
			if err != nil {
				return err
			}
			if err := note(text, h.Name()+"'s container "+id); err != nil {
				return err
			}
		}
	}
	ns, err := answer[diag.Networks](ctx, manager, "networks")
	if err != nil {
		return err
	}
	for _, n := range ns.Networks {
		if n.Name == network && n.Used != len(holders)+gateways {
			return fmt.Errorf("%d addresses of %s are given away, %d are in use, and the gateway: %v", n.Used, network, len(holders), holders)
		}
	}
	return nil
}

// leader is the host whose engine leads the swarm.
func leader(ctx context.Context) (*cluster.Host, error) {
	for _, h := range lab.Hosts() {
		out, err := h.Docker(ctx, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		if err != nil {
			continue // a worker, or down: another knows
		}
		for _, l := range lab.Hosts() {
			if strings.Contains(out, l.Name()+" Leader") {
				return l, nil
			}
		}
	}
	return nil, errors.New("no host knows of a leader")
}

// TestRestarts goes through what may end and begin again, on one host or on all,
// under traffic. Some tests of single restarts are elsewhere, see sound.
func TestRestarts(t *testing.T) {
	for _, row := range []struct {
		name string
		// what happens.
		do func(t *testing.T)
		// unhurt are the hosts whose clients and entries must not notice; tasks of a
		// service that is asked run on the first of them only.
		unhurt []int
	}{
		{"an engine is stopped and started", func(t *testing.T) {
			must(t, lab.Host(3).StopEngine(within(t)))
			must(t, lab.Host(3).StartEngine(within(t)))
		}, []int{2, 1}},
		{"an engine is killed and started", func(t *testing.T) {
			must(t, lab.Host(3).KillEngine(within(t)))
			must(t, lab.Host(3).StartEngine(within(t)))
		}, []int{2, 1}},
		{"a host loses its power", func(t *testing.T) {
			must(t, lab.Host(3).Reboot(within(t)))
			must(t, useIngress(within(t), lab))
		}, []int{2, 1}},
		{"the manager's engine is stopped and started", func(t *testing.T) {
			must(t, lab.Host(1).StopEngine(within(t)))
			must(t, lab.Host(1).StartEngine(within(t)))
		}, []int{2, 3}},
		{"the manager's engine is killed and started", func(t *testing.T) {
			must(t, lab.Host(1).KillEngine(within(t)))
			must(t, lab.Host(1).StartEngine(within(t)))
		}, []int{2, 3}},
		{"all hosts lose their power at once", func(t *testing.T) {
			must(t, lab.Each(within(t), func(ctx context.Context, h *cluster.Host) error { return h.PowerOff(ctx) }))
			must(t, lab.Each(within(t), func(ctx context.Context, h *cluster.Host) error { return h.PowerOn(ctx) }))
			must(t, lab.WaitNodes(within(t), 3)) // before a service that makes use of the engines' mesh
			must(t, useIngress(within(t), lab))
		}, nil},
		{"the leader's plugin hangs for ten seconds", func(t *testing.T) {
			pid := pluginPID(t, lab.Host(1))
			signal := func(name string) {
				if _, err := lab.Host(1).Exec(within(t), "kill", "-"+name, pid); err != nil {
					t.Error(err)
				}
			}
			signal("STOP")
			// What is asked for meanwhile is done afterwards.
			docker(t, 1, "service", "scale", "-d", "all=5")
			select {
			case <-time.After(10 * time.Second):
			case <-t.Context().Done():
			}
			signal("CONT")
			running(t, "all", 5)
			docker(t, 1, "service", "scale", "-d", "all=3")
		}, []int{2, 3}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Cleanup(func() {
				if err := verifyNothingLeft(context.Background()); err != nil {
					t.Error("left behind: ", err)
				}
			})
			network(t, "web")
			outside := clients(t)[1]
			service(t, "all", publish("web", "publish=81:80"), 3)
			here := 2
			if len(row.unhurt) > 0 {
				here = row.unhurt[0]
			}
			service(t, "stays", publish("web", "publish=82:80"), 2, "--constraint", "node.hostname=="+lab.Host(here).Name())
			v := vip(t, "stays", "web").String()
			spreads(t, outside, 82, 4, 2)
			a := asking(t)
			for _, i := range row.unhurt {
				c := client(t, i, "web")
				reaches(t, lab.Host(i), c, 2, 4, v)
				a.inside(t, i, c, v)
				a.outside(t, outside, lab.Host(i), 82)
			}
			row.do(t)
			must(t, lab.WaitNodes(within(t), 3)) // a node that its manager has not back attaches no container
			running(t, "all", 3)
			running(t, "stays", 2)
			spreads(t, outside, 81, 6, 3)
			spreads(t, outside, 82, 4, 2)
			a.end(t, row.name)
			c := client(t, 3, "web")
			reaches(t, lab.Host(3), c, 3, 6, vip(t, "all", "web").String())
			reaches(t, lab.Host(3), c, 2, 4, v)
			sound(t, "web")
		})
	}
}

// manage gives or takes hosts 2 and 3 the role of managers, and waits until host 1 has n
// that the leader reaches, and no others: while their number changes, or the lead, a manager may refuse
// what it is asked.
func manage(ctx context.Context, change string, n int) error {
	return cluster.Wait(ctx, fmt.Sprintf("there are %d managers", n), func(ctx context.Context) error {
		if _, err := lab.Host(1).Docker(ctx, "node", change, "e2", "e3"); err != nil {
			return err
		}
		nodes, err := lab.Host(1).Nodes(ctx)
		if err != nil {
			return err
		}
		var members, reached int
		var led bool
		for _, x := range nodes {
			if x.Member {
				members++
			}
			if x.Manager {
				reached++
			}
			led = led || x.Leader
		}
		if members != n || reached != n || !led {
			return fmt.Errorf("%+v", nodes)
		}
		return nil
	})
}

// TestLeadersAreLost kills the engine of the leader twice in a row, with scaling in
// between, and demotes and promotes managers, under traffic.
func TestLeadersAreLost(t *testing.T) {
	docker(t, 1, "swarm", "update", "--snapshot-interval", fmt.Sprint(cluster.ManagersChange))
	t.Cleanup(func() {
		// Managers that lose the lead by it answer late: 20 s and more were seen.
		ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
		defer cancel()
		if err := manage(ctx, "demote", 1); err != nil {
			t.Error(err)
		}
		if _, err := lab.Host(1).Docker(ctx, "swarm", "update", "--snapshot-interval", "10000"); err != nil { // swarm's own
			t.Error(err)
		}
	})
	must(t, manage(within(t), "promote", 3))
	network(t, "web")
	service(t, "s1", "web", 6)
	service(t, "stays", "web", 2, "--constraint", "node.hostname==e3")
	v := vip(t, "s1", "web").String()
	next := func(not *cluster.Host) (lead *cluster.Host) {
		t.Helper()
		err := cluster.Wait(within(t), "a manager leads", func(ctx context.Context) (err error) {
			lead, err = leader(ctx)
			if err == nil && lead == not {
				err = fmt.Errorf("%s is named still", lead.Name())
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return lead
	}
	for i, to := range []int{9, 4} {
		// Asked from where no engine is killed, tasks that run where none is.
		lead := next(nil)
		from := lab.Host(3)
		a := asking(t)
		if lead != from {
			c := client(t, 3, "web")
			reaches(t, from, c, 2, 4, vip(t, "stays", "web").String())
			a.inside(t, 3, c, vip(t, "stays", "web").String())
		}
		must(t, lead.KillEngine(within(t)))
		scale(t, next(lead), "s1", to)
		must(t, lead.StartEngine(within(t)))
		must(t, lab.WaitNodes(within(t), 3))
		running(t, "s1", to)
		if lead != from {
			a.end(t, fmt.Sprintf("while leader %d was lost", i+1))
		}
		sound(t, "web")
	}
	lead := next(nil)
	// What is asked may come between two changes of the swarm's own ("update out of
	// sequence").
	set := func(by *cluster.Host, role string) {
		t.Helper()
		must(t, cluster.Wait(within(t), lead.Name()+" is to "+role, func(ctx context.Context) error {
			_, err := by.Docker(ctx, "node", role, lead.Name())
			return err
		}))
	}
	set(lead, "demote")
	now := next(lead)
	scale(t, now, "s1", 7)
	must(t, lead.WaitWorker(within(t)))
	set(now, "promote")
	running(t, "s1", 7)
	c := client(t, 3, "web")
	reaches(t, lab.Host(3), c, 7, 14, v)
	sound(t, "web")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
