package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"sluice/internal/diag"
	"sluice/internal/netnstest"
	"sluice/test/cluster"
	"sluice/test/image"
)

const (
	plugin = "sluice:latest"
	hosts  = 3 // the fewest of which one may be lost and a manager still leads
	// calm is the network of what is asked all the time.
	calm = "calm"
	// spread is the service with a task for each host; the others are pinned.
	spread     = "spread"
	spreadPort = 81
	// pinnedPort and the host's number is the published port of a pinned service.
	pinnedPort = 81
	// serveGrace is how long a task that is to stop serves the connections that it
	// has: longer than they last, see holdTime. The engine waits a little longer.
	serveGrace = 2 * holdTime
	stopGrace  = serveGrace + 2*time.Second
)

// outside is a client behind the hosts' router.
var outside = netip.MustParseAddr("203.0.113.7")

// lab is the swarm, and what stands in it all the time.
type lab struct {
	cluster *cluster.Cluster
	probe   string // the images' program, for the client outside
	client  *cluster.Client
	calmID  string
	vips    map[string]netip.Addr
	before  map[string]cluster.Snapshot // of hosts, before the first network
	empty   map[string]footprint        // of their plugins, likewise
	steady  []string                    // services

	mu   sync.Mutex      // guards away
	away map[string]bool // hosts that no manager is asked on, because of a fault
}

// pinned is the service whose only task is on a host.
func pinned(h *cluster.Host) string { return "on-" + h.Name() }

// newLab makes the lab; after an error nothing is left but what logs tells.
func newLab(ctx context.Context, c config) (l *lab, err error) {
	engine, err := cluster.TestedEngine(ctx, c.out)
	if err != nil {
		return nil, err
	}
	l = &lab{probe: filepath.Join(c.dir, "probe"), vips: map[string]netip.Addr{}, before: map[string]cluster.Snapshot{}, empty: map[string]footprint{}, away: map[string]bool{}}
	if l.cluster, err = cluster.Up(ctx, cluster.Options{Hosts: hosts, Prefix: "s", Dir: c.dir, Engine: engine}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.cluster.KeepLogs(c.logs), l.cluster.Down())
		}
	}()
	for _, h := range l.cluster.Hosts() {
		if _, err := h.Place(filepath.Join(c.built, "sluice")); err != nil {
			return nil, err
		}
	}
	if err := l.cluster.Ready(ctx, plugin, filepath.Join(c.built, "plugin"), hosts, "LOG_LEVEL=debug"); err != nil {
		return nil, err
	}
	if err := l.useIngress(ctx); err != nil {
		return nil, err
	}
	// The engine makes docker_gwbridge with the first network that needs it, and
	// never removes it.
	for _, h := range l.cluster.Hosts() {
		if l.before[h.Name()], err = h.SettledSnapshot(ctx); err != nil {
			return nil, err
		}
		if l.empty[h.Name()], err = read(ctx, h); err != nil {
			return nil, err
		}
	}
	return l, l.furnish(ctx)
}

// modes are those that networks may have on this kernel.
func modes() []string {
	all := []string{"dr", "nat"}
	if netnstest.Has(netnstest.IPIP) == nil {
		all = append(all, "tun")
	}
	return all
}

// useIngress has the engines make the rules that they keep from the first port of their
// own mesh on, where the kernel has what that needs. A host without power forgets them.
func (l *lab) useIngress(ctx context.Context) error {
	if netnstest.Has(netnstest.IPVS) != nil {
		return nil
	}
	return l.cluster.UseIngress(ctx, image.Probe)
}

