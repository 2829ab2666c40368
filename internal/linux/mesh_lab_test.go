package linux

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

// The routing mesh in the hardest of the usual settings: reverse paths are checked
// strictly everywhere, the policy of FORWARD is DROP, and both tasks have the same
// address on their host's docker_gwbridge.
//
//	client ── LAN ── host 1: entry, task a
//	far ─ router ┘ ├ host 2: entry, task b
//	    (MTU 1200) └ host 3: entry without a task
type meshLab struct {
	client, far *netnstest.NS
	hosts       []*meshHost // 1, 2, 3
	ipvs        bool        // which balances, not nftables
}

// onBoth runs a test with either balancer.
func onBoth(t *testing.T, test func(t *testing.T, l *meshLab)) {
	t.Helper()
	t.Run("nft", func(t *testing.T) { test(t, newMeshLab(t, false)) })
	t.Run("ipvs", func(t *testing.T) {
		netnstest.Need(t, netnstest.IPVS)
		test(t, newMeshLab(t, true))
	})
}

type meshHost struct {
	n       int
	k       *Kernel
	w       world
	addr    netip.Addr // on the LAN
	task    *netnstest.NS
	sandbox string
	mesh    netip.Addr
	block   netip.Prefix
}

const (
	meshPatience = 3 * time.Second // answers come within milliseconds
	meshMTU      = 1450
	// Published ports, and what they lead to.
	keepPort, ownPort, closedPort, bulkPort = 81, 82, 83, 84
	masqPort, emptyPort, allowPort          = 85, 86, 87
)

var (
	meshSubnet  = netip.MustParsePrefix("10.255.0.0/20")
	meshGateway = netip.MustParseAddr("10.255.0.1")
	meshAliases = netip.MustParsePrefix("250.0.0.0/8")
	gwbridge    = netip.MustParseAddr("172.18.0.3") // of both tasks
)

func taskAddr(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 0, byte(2 + n)}) }

// alias is the k-th of an entry.
func (h *meshHost) alias(k byte) netip.Addr {
	b := h.block.Addr().As4()
	b[3] = k
	return netip.AddrFrom4(b)
}

