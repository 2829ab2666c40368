package nft_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

// The lab is a network on two hosts, each a namespace with a bridge and a VXLAN
// device, and tasks in namespaces of their own:
//
//	a b c ─veth─▶ br0 ─▶ vxlan0 ═▶ vxlan0 ◀─ br0 ◀─veth─ d
//	└──────── one ────────────┘     └─────── two ─────────┘
type lab struct {
	t       testing.TB
	variant variant // of the first host
	one     *host
	two     *host
	hosts   []*host
	tasks   map[string]*task
	extra   []*task // more addresses of tasks, see guests
	bare    bool    // no task is prepared in any way
}

type host struct {
	name     string
	network  model.Network
	datapath string
	vtep     netip.Addr
	noTunnel bool // the kernel has no IPIP devices
	fd       int
	h        *netlink.Handle
	have     kernel.State   // what the last apply made
	ipvs     *ipvs.Balancer // nil: nftables balances
}

type task struct {
	name string
	hit  int // connections of hits so far
	on   *host
	fd   int
	h    *netlink.Handle
	ip   netip.Addr
	mac  model.MAC
	have kernel.State
}

const (
	routerMAC = "02:42:0a:ff:00:01"
	uplink    = "vxlan0"
	mtu       = 1450 // 1500 without VXLAN's 50
	vxlanPort = 4799
)

// patience is how long a test waits for an answer that must come.
const patience = 5 * time.Second

// newNetns makes a network namespace, gone when the test ends.
func newNetns(t testing.TB) int {
	t.Helper()
	netnstest.Need(t, netnstest.Root)
	return netnstest.New(t).FD()
}

// try runs f on a thread inside a namespace.
func try(fd int, f func() error) error {
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := netns.Set(netns.NsHandle(fd)); err != nil {
			ch <- err
			return
		}
		ch <- f()
	}()
	return <-ch
}

func do(t testing.TB, fd int, f func() error) {
	t.Helper()
	if err := try(fd, f); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newLab makes the network with tasks a, b, c on one host and d on the other. The
// other has a datapath of its own if a second variant is given.
func newLab(t testing.TB, v variant, other ...variant) *lab {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.VXLAN)
	l := &lab{
		t: t, variant: v, one: newHost(t, labNetwork(v), "192.0.2.1"), two: newHost(t, labNetwork(append(other, v)[0]), "192.0.2.2"),
		tasks: map[string]*task{},
	}
	l.hosts = []*host{l.one, l.two}
	// The wire between the hosts.
	must(t, l.one.h.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "wire", MTU: 1500}, PeerName: "wire", PeerNamespace: netlink.NsFd(l.two.fd),
	}))
	for _, h := range l.hosts {
		wire, err := h.h.LinkByName("wire")
		must(t, err)
		addr, _ := netlink.ParseAddr(h.vtep.String() + "/24")
		must(t, h.h.AddrAdd(wire, addr))
		must(t, h.h.LinkSetUp(wire))
		br, err := h.h.LinkByName("br0")
		must(t, err)
		vx := &netlink.Vxlan{
			LinkAttrs: netlink.LinkAttrs{Name: uplink, MTU: mtu, MasterIndex: br.Attrs().Index},
			VxlanId:   int(h.network.VNI), Port: vxlanPort, SrcAddr: h.vtep.AsSlice(), Learning: false,
		}
		must(t, h.h.LinkAdd(vx))
		must(t, h.h.LinkSetLearning(vx, false))
		must(t, h.h.LinkSetUp(vx))
	}
	for i, name := range []string{"a", "b", "c", "d"} {
		on := l.one
		if name == "d" {
			on = l.two
		}
		l.addTask(name, on, i+2)
	}
	return l
}

// in is the same lab in a subtest, which fails by itself.
func (l *lab) in(t testing.TB) *lab {
	sub := *l
	sub.t = t
	return &sub
}

// addTask attaches a namespace with address 10.255.0.n.
func (l *lab) addTask(name string, on *host, n int) *task {
	t := l.t
	k := newTask(t, name, on, netip.AddrFrom4([4]byte{10, 255, 0, byte(n)}))
	k.join(t, "eth0")
	// Remote tasks are known statically, as the control plane makes them.
	for _, o := range l.tasks {
		if o.on != on {
			l.introduce(k, o)
			l.introduce(o, k)
		}
	}
	l.tasks[name] = k
	return k
}

// newTask makes a namespace that is on no network yet.
func newTask(t testing.TB, name string, on *host, ip netip.Addr) *task {
	k := &task{name: name, on: on, fd: newNetns(t), ip: ip, mac: model.MACFor(ip), have: kernel.State{}}
	var err error
	k.h, err = netlink.NewHandleAt(netns.NsHandle(k.fd))
	must(t, err)
	t.Cleanup(k.h.Close)
	return k
}

// port is the name of the bridge's port that a task is attached by.
func (k *task) port() string { return overlay.HostEnd(model.EndpointID(k.name)) }

