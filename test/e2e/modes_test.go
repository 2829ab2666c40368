package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/internal/netnstest"
	"sluice/test/cluster"
)

// modes are the forwarding modes that this kernel has.
func modes() []string {
	if netnstest.Has(netnstest.IPIP) == nil {
		return []string{"dr", "nat", "tun"}
	}
	return []string{"dr", "nat"}
}

// TestModesAndPorts: in each mode, from each node, a service answers at the port of
// its VIP that leads to another of its tasks, refuses the others, and sees who asks.
func TestModesAndPorts(t *testing.T) {
	network(t, "web")
	for _, mode := range modes() {
		t.Run(mode, func(t *testing.T) {
			name := "s-" + mode
			service(t, name, "name=web,driver-opt=sluice.mode="+mode+",driver-opt=sluice.ports=81:80;53/udp", 3)
			v := vip(t, name, "web").String()
			for i := 1; i <= 3; i++ {
				h, c := lab.Host(i), client(t, i, "web")
				reaches(t, h, c, 3, 6, v+":81")
				reaches(t, h, c, 3, 6, "--udp", v+":53")
				own := addrOn(t, h, c, "web")
				for _, how := range [][]string{{v + ":81"}, {"--udp", v + ":53"}} {
					r := ask(t, h, c, how...)
					if peer, err := netip.ParseAddrPort(r.Reply.Peer); err != nil || peer.Addr() != own {
						t.Errorf("node %d, %v: the task sees %s, want %s", i, how, r.Reply.Peer, own)
					}
				}
				if r := ask(t, h, c, v+":80"); r.OK || !strings.Contains(r.Error, "refused") {
					t.Errorf("node %d, port 80, which is none of the VIP's: %+v", i, r)
				}
				noDiff(t, i)
			}
			var e diag.Entry
			sluice(t, 1, &e, "service", name)
			for _, b := range e.Networks[0].Backends {
				if b.Method != methodOf(mode) {
					t.Errorf("mode %s on %s: backend %s by %s", mode, e.Networks[0].Datapath, b.Addr, b.Method)
				}
			}
		})
	}
}

// methodOf is how packets get to a backend in a mode: with nftables, tun needs no
// other packet around them.
func methodOf(mode string) string {
	if mode == "tun" && wantDatapath() == "nft" {
		return "dr"
	}
	return mode
}

// TestModesFollowEachOther under traffic: while the tasks of one mode are replaced by
// those of another, no request fails.
func TestModesFollowEachOther(t *testing.T) {
	network(t, "web")
	h, c := lab.Host(2), client(t, 2, "web")
	// Without a health check a task gets connections when its process runs; in nat,
	// where nothing else has to be prepared, that may be before it listens.
	service(t, "s1", "web", 3, "--update-order", "start-first", "--update-parallelism", "1",
		"--health-cmd", "/probe health", "--health-interval", "1s")
	v := vip(t, "s1", "web").String()
	reaches(t, h, c, 3, 6, v)
	for _, mode := range append(modes()[1:], "dr") {
		updated := make(chan struct{})
		go func() {
			defer close(updated)
			if err := update(t, "s1", "--network-rm", "web", "--network-add", "name=web,driver-opt=sluice.mode="+mode); err != nil {
				t.Error(err)
			}
		}()
		asked := 0
		for busy := true; busy; {
			select {
			case <-updated:
				busy = false // and ask once more
			default:
			}
			s, err := get(within(t), h, c, "--for", "3s", "--every", "20ms", v)
			if err != nil || s.Failed > 0 {
				t.Errorf("on the way to %s: %+v, %v", mode, s, err)
			}
			asked += s.OK
		}
		t.Logf("on the way to %s: %d requests", mode, asked)
		if asked < enough {
			t.Errorf("only %d requests were made", asked)
		}
		running(t, "s1", 3)
		if now := vip(t, "s1", "web").String(); now != v {
			t.Fatalf("the update to %s gave the VIP %s, not %s", mode, now, v)
		}
		reaches(t, h, c, 3, 6, v)
		var e diag.Entry
		err := cluster.Wait(within(t), "all backends are reached by "+mode, func(context.Context) error {
			sluice(t, 2, &e, "service", "s1")
			for _, b := range e.Networks[0].Backends {
				if b.Method != methodOf(mode) {
					return fmt.Errorf("%s by %s", b.Addr, b.Method)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}
