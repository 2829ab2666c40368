package linux

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/netnstest"
)

// Nobody gets past the published ports: not from outside, not from a container of the
// host, not from a task into the host or through it, whether the network's namespace
// forwards (IPVS in mode nat) or not.
func TestMeshKeepsStrangersOut(t *testing.T) { onBoth(t, meshKeepsOut) }

func TestMeshKeepsStrangersOutInModeNAT(t *testing.T) { onBothIn(t, "nat", meshKeepsOut) }

func TestMeshKeepsStrangersOutInModeTun(t *testing.T) { onBothIn(t, "tun", meshKeepsOut) }

func meshKeepsOut(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	run(t, l.client, "ip route add %s via %s", meshAliases, h.addr)
	run(t, l.client, "ip route add %s via %s", meshSubnet, h.addr)
	container := netnstest.New(t)
	run(t, h.w.host, "ip link add gw2 type veth peer name eth0 netns %s", container.Path())
	run(t, h.w.host, "ip link set gw2 master docker_gwbridge up")
	run(t, container, "ip addr add 172.18.0.9/16 dev eth0")
	run(t, container, "ip link set eth0 up")
	run(t, container, "ip route add default via 172.18.0.1")
	hosts := listenOn(t, h.w.host)
	out := func(who string, from *netnstest.NS, to map[string]string) {
		var all sync.WaitGroup
		for name, to := range to {
			for proto, ask := range askers() {
				all.Go(func() {
					if a, err := short(ask, from, "", to); err == nil {
						t.Errorf("%s reaches %s, %s by %s: %v", who, name, to, proto, a)
					}
				})
			}
		}
		all.Wait()
	}
	straight := map[string]string{
		"an alias":            fmt.Sprintf("%s:80", h.alias(100)),
		"a port of the alias": fmt.Sprintf("%s:9000", h.alias(100)),
		"a task":              fmt.Sprintf("%s:80", taskAddr(1)),
		"a task elsewhere":    fmt.Sprintf("%s:80", taskAddr(2)),
		"a virtual IP":        "10.255.0.100:80",
		"the entry":           fmt.Sprintf("%s:80", h.mesh),
		"the gateway":         fmt.Sprintf("%s:80", meshGateway),
	}
	out("an outsider", l.client, straight)
	out("an outsider", l.client, map[string]string{"who is not allowed": h.at(allowPort)})
	out("a container", container, straight)
	l.want(t, "TCP of a container", askTCP, container, h.at(keepPort), h.mesh.String())
	if _, err := askTCP(h.w.host, "", fmt.Sprintf("127.0.0.1:%d", hosts)); err != nil {
		t.Fatalf("the host's own server: %v", err)
	}

	// Tasks that take the host's end, or the bridge, for their gateway.
	for _, via := range []netip.Addr{h.mesh, meshGateway} {
		run(t, h.task, "ip route replace 192.0.2.0/24 via %s dev eth0", via)
		run(t, h.task, "ip route replace 172.18.0.1/32 via %s dev eth0", via)
		out("a task by "+via.String(), h.task, map[string]string{
			"its host":                   h.at(hosts),
			"its host's other address":   fmt.Sprintf("172.18.0.1:%d", hosts),
			"the host by the mesh":       fmt.Sprintf("%s:%d", h.mesh, hosts),
			"a published port of it":     h.at(keepPort),
			"a port of another host":     l.hosts[1].at(keepPort),
			"an outsider, as if answers": fmt.Sprintf("192.0.2.4:%d", listenOn(t, l.client)),
		})
	}
	// And one that sends to 127.0.0.1, of which the mesh's device takes more than others.
	run(t, h.task, "ip addr flush dev lo")
	h.task.Must(func() error {
		return errors.Join(writeSysctl("net.ipv4.conf.all.route_localnet", "1"), writeSysctl("net.ipv4.conf.eth0.route_localnet", "1"))
	})
	run(t, h.task, "ip route add 127.0.0.1/32 via %s dev eth0 src %s", h.mesh, taskAddr(1))
	out("a task", h.task, map[string]string{"127.0.0.1 of its host": fmt.Sprintf("127.0.0.1:%d", hosts)})

	// Answers or none, nothing arrives: also with a source that the host takes for an
	// answer's, and where it does not check sources.
	spoofed := h.alias(77)
	run(t, h.task, "ip addr add %s/32 dev lo", spoofed)
	for _, strict := range []string{"1", "0"} {
		checkSources(t, h.w.host, strict)
		for _, via := range []netip.Addr{h.mesh, meshGateway} {
			run(t, h.task, "ip route replace 192.0.2.0/24 via %s dev eth0", via)
			run(t, h.task, "ip route replace 172.18.0.1/32 via %s dev eth0", via)
			run(t, h.task, "ip route replace 127.0.0.1/32 via %s dev eth0", via)
			for _, from := range []netip.Addr{taskAddr(1), spoofed} {
				for to, ns := range map[string]*netnstest.NS{
					h.addr.String(): h.w.host, "172.18.0.1": h.w.host, "127.0.0.1": h.w.host, h.mesh.String(): h.w.host, "192.0.2.4": l.client,
				} {
					if arrives(t, h.task, from, ns, to) {
						t.Errorf("a task's datagram from %s by %s arrives at %s (rp_filter %s)", from, via, to, strict)
					}
				}
			}
		}
	}

	// What was there before is as before.
	l.want(t, "TCP", askTCP, l.client, h.at(keepPort), "192.0.2.4")
	if _, err := askTCP(l.client, "", h.at(closedPort)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port that is closed: %v; want it refused", err)
	}
}