// furnish makes what is asked all the time, and waits until it answers.
func (l *lab) furnish(ctx context.Context) (err error) {
	if l.client, err = l.cluster.Outside(ctx, outside); err != nil {
		return err
	}
	h := l.cluster.Host(1)
	if l.calmID, err = h.Docker(ctx, networkCreate(calm)...); err != nil {
		return err
	}
	serve := func(name string, port, replicas int, args ...string) error {
		l.steady = append(l.steady, name)
		full := slices.Concat([]string{"service", "create", "-d", "--no-resolve-image", "--name", name, "--hostname", "{{.Service.Name}}-on-{{.Node.Hostname}}",
			"--network", fmt.Sprintf("name=%s,driver-opt=sluice.publish=%d:80;%d:53/udp", calm, port, port),
			"--replicas", fmt.Sprint(replicas), "--update-order", "start-first", "--update-monitor", "1s", "--health-cmd", "/probe health", "--health-interval", "1s",
			"--stop-grace-period", stopGrace.String()}, args,
			[]string{image.Probe, "serve", "--tcp", "80", "--udp", "53", "--grace", serveGrace.String()})
		if _, err := h.Docker(ctx, full...); err != nil {
			return err
		}
		return nil
	}
	if err := serve(spread, spreadPort, hosts); err != nil {
		return err
	}
	for i, on := range l.cluster.Hosts() {
		if err := serve(pinned(on), pinnedPort+i+1, 1, "--constraint", "node.hostname=="+on.Name()); err != nil {
			return err
		}
	}
	for name, n := range l.steadyTasks() {
		if _, err := h.WaitService(ctx, name, n); err != nil {
			return err
		}
		if l.vips[name], err = h.VIP(ctx, name, calm); err != nil {
			return err
		}
	}
	for _, on := range l.cluster.Hosts() {
		name := "client-" + on.Name()
		// While all begins at once, a machine that does more than this may take longer
		// for a call than sluice lets it: docker run is refused then, and tried again.
		err := cluster.Wait(ctx, name+" runs", func(ctx context.Context) error {
			_, err := on.Docker(ctx, clientRun(name, calm)...)
			if err != nil {
				_, rmErr := on.Docker(ctx, "rm", "-f", name)
				err = errors.Join(err, rmErr)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// steadyTasks is how many tasks the services have that are asked all the time.
func (l *lab) steadyTasks() map[string]int {
	n := map[string]int{}
	for _, name := range l.steady {
		n[name] = 1
	}
	n[spread] = hosts
	return n
}

func networkCreate(name string, args ...string) []string {
	return slices.Concat([]string{"network", "create", "-d", plugin, "--ipam-driver", plugin, "--attachable"}, args, []string{name})
}

func clientRun(name, network string) []string {
	return []string{"run", "-d", "--name", name, "--network", network, "--stop-signal", "SIGKILL", image.Probe}
}

// streams are all requests that are made all the time.
func (l *lab) streams() []*stream {
	var all []*stream
	var names []string
	for _, h := range l.cluster.Hosts() {
		names = append(names, h.Name())
	}
	for i, h := range l.cluster.Hosts() {
		next := l.cluster.Hosts()[(i+1)%hosts]
		inside := func(ctx context.Context, args ...string) (*exec.Cmd, error) {
			return h.ContainerCommand(ctx, "client-"+h.Name(), append([]string{"/probe"}, args...)...)
		}
		far := func(ctx context.Context, args ...string) (*exec.Cmd, error) {
			return l.client.Command(ctx, append([]string{l.probe}, args...)...), nil
		}
		by := func(kind, service string, servers ...string) {
			port := uint16(80)
			if kind == datagrams {
				port = 53
			}
			all = append(all, &stream{name: fmt.Sprintf("%s, container on %s to %s", kind, h.Name(), service), kind: kind, service: service,
				way: way{client: h.Name(), entry: h.Name(), servers: servers}, at: netip.AddrPortFrom(l.vips[service], port), command: inside})
		}
		at := func(kind, service string, port int, servers ...string) {
			all = append(all, &stream{name: fmt.Sprintf("%s, outside by %s:%d to %s", kind, h.Name(), port, service), kind: kind, service: service, peer: outside,
				way: way{entry: h.Name(), servers: servers}, at: netip.AddrPortFrom(h.Addr(), uint16(port)), command: far})
		}
		for _, kind := range []string{newConnections, keptConnections, datagrams} {
			by(kind, spread, names...)
			at(kind, spread, spreadPort, names...)
			at(kind, pinned(next), pinnedPort+(i+1)%hosts+1, next.Name())
		}
		by(newConnections, pinned(h), h.Name())
		by(newConnections, pinned(next), next.Name())
		by(keptConnections, pinned(next), next.Name())
	}
	return all
}

// setAway says whether a host is in trouble, so that others are asked for the swarm.
func (l *lab) setAway(h *cluster.Host, is bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.away[h.Name()] = is
}

// manager is a host to ask for the swarm.
func (l *lab) manager() *cluster.Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.cluster.Hosts() {
		if !l.away[h.Name()] {
			return h
		}
	}
	return l.cluster.Host(1)
}

// status asks a plugin how it is.
func status(ctx context.Context, h *cluster.Host) (diag.Status, error) {
	var st diag.Status
	err := h.Sluice(ctx, &st, "status")
	return st, err
}

// used is how many addresses of a network are given away, by the word of the leader,
// who alone knows.
func (l *lab) used(ctx context.Context, network string) (int, error) {
	nodes, err := l.manager().Nodes(ctx)
	if err != nil {
		return 0, err
	}
	for _, h := range l.cluster.Hosts() {
		if !slices.ContainsFunc(nodes, func(n cluster.Node) bool { return n.Leader && n.Name == h.Name() }) {
			continue
		}
		var ns diag.Networks
		if err := h.Sluice(ctx, &ns, "networks"); err != nil {
			return 0, err
		}
		for _, n := range ns.Networks {
			if n.Name == network && n.Used > 0 {
				return n.Used, nil
			}
		}
		return 0, fmt.Errorf("sluice networks on the leader, %s, does not tell how many addresses of %s are used: %+v", h.Name(), network, ns)
	}
	return 0, fmt.Errorf("nobody leads: %+v", nodes)
}

// healed says what is not as it should be now; nil if nothing. services are those
// that come and go, with how many tasks each should have; clients are containers by
// host, which are started where they are not.
func (l *lab) healed(ctx context.Context, services map[string]int, clients map[string][]string) error {
	m := l.manager()
	nodes, err := m.Nodes(ctx)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		if !n.Ready || !n.Manager {
			return fmt.Errorf("node %s is not ready, or no manager that others reach: %+v", n.Name, n)
		}
	}
	for _, of := range []map[string]int{l.steadyTasks(), services} {
		for name, n := range of {
			if err := m.HasTasks(ctx, name, n); err != nil {
				return err
			}
		}
	}
	for _, h := range l.cluster.Hosts() {
		for _, c := range append([]string{"client-" + h.Name()}, clients[h.Name()]...) {
			if err := started(ctx, h, c); err != nil {
				return err
			}
		}
		var d diag.Diff
		if err := h.Sluice(ctx, &d, "diff"); err != nil {
			return err
		}
		if len(d.Changes)+len(d.Problems) > 0 {
			return fmt.Errorf("sluice diff on %s: %s", h.Name(), strings.TrimSpace(d.Text()))
		}
	}
	return nil
}

// started starts a container that does not run: the engine starts none of docker run's
// after its own end.
func started(ctx context.Context, h *cluster.Host, container string) error {
	out, err := h.Docker(ctx, "inspect", "--format", "{{.State.Running}}", container)
	if err != nil || out == "true" {
		return err
	}
	_, err = h.Docker(ctx, "start", container)
	return err
}
