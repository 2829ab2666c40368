package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/internal/netnstest"
	"sluice/test/cluster"
)

// needIPVS skips a test of what only ip_vs has, where networks do not get it.
func needIPVS(t *testing.T) {
	t.Helper()
	if os.Getenv(datapathEnv) == "nft" {
		t.Skipf("%s=nft asks for the other datapath", datapathEnv)
	}
	netnstest.Need(t, netnstest.IPVS, netnstest.IPVSAdm)
}

// wantDatapath is what serves the VIPs of the tests' networks.
func wantDatapath() string {
	if d := os.Getenv(datapathEnv); d != "" && d != "auto" {
		return d
	}
	if netnstest.Has(netnstest.IPVS) == nil {
		return "ipvs"
	}
	return "nft"
}

// inNetwork runs a command of the machine in the namespace that sluice has for a
// network on a host: a host with another engine has not all tools.
func inNetwork(ctx context.Context, h *cluster.Host, network string, args ...string) (string, error) {
	return h.InNetwork(ctx, network, args...)
}

// ipvsStats is what ipvsadm prints of a namespace: connections by mark, and by
// mark and destination.
type ipvsStats struct {
	services map[string]int
	dests    map[string]map[netip.Addr]int
	// rows are all numbers of a service, FWM 258, and of its destinations, FWM 258 ->
	// 10.0.0.2:0.
	rows map[string]string
}

// conns are all connections that IPVS has counted to an address, or to all.
func (s ipvsStats) conns(to netip.Addr) int {
	sum := 0
	for mark, n := range s.services {
		if to.IsValid() {
			n = s.dests[mark][to]
		}
		sum += n
	}
	return sum
}

// readIPVS asks Debian's ipvsadm.
func readIPVS(ctx context.Context, h *cluster.Host, network string) (ipvsStats, error) {
	s := ipvsStats{services: map[string]int{}, dests: map[string]map[netip.Addr]int{}, rows: map[string]string{}}
	out, err := inNetwork(ctx, h, network, "ipvsadm", "-L", "-n", "--stats", "--exact")
	if err != nil {
		return s, err
	}
	mark := ""
	for line := range strings.Lines(out) {
		// FWM  258        6       30        0     1788        0
		//   -> 10.0.0.2:0 2 ...
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "FWM" && (f[0] != "->" || f[1] == "RemoteAddress:Port") {
			continue
		}
		n, err := strconv.Atoi(f[2])
		if err != nil {
			return s, fmt.Errorf("ipvsadm: %q: %w", line, err)
		}
		if f[0] == "FWM" {
			mark = f[1]
			s.rows["FWM "+mark] = strings.Join(f[2:], " ")
			s.services[mark], s.dests[mark] = n, map[netip.Addr]int{}
			continue
		}
		s.rows["FWM "+mark+" -> "+f[1]] = strings.Join(f[2:], " ")
		to, err := netip.ParseAddrPort(f[1])
		if err != nil {
			return s, fmt.Errorf("ipvsadm: %q: %w", line, err)
		}
		s.dests[mark][to.Addr()] = n
	}
	return s, nil
}

// sameAsIPVS reports where the command's answer about a service differs from
// ipvsadm's rows. Counters that changed in between say nothing.
func sameAsIPVS(ctx context.Context, h *cluster.Host, network, service string) error {
	before, err := readIPVS(ctx, h, network)
	if err != nil {
		return err
	}
	out, err := h.Exec(ctx, sluiceCommand(h), "service", service, "--json")
	if err != nil {
		return fmt.Errorf("sluice service: %w\n%s", err, out)
	}
	after, err := readIPVS(ctx, h, network)
	if err != nil {
		return err
	}
	var e diag.Entry
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		return fmt.Errorf("sluice service: %w", err)
	}
	row := func(t *diag.Traffic) string {
		if t == nil {
			return "not counted"
		}
		return fmt.Sprint(t.Connections, t.PacketsIn, t.PacketsOut, t.BytesIn, t.BytesOut)
	}
	rows := map[string]string{}
	for _, n := range e.Networks {
		for _, s := range n.IPVS {
			mark := fmt.Sprint("FWM ", s.Mark)
			rows[mark] = row(s.Traffic)
			for _, d := range s.Destinations {
				rows[mark+" -> "+d.Addr] = row(d.Traffic)
			}
		}
	}
	if !maps.Equal(before.rows, after.rows) {
		return errors.New("counters changed meanwhile")
	}
	if !maps.Equal(rows, after.rows) || len(rows) == 0 {
		return fmt.Errorf("sluice service has %v, ipvsadm %v", rows, after.rows)
	}
	return nil
}

