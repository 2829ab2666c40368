package linux

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

// Whatever of the mesh goes, one round brings it back, with the packets.
func TestMeshIsMended(t *testing.T) { onBoth(t, meshMends) }

func meshMends(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	want := l.state(h, model.Taken)
	var end string
	var ns *netnstest.NS
	for key, v := range want {
		if link, ok := key.(kernel.Link); ok && link.Name == "mesh0" {
			end, ns = v.(kernel.LinkSpec).Peer, netnstest.Open(t, h.k.path(link.NS))
		}
	}
	all := []struct {
		name   string
		in     *netnstest.NS
		damage string
	}{
		{"the table of ports", h.w.host, "nft delete table ip sluice-mesh"},
		{"the ports in it", h.w.host, "nft flush map ip sluice-mesh published"},
		{"the ranges in it", h.w.host, "nft flush map ip sluice-mesh tcp-ranges; flush map ip sluice-mesh tcp-ranges-2"},
		{"the jump", h.w.host, "iptables -D FORWARD -j SLUICE-MESH"},
		{"a jump that comes too late", h.w.host, "iptables -I FORWARD 2 -j DROP"},
		{"a second jump, before people's rules", h.w.host, "iptables -I FORWARD -j SLUICE-MESH"},
		{"the chain", h.w.host, "iptables -F SLUICE-MESH"},
		{"the route of aliases", h.w.host, "ip route del " + h.block.String() + " dev " + end},
		{"the gateway's MAC", h.w.host, "ip neigh del " + meshGateway.String() + " dev " + end},
		{"the entry's address", h.w.host, "ip addr flush dev " + end},
		{"the pair, down", h.w.host, "ip link set " + end + " down"},
		{"the pair", h.w.host, "ip link del " + end},
		{"the way back", ns, "nft delete table bridge sluice-back"},
		{"the entry's MAC", ns, "bridge fdb del " + model.MACFor(h.mesh).String() + " dev mesh0 master"},
		{"the aliases in the network", ns, "ip route del " + h.block.String() + " dev br0 table local"},
		{"the rule in the task", h.task, "ip rule del from " + taskAddr(1).String()},
		{"the routes in the task", h.task, "ip route flush table " + fmt.Sprint(tableOf(taskAddr(1)))},
		{"the table of the task", h.task, "nft delete table ip sluice"},
		{"the task's chain for UDP", h.task, "nft flush chain ip sluice reply"},
		{"all tables", h.w.host, "nft flush ruleset"}, // those of the engine too: last
	}
	for _, c := range all {
		t.Run(c.name, func(t *testing.T) {
			run(t, c.in, "%s", c.damage)
			if len(kernel.Diff(h.dump(t), want)) == 0 {
				t.Fatal("no difference is seen")
			}
			h.lead(t, want)
			if ops := kernel.Diff(h.dump(t), want); len(ops) > 0 {
				t.Fatalf("after one round there is still to do: %v", ops)
			}
			if s := run(t, h.w.host, "ip -6 addr show dev %s", end); s != "" {
				t.Errorf("the host's end has IPv6:\n%s", s)
			}
			l.ready(t, h)
			for name, ask := range askers() {
				l.want(t, name, ask, l.client, h.at(keepPort), "192.0.2.4")
				l.want(t, name+" of a range", ask, l.client, h.at(rangeLo), "192.0.2.4")
				l.want(t, name+" from the host", ask, h.w.host, h.at(keepPort), h.mesh.String())
			}
		})
	}
}

// Datagrams that have to go in pieces, both ways and by every entry.
func TestMeshOfLargeDatagrams(t *testing.T) { onBoth(t, meshFragments) }

func meshFragments(t *testing.T, l *meshLab) {
	for _, h := range l.hosts {
		for _, size := range []int{1500, 4000, 20000} {
			got := map[string]bool{}
			for range 4 {
				c, err := dialMesh(l.client, "udp4", "", h.at(keepPort))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Write(bytes.Repeat([]byte("x"), size)); err != nil {
					t.Fatal(err)
				}
				buf := make([]byte, 1<<16)
				n, err := c.Read(buf)
				if err != nil || n != size {
					t.Errorf("%d octets by host %d: %d came back, %v", size, h.n, n, err)
				}
				got[parseSaid(string(buf[:n])).server] = true
				if host, _, _ := net.SplitHostPort(parseSaid(string(buf[:n])).client); host != "192.0.2.4" {
					t.Errorf("%d octets by host %d: seen as %q", size, h.n, host)
				}
				c.Close()
			}
			if !got["a"] || !got["b"] {
				t.Errorf("%d octets by host %d: answered by %v, want each", size, h.n, got)
			}
		}
	}
}

