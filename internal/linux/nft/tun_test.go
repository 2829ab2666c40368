package nft_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux"
	"sluice/internal/netnstest"
	lb "sluice/lb/service"
)

// The way of a packet through a tunnel:
//
//	a ─▶ br0 ─▶ stack: IPVS ─▶ IPIP to b ─▶ br0 ─▶ b's eth0 ─▶ slt… ─▶ VIP → own address ─▶ b
//	a ◀─────────────────────────────── br0 ◀─ b's eth0 ◀──────────────────────────────────┘
//
// Through the hosts' tunnel (VXLAN) just so.

// byTunnel is IPVS that sends packets to backends in others.
func byTunnel() variant { return as(lb.IPVS, lb.TUN) }

// tunnelOps makes and deletes tunnels of a task, as its node does, and reads them.
func (k *task) tunnelOps(t testing.TB, ops []kernel.Op) {
	t.Helper()
	if len(ops) == 0 {
		return
	}
	ops = slices.Clone(ops)
	for i := range ops {
		key := ops[i].Key.(kernel.TaskTunnel)
		key.Sandbox = k.path()
		ops[i].Key = key
	}
	k.asNode(t, func(node *linux.Kernel) error { return errors.Join(node.Apply(t.Context(), ops)...) })
}

// tunnels are those that the task's node reads.
func (k *task) tunnels(t testing.TB) kernel.State {
	t.Helper()
	out := kernel.State{}
	k.asNode(t, func(node *linux.Kernel) error {
		st, err := node.Dump(t.Context(), []string{k.path()})
		for key, v := range st {
			if key, ok := key.(kernel.TaskTunnel); ok {
				out[kernel.TaskTunnel{Sandbox: k.sandbox(), Addr: key.Addr}] = v
			}
		}
		return err
	})
	return out
}

// asNode lends f the kernel of the task's host.
func (k *task) asNode(t testing.TB, f func(*linux.Kernel) error) {
	t.Helper()
	node, err := linux.New(linux.Config{NetnsDir: netnstest.Dir(t), HostNetns: fmt.Sprintf("/proc/self/fd/%d", k.on.fd), NoFilter: true})
	must(t, err)
	defer func() { must(t, node.Close()) }()
	must(t, f(node))
}

// path is where the task's namespace can be opened.
func (k *task) path() string { return fmt.Sprintf("/proc/self/fd/%d", k.fd) }

// tunnelled is how many packets a task has had out of its tunnel.
func (k *task) tunnelled(t testing.TB) uint64 {
	t.Helper()
	links, err := k.h.LinkList()
	must(t, err)
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "slt") {
			return l.Attrs().Statistics.RxPackets
		}
	}
	t.Fatalf("task %s has no tunnel", k.name)
	return 0
}

// setRPFilter sets what a host may have set for its containers.
func (k *task) setRPFilter(t testing.TB, value string) {
	t.Helper()
	do(t, k.fd, func() error {
		for _, dev := range []string{"all", "default", "eth0"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+dev+"/rp_filter", []byte(value), 0); err != nil {
				return err
			}
		}
		return nil
	})
}

// Whatever a host's rp_filter is, a backend here and one elsewhere get the packets
// by their tunnels and see the client's own address.
func TestTunnelReachesEveryBackend(t *testing.T) {
	for _, rp := range []string{"0", "1", "2"} {
		t.Run("rp_filter "+rp, func(t *testing.T) {
			l := newLab(t, byTunnel())
			for _, k := range l.tasks {
				k.setRPFilter(t, rp)
			}
			l.serveAll("0.0.0.0:80")
			l.set(service{vip: vip1, ready: l.names("bd")})
			a := l.tasks["a"]
			wantHits(t, l.hits(a, vip1+":80", 4), map[string]int{"b": 2, "d": 2})
			c, err := a.dial("", vip1+":80")
			must(t, err)
			if c.client != c.LocalAddr().String() {
				t.Errorf("client %s was seen as %s", c.LocalAddr(), c.client)
			}
			c.Close()
			got := map[string]int{}
			for range 4 {
				pc := a.udp(t, "")
				b, err := ask(pc, vip1+":80", []byte("?"))
				must(t, err)
				ans := parseAnswer(string(b))
				port := netip.MustParseAddrPort(pc.LocalAddr().String()).Port()
				if want := netip.AddrPortFrom(a.ip, port).String(); ans.client != want {
					t.Errorf("client %s was seen as %s", want, ans.client)
				}
				got[ans.server]++
			}
			wantHits(t, got, map[string]int{"b": 2, "d": 2})
			for _, name := range []string{"b", "d"} {
				if n := l.tasks[name].tunnelled(t); n < 2*5 { // two connections and two datagrams, at the least
					t.Errorf("%s had %d packets out of its tunnel", name, n)
				}
			}
			// A closed port refuses as the backend itself would.
			for range 2 {
				if _, err := a.dial("", vip1+":81"); err == nil || !strings.Contains(err.Error(), "refused") {
					t.Errorf("closed port: %v, want refused", err)
				}
			}
		})
	}
}

