package dockerapi_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/dockerapi"
	"sluice/internal/model"
	"sluice/test/cluster"
	"sluice/test/image"
)

func TestMain(m *testing.M) {
	cluster.MaybeInner()
	os.Exit(m.Run())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// follow starts a Reader on a host, with the engine's own overlay in the place
// of our driver: what the API tells of networks does not depend on the driver.
func follow(t *testing.T, h *cluster.Host) *dockerapi.Reader {
	t.Helper()
	r, err := dockerapi.New(dockerapi.Config{Socket: h.Socket(), Name: "overlay", Log: slog.New(slog.NewTextHandler(out{t, h.Name()}, nil))})
	must(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := r.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: Run: %v", h.Name(), err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return r
}

type out struct {
	t    *testing.T
	host string
}

func (o out) Write(p []byte) (int, error) {
	o.t.Logf("%s: %s", o.host, strings.TrimSpace(string(p)))
	return len(p), nil
}

// await waits for a snapshot that ok accepts, and says how long that took.
func await(t *testing.T, r *dockerapi.Reader, what string, ok func(s model.EngineSnapshot) bool) model.EngineSnapshot {
	t.Helper()
	begun := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for {
		s := r.Snapshot()
		if ok(s) {
			t.Logf("%s: after %s", what, time.Since(begun).Round(time.Millisecond))
			return s
		}
		select {
		case <-r.Changed():
		case <-ctx.Done():
			text, err := json.MarshalIndent(s, "", " ")
			t.Fatalf("no snapshot with: %s; %v\n%s\n%+v", what, err, text, r.Status())
		}
	}
}

func network(s model.EngineSnapshot, name string) model.EngineNetwork {
	for _, n := range s.Networks {
		if n.Name == name {
			return n
		}
	}
	return model.EngineNetwork{}
}

// ofService lists the endpoints of a service, on the network.
func ofService(s model.EngineSnapshot, service string, n model.NetworkID) (out []model.EngineEndpoint) {
	for _, e := range s.Containers {
		if e.Task.ServiceName == service && e.Network == n {
			out = append(out, e)
		}
	}
	return out
}

// enginesEnv names releases of Debian, separated by commas, whose engines are
// tested beside the machine's own.
const enginesEnv = "SLUICE_TEST_ENGINES"

func TestRealEngines(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: simulated Docker hosts are namespaces and mounts")
	}
	for _, program := range []string{"dockerd", "docker", "ip", "nft", "iptables", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s", program)
		}
	}
	images, err := image.Build(t.Context(), t.TempDir())
	if err != nil {
		t.Skipf("needs the test images: %v", err)
	}
	t.Run("own", func(t *testing.T) { lifeOfAService(t, images, "") })
	for suite := range strings.SplitSeq(os.Getenv(enginesEnv), ",") {
		if suite == "" {
			continue
		}
		t.Run(suite, func(t *testing.T) {
			tree, err := cluster.EngineTree(t.Context(), suite, t.Output())
			must(t, err)
			lifeOfAService(t, images, tree)
		})
	}
}