// state is what a node of the network needs, all of it an entry.
func (l *meshLab) state(h *meshHost) kernel.State {
	router := model.MACFor(meshGateway)
	end := "slm" + fmt.Sprint(h.n)
	st := kernel.State{
		kernel.Netns{Name: overlay}:                                kernel.NetnsSpec{},
		kernel.Link{NS: overlay, Name: "br0", Kind: kernel.Bridge}: kernel.LinkSpec{Alias: "sluice net", MTU: meshMTU, MAC: router},
		kernel.Link{NS: overlay, Name: "vxlan0", Kind: kernel.VXLAN}: kernel.LinkSpec{
			Alias: "sluice net", MTU: meshMTU, Master: "br0", Quiet: true, VNI: 5000, Port: 4799, Local: h.addr,
		},
		kernel.Addr{NS: overlay, Dev: "br0", Prefix: netip.PrefixFrom(meshGateway, 20)}: kernel.AddrSpec{},

		kernel.Link{NS: overlay, Name: "mesh0", Kind: kernel.Veth}: kernel.LinkSpec{
			Alias: "sluice net", MTU: meshMTU, Master: "br0", Quiet: true, Peer: end, PeerMAC: model.MACFor(h.mesh), Kept: true,
		},
		kernel.FDB{NS: overlay, Dev: "mesh0", MAC: model.MACFor(h.mesh)}:                  kernel.FDBSpec{},
		kernel.Neigh{NS: overlay, Dev: "br0", IP: h.mesh}:                                 kernel.NeighSpec{MAC: model.MACFor(h.mesh)},
		kernel.Route{NS: overlay, Dev: "br0", Prefix: h.block}:                            kernel.RouteSpec{Local: true},
		kernel.Route{NS: overlay, Dev: "br0", Prefix: netip.MustParsePrefix("0.0.0.0/0")}: kernel.RouteSpec{Via: h.mesh},
		kernel.Addr{Dev: end, Prefix: netip.PrefixFrom(h.mesh, 32)}:                       kernel.AddrSpec{},
		kernel.Sysctl{Name: "net.ipv4.conf." + end + ".route_localnet"}:                   kernel.SysctlSpec{Value: "1"},
		kernel.Neigh{Dev: end, IP: meshGateway}:                                           kernel.NeighSpec{MAC: router},
		kernel.Route{Dev: end, Prefix: h.block}:                                           kernel.RouteSpec{Via: meshGateway},
		kernel.Forward{}:                                                                  kernel.ForwardSpec{Devices: "slm"},
		kernel.BackTable{NS: overlay}:                                                     kernel.BackTableSpec{Router: router, Pool: meshAliases, Bits: 20},
		kernel.MeshTable{}:                                                                kernel.MeshTableSpec{Devices: "slm"},
		kernel.MeshNet{Dev: end}:                                                          kernel.MeshNetSpec{Source: h.mesh, Subnet: meshSubnet},
		kernel.MeshMasq{Alias: h.alias(102)}:                                              kernel.MeshMasqSpec{},
		kernel.MeshAllow{Alias: h.alias(103)}:                                             kernel.MeshAllowSpec{From: "198.51.100.0/24"},
	}
	for name, value := range map[string]string{
		"net.bridge.bridge-nf-call-iptables": "0", "net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1",
		"net.ipv4.conf.all.rp_filter": "0", "net.ipv4.conf.default.rp_filter": "0", "net.ipv4.icmp_ratelimit": "0",
		"net.ipv4.conf.all.send_redirects": "0", "net.ipv4.conf.default.send_redirects": "0",
	} {
		st[kernel.Sysctl{NS: overlay, Name: name}] = kernel.SysctlSpec{Value: value}
	}
	remote := func(ip netip.Addr, at netip.Addr) {
		st[kernel.Neigh{NS: overlay, Dev: "br0", IP: ip}] = kernel.NeighSpec{MAC: model.MACFor(ip)}
		st[kernel.FDB{NS: overlay, Dev: "vxlan0", MAC: model.MACFor(ip)}] = kernel.FDBSpec{VTEP: at}
	}
	for _, o := range l.hosts {
		st[kernel.Back{NS: overlay, Block: o.block.Addr()}] = kernel.BackSpec{MAC: model.MACFor(o.mesh)}
		if o != h {
			remote(o.mesh, o.addr)
		}
		if o != h && o.task != nil {
			remote(taskAddr(o.n), o.addr)
		}
	}
	if h.task != nil {
		own := taskAddr(h.n)
		st[kernel.Link{NS: overlay, Name: "slv1", Kind: kernel.Veth}] = kernel.LinkSpec{
			Alias: "sluice ep", MTU: meshMTU, Master: "br0", Peer: "slc1", PeerMAC: model.MACFor(own),
		}
		st[kernel.TaskTable{Sandbox: h.sandbox}] = kernel.TaskTableSpec{}
		st[kernel.TaskRoute{Sandbox: h.sandbox, Addr: own}] = kernel.TaskRouteSpec{Subnet: meshSubnet, Gateway: meshGateway, Loose: true}
		st[kernel.TaskMesh{Sandbox: h.sandbox, Addr: own}] = kernel.TaskMeshSpec{
			Pool: meshAliases, MAC: model.MACFor(own), Subnet: meshSubnet, UDP: true,
		}
	}
	for k, slots := range map[byte]int{100: 2, 101: 0, 102: 2, 103: 2} { // kept, without backends, masqueraded, for some
		if l.ipvs {
			h.byIPVS(st, h.alias(k), slots)
		} else {
			h.byNFT(st, h.alias(k), slots)
		}
	}
	for _, p := range []struct {
		port  uint16
		alias byte
		to    uint16
	}{
		{keepPort, 100, 80}, {ownPort, 100, 1053}, {closedPort, 100, 9}, {bulkPort, 100, 9000},
		{emptyPort, 101, 80}, {masqPort, 102, 80}, {allowPort, 103, 80},
	} {
		for _, proto := range []model.Proto{model.TCP, model.UDP} {
			st[kernel.MeshPort{Proto: proto, Port: p.port}] = kernel.MeshPortSpec{Alias: h.alias(p.alias), To: p.to}
		}
	}
	return st
}

// byNFT has the bridge's table balance an alias, over the first n tasks.
func (h *meshHost) byNFT(st kernel.State, alias netip.Addr, n int) {
	st[kernel.BridgeTable{NS: overlay}] = kernel.BridgeTableSpec{Router: model.MACFor(meshGateway), Uplink: "vxlan0"}
	if h.task != nil {
		st[kernel.Member{NS: overlay, IP: taskAddr(h.n)}] = kernel.MemberSpec{MAC: model.MACFor(taskAddr(h.n))}
	}
	st[kernel.VIP{NS: overlay, IP: alias}] = kernel.VIPSpec{Scheduler: "rr", Slots: n}
	for i := range n {
		mac := model.MACFor(taskAddr(i + 1))
		st[kernel.Slot{NS: overlay, VIP: alias, Slot: i}] = kernel.SlotSpec{MAC: mac}
		st[kernel.Alive{NS: overlay, VIP: alias, MAC: mac}] = kernel.AliveSpec{}
	}
}

