package cluster_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/test/cluster"
)

// crashEnv makes the test binary the victim of TestUpAfterCrash: it starts a
// cluster in the directory given and waits to be killed.
const crashEnv = "SLUICE_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	cluster.MaybeInner()
	if dir := os.Getenv(crashEnv); dir != "" {
		os.Exit(upAndHang(dir))
	}
	os.Exit(m.Run())
}

// needHosts skips where no hosts can be made, and says what is missing.
func needHosts(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: simulated Docker hosts are namespaces and mounts")
	}
	for _, program := range []string{"dockerd", "docker", "ip", "nft", "iptables", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s: cluster.Prepare installs it", program)
		}
	}
}

// dirFor is the directory of a test's cluster. It is the same in every run, so
// that a run finds what a killed one left.
func dirFor(t *testing.T) string {
	return filepath.Join(os.TempDir(), "sluice-"+strings.ReplaceAll(strings.ToLower(t.Name()), "/", "-"))
}

func up(t *testing.T, o cluster.Options) *cluster.Cluster {
	t.Helper()
	needHosts(t)
	o.Dir = dirFor(t)
	begun := time.Now()
	c, err := cluster.Up(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d hosts up in %s", o.Hosts, time.Since(begun).Round(time.Millisecond))
	t.Cleanup(func() {
		if err := c.Down(); err != nil {
			t.Error(err)
		}
		noLeftovers(t, o.Dir)
	})
	return c
}

func noLeftovers(t *testing.T, dir string) {
	t.Helper()
	left, err := cluster.Leftovers(dir)
	if err != nil {
		t.Error(err)
	}
	for _, line := range left {
		t.Errorf("left behind: %s", line)
	}
}

// within bounds a step that has been seen to take a small part of d.
func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func snapshot(t *testing.T, h *cluster.Host) cluster.Snapshot {
	t.Helper()
	s, err := h.Snapshot(t.Context())
	must(t, err)
	return s
}

func wantSame(t *testing.T, before, after cluster.Snapshot) {
	t.Helper()
	if diff := before.Diff(after); len(diff) > 0 {
		t.Errorf("the host's state differs:\n%s", strings.Join(diff, "\n"))
	}
}

func TestHostsAreSeparateMachinesThatReachEachOther(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 3, Prefix: "sep"})
	ctx := within(t, 30*time.Second)
	ids := map[string]bool{}
	for _, h := range c.Hosts() {
		name, err := h.Docker(ctx, "info", "--format", "{{.Name}} {{.ID}}")
		must(t, err)
		if want := h.Name() + " "; !strings.HasPrefix(name, want) {
			t.Errorf("engine of %s calls itself %q, want it to begin with %q", h.Name(), name, want)
		}
		ids[name] = true
		processes, err := h.Exec(ctx, "/bin/sh", "-c", "cat /proc/[0-9]*/comm")
		must(t, err)
		if n := strings.Count(processes, "dockerd\n"); n != 1 {
			t.Errorf("%s sees %d engines, want its own:\n%s", h.Name(), n, processes)
		}
		links, err := h.Exec(ctx, "ls", "/sys/class/net")
		must(t, err)
		if got := strings.Fields(links); strings.Join(got, " ") != "docker0 eth0 lo" {
			t.Errorf("%s has links %v, want docker0 eth0 lo", h.Name(), got)
		}
		for _, peer := range c.Hosts() {
			wantReach(t, h.Name(), h.Exec, peer.Addr())
		}
	}
	if len(ids) != 3 {
		t.Errorf("engines are not three different ones: %v", ids)
	}
}

// runner runs a command somewhere.
type runner func(context.Context, ...string) (string, error)

// reach asks whether TCP reaches addr: nobody listens on the port, so a refusal
// is the answer of the host itself. 47 is reserved.
func reach(ctx context.Context, run runner, addr netip.Addr) error {
	_, err := run(ctx, "timeout", "0.5", "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/47", addr))
	if err != nil && strings.Contains(err.Error(), "Connection refused") {
		return nil
	}
	return fmt.Errorf("%s: %w", addr, err)
}

// wantReach demands that addr is reached in the end: on a busy machine a try
// may be late, and an address that did not resolve is asked for again only
// after a second.
func wantReach(t *testing.T, from string, run runner, addr netip.Addr) {
	t.Helper()
	err := cluster.Wait(within(t, 10*time.Second), fmt.Sprintf("%s reaches %s", from, addr), func(ctx context.Context) error {
		return reach(ctx, run, addr)
	})
	if err != nil {
		t.Error(err)
	}
}

func TestRegistriesAreRefusedAtOnce(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 1, Prefix: "reg"})
	begun := time.Now()
	_, err := c.Host(1).Docker(within(t, 30*time.Second), "pull", "nowhere.example/none:1")
	if err == nil {
		t.Fatal("an image came out of nowhere")
	}
	// Without the refusal it is 20 s and more.
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("the refusal took %s: %v", took, err)
	}
}