// The chain is in that world of iptables which the engine's rules are in.
func TestMeshBesideLegacyIPTables(t *testing.T) {
	if command("iptables-legacy") == "" || command("iptables-nft") == "" {
		t.Skip("missing: iptables-legacy and iptables-nft (the commands)")
	}
	l := (&meshLab{mode: "dr", legacy: true}).start(t)
	h := l.hosts[0]
	if s := run(t, h.w.host, "iptables-legacy -S"); !strings.Contains(s, "-A FORWARD -j SLUICE-MESH") {
		t.Errorf("no jump where the engine's chains are:\n%s", s)
	}
	if s := run(t, h.w.host, "iptables-nft -S"); strings.Contains(s, "SLUICE") {
		t.Errorf("chains of ours where the engine has none:\n%s", s)
	}
	for name, ask := range askers() {
		l.want(t, name, ask, l.client, h.at(keepPort), "192.0.2.4")
	}
	run(t, h.w.host, "iptables-legacy -D FORWARD -j SLUICE-MESH")
	if _, err := short(askTCP, l.client, "", h.at(keepPort)); err == nil {
		t.Error("without the jump it works too: the policy of FORWARD is not what the test takes it for")
	}
	h.lead(t, l.state(h, model.Taken))
	l.want(t, "TCP, mended", askTCP, l.client, h.at(keepPort), "192.0.2.4")
}

// What people drop in DOCKER-USER stays dropped, and what they return from there passes.
func TestMeshHeedsDockerUser(t *testing.T) {
	l := (&meshLab{mode: "dr"}).start(t)
	h := l.hosts[0]
	run(t, h.w.host, "iptables -I DOCKER-USER -s 192.0.2.4 -j DROP")
	for name, ask := range askers() {
		if _, err := short(ask, l.client, "", h.at(keepPort)); err == nil {
			t.Errorf("%s from a client that people drop is answered", name)
		}
		l.want(t, name+" from the host", ask, h.w.host, h.at(keepPort), h.mesh.String())
	}
	run(t, h.w.host, "iptables -F DOCKER-USER")
	run(t, h.w.host, "iptables -A DOCKER-USER -s 192.0.2.4 -j RETURN")
	run(t, h.w.host, "iptables -A DOCKER-USER -j DROP")
	if ops := kernel.Diff(h.dump(t), l.state(h, model.Taken)); len(ops) > 0 {
		t.Errorf("people's rules make work: %v", ops)
	}
	// The DROP behind is for the answers, too, as it would be for the engine's ports.
	run(t, h.w.host, "iptables -I DOCKER-USER -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN")
	for name, ask := range askers() {
		l.want(t, name, ask, l.client, h.at(keepPort), "192.0.2.4")
	}
}

// Tasks of an internal network have no way out but this. What they are asked by a
// published port they answer, by TCP and by UDP.
func TestMeshOfAnInternalNetwork(t *testing.T) {
	onBothAs(t, meshLab{mode: "dr", internal: true}, meshInternal)
}

func meshInternal(t *testing.T, l *meshLab) {
	for _, h := range l.hosts {
		for name, ask := range askers() {
			l.want(t, name, ask, l.client, h.at(keepPort), "192.0.2.4")
			l.want(t, name+" to a server bound to its own", ask, l.client, h.at(ownPort), "192.0.2.4")
			l.want(t, name+" masqueraded", ask, l.client, h.at(masqPort), h.mesh.String())
			if a, err := ask(l.client, "", h.at(closedPort)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s, no server: %v, %v; want it refused", name, a, err)
			}
		}
	}
	h := l.hosts[0]
	want := l.state(h, model.Taken)
	run(t, h.task, "ip rule del pref %d", lastRule)
	if len(kernel.Diff(h.dump(t), want)) == 0 {
		t.Error("the rule for UDP is gone, and no difference is seen")
	}
	h.lead(t, want)
	if ops := kernel.Diff(h.dump(t), want); len(ops) > 0 {
		t.Errorf("after one round there is still to do: %v", ops)
	}
	l.want(t, "UDP, mended", askUDP, l.client, h.at(keepPort), "192.0.2.4")

	// And the way in is none out.
	for name, to := range map[string]string{"an outsider": "192.0.2.4", "its host": h.addr.String()} {
		ns := map[string]*netnstest.NS{"an outsider": l.client, "its host": h.w.host}[name]
		for proto, ask := range askers() {
			if a, err := short(ask, h.task, "", net.JoinHostPort(to, fmt.Sprint(listenOn(t, ns)))); err == nil {
				t.Errorf("a task reaches %s by %s: %v", name, proto, a)
			}
		}
	}
}
