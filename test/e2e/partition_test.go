package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/internal/gossip"
	"sluice/test/cluster"
)

// drops makes the underlay lose packets from one host to another until the test ends
// or the function is called that is returned.
func drops(t *testing.T, what ...cluster.Drop) (heal func()) {
	t.Helper()
	if err := lab.SetDrops(within(t), what...); err != nil {
		t.Error(err)
	}
	healed := false
	heal = func() {
		if healed {
			return
		}
		healed = true
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := lab.SetDrops(ctx); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(heal)
	return heal
}

// between is a loss in both directions.
func between(a, b int, match string, percent int) []cluster.Drop {
	return []cluster.Drop{{From: a, To: b, Match: match, Percent: percent}, {From: b, To: a, Match: match, Percent: percent}}
}

// lasts returns when a fault has had the length that the test is about.
func lasts(t *testing.T, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}

// gossipOnly is what the plugins say to each other: not the engines, not the data path.
const gossipOnly = "meta l4proto { tcp, udp } th dport 7947"

// traffic asks the service from a client on each host at the same time, for a span.
type traffic struct {
	name    string // of the service
	vip     string
	clients [3]string
}

// run returns what became of the requests, by host. Each try may take as long as
// timeout says.
func (x traffic) run(t *testing.T, span, timeout string) (sums [3]summary) {
	t.Helper()
	var errs [3]error
	done := make(chan struct{})
	for i, c := range x.clients {
		go func() {
			sums[i], errs[i] = get(within(t), lab.Host(i+1), c, "--for", span, "--every", "50ms", "--timeout", timeout, x.vip)
			done <- struct{}{}
		}()
	}
	for range x.clients {
		<-done
	}
	if err := errors.Join(errs[:]...); err != nil {
		t.Error(err)
	}
	for i, s := range sums {
		t.Logf("from %s: %d requests, %d failed, by task %v, errors %v", lab.Host(i+1).Name(), s.Tries, s.Failed, s.Hosts, s.Errors)
	}
	return sums
}

// backends is what a node has of the service: one line for each task.
func (x traffic) backends(ctx context.Context, h *cluster.Host) ([]string, error) {
	var sv diag.Services
	out, err := h.Exec(ctx, sluiceCommand(h), "--json", "services")
	if jerr := json.Unmarshal([]byte(out), &sv); jerr != nil {
		return nil, errors.Join(err, jerr)
	}
	var lines []string
	for _, s := range sv.Services {
		if s.Name != x.name {
			continue
		}
		for _, b := range s.Backends {
			lines = append(lines, fmt.Sprint(b.Addr, " on ", b.Node, " ", b.State))
		}
	}
	slices.Sort(lines)
	return lines, nil
}

// agree waits until all nodes are in contact and say the same of the service: n
// backends, all of them ready. That takes as long as the product promises.
func (x traffic) agree(t *testing.T, n int) {
	t.Helper()
	begun := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), gossip.ConvergenceBound)
	defer cancel()
	err := cluster.Wait(ctx, "all nodes are in contact and agree", func(ctx context.Context) error {
		var first []string
		for i, h := range lab.Hosts() {
			var st diag.Status
			out, err := h.Exec(ctx, sluiceCommand(h), "--json", "status")
			if jerr := json.Unmarshal([]byte(out), &st); jerr != nil {
				return errors.Join(err, jerr)
			}
			for _, p := range st.Gossip.Peers {
				if p.State != diag.PeerPresent {
					return fmt.Errorf("%s: %s is %s", h.Name(), p.Host, p.State)
				}
			}
			lines, err := x.backends(ctx, h)
			if err != nil {
				return err
			}
			for _, l := range lines {
				if !strings.HasSuffix(l, " "+diag.StateReady) {
					return fmt.Errorf("%s: %s", h.Name(), l)
				}
			}
			if i == 0 {
				first = lines
			}
			if len(lines) != n || !slices.Equal(lines, first) {
				return fmt.Errorf("%s: %q; %s: %q; want %d backends", h.Name(), lines, lab.Host(1).Name(), first, n)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("all agree %s after the end", time.Since(begun).Round(100*time.Millisecond))
}

// lost waits until host i is out of contact with so many others.
func lost(t *testing.T, i, others int) {
	t.Helper()
	begun := time.Now()
	err := cluster.Wait(within(t), fmt.Sprintf("host %d is out of contact with %d others", i, others), func(context.Context) error {
		var st diag.Status
		sluice(t, i, &st, "status")
		n := 0
		for _, p := range st.Gossip.Peers {
			if p.State == diag.PeerLost {
				n++
			}
		}
		if n != others {
			return fmt.Errorf("%+v", st.Gossip.Peers)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("contact given up after %s", time.Since(begun).Round(100*time.Millisecond))
}

// TestPartition cuts the underlay in ways that nodes meet, under traffic.
func TestPartition(t *testing.T) {
	network(t, "web")
	service(t, "s1", "web", 3)
	x := traffic{name: "s1", vip: vip(t, "s1", "web").String()}
	for i := range x.clients {
		x.clients[i] = client(t, i+1, "web")
		reaches(t, lab.Host(i+1), x.clients[i], 3, 6, x.vip)
	}
	x.agree(t, 3)
	whole := func(t *testing.T) {
		t.Helper()
		x.agree(t, 3)
		for i := range x.clients {
			reaches(t, lab.Host(i+1), x.clients[i], 3, 6, x.vip)
			noDiff(t, i+1)
		}
	}
	none := func(t *testing.T, sums [3]summary) {
		t.Helper()
		for i, s := range sums {
			if s.Failed > 0 || s.OK < enough || len(s.Hosts) != 3 {
				t.Errorf("requests from host %d: %+v", i+1, s)
			}
		}
	}

	t.Run("two nodes hear of each other by the third", func(t *testing.T) {
		heal := drops(t, between(2, 3, gossipOnly, 0)...)
		service(t, "other", "web", 1, "--constraint", "node.hostname==e2")
		reaches(t, lab.Host(3), x.clients[2], 1, 2, vip(t, "other", "web").String())
		none(t, x.run(t, "2s", "1s"))
		heal()
		whole(t)
	})
	t.Run("gossip is lost to one node, the data path is not", func(t *testing.T) {
		heal := drops(t, append(between(1, 3, gossipOnly, 0), between(2, 3, gossipOnly, 0)...)...)
		lost(t, 3, 2)
		lost(t, 1, 1)
		service(t, "other", "web", 1, "--constraint", "node.hostname==e2")
		v := vip(t, "other", "web").String()
		reaches(t, lab.Host(1), x.clients[0], 1, 2, v)
		none(t, x.run(t, "3s", "1s")) // silence has removed nothing
		heal()
		reaches(t, lab.Host(3), x.clients[2], 1, 2, v)
		whole(t)
	})
	t.Run("a plugin is frozen", func(t *testing.T) {
		h := lab.Host(3)
		pid := pluginPID(t, h)
		signal := func(s string) {
			t.Helper()
			if _, err := h.Exec(within(t), "kill", "-"+s, pid); err != nil {
				t.Error(err)
			}
		}
		signal("STOP")
		defer signal("CONT")
		none(t, x.run(t, "10s", "1s"))
		signal("CONT")
		whole(t)
	})
	t.Run("one way only", func(t *testing.T) {
		heal := drops(t, cluster.Drop{From: 2, To: 3})
		sums := x.run(t, "8s", "1s")
		if s := sums[0]; s.Failed > 0 || s.OK < enough || len(s.Hosts) != 3 {
			t.Errorf("host 1 reaches all, but: %+v", s)
		}
		for i, s := range sums[1:] {
			if len(s.Hosts) != 2 || s.OK < enough {
				t.Errorf("host %d reaches itself and host 1, but: %+v", i+2, s)
			}
		}
		heal()
		whole(t)
	})
	t.Run("links that come and go", func(t *testing.T) {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for range 5 {
				heal := drops(t, append(between(1, 3, "", 0), between(2, 3, "", 0)...)...)
				lasts(t, time.Second)
				heal()
				lasts(t, time.Second)
			}
		}()
		// A try that meets a cut is repeated by TCP, after 1 s and 2 s more.
		none(t, x.run(t, "10s", "15s"))
		<-ended
		whole(t)
	})
	t.Run("a fifth of all packets is lost", func(t *testing.T) {
		heal := drops(t, slices.Concat(between(1, 2, "", 20), between(1, 3, "", 20), between(2, 3, "", 20))...)
		// TCP repeats a packet six times in the first 12 s. Of a hundred requests one
		// needs longer, so there may be a few only.
		for i, s := range x.run(t, "20s", "60s") {
			if s.Failed > 0 || s.OK == 0 {
				t.Errorf("requests from host %d: %+v", i+1, s)
			}
		}
		heal()
		whole(t)
	})
	t.Run("a node is cut off", func(t *testing.T) {
		for _, other := range []int{1, 2} {
			if err := lab.Partition(within(t), 3, other); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := lab.Heal(context.WithoutCancel(t.Context()), 3, other); err != nil {
					t.Error(err)
				}
			}()
		}
		begun := time.Now()
		sums := x.run(t, "10s", "1s")
		for i, s := range sums {
			// Each balancer still gives a share to tasks that it cannot reach, and each of
			// those requests takes a second: host 3 has one answer in two seconds.
			if s.OK < enough/4 || len(s.Hosts) != []int{2, 2, 1}[i] {
				t.Errorf("host %d is to be served by its side: %+v", i+1, s)
			}
		}
		// The swarm gives the node up, and its task to another: all are reachable.
		for i := range 2 {
			err := cluster.Wait(within(t), "requests of the larger side all succeed", func(ctx context.Context) error {
				s, err := get(ctx, lab.Host(i+1), x.clients[i], "-n", "12", x.vip)
				if err == nil && s.Failed > 0 {
					err = fmt.Errorf("%+v", s)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
		t.Logf("no request of the larger side failed any more %s after the cut", time.Since(begun).Round(100*time.Millisecond))
		lines, err := x.backends(within(t), lab.Host(3))
		if err != nil || len(lines) != 3 {
			t.Errorf("the node that is alone has %q, %v; want the three that it had", lines, err)
		}
		for _, other := range []int{1, 2} {
			if err := lab.Heal(within(t), 3, other); err != nil {
				t.Fatal(err)
			}
		}
		running(t, "s1", 3)
		x.agree(t, 3)
		for i := range x.clients {
			reaches(t, lab.Host(i+1), x.clients[i], 3, 6, x.vip)
			noDiff(t, i+1)
		}
	})
}
