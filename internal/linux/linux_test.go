package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/linux/nft"
	"sluice/internal/netnstest"
)

// notice waits for the next one; a test that waits longer has failed.
func notice(t *testing.T, ch <-chan struct{}) {
	t.Helper()
	select {
	case <-ch:
	case <-time.After(5 * time.Second): // thousands of times what it takes
		t.Fatal("no notice")
	}
}

// settle drains notices until some time has passed without one.
func settle(ch <-chan struct{}) {
	for {
		select {
		case <-ch:
		case <-time.After(100 * time.Millisecond): // notices of one change come within microseconds
			return
		}
	}
}

func TestWatchTellsOfWhatOthersDo(t *testing.T) {
	k, w := newHost(t, nil)
	apply(t, k, kerneltest.Example())
	ctx, cancel := context.WithCancel(t.Context())
	ch, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	settle(ch)
	task := netnstest.New(t)
	ns := netnstest.Open(t, filepath.Join(w.dir, "sluice-aaaa"))
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"the engine takes a container's end", func() { run(t, w.host, "ip link set slca1 netns %s", task.Path()) }},
		{"it comes back", func() { run(t, task, "ip link set slca1 netns %s", w.host.Path()) }},
		{"a device in our namespace is deleted", func() { run(t, ns, "ip link del slva2") }},
	} {
		t.Log(step.name)
		step.do()
		notice(t, ch)
		settle(ch)
		if told := k.Notices(); told.Empty() {
			t.Error("a notice of nothing")
		}
	}
	run(t, w.host, "ip link add stranger type bridge")
	run(t, ns, "ip link add stranger type bridge")
	run(t, w.host, "ip neigh add 192.0.2.9 dev eth0 lladdr 02:00:00:00:00:09 nud permanent")
	settle(ch)
	// The kernel may tell of the carrier of our own devices some time later.
	for key := range k.Notices().Objects {
		if text := key.String(); strings.Contains(text, "stranger") || strings.Contains(text, "eth0") {
			t.Errorf("a notice of what is nothing to us: %s", text)
		}
	}
	if _, err := k.Watch(ctx); err == nil {
		t.Error("a second watch was allowed")
	}
	cancel()
	for range ch {
	} // ends when it is closed
	if ch, err = k.Watch(t.Context()); err != nil {
		t.Errorf("watch again: %v", err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	for range ch {
	}
}

func TestWatchDoesNotKeepNamespacesAlive(t *testing.T) {
	k, w := newHost(t, nil)
	if _, err := k.Watch(t.Context()); err != nil {
		t.Fatal(err)
	}
	apply(t, k, kerneltest.Example())
	// A device whose other end is in the namespace goes with it, when it really goes.
	run(t, w.host, "ip link add probe type veth peer name probe1 netns %s", filepath.Join(w.dir, "sluice-bbbb"))
	apply(t, k, kernel.State{})
	deadline := time.Now().Add(10 * time.Second) // the kernel cleans up within some 100 ms
	for names(t, w.host)["probe"] {
		if time.Now().After(deadline) {
			t.Fatal("the namespace outlives its deletion: something holds it")
		}
	}
}

// That of a task is held by the watch no longer than the next dump says, and not longer
// than its path is there, whoever still asks for it.
func TestWatchLetsGoOfTasks(t *testing.T) {
	for _, asked := range []bool{false, true} {
		t.Run(fmt.Sprintf("still asked for: %t", asked), func(t *testing.T) { letsGo(t, asked) })
	}
}

func letsGo(t *testing.T, asked bool) {
	netnstest.Need(t, netnstest.NFTables)
	k, w := newHost(t, nft.Tables{})
	if _, err := k.Watch(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(netnstest.Dir(t), "task")
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	run(t, w.host, "unshare --net=%s true", path)
	// A device whose other end is in the namespace goes with it, when it really goes.
	run(t, w.host, "ip link add probe type veth peer name probe1 netns %s", path)
	if _, err := k.Dump(t.Context(), []string{path}); err != nil {
		t.Fatal(err)
	}
	if k.watch.subs[taskPrefix+path] == nil {
		t.Fatal("the task is not watched")
	}
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	var paths []string
	if asked {
		paths = []string{path}
	}
	if _, err := k.Dump(t.Context(), paths); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second) // the kernel cleans up within some 100 ms
	for names(t, w.host)["probe"] {
		if time.Now().After(deadline) {
			t.Fatal("the task's namespace outlives it: something holds it")
		}
	}
}

func TestNothingIsLeftAfterDeletion(t *testing.T) {
	k, w := newHost(t, nil)
	links := names(t, w.host)
	apply(t, k, kerneltest.Example())
	apply(t, k, kernel.State{})
	for n := range names(t, w.host) {
		if !links[n] {
			t.Errorf("device %s is left", n)
		}
	}
	entries, err := os.ReadDir(w.dir)
	if err != nil || len(entries) != 0 {
		t.Errorf("left in %s: %v, %v", w.dir, entries, err)
	}
	if s := run(t, w.host, "iptables -S"); strings.Contains(s, "SLUICE") {
		t.Errorf("rules are left:\n%s", s)
	}
}

func TestDescriptorsAreReleased(t *testing.T) {
	k, _ := newHost(t, nft.Tables{})
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := open()
	for range 3 {
		apply(t, k, kerneltest.Example())
		apply(t, k, kernel.State{})
	}
	if after := open(); after != before {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
}

func TestOrphanIsReportedAndDeleted(t *testing.T) {
	k, w := newHost(t, nil)
	task := netnstest.New(t)
	run(t, w.host, "ip link add slcorphan type veth peer name slvorphan netns %s", task.Path())
	if s, err := k.Dump(t.Context(), nil); err != nil || len(s) != 0 {
		t.Fatalf("a device without our alias is reported: %v, %v", s, err)
	}
	w.host.Must(func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		return c.setLink("slcorphan", 0, []*nl.RtAttr{nl.NewRtAttr(unix.IFLA_IFALIAS, []byte("sluice ep"))})
	})
	s, err := k.Dump(t.Context(), nil)
	if key := (kernel.Link{Name: "slcorphan", Kind: kernel.Veth}); err != nil || len(s) != 1 || s[key] == nil {
		t.Fatalf("dump: %v, %v; want the orphan alone", s, err)
	}
	apply(t, k, kernel.State{})
	if names(t, w.host)["slcorphan"] {
		t.Error("the orphan is still there")
	}
}

func TestHalfMadeDeviceIsReplaced(t *testing.T) {
	k, w := newHost(t, nil)
	apply(t, k, kernel.State{kernel.Netns{Name: "sluice-aaaa"}: kernel.NetnsSpec{}})
	// As after a crash between making and marking.
	ns := netnstest.Open(t, filepath.Join(w.dir, "sluice-aaaa"))
	run(t, ns, "ip link add vxlan0 type vxlan id 7 dstport 4799")
	run(t, ns, "ip link add slva1 type veth peer name slca1 netns %s", w.host.Path())
	want := kerneltest.Example()
	apply(t, k, want)
	have, err := k.Dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if ops := kernel.Diff(have, want); len(ops) != 0 {
		t.Errorf("still different: %v", ops)
	}
}

func TestPortOfAnotherProgramIsNamed(t *testing.T) {
	k, w := newHost(t, nil)
	w.host.Must(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		return unix.Bind(fd, &unix.SockaddrInet4{Port: 4799})
	})
	ops := kernel.Diff(kernel.State{}, kerneltest.Example())
	i := slices.IndexFunc(ops, func(o kernel.Op) bool { return o.Key.Phase() == kernel.PhaseVXLAN })
	err := k.Apply(t.Context(), ops)[i]
	if !errors.Is(err, kernel.ErrTaken) || !strings.Contains(err.Error(), "4799") {
		t.Errorf("%v, want %v that names the port", err, kernel.ErrTaken)
	}
	s, err := k.Dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for key := range s {
		if key.Phase() == kernel.PhaseVXLAN {
			t.Errorf("%s is left half-made", key)
		}
	}
}