// arrives sends datagrams from a task's address and reports whether one comes to a
// server at to, in ns.
func arrives(t *testing.T, task *netnstest.NS, from netip.Addr, ns *netnstest.NS, to string) bool {
	t.Helper()
	var server net.PacketConn
	ns.Must(func() (err error) {
		server, err = net.ListenPacket("udp4", "0.0.0.0:0")
		return err
	})
	defer server.Close()
	addr := netip.AddrPortFrom(netip.MustParseAddr(to), server.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	task.Must(func() error {
		c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0)))
		if err != nil {
			return err
		}
		defer c.Close()
		for range 3 {
			if _, err := c.WriteToUDPAddrPort([]byte("in"), addr); err != nil {
				return err
			}
		}
		return nil
	})
	// What arrives does so before the sender returns; this is for a machine that is busy.
	if err := server.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, _, err := server.ReadFrom(make([]byte, 16))
	return err == nil
}

// listenOn starts a server of TCP and UDP in a namespace and returns its port.
func listenOn(t *testing.T, ns *netnstest.NS) int {
	t.Helper()
	var port int
	ns.Must(func() error {
		ln, err := net.Listen("tcp4", "0.0.0.0:0")
		if err != nil {
			return err
		}
		port = ln.Addr().(*net.TCPAddr).Port
		return ln.Close()
	})
	serveMesh(t, ns, "stranger", []string{fmt.Sprintf("0.0.0.0:%d", port)})
	return port
}

// Containers of the engine's networks are seen as their node. Others that are behind a
// bridge of the host, as all are if the host's LAN is on one, are seen as themselves.
func TestMeshBehindBridges(t *testing.T) {
	l := newMeshLab(t, false, "dr")
	h := l.hosts[0]
	for i, c := range []struct{ bridge, seen string }{
		{"br-0123456789ab", h.mesh.String()},
		{"br-lan", "10.77.1.2"},
	} {
		behind := netnstest.New(t)
		run(t, h.w.host, "ip link add %s type bridge", c.bridge)
		run(t, h.w.host, "ip addr add 10.77.%d.1/24 dev %s", i, c.bridge)
		run(t, h.w.host, "ip link set %s up", c.bridge)
		run(t, h.w.host, "ip link add behind%d type veth peer name eth0 netns %s", i, behind.Path())
		run(t, h.w.host, "ip link set behind%d master %s up", i, c.bridge)
		run(t, behind, "ip addr add 10.77.%d.2/24 dev eth0", i)
		run(t, behind, "ip link set eth0 up")
		run(t, behind, "ip route add default via 10.77.%d.1", i)
		for name, ask := range askers() {
			l.want(t, name+" behind "+c.bridge, ask, behind, h.at(keepPort), c.seen)
		}
	}
}

// A task that knows what its host has open cannot put anything in, where the host does
// not check sources: what comes from a network is of connections to published ports.
func TestMeshAnswersNothingElse(t *testing.T) {
	l := newMeshLab(t, false, "dr")
	h := l.hosts[0]
	checkSources(t, h.w.host, "0")
	resolver := "192.0.2.4:5353"
	serveMesh(t, l.client, "resolver", []string{resolver})
	c, err := dialMesh(h.w.host, "udp4", "", resolver)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := question(c); err != nil {
		t.Fatal(err)
	}
	run(t, h.task, "ip addr add 192.0.2.4/32 dev lo")
	run(t, h.task, "ip route add %s/32 via %s dev eth0", h.addr, h.mesh)
	forged, err := dialMesh(h.task, "udp4", resolver, c.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer forged.Close()
	if _, err := forged.Write([]byte("forged")); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if n, err := c.Read(buf); err == nil {
		t.Errorf("the host takes %q of a task for an answer", buf[:n])
	}
}

// checkSources sets rp_filter of all devices of a host.
func checkSources(t *testing.T, host *netnstest.NS, how string) {
	t.Helper()
	host.Must(func() error {
		all, err := filepath.Glob("/proc/sys/net/ipv4/conf/*/rp_filter")
		for _, name := range all {
			err = errors.Join(err, os.WriteFile(name, []byte(how), 0))
		}
		return err
	})
}
