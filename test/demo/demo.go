package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/internal/model"
	"sluice/test/cluster"
	"sluice/test/image"
)

const (
	network  = "demo"
	service  = "web"
	replicas = 3
	hosts    = 3
	// tries per container: enough that a balancer that takes turns reaches
	// every replica twice.
	tries = 2 * replicas
	// startLimit bounds the wait for tasks and for the first answer; both have
	// been seen in 1 to 3 s.
	startLimit = 60 * time.Second
	// published is a port of every host, which leads to the replicas.
	published = 81
)

// outside is the address of a machine that is no Docker host, on the hosts' network.
var outside = netip.AddrFrom4([4]byte{10, 77, 0, 200})

// demo tells the story from the first host to the last.
func demo(ctx context.Context, c config, out io.Writer) (err error) {
	s := &story{out: out, begun: time.Now()}
	if err := present(c); err != nil {
		return err
	}
	if err := cluster.Prepare(ctx, out); err != nil {
		return err
	}
	tree := ""
	if c.engine != "" {
		if tree, err = cluster.EngineTree(ctx, c.engine, out); err != nil {
			return err
		}
	}
	images, cleanup, err := buildImages(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()

	s.chapter("%d Docker hosts on this machine, each with its own network, processes and engine", hosts)
	cl, err := cluster.Up(ctx, cluster.Options{Hosts: hosts, Dir: c.dir, Engine: tree})
	if err != nil {
		return err
	}
	defer func() {
		if c.keep {
			lookAround(s, c, cl)
			err = errors.Join(err, cl.Release())
			return
		}
		s.chapter("everything is taken down")
		gone := errors.Join(cl.Down(), nothingLeft(c.dir))
		if gone == nil {
			s.say("no process, mount or cgroup is left, and %s is gone", c.dir)
		}
		err = errors.Join(err, gone)
	}()
	for _, h := range cl.Hosts() {
		version, err := h.Docker(ctx, "version", "--format", "{{.Server.Version}}")
		if err != nil {
			return err
		}
		s.say("%s %s Docker %s", h.Name(), h.Addr(), version)
	}
	if err := install(ctx, s, c, cl, images); err != nil {
		return err
	}
	if err := deploy(ctx, s, c, cl); err != nil {
		return err
	}
	return ask(ctx, s, c, cl, filepath.Join(filepath.Dir(images), "probe"))
}

// present checks that the parts of the plugin are there before anything starts.
func present(c config) error {
	if c.driver == overlay {
		return nil
	}
	for _, path := range []string{filepath.Join(c.plugin, "config.json"), filepath.Join(c.plugin, "rootfs")} {
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("no plugin in %s (%w): run make build first", c.plugin, err)
		}
	}
	return nil
}

func buildImages(ctx context.Context) (path string, cleanup func() error, err error) {
	dir, err := os.MkdirTemp("", "sluice-demo-images-")
	if err != nil {
		return "", nil, err
	}
	cleanup = func() error { return os.RemoveAll(dir) }
	if path, err = image.Build(ctx, dir); err != nil {
		return "", nil, errors.Join(err, cleanup())
	}
	return path, cleanup, nil
}

// install brings plugin and image to all hosts, and forms the swarm after: the
// scheduler then knows at once that every node has the plugin.
func install(ctx context.Context, s *story, c config, cl *cluster.Cluster, images string) error {
	if c.driver != overlay {
		s.chapter("sluice is installed on each of them")
		begun := time.Now()
		if err := cl.InstallPlugin(ctx, c.driver, c.plugin); err != nil {
			return err
		}
		s.command("each", "docker plugin create "+c.driver+" "+c.plugin, "")
		s.command("each", "docker plugin enable "+c.driver, "")
		s.say("took %.1f s", time.Since(begun).Seconds())
	}
	s.chapter("the hosts form a swarm")
	if err := cl.LoadImages(ctx, images); err != nil {
		return err
	}
	if err := cl.Swarm(ctx, 1); err != nil {
		return err
	}
	_, err := s.docker(ctx, cl.Host(1), "node", "ls", "--format", "table {{.Hostname}}\t{{.Status}}\t{{.ManagerStatus}}\t{{.EngineVersion}}")
	return err
}

// deploy makes the network and the service.
func deploy(ctx context.Context, s *story, c config, cl *cluster.Cluster) error {
	h := cl.Host(1)
	s.chapter("a network, and a service of %d replicas in it", replicas)
	create := []string{"network", "create", "--driver", c.driver}
	if c.driver != overlay {
		create = append(create, "--ipam-driver", c.driver)
	}
	if _, err := s.docker(ctx, h, append(create, "--attachable", network)...); err != nil {
		return err
	}
	on := network
	if c.driver != overlay {
		on = fmt.Sprintf("name=%s,driver-opt=sluice.publish=%d:80", network, published)
	}
	_, err := s.docker(ctx, h, "service", "create", "--detach", "--no-resolve-image", "--name", service,
		// Names that say in each answer which replica gave it, and where.
		"--hostname", service+"-{{.Task.Slot}}-on-{{.Node.Hostname}}",
		"--replicas", fmt.Sprint(replicas), "--network", on, image.Probe)
	if err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	if _, err := cl.WaitService(wctx, service, replicas); err != nil {
		return err
	}
	// A client that is no task: any container may use the network.
	_, err = s.docker(ctx, cl.Host(hosts), "run", "--detach", "--name", "client", "--network", network, image.Probe)
	return err
}

