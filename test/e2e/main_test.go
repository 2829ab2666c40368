package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/internal/netnstest"
	"sluice/test/cluster"
	"sluice/test/image"
)

// Names by which the plugin and its local alias are installed.
const (
	plugin      = "sluice:latest"
	localPlugin = "sluice-local:latest"
)

// patience bounds every wait for something that takes seconds at most on an
// idle machine; ten such waits may run side by side on two cores.
const patience = 60 * time.Second

// datapathEnv says what sluice.datapath the tests' networks get: ipvs or nft. Unset
// is the plugin's own choice.
const datapathEnv = "SLUICE_TEST_DATAPATH"

// lab is the cluster that all tests share.
var lab *cluster.Cluster

// root is the module's directory.
var root string

// place copies a program to where a host finds it.
func place(h *cluster.Host, program string) (string, error) { return h.Place(program) }

// sluiceCommand is the path of the built command on a host.
func sluiceCommand(h *cluster.Host) string { return h.SluicePath() }

func TestMain(m *testing.M) {
	cluster.MaybeInner()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: end-to-end tests make network namespaces and run Docker engines, which needs root")
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	c, err := setUp(ctx)
	if err != nil {
		fmt.Println("end-to-end tests could not be set up:", err)
		return 1
	}
	lab = c
	code := m.Run()
	if err := noRaces(c); err != nil {
		fmt.Println("FAIL:", err)
		code = 1
	}
	if err := verifyNothingLeft(context.Background()); err != nil {
		fmt.Println("FAIL:", err)
		code = 1
	}
	if code != 0 {
		keepLogs(c)
	}
	if err := c.Down(); err != nil {
		fmt.Println("FAIL: take the cluster down:", err)
		code = 1
	}
	return code
}

// before is how the hosts looked with swarm and plugin, but no network of it.
var before = map[string]cluster.Snapshot{}

func setUp(ctx context.Context) (c *cluster.Cluster, err error) {
	wd, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	root = filepath.Dir(filepath.Dir(wd))
	if err := cluster.Build(ctx, root); err != nil {
		return nil, err
	}
	engine, err := cluster.TestedEngine(ctx, os.Stdout)
	if err != nil {
		return nil, err
	}
	if c, err = cluster.Up(ctx, cluster.Options{
		Hosts: 3, Prefix: "e", Dir: filepath.Join(os.TempDir(), "sluice-e2e"), Log: slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{Level: slog.LevelInfo})),
		Engine: engine,
	}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			keepLogs(c)
			c.Down()
		}
	}()
	for _, h := range c.Hosts() {
		if _, err := place(h, filepath.Join(root, "build", "sluice")); err != nil {
			return c, err
		}
	}
	if err := c.Ready(ctx, plugin, filepath.Join(root, "build", "plugin"), 1, "LOG_LEVEL=debug"); err != nil {
		return c, err
	}
	if err := useIngress(ctx, c); err != nil {
		return c, err
	}
	// The engine makes docker_gwbridge with the first network that needs it, and
	// never removes it: it is no leftover of ours.
	for _, h := range c.Hosts() {
		if before[h.Name()], err = h.SettledSnapshot(ctx); err != nil {
			return c, err
		}
	}
	return c, nil
}

// useIngress lets the engines' own mesh publish a port for a moment, where the kernel
// has what that needs: they keep some rules from then on.
func useIngress(ctx context.Context, c *cluster.Cluster) error {
	if netnstest.Has(netnstest.IPVS) != nil {
		return nil
	}
	return c.UseIngress(ctx, image.Probe)
}

// verifyNothingLeft compares every host with how it was before the first test.
func verifyNothingLeft(ctx context.Context) error {
	// A network that an engine has forgotten with its power is removed after a minute.
	ctx, cancel := context.WithTimeout(ctx, 2*patience)
	defer cancel()
	return cluster.Wait(ctx, "all hosts look as they did before the tests", func(ctx context.Context) error {
		for _, h := range lab.Hosts() {
			after, err := h.Snapshot(ctx)
			if err != nil {
				return err
			}
			diff := slices.DeleteFunc(before[h.Name()].Diff(after), cluster.EngineOwn)
			if len(diff) > 0 {
				return fmt.Errorf("host %s:\n%s", h.Name(), strings.Join(diff, "\n"))
			}
		}
		return nil
	})
}

