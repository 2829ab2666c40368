package linux

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/linux/ipvs"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	"sluice/internal/netnstest"
	"sluice/internal/reconcile"
)

// keeper is a host that a reconciler keeps as a test wants it.
type keeper struct {
	*reconcile.Loop
	k       *Kernel
	w       world
	sandbox string
	log     *bytes.Buffer // read after stop only

	mu   sync.Mutex
	rev  uint64
	want kernel.State
	stop func()
}

// newKeeper starts one on a host of its own, with the full example. It reads back once
// in interval, and when it is told to.
func newKeeper(t *testing.T, interval time.Duration) *keeper {
	t.Helper()
	netnstest.Need(t, netnstest.NFTables)
	h := &keeper{rev: 1, log: &bytes.Buffer{}}
	h.k, h.w = newHost(t, nft.Tables{})
	hasIPVS := netnstest.Has(netnstest.IPVS) == nil
	if hasIPVS {
		h.k.cfg.IPVS = ipvs.New()
	}
	h.sandbox = h.w.Sandbox(t)
	h.want = kerneltest.Full(h.sandbox, hasIPVS)
	for _, name := range []string{"net.ipv4.conf.all.rp_filter", "net.ipv4.ip_forward"} { // those with notice
		h.want[kernel.Sysctl{NS: "sluice-aaaa", Name: name}] = kernel.SysctlSpec{Value: "0"}
	}
	h.Loop = reconcile.New(reconcile.Config{
		Kernel: h.k, Notices: h.k.Notices, Interval: interval,
		View: func() model.View {
			h.mu.Lock()
			defer h.mu.Unlock()
			return model.View{Revision: h.rev, Endpoints: map[model.EndpointID]model.Endpoint{"e": {Phase: model.Taken, Sandbox: h.sandbox}}}
		},
		Plan: func(model.View) kernel.State {
			h.mu.Lock()
			defer h.mu.Unlock()
			return maps.Clone(h.want)
		},
		Log: slog.New(slog.NewTextHandler(h.log, nil)),
	})
	notices, err := h.k.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { h.Run(ctx) })
	wg.Go(func() {
		for {
			select {
			case <-notices:
				h.Notice()
			case <-ctx.Done():
				return
			}
		}
	})
	h.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(h.stop)
	h.settled(t)
	return h
}

// settled waits until a round has done all there is to do.
func (h *keeper) settled(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	rev := h.rev
	h.mu.Unlock()
	r, err := h.Wait(t.Context(), rev)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Failed) > 0 {
		t.Fatalf("the kernel refuses: %v", r.Failed)
	}
	h.mended(t, 10*time.Second)
}

// mended waits until there is no difference and returns how long that took. It looks
// from outside of the loop, so as not to have it read back.
func (h *keeper) mended(t *testing.T, limit time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		have, err := h.k.Dump(t.Context(), []string{h.sandbox})
		h.mu.Lock()
		ops := kernel.Diff(have, h.want)
		h.mu.Unlock()
		took := time.Since(start)
		if err == nil && len(ops) == 0 {
			return took
		}
		if took > limit {
			t.Fatalf("not mended after %v: %v, %v", took, ops, err)
		}
	}
}