func TestNamesCannotLeaveTheDirectory(t *testing.T) {
	k, _ := newHost(t, nil)
	for _, name := range []string{"sluice-/../../x", "other", "", "sluice-a/b"} {
		for _, want := range []kernel.Value{kernel.NetnsSpec{}, nil} {
			if err := k.Apply(t.Context(), []kernel.Op{{Key: kernel.Netns{Name: name}, Want: want}})[0]; err == nil {
				t.Errorf("namespace %q was accepted", name)
			}
		}
	}
}

func TestHostIsDescribed(t *testing.T) {
	k, w := newHost(t, nil)
	run(t, w.host, "ip route add 198.51.100.0/24 via 192.0.2.254")
	run(t, w.host, "ip route add default via 192.0.2.254")
	run(t, w.host, "ip route add blackhole 203.0.113.0/24")
	got, err := k.HostPrefixes()
	want := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("prefixes: %v, %v; want %v", got, err, want)
	}
	if mtu, err := k.UnderlayMTU(netip.MustParseAddr("192.0.2.1")); err != nil || mtu != netnstest.MTU {
		t.Errorf("MTU: %d, %v; want %d", mtu, err, netnstest.MTU)
	}
	if _, err := k.UnderlayMTU(netip.MustParseAddr("192.0.2.99")); !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("MTU of an address that is not the host's: %v, want %v", err, kernel.ErrNotExist)
	}
}

