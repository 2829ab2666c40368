package managers

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

const (
	plugin = "sluice:latest"
	// patience bounds each wait: an election takes some seconds, up to 15 of them
	// when the machine is busy.
	patience = 90 * time.Second
)

var lab *cluster.Cluster

func TestMain(m *testing.M) {
	cluster.MaybeInner()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: end-to-end tests make network namespaces and run Docker engines, which needs root")
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	c, err := setUp(ctx)
	if err != nil {
		fmt.Println("end-to-end tests could not be set up:", err, c.Down())
		return 1
	}
	lab = c
	code := m.Run()
	if err := c.Down(); err != nil {
		fmt.Println("FAIL: take the cluster down:", err)
		code = 1
	}
	return code
}

func setUp(ctx context.Context) (*cluster.Cluster, error) {
	root, err := filepath.Abs("../../..")
	if err != nil {
		return nil, err
	}
	if err := cluster.Build(ctx, root); err != nil {
		return nil, err
	}
	engine, err := cluster.TestedEngine(ctx, os.Stdout)
	if err != nil {
		return nil, err
	}
	c, err := cluster.Up(ctx, cluster.Options{
		Hosts: 3, Prefix: "m", Dir: filepath.Join(os.TempDir(), "sluice-managers"), Engine: engine,
	})
	if err != nil {
		return c, err
	}
	return c, c.Ready(ctx, plugin, filepath.Join(root, "build", "plugin"), 3, "LOG_LEVEL=debug")
}

// TestScaleDownAcrossAChangeOfLeader: the new leader deletes the tasks that the
// last one was removing and allocates at once, while their containers run on.
// They get no new connections, and nobody gets their addresses.
func TestScaleDownAcrossAChangeOfLeader(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	docker := func(i int, args ...string) string {
		t.Helper()
		out, err := lab.Host(i).Docker(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	create := func(i int, name string, replicas int) {
		t.Helper()
		docker(i, "service", "create", "-d", "--no-resolve-image", "--name", name, "--network", "web",
			"--replicas", fmt.Sprint(replicas), "--stop-grace-period", "5s", image.Probe)
	}
	docker(1, "network", "create", "-d", plugin, "--ipam-driver", plugin, "--attachable", "web")
	create(1, "s1", 7)
	before, err := lab.WaitService(ctx, "s1", 7)
	if err != nil {
		t.Fatal(err)
	}
	client := docker(2, "run", "-d", "--network", "web", image.Probe)
	vip, err := lab.VIP(ctx, "s1", "web")
	if err != nil {
		t.Fatal(err)
	}
	type summary struct {
		OK, Failed int
		Errors     map[string]int
	}
	done := make(chan summary, 1)
	go func() {
		var s summary
		out, err := lab.Host(2).Docker(ctx, "exec", client, "/probe", "get", "--summary", "--timeout", "5s", "--for", "9s", "--every", "10ms", vip.String())
		if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
			t.Errorf("requests: %v, %v: %q", err, jerr, out)
		}
		done <- s
	}()
	docker(1, "service", "scale", "-d", "s1=2")
	docker(2, "node", "demote", "m1")
	err = cluster.Wait(ctx, "another manager leads and allocates", func(ctx context.Context) error {
		out, err := lab.Host(2).Docker(ctx, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		if err == nil && (!strings.Contains(out, "Leader") || strings.Contains(out, "m1 Leader")) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	create(2, "s2", 5)
	if s := <-done; s.Failed > 0 || s.OK < 100 {
		t.Errorf("requests while the lead moved: %+v", s)
	}
	if err := lab.Host(1).WaitWorker(ctx); err != nil {
		t.Fatal(err)
	}
	docker(2, "node", "promote", "m1")
	var after []cluster.Task
	err = cluster.Wait(ctx, "m1 is a manager again, and s2 runs", func(ctx context.Context) error {
		var err error
		after, err = lab.WaitService(ctx, "s2", 5)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range before {
		for _, a := range after {
			if a.Addrs["web"] == b.Addrs["web"] {
				t.Errorf("%s was given to a task of s2 while a container of s1 had it", a.Addrs["web"])
			}
		}
	}
	out, err := lab.Host(3).Docker(ctx, "run", "--rm", "--network", "web", "--ip", vip.String(), image.Probe, "dns", "s1")
	if err == nil {
		t.Errorf("a container was given the virtual IP %s: %s", vip, out)
	}
}
