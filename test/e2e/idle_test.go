package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"sluice/internal/netnstest"
	"sluice/test/cluster"
)

// idleEnv is how long TestSilentConnectionsStay is silent, as a duration. With 2h and
// more it takes as long; unset, it is silent for a moment, and what the kernel says
// of the time that is left has to do.
const idleEnv = "SLUICE_TEST_IDLE"

// kept is how long a silent connection is to stay at least. Docker's own virtual IPs
// forget one after 15 minutes.
const kept = 2 * time.Hour

// TestSilentConnectionsStay: a connection on which nothing is said for two hours
// goes on, by virtual IP and by published port, on each data path of the kernel.
func TestSilentConnectionsStay(t *testing.T) {
	silence := 2 * time.Second
	if s := os.Getenv(idleEnv); s != "" {
		var err error
		if silence, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	paths := []string{"nft"}
	if netnstest.Has(netnstest.IPVS) == nil && wantDatapath() == "ipvs" {
		paths = append(paths, "ipvs")
	}
	ctx, cancel := context.WithTimeout(t.Context(), silence+5*patience) // in a VM, services take a minute to be there
	defer cancel()
	outside := clients(t)[1]
	// What the client does: a line at once, one after the silence, and the end.
	args := []string{"hold", "--every", silence.String(), "--for", (silence + 5*time.Second).String(), "--gap", "5s"}
	ends := make(chan error)
	var waits int
	for i, path := range paths {
		id := network(t, path, "-o", "sluice.datapath="+path)
		port := 81 + i
		service(t, path, publish(path, fmt.Sprintf("publish=%d:80", port)), 2)
		v := vip(t, path, path)
		c := client(t, 2, path)
		reaches(t, lab.Host(2), c, 2, 4, v.String())
		spreads(t, outside, port, 4, 2)
		entry := netip.AddrPortFrom(lab.Host(3).Addr(), uint16(port))
		waits += 2
		go func() {
			out, err := lab.Host(2).InContainer(ctx, c, append(append([]string{"/probe"}, args...), v.String())...)
			ends <- verdict(err, path+", virtual IP", out)
		}()
		go func() {
			out, err := outside.Exec(ctx, append(append([]string{probe()}, args...), entry.String())...)
			ends <- verdict(err, path+", published port", out)
		}()
		for host, clientOf := range map[int]string{2: "virtual IP", 3: "published port"} {
			err := cluster.Wait(within(t), path+": the connection by "+clientOf+" is remembered for long", func(ctx context.Context) error {
				left, err := longest(ctx, host, id, path)
				if err == nil && left < kept {
					err = fmt.Errorf("for %v", left)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
	}
	for range waits {
		if err := <-ends; err != nil {
			t.Error(err)
		}
	}
}

func verdict(err error, what, out string) error {
	if err != nil {
		return fmt.Errorf("%s: %w: %s", what, err, out)
	}
	return nil
}

// longest is the longest time for which the balancer of a network on a host will
// remember some connection.
func longest(ctx context.Context, host int, network, path string) (time.Duration, error) {
	show, life := []string{"nft", "list", "map", "bridge", "sluice", "tcp-flows"}, regexp.MustCompile(`expires (\S+)`)
	if path == "ipvs" {
		show, life = []string{"cat", "/proc/net/ip_vs_conn"}, regexp.MustCompile(`ESTABLISHED +(\d+)`)
	}
	out, err := inNetwork(ctx, lab.Host(host), network, show...)
	if err != nil {
		return 0, err
	}
	var most time.Duration
	for _, m := range life.FindAllStringSubmatch(out, -1) {
		text := m[1]
		if _, err := strconv.Atoi(text); err == nil {
			text += "s"
		}
		if left, err := time.ParseDuration(text); err == nil {
			most = max(most, left)
		}
	}
	if most == 0 {
		return 0, fmt.Errorf("nothing is remembered: %s", out)
	}
	return most, nil
}

// TestIdleTimeout: a connection that is silent for longer than the service allows is
// reset, one that is not goes on.
func TestIdleTimeout(t *testing.T) {
	network(t, "web")
	service(t, "s1", publish("web", "publish=81:80", "idle-timeout=2s"), 2)
	v := vip(t, "s1", "web").String()
	c := client(t, 1, "web")
	outside := clients(t)[0]
	reaches(t, lab.Host(1), c, 2, 4, v)
	spreads(t, outside, 81, 4, 2)
	entry := netip.AddrPortFrom(lab.Host(3).Addr(), 81).String()
	inside := func(ctx context.Context, args ...string) (string, error) {
		return lab.Host(1).InContainer(ctx, c, append([]string{"/probe", "hold"}, append(args, v)...)...)
	}
	byPort := func(ctx context.Context, args ...string) (string, error) {
		return outside.Exec(ctx, append([]string{probe(), "hold"}, append(args, entry)...)...)
	}
	for name, hold := range map[string]func(context.Context, ...string) (string, error){"virtual IP": inside, "published port": byPort} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			busy := make(chan error, 1)
			ctx := within(t)
			go func() {
				out, err := hold(ctx, "--every", "200ms", "--for", "8s", "--gap", "3s")
				busy <- verdict(err, "a connection in use", out)
			}()
			out, err := hold(ctx, "--every", "6s", "--for", "30s")
			if err == nil || !strings.Contains(out, "reset by peer") {
				t.Errorf("a silent connection: %v: %s", err, out)
			}
			if err := <-busy; err != nil {
				t.Error(err)
			}
		})
	}
}
