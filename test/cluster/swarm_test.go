package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

// swarm makes a cluster of three that is a swarm and has the test images.
func swarm(t *testing.T, prefix string) *cluster.Cluster {
	t.Helper()
	needHosts(t)
	images, err := image.Build(within(t, time.Minute), t.TempDir())
	if err != nil {
		t.Skipf("needs the test images: %v", err)
	}
	c := up(t, cluster.Options{Hosts: 3, Prefix: prefix})
	ctx := within(t, 30*time.Second)
	must(t, c.LoadImages(ctx, images))
	must(t, c.Swarm(ctx, 1))
	return c
}

// startService starts three tasks of the probe in an overlay network of the
// engine's own.
func startService(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	h := c.Host(1)
	_, err := h.Docker(ctx, "network", "create", "--driver", "overlay", "--attachable", "net")
	must(t, err)
	_, err = h.Docker(ctx, "service", "create", "--detach", "--no-resolve-image", "--name", "web",
		"--replicas", "3", "--restart-delay", "0s", "--network", "net", image.Probe)
	must(t, err)
}

// waitAnswers waits until the service has three tasks that all answer the first
// of them, by their own addresses: virtual IPs of the engine's overlay need a
// kernel with ip_vs. Asking for the tasks each time matters after a disturbance,
// of which the manager learns later.
func waitAnswers(t *testing.T, c *cluster.Cluster) []cluster.Task {
	t.Helper()
	begun := time.Now()
	var tasks []cluster.Task
	must(t, cluster.Wait(within(t, 40*time.Second), "all tasks answer", func(ctx context.Context) (err error) {
		if tasks, err = c.WaitService(ctx, "web", 3); err != nil {
			return err
		}
		for _, task := range tasks {
			if out, err := tasks[0].Exec(ctx, "/probe", "get", task.Addrs["net"].String()); err != nil {
				return fmt.Errorf("%s: %w: %s", task.Host.Name(), err, out)
			}
		}
		return nil
	}))
	t.Logf("all tasks answer after %s", time.Since(begun).Round(time.Millisecond))
	return tasks
}

// removeService removes what startService made and waits until no host has the
// network any more.
func removeService(t *testing.T, c *cluster.Cluster) {
	t.Helper()
	ctx := within(t, 60*time.Second)
	_, err := c.Host(1).Docker(ctx, "service", "rm", "web")
	must(t, err)
	begun := time.Now()
	defer func() { t.Logf("removed after %s", time.Since(begun).Round(time.Millisecond)) }()
	must(t, cluster.Wait(ctx, "the network can be removed", func(ctx context.Context) error {
		_, err := c.Host(1).Docker(ctx, "network", "rm", "net")
		return err
	}))
	must(t, c.Each(ctx, func(ctx context.Context, h *cluster.Host) error {
		return cluster.Wait(ctx, h.Name()+" is without containers and the network", func(ctx context.Context) error {
			rest, err := h.Docker(ctx, "ps", "--all", "--quiet")
			if err != nil || rest != "" {
				return fmt.Errorf("containers %q, %w", rest, err)
			}
			_, err = h.API(ctx, "GET", "/networks/net", nil)
			var api *cluster.APIError
			if errors.As(err, &api) && api.Status == 404 {
				return nil
			}
			return fmt.Errorf("the network is still there: %w", err)
		})
	}))
}

func TestServiceComesAndGoesWithoutATrace(t *testing.T) {
	t.Parallel()
	c := swarm(t, "svc")
	var before []cluster.Snapshot
	for _, h := range c.Hosts() {
		before = append(before, snapshot(t, h))
	}
	startService(t, c)
	tasks := waitAnswers(t, c)
	hosts := map[string]bool{}
	for _, task := range tasks {
		hosts[task.Host.Name()] = true
	}
	if len(hosts) != 3 {
		t.Errorf("three tasks run on %v, want each on a host of its own", hosts)
	}
	if _, err := c.VIP(t.Context(), "web", "net"); err != nil {
		t.Error(err)
	}
	removeService(t, c)
	for i, h := range c.Hosts() {
		wantSame(t, before[i], snapshot(t, h))
	}
}

func TestServiceSurvivesAKilledEngineAndAReboot(t *testing.T) {
	if testing.Short() {
		t.Skip("needs 40 s and no -short: a node that comes back at once first waits 30 s for a bulk sync with its former self (engine 20.10)")
	}
	t.Parallel()
	c := swarm(t, "heal")
	startService(t, c)
	old := waitAnswers(t, c)
	ctx := within(t, 60*time.Second)
	must(t, c.Host(2).Reboot(ctx))
	must(t, c.Host(3).KillEngine(ctx))
	must(t, c.Host(3).StartEngine(ctx))
	must(t, c.WaitNodes(ctx, 3))
	// The manager calls the old tasks running for a moment more.
	must(t, cluster.Wait(ctx, "new tasks replace the lost ones", func(ctx context.Context) error {
		now, err := c.WaitService(ctx, "web", 3)
		if err != nil {
			return err
		}
		for _, task := range old[1:] {
			if slices.ContainsFunc(now, func(n cluster.Task) bool { return n.ID == task.ID }) {
				return fmt.Errorf("task %s on %s still counts as running", task.ID, task.Host.Name())
			}
		}
		return nil
	}))
	waitAnswers(t, c)
}

func TestServiceThatCannotRunSaysWhy(t *testing.T) {
	t.Parallel()
	c := swarm(t, "why")
	ctx := within(t, 30*time.Second)
	_, err := c.Host(1).Docker(ctx, "service", "create", "--detach", "--no-resolve-image", "--name", "web",
		"--entrypoint", "/no/such/program", image.Probe)
	must(t, err)
	_, err = c.WaitService(within(t, 5*time.Second), "web", 1)
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("error %v, want the engine's words about /no/such/program", err)
	}
}