// TestIPVSCountsWhatIsAsked: a VIP is served by ip_vs itself, by its own word and
// as its own tool shows it.
func TestIPVSCountsWhatIsAsked(t *testing.T) {
	needIPVS(t)
	id := network(t, "web")
	tasks := service(t, "s1", "web", 3)
	v := vip(t, "s1", "web").String()
	c, h := client(t, 2, "web"), lab.Host(2)
	noDiff(t, 2)
	err := cluster.Wait(within(t), "ipvsadm shows the backends", func(ctx context.Context) error {
		s, err := readIPVS(ctx, h, id)
		if err != nil {
			return err
		}
		for _, dests := range s.dests {
			for _, task := range tasks {
				if _, ok := dests[task.Addrs["web"]]; !ok {
					dests = nil
				}
			}
			if len(dests) == len(tasks) {
				return nil
			}
		}
		return fmt.Errorf("no service has all of %v: %+v", tasks, s)
	})
	if err != nil {
		t.Fatal(err)
	}
	asked := 0
	for _, n := range []int{30, 15} {
		s, err := get(within(t), h, c, "-n", fmt.Sprint(n), v)
		if err != nil || s.OK != n {
			t.Fatalf("%d requests: %+v, %v", n, s, err)
		}
		asked += n
		// The kernel adds its counters up every 2 s.
		err = cluster.Wait(within(t), fmt.Sprintf("IPVS has counted %d connections, a third of them to each", asked), func(ctx context.Context) error {
			s, err := readIPVS(ctx, h, id)
			if err != nil {
				return err
			}
			good := s.conns(netip.Addr{}) == asked
			for _, task := range tasks {
				good = good && s.conns(task.Addrs["web"]) == asked/len(tasks)
			}
			if !good {
				return fmt.Errorf("%+v", s)
			}
			return sameAsIPVS(ctx, h, id, "s1")
		})
		if err != nil {
			t.Error(err)
		}
	}
	for i := 1; i <= 3; i++ {
		noDiff(t, i)
	}
}

func TestIPVSDriftIsMended(t *testing.T) {
	needIPVS(t)
	id := network(t, "web")
	tasks := service(t, "s1", "web", 3)
	v := vip(t, "s1", "web").String()
	c, h := client(t, 1, "web"), lab.Host(1)
	reaches(t, h, c, 3, 6, v)
	noDiff(t, 1)
	// mark is that of the service that other containers than its tasks use, by TCP.
	mark := func() string {
		out, err := h.Exec(within(t), sluiceCommand(h), "service", "s1", "--json")
		var e diag.Entry
		if err := errors.Join(err, json.Unmarshal([]byte(out), &e)); err != nil {
			t.Fatal(err)
		}
		for _, n := range e.Networks {
			for _, s := range n.IPVS {
				if s.Client == "" && s.Proto == "" && len(s.Destinations) == len(tasks) {
					return fmt.Sprint(s.Mark)
				}
			}
		}
		t.Fatalf("no service has %d destinations:\n%s", len(tasks), out)
		return ""
	}
	backend := tasks[1].Addrs["web"].String()
	for _, tt := range []struct {
		name   string
		damage func() []string
	}{
		{"all services deleted", func() []string { return []string{"ipvsadm", "-C"} }},
		{"the service deleted", func() []string { return []string{"ipvsadm", "-D", "-f", mark()} }},
		{"a backend deleted", func() []string { return []string{"ipvsadm", "-d", "-f", mark(), "-r", backend} }},
		{"a backend's weight changed", func() []string { return []string{"ipvsadm", "-e", "-f", mark(), "-r", backend, "-g", "-w", "0"} }},
		{"the scheduler changed", func() []string { return []string{"ipvsadm", "-E", "-f", mark(), "-s", "sh"} }},
		{"a foreign backend added", func() []string { return []string{"ipvsadm", "-a", "-f", mark(), "-r", "192.0.2.1", "-g", "-w", "1"} }},
		{"the marks deleted", func() []string { return []string{"nft", "delete", "table", "ip", "sluice"} }},
	} {
		if out, err := inNetwork(within(t), h, id, tt.damage()...); err != nil {
			t.Errorf("%s: %v: %s", tt.name, err, out)
			continue
		}
		noDiff(t, 1)
		// Damage that does not show in the plugin's own eyes would show here.
		s, err := get(within(t), h, c, "-n", "30", v)
		if err != nil || s.Failed > 0 || len(s.Hosts) != 3 {
			t.Errorf("%s, and mended: %+v, %v", tt.name, s, err)
		}
	}
}

