package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

// holding is a connection that is kept open.
type holding struct {
	entry *cluster.Host
	end   chan error
}

// hold opens a connection to a port of a node and keeps it, with a line every 100 ms.
// The result says how it ended, after the time given or when it broke.
func hold(t *testing.T, c *cluster.Client, h *cluster.Host, port int, span string) holding {
	x := holding{h, make(chan error, 1)}
	ctx := within(t)
	go func() {
		out, err := c.Exec(ctx, probe(), "hold", "--for", span, "--gap", "3s", netip.AddrPortFrom(h.Addr(), uint16(port)).String())
		if err != nil {
			err = fmt.Errorf("connection by %s: %w: %s", h.Name(), err, out)
		}
		x.end <- err
	}()
	return x
}

// TestMeshStaysWhileTheRestChanges: open connections and new requests, by all nodes,
// while the service grows, tasks are replaced, plugins are killed and rules deleted.
func TestMeshStaysWhileTheRestChanges(t *testing.T) {
	network(t, "web")
	c := clients(t)[1]
	service(t, "s1", publish("web", "publish=81:80"), 3, "--update-order", "start-first",
		"--health-cmd", "/probe health", "--health-interval", "1s", "--stop-grace-period", "20s")
	spreads(t, c, 81, 6, 3)

	t.Run("the service grows and plugins are killed", func(t *testing.T) {
		var held []holding
		for _, h := range lab.Hosts() {
			held = append(held, hold(t, c, h, 81, "15s"))
		}
		all := keepAsking(t, c, 81)
		docker(t, 1, "service", "scale", "-d", "s1=5")
		running(t, "s1", 5)
		for _, h := range lab.Hosts() {
			if _, err := h.Exec(within(t), "kill", "-9", pluginPID(t, h)); err != nil {
				t.Fatal(err)
			}
		}
		spreads(t, c, 81, 10, 5)
		for _, x := range held {
			if err := <-x.end; err != nil {
				t.Error(err)
			}
		}
		all.end(t, "while the service grew and plugins were killed")
	})
	t.Run("tasks are replaced", func(t *testing.T) {
		docker(t, 1, "service", "scale", "-d", "s1=3")
		running(t, "s1", 3)
		spreads(t, c, 81, 6, 3)
		all := keepAsking(t, c, 81)
		must(t, update(t, "s1", "--force"))
		running(t, "s1", 3)
		all.end(t, "while tasks were replaced")
	})
	t.Run("rules are deleted", func(t *testing.T) {
		h := lab.Host(2)
		for name, damage := range map[string]string{
			"table deleted":  "nft delete table ip sluice-mesh",
			"jump deleted":   "iptables -D FORWARD -j SLUICE-MESH",
			"chain flushed":  "iptables -F SLUICE-MESH",
			"chain gone":     "iptables -D FORWARD -j SLUICE-MESH; iptables -F SLUICE-MESH; iptables -X SLUICE-MESH",
			"pair deleted":   "ip link del $(ip -br link | grep -o '^slm[^@]*')",
			"routes flushed": "ip route flush dev $(ip -br link | grep -o '^slm[^@]*')",
		} {
			if _, err := h.ExecNet(within(t), "sh", "-c", damage); err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			noDiff(t, 2)
			sees(t, c, h, 81, false, "", is(c.Addr()))
			sees(t, onHost{h}, h, 81, false, "", anyone)
		}
	})
}