// caller is a container that asks the service.
type caller struct {
	name string
	host *cluster.Host
	id   string
}

// ask lets every container of the network ask the service, and a machine outside its
// published port, and shows the path. probe is the images' program for that machine.
func ask(ctx context.Context, s *story, c config, cl *cluster.Cluster, probe string) error {
	tasks, err := cl.WaitService(ctx, service, replicas)
	if err != nil {
		return err
	}
	vip, err := cl.VIP(ctx, service, network)
	if err != nil {
		return err
	}
	s.chapter("service %s has the virtual IP %s", service, vip)
	callers := []caller{{"client", cl.Host(hosts), "client"}}
	for i, t := range tasks {
		s.say("task %d on %s: %s", i+1, t.Host.Name(), t.Addrs[network])
		callers = append(callers, caller{fmt.Sprintf("task %d", i+1), t.Host, t.Container})
	}
	targets := []netip.Addr{vip}
	if c.driver == overlay {
		s.say("the engine's own overlay serves virtual IPs only on a kernel with ip_vs: asking the tasks' addresses")
		targets = nil
		for _, t := range tasks {
			targets = append(targets, t.Addrs[network])
		}
	}
	s.chapter("every container of the network asks %v", targets)
	var v verdicts
	for _, from := range callers {
		for _, to := range targets {
			v.check(fmt.Sprintf("%s on %s asks %s", from.name, from.host.Name(), to), s.askOnce(ctx, from, to, len(targets) == 1))
		}
	}
	s.chapter("the same by name, over HTTP and UDP")
	first := callers[0]
	for _, args := range [][]string{
		{"/probe", "dns", service},
		{"/probe", "get", "--http", service + ":80"},
		{"/probe", "get", "--udp", service + ":53"},
	} {
		if c.driver == overlay && args[1] == "get" {
			args[len(args)-1] = strings.Replace(args[len(args)-1], service, "tasks."+service, 1)
		}
		_, err := s.docker(ctx, first.host, append([]string{"exec", first.id}, args...)...)
		v.check(strings.Join(args, " "), err)
	}
	if c.driver != overlay {
		if err := s.mesh(ctx, cl, probe, &v); err != nil {
			return err
		}
		s.inspect(ctx, c, cl, &v)
		v.check("the path of one request", s.path(ctx, cl, tasks, vip))
	}
	return v.err()
}

// counts is what `probe get --summary` prints.
type counts struct {
	Tries, OK int
	Hosts     map[string]int
	Errors    map[string]int
}

// askOnce lets a container ask an address, and says who answered. A balancer is
// to let every replica have its turn.
func (s *story) askOnce(ctx context.Context, from caller, to netip.Addr, balanced bool) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	begun := time.Now()
	// The container may have joined a moment ago: wait for its first answer,
	// then count.
	err := cluster.Wait(ctx, "first answer", func(ctx context.Context) error {
		out, err := from.host.Docker(ctx, "exec", from.id, "/probe", "get", to.String())
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if err != nil {
		return err
	}
	waited := time.Since(begun)
	args := []string{"exec", from.id, "/probe", "get", "-n", fmt.Sprint(tries), "--summary"}
	if balanced {
		// A member may be kept from itself, as a load balancer must: it
		// reaches the others.
		args = append(args, "--distinct", fmt.Sprint(replicas-1))
	}
	out, err := from.host.Docker(ctx, append(args, to.String())...)
	var n counts
	if jerr := json.Unmarshal([]byte(out), &n); jerr != nil {
		return errors.Join(err, jerr)
	}
	var by []string
	for host, times := range n.Hosts {
		by = append(by, fmt.Sprintf("%s x%d", host, times))
	}
	slices.Sort(by)
	s.say("%-8s on %s -> %s: %d of %d answered, first after %d ms, by %s",
		from.name, from.host.Name(), to, n.OK, n.Tries, waited.Milliseconds(), strings.Join(by, ", "))
	return err
}

// mesh lets a machine that is no Docker host ask the published port of each host, and
// checks that the task has seen it as the client.
func (s *story) mesh(ctx context.Context, cl *cluster.Cluster, probe string, v *verdicts) error {
	s.chapter("port %d of every host, asked from %s, which is none of them", published, outside)
	client, err := cl.Outside(ctx, outside)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for _, h := range cl.Hosts() {
		at := netip.AddrPortFrom(h.Addr(), published)
		err := cluster.Wait(ctx, "an answer to "+outside.String(), func(ctx context.Context) error {
			out, err := client.Exec(ctx, probe, "get", at.String())
			var r struct{ Reply struct{ Host, Peer string } }
			if jerr := json.Unmarshal([]byte(out), &r); err != nil || jerr != nil {
				return errors.Join(err, jerr)
			}
			if !strings.HasPrefix(r.Reply.Peer, outside.String()+":") {
				return fmt.Errorf("the task sees %s", r.Reply.Peer)
			}
			s.say("%s %-15s -> %s, which sees %s", h.Name(), at, r.Reply.Host, r.Reply.Peer)
			return nil
		})
		v.check(fmt.Sprintf("%s asks %s", outside, at), err)
	}
	return nil
}

// inspect lets the sluice command say what it knows, on the client's host.
func (s *story) inspect(ctx context.Context, c config, cl *cluster.Cluster, v *verdicts) {
	s.chapter("what sluice says about it")
	path, err := filepath.Abs(c.sluice)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		s.say("(no sluice command at %s: make build makes it)", c.sluice)
		return
	}
	h := cl.Host(hosts)
	// Its help, on whichever stream, names the verbs that this version has.
	help, err := h.Command(ctx, path, "--help").CombinedOutput()
	v.check("sluice --help", err)
	for _, args := range [][]string{
		{"status"},
		{"services"},
		{"entry", "--port", fmt.Sprint(published)},
	} {
		if !strings.Contains(string(help), "\n  "+args[0]+" ") {
			s.say("(this version has no sluice %s)", args[0])
			continue
		}
		out, err := h.Exec(ctx, append([]string{path}, args...)...)
		s.command(h.Name(), "sluice "+quote(args), out)
		v.check("sluice "+strings.Join(args, " "), err)
	}
}

