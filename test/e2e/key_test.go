package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/test/cluster"
	"sluice/test/image"
)

// gossips waits until the plugin on host i is in contact with all other nodes.
func gossips(t *testing.T, i int) diag.Status {
	t.Helper()
	var st diag.Status
	err := cluster.Wait(within(t), fmt.Sprintf("gossip on host %d has all others", i), func(context.Context) error {
		st = diag.Status{}
		sluice(t, i, &st, "status")
		if !strings.HasPrefix(st.Gossip.State, "running") || len(st.Gossip.Peers) != len(lab.Hosts())-1 {
			return fmt.Errorf("%+v, problems %+v", st.Gossip, st.Problems)
		}
		for _, p := range st.Gossip.Peers {
			if p.State != "present" {
				return fmt.Errorf("%+v", p)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// TestANodeWithoutANetworkHasTheKey: nothing of sluice's was ever on two of the
// hosts, as far as they know, and they are in contact all the same.
func TestANodeWithoutANetworkHasTheKey(t *testing.T) {
	network(t, "web")
	// The others lose all that they know: they are as they were when they joined.
	for _, h := range lab.Hosts()[1:] {
		pid := pluginPID(t, h)
		if _, err := h.Exec(within(t), "sh", "-c", "rm -f /proc/"+pid+"/root/var/lib/sluice/state.db && kill -9 "+pid); err != nil {
			t.Fatal(err)
		}
		err := cluster.Wait(within(t), "the plugin is back on "+h.Name(), func(ctx context.Context) error {
			_, err := h.Exec(ctx, sluiceCommand(h), "--json", "networks")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	service(t, "s1", "web", 1, "--constraint", "node.hostname=="+lab.Host(2).Name())
	for i := range lab.Hosts() {
		st := gossips(t, i+1)
		if want := i+1 == 2; (st.Endpoints > 0) != want {
			t.Errorf("host %d has %d endpoints", i+1, st.Endpoints)
		}
	}
	out := docker(t, 3, "network", "ls", "-q", "-f", "name=web")
	if strings.TrimSpace(out) != "" {
		t.Errorf("host 3 has the network: %q", out)
	}
}

// TestAnAutolockedManagerSaysThatItCannotGiveTheKey: its own is encrypted then.
func TestAnAutolockedManagerSaysThatItCannotGiveTheKey(t *testing.T) {
	says := func(want bool) error {
		return cluster.Wait(within(t), fmt.Sprintf("status tells of autolock: %t", want), func(context.Context) error {
			var st diag.Status
			sluice(t, 1, &st, "status")
			for _, p := range st.Problems {
				if strings.Contains(p.What, "autolocked") && strings.Contains(p.Do, "GOSSIP_KEY") {
					if !want {
						return fmt.Errorf("%+v", p)
					}
					return nil
				}
			}
			if want {
				return fmt.Errorf("problems: %+v", st.Problems)
			}
			return nil
		})
	}
	docker(t, 1, "swarm", "update", "--autolock=true")
	err := says(true)
	docker(t, 1, "swarm", "update", "--autolock=false")
	if err := errors.Join(err, says(false)); err != nil {
		t.Error(err)
	}
}

// TestWhoHasAPublishedPortIsNamed: the plugin sees the host's processes.
func TestWhoHasAPublishedPortIsNamed(t *testing.T) {
	h := lab.Host(3)
	id := docker(t, 3, "run", "-d", "-p", "8099:80", image.Probe) // which the engine's proxy listens for
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := h.Docker(ctx, "rm", "-f", id); err != nil {
			t.Error(err)
		}
	})
	c := clients(t)[0]
	network(t, "web")
	docker(t, 1, "service", "create", "-d", "--no-resolve-image", "--name", "s1", "--stop-grace-period", "2s",
		"--network", "name=web,driver-opt=sluice.publish=8099:80", "--constraint", "node.hostname=="+lab.Host(1).Name(), image.Probe)
	t.Cleanup(func() { removeService(t, "s1") })
	err := cluster.Wait(within(t), "host 3 tells who has the port", func(ctx context.Context) error {
		log, err := os.ReadFile(h.LogFile())
		if err != nil {
			return err
		}
		if !strings.Contains(string(log), "port 8099/tcp is held by docker-proxy (pid ") {
			return fmt.Errorf("not in %s", h.LogFile())
		}
		p := entries(t, 3)
		if len(p.Ports) != 1 || p.Ports[0].State != diag.PortLost || p.Ports[0].Owner == nil || p.Ports[0].Owner.Kind != diag.OwnerProcess ||
			!strings.HasPrefix(p.Ports[0].Owner.Name, "docker-proxy (pid ") {
			return fmt.Errorf("sluice entry: %+v", p)
		}
		var st diag.Status
		sluice(t, 3, &st, "status")
		var sv diag.Services
		sluice(t, 3, &sv, "services")
		for what, ps := range map[string][]diag.Problem{"status": st.Problems, "services": sv.Problems} {
			if !strings.Contains(fmt.Sprint(ps), "docker-proxy (pid ") {
				return fmt.Errorf("sluice %s: %+v", what, ps)
			}
		}
		m, err := web(ctx, c, h, "/metrics")
		if err != nil || !strings.Contains(m, `owner="docker-proxy (pid `) {
			return fmt.Errorf("metrics: %w: %s", err, m)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
