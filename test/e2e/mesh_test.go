package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"sluice/test/cluster"
)

// probe is the images' program where hosts and clients outside find it.
func probe() string { return filepath.Join(lab.Dir(), "probe") }

// outside are clients that are no nodes: one on the nodes' own network, one from
// elsewhere. They live as long as the cluster.
var outside = sync.OnceValues(func() (out []*cluster.Client, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, a := range []string{"10.77.0.200", "203.0.113.7"} {
		c, err := lab.Outside(ctx, netip.MustParseAddr(a))
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
})

func clients(t *testing.T) []*cluster.Client {
	t.Helper()
	c, err := outside()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// execer runs commands somewhere: a client outside, or a host's network.
type execer interface {
	Exec(ctx context.Context, args ...string) (string, error)
}

// askFrom makes one request with the machine's probe.
func askFrom(ctx context.Context, from execer, args ...string) (reply, error) {
	out, runErr := from.Exec(ctx, append([]string{probe(), "get"}, args...)...)
	var r reply
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("probe get %v: %w, %w: %q", args, err, runErr, out)
	}
	return r, nil
}

// onHost runs commands in a host's network with the machine's files.
type onHost struct{ *cluster.Host }

func (h onHost) Exec(ctx context.Context, args ...string) (string, error) {
	return h.ExecNet(ctx, args...)
}

// publish is the option of a network for a service that publishes ports.
func publish(network string, options ...string) string {
	var s strings.Builder
	s.WriteString("name=" + network)
	for _, o := range options {
		s.WriteString(",driver-opt=sluice." + o)
	}
	return s.String()
}

// sees waits until a request to a port of an entry is answered, and checks by whom
// and as whose the task saw it. host empty is any task.
func sees(t *testing.T, from execer, entry *cluster.Host, port int, udp bool, host string, as func(netip.Addr) bool) {
	t.Helper()
	seesAt(t, from, entry.Addr(), port, udp, host, as)
}

func seesAt(t *testing.T, from execer, entry netip.Addr, port int, udp bool, host string, as func(netip.Addr) bool) {
	t.Helper()
	args := []string{netip.AddrPortFrom(entry, uint16(port)).String()}
	if udp {
		args = append([]string{"--udp"}, args...)
	}
	err := cluster.Wait(within(t), fmt.Sprintf("%v is answered by %s", args, host), func(ctx context.Context) error {
		r, err := askFrom(ctx, from, args...)
		if err != nil {
			return err
		}
		peer, err := netip.ParseAddrPort(r.Reply.Peer)
		if !r.OK || err != nil || host != "" && r.Reply.Host != host || !as(peer.Addr()) {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func is(a netip.Addr) func(netip.Addr) bool { return func(b netip.Addr) bool { return a == b } }

// TestMesh: every node x every placement of a task x TCP and UDP x clients from the
// nodes' network and from elsewhere x source kept or not.
func TestMesh(t *testing.T) {
	id := network(t, "web", "--subnet", "10.250.0.0/20")
	from := clients(t)
	nodes := netip.MustParsePrefix("10.250.15.0/24")
	type placed struct {
		port int
		host string
		keep bool
	}
	var all []placed
	for i := 1; i <= 3; i++ {
		for _, keep := range []bool{true, false} {
			name, port, source := fmt.Sprintf("keep%d", i), 8100+i, "keep"
			if !keep {
				name, port, source = fmt.Sprintf("masq%d", i), 8200+i, "masquerade"
			}
			tasks := service(t, name, publish("web", fmt.Sprintf("publish=%d:80;%d:53/udp", port, port), "source="+source), 1,
				"--constraint", "node.hostname=="+lab.Host(i).Name())
			all = append(all, placed{port, tasks[0].Container[:12], keep})
		}
	}
	for i := 1; i <= 3; i++ {
		t.Run(fmt.Sprint("entry", i), func(t *testing.T) {
			entry := lab.Host(i)
			for _, p := range all {
				for _, udp := range []bool{false, true} {
					for _, c := range from {
						as := is(c.Addr())
						if !p.keep {
							as = nodes.Contains
						}
						sees(t, c, entry, p.port, udp, p.host, as)
					}
				}
			}
			noDiff(t, i)
		})
	}
	t.Run("a node asks itself and others", func(t *testing.T) {
		for i := 1; i <= 3; i++ {
			for j := 1; j <= 3; j++ {
				as := is(lab.Host(i).Addr())
				if i == j {
					as = nodes.Contains
				}
				for _, udp := range []bool{false, true} {
					for _, p := range []placed{all[0], all[2]} {
						sees(t, onHost{lab.Host(i)}, lab.Host(j), p.port, udp, p.host, as)
						if i == j {
							seesAt(t, onHost{lab.Host(i)}, netip.MustParseAddr("127.0.0.1"), p.port, udp, p.host, as)
						}
					}
				}
			}
		}
	})
	t.Run("ports are seen to be taken", func(t *testing.T) {
		for i := 1; i <= 3; i++ {
			out, err := lab.Host(i).ExecNet(within(t), "ss", "-Hltun")
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range all {
				if n := strings.Count(out, fmt.Sprintf("0.0.0.0:%d ", p.port)); n != 2 {
					t.Errorf("node %d: port %d is held %d times, want by TCP and UDP:\n%s", i, p.port, n, out)
				}
			}
		}
	})
	t.Run("nodes leave the network with the last port", func(t *testing.T) {
		for i := 1; i <= 3; i++ {
			removeService(t, fmt.Sprint("keep", i))
			removeService(t, fmt.Sprint("masq", i))
		}
		for _, h := range lab.Hosts() {
			err := cluster.Wait(within(t), h.Name()+" has nothing of the network", func(ctx context.Context) error {
				out, err := h.Exec(ctx, "ls", "/run/netns")
				if err == nil && strings.Contains(out, id[:12]) {
					err = fmt.Errorf("there is %s", out)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// spread gives requests from a client to all nodes, and returns how many each task
// has answered.
func spread(ctx context.Context, c *cluster.Client, port, n int, args ...string) (map[string]int, error) {
	sum := make(map[string]int)
	for _, h := range lab.Hosts() {
		full := append([]string{probe(), "get", "--summary", "-n", fmt.Sprint(n)}, args...)
		out, runErr := c.Exec(ctx, append(full, netip.AddrPortFrom(h.Addr(), uint16(port)).String())...)
		var s summary
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return nil, fmt.Errorf("%w (%v)", err, runErr)
		}
		if s.Failed > 0 {
			return nil, fmt.Errorf("by %s: %+v", h.Name(), s)
		}
		for task, k := range s.Hosts {
			sum[task] += k
		}
	}
	return sum, nil
}

func spreads(t *testing.T, c *cluster.Client, port, n, tasks int, args ...string) {
	t.Helper()
	err := cluster.Wait(within(t), fmt.Sprintf("port %d of all nodes leads to %d tasks", port, tasks), func(ctx context.Context) error {
		s, err := spread(ctx, c, port, n, args...)
		if err == nil && len(s) != tasks {
			err = fmt.Errorf("answered by %v", s)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestMeshFollowsTheService: as it is scaled, to nothing and back, and as tasks move.
func TestMeshFollowsTheService(t *testing.T) {
	network(t, "web")
	c := clients(t)[1]
	for _, mode := range []string{"vip", "dnsrr"} {
		t.Run(mode, func(t *testing.T) {
			service(t, "s1", publish("web", "publish=81:80;81:53/udp"), 3, "--endpoint-mode", mode)
			spreads(t, c, 81, 6, 3)
			spreads(t, c, 81, 6, 3, "--udp")
			for _, n := range []int{1, 0, 2} {
				docker(t, 1, "service", "scale", "-d", fmt.Sprintf("s1=%d", n))
				running(t, "s1", n)
				if n > 0 {
					spreads(t, c, 81, 6, n)
					continue
				}
				for _, h := range lab.Hosts() {
					refuses(t, c, h, 81)
					out, err := h.ExecNet(within(t), "ss", "-Hltn")
					if err != nil || !strings.Contains(out, "0.0.0.0:81 ") {
						t.Errorf("%s holds the port no more: %v\n%s", h.Name(), err, out)
					}
				}
			}
			removeService(t, "s1")
			for _, h := range lab.Hosts() {
				err := cluster.Wait(within(t), "the port is let go by "+h.Name(), func(ctx context.Context) error {
					out, err := h.ExecNet(ctx, "ss", "-Hltun")
					if err == nil && strings.Contains(out, "0.0.0.0:81 ") {
						err = fmt.Errorf("held:\n%s", out)
					}
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// refuses waits until a port of a node is refused at once.
func refuses(t *testing.T, c *cluster.Client, h *cluster.Host, port int) {
	t.Helper()
	err := cluster.Wait(within(t), fmt.Sprintf("port %d of %s refuses", port, h.Name()), func(ctx context.Context) error {
		r, err := askFrom(ctx, c, netip.AddrPortFrom(h.Addr(), uint16(port)).String())
		if err == nil && (r.OK || !strings.Contains(r.Error, "refused")) {
			err = fmt.Errorf("%+v", r)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
