package nft_test

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
)

func markOf(h *host, vip, client string) kernel.Mark {
	k := kernel.Mark{NS: h.name, VIP: netip.MustParseAddr(vip)}
	if client != "" {
		k.Client = netip.MustParseAddr(client)
	}
	return k
}

func portMarkOf(h *host, vip, client string, p model.Proto, port uint16) kernel.Mark {
	k := markOf(h, vip, client)
	k.Proto, k.Port = p, port
	return k
}

// marked is a namespace with marks for two VIPs, one of which a member calls.
func marked(t testing.TB) (*host, kernel.State) {
	h := &host{name: "sluice-marked", fd: newNetns(t), have: kernel.State{}}
	want := kernel.State{
		kernel.MarkTable{NS: h.name}:  kernel.MarkTableSpec{},
		markOf(h, vip1, ""):           kernel.MarkSpec{Mark: 100},
		markOf(h, vip2, ""):           kernel.MarkSpec{Mark: 1<<32 - 1},
		markOf(h, vip1, "10.255.0.2"): kernel.MarkSpec{Mark: 100 + 2<<16},

		portMarkOf(h, vip1, "", model.TCP, 80):            kernel.MarkSpec{Mark: 200},
		portMarkOf(h, vip1, "", model.UDP, 80):            kernel.MarkSpec{Mark: 201},
		portMarkOf(h, vip2, "", model.SCTP, 65535):        kernel.MarkSpec{Mark: 202},
		portMarkOf(h, vip1, "", model.UDP, 0):             kernel.MarkSpec{Mark: 205},
		portMarkOf(h, vip2, "10.255.0.2", model.SCTP, 0):  kernel.MarkSpec{Mark: 206},
		portMarkOf(h, vip1, "10.255.0.2", model.UDP, 0):   kernel.MarkSpec{Mark: 207},
		portMarkOf(h, vip1, "10.255.0.2", model.TCP, 80):  kernel.MarkSpec{Mark: 203},
		portMarkOf(h, vip1, "10.255.0.2", model.TCP, 256): kernel.MarkSpec{Mark: 204},
	}
	h.apply(t, want)
	return h, want
}

func TestMarksReadBack(t *testing.T) {
	h, want := marked(t)
	// Done again, by somebody who believes that nothing is there.
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, kernel.Diff(kernel.State{}, want)))
	same(t, h.dump(t), want)

	change := maps.Clone(want)
	change[markOf(h, vip1, "")] = kernel.MarkSpec{Mark: 7}
	change[markOf(h, vip1, "10.255.0.2")] = kernel.MarkSpec{Mark: 8}
	change[portMarkOf(h, vip1, "", model.UDP, 80)] = kernel.MarkSpec{Mark: 9}
	change[portMarkOf(h, vip1, "10.255.0.2", model.UDP, 80)] = kernel.MarkSpec{Mark: 10}
	change[portMarkOf(h, vip1, "", model.UDP, 0)] = kernel.MarkSpec{Mark: 11}
	change[portMarkOf(h, vip1, "", model.TCP, 0)] = kernel.MarkSpec{Mark: 12}
	change[portMarkOf(h, vip1, "10.255.0.2", model.UDP, 0)] = kernel.MarkSpec{Mark: 13}
	delete(change, portMarkOf(h, vip2, "10.255.0.2", model.SCTP, 0))
	delete(change, markOf(h, vip2, ""))
	delete(change, portMarkOf(h, vip1, "", model.TCP, 80))
	delete(change, portMarkOf(h, vip1, "10.255.0.2", model.TCP, 256))
	ops := kernel.Diff(want, change)
	for range 2 {
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		same(t, h.dump(t), change)
	}
	h.have = change
	h.apply(t, kernel.State{})
	if out := run(t, h.fd, "nft", "list", "ruleset"); out != "" {
		t.Errorf("left:\n%s", out)
	}
}