// wish changes what is wanted and waits until it is so.
func (h *keeper) wish(t *testing.T, change func(kernel.State)) {
	t.Helper()
	h.mu.Lock()
	change(h.want)
	h.rev++
	rev := h.rev
	h.mu.Unlock()
	if _, err := h.Wait(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
}

const (
	// soon is five times the second in which what gives notice is mended.
	soon = 5 * time.Second
	// often is the loop's own interval; seldom is one that no test waits for.
	often  = 5 * time.Second
	seldom = time.Hour
)

func TestWhatOthersBreakIsMendedInTime(t *testing.T) {
	h := newKeeper(t, seldom)
	netA := h.w.in(t, "sluice-aaaa")
	task := h.w.task(t)
	remote := model.MACFor(netip.MustParseAddr("10.255.0.3"))
	type damage struct {
		kind string
		in   *netnstest.NS
		do   string
	}
	all := []damage{
		{kernel.KindLink, netA, "ip link del vxlan0"},
		{kernel.KindLink, netA, "ip link set vxlan0 down"},
		{kernel.KindLink, netA, "ip link set br0 down"},
		{kernel.KindLink, netA, "ip link set br0 mtu 1300"},
		{kernel.KindLink, netA, "ip link set vxlan0 nomaster"},
		{kernel.KindLink, netA, "bridge link set dev vxlan0 learning on"},
		{kernel.KindLink, netA, "ip link del slva2"},
		{kernel.KindLink, h.w.host, "ip link set slma down"},
		{kernel.KindFDB, netA, fmt.Sprintf("bridge fdb del %s dev vxlan0 self", remote)},
		{kernel.KindFDB, netA, fmt.Sprintf("bridge fdb del %s dev vxlan0 master", remote)},
		{kernel.KindFDB, netA, fmt.Sprintf("bridge fdb replace %s dev vxlan0 dst 192.0.2.77 self permanent", remote)},
		{kernel.KindNeighbour, netA, "ip neigh del 10.255.0.3 dev br0"},
		{kernel.KindNeighbour, netA, "ip neigh replace 10.255.0.3 dev br0 lladdr 02:00:00:00:00:99 nud reachable"},
		{kernel.KindNeighbour, netA, "ip neigh add 10.255.0.77 dev br0 lladdr 02:00:00:00:00:99 nud permanent"},
		{kernel.KindAddress, netA, "ip addr del 10.255.0.7/32 dev br0"},
		{kernel.KindAddress, h.w.host, "ip addr flush dev slma"},
		{kernel.KindNFTables, netA, "nft flush ruleset"},
		{kernel.KindNFTables, netA, "nft flush chain bridge sluice vip"},
		{kernel.KindNFTables, task, "nft delete table ip sluice"},
		{kernel.KindNFTables, h.w.host, "nft delete table ip sluice-mesh"},
		{kernel.KindRoute, task, "ip rule del from 10.255.0.2"},
		{kernel.KindIPTables, h.w.host, "iptables -F"},
		{kernel.KindIPTables, h.w.host, "iptables -D INPUT 1"},
		{kernel.KindIPTables, h.w.host, "nft flush ruleset"},
		{kernel.KindSysctl, netA, "sysctl -qw net.ipv4.conf.all.rp_filter=1"},
		{kernel.KindSysctl, netA, "sysctl -qw net.ipv4.ip_forward=1"},
	}
	var told []time.Duration
	for _, d := range all {
		told = append(told, h.counted(t, d.kind, d.in, d.do, soon))
	}
	slices.Sort(told)
	t.Logf("with notice: median %v, longest %v", told[len(told)/2], told[len(told)-1])
	h.stop()
	lines := strings.Count(h.log.String(), "drift mended")
	if lines == 0 || lines > len(all) {
		t.Errorf("%d log lines for %d changes by others:\n%s", lines, len(all), h.log)
	}
	if !strings.Contains(h.log.String(), "by nft (process") {
		t.Errorf("who flushed a table is not told:\n%s", h.log)
	}
	t.Logf("log:\n%s", h.log)
}

// counted does some damage, and waits until it is mended and counted.
func (h *keeper) counted(t *testing.T, kind string, in *netnstest.NS, damage string, limit time.Duration) time.Duration {
	t.Helper()
	before := h.Stats().Drifts[kind]
	run(t, in, "%s", damage)
	start := time.Now()
	for h.Stats().Drifts[kind] == before {
		if time.Since(start) > limit {
			t.Fatalf("%s: nothing of kind %s is mended: %v", damage, kind, h.Stats().Drifts)
		}
		runtime.Gosched()
	}
	took := time.Since(start)
	t.Logf("%-12s %5d ms  %s", kind, took.Milliseconds(), damage)
	h.mended(t, limit) // all of it
	return took
}

// What the kernel tells nobody of is mended when it is read back.
func TestWhatNobodyTellsOfIsReadBack(t *testing.T) {
	h := newKeeper(t, often)
	netB := h.w.in(t, "sluice-bbbb")
	h.counted(t, kernel.KindSysctl, netB, "sysctl -qw net.ipv4.conf.all.send_redirects=1", 5*often)
	if h.k.cfg.IPVS != nil {
		h.counted(t, kernel.KindIPVS, netB, "ipvsadm -C", 5*often)
	}
	if command("iptables-legacy") == "" || command("iptables-nft") == "" {
		t.Skip("missing: iptables-legacy and iptables-nft (the commands)")
	}
	// An engine that uses the other world, where our chains follow it.
	h.counted(t, kernel.KindIPTables, h.w.host, "iptables-legacy -N DOCKER-USER", 5*often)
	h.counted(t, kernel.KindIPTables, h.w.host, "iptables-legacy -F", 5*often)
}

// What we do ourselves is told too, and goes with what is remembered.
func TestOwnChangesAreNoDoubt(t *testing.T) {
	h := newKeeper(t, seldom)
	before := h.Stats()
	const changes = 100
	for i := range changes {
		a := netip.AddrFrom4([4]byte{10, 255, 1, byte(i)})
		end, peer := fmt.Sprintf("slvx%d", i), fmt.Sprintf("slcx%d", i)
		keys := kernel.State{
			kernel.Neigh{NS: "sluice-aaaa", Dev: "br0", IP: a}:                          kernel.NeighSpec{MAC: model.MACFor(a)},
			kernel.FDB{NS: "sluice-aaaa", Dev: "vxlan0", MAC: model.MACFor(a)}:          kernel.FDBSpec{VTEP: netip.MustParseAddr("192.0.2.2")},
			kernel.Member{NS: "sluice-aaaa", IP: a}:                                     kernel.MemberSpec{MAC: model.MACFor(a)},
			kernel.Link{NS: "sluice-aaaa", Name: end, Kind: kernel.Veth}:                kernel.LinkSpec{Alias: "sluice x", MTU: 1450, Master: "br0", Peer: peer, PeerMAC: model.MACFor(a)},
			kernel.Addr{NS: "sluice-aaaa", Dev: "br0", Prefix: netip.PrefixFrom(a, 32)}: kernel.AddrSpec{},
		}
		h.wish(t, func(s kernel.State) { maps.Copy(s, keys) })
		if i%2 == 0 {
			h.wish(t, func(s kernel.State) {
				for k := range keys {
					delete(s, k)
				}
			})
		}
	}
	after := h.Stats()
	t.Logf("%d revisions: %d rounds, %d changes, %d dumps, drift %d", changes*3/2, after.Rounds-before.Rounds, after.Ops-before.Ops, after.Dumps-before.Dumps, after.Drift-before.Drift)
	// One in five seconds comes anyway, and a notice may come late.
	if n := after.Dumps - before.Dumps; n > changes/10 {
		t.Errorf("%d dumps for %d changes of our own", n, changes)
	}
	if n := after.Drift - before.Drift; n > 0 {
		t.Errorf("%d of our own changes count as drift", n)
	}
}

// A container's end that leaves is heard of, though nothing was read back since it was
// made: its task waits for that.
func TestEndThatLeavesIsHeard(t *testing.T) {
	h := newKeeper(t, seldom)
	const end, peer = "slvleaves", "slcleaves"
	a := netip.MustParseAddr("10.255.1.7")
	h.wish(t, func(s kernel.State) {
		s[kernel.Link{NS: "sluice-aaaa", Name: end, Kind: kernel.Veth}] = kernel.LinkSpec{Alias: "sluice x", MTU: 1450, Master: "br0", Peer: peer, PeerMAC: model.MACFor(a)}
	})
	before := h.Stats().Dumps
	task := netnstest.New(t)
	h.w.host.Must(func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		return c.setLink(peer, 0, []*nl.RtAttr{nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(task.FD())))})
	})
	for deadline := time.Now().Add(soon); h.Stats().Dumps == before; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("nobody has looked")
		}
	}
}