func TestPartitionStopsTwoHostsOnly(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 3, Prefix: "par", NoEngine: true})
	ctx := within(t, 30*time.Second)
	reaches := func(from, to int) {
		t.Helper()
		wantReach(t, c.Host(from).Name(), c.Host(from).Exec, c.Host(to).Addr())
	}
	cannotReach := func(from, to int) {
		t.Helper()
		if err := reach(ctx, c.Host(from).Exec, c.Host(to).Addr()); err == nil {
			t.Errorf("host %d still reaches host %d", from, to)
		}
	}
	must(t, c.Partition(ctx, 1, 2))
	must(t, c.Partition(ctx, 2, 1)) // again, from the other side
	cannotReach(1, 2)
	cannotReach(2, 1)
	reaches(1, 3)
	reaches(3, 2)
	must(t, c.Heal(ctx, 1, 2))
	reaches(1, 2)
	must(t, c.Unplug(ctx, 3))
	cannotReach(1, 3)
	reaches(1, 2)
	must(t, c.Replug(ctx, 3))
	reaches(1, 3)
}

func TestClientsFromOutside(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 1, Prefix: "out", NoEngine: true})
	ctx := within(t, 30*time.Second)
	for _, addr := range []string{"10.77.0.200", "198.51.100.7"} {
		client, err := c.Outside(ctx, netip.MustParseAddr(addr))
		must(t, err)
		wantReach(t, "client "+addr, client.Exec, c.Host(1).Addr())
		wantReach(t, "host", c.Host(1).Exec, client.Addr())
	}
}

func TestSnapshotIsEqualAfterAContainerAndANetwork(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 1, Prefix: "snap"})
	ctx := within(t, 30*time.Second)
	h := c.Host(1)
	before := snapshot(t, h)
	_, err := h.Docker(ctx, "network", "create", "one")
	must(t, err)
	diff := strings.Join(before.Diff(snapshot(t, h)), "\n")
	for _, kind := range []string{"+link br-", "+addr 172.", "+route 172.", "+iptables -A "} {
		if !strings.Contains(diff, kind) {
			t.Errorf("a new network does not show as %q in:\n%s", kind, diff)
		}
	}
	_, err = h.Exec(ctx, "ip", "netns", "add", "pinned")
	must(t, err)
	diff = strings.Join(before.Diff(snapshot(t, h)), "\n")
	for _, line := range []string{"+netns pinned", "+netns /run/netns/pinned", "+mount /run/netns/pinned nsfs", "+link in /run/netns/pinned lo"} {
		if !strings.Contains(diff, line) {
			t.Errorf("a pinned namespace does not show as %q in:\n%s", line, diff)
		}
	}
	_, err = h.Exec(ctx, "nft", "add table inet sluicetest { chain c { counter; } ; }")
	must(t, err)
	if diff := strings.Join(before.Diff(snapshot(t, h)), "\n"); !strings.Contains(diff, "+nft table inet sluicetest") {
		t.Errorf("a new table does not show in:\n%s", diff)
	}
	_, err = h.Exec(ctx, "/bin/sh", "-c", "nft delete table inet sluicetest; ip netns del pinned; umount /run/netns")
	must(t, err)
	_, err = h.Docker(ctx, "network", "rm", "one")
	must(t, err)
	wantSame(t, before, snapshot(t, h))
}

func TestEngineKilledAndStartedAgain(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 1, Prefix: "kill"})
	ctx := within(t, 30*time.Second)
	h := c.Host(1)
	_, err := h.Docker(ctx, "volume", "create", "keepsake")
	must(t, err)
	before := snapshot(t, h)
	must(t, h.KillEngine(ctx))
	if _, err := h.Docker(ctx, "info"); err == nil {
		t.Error("a killed engine still answers")
	}
	if err := h.StopEngine(ctx); !errors.Is(err, cluster.ErrNoEngine) {
		t.Errorf("stop of a killed engine: %v, want ErrNoEngine", err)
	}
	must(t, h.StartEngine(ctx))
	must(t, h.StartEngine(ctx)) // running already
	_, err = h.Docker(ctx, "volume", "inspect", "keepsake")
	must(t, err)
	must(t, h.StopEngine(ctx))
	must(t, h.StartEngine(ctx))
	wantSame(t, before, snapshot(t, h))
}

