package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

// web asks a path of a host's health checks and metrics, from outside, and returns the
// whole answer with its head. The shell is what every machine has.
func web(ctx context.Context, c *cluster.Client, h *cluster.Host, path string) (string, error) {
	const ask = `exec 3<>"/dev/tcp/$0/9247" && printf 'GET %s HTTP/1.0\r\n\r\n' "$1" >&3 && cat <&3`
	return c.Exec(ctx, "timeout", "5", "bash", "-c", ask, h.Addr().String(), path)
}

// health waits until a host says whether it serves a port.
func health(t *testing.T, c *cluster.Client, h *cluster.Host, query string, want bool) {
	t.Helper()
	err := cluster.Wait(within(t), fmt.Sprintf("%s says %t to %s", h.Name(), want, query), func(ctx context.Context) error {
		text, err := web(ctx, c, h, "/healthz"+query)
		status, begins := " 503 ", "\nno: "
		if want {
			status, begins = " 200 ", "\nok: "
		}
		if err != nil || !strings.Contains(text, status) || !strings.Contains(text, begins) {
			return fmt.Errorf("%w: %s", err, text)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// entries asks a node for its published ports, or for one.
func entries(t *testing.T, i int, args ...string) diag.Ports {
	t.Helper()
	var p diag.Ports
	sluice(t, i, &p, append([]string{"entry"}, args...)...)
	return p
}

// TestMeshIsTold: the way of a port, who has it and who has not, by the command, by
// health checks and by metrics.
func TestMeshIsTold(t *testing.T) {
	network(t, "web")
	c := clients(t)[1]
	tasks := service(t, "older", publish("web", "publish=81:80;81:53/udp"), 2, "--constraint", "node.hostname!=e3")
	service(t, "younger", publish("web", "publish=81:80;82:80"), 1, "--constraint", "node.hostname!=e3")
	spreads(t, c, 81, 4, 2)
	spreads(t, c, 82, 2, 1)
	t.Run("the way", func(t *testing.T) {
		for i := 1; i <= 3; i++ {
			var p diag.Ports
			// Counts follow: ip_vs adds them up every 2 s.
			err := cluster.Wait(within(t), fmt.Sprintf("node %d tells of a whole way, and has counted", i), func(context.Context) error {
				p = entries(t, i, "--port", "81")
				if len(p.Ports) == 0 || p.Ports[0].State != diag.PortServed || p.Ports[0].Path == nil {
					return fmt.Errorf("%+v", p)
				}
				for _, hop := range p.Ports[0].Path.Hops {
					if strings.Contains(hop.Kernel, "not") || hop.Kernel == "" {
						return fmt.Errorf("%+v", hop)
					}
				}
				if n := p.Ports[0].Path.Traffic; n == nil || n.Connections == 0 {
					return fmt.Errorf("%+v (%s)", n, p.Ports[0].Path.Uncounted)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
				continue
			}
			x := p.Ports[0]
			if x.Service != "older" || x.Port != "81/tcp" || x.To != "80" || x.Path.Datapath != wantDatapath() || x.Path.Transit != (i == 3) || len(x.Path.Backends) != len(tasks) {
				t.Errorf("node %d: %+v, %+v", i, x, x.Path)
			}
		}
	})
	t.Run("the loser", func(t *testing.T) {
		for i := 1; i <= 3; i++ {
			p := entries(t, i)
			var lost []diag.Port
			for _, x := range p.Ports {
				if x.State == diag.PortLost {
					lost = append(lost, x)
				}
			}
			if len(p.Ports) != 4 || len(lost) != 1 || lost[0].Service != "younger" || lost[0].Owner == nil || lost[0].Owner.Name != "older" || len(p.Problems) == 0 {
				t.Errorf("node %d: %+v", i, p)
			}
			var sv diag.Services
			sluice(t, i, &sv, "services")
			var st diag.Status
			sluice(t, i, &st, "status")
			for what, ps := range map[string][]diag.Problem{"services": sv.Problems, "status": st.Problems} {
				if s := fmt.Sprint(ps); !strings.Contains(s, "81/tcp") || !strings.Contains(s, "older") {
					t.Errorf("node %d, sluice %s does not tell of the loser: %s", i, what, s)
				}
			}
			m, err := web(within(t), c, lab.Host(i), "/metrics")
			if err != nil || !strings.Contains(m, `sluice_published_port_lost{`) || !strings.Contains(m, `owner="older"`) {
				t.Errorf("node %d, metrics (%v):\n%s", i, err, m)
			}
		}
	})
	t.Run("health", func(t *testing.T) {
		for _, h := range lab.Hosts() {
			health(t, c, h, "", true)
			health(t, c, h, "?port=81", true)
			health(t, c, h, "?port=81&proto=udp", true)
			health(t, c, h, "?port=83", false)
		}
		docker(t, 1, "service", "scale", "-d", "younger=0")
		running(t, "younger", 0)
		for _, h := range lab.Hosts() {
			health(t, c, h, "?port=82", false)
		}
	})
	t.Run("a node that is drained says no and serves", func(t *testing.T) {
		drained := lab.Host(3)
		docker(t, 1, "node", "update", "--availability", "drain", drained.Name())
		defer docker(t, 1, "node", "update", "--availability", "active", drained.Name())
		health(t, c, drained, "?port=81", false)
		health(t, c, drained, "", false)
		health(t, c, lab.Host(1), "?port=81", true)
		for range 10 {
			sees(t, c, drained, 81, false, "", is(c.Addr()))
		}
		docker(t, 1, "node", "update", "--availability", "active", drained.Name())
		health(t, c, drained, "?port=81", true)
	})
}
