package linux

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
	"sluice/internal/plan"
)

// The engine attaches the way outside after a task has begun to serve. A client that
// sends all the time is answered from then on, although its flow is older.
func TestMeshDefaultUnderAFlow(t *testing.T) { onBoth(t, meshDefaultUnderAFlow) }

func meshDefaultUnderAFlow(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	want := l.state(h, model.Taken)
	run(t, h.task, "ip link set eth1 down")
	h.lead(t, want)
	var conns []net.Conn
	mute := 0
	for range 2 { // each backend
		c, err := dialMesh(l.client, "udp4", "", h.at(rrPort))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := question(c); err != nil {
			mute++
		}
	}
	if mute != 1 {
		t.Fatalf("%d of two are not answered; want one: its task has no way outside", mute)
	}
	run(t, h.task, "ip link set eth1 up")
	run(t, h.task, "ip route add default via 172.18.0.1")
	h.lead(t, want)
	for _, c := range conns {
		if err := c.SetDeadline(time.Now().Add(meshPatience)); err != nil {
			t.Fatal(err)
		}
		if a, err := question(c); err != nil {
			t.Errorf("a flow that has begun before: %v, %v", a, err)
		}
	}
}

// Services come to see their clients as the node, and back. Open connections of TCP go
// on; datagrams are seen as is wanted now.
func TestMeshSourceUnderConnections(t *testing.T) { onBoth(t, meshSourceUnder) }

func meshSourceUnder(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	client := "192.0.2.4"
	for _, source := range []model.Source{model.Masquerade, model.Keep} {
		var tcp []net.Conn
		for range 2 { // each backend
			c, err := dialMesh(l.client, "tcp4", "", h.at(keepPort))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			asked(t, c)
			tcp = append(tcp, c)
		}
		udp, err := dialMesh(l.client, "udp4", "", h.at(keepPort))
		if err != nil {
			t.Fatal(err)
		}
		defer udp.Close()
		if got := asked(t, udp); got != client {
			t.Fatalf("before it is %s: seen as %s, want %s", source, got, client)
		}
		l.source = source
		for _, o := range l.hosts {
			o.lead(t, l.state(o, model.Taken))
		}
		for _, c := range tcp {
			if err := c.SetDeadline(time.Now().Add(meshPatience)); err != nil {
				t.Fatal(err)
			}
			asked(t, c)
		}
		client = map[model.Source]string{model.Masquerade: h.mesh.String(), model.Keep: "192.0.2.4"}[source]
		if err := udp.SetDeadline(time.Now().Add(meshPatience)); err != nil {
			t.Fatal(err)
		}
		if got := asked(t, udp); got != client {
			t.Errorf("when it is %s: seen as %s, want %s", source, got, client)
		}
	}
}

// A node that has to take another number ends what was open by the old one: clients are
// told, and nothing of it goes wherever the host's default route leads.
func TestMeshNumberUnderConnections(t *testing.T) { onBoth(t, meshNumberUnder) }

func meshNumberUnder(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	run(t, l.client, "nft add table ip seen")
	run(t, l.client, "nft add chain ip seen in { type filter hook prerouting priority -400; }")
	run(t, l.client, "nft add rule ip seen in ip daddr %s counter", meshAliases)
	run(t, h.w.host, "ip route add default via 192.0.2.4")
	run(t, h.w.host, "iptables -P FORWARD ACCEPT")
	conns := map[string]net.Conn{}
	for name, from := range map[string]*netnstest.NS{"a client": l.far, "the host itself": h.w.host} {
		for _, network := range []string{"tcp4", "udp4"} {
			c, err := dialMesh(from, network, "", h.at(keepPort))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			asked(t, c)
			conns[network+" of "+name] = c
		}
	}
	h.claim(4)
	for _, o := range l.hosts {
		o.lead(t, l.state(o, model.Taken))
	}
	for name, c := range conns {
		if err := c.SetDeadline(time.Now().Add(meshPatience)); err != nil {
			t.Fatal(err)
		}
		_, err := question(c)
		if _, is := c.(*net.TCPConn); is && !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: %v; want it reset", name, err)
		}
		if _, is := c.(*net.UDPConn); is && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if s := run(t, l.client, "nft list table ip seen"); !strings.Contains(s, "packets 0") {
		t.Errorf("packets to aliases come out of the host:\n%s", s)
	}
	l.want(t, "TCP", askTCP, l.client, h.at(keepPort), "192.0.2.4")
}

// asked has a question answered, and returns as whom the server sees the client. What
// came is acknowledged, so that nothing is on its way any more.
func asked(t *testing.T, c net.Conn) string {
	t.Helper()
	if _, err := c.Write([]byte("who")); err != nil {
		t.Fatal(err)
	}
	tcp, is := c.(*net.TCPConn)
	buf := make([]byte, 256)
	var got string
	for !strings.HasSuffix(got, "who") {
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if got += string(buf[:n]); !is {
			break
		}
	}
	if is {
		raw, err := tcp.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var set error
		if err := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1) }); err != nil || set != nil {
			t.Fatal(err, set)
		}
	}
	host, _, _ := net.SplitHostPort(parseSaid(got).client)
	return host
}

// A node that is in a network for its ports only leaves it, when nothing is published
// any more, and comes back. Who was connected is told, and nothing of it stays.
func TestMeshLeavesUnderConnections(t *testing.T) { onBoth(t, meshLeaves) }

func meshLeaves(t *testing.T, l *meshLab) {
	h := l.hosts[2]
	alone := plan.Host(model.View{Self: l.view(h, meshServices()[0], model.Taken).Self})
	for range 2 {
		c, err := dialMesh(l.client, "tcp4", "", h.at(keepPort))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		asked(t, c)
		h.lead(t, alone)
		if ops := kernel.Diff(h.dump(t), alone); len(ops) > 0 {
			t.Fatalf("still to do: %v", ops)
		}
		if _, err := question(c); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("a connection by a node that has left: %v; want it reset", err)
		}
		if a, err := askTCP(l.client, "", h.at(keepPort)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a new one: %v, %v; want it refused", a, err)
		}
		if s := run(t, h.w.host, "nft list tables ip"); strings.Contains(s, "sluice") {
			t.Errorf("tables are left:\n%s", s)
		}
		h.lead(t, l.state(h, model.Taken))
		l.ready(t, h)
	}
}