// keepLogs copies the engines' logs to where a person can read them after the
// cluster is gone.
func keepLogs(c *cluster.Cluster) {
	dir := filepath.Join(root, "build", "e2e-logs", wantDatapath()) // those of a VM are written beside this machine's
	if err := c.KeepLogs(dir); err != nil {
		fmt.Println(err)
	}
	fmt.Println("the engines' logs are in", dir)
}

// within gives a test a context that ends with its patience.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	t.Cleanup(cancel)
	return ctx
}

// docker runs a docker command on host i and fails the test if it fails.
func docker(t *testing.T, i int, args ...string) string {
	t.Helper()
	out, err := lab.Host(i).Docker(within(t), args...)
	if err != nil {
		t.Fatalf("host %d: docker %s: %v", i, strings.Join(args, " "), err)
	}
	return out
}

// network makes a swarm network that the test's end removes.
func network(t *testing.T, name string, args ...string) string {
	t.Helper()
	full := []string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--attachable"}
	if d := os.Getenv(datapathEnv); d != "" {
		full = append(full, "-o", "sluice.datapath="+d)
	}
	full = append(append(full, args...), name)
	var id string
	var refused error
	err := cluster.Wait(within(t), "the engine makes network "+name, func(ctx context.Context) error {
		// Engine 28 keeps the name of a network that is gone for some seconds.
		if id, refused = lab.Host(1).Docker(ctx, full...); refused != nil && strings.Contains(refused.Error(), "already exists") {
			return refused
		}
		return nil
	})
	if err := cmp.Or(refused, err); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeNetwork(t, name) })
	return id
}

// removeNetwork waits until no engine has the network any more.
func removeNetwork(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := lab.RemoveNetwork(ctx, name); err != nil {
		t.Error(err)
	}
}

// notFound says whether an engine answered that something is not there.
func notFound(err error) bool { return cluster.NotFound(err) }

// service makes a service of the probe image that the test's end removes, and
// waits until its tasks run.
func service(t *testing.T, name, network string, replicas int, args ...string) []cluster.Task {
	t.Helper()
	full := []string{"service", "create", "-d", "--no-resolve-image", "--name", name, "--network", network,
		"--replicas", fmt.Sprint(replicas), "--stop-grace-period", "2s",
		// A task that does not start in time, on a machine too busy, is replaced; what
		// counts in an update is the requests.
		"--update-failure-action", "continue"}
	full = append(full, args...)
	if !strings.Contains(strings.Join(args, " "), image.Probe) {
		full = append(full, image.Probe)
	}
	docker(t, 1, full...)
	t.Cleanup(func() { removeService(t, name) })
	return running(t, name, replicas)
}

// scale asks a manager for so many tasks of a service, again while the swarm refuses: it
// changes the service itself in an update ("update out of sequence"), and may have no leader.
func scale(t *testing.T, by *cluster.Host, service string, to int) {
	t.Helper()
	must(t, cluster.Wait(within(t), fmt.Sprintf("%s is scaled to %d", service, to), func(ctx context.Context) error {
		_, err := by.Docker(ctx, "service", "scale", "-d", fmt.Sprintf("%s=%d", service, to))
		return err
	}))
}

// update changes a service, likewise, and waits until its tasks are new ones.
func update(t *testing.T, service string, args ...string) error {
	t.Helper()
	h := lab.Host(1)
	full := append(append([]string{"service", "update", "-d", "-q", "--no-resolve-image"}, args...), service)
	err := cluster.Wait(within(t), "service "+service+" can be updated", func(ctx context.Context) error {
		_, err := h.Docker(ctx, full...)
		return err
	})
	if err != nil {
		return err
	}
	// One task after the other, each of which takes a minute until it is healthy where a
	// VM is on a busy machine.
	ctx, cancel := context.WithTimeout(t.Context(), 6*patience)
	defer cancel()
	return cluster.Wait(ctx, "service "+service+" is updated", func(ctx context.Context) error {
		state, err := h.Docker(ctx, "service", "inspect", "-f", "{{with .UpdateStatus}}{{.State}}: {{.Message}}{{end}}", service)
		if err == nil && !strings.HasPrefix(state, "completed:") {
			err = fmt.Errorf("its update is %q", state)
		}
		return err
	})
}

