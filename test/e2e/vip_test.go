package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/internal/netnstest"
	"sluice/test/cluster"
	"sluice/test/image"
)

func TestVIPAnswersFromEveryContainerOnEveryNode(t *testing.T) {
	network(t, "web")
	tasks := service(t, "s1", "web", 3)
	v := vip(t, "s1", "web")
	type from struct {
		host *cluster.Host
		id   string
		self string
	}
	var clients []from
	for _, task := range tasks {
		clients = append(clients, from{task.Host, task.Container, task.Addrs["web"].String()})
	}
	for i := 1; i <= 3; i++ {
		clients = append(clients, from{host: lab.Host(i), id: client(t, i, "web")})
	}
	for _, c := range clients {
		// A member is never given itself while there are others.
		want := 3
		if c.self != "" {
			want = 2
		}
		reaches(t, c.host, c.id, want, 12, v.String())
		reaches(t, c.host, c.id, want, 12, "--udp", v.String())
		reaches(t, c.host, c.id, want, 6, "--http", v.String())
		reaches(t, c.host, c.id, want, 6, "s1")
		if s, err := get(within(t), c.host, c.id, "--ping", "-n", "3", v.String()); err != nil || s.OK != 3 {
			t.Errorf("ping from %s: %+v, %v", c.host.Name(), s, err)
		}
		for _, args := range [][]string{{v.String()}, {"--udp", v.String()}} {
			r := ask(t, c.host, c.id, args...)
			peer, err := netip.ParseAddrPort(r.Reply.Peer)
			if err != nil {
				t.Fatalf("reply %+v: %v", r, err)
			}
			own := addrOn(t, c.host, c.id, "web")
			if peer.Addr() != own {
				t.Errorf("the backend sees %s, the client is %s", peer, own)
			}
		}
	}
	t.Run("exact round robin", func(t *testing.T) {
		s, err := get(within(t), clients[3].host, clients[3].id, "-n", "30", v.String())
		if err != nil || s.Failed > 0 {
			t.Fatalf("%+v, %v", s, err)
		}
		for h, n := range s.Hosts {
			if n != 10 {
				t.Errorf("%s answered %d of 30: %v", h, n, s.Hosts)
			}
		}
	})
	t.Run("no difference between plan and kernel", func(t *testing.T) {
		for i := 1; i <= 3; i++ {
			noDiff(t, i)
		}
	})
	t.Run("status and services", func(t *testing.T) {
		var st diag.Status
		sluice(t, 2, &st, "status")
		datapath, best := wantDatapath(), "nft"
		if netnstest.Has(netnstest.IPVS) == nil {
			best = "ipvs"
		}
		if len(st.Problems) > 0 || st.Networks != 1 || len(st.Gossip.Peers) != 2 || st.Datapath != best || st.Alias != plugin {
			t.Errorf("status: %+v; want datapath %s", st, best)
		}
		var sv diag.Services
		sluice(t, 2, &sv, "services")
		if len(sv.Services) != 1 || sv.Services[0].VIP != v.String() || sv.Services[0].Name != "s1" || len(sv.Services[0].Backends) != 3 || sv.Services[0].Datapath != datapath {
			t.Errorf("services: %+v; want datapath %s", sv, datapath)
		}
		var nw diag.Networks
		sluice(t, 2, &nw, "networks")
		if len(nw.Networks) != 1 || nw.Networks[0].Name != "web" || nw.Networks[0].State != "here" {
			t.Errorf("networks: %+v", nw)
		}
	})
}

// addrOn is a container's address on a network.
func addrOn(t *testing.T, h *cluster.Host, container, network string) netip.Addr {
	t.Helper()
	out, err := h.API(within(t), "GET", "/containers/"+container+"/json", nil)
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		NetworkSettings struct {
			Networks map[string]struct{ IPAddress netip.Addr }
		}
	}
	if err := json.Unmarshal(out, &c); err != nil {
		t.Fatal(err)
	}
	return c.NetworkSettings.Networks[network].IPAddress
}

