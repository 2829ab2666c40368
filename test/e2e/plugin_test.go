package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

// TestLocalNetwork uses the alias of the plugin with SCOPE=local beside the
// swarm's on one engine.
func TestLocalNetwork(t *testing.T) {
	ctx := within(t)
	h := lab.Host(2)
	if _, err := h.Docker(ctx, "plugin", "create", localPlugin, stage(t, localPlugin)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, args := range [][]string{{"plugin", "disable", "-f", localPlugin}, {"plugin", "rm", localPlugin}} {
			if _, err := h.Docker(context.WithoutCancel(ctx), args...); err != nil {
				t.Error(err)
			}
		}
	}()
	docker(t, 2, "plugin", "set", localPlugin, "SCOPE=local")
	docker(t, 2, "plugin", "enable", localPlugin)

	docker(t, 2, "network", "create", "-d", localPlugin, "--ipam-driver", localPlugin, "home")
	other := docker(t, 2, "network", "create", "-d", localPlugin, "--ipam-driver", localPlugin, "-o", "sluice.mtu=1400", "away")
	defer docker(t, 2, "network", "rm", "home", "away")
	a, b, c := client2(t, "home", "--name", "aa"), client2(t, "home", "--name", "bb"), client2(t, "away", "--name", "cc")
	defer docker(t, 2, "rm", "-f", a, b, c)
	reaches(t, h, a, 1, 3, "bb")
	reaches(t, h, b, 1, 3, "--udp", "aa")
	if s, err := get(ctx, h, c, "-n", "1", addrOn(t, h, a, "home").String()); err != nil || s.OK > 0 {
		t.Errorf("one local network reaches the other: %+v, %v", s, err)
	}
	if out := docker(t, 2, "exec", c, "/bin/ip", "link", "show", "eth0"); !strings.Contains(out, "mtu 1400") {
		t.Errorf("MTU: %s", out)
	}
	docker(t, 2, "network", "connect", "away", a)
	reaches(t, h, a, 1, 3, "cc")
	docker(t, 2, "network", "disconnect", "away", a)
	docker(t, 2, "restart", "-t", "1", b)
	reaches(t, h, a, 1, 3, "bb")

	out, err := h.Exec(ctx, sluiceCommand(h), "--plugin", "sluice-local", "networks")
	if err != nil || !strings.Contains(out, "home") || !strings.Contains(out, "away") {
		t.Errorf("sluice networks: %q, %v", out, err)
	}
	if out, err := h.Docker(ctx, "network", "create", "-d", localPlugin, "--ipam-driver", localPlugin, "-o", "sluice.color=red", "bad"); err == nil || !strings.Contains(err.Error(), "sluice.color") {
		t.Errorf("an unknown option was accepted, or the text does not say so: %q, %v", out, err)
	}
	_ = other
}

// stage copies the built plugin and marks the copy: an engine takes no two plugins
// of the same content (20.10: "content … already exists").
func stage(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "plugin")
	if out, err := exec.CommandContext(within(t), "cp", "-a", filepath.Join(root, "build", "plugin"), dir).CombinedOutput(); err != nil {
		t.Fatalf("copy the plugin: %v: %s", err, out)
	}
	if err := os.WriteFile(filepath.Join(dir, "rootfs", "etc", "sluice-name"), []byte(name+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func client2(t *testing.T, network string, args ...string) string {
	t.Helper()
	full := append([]string{"run", "-d", "--network", network, "--stop-signal", "SIGKILL"}, args...)
	return docker(t, 2, append(full, "sluice-probe:test")...)
}

func TestPluginDisabledAndEnabledUnderTraffic(t *testing.T) {
	network(t, "web")
	service(t, "s1", publish("web", "publish=81:80"), 3)
	v := vip(t, "s1", "web").String()
	c := client(t, 3, "web")
	reaches(t, lab.Host(3), c, 3, 6, v)
	outside := clients(t)[1]
	spreads(t, outside, 81, 6, 3)
	all := asking(t)
	all.inside(t, 3, c, v)
	// The ports of the node itself are held by the plugin: they are free while it is
	// disabled, and what leads them to tasks stays.
	all.outside(t, outside, lab.Host(3), 81)
	if out, err := lab.Host(3).Docker(within(t), "plugin", "disable", plugin); err == nil {
		t.Errorf("a plugin in use was disabled: %s", out)
	}
	docker(t, 3, "plugin", "disable", "-f", plugin)
	docker(t, 3, "plugin", "enable", plugin)
	reaches(t, lab.Host(3), c, 3, 6, v)
	sound(t, "web")
	all.end(t, "while the plugin was disabled")
}

// TestPluginUpgrade pushes the plugin to a registry on a host's own loopback
// (Debian's docker-registry), and upgrades one node from it under traffic.
func TestPluginUpgrade(t *testing.T) {
	const registry = "127.0.0.1:5000"
	ctx := within(t)
	h := lab.Host(2)
	dir := filepath.Join(h.Dir(), "registry")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(conf, []byte("version: 0.1\nstorage: {filesystem: {rootdirectory: "+dir+"/data}}\nhttp: {addr: "+registry+"}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(ctx)
	program, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatal(err)
	}
	if program, err = place(h, program); err != nil {
		t.Fatal(err)
	}
	cmd := h.Command(serving, program, "serve", conf)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stop(); cmd.Wait() }()

	next := registry + "/sluice:next"
	docker(t, 2, "plugin", "create", next, stage(t, next))
	err = cluster.Wait(ctx, "the registry takes the plugin", func(ctx context.Context) error {
		_, err := h.Docker(ctx, "plugin", "push", next)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	docker(t, 2, "plugin", "rm", next)

	network(t, "web")
	service(t, "s1", "web", 3)
	v := vip(t, "s1", "web").String()
	c := client(t, 2, "web")
	reaches(t, h, c, 3, 6, v)
	done := make(chan summary, 1)
	go func() {
		s, err := get(within(t), h, c, "--for", "12s", "--every", "10ms", v)
		if err != nil {
			t.Error(err)
		}
		done <- s
	}()
	docker(t, 2, "plugin", "disable", "-f", plugin)
	docker(t, 2, "plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", plugin, next)
	docker(t, 2, "plugin", "enable", plugin)
	if s := <-done; !s.lossless() {
		t.Errorf("requests during the upgrade: %+v", s)
	}
	noDiff(t, 2)
	err = cluster.Wait(ctx, "the upgraded plugin has its state", func(context.Context) error {
		var st diag.Status
		sluice(t, 2, &st, "status")
		if st.Networks != 1 || st.Endpoints == 0 || len(st.Problems) > 0 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	reaches(t, h, c, 3, 6, v)
	sound(t, "web")
}