// byIPVS has IPVS balance it. The stack refuses what no service is for.
func (h *meshHost) byIPVS(st kernel.State, alias netip.Addr, n int) {
	if n == 0 {
		return
	}
	b := alias.As4()
	mark := uint32(b[3])
	st[kernel.MarkTable{NS: overlay}] = kernel.MarkTableSpec{}
	st[kernel.Mark{NS: overlay, VIP: alias}] = kernel.MarkSpec{Mark: mark}
	st[kernel.IPVSService{NS: overlay, Mark: mark}] = kernel.IPVSServiceSpec{Scheduler: "rr"}
	for i := range n {
		st[kernel.IPVSDest{NS: overlay, Mark: mark, IP: taskAddr(i + 1)}] = kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}
	}
}

// newMeshLab makes all of it, as the engine and the plugin do.
func newMeshLab(t *testing.T, byIPVS bool) *meshLab {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.VXLAN, netnstest.IPTables, netnstest.NFTables)
	lan := netnstest.LAN(t, 5)
	l := &meshLab{client: lan[3].NS, far: netnstest.New(t), ipvs: byIPVS}
	router := lan[4]
	strict := func(ns *netnstest.NS) {
		ns.Must(func() error {
			return errors.Join(writeSysctl("net.ipv4.conf.all.rp_filter", "1"), writeSysctl("net.ipv4.conf.default.rp_filter", "1"))
		})
	}
	forward := func(ns *netnstest.NS) { ns.Must(func() error { return writeSysctl("net.ipv4.ip_forward", "1") }) }
	// The far client knows nothing of the narrow way: it says that it takes 1500.
	run(t, router.NS, "ip link add far mtu 1200 type veth peer name eth0 mtu 1500 netns %s", l.far.Path())
	run(t, router.NS, "ip addr add 198.51.100.1/24 dev far")
	run(t, router.NS, "ip link set far up")
	run(t, l.far, "ip addr add 198.51.100.2/24 dev eth0")
	run(t, l.far, "ip link set eth0 up")
	run(t, l.far, "ip route add default via 198.51.100.1")
	forward(router.NS)
	for i := range 3 {
		n := i + 1
		h := &meshHost{
			n: n, addr: lan[i].Addr, mesh: netip.AddrFrom4([4]byte{10, 255, 15, byte(n)}),
			block: netip.PrefixFrom(netip.AddrFrom4([4]byte{250, 0, byte(n * 16), 0}), 20),
		}
		strict(lan[i].NS)
		forward(lan[i].NS)
		h.k, h.w = newKernel(t, lan[i].NS, nft.Tables{})
		h.k.cfg.IPVS = ipvs.New()
		run(t, h.w.host, "ip route add 198.51.100.0/24 via %s", router.Addr)
		run(t, h.w.host, "ip link add docker_gwbridge type bridge")
		run(t, h.w.host, "ip addr add 172.18.0.1/16 dev docker_gwbridge")
		run(t, h.w.host, "ip link set docker_gwbridge up")
		run(t, h.w.host, "iptables -P FORWARD DROP")
		run(t, h.w.host, "iptables -N DOCKER-USER")
		run(t, h.w.host, "iptables -A DOCKER-USER -j RETURN")
		run(t, h.w.host, "iptables -A FORWARD -j DOCKER-USER")
		if n < 3 {
			h.task = netnstest.New(t)
			strict(h.task)
			h.sandbox = h.task.Path()
		}
		l.hosts = append(l.hosts, h)
	}
	for _, h := range l.hosts {
		want := l.state(h)
		first := maps.Clone(want) // the engine attaches a container before anything is done in it
		maps.DeleteFunc(first, func(k kernel.Key, _ kernel.Value) bool { return k.Phase() == kernel.PhaseTask })
		h.lead(t, first)
		if h.task != nil {
			run(t, h.w.host, "ip link set slc1 netns %s", h.task.Path())
			run(t, h.task, "ip link set slc1 name eth0 up")
			run(t, h.task, "ip addr add %s/20 dev eth0", taskAddr(h.n))
			run(t, h.w.host, "ip link add gw1 type veth peer name eth1 netns %s", h.task.Path())
			run(t, h.w.host, "ip link set gw1 master docker_gwbridge up")
			run(t, h.task, "ip addr add %s/16 dev eth1", gwbridge)
			run(t, h.task, "ip link set eth1 up")
			run(t, h.task, "ip route add default via 172.18.0.1")
		}
		h.lead(t, want)
		if have := h.dump(t); len(kernel.Diff(have, want)) > 0 {
			t.Fatalf("host %d, still to do: %v", h.n, kernel.Diff(have, want))
		}
	}
	for i, name := range []string{"a", "b"} {
		serveMesh(t, l.hosts[i].task, name, taskAddr(i+1))
	}
	// The kernel tells a bridge of a port's carrier from a work queue: first packets
	// may come too early.
	for _, h := range l.hosts {
		for late := time.Now().Add(10 * time.Second); ; {
			got := map[string]bool{}
			for range 2 {
				a, err := askTCP(l.client, "", h.at(keepPort))
				if err == nil {
					got[a.server] = true
				}
			}
			if len(got) == 2 {
				break
			}
			if time.Now().After(late) {
				t.Fatalf("host %d does not lead to both tasks: %v", h.n, got)
			}
		}
	}
	return l
}