// TestMeshFollowsATaskThatMoves: while the only task of a service is replaced by one on
// another node, connections to the old one go on, as do those to others, and new ones
// find the new one.
func TestMeshFollowsATaskThatMoves(t *testing.T) {
	network(t, "web")
	c := clients(t)[1]
	service(t, "stays", publish("web", "publish=81:80"), 1, "--constraint", "node.hostname==e2")
	// A task that is to stop serves its open connections to their end.
	service(t, "moves", publish("web", "publish=82:80"), 1, "--constraint", "node.hostname==e1", "--update-order", "start-first",
		"--stop-grace-period", "60s", "--health-cmd", "/probe health", "--health-interval", "1s", image.Probe, "serve", "--tcp", "80", "--grace", "60s")
	spreads(t, c, 81, 2, 1)
	spreads(t, c, 82, 2, 1)
	var held []holding
	for _, h := range lab.Hosts() {
		held = append(held, hold(t, c, h, 81, "25s"), hold(t, c, h, 82, "25s"))
	}
	all := keepAsking(t, c, 82)
	must(t, update(t, "moves", "--constraint-rm", "node.hostname==e1", "--constraint-add", "node.hostname==e3"))
	var now string
	err := cluster.Wait(within(t), "the task has moved to e3", func(ctx context.Context) (err error) {
		now, err = lab.Host(3).Docker(ctx, "ps", "-q", "--filter", "name=moves")
		if err == nil && now == "" {
			err = fmt.Errorf("it is not there")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range lab.Hosts() {
		sees(t, c, h, 82, false, now[:12], is(c.Addr()))
	}
	for _, x := range held {
		if err := <-x.end; err != nil {
			t.Error(err)
		}
	}
	all.end(t, "while the task moved")
}

// withLost opens connections and flows of UDP to tasks on a host by the VIP and by a
// published port. What it returns waits until they have ended, or found another task,
// because the swarm takes the host for lost.
func withLost(t *testing.T, lost *cluster.Host) func() {
	t.Helper()
	there := service(t, "there", publish("web", "publish=83:80"), 1, "--constraint", "node.hostname=="+lost.Name())
	service(t, "flows", publish("web", "publish=84:53/udp"), 3)
	by := byVIP(t, 1, "web", vip(t, "there", "web").String())
	port := byPort(t, 2)
	port.tcp, port.udp = "83", "84"
	flows := by
	flows.to = vip(t, "flows", "web").String()
	by.finds(t, 1, "--tcp")
	port.finds(t, 1, "--tcp")
	flows.finds(t, 3, "--udp")
	port.finds(t, 3, "--udp")
	ctx := within(t)
	begun := time.Now() // the power is cut next
	var wg sync.WaitGroup
	for _, f := range []asker{by, port} {
		wg.Go(func() {
			out, _ := f.run(ctx, "hold", "--every", "500ms", "--timeout", "60s", "--for", "60s", f.at(false))
			t.Logf("%s: the connection to the task on %s ended %s after the power", f.name, lost.Name(), time.Since(begun).Round(time.Second))
			if !strings.Contains(out, "connection reset by peer") {
				t.Errorf("%s: %s; want a reset when the swarm takes %s for lost", f.name, out, lost.Name())
			}
		})
	}
	stand(t, there, 2)
	for _, f := range []asker{flows, port} {
		for n := range 4 {
			wg.Go(func() {
				out, _ := f.run(ctx, "get", "--udp", "--source-port", fmt.Sprint(42000+n), "--for", "40s", "--every", "250ms", "--timeout", "250ms", f.at(true))
				lines := strings.Split(strings.TrimSpace(out), "\n")
				var last struct{ OK bool }
				if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || !last.OK {
					t.Errorf("%s: a flow of UDP has not found another task: %v, %s", f.name, err, lines[len(lines)-1])
				}
			})
		}
	}
	return wg.Wait
}

// TestMeshLosesANode: connections by and to the others stay, new ones go to what is
// left, and the node serves again when it is back.
func TestMeshLosesANode(t *testing.T) {
	network(t, "web")
	c := clients(t)[0]
	service(t, "here", publish("web", "publish=81:80"), 1, "--constraint", "node.hostname==e2")
	service(t, "all", publish("web", "publish=82:80"), 3)
	spreads(t, c, 82, 6, 3)
	var held []holding
	for _, h := range lab.Hosts()[:2] {
		held = append(held, hold(t, c, h, 81, "20s"))
	}
	lost := lab.Host(3)
	sees(t, c, lost, 81, false, "", is(c.Addr()))
	open := withLost(t, lost)
	if err := lost.PowerOff(within(t)); err != nil {
		t.Fatal(err)
	}
	open()
	for _, x := range held {
		if err := <-x.end; err != nil {
			t.Error(err)
		}
	}
	// The swarm gives the lost task to another node when it takes the node for lost.
	for _, h := range lab.Hosts()[:2] {
		err := cluster.Wait(within(t), "requests by "+h.Name()+" find tasks that are there", func(ctx context.Context) error {
			out, _ := c.Exec(ctx, probe(), "get", "--summary", "-n", "12", netip.AddrPortFrom(h.Addr(), 82).String())
			var s summary
			if err := json.Unmarshal([]byte(out), &s); err != nil {
				return err
			}
			if s.Failed > 0 || len(s.Hosts) < 2 {
				return fmt.Errorf("%+v", s)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	if err := lost.PowerOn(within(t)); err != nil {
		t.Fatal(err)
	}
	sees(t, c, lost, 81, false, "", is(c.Addr()))
	spreads(t, c, 82, 6, 3)
	if err := useIngress(within(t), lab); err != nil { // the host is to look as before
		t.Error(err)
	}
	for i := range 3 {
		noDiff(t, i+1)
	}
}
