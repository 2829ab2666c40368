package linux

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/netnstest"
)

var tunnelAddr = netip.MustParseAddr("10.255.0.3")

// tunnelOn makes a task's namespace and the tunnel in it.
func tunnelOn(t *testing.T) (*Kernel, world, kernel.TaskTunnel) {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.IPIP)
	k, w := newHost(t, nil)
	key := kernel.TaskTunnel{Sandbox: w.Sandbox(t), Addr: tunnelAddr}
	set(t, k, key)
	return k, w, key
}

func set(t *testing.T, k *Kernel, key kernel.TaskTunnel) {
	t.Helper()
	if err := errors.Join(k.Apply(t.Context(), []kernel.Op{{Key: key, Want: kernel.TaskTunnelSpec{}}})...); err != nil {
		t.Fatal(err)
	}
}

func reported(t *testing.T, k *Kernel, key kernel.TaskTunnel) bool {
	t.Helper()
	s, err := k.Dump(t.Context(), []string{key.Sandbox})
	if err != nil {
		t.Fatal(err)
	}
	return s[key] != nil
}

func TestTunnelNameFits(t *testing.T) {
	for addr, want := range map[string]string{"10.255.0.3": "slt0aff0003", "255.255.255.255": "sltffffffff", "0.0.0.1": "slt00000001"} {
		if got := tunnelName(netip.MustParseAddr(addr)); got != want || len(got) >= unix.IFNAMSIZ {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

func TestTunnelIsAReceiver(t *testing.T) {
	_, w, _ := tunnelOn(t)
	for _, want := range []string{"ipip", "remote any", "local 10.255.0.3", "ttl inherit", "nopmtudisc", "alias sluice tunnel to 10.255.0.3"} {
		if got := run(t, w.task(t), "ip -d link show slt0aff0003"); !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := run(t, w.task(t), "ip -o addr show slt0aff0003"); !strings.Contains(got, "inet 10.255.0.3/32 scope host") {
		t.Errorf("addresses are\n%s", got)
	}
	if got := run(t, w.task(t), "ip route show table main dev slt0aff0003"); got != "" {
		t.Errorf("routes are\n%s", got)
	}
}

func TestForeignDeviceWithTunnelsName(t *testing.T) {
	k, w, key := tunnelOn(t)
	run(t, w.task(t), "ip link del slt0aff0003")
	run(t, w.task(t), "ip link add slt0aff0003 type bridge")
	for _, want := range []kernel.Value{kernel.TaskTunnelSpec{}, nil} {
		err := k.Apply(t.Context(), []kernel.Op{{Key: key, Want: want}})[0]
		if (want != nil) != errors.Is(err, kernel.ErrTaken) {
			t.Errorf("want %v: %v", want, err)
		}
	}
	run(t, w.task(t), "ip link show slt0aff0003")
	if reported(t, k, key) {
		t.Error("a foreign device is reported")
	}
	// Somebody else's device for the same packets.
	run(t, w.task(t), "ip link del slt0aff0003")
	run(t, w.task(t), "ip link add mine type ipip local 10.255.0.3")
	err := k.Apply(t.Context(), []kernel.Op{{Key: key, Want: kernel.TaskTunnelSpec{}}})[0]
	if !errors.Is(err, kernel.ErrTaken) {
		t.Errorf("%v, want %v", err, kernel.ErrTaken)
	}
	run(t, w.task(t), "ip link del mine")
	set(t, k, key)
	if !reported(t, k, key) {
		t.Error("not made")
	}
}

// An attempt may end between making and marking.
func TestHalfMadeTunnelIsFinished(t *testing.T) {
	k, w, key := tunnelOn(t)
	run(t, w.task(t), "ip link del slt0aff0003")
	run(t, w.task(t), "ip link add slt0aff0003 type ipip local 10.255.0.3")
	if reported(t, k, key) {
		t.Error("half of a tunnel is reported")
	}
	set(t, k, key)
	if !reported(t, k, key) {
		t.Error("not finished")
	}
}

func TestTunnelOfAbsentTask(t *testing.T) {
	k, _ := newHost(t, nil)
	key := kernel.TaskTunnel{Sandbox: filepath.Join(t.TempDir(), "none"), Addr: tunnelAddr}
	if err := k.Apply(t.Context(), []kernel.Op{{Key: key, Want: kernel.TaskTunnelSpec{}}})[0]; !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("create: %v, want %v", err, kernel.ErrNotExist)
	}
	if err := k.Apply(t.Context(), []kernel.Op{{Key: key, Have: kernel.TaskTunnelSpec{}}})[0]; err != nil {
		t.Errorf("delete: %v", err)
	}
}

// Without ipip, tables in tasks are made and read all the same.
func TestTablesWithoutTunnel(t *testing.T) {
	netnstest.Need(t, netnstest.NFTables)
	k, w := newHost(t, nft.Tables{})
	path := w.Sandbox(t)
	table, tunnel := kernel.TaskTable{Sandbox: path}, kernel.TaskTunnel{Sandbox: path, Addr: tunnelAddr}
	errs := k.Apply(t.Context(), []kernel.Op{{Key: table, Want: kernel.TaskTableSpec{}}, {Key: tunnel, Want: kernel.TaskTunnelSpec{}}})
	lacking := netnstest.Has(netnstest.IPIP)
	if errs[0] != nil || (lacking == nil) != (errs[1] == nil) || lacking != nil && !errors.Is(errs[1], kernel.ErrUnsupported) {
		t.Errorf("%v; ipip: %v", errs, lacking)
	}
	s, err := k.Dump(t.Context(), []string{path})
	if err != nil || s[table] == nil || (s[tunnel] == nil) != (lacking != nil) {
		t.Errorf("%v\n%s", err, s.Text())
	}
}

// BenchmarkDumpTasks reads 100 tasks' namespaces: their tunnels alone, with tables,
// and, where the kernel has them, with a tunnel in each.
func BenchmarkDumpTasks(b *testing.B) {
	const tasks = 100
	k, w := newHost(b, nft.Tables{})
	paths := make([]string, tasks)
	var ops []kernel.Op
	for i := range paths {
		paths[i] = filepath.Join(w.dir, fmt.Sprintf("task%d", i))
		if err := os.WriteFile(paths[i], nil, 0o444); err != nil {
			b.Fatal(err)
		}
		if err := unix.Mount(netnstest.New(b).Path(), paths[i], "none", unix.MS_BIND, ""); err != nil {
			b.Fatal(err)
		}
		ops = append(ops, kernel.Op{Key: kernel.TaskTunnel{Sandbox: paths[i], Addr: tunnelAddr}, Want: kernel.TaskTunnelSpec{}})
	}
	dump := func(name string, tables Tables) {
		b.Run(name, func(b *testing.B) {
			k.cfg.Tables = tables
			for b.Loop() {
				if err := k.dumpTasks(b.Context(), paths, kernel.State{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	dump("no tunnels", nil)
	dump("tables, no tunnels", nft.Tables{})
	if netnstest.Has(netnstest.IPIP) == nil {
		if err := errors.Join(k.Apply(b.Context(), ops)...); err != nil {
			b.Fatal(err)
		}
		dump("tunnels", nil)
	}
}
