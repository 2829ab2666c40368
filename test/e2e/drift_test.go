package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/diag"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/test/cluster"
)

// What gives notice is mended within a second (0.1 s on an idle machine) and the rest
// within five. A VM on a busy machine takes two seconds for the first, most of them
// for asking; internal/linux has the test in which no timer helps.
const (
	soonMended = 10 * time.Second
	lateMended = 25 * time.Second
)

func anyAddr(netip.Addr) bool { return true }

// printed takes what a command printed, and fails the test if it failed.
func printed(t *testing.T) func(string, error) string {
	return func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return out
	}
}

// TestEveryKindOfDriftIsCounted breaks one of each kind of object on a node that
// has all of them, and waits until that kind is counted.
func TestEveryKindOfDriftIsCounted(t *testing.T) {
	id := network(t, "web")
	h := lab.Host(1)
	tasks := service(t, "s1", publish("web", "publish=8190:80"), 3)
	v := vip(t, "s1", "web").String()
	c := client(t, 1, "web")
	reaches(t, h, c, 3, 6, v)
	sees(t, onHost{h}, h, 8190, false, "", anyAddr)
	noDiff(t, 1)
	other := tasks[slices.IndexFunc(tasks, func(x cluster.Task) bool { return x.Host != h })]
	mac := strings.Fields(printed(t)(inNetwork(within(t), h, id, "ip", "neigh", "show", other.Addrs["web"].String(), "dev", "br0")))[2]
	end := overlay.MeshEnd(model.Network{ID: model.NetworkID(id)})
	pid := ""
	for _, x := range tasks {
		if x.Host == h {
			pid = strings.TrimSpace(docker(t, 1, "inspect", "-f", "{{.State.Pid}}", x.Container))
		}
	}
	here := func(args ...string) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) { return h.ExecNet(ctx, args...) }
	}
	in := func(args ...string) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) { return inNetwork(ctx, h, id, args...) }
	}
	task := func(args ...string) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			return h.Exec(ctx, append([]string{"nsenter", "-t", pid, "-n", "--"}, args...)...)
		}
	}
	// Loading rules anew makes hooks that were not there, which would be left.
	for _, chain := range [][]string{{"ip", "filter", "OUTPUT"}, {"ip", "nat", "INPUT"}, {"ip6", "filter", "OUTPUT"}, {"ip6", "nat", "INPUT"}} {
		if _, err := h.ExecNet(within(t), append([]string{"nft", "list", "chain"}, chain...)...); err == nil {
			continue
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if _, err := h.ExecNet(ctx, append([]string{"nft", "list", "chain"}, chain...)...); err != nil {
				return
			}
			if out, err := h.ExecNet(ctx, append([]string{"nft", "delete", "chain"}, chain...)...); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	// What a firewall does that is loaded anew, but with the engine's rules in it.
	reload := "iptables-save | grep -v SLUICE > /tmp/rules && ip6tables-save > /tmp/rules6 && "
	type damage struct {
		name, kind string
		do         func(context.Context) (string, error)
		limit      time.Duration
	}
	all := []damage{
		{"VXLAN device deleted", kernel.KindLink, in("ip", "link", "del", "vxlan0"), soonMended},
		{"VXLAN device down", kernel.KindLink, in("ip", "link", "set", "vxlan0", "down"), soonMended},
		{"forwarding entry deleted", kernel.KindFDB, in("bridge", "fdb", "del", mac, "dev", "vxlan0", "self"), soonMended},
		{"neighbour deleted", kernel.KindNeighbour, in("ip", "neigh", "del", other.Addrs["web"].String(), "dev", "br0"), soonMended},
		{"bridge's addresses gone", kernel.KindAddress, in("ip", "addr", "flush", "dev", "br0"), soonMended},
		{"route of the host to the network gone", kernel.KindRoute, here("sh", "-c", "ip route flush dev "+end+" proto 115"), soonMended},
		{"a network's tables flushed", kernel.KindNFTables, in("nft", "flush", "ruleset"), soonMended},
		{"the host's table deleted", kernel.KindNFTables, here("nft", "delete", "table", "ip", "sluice-mesh"), soonMended},
		{"a task's table deleted", kernel.KindNFTables, task("nft", "delete", "table", "ip", "sluice"), soonMended},
		{"iptables loaded anew", kernel.KindIPTables, here("sh", "-c", reload+"iptables-restore < /tmp/rules"), soonMended},
		{"nftables flushed, iptables loaded anew", kernel.KindNFTables, here("sh", "-c", reload+"nft flush ruleset && iptables-restore < /tmp/rules && ip6tables-restore < /tmp/rules6"), soonMended},
		{"a sysctl changed", kernel.KindSysctl, in("sysctl", "-qw", "net.ipv4.conf.all.send_redirects=1"), lateMended},
	}
	if wantDatapath() == "ipvs" {
		all = append(all, damage{"IPVS cleared", kernel.KindIPVS, in("ipvsadm", "-C"), lateMended})
	}
	drifts := func() map[string]uint64 {
		var st diag.Status
		sluice(t, 1, &st, "status")
		return st.Loop.DriftByKind
	}
	var told []time.Duration
	for _, d := range all {
		before := drifts()[d.kind]
		if out, err := d.do(within(t)); err != nil {
			t.Errorf("%s: %v: %s", d.name, err, out)
			continue
		}
		start := time.Now()
		err := cluster.Wait(within(t), d.name+" is counted", func(context.Context) error {
			if n := drifts(); n[d.kind] == before {
				return fmt.Errorf("drift is %v", n)
			}
			return nil
		})
		took := time.Since(start)
		t.Logf("%-10s %5d ms  %s", d.kind, took.Milliseconds(), d.name)
		if err != nil || took > d.limit {
			t.Errorf("%s: mended after %v, want at most %v: %v", d.name, took, d.limit, err)
		}
		if d.limit == soonMended {
			told = append(told, took)
		}
		noDiff(t, 1)
	}
	slices.Sort(told)
	t.Logf("with notice: median %v, longest %v", told[len(told)/2], told[len(told)-1])
	reaches(t, h, c, 3, 6, v)
	sees(t, onHost{h}, h, 8190, false, "", anyAddr)
	metrics := printed(t)(web(within(t), clients(t)[0], h, "/metrics"))
	for _, kind := range []string{"link", "fdb", "neighbour", "address", "route", "nftables", "iptables", "sysctl"} {
		if !strings.Contains(metrics, `sluice_drift_total{kind="`+kind+`"}`) || strings.Contains(metrics, `sluice_drift_total{kind="`+kind+`"} 0`) {
			t.Errorf("the metric does not count kind %s", kind)
		}
	}
	log := printed(t)(h.Exec(within(t), "grep", "drift mended", h.LogFile()))
	// Who did it, the kernel tells after what was done: on a machine as slow as a VM, it
	// may be mended before that is heard.
	if !strings.Contains(log, "notice: ") || wantDatapath() == "nft" && !strings.Contains(log, "by nft (process") {
		t.Errorf("the log does not tell causes:\n%s", log)
	}
}