func (h *meshHost) at(port int) string { return fmt.Sprintf("%s:%d", h.addr, port) }

func (h *meshHost) dump(t *testing.T) kernel.State {
	t.Helper()
	var sandboxes []string
	if h.sandbox != "" {
		sandboxes = []string{h.sandbox}
	}
	have, err := h.k.Dump(t.Context(), sandboxes)
	if err != nil {
		t.Fatal(err)
	}
	return have
}

// lead applies the difference to want once.
func (h *meshHost) lead(t *testing.T, want kernel.State) {
	t.Helper()
	ops := kernel.Diff(h.dump(t), want)
	for i, err := range h.k.Apply(t.Context(), ops) {
		if err != nil {
			t.Fatalf("host %d: %s: %v", h.n, ops[i], err)
		}
	}
}

// said is who answered, and as whom it saw the client.
type said struct{ server, client string }

// serveMesh starts the servers of a task: to any address at port 80, to its own
// at 1053, and one that sends a megabyte at 9000.
func serveMesh(t *testing.T, task *netnstest.NS, name string, own netip.Addr) {
	t.Helper()
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	for _, at := range []string{"0.0.0.0:80", own.String() + ":1053", "0.0.0.0:9000"} {
		task.Must(func() error {
			ln, err := net.Listen("tcp4", at)
			if err != nil {
				return err
			}
			pc, err := net.ListenPacket("udp4", at)
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close(); pc.Close() })
			wg.Go(func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					wg.Go(func() {
						defer c.Close()
						c.SetDeadline(time.Now().Add(10 * meshPatience))
						fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
						if strings.HasSuffix(at, ":9000") {
							c.Write(make([]byte, 1<<20))
							return
						}
						io.Copy(c, c)
					})
				}
			})
			wg.Go(func() {
				buf := make([]byte, 1<<16)
				for {
					_, from, err := pc.ReadFrom(buf)
					if err != nil {
						return
					}
					pc.WriteTo(fmt.Appendf(nil, "%s %s", name, from), from)
				}
			})
			return nil
		})
	}
}

// dialMesh connects from a namespace, by the port of local if it is given.
func dialMesh(from *netnstest.NS, network, local, to string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: meshPatience, Control: func(_, _ string, rc syscall.RawConn) error {
		var err error
		return errors.Join(rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), err)
	}}
	if local != "" && network == "tcp4" {
		d.LocalAddr, err = net.ResolveTCPAddr(network, local)
	} else if local != "" {
		d.LocalAddr, err = net.ResolveUDPAddr(network, local)
	}
	if err != nil {
		return nil, err
	}
	err = from.Do(func() error {
		c, err = d.DialContext(context.Background(), network, to)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(meshPatience))
}

func askTCP(from *netnstest.NS, local, to string) (said, error) {
	c, err := dialMesh(from, "tcp4", local, to)
	if err != nil {
		return said{}, err
	}
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	return parseSaid(line), err
}

func askUDP(from *netnstest.NS, local, to string) (said, error) {
	c, err := dialMesh(from, "udp4", local, to)
	if err != nil {
		return said{}, err
	}
	defer c.Close()
	return question(c)
}

func question(c net.Conn) (said, error) {
	if _, err := c.Write([]byte("who")); err != nil {
		return said{}, err
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	return parseSaid(string(buf[:n])), err
}

func parseSaid(s string) said {
	server, client, _ := strings.Cut(strings.TrimSpace(s), " ")
	return said{server, client}
}
