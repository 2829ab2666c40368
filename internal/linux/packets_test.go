package linux

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

// site is a host with one container on the network.
type site struct {
	k    *Kernel
	w    world
	vtep netip.Addr
	ip   netip.Addr // of the container
	task *netnstest.NS
}

const overlay = "sluice-net"

// state is what a host of the network needs in its kernel, and nothing else.
func (s *site) state(remote *site) kernel.State {
	gateway := netip.MustParseAddr("10.255.0.1")
	st := kernel.State{
		kernel.Netns{Name: overlay}: kernel.NetnsSpec{},
		kernel.Sysctl{NS: overlay, Name: "net.bridge.bridge-nf-call-iptables"}: kernel.SysctlSpec{Value: "0"},
		kernel.Sysctl{NS: overlay, Name: "net.ipv6.conf.all.disable_ipv6"}:     kernel.SysctlSpec{Value: "1"},
		kernel.Sysctl{NS: overlay, Name: "net.ipv6.conf.default.disable_ipv6"}: kernel.SysctlSpec{Value: "1"},
		kernel.Link{NS: overlay, Name: "br0", Kind: kernel.Bridge}:             kernel.LinkSpec{Alias: "sluice net", MTU: 1450, MAC: model.MACFor(gateway)},
		kernel.Link{NS: overlay, Name: "vxlan0", Kind: kernel.VXLAN}: kernel.LinkSpec{
			Alias: "sluice net", MTU: 1450, Master: "br0", Quiet: true, VNI: 5000, Port: 4799, Local: s.vtep,
		},
		kernel.Link{NS: overlay, Name: "slv1", Kind: kernel.Veth}: kernel.LinkSpec{
			Alias: "sluice ep", MTU: 1450, Master: "br0", Peer: "slc1", PeerMAC: model.MACFor(s.ip),
		},
		kernel.Addr{NS: overlay, Dev: "br0", Prefix: netip.PrefixFrom(gateway, 20)}: kernel.AddrSpec{},
		kernel.Neigh{NS: overlay, Dev: "br0", IP: remote.ip}:                        kernel.NeighSpec{MAC: model.MACFor(remote.ip)},
		kernel.FDB{NS: overlay, Dev: "vxlan0", MAC: model.MACFor(remote.ip)}:        kernel.FDBSpec{VTEP: remote.vtep},
		kernel.Filter{}:                      kernel.FilterSpec{Port: 4799},
		kernel.FilterPeer{VTEP: remote.vtep}: kernel.FilterPeerSpec{},
	}
	return st
}

// twoSites builds the network on two hosts and gives each container its end, as
// the engine does.
func twoSites(t *testing.T) (a, b *site) {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.VXLAN, netnstest.IPTables)
	lan := netnstest.LAN(t, 2)
	sites := make([]*site, 2)
	for i, h := range lan {
		k, w := newKernel(t, h.NS, nil)
		sites[i] = &site{k: k, w: w, vtep: h.Addr, ip: netip.AddrFrom4([4]byte{10, 255, 0, byte(2 + i)}), task: netnstest.New(t)}
	}
	for i, s := range sites {
		apply(t, s.k, s.state(sites[1-i]))
		run(t, s.w.host, "ip link set slc1 netns %s", s.task.Path())
		run(t, s.task, "ip link set slc1 name eth0 up")
		run(t, s.task, "ip addr add %s/20 dev eth0", s.ip)
	}
	// The kernel tells a bridge of a port's carrier from a work queue: the first
	// packets may come too early. Each try waits for one.
	a, b = sites[0], sites[1]
	var err error
	for range 10 {
		if err = a.talk(b, 1); err == nil {
			return a, b
		}
	}
	t.Fatalf("the hosts do not connect: %v", err)
	return nil, nil
}

// apply leads a kernel to want in one round.
func apply(t testing.TB, k *Kernel, want kernel.State) {
	t.Helper()
	have, err := k.Dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range k.Apply(t.Context(), kernel.Diff(have, want)) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// sent counts the packets that have left through the VXLAN device.
func (s *site) sent(t *testing.T) (n int) {
	t.Helper()
	netnstest.Open(t, filepath.Join(s.w.dir, overlay)).Must(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			if name, counters, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && name == "vxlan0" {
				// Eight counters of reception, then packets sent are the second of the rest.
				_, err := fmt.Sscan(strings.Fields(counters)[9], &n)
				return err
			}
		}
		return fmt.Errorf("no vxlan0 in %s", b)
	})
	return n
}

// talk exchanges datagrams between the containers.
func (s *site) talk(to *site, count int) error {
	return netnstest.Exchange(s.task, to.task, to.ip, count)
}

func TestContainersReachEachOtherAcrossHosts(t *testing.T) {
	a, b := twoSites(t)
	const count = 5
	beforeA, beforeB := a.sent(t), b.sent(t)
	if err := a.talk(b, count); err != nil {
		t.Fatal(err)
	}
	// One packet for each question and each answer: ARP was answered by the bridges.
	if n := a.sent(t) - beforeA; n != count {
		t.Errorf("host A sent %d VXLAN packets for %d questions", n, count)
	}
	if n := b.sent(t) - beforeB; n != count {
		t.Errorf("host B sent %d VXLAN packets for %d answers", n, count)
	}
}

func TestBroadcastStaysOnTheHost(t *testing.T) {
	a, b := twoSites(t)
	before := a.sent(t)
	for range 3 {
		if err := netnstest.Send(a.task, netip.MustParseAddr("10.255.0.99")); err != nil { // needs ARP, which nobody answers
			t.Fatal(err)
		}
	}
	run(t, a.task, "ip neigh replace 10.255.0.98 dev eth0 lladdr 02:42:0a:ff:00:62 nud permanent")
	if err := netnstest.Send(a.task, netip.MustParseAddr("10.255.0.98")); err != nil {
		t.Fatal(err)
	}
	// Sent on the same path later than all the above: when these are through, so are those.
	const count = 3
	if err := a.talk(b, count); err != nil {
		t.Fatal(err)
	}
	if n := a.sent(t) - before; n != count {
		t.Errorf("%d VXLAN packets left for %d datagrams, ARP for nobody and an unknown MAC; want %d", n, count, count)
	}
}

func TestFilterShutsStrangersOut(t *testing.T) {
	a, b := twoSites(t)
	errs := b.k.Apply(t.Context(), []kernel.Op{{Key: kernel.FilterPeer{VTEP: a.vtep}, Have: kernel.FilterPeerSpec{}}})
	if errs[0] != nil {
		t.Fatal(errs[0])
	}
	if err := a.talk(b, 1); err == nil {
		t.Error("VXLAN packets of a host that is no peer pass")
	}
}

func TestPathSurvivesAnotherKernelOnTheSameHost(t *testing.T) {
	a, b := twoSites(t)
	if err := a.k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.talk(b, 1); err != nil {
		t.Fatalf("after close: %v", err)
	}
	again, err := New(Config{NetnsDir: a.w.dir, HostNetns: a.w.host.Path()})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	have, err := again.Dump(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range kernel.Diff(have, a.state(b)) {
		// Sysctls carry no mark: the next process sets them once more.
		if _, ok := o.Key.(kernel.Sysctl); !ok {
			t.Errorf("after a restart: %s", o)
		}
	}
}