func TestRebootKeepsTheDiskOnly(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 1, Prefix: "boot"})
	ctx := within(t, 30*time.Second)
	h := c.Host(1)
	_, err := h.Docker(ctx, "volume", "create", "keepsake")
	must(t, err)
	before := snapshot(t, h)
	_, err = h.Exec(ctx, "/bin/sh", "-c", "ip link add lost type bridge; nft add table ip lost; ip netns add lost; touch /run/lost; sleep 1000 >/dev/null 2>&1 &")
	must(t, err)
	must(t, h.Reboot(ctx))
	wantSame(t, before, snapshot(t, h))
	if _, err := h.Exec(ctx, "test", "!", "-e", "/run/lost"); err != nil {
		t.Errorf("a file of /run outlived the reboot: %v", err)
	}
	processes, err := h.Exec(ctx, "/bin/sh", "-c", "cat /proc/[0-9]*/comm")
	must(t, err)
	if strings.Contains(processes, "sleep") {
		t.Errorf("a process outlived the reboot:\n%s", processes)
	}
	_, err = h.Docker(ctx, "volume", "inspect", "keepsake")
	must(t, err)
}

func TestClustersAtTheSameTime(t *testing.T) {
	for _, prefix := range []string{"left", "right"} {
		t.Run(prefix, func(t *testing.T) {
			t.Parallel()
			c := up(t, cluster.Options{Hosts: 2, Prefix: prefix})
			must(t, c.Swarm(within(t, 30*time.Second), 2))
		})
	}
}

func TestDirectoryInUseIsRefused(t *testing.T) {
	c := up(t, cluster.Options{Hosts: 1, Prefix: "use", NoEngine: true})
	_, err := cluster.Up(t.Context(), cluster.Options{Hosts: 1, Dir: c.Dir()})
	if err == nil || !strings.Contains(err.Error(), "belongs to a cluster of another running process") {
		t.Errorf("second cluster in %s: %v, want a refusal", c.Dir(), err)
	}
	if err := cluster.Remove(t.Context(), c.Dir()); err == nil {
		t.Error("a cluster in use was removed")
	}
	if _, err := c.Host(1).Exec(t.Context(), "true"); err != nil {
		t.Errorf("the first cluster suffered: %v", err)
	}
}

func TestFailedUpLeavesNothing(t *testing.T) {
	needHosts(t)
	dir := dirFor(t)
	_, err := cluster.Up(within(t, 30*time.Second), cluster.Options{Hosts: 2, Dir: dir, Prefix: "bad", EngineArgs: []string{"--no-such-flag"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-flag") {
		t.Errorf("error %v, want the engine's own words about --no-such-flag", err)
	}
	noLeftovers(t, dir)
}

// upAndHang is the victim's life; it says "up" when there is something to lose.
func upAndHang(dir string) int {
	if _, err := cluster.Up(context.Background(), cluster.Options{Hosts: 2, Dir: dir, Prefix: "crash"}); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("up")
	select {}
}

// crash starts a cluster in dir in another process and kills that with SIGKILL.
func crash(t *testing.T, dir string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), crashEnv+"="+dir)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "up\n" {
		t.Fatalf("the victim says %q, %v", line, err)
	}
	must(t, cmd.Process.Kill())
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if left, err := cluster.Leftovers(dir); err != nil || len(left) == 0 {
		t.Fatalf("the crash left %v, %v: nothing to test with", left, err)
	}
}

func TestUpAfterCrash(t *testing.T) {
	needHosts(t)
	crash(t, dirFor(t))
	c := up(t, cluster.Options{Hosts: 1, Prefix: "crash"})
	left, err := c.Leftovers()
	must(t, err)
	var processes []string
	for _, line := range left {
		if strings.HasPrefix(line, "process") {
			processes = append(processes, line)
		}
	}
	if len(processes) != 2 {
		t.Errorf("holders are %v, want the new underlay and host alone", processes)
	}
}

func TestRemoveAfterCrash(t *testing.T) {
	needHosts(t)
	dir := dirFor(t)
	crash(t, dir)
	must(t, cluster.Remove(t.Context(), dir))
	noLeftovers(t, dir)
	must(t, cluster.Remove(t.Context(), dir)) // nothing there any more
}

func TestOptionsAreChecked(t *testing.T) {
	for _, row := range []struct {
		name string
		o    cluster.Options
		want string
	}{
		{"no hosts", cluster.Options{}, "1 to 150"},
		{"too many hosts", cluster.Options{Hosts: 151}, "1 to 150"},
		{"prefix", cluster.Options{Hosts: 1, Prefix: "a b"}, `prefix "a b"`},
		{"hidden directory", cluster.Options{Hosts: 1, Dir: "/run/x"}, "a /run of their own"},
		{"long directory", cluster.Options{Hosts: 1, Dir: "/tmp/" + strings.Repeat("x", 100)}, "shorter directory"},
		{"empty tree", cluster.Options{Hosts: 1, Dir: "/tmp/x", Engine: t.TempDir()}, "cluster.EngineTree"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, err := cluster.Up(t.Context(), row.o); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("error %v, want one with %q", err, row.want)
			}
		})
	}
}