// join attaches a task to its host's bridge by device dev, with its address.
func (k *task) join(t testing.TB, dev string) {
	t.Helper()
	on := k.on
	br, err := on.h.LinkByName("br0")
	must(t, err)
	must(t, on.h.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: k.port(), MTU: mtu, MasterIndex: br.Attrs().Index},
		PeerName:  dev, PeerMTU: mtu, PeerHardwareAddr: k.mac[:], PeerNamespace: netlink.NsFd(k.fd),
	}))
	port, err := on.h.LinkByName(k.port())
	must(t, err)
	must(t, on.h.LinkSetUp(port))
	eth, err := k.h.LinkByName(dev)
	must(t, err)
	addr, _ := netlink.ParseAddr(k.ip.String() + "/20")
	must(t, k.h.AddrAdd(eth, addr))
	must(t, k.h.LinkSetUp(eth))
}

// introduce makes a remote task reachable: who is to send to it knows its MAC.
func (l *lab) introduce(k, remote *task) {
	t := l.t
	eth, err := k.h.LinkByName("eth0")
	must(t, err)
	must(t, k.h.NeighSet(&netlink.Neigh{LinkIndex: eth.Attrs().Index, IP: remote.ip.AsSlice(), HardwareAddr: remote.mac[:], State: netlink.NUD_PERMANENT}))
	// So does its host's stack, which sends what IPVS has chosen.
	br, err := k.on.h.LinkByName("br0")
	must(t, err)
	must(t, k.on.h.NeighSet(&netlink.Neigh{LinkIndex: br.Attrs().Index, IP: remote.ip.AsSlice(), HardwareAddr: remote.mac[:], State: netlink.NUD_PERMANENT}))
	vx, err := k.on.h.LinkByName(uplink)
	must(t, err)
	fdb := netlink.Neigh{LinkIndex: vx.Attrs().Index, Family: unix.AF_BRIDGE, HardwareAddr: remote.mac[:], State: netlink.NUD_PERMANENT}
	master := fdb
	fdb.IP, fdb.Flags = remote.on.vtep.AsSlice(), netlink.NTF_SELF
	must(t, k.on.h.NeighSet(&fdb))
	master.Flags = netlink.NTF_MASTER
	master.State = netlink.NUD_NOARP
	must(t, k.on.h.NeighSet(&master))
}

func (h *host) dump(t testing.TB) kernel.State {
	t.Helper()
	st, err := nft.Tables{}.DumpBridge(h.fd, h.name)
	must(t, err)
	if h.ipvs != nil {
		more, err := h.ipvs.Dump(h.fd, h.name)
		must(t, err)
		maps.Copy(st, more)
	}
	return st
}

func (h *host) apply(t testing.TB, want kernel.State) {
	t.Helper()
	for ops := kernel.Diff(h.have, want); len(ops) > 0; {
		n := slices.IndexFunc(ops, func(o kernel.Op) bool { return kernel.IsIPVS(o.Key) != kernel.IsIPVS(ops[0].Key) })
		if n < 0 {
			n = len(ops)
		}
		if kernel.IsIPVS(ops[0].Key) {
			must(t, errors.Join(h.ipvs.Apply(h.fd, h.name, ops[:n])...))
		} else {
			must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops[:n]))
		}
		ops = ops[n:]
	}
	// The kernel makes the hash table of a map larger in the background, and a walk
	// meanwhile may pass elements by: what is missing is looked for again.
	have := h.dump(t)
	for late := time.Now().Add(patience); len(have) < len(want) && time.Now().Before(late); {
		have = h.dump(t)
	}
	same(t, have, want)
	h.have = want
}

// sandbox stands for the path of a task's namespace.
func (k *task) sandbox() string { return "/" + k.name }

// translates reports whether a task's own table translates a VIP, as read back.
func (k *task) translates(vip netip.Addr) bool {
	return k.have[kernel.TaskVIP{Sandbox: k.sandbox(), VIP: vip}] != nil
}

// dump reads a task's table, and its tunnels if it may have some.
func (k *task) dump(t testing.TB, tunnels bool) kernel.State {
	t.Helper()
	st, err := nft.Tables{}.DumpTask(k.fd, k.sandbox())
	must(t, err)
	if tunnels {
		maps.Copy(st, k.tunnels(t))
	}
	return st
}

func (k *task) apply(t testing.TB, want kernel.State) {
	t.Helper()
	var tables, tunnels []kernel.Op
	for _, o := range kernel.Diff(k.have, want) {
		if isTunnel(o.Key) {
			tunnels = append(tunnels, o)
		} else {
			tables = append(tables, o)
		}
	}
	must(t, nft.Tables{}.ApplyTask(k.fd, k.sandbox(), tables))
	k.tunnelOps(t, tunnels)
	same(t, k.dump(t, hasTunnel(want) || hasTunnel(k.have)), want)
	k.have = want
}

func isTunnel(key kernel.Key) bool {
	_, ok := key.(kernel.TaskTunnel)
	return ok
}

func hasTunnel(st kernel.State) bool {
	for key := range st {
		if isTunnel(key) {
			return true
		}
	}
	return false
}

