package managers

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/test/cluster"
	"sluice/test/image"
)

// TestEveryAddressHasOneOwner, 60 s: after services have come, gone, been scaled and
// updated, and the lead has moved, the leader has leased what the swarm has and
// nothing else, and no manager sees an address twice. A lease that nobody has is told
// of, and an address that somebody has and nobody leased is leased.
func TestEveryAddressHasOneOwner(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	docker := func(args ...string) string {
		t.Helper()
		out, err := lab.Host(2).Docker(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	running := func(service string, n int) []cluster.Task {
		t.Helper()
		var tasks []cluster.Task
		// On a busy machine the swarm takes a node for lost while the lead moves, and
		// replaces its tasks, which run still.
		err := cluster.Wait(ctx, service+" runs, and none of its tasks is to leave", func(ctx context.Context) (err error) {
			if tasks, err = lab.WaitService(ctx, service, n); err == nil && slices.ContainsFunc(tasks, func(x cluster.Task) bool { return x.Leaving }) {
				err = fmt.Errorf("%+v", tasks)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return tasks
	}
	create := func(name string, replicas int) {
		t.Helper()
		docker("service", "create", "-d", "--no-resolve-image", "--name", name, "--network", "owned",
			"--replicas", fmt.Sprint(replicas), "--stop-grace-period", "1s", image.Probe)
	}
	for _, h := range lab.Hosts() {
		placeCommand(t, h)
	}
	const subnet = "10.77.1.0/24"
	docker("network", "create", "-d", plugin, "--ipam-driver", plugin, "--attachable", "--subnet", subnet, "owned")
	create("o1", 4)
	create("o2", 3)
	create("o3", 2)
	running("o1", 4)
	running("o3", 2)
	docker("run", "-d", "--network", "owned", image.Probe)
	docker("service", "scale", "-d", "o1=7")
	running("o1", 7)
	docker("service", "update", "-d", "--force", "--update-parallelism", "0", "o2")
	docker("service", "scale", "-d", "o1=2")
	docker("service", "rm", "o3")

	old := leads(ctx, t)
	other := old%3 + 1
	// By another manager: what it is asked may come between two changes of the swarm's
	// own ("update out of sequence").
	byOther := func(args ...string) {
		t.Helper()
		err := cluster.Wait(ctx, strings.Join(args, " "), func(ctx context.Context) error {
			_, err := lab.Host(other).Docker(ctx, args...)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	byOther("node", "demote", lab.Host(old).Name())
	// The others elect one; then the third manager is back, with the leases of its time.
	var leader int
	err := cluster.Wait(ctx, "another manager leads", func(context.Context) error {
		if leader = leads(ctx, t); leader == 0 || leader == old {
			return fmt.Errorf("leader: %d", leader)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	byOther("service", "scale", "-d", "o2=5")
	if err := lab.Host(old).WaitWorker(ctx); err != nil {
		t.Fatal(err)
	}
	byOther("node", "promote", lab.Host(old).Name())
	o1, o2 := running("o1", 2), running("o2", 5)

	// The gateway, two virtual IPs, the tasks, and the container of docker run.
	want := 1 + 2 + len(o1) + len(o2) + 1
	for i := range lab.Hosts() {
		is(ctx, t, i+1, "the addresses that the swarm has", func(p diag.IPAMPool, problems []diag.Problem) error {
			state := "listed"
			if leads(ctx, t) == i+1 {
				state = "used"
			}
			for _, a := range p.Addresses {
				if a.State != state || a.Owner == "" {
					return fmt.Errorf("%+v", a)
				}
			}
			if p.Used != want || len(p.Addresses) != want || p.Leaked+p.Double+len(problems) > 0 {
				return fmt.Errorf("want %d addresses: %+v, %+v", want, p, problems)
			}
			return nil
		})
	}

	// As the engine would call the plugin: an address for nobody, and the release of one
	// that a task has.
	id := "sluice-global/" + subnet
	var lost struct{ Address string }
	if leader = leads(ctx, t); leader == 0 { // a manager that comes back may cost the lead
		t.Fatal("nobody leads")
	}
	call(ctx, t, leader, "IpamDriver.RequestAddress", map[string]any{"PoolID": id, "Options": map[string]string{"com.docker.network.ipam.serial": "true"}}, &lost)
	given, err := netip.ParsePrefix(lost.Address)
	if err != nil {
		t.Fatal(err)
	}
	had := o1[0].Addrs["owned"].String()
	call(ctx, t, leader, "IpamDriver.ReleaseAddress", map[string]any{"PoolID": id, "Address": had}, &struct{}{})
	state := func(p diag.IPAMPool, addr string) string {
		i := slices.IndexFunc(p.Addresses, func(a diag.IPAMAddress) bool { return a.Address == addr })
		if i < 0 {
			return "free"
		}
		return p.Addresses[i].State
	}
	is(ctx, t, leader, "the released address leased again", func(p diag.IPAMPool, _ []diag.Problem) error {
		if s := state(p, had); s != "used" {
			return fmt.Errorf("%s; host %d leads", s, leads(ctx, t))
		}
		return nil
	})
	is(ctx, t, leader, "the leak", func(p diag.IPAMPool, problems []diag.Problem) error {
		if s := state(p, given.Addr().String()); s != "leaked" || p.Leaked != 1 || p.Used != want || len(problems) != 1 {
			return fmt.Errorf("%s: %+v", s, problems)
		}
		return nil
	})
	out, err := command(ctx, leader, "status")
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, given.Addr().String()) {
		t.Errorf("status does not tell of the leak: %v\n%s", err, out)
	}
	call(ctx, t, leader, "IpamDriver.ReleaseAddress", map[string]any{"PoolID": id, "Address": given.Addr().String()}, &struct{}{})
	is(ctx, t, leader, "no leak", func(p diag.IPAMPool, problems []diag.Problem) error {
		if p.Used != want || p.Leaked+len(problems) > 0 {
			return fmt.Errorf("%+v", problems)
		}
		return nil
	})
}

// TestANetworkMadeAnewByAnotherLeader: one manager had it in its lead, and has heard
// nothing of its end when it leads again.
func TestANetworkMadeAnewByAnotherLeader(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	by := func(i int, args ...string) {
		t.Helper()
		// What is asked may come between two changes of the swarm's own.
		err := cluster.Wait(ctx, strings.Join(args, " "), func(ctx context.Context) error {
			_, err := lab.Host(i).Docker(ctx, args...)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	// lead moves the lead to a manager: those that lead before it are workers meanwhile.
	lead := func(want func(i int) bool) int {
		t.Helper()
		var was []int
		for {
			var i int
			err := cluster.Wait(ctx, "a manager leads", func(context.Context) error {
				if i = leads(ctx, t); i == 0 || slices.Contains(was, i) {
					return fmt.Errorf("leader: %d, after %v", i, was)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if want(i) {
				for _, w := range was {
					if err := lab.Host(w).WaitWorker(ctx); err != nil {
						t.Fatal(err)
					}
					by(i, "node", "promote", lab.Host(w).Name())
				}
				return i
			}
			other := i%3 + 1
			if slices.Contains(was, other) {
				other = other%3 + 1
			}
			by(other, "node", "demote", lab.Host(i).Name())
			was = append(was, i)
		}
	}
	create := func(i, replicas int) {
		t.Helper()
		by(i, "network", "create", "-d", plugin, "--ipam-driver", plugin, "--subnet", "10.77.2.0/24", "-o", "sluice.vni=7702", "anew")
		by(i, "service", "create", "-d", "--no-resolve-image", "--name", "anew", "--network", "anew",
			"--replicas", fmt.Sprint(replicas), "--stop-grace-period", "1s", image.Probe)
		if _, err := lab.Host(i).WaitService(ctx, "anew", replicas); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(i int) {
		t.Helper()
		by(i, "service", "rm", "anew")
		if err := lab.RemoveNetwork(ctx, "anew"); err != nil {
			t.Fatal(err)
		}
	}
	first := lead(func(int) bool { return true })
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		err := cluster.Wait(ctx, "all are managers again, and nothing is left", func(ctx context.Context) error {
			h := lab.Host(cmp.Or(leads(ctx, t), first))
			if _, err := h.Docker(ctx, "node", "promote", "m1", "m2", "m3"); err != nil {
				return err
			}
			if _, err := h.Docker(ctx, "service", "rm", "anew"); err != nil && !strings.Contains(err.Error(), "not found") {
				return err
			}
			return lab.RemoveNetwork(ctx, "anew")
		})
		if err != nil {
			t.Error(err)
		}
	})
	create(first, 2)
	second := lead(func(i int) bool { return i != first })
	remove(second)
	removed := time.Now()
	create(second, 3)
	lead(func(i int) bool { return i == first })
	t.Logf("the lead came back after %s; what has ended is found by the managers' lists after a minute", time.Since(removed).Round(time.Second))
	by(first, "service", "scale", "-d", "anew=5")
	tasks, err := lab.Host(first).WaitService(ctx, "anew", 5)
	if err != nil {
		t.Fatal(err)
	}
	has := make(map[netip.Addr]string)
	for _, task := range tasks {
		if other := has[task.Addrs["anew"]]; other != "" {
			t.Errorf("%s is the address of %s and of %s", task.Addrs["anew"], other, task.ID)
		}
		has[task.Addrs["anew"]] = task.ID
	}
}

// leads is the number of the host that leads the swarm by the word of those that are
// managers; 0: none does.
func leads(ctx context.Context, t *testing.T) int {
	t.Helper()
	for _, h := range lab.Hosts() {
		out, err := h.Docker(ctx, "node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
		if err != nil {
			continue // a worker now, or without a leader
		}
		for i, l := range lab.Hosts() {
			if slices.Contains(strings.Split(strings.TrimSpace(out), "\n"), l.Name()+" Leader") {
				return i + 1
			}
		}
	}
	return 0
}

// placeCommand puts the command sluice where the host finds it.
func placeCommand(t *testing.T, h *cluster.Host) {
	t.Helper()
	b, err := os.ReadFile("../../../build/sluice")
	if err == nil {
		err = os.WriteFile(filepath.Join(h.Dir(), "sluice"), b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// command runs sluice on host i.
func command(ctx context.Context, i int, args ...string) (string, error) {
	cmd := lab.Host(i).Command(ctx, append([]string{filepath.Join(lab.Host(i).Dir(), "sluice")}, args...)...)
	out, err := cmd.Output()
	return string(out), err
}

// is waits until what host i answers about the network passes.
func is(ctx context.Context, t *testing.T, i int, what string, check func(diag.IPAMPool, []diag.Problem) error) {
	t.Helper()
	err := cluster.Wait(ctx, fmt.Sprintf("host %d tells of %s", i, what), func(ctx context.Context) error {
		out, err := command(ctx, i, "--json", "ipam")
		var a diag.IPAM
		if jerr := json.Unmarshal([]byte(out), &a); jerr != nil {
			return fmt.Errorf("%w: %q: %w", jerr, out, err)
		}
		if bad := err != nil; bad != (len(a.Problems) > 0) {
			t.Errorf("verdict %v with problems %+v", err, a.Problems)
		}
		n := slices.IndexFunc(a.Pools, func(p diag.IPAMPool) bool { return p.Network == "owned" })
		if n < 0 {
			return fmt.Errorf("no such network: %s", out)
		}
		return check(a.Pools[n], a.Problems)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// call makes a call of the engine to the plugin of host i, by the plugin's own socket.
func call(ctx context.Context, t *testing.T, i int, method string, in, out any) {
	t.Helper()
	h := lab.Host(i)
	id, err := h.Docker(ctx, "plugin", "inspect", "-f", "{{.Id}}", plugin)
	if err != nil {
		t.Fatal(err)
	}
	// By a descriptor, as the path is longer than that of a socket may be.
	dir, err := os.Open(filepath.Join("/proc", strconv.Itoa(h.PID()), "root/run/docker/plugins", strings.TrimSpace(id)))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/sluice.sock", dir.Fd()))
	}}}
	body, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/"+method, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err == nil {
		err = json.Unmarshal(raw, out)
	}
	if err != nil {
		t.Fatalf("%s: %v: %s", method, err, raw)
	}
}
