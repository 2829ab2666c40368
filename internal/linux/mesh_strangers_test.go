package linux

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

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
		for name, to := range to {
			for proto, ask := range askers() {
				if a, err := short(ask, from, "", to); err == nil {
					t.Errorf("%s reaches %s, %s by %s: %v", who, name, to, proto, a)
				}
			}
		}
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

	// What was there before is as before.
	l.want(t, "TCP", askTCP, l.client, h.at(keepPort), "192.0.2.4")
	if _, err := askTCP(l.client, "", h.at(closedPort)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a port that is closed: %v; want it refused", err)
	}
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