func removeService(t *testing.T, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// A manager that just follows another leader refuses.
	err := cluster.Wait(ctx, "service "+name+" is removed", func(ctx context.Context) error {
		if _, err := lab.Host(1).Docker(ctx, "service", "rm", name); err != nil && !strings.Contains(err.Error(), "not found") {
			return err
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// running waits until exactly n tasks of a service run.
func running(t *testing.T, name string, n int) []cluster.Task {
	t.Helper()
	// A machine that stands still for a second makes a driver's call fail; Swarm's
	// allocator tries again what it could not allocate after five minutes.
	const reallocation = 5 * time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience+reallocation)
	defer cancel()
	tasks, err := lab.WaitService(ctx, name, n)
	if err != nil {
		told(t)
		t.Fatal(err)
	}
	return tasks
}

// told logs what the nodes say of themselves: what a leader has refused to allocate is
// among it for ten minutes.
func told(t *testing.T) {
	t.Helper()
	for _, h := range lab.Hosts() {
		out, err := h.Exec(within(t), sluiceCommand(h), "status")
		t.Logf("%s: %v\n%s", h.Name(), err, out)
	}
}

// vip is the service's virtual IP.
func vip(t *testing.T, name, network string) netip.Addr {
	t.Helper()
	a, err := lab.VIP(within(t), name, network)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// enough is how many requests a test under traffic must have made to have seen
// anything. It asks for hundreds; a few dozen were made in a VM on a busy machine.
const enough = 10

// summary is what `probe get --summary` prints.
type summary struct {
	Tries  int
	OK     int
	Failed int
	// Slowest is in milliseconds.
	Slowest float64 `json:"slowest_ms"`
	// Resent are connections whose first packet was sent again.
	Resent int
	Hosts  map[string]int
	Errors map[string]int
}

// lossless says whether requests were made, all were answered, and no connection's first
// packet had to be sent twice. An emulated processor may be too slow for the latter.
func (s summary) lossless() bool {
	return s.Failed == 0 && s.OK >= enough && (s.Resent == 0 || emulated())
}

// get asks an address from a container on a host; args are probe's.
func get(ctx context.Context, h *cluster.Host, container string, args ...string) (summary, error) {
	out, runErr := h.InContainer(ctx, container, append([]string{"/probe", "get", "--summary", "--timeout", waits}, args...)...)
	var s summary
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("probe get %s on %s: %w (%v)", strings.Join(args, " "), h.Name(), err, runErr)
	}
	return s, nil
}

// reaches waits until every one of n requests is answered and the answers come
// from want different hosts.
func reaches(t *testing.T, h *cluster.Host, container string, want, n int, args ...string) {
	t.Helper()
	ctx := within(t)
	full := append([]string{"-n", fmt.Sprint(n)}, args...)
	err := cluster.Wait(ctx, fmt.Sprintf("%d requests from %s reach %d tasks", n, h.Name(), want), func(ctx context.Context) error {
		s, err := get(ctx, h, container, full...)
		if err != nil {
			return err
		}
		if s.Failed > 0 || len(s.Hosts) != want {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// reply is one answer of probe serve.
type reply struct {
	OK    bool
	Error string
	Reply struct {
		Host, Local, Peer string
	}
}

// ask makes one request and returns the answer.
func ask(t *testing.T, h *cluster.Host, container string, args ...string) reply {
	t.Helper()
	out, err := h.InContainer(within(t), container, append([]string{"/probe", "get"}, args...)...)
	var r reply
	if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
		t.Fatalf("probe get %v on %s: %v, %v: %q", args, h.Name(), err, jerr, out)
	}
	return r
}

// client runs a container on a network that the test's end removes.
func client(t *testing.T, i int, network string, args ...string) string {
	t.Helper()
	full := append([]string{"run", "-d", "--network", network, "--stop-signal", "SIGKILL", "--cap-add", "NET_RAW"}, args...)
	id := docker(t, i, append(full, image.Probe)...)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := lab.Host(i).Docker(ctx, "rm", "-f", id); err != nil {
			t.Error(err)
		}
	})
	return id
}

// sluice asks the plugin on host i and decodes the answer.
func sluice(t *testing.T, i int, out any, args ...string) {
	t.Helper()
	if err := lab.Host(i).Sluice(within(t), out, args...); err != nil {
		t.Fatal(err)
	}
}