// noDiff waits until the kernel of host i has what it should.
func noDiff(t *testing.T, i int) {
	t.Helper()
	var last diag.Diff
	err := cluster.Wait(within(t), fmt.Sprintf("no difference on host %d", i), func(context.Context) error {
		last = diag.Diff{}
		sluice(t, i, &last, "diff")
		if len(last.Changes)+len(last.Problems) > 0 {
			return fmt.Errorf("%+v", last)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestZeroReplicasAreRefusedAtOnce(t *testing.T) {
	network(t, "web")
	c := client(t, 2, "web")
	service(t, "s1", "web", 1)
	v := vip(t, "s1", "web")
	reaches(t, lab.Host(2), c, 1, 3, v.String())
	docker(t, 1, "service", "scale", "-d", "s1=0")
	refused(t, 2, c, v.String())
	refused(t, 2, c, "--udp", v.String())
	docker(t, 1, "service", "scale", "-d", "s1=2")
	running(t, "s1", 2)
	reaches(t, lab.Host(2), c, 2, 6, v.String())
}

// refused waits until a request is refused, rather than lost.
func refused(t *testing.T, i int, container string, args ...string) {
	t.Helper()
	err := cluster.Wait(within(t), "requests are refused", func(ctx context.Context) error {
		s, err := get(ctx, lab.Host(i), container, append([]string{"-n", "5"}, args...)...)
		if err != nil {
			return err
		}
		n := 0
		for e, times := range s.Errors { // which name the client's port
			if strings.Contains(e, "refused") {
				n += times
			}
		}
		if n != 5 {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestScalingIsFollowedWithinASecond(t *testing.T) {
	network(t, "web")
	c := client(t, 3, "web")
	service(t, "s1", "web", 1)
	v := vip(t, "s1", "web")
	reaches(t, lab.Host(3), c, 1, 3, v.String())

	docker(t, 1, "service", "scale", "-d", "s1=6")
	running(t, "s1", 6)
	begun := time.Now()
	reaches(t, lab.Host(3), c, 6, 12, v.String())
	t.Logf("6 of 6 tasks answer %v after the manager saw the last one run", time.Since(begun).Round(time.Millisecond))

	// Down to two: no request may fail while tasks leave.
	done := make(chan summary, 1)
	go func() {
		s, err := get(within(t), lab.Host(3), c, "--for", "8s", "--every", "20ms", v.String())
		if err != nil {
			t.Error(err)
		}
		done <- s
	}()
	docker(t, 1, "service", "scale", "-d", "s1=2")
	running(t, "s1", 2)
	s := <-done
	if !s.lossless() {
		t.Errorf("requests during scale down: %+v", s)
	}
	reaches(t, lab.Host(3), c, 2, 6, v.String())
}

func TestMemberCallsItsOwnVIP(t *testing.T) {
	network(t, "web")
	alone := service(t, "s1", "web", 1)[0]
	v := vip(t, "s1", "web")
	reaches(t, alone.Host, alone.Container, 1, 5, v.String())
	reaches(t, alone.Host, alone.Container, 1, 5, "--udp", v.String())
	docker(t, 1, "service", "scale", "-d", "s1=2")
	for _, task := range running(t, "s1", 2) {
		// Its node hears of the other task a moment after the manager.
		self := task.Container[:12]
		err := cluster.Wait(within(t), "a task gets the other one, and only that", func(ctx context.Context) error {
			s, err := get(ctx, task.Host, task.Container, "-n", "6", v.String())
			if err == nil && (s.Failed > 0 || len(s.Hosts) != 1 || s.Hosts[self] > 0) {
				err = fmt.Errorf("%s: %+v", self, s)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func TestServersThatBindEitherWay(t *testing.T) {
	network(t, "web")
	c := client(t, 1, "web")
	service(t, "own", "web", 2, image.Probe, "serve", "--tcp", "80", "--udp", "53", "--bind", "own")
	service(t, "every", "web", 2, image.Probe, "serve", "--tcp", "80,8080", "--udp", "53,5353", "--bind", "any")
	service(t, "httpd", "web", 2, image.Web) // Debian's busybox httpd
	for _, name := range []string{"own", "every"} {
		v := vip(t, name, "web").String()
		reaches(t, lab.Host(1), c, 2, 6, v)
		reaches(t, lab.Host(1), c, 2, 6, "--udp", v) // the probe's socket is connected: an answer from another address is lost
	}
	v := vip(t, "every", "web").String()
	reaches(t, lab.Host(1), c, 2, 6, v+":8080")
	reaches(t, lab.Host(1), c, 2, 6, "--udp", v+":5353")
	reaches(t, lab.Host(1), c, 2, 6, "--http", "--path", "/cgi-bin/who", vip(t, "httpd", "web").String())
}

func TestOneClientPortToVIPAndToATaskDirectly(t *testing.T) {
	network(t, "web")
	c := client(t, 2, "web")
	tasks := service(t, "s1", "web", 2)
	v := vip(t, "s1", "web")
	reaches(t, lab.Host(2), c, 2, 4, v.String())
	for _, proto := range []string{"--tcp", "--udp"} {
		for range 4 {
			if r := ask(t, lab.Host(2), c, proto, "--source-port", "40001", v.String()); !r.OK {
				t.Errorf("%s to the VIP: %+v", proto, r)
			}
			for _, task := range tasks {
				if r := ask(t, lab.Host(2), c, proto, "--source-port", "40001", task.Addrs["web"].String()); !r.OK {
					t.Errorf("%s to a task directly: %+v", proto, r)
				}
			}
		}
	}
}

func TestServiceRenamedRecreatedAndSwitchedBetweenModes(t *testing.T) {
	network(t, "web")
	c := client(t, 3, "web")
	service(t, "s1", "web", 2)
	first := vip(t, "s1", "web")
	reaches(t, lab.Host(3), c, 2, 4, first.String())

	// Docker has no rename; a service of another name that takes the load, and
	// one of the same name again, are what people do.
	removeService(t, "s1")
	service(t, "s1", "web", 3)
	second := vip(t, "s1", "web")
	reaches(t, lab.Host(3), c, 3, 6, second.String())
	if first != second {
		if s, err := get(within(t), lab.Host(3), c, "-n", "2", first.String()); err != nil || s.OK > 0 {
			t.Errorf("the old VIP %s answers still: %+v, %v", first, s, err)
		}
	}

	docker(t, 1, "service", "update", "-d", "--no-resolve-image", "--endpoint-mode", "dnsrr", "s1")
	err := cluster.Wait(within(t), "VIP is gone", func(ctx context.Context) error {
		if s, err := get(ctx, lab.Host(3), c, "-n", "2", second.String()); err != nil || s.OK > 0 {
			return fmt.Errorf("%+v %v", s, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	reaches(t, lab.Host(3), c, 3, 30, "tasks.s1")
	docker(t, 1, "service", "update", "-d", "--no-resolve-image", "--endpoint-mode", "vip", "s1")
	err = cluster.Wait(within(t), "service has a VIP again", func(ctx context.Context) error {
		_, err := lab.VIP(ctx, "s1", "web")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	running(t, "s1", 3)
	reaches(t, lab.Host(3), c, 3, 6, vip(t, "s1", "web").String())
}

func TestTaskThatIsNotReadyGetsNothing(t *testing.T) {
	network(t, "web")
	c := client(t, 1, "web")
	health := []string{"--health-cmd", "/probe health", "--health-interval", "1s", "--health-retries", "60", "--health-start-period", "1ms"}
	service(t, "s1", "web", 2, append(health, image.Probe, "serve", "--tcp", "80", "--delay-ready", "2s")...)
	v := vip(t, "s1", "web").String()
	reaches(t, lab.Host(1), c, 2, 4, v)
	done := make(chan summary, 1)
	go func() {
		s, err := get(within(t), lab.Host(1), c, "--http", "--path", "/health", "--for", "12s", "--every", "10ms", v)
		if err != nil {
			t.Error(err)
		}
		done <- s
	}()
	docker(t, 1, "service", "scale", "-d", "s1=4")
	running(t, "s1", 4)
	s := <-done
	if !s.lossless() {
		t.Errorf("a task that was not ready was asked, or none answered: %+v", s)
	}
	reaches(t, lab.Host(1), c, 4, 8, v)
}

func TestRollingUpdateIsFollowed(t *testing.T) {
	network(t, "web")
	c := client(t, 2, "web")
	service(t, "s1", "web", 3, "--update-order", "start-first", "--update-parallelism", "1")
	v := vip(t, "s1", "web").String()
	reaches(t, lab.Host(2), c, 3, 6, v)
	done := make(chan summary, 1)
	go func() {
		s, err := get(within(t), lab.Host(2), c, "--for", "15s", "--every", "20ms", v)
		if err != nil {
			t.Error(err)
		}
		done <- s
	}()
	docker(t, 1, "service", "update", "--force", "--no-resolve-image", "-q", "s1")
	s := <-done
	t.Logf("during a rolling update: %+v", s)
	if s.Failed > 0 {
		t.Errorf("requests failed: %+v", s)
	}
	running(t, "s1", 3)
	reaches(t, lab.Host(2), c, 3, 6, v)
}

func TestTwoNetworksAndNames(t *testing.T) {
	network(t, "front")
	network(t, "back", "--subnet", "10.99.0.0/24")
	service(t, "s1", "front", 2, "--network", "back")
	f, b := client(t, 2, "front"), client(t, 3, "back")
	reaches(t, lab.Host(2), f, 2, 4, vip(t, "s1", "front").String())
	reaches(t, lab.Host(3), b, 2, 4, vip(t, "s1", "back").String())
	reaches(t, lab.Host(2), f, 2, 4, "s1")
	reaches(t, lab.Host(3), b, 2, 4, "s1")
	reaches(t, lab.Host(3), b, 2, 30, "tasks.s1")
	if got := vip(t, "s1", "back"); !netip.MustParsePrefix("10.99.0.0/24").Contains(got) {
		t.Errorf("VIP %s is not in the subnet that was asked for", got)
	}
	// Nothing leads from one network to the other.
	if s, err := get(within(t), lab.Host(2), f, "-n", "1", vip(t, "s1", "back").String()); err != nil || s.OK > 0 {
		t.Errorf("a container of front reached the VIP on back: %+v %v", s, err)
	}
}