// path shows, in what the kernels really hold, where one request of the client
// goes: to a task on another host, because that way is the longer one.
func (s *story) path(ctx context.Context, cl *cluster.Cluster, tasks []cluster.Task, vip netip.Addr) error {
	s.chapter("the path of one request, read from the kernels")
	from := cl.Host(hosts)
	to := slices.IndexFunc(tasks, func(t cluster.Task) bool { return t.Host.Name() != from.Name() })
	if to < 0 {
		return errors.New("no task is on another host than the client")
	}
	task := tasks[to]
	id, err := from.Docker(ctx, "network", "inspect", "--format", "{{.Id}}", network)
	if err != nil {
		return err
	}
	pid, err := task.Host.Docker(ctx, "inspect", "--format", "{{.State.Pid}}", task.Container)
	if err != nil {
		return err
	}
	netns := "sluice-" + id[:12]
	mac := model.MACFor(task.Addrs[network]).String()
	for _, hop := range []struct {
		what string
		host *cluster.Host
		args []string
		keep string // the lines of the output that matter
	}{
		{"the client asks the VIP; its network's bridge answers ARP for it", from,
			[]string{"docker", "exec", "client", "/bin/ip", "neigh"}, vip.String() + " "},
		{"the balancer in the network's namespace takes the next slot: a backend's MAC", from,
			[]string{"ip", "netns", "exec", netns, "nft", "list", "map", "bridge", "sluice", "slots"}, vip.String() + " . "},
		{"that MAC is behind the VXLAN device, on " + task.Host.Name(), from,
			[]string{"ip", "netns", "exec", netns, "bridge", "fdb", "show", "dev", "vxlan0"}, mac + " dst"},
		{"the task's own namespace turns the VIP into its address; the client's stays", task.Host,
			[]string{"nsenter", "-t", pid, "-n", "nft", "list", "map", "ip", "sluice", "in"}, vip.String()},
	} {
		out, err := hop.host.Exec(ctx, hop.args...)
		if err != nil {
			return err
		}
		var lines []string
		for l := range strings.Lines(out) {
			if strings.Contains(l, hop.keep) {
				lines = append(lines, strings.TrimSpace(l))
			}
		}
		if len(lines) == 0 {
			return fmt.Errorf("%s: nothing in the output of %s:\n%s", hop.what, quote(hop.args), out)
		}
		s.say("%s:", hop.what)
		s.command(hop.host.Name(), quote(hop.args), strings.Join(lines, "\n"))
	}
	s.say("the reply goes straight back, from the VIP, by layer 2: no balancer is on its way")
	return nil
}

// nothingLeft is the last check: the machine is as it was.
func nothingLeft(dir string) error {
	left, err := cluster.Leftovers(dir)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left behind: %s", strings.Join(left, ", "))
	}
	return err
}

// lookAround says how to use what KEEP=1 leaves up.
func lookAround(s *story, c config, cl *cluster.Cluster) {
	s.chapter("the hosts stay up (KEEP=1)")
	for _, h := range cl.Hosts() {
		s.say("%s  docker -H unix://%s ps", h.Name(), h.Socket())
		s.say("    nsenter -t %d -m -u -i -n -p bash    # a shell on %s", h.PID(), h.Name())
		s.say("    %s    # its engine's log", h.LogFile())
	}
	down := "make demo-down"
	if c.dir != filepath.Join(os.TempDir(), "sluice-demo") {
		down = "go run ./test/demo -down -dir " + c.dir
	}
	s.say("take them down: %s", down)
}