// lifeOfAService is one, as a leader and a worker of real engines tell it.
func lifeOfAService(t *testing.T, images, engine string) {
	dir := filepath.Join(os.TempDir(), "sluice-dockerapi")
	c, err := cluster.Up(t.Context(), cluster.Options{Hosts: 2, Prefix: "api", Dir: dir, Engine: engine})
	must(t, err)
	t.Cleanup(func() {
		if err := c.Down(); err != nil {
			t.Error(err)
		}
		if left, err := cluster.Leftovers(dir); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
	ctx := t.Context()
	leader := follow(t, c.Host(1))
	await(t, leader, "no swarm yet", func(s model.EngineSnapshot) bool { return s.SwarmValid && !s.Active && s.ContainersValid })
	must(t, c.LoadImages(ctx, images))
	must(t, c.Swarm(ctx, 1))
	worker := follow(t, c.Host(2))

	s := await(t, leader, "leader", func(s model.EngineSnapshot) bool { return s.Leader && len(s.Nodes) == 2 })
	if s.NodeAddr != c.Host(1).Addr() || !slices.Equal(s.Managers, []netip.Addr{c.Host(1).Addr()}) || s.Version == "" {
		t.Errorf("leader: %+v", s)
	}
	s = await(t, worker, "worker", func(s model.EngineSnapshot) bool { return s.Active })
	if s.Manager || s.ServicesValid || !slices.Equal(s.Managers, []netip.Addr{c.Host(1).Addr()}) {
		t.Errorf("worker: %+v", s)
	}

	docker := func(args ...string) {
		t.Helper()
		_, err := c.Host(1).Docker(ctx, args...)
		must(t, err)
	}
	docker("network", "create", "--driver", "overlay", "--attachable", "--subnet", "10.123.0.0/24", "net")
	docker("service", "create", "--detach", "--no-resolve-image", "--name", "web", "--replicas", "2", "--restart-delay", "0s",
		"--stop-grace-period", "20s", "--network", "name=net,driver-opt=sluice.weight=5", image.Probe)

	s = await(t, leader, "the service and its VIP", func(s model.EngineSnapshot) bool {
		n := network(s, "net")
		for _, sv := range s.Services {
			if sv.Name == "web" && sv.VIPs[n.ID].IsValid() && sv.Options[n.ID].Weight == 5 {
				return true
			}
		}
		return false
	})
	net := network(s, "net")
	if net.Subnet != netip.MustParsePrefix("10.123.0.0/24") || net.Gateway != netip.MustParseAddr("10.123.0.1") || !net.Swarm {
		t.Errorf("network %+v", net)
	}
	vip, err := c.VIP(ctx, "web", "net")
	must(t, err)
	for _, at := range []*dockerapi.Reader{leader, worker} {
		s := await(t, at, "a ready task with VIP, namespace and both tasks in gossip", func(s model.EngineSnapshot) bool {
			mine := ofService(s, "web", net.ID)
			return len(mine) == 1 && mine[0].Task.Ready && mine[0].Task.VIP == vip && mine[0].Sandbox != "" &&
				len(network(s, "net").Services["web"].Tasks) == 2 && len(network(s, "net").Peers) == 2
		})
		if e := ofService(s, "web", net.ID)[0]; e.MAC.IsZero() || !e.Addr.IsValid() || e.Name == "" || e.Task.ID == "" || e.Task.Service == "" {
			t.Errorf("endpoint %+v", e)
		}
	}

	// A container on an attachable network is a task of no service; its address
	// is in use all the same.
	docker("run", "--detach", "--name", "alone", "--network", "net", "--ip", "10.123.0.77", image.Probe)
	s = await(t, leader, "the address of docker run", func(s model.EngineSnapshot) bool {
		return slices.Contains(s.Live[net.ID], netip.MustParseAddr("10.123.0.77"))
	})
	for _, a := range []netip.Addr{net.Gateway, vip} {
		if !slices.Contains(s.Live[net.ID], a) {
			t.Errorf("%s is not among the addresses in use %v", a, s.Live[net.ID])
		}
	}
	docker("rm", "--force", "alone")
	await(t, leader, "the address to be free", func(s model.EngineSnapshot) bool {
		return !slices.Contains(s.Live[net.ID], netip.MustParseAddr("10.123.0.77"))
	})

	// The manager tells that a task is to go while it still runs.
	docker("service", "scale", "--detach", "web=1")
	await(t, leader, "a task is leaving", func(s model.EngineSnapshot) bool { return len(s.Leaving) == 1 })
	await(t, leader, "it has left", func(s model.EngineSnapshot) bool { return s.ServicesValid && len(s.Leaving) == 0 })

	// kill -9 of the engine.
	must(t, c.Host(2).KillEngine(ctx))
	await(t, worker, "doubt after kill -9", func(s model.EngineSnapshot) bool { return !s.SwarmValid && !s.ContainersValid })
	must(t, c.Host(2).StartEngine(ctx))
	await(t, worker, "belief after the start", func(s model.EngineSnapshot) bool { return s.SwarmValid && s.ContainersValid && s.Active })

	docker("service", "rm", "web")
	await(t, leader, "no service", func(s model.EngineSnapshot) bool { return s.ServicesValid && len(s.Services) == 0 })
	must(t, cluster.Wait(ctx, "the network can be removed", func(ctx context.Context) error {
		_, err := c.Host(1).Docker(ctx, "network", "rm", "net")
		return err
	}))
	await(t, leader, "no network", func(s model.EngineSnapshot) bool { return network(s, "net").ID == "" })
	for name, r := range map[string]*dockerapi.Reader{"leader": leader, "worker": worker} {
		t.Log(name, fmt.Sprintf("%+v", r.Status()))
	}
}
