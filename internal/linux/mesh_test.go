package linux

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

type asker = func(from *netnstest.NS, local, to string) (said, error)

func askers() map[string]asker { return map[string]asker{"TCP": askTCP, "UDP": askUDP} }

// want asks as often as there are backends, twice: all answer in turn, and see that
// client. By UDP a question may be of a flow that is remembered, if the kernel chooses
// the port of an earlier one; then it asks once more, and once again.
func (l *meshLab) want(t testing.TB, name string, ask asker, from *netnstest.NS, to, client string) {
	t.Helper()
	got := map[string]int{}
	for range 3 {
		clear(got)
		for range 4 {
			a, err := ask(from, "", to)
			if err != nil {
				t.Errorf("%s to %s: %v", name, to, err)
				return
			}
			got[a.server]++
			if host, _, _ := net.SplitHostPort(a.client); host != client {
				t.Errorf("%s to %s: seen as %s, want %s", name, to, a.client, client)
			}
		}
		if got["a"] == 2 && got["b"] == 2 {
			return
		}
		if !strings.HasPrefix(name, "UDP") {
			break
		}
	}
	t.Errorf("%s to %s: answered by %v, want each twice", name, to, got)
}

func TestMesh(t *testing.T) { onBoth(t, meshAnswers) }

func TestMeshInModeNAT(t *testing.T) { onBothIn(t, "nat", meshAnswers) }

func TestMeshInModeTun(t *testing.T) { onBothIn(t, "tun", meshAnswers) }

func meshAnswers(t *testing.T, l *meshLab) {
	const client = "192.0.2.4"
	for _, h := range l.hosts {
		t.Run(fmt.Sprintf("entry %d", h.n), func(t *testing.T) {
			for name, ask := range askers() {
				l.want(t, name+" from outside", ask, l.client, h.at(keepPort), client)
				l.want(t, name+" to a server bound to its own", ask, l.client, h.at(ownPort), client)
				l.want(t, name+" without a virtual IP", ask, l.client, h.at(rrPort), client)
				l.want(t, name+" masqueraded", ask, l.client, h.at(masqPort), h.mesh.String())
				l.want(t, name+" by 127.0.0.1", ask, h.w.host, fmt.Sprintf("127.0.0.1:%d", keepPort), h.mesh.String())
				l.want(t, name+" by the host's own address", ask, h.w.host, h.at(keepPort), h.mesh.String())
				l.want(t, name+" from who is allowed", ask, l.far, h.at(allowPort), "198.51.100.2")
				other := l.hosts[h.n%3]
				l.want(t, name+" from another node", ask, other.w.host, h.at(keepPort), other.addr.String())
				for what, port := range map[string]int{"no backend": emptyPort, "no server": closedPort} {
					if a, err := ask(l.client, "", h.at(port)); !errors.Is(err, unix.ECONNREFUSED) {
						t.Errorf("%s, %s: %v, %v; want it refused", name, what, a, err)
					}
				}
			}
		})
	}
}

// UDP to a server that is bound to no address works on one network of a task; on
// the other it has to be bound, and then is in nobody's way.
func TestMeshOnTwoNetworks(t *testing.T) {
	onBothAs(t, meshLab{mode: "dr", two: true}, meshOnTwo)
}

func meshOnTwo(t *testing.T, l *meshLab) {
	for _, h := range l.hosts {
		for name, ask := range askers() {
			l.want(t, name+" on the first", ask, l.client, h.at(keepPort), "192.0.2.4")
			l.want(t, name+" on the second", ask, l.client, h.at(secondPort), "192.0.2.4")
		}
	}
}

// One client port to three entries at once is three connections, whichever tasks get them.
func TestMeshByAllEntriesAtOnce(t *testing.T) { onBoth(t, meshByAllEntries) }