// Who makes a tunnel of its own to a backend gets packets to the VIP through it,
// and no others.
func TestTunnelTakesOnlyWhatIsForTheVIP(t *testing.T) {
	l := newLab(t, byTunnel())
	l.serveAll("0.0.0.0:80")
	l.set(service{vip: vip1, ready: l.names("b")})
	a, b, c := l.tasks["a"], l.tasks["b"], l.tasks["c"]
	wantHits(t, l.hits(a, vip1+":80", 1), map[string]int{"b": 1})

	must(t, c.h.LinkAdd(&netlink.Iptun{
		LinkAttrs: netlink.LinkAttrs{Name: "mine"}, Local: c.ip.AsSlice(), Remote: b.ip.AsSlice(),
	}))
	mine, err := c.h.LinkByName("mine")
	must(t, err)
	must(t, c.h.LinkSetUp(mine))
	pc := c.udp(t, c.ip.String()+":0").(*net.UDPConn)
	// through asks by the tunnel. The answer comes by eth0, from the VIP or from b.
	through := func(to string, wait time.Duration) (string, error) {
		oob := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(mine.Attrs().Index), Spec_dst: c.ip.As4()})
		_, _, err := pc.WriteMsgUDP([]byte("?"), oob, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
		must(t, err)
		must(t, pc.SetReadDeadline(time.Now().Add(wait)))
		buf := make([]byte, 64)
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%s: %s", from, parseAnswer(string(buf[:n])).server), nil
	}
	if got, err := through(vip1+":80", patience); err != nil || got != vip1+":80: b" {
		t.Errorf("to the VIP: %q, %v", got, err)
	}
	for _, to := range []string{b.ip.String() + ":80", l.tasks["d"].ip.String() + ":80"} {
		before := b.tunnelled(t)
		if got, err := through(to, 200*time.Millisecond); err == nil {
			t.Errorf("to %s: %q", to, got)
		}
		if n := b.tunnelled(t) - before; n != 1 {
			t.Errorf("to %s: %d packets came out of b's tunnel, want 1", to, n)
		}
	}
	if got, err := through(vip1+":80", patience); err != nil || got != vip1+":80: b" {
		t.Errorf("to the VIP again: %q, %v", got, err)
	}
	wantHits(t, l.hits(a, vip1+":80", 1), map[string]int{"b": 1})
	// It is that rule which keeps them out.
	run(t, b.fd, "nft", "flush chain ip sluice inner-packet")
	if got, err := through(b.ip.String()+":80", patience); err != nil || got != b.ip.String()+":80: b" {
		t.Errorf("to the backend, without the rule: %q, %v", got, err)
	}
}

// A backend that is a client gets the other one, and one that is alone itself.
func TestTunnelOfAMember(t *testing.T) {
	l := newLab(t, byTunnel())
	l.serveAll("0.0.0.0:80")
	l.set(service{vip: vip1, ready: l.names("bd")})
	wantHits(t, l.hits(l.tasks["b"], vip1+":80", 2), map[string]int{"d": 2})
	l.set(service{vip: vip1, ready: l.names("b")})
	wantHits(t, l.hits(l.tasks["b"], vip1+":80", 2), map[string]int{"b": 2})
}

// The tunnel takes 20 octets of a packet that is as large as the network carries.
func TestTunnelCarriesAMegabyte(t *testing.T) {
	for _, server := range []string{"b", "d"} {
		t.Run(server, func(t *testing.T) {
			l := newLab(t, byTunnel())
			l.serveAll("0.0.0.0:80")
			l.set(service{vip: vip1, ready: l.names(server)})
			c, err := l.tasks["a"].dial("", vip1+":80")
			must(t, err)
			defer c.Close()
			began := time.Now()
			c.SetDeadline(began.Add(4 * patience))
			sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
			done := make(chan error, 1)
			go func() {
				_, err := c.Write(sent)
				done <- err
			}()
			got := make([]byte, len(sent))
			_, err = io.ReadFull(c.r, got)
			must(t, err)
			must(t, <-done)
			if !bytes.Equal(got, sent) {
				t.Error("what came back is something else")
			}
			t.Logf("1 MB there and back in %v, %d packets out of the tunnel", time.Since(began), l.tasks[server].tunnelled(t))
		})
	}
}

// Datagrams as large as the network carries: the client learns by ICMP what the
// tunnel leaves, and sends fragments from then on. The first may be lost.
func TestTunnelCarriesLargeDatagrams(t *testing.T) {
	l := newLab(t, byTunnel())
	l.serveAll("0.0.0.0:80")
	a := l.tasks["a"]
	for _, server := range []string{"b", "d"} {
		l.set(service{vip: vip1, ready: l.names(server)})
		pc := a.udp(t, "")
		const headers = 20 + 8
		for _, size := range []int{mtu - headers - 20, mtu - headers - 19, mtu - headers, 8 << 10, 60 << 10} {
			msg := bytes.Repeat([]byte{'x'}, size)
			// In a while the answer to a question before the last may come; all are alike.
			tries := 0
			for deadline := time.Now().Add(patience); ; tries++ {
				got, err := askFor(pc, vip1+":80", msg, 200*time.Millisecond)
				if err == nil && bytes.Equal(got, msg) {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: %d octets: %v", server, size, err)
				}
			}
			t.Logf("%s: %d octets: lost %d", server, size, tries)
		}
	}
}

// askFor is one question and the time to wait for its answer.
func askFor(pc net.PacketConn, address string, msg []byte, wait time.Duration) ([]byte, error) {
	to, err := net.ResolveUDPAddr("udp4", address)
	if err != nil {
		return nil, err
	}
	if _, err := pc.WriteTo(msg, to); err != nil {
		return nil, err
	}
	buf := make([]byte, 1<<16)
	if err := pc.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	n, _, err := pc.ReadFrom(buf)
	return buf[:n], err
}