// TestNodesOfBothKinds: a node without ip_vs, which is one that is told to do
// without, shares a network with nodes that have it.
func TestNodesOfBothKinds(t *testing.T) {
	needIPVS(t)
	const without = 2
	setting(t, without, "DATAPATH=nft", "DATAPATH=auto")
	id := network(t, "web", "-o", "sluice.datapath=auto")
	tasks := service(t, "s1", "web", 3, "--replicas-max-per-node", "1")
	v := vip(t, "s1", "web").String()
	for i, h := range lab.Hosts() {
		c := client(t, i+1, "web")
		reaches(t, h, c, 3, 9, v)
		reaches(t, h, c, 3, 9, "--udp", v)
		own := addrOn(t, h, c, "web")
		for _, args := range [][]string{{v}, {v}, {v}, {"--udp", v}, {"--udp", v}, {"--udp", v}} {
			r := ask(t, h, c, args...)
			if peer, err := netip.ParseAddrPort(r.Reply.Peer); err != nil || peer.Addr() != own {
				t.Errorf("a backend sees %q, the client on %s is %s: %+v", r.Reply.Peer, h.Name(), own, r)
			}
		}
		want := "ipvs"
		if i+1 == without {
			want = "nft"
		}
		var sv diag.Services
		sluice(t, i+1, &sv, "services")
		if len(sv.Services) != 1 || sv.Services[0].Datapath != want {
			t.Errorf("services on %s: %+v; want datapath %s", h.Name(), sv, want)
		}
		var st diag.Status
		sluice(t, i+1, &st, "status")
		if st.Datapath != want || want == "nft" && !strings.Contains(st.Why, "DATAPATH") {
			t.Errorf("status of %s: datapath %s (%s); want %s", h.Name(), st.Datapath, st.Why, want)
		}
		s, err := readIPVS(within(t), h, id)
		if err != nil || (want == "ipvs") != (len(s.services) > 0) {
			t.Errorf("ip_vs on %s, whose datapath should be %s: %+v, %v", h.Name(), want, s, err)
		}
		noDiff(t, i+1)
	}
	// Members too: one asks the others, and each sees who asks.
	for _, task := range tasks {
		reaches(t, task.Host, task.Container, 2, 6, v)
	}
}

// setting sets a setting of the plugin on host i, which must have no network, and
// sets another at the test's end.
func setting(t *testing.T, i int, now, afterwards string) {
	t.Helper()
	set := func(ctx context.Context, value string) error {
		// The engine counts a network as a user of its plugin for a while after it has gone.
		err := cluster.Wait(ctx, "the plugin is disabled", func(ctx context.Context) error {
			_, err := lab.Host(i).Docker(ctx, "plugin", "disable", plugin)
			return err
		})
		for _, args := range [][]string{{"set", plugin, value}, {"enable", plugin}} {
			if err == nil {
				_, err = lab.Host(i).Docker(ctx, append([]string{"plugin"}, args...)...)
			}
		}
		return err
	}
	if err := set(within(t), now); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := set(ctx, afterwards); err != nil {
			t.Error(err)
		}
	})
}

// TestTheSameWithNFT runs the main tests once more with the other datapath, where
// networks get ip_vs otherwise.
func TestTheSameWithNFT(t *testing.T) {
	needIPVS(t)
	t.Setenv(datapathEnv, "nft")
	for name, test := range map[string]func(*testing.T){
		"VIP from every container on every node": TestVIPAnswersFromEveryContainerOnEveryNode,
		"zero replicas":                          TestZeroReplicasAreRefusedAtOnce,
		"drift":                                  TestDriftIsMended,
	} {
		t.Run(name, test)
	}
}