func same(t testing.TB, have, want kernel.State) {
	t.Helper()
	if !maps.Equal(have, want) {
		var ops strings.Builder
		for _, o := range kernel.Diff(have, want) {
			fmt.Fprintln(&ops, o)
		}
		t.Fatalf("dump differs from what was applied; it would take:\n%s", ops.String())
	}
}

// run runs a command inside a namespace.
func run(t testing.TB, fd int, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("missing: %s (%v)", name, err)
	}
	var out []byte
	err := try(fd, func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// serve starts a TCP and a UDP server. To every connection, and to every
// datagram with at most 64 octets, it says its name and the client's address;
// then it echoes.
func (k *task) serve(t testing.TB, address string) {
	t.Helper()
	var wg sync.WaitGroup
	do(t, k.fd, func() error {
		ln, err := net.Listen("tcp4", address)
		if err != nil {
			return err
		}
		pc, err := net.ListenPacket("udp4", address)
		if err != nil {
			return err
		}
		var mu sync.Mutex // guards conns
		conns := map[net.Conn]bool{}
		t.Cleanup(func() {
			ln.Close()
			pc.Close()
			mu.Lock()
			for c := range conns {
				c.Close()
			}
			mu.Unlock()
			wg.Wait()
		})
		wg.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				mu.Lock()
				conns[c] = true
				mu.Unlock()
				wg.Go(func() {
					defer c.Close()
					fmt.Fprintf(c, "%s %s\n", k.name, c.RemoteAddr())
					io.Copy(c, c)
				})
			}
		})
		wg.Go(func() {
			buf := make([]byte, 1<<16)
			for {
				n, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				if n > 64 {
					pc.WriteTo(buf[:n], from)
				} else {
					fmt.Fprintf(udpTo{pc, from}, "%s %s", k.name, from)
				}
			}
		})
		return nil
	})
}

type udpTo struct {
	pc net.PacketConn
	to net.Addr
}

func (u udpTo) Write(b []byte) (int, error) { return u.pc.WriteTo(b, u.to) }

// answer is who answered and as whom it saw the client.
type answer struct{ server, client string }

func parseAnswer(s string) answer {
	server, client, _ := strings.Cut(strings.TrimSpace(s), " ")
	return answer{server, client}
}

// conn is an open connection, its greeting read.
type conn struct {
	net.Conn
	r *bufio.Reader
	answer
}

// dial connects from a task. local is "" or the address to bind to.
func (k *task) dial(local, address string) (*conn, error) {
	var c *conn
	err := try(k.fd, func() error {
		d := net.Dialer{Timeout: patience, Control: reuse}
		if local != "" {
			la, err := net.ResolveTCPAddr("tcp4", local)
			if err != nil {
				return err
			}
			d.LocalAddr = la
		}
		nc, err := d.DialContext(context.Background(), "tcp4", address)
		if err != nil {
			return err
		}
		c, err = greeted(nc)
		return err
	})
	return c, err
}

// greeted reads the greeting of a new connection.
func greeted(nc net.Conn) (*conn, error) {
	nc.SetDeadline(time.Now().Add(patience))
	c := &conn{Conn: nc, r: bufio.NewReader(nc)}
	line, err := c.r.ReadString('\n')
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("greeting: %w", err)
	}
	c.answer = parseAnswer(line)
	return c, nil
}

// echo sends a line and reads it back.
func (c *conn) echo(text string) error {
	c.SetDeadline(time.Now().Add(patience))
	if _, err := fmt.Fprintln(c, text); err != nil {
		return err
	}
	got, err := c.r.ReadString('\n')
	if err != nil {
		return err
	}
	if got != text+"\n" {
		return fmt.Errorf("echo of %q is %q", text, got)
	}
	return nil
}

// reset closes with RST, which leaves no TIME_WAIT.
func (c *conn) reset() {
	c.Conn.(*net.TCPConn).SetLinger(0)
	c.Close()
}

func reuse(_, _ string, rc syscall.RawConn) error {
	var err error
	if e := rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }); e != nil {
		return e
	}
	return err
}

// udp opens an unconnected UDP socket in a task.
func (k *task) udp(t testing.TB, local string) net.PacketConn {
	t.Helper()
	var pc net.PacketConn
	do(t, k.fd, func() (err error) {
		pc, err = net.ListenPacket("udp4", local)
		return err
	})
	t.Cleanup(func() { pc.Close() })
	return pc
}

// ask sends a datagram and returns the answer, which must come from where it was sent.
func ask(pc net.PacketConn, address string, msg []byte) ([]byte, error) {
	to, err := net.ResolveUDPAddr("udp4", address)
	if err != nil {
		return nil, err
	}
	if _, err := pc.WriteTo(msg, to); err != nil {
		return nil, err
	}
	buf := make([]byte, 1<<16)
	pc.SetReadDeadline(time.Now().Add(patience))
	n, from, err := pc.ReadFrom(buf)
	if err != nil {
		return nil, err
	}
	if from.String() != to.String() {
		return nil, fmt.Errorf("asked %s, answered by %s", to, from)
	}
	return buf[:n], nil
}
