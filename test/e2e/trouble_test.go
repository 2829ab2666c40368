package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

// pluginPID is the plugin's process on a host, as the host counts.
func pluginPID(t *testing.T, h *cluster.Host) string {
	t.Helper()
	pid, err := h.PluginPID(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestPluginKilledUnderTrafficLosesNothing(t *testing.T) {
	network(t, "web")
	service(t, "s1", publish("web", "publish=81:80"), 3)
	v := vip(t, "s1", "web").String()
	c := client(t, 2, "web")
	reaches(t, lab.Host(2), c, 3, 6, v)
	outside := clients(t)[1]
	spreads(t, outside, 81, 6, 3)
	all := keepAsking(t, outside, 81)
	all.inside(t, 2, c, v)
	for _, h := range lab.Hosts() {
		old := pluginPID(t, h)
		if _, err := h.Exec(within(t), "kill", "-9", old); err != nil {
			t.Fatal(err)
		}
		err := cluster.Wait(within(t), "the plugin is back on "+h.Name(), func(ctx context.Context) error {
			st, err := answer[diag.Status](ctx, h, "status")
			if err == nil && (st.Loop.Rounds == 0 || st.Engine == "") {
				err = fmt.Errorf("not working yet: %+v", st)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	docker(t, 1, "service", "scale", "-d", "s1=5")
	running(t, "s1", 5)
	reaches(t, lab.Host(2), c, 5, 10, v)
	all.end(t, "while plugins were killed")
	sound(t, "web")
}

// damageState overwrites the beginning of the state file on a host and kills the plugin,
// which the engine starts again.
func damageState(t *testing.T, h *cluster.Host) {
	t.Helper()
	pid := pluginPID(t, h)
	file := filepath.Join("/proc", pid, "root/var/lib/sluice/state.db")
	if _, err := h.Exec(within(t), "sh", "-c", "dd if=/dev/urandom of="+file+" bs=4096 count=4 conv=notrunc 2>&1 && kill -9 "+pid); err != nil {
		t.Fatal(err)
	}
}

// TestStateFileOfTheLeaderDamaged: Swarm's allocator asks for more, and tells again of
// nothing that it was given before.
func TestStateFileOfTheLeaderDamaged(t *testing.T) {
	network(t, "web", "-o", "sluice.vni=4711")
	service(t, "s1", "web", 3)
	client(t, 2, "web")
	damageState(t, lab.Host(1))
	docker(t, 1, "service", "scale", "-d", "s1=6")
	network(t, "next")
	running(t, "s1", 6)
	c := client(t, 3, "web")
	reaches(t, lab.Host(3), c, 6, 12, vip(t, "s1", "web").String())
	var subnets []netip.Prefix
	for _, name := range []string{"web", "next"} {
		text := docker(t, 1, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Subnet}}", name)
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			t.Fatal(err)
		}
		subnets = append(subnets, p)
	}
	if subnets[0].Overlaps(subnets[1]) {
		t.Errorf("two networks have %v", subnets)
	}
	sound(t, "web")
	network(t, "same", "-o", "sluice.vni=4711")
	taskError(t, "same", "VNI 4711 is in use")
}

func TestStateFileDamaged(t *testing.T) {
	id := network(t, "web")
	service(t, "s1", "web", 3)
	v := vip(t, "s1", "web").String()
	c := client(t, 3, "web")
	reaches(t, lab.Host(3), c, 3, 6, v)
	h := lab.Host(3)
	done := make(chan summary, 1)
	go func() {
		s, err := get(within(t), lab.Host(3), c, "--for", "8s", "--every", "5ms", v)
		if err != nil {
			t.Error(err)
		}
		done <- s
	}()
	damageState(t, h)
	// The source guard is made anew by a process that does not know the containers yet.
	if _, err := inNetwork(within(t), h, id, "nft", "delete", "table", "bridge", "sluice-guard"); err != nil {
		t.Error(err)
	}
	var st diag.Status
	err := cluster.Wait(within(t), "status tells of the damage, and the node is rebuilt", func(ctx context.Context) error {
		out, err := h.Exec(ctx, sluiceCommand(h), "--json", "status")
		if out == "" {
			return err
		}
		if err := json.Unmarshal([]byte(out), &st); err != nil {
			return err
		}
		if !strings.Contains(out, "damaged") || st.Networks != 1 || st.Endpoints != 2 || len(st.Gossip.Peers) != 2 {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if s := <-done; !s.lossless() {
		t.Errorf("requests while the state was lost: %+v", s)
	}
	reaches(t, lab.Host(3), c, 3, 6, v)
	noDiff(t, 3)
	out, err := h.Exec(within(t), "sh", "-c", "ls /proc/"+pluginPID(t, h)+"/root/var/lib/sluice")
	if err != nil || !strings.Contains(out, "damaged") {
		t.Errorf("the damaged file is not kept: %q, %v", out, err)
	}
}

func TestDriftIsMended(t *testing.T) {
	id := network(t, "web")
	service(t, "s1", "web", 3)
	v := vip(t, "s1", "web").String()
	c := client(t, 1, "web")
	reaches(t, lab.Host(1), c, 3, 6, v)
	table := "bridge"
	if wantDatapath() == "ipvs" {
		table = "ip" // of the marks
	}
	for name, damage := range map[string][]string{
		"balancer's table deleted": {"nft", "delete", "table", table, "sluice"},
		"guard's table deleted":    {"nft", "delete", "table", "bridge", "sluice-guard"},
		"VXLAN device deleted":     {"ip", "link", "del", "vxlan0"},
		"neighbours flushed":       {"ip", "neigh", "flush", "dev", "br0", "nud", "permanent"},
		"bridge's addresses gone":  {"ip", "addr", "flush", "dev", "br0"},
		"forwarding entries lost":  {"sh", "-c", "bridge fdb show dev vxlan0 | while read mac rest; do bridge fdb del $mac dev vxlan0 self; bridge fdb del $mac dev vxlan0 master; done; true"},
		"a sysctl changed":         {"sysctl", "-qw", "net.ipv4.ip_forward=1"},
	} {
		if _, err := inNetwork(within(t), lab.Host(1), id, damage...); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		noDiff(t, 1)
		reaches(t, lab.Host(1), c, 3, 6, v)
	}
}

func TestVNITakenByAnotherDevice(t *testing.T) {
	ctx := within(t)
	for _, h := range lab.Hosts() {
		if _, err := h.Exec(ctx, "ip", "link", "add", "foreign0", "type", "vxlan", "id", "77777", "dstport", "4799", "local", h.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer h.Exec(ctx, "ip", "link", "del", "foreign0")
	}
	network(t, "web", "-o", "sluice.vni=77777")
	taskError(t, "web", "77777", "foreign0")
}

// taskError makes a service whose task must fail with a text that has all words.
func taskError(t *testing.T, network string, words ...string) {
	t.Helper()
	docker(t, 1, "service", "create", "-d", "--no-resolve-image", "--name", "bad", "--network", network, "--restart-max-attempts", "1", "sluice-probe:test")
	t.Cleanup(func() { removeService(t, "bad") })
	err := cluster.Wait(within(t), fmt.Sprintf("docker service ps tells of %q", words), func(ctx context.Context) error {
		out, err := lab.Host(1).Docker(ctx, "service", "ps", "--no-trunc", "--format", "{{.Error}}", "bad")
		for _, w := range words {
			if !strings.Contains(out, w) {
				return fmt.Errorf("%q, %v", out, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
