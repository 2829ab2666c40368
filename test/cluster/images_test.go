package cluster_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

// TestImagesServeAndAsk runs both test images on a real engine: each way to ask
// must be answered, by the right server.
func TestImagesServeAndAsk(t *testing.T) {
	needHosts(t)
	images, err := image.Build(within(t, time.Minute), t.TempDir())
	must(t, err)
	c := up(t, cluster.Options{Hosts: 1, Prefix: "img"})
	ctx := within(t, 60*time.Second)
	must(t, c.LoadImages(ctx, images))
	h := c.Host(1)
	docker := func(args ...string) string {
		t.Helper()
		out, err := h.Docker(ctx, args...)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
	docker("network", "create", "net")
	docker("run", "--detach", "--name", "any", "--hostname", "any", "--network", "net",
		"--health-cmd", "/probe health", "--health-interval", "100ms", image.Probe)
	docker("run", "--detach", "--name", "own", "--hostname", "own", "--network", "net", image.Probe,
		"serve", "--tcp", "80,81", "--udp", "53", "--bind", "own", "--delay-ready", "1h")
	docker("run", "--detach", "--name", "web", "--hostname", "web", "--network", "net", image.Web)
	for _, row := range []struct{ name, command, says string }{
		{"tcp", "get any", `"host":"any"`},
		{"second port, own address", "get own:81", `"host":"own"`},
		{"not ready", "get own", `"ready":false`},
		{"udp", "get --udp any", `"host":"any"`},
		{"udp, own address", "get --udp own", `"host":"own"`},
		{"http", "get --http any", `"proto":"http"`},
		{"a real server", "get --http --path /cgi-bin/who web", `"host":"web"`},
		{"a real page", "get --http web", "a web server"},
		{"ping", "get --ping web", `"proto":"icmp"`},
		{"name", "dns any", `"addrs":["172.`},
		{"source port", "get --source-port 4242 any", `:4242"`},
		{"connection", "hold --for 200ms --every 20ms any", `"gaps":0`},
	} {
		t.Run(strings.ReplaceAll(row.name, " ", "-"), func(t *testing.T) {
			if out := docker(append([]string{"exec", "any", "/probe"}, strings.Fields(row.command)...)...); !strings.Contains(out, row.says) {
				t.Errorf("probe %s: %s, want %s in it", row.command, out, row.says)
			}
		})
	}
	must(t, cluster.Wait(ctx, "the health check says healthy", func(ctx context.Context) error {
		if s := docker("inspect", "--format", "{{.State.Health.Status}}", "any"); s != "healthy" {
			return fmt.Errorf("it says %s", s)
		}
		return nil
	}))
	if out, err := h.Docker(ctx, "exec", "own", "/probe", "health"); err == nil {
		t.Errorf("a server that is not ready is healthy: %s", out)
	}
	// Ten seconds each is what the engine gives to containers that do not stop.
	begun := time.Now()
	docker("stop", "any", "own", "web")
	if took := time.Since(begun); took > 8*time.Second {
		t.Errorf("stopping took %s", took)
	}
}

func TestPrepareIsSilentWhereNothingIsMissing(t *testing.T) {
	needHosts(t)
	var out strings.Builder
	must(t, cluster.Prepare(t.Context(), &out))
	if out.Len() > 0 {
		t.Errorf("it says %q", out.String())
	}
}