func TestFeaturesOfThisKernel(t *testing.T) {
	k, _ := newHost(t, nft.Tables{})
	fs, err := k.Features(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fs {
		t.Logf("%s: %v (%s)", f.Name, f.Err, f.Use)
		// newHost would have skipped the test without these.
		if f.Err != nil && slices.Contains([]string{"bridge", "veth", "vxlan", "iptables"}, f.Name) {
			t.Errorf("%s: %v", f.Name, f.Err)
		}
	}
}

func TestFilterFollowsTheEngineToLegacy(t *testing.T) {
	k, w := newHost(t, nil)
	if command("iptables-legacy") == "" || command("iptables-nft") == "" {
		t.Skip("missing: iptables-legacy and iptables-nft (the commands)")
	}
	want := kerneltest.Example()
	apply(t, k, want)
	if s := run(t, w.host, "iptables-nft -S"); !strings.Contains(s, "-N SLUICE-VXLAN") {
		t.Fatalf("without an engine the chain is not in nft:\n%s", s)
	}
	run(t, w.host, "iptables-legacy -N DOCKER-USER")
	apply(t, k, want)
	if s := run(t, w.host, "iptables-legacy -S"); !strings.Contains(s, "-N SLUICE-VXLAN") {
		t.Errorf("the chain is not where the engine's are:\n%s", s)
	}
	if s := run(t, w.host, "iptables-nft -S"); strings.Contains(s, "SLUICE") {
		t.Errorf("left in the other world:\n%s", s)
	}
	have, err := k.Dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if ops := kernel.Diff(have, want); len(ops) != 0 {
		t.Errorf("read back from legacy: %v", ops)
	}
	apply(t, k, kernel.State{})
	if s := run(t, w.host, "iptables-legacy -S"); strings.Contains(s, "SLUICE") {
		t.Errorf("left:\n%s", s)
	}
}

func TestDumpAmidChangesIsWholeOrInterrupted(t *testing.T) {
	k, w := newHost(t, nil)
	want := crowd(20, 50)
	apply(t, k, want)
	ns := netnstest.Open(t, filepath.Join(w.dir, "sluice-net"))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- ns.Do(func() error {
			c, err := dial()
			if err != nil {
				return err
			}
			defer c.close()
			for ctx.Err() == nil {
				if err := c.newLink("churn", 0, []*nl.RtAttr{kindAttr("bridge", func(*nl.RtAttr) {})}); err != nil {
					return err
				}
				d, err := c.link("churn")
				if err != nil {
					return err
				}
				if err := c.delLink(d.index); err != nil {
					return err
				}
			}
			return nil
		})
	}()
	whole := 0
	for range 50 {
		have, err := k.Dump(t.Context(), nil)
		if errors.Is(err, kernel.ErrInterrupted) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if ops := kernel.Diff(have, want); len(ops) != 0 {
			t.Fatalf("a dump without error differs: %v", ops)
		}
		whole++
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of 50 dumps were whole", whole)
}

func TestSharedDirectoryIsNotMountedOverItself(t *testing.T) {
	netnstest.Need(t, netnstest.Root)
	dir := netnstest.Dir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	mounts := func() int {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), " "+dir+" ")
	}
	if err := share(dir); err != nil {
		t.Fatal(err)
	}
	if n := mounts(); n != 1 {
		t.Errorf("%d mounts on a mount point that only had to be made shared, want 1", n)
	}
	sub := filepath.Join(dir, "netns")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := share(sub); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(b), " "+sub+" ") {
		t.Error("a directory on a shared mount was mounted over itself")
	}
}