func meshByAllEntries(t *testing.T, l *meshLab) {
	for i := range 20 {
		local := fmt.Sprintf("192.0.2.4:%d", 40000+i)
		for _, network := range []string{"tcp4", "udp4"} {
			var conns []net.Conn
			for _, h := range l.hosts {
				c, err := dialMesh(l.client, network, local, h.at(keepPort))
				if err != nil {
					t.Fatalf("round %d, %s by host %d: %v", i, network, h.n, err)
				}
				conns = append(conns, c)
			}
			for n, c := range conns {
				if a, err := question(c); err != nil || a.server == "" {
					t.Errorf("round %d, %s by host %d: %v, %v", i, network, n+1, a, err)
				}
			}
			for _, c := range conns {
				if tcp, ok := c.(*net.TCPConn); ok {
					tcp.SetLinger(0) // the port is free at once
				}
				c.Close()
			}
		}
	}
}

// A router on the way says that packets are too large, of which the client knows nothing.
func TestMeshFindsThePathMTU(t *testing.T) { onBoth(t, meshFindsMTU) }

func meshFindsMTU(t *testing.T, l *meshLab) {
	for _, h := range l.hosts {
		for range 2 { // each backend
			c, err := dialMesh(l.far, "tcp4", "", h.at(bulkPort))
			if err != nil {
				t.Fatal(err)
			}
			n, err := io.Copy(io.Discard, c)
			if err != nil || n < 1<<20 {
				t.Errorf("by host %d: %d octets came, then %v", h.n, n, err)
			}
			c.Close()
		}
	}
}

// The engine attaches the way outside after the plugin has prepared the task, and
// may change it.
func TestMeshFollowsTheDefaultRoute(t *testing.T) { onBoth(t, meshFollows) }

func meshFollows(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	want := l.state(h, model.Taken)
	run(t, h.task, "ip addr add 172.18.0.77/16 dev eth1")
	run(t, h.task, "ip route change default via 172.18.0.1 src 172.18.0.77")
	if len(kernel.Diff(h.dump(t), want)) == 0 {
		t.Fatal("another default source, and no difference is seen")
	}
	h.lead(t, want)
	if ops := kernel.Diff(h.dump(t), want); len(ops) > 0 {
		t.Fatalf("still to do: %v", ops)
	}
	l.want(t, "UDP", askUDP, l.client, h.at(keepPort), "192.0.2.4")
	if s := run(t, h.task, "nft list table ip sluice"); !strings.Contains(s, "172.18.0.77") {
		t.Errorf("the table does not have the new one:\n%s", s)
	}
}

// A client that sends all the time gets to what is published now, not to what was
// there when it began.
func TestMeshTakesOverOldFlows(t *testing.T) {
	l := newMeshLab(t, false, "dr")
	h := l.hosts[0]
	base := l.state(h, model.Taken)
	delete(base, ranged(model.UDP, rangeLo, rangeHi))
	h.lead(t, base)
	for _, c := range []struct {
		port  int
		key   kernel.Key
		value kernel.Value
	}{
		{88, kernel.MeshPort{Proto: model.UDP, Port: 88}, kernel.MeshPortSpec{Alias: h.alias(100), To: 80}},
		{rangeHi, ranged(model.UDP, rangeLo, rangeHi), kernel.MeshRangeSpec{Alias: h.alias(105)}},
	} {
		t.Run(c.key.String(), func(t *testing.T) {
			conn, err := dialMesh(l.client, "udp4", "", h.at(c.port))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if a, err := question(conn); !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatalf("before: %v, %v; want it refused", a, err)
			}
			want := maps.Clone(base)
			want[c.key] = c.value
			h.lead(t, want)
			if a, err := question(conn); err != nil || a.server == "" {
				t.Fatalf("published: %v, %v", a, err)
			}
			h.lead(t, base)
			if a, err := question(conn); !errors.Is(err, unix.ECONNREFUSED) {
				t.Fatalf("afterwards: %v, %v; want it refused", a, err)
			}
		})
	}
}

// What leads into a network is no network of the host.
func TestMeshIsNoPrefixOfTheHost(t *testing.T) {
	h := newMeshLab(t, false, "dr").hosts[0]
	all, err := h.k.HostPrefixes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if p.Overlaps(meshSubnet) || p.Overlaps(meshAliases) {
			t.Errorf("%s is taken for one of the host's", p)
		}
	}
}