// A packet has the mark of its port, else of its protocol, else of its VIP, and a member
// its own of each.
func TestMarksOfPackets(t *testing.T) {
	h, _ := marked(t)
	link, err := netlink.NewHandleAt(netns.NsHandle(h.fd))
	must(t, err)
	defer link.Close()
	lo, err := link.LinkByName("lo")
	must(t, err)
	must(t, link.LinkSetUp(lo))
	const other, member = "10.255.0.3", "10.255.0.2"
	for _, ip := range []string{vip1, vip2, other, member} {
		addr, err := netlink.ParseAddr(ip + "/32")
		must(t, err)
		must(t, link.AddrAdd(lo, addr))
	}
	run(t, h.fd, "nft", "add table ip watch; add set ip watch seen { type mark; flags dynamic; }; "+
		"add chain ip watch in { type filter hook prerouting priority -140; }; add rule ip watch in update @seen { meta mark }")
	for _, p := range []struct {
		network, from, to string
		want              uint32
	}{
		{"udp", other, vip1 + ":80", 201},
		{"udp", other, vip1 + ":81", 205},
		{"tcp", other, vip1 + ":80", 200},
		{"tcp", other, vip1 + ":81", 100},
		{"udp", member, vip1 + ":81", 207},
		{"tcp", member, vip1 + ":80", 203},
		{"tcp", member, vip1 + ":81", 100 + 2<<16},
		{"udp", member, vip2 + ":80", 1<<32 - 1},
	} {
		run(t, h.fd, "nft", "flush set ip watch seen")
		do(t, h.fd, func() error {
			local := net.Addr(&net.UDPAddr{IP: net.ParseIP(p.from)})
			if p.network == "tcp" {
				local = &net.TCPAddr{IP: net.ParseIP(p.from)}
			}
			c, err := (&net.Dialer{LocalAddr: local}).Dial(p.network, p.to)
			if err != nil { // nobody listens
				return nil
			}
			defer c.Close()
			_, err = c.Write([]byte("?"))
			return err
		})
		if seen := run(t, h.fd, "nft", "list", "set", "ip", "watch", "seen"); !strings.Contains(seen, fmt.Sprintf("0x%08x", p.want)) {
			t.Errorf("%s from %s to %s: want mark %#x:\n%s", p.network, p.from, p.to, p.want, seen)
		}
	}
}

func TestMarksWithoutATable(t *testing.T) {
	h := &host{name: "sluice-bare", fd: newNetns(t)}
	key, spec := markOf(h, vip1, ""), kernel.MarkSpec{Mark: 1}
	if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{{Key: key, Want: spec}}); !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("create: %v, want %v", err, kernel.ErrNotExist)
	}
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, []kernel.Op{{Key: key, Have: spec}}))
	for _, o := range []kernel.Op{
		{Key: key, Want: kernel.MarkSpec{}},
		{Key: markOf(h, "fd00::1", ""), Want: spec},
		{Key: markOf(h, vip1, "fd00::1"), Want: spec},
		{Key: key, Want: kernel.SlotSpec{}},
		{Key: portMarkOf(h, vip1, "", "", 80), Want: spec},
		{Key: portMarkOf(h, vip1, "", "icmpv6", 80), Want: spec},
		{Key: portMarkOf(h, vip1, "", "6", 80), Want: spec},
		{Key: portMarkOf(h, vip1, "", "icmp", 0), Want: spec},
	} {
		if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{o}); err == nil || errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("%s: %v, want it refused for what it is", o, err)
		}
	}
}

// What somebody changes by hand shows, and is mended without losing a mark.
func TestMarkTableIsMended(t *testing.T) {
	for _, spoil := range []string{
		"delete table ip sluice",
		"flush chain ip sluice prerouting",
		"flush map ip sluice marks",
		"flush map ip sluice own-port-marks",
		"flush map ip sluice proto-marks",
		// As a version was that had no marks by protocol.
		"flush chain ip sluice prerouting; delete map ip sluice proto-marks; delete map ip sluice own-proto-marks",
		"add element ip sluice port-marks { 10.255.0.100 . udp . 9 : 7 }",
		"add rule ip sluice output accept",
		"add chain ip sluice other",
	} {
		h, want := marked(t)
		run(t, h.fd, "nft", strings.Fields(spoil)...)
		ops := kernel.Diff(h.dump(t), want)
		if len(ops) == 0 {
			t.Errorf("%s: no difference is seen", spoil)
		}
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		same(t, h.dump(t), want)
	}
}

// The tables of both datapaths in one namespace, as while one takes over from
// the other, know nothing of each other.
func TestBothDatapathsInOneNamespace(t *testing.T) {
	h, one := bare(t)
	marks := kernel.State{
		kernel.MarkTable{NS: h.name}: kernel.MarkTableSpec{},
		markOf(h, vip1, ""):          kernel.MarkSpec{Mark: 1},
	}
	both := maps.Clone(one)
	maps.Copy(both, marks)
	for _, st := range []kernel.State{both, one, marks, both, marks, one} {
		h.apply(t, st)
	}
}