// Strangers may be as busy as they like: their devices, neighbours, rules and routes.
func TestStormOfStrangersCostsNoDump(t *testing.T) {
	h := newKeeper(t, seldom)
	run(t, h.w.host, "ip link add stranger type bridge")
	run(t, h.w.host, "ip link set stranger up")
	before := h.Stats()
	start := time.Now()
	const storm = 10000
	h.w.host.Must(func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		d, err := c.link("stranger")
		if err != nil {
			return err
		}
		for i := range storm {
			n := neigh{index: d.index, state: unix.NUD_REACHABLE, ip: netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 200)}), mac: model.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}}
			if i%8 == 7 {
				err = c.setLink("stranger", 0, []*nl.RtAttr{nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(1300+i%100)))})
			} else {
				err = c.do(c.neighRequest(unix.RTM_NEWNEIGH, replace, unix.AF_INET, n))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	took := time.Since(start)
	n := h.Stats().Dumps - before.Dumps
	t.Logf("%d notices in %v (%.0f/s): %d dumps", storm, took, storm/took.Seconds(), n)
	if most := uint64(took/(5*time.Second)) + 1; n > most {
		t.Errorf("%d dumps, want at most the %d that come anyway", n, most)
	}
}

// A storm of what may be ours costs a dump for each gap, and no more.
func TestStormOfDoubtIsBounded(t *testing.T) {
	h := newKeeper(t, seldom)
	before := h.Stats()
	start := time.Now()
	ns := h.w.in(t, "sluice-aaaa")
	const storm = 30000
	ns.Must(func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		d, err := c.link("br0")
		if err != nil {
			return err
		}
		n := neigh{index: d.index, state: unix.NUD_PERMANENT, ip: netip.MustParseAddr("10.255.0.3")}
		for i := range storm {
			n.mac = model.MAC{2, 0, 0, 0, byte(i >> 8), byte(i)}
			if err := c.do(c.neighRequest(unix.RTM_NEWNEIGH, replace, unix.AF_INET, n)); err != nil {
				return err
			}
		}
		return nil
	})
	took := time.Since(start)
	n := h.Stats().Dumps - before.Dumps
	t.Logf("%d changes in %v (%.0f/s): %d dumps", storm, took, storm/took.Seconds(), n)
	if most := uint64(took/(50*time.Millisecond)) + 2; n > most {
		t.Errorf("%d dumps in %v, want at most %d", n, took, most)
	}
	h.mended(t, soon)
}
