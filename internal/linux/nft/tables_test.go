package nft_test

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
)

const (
	vip1 = "10.255.0.100"
	vip2 = "10.255.0.101"
)

// bare is a namespace with a table for two VIPs, without tasks.
func bare(t testing.TB) (*host, kernel.State) {
	h := &host{name: "sluice-bare", fd: newNetns(t), have: kernel.State{}}
	want := manyServices(h.name, 3, 4)
	ip := netip.MustParseAddr("10.240.90.0")
	want[kernel.Other{NS: h.name, VIP: netip.MustParseAddr("10.240.0.1"), Client: ip}] = kernel.OtherSpec{MAC: model.MACFor(ip)}
	want[kernel.VIP{NS: h.name, IP: netip.MustParseAddr("10.240.0.9")}] = kernel.VIPSpec{Scheduler: "sh", Slots: 0}
	h.apply(t, want)
	return h, want
}

func TestProbeFindsWhatTheKernelHas(t *testing.T) {
	fd := newNetns(t)
	must(t, nft.Tables{}.Probe(fd))
	if out := run(t, fd, "nft", "list", "ruleset"); out != "" {
		t.Errorf("probing left something behind:\n%s", out)
	}
}

func TestDumpOfNothingIsEmpty(t *testing.T) {
	fd := newNetns(t)
	st, err := nft.Tables{}.DumpBridge(fd, "sluice-x")
	must(t, err)
	same(t, st, kernel.State{})
	st, err = nft.Tables{}.DumpTask(fd, "/t")
	must(t, err)
	same(t, st, kernel.State{})
}

func TestNoDescriptorIsNotTheHost(t *testing.T) {
	for _, fd := range []int{0, -1} {
		if _, err := (nft.Tables{}).DumpBridge(fd, "sluice-x"); err == nil {
			t.Errorf("dump of descriptor %d: no error", fd)
		}
		ops := []kernel.Op{{Key: kernel.BridgeTable{NS: "sluice-x"}, Want: kernel.BridgeTableSpec{}}}
		if err := (nft.Tables{}).ApplyBridge(fd, "sluice-x", ops); err == nil {
			t.Errorf("apply to descriptor %d: no error", fd)
		}
	}
}

// Whatever the kernel has, any operation may be done again, and an operation
// that is wrong about what is there does the same as one that is right.
func TestApplyIsIdempotent(t *testing.T) {
	h, want := bare(t)
	create := kernel.Diff(kernel.State{}, want)
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, create))
	same(t, h.dump(t), want)

	less := without(want, h.name, netip.MustParseAddr("10.240.0.1"))
	gone := kernel.VIP{NS: h.name, IP: netip.MustParseAddr("10.240.0.2")}
	delete(less, gone)
	ops := kernel.Diff(want, less)
	for range 2 {
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
		same(t, h.dump(t), less)
	}
	// A changed value under the belief that there is none.
	slot := kernel.Slot{NS: h.name, VIP: netip.MustParseAddr("10.240.0.1"), Slot: 0}
	mac := kernel.SlotSpec{MAC: model.MAC{2, 0, 0, 0, 0, 7}}
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, []kernel.Op{{Key: slot, Want: mac}}))
	less[slot] = mac
	same(t, h.dump(t), less)

	remove := kernel.Diff(less, kernel.State{})
	for range 2 {
		must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, remove))
		same(t, h.dump(t), kernel.State{})
	}
	// Without a table there is nothing to put a VIP in.
	err := nft.Tables{}.ApplyBridge(h.fd, h.name, []kernel.Op{{Key: gone, Want: kernel.VIPSpec{Scheduler: "rr"}}})
	if !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("vip without a table: %v, want ErrNotExist", err)
	}
}

func TestTaskApplyIsIdempotent(t *testing.T) {
	fd := newNetns(t)
	k := &task{name: "k", fd: fd, have: kernel.State{}}
	const path = "/k"
	addr := netip.MustParseAddr("10.255.0.2")
	vip := kernel.TaskVIP{Sandbox: path, VIP: netip.MustParseAddr(vip1)}
	want := kernel.State{kernel.TaskTable{Sandbox: path}: kernel.TaskTableSpec{}, vip: kernel.TaskVIPSpec{Addr: addr}}
	ops := kernel.Diff(kernel.State{}, want)
	for range 2 {
		must(t, nft.Tables{}.ApplyTask(fd, path, ops))
		same(t, k.dump(t, false), want)
	}
	for _, spec := range []kernel.TaskVIPSpec{
		{Addr: addr, Loop: true}, {Addr: addr.Next(), Loop: true}, {Addr: addr}, {Addr: addr, Loop: true},
	} {
		for _, have := range []kernel.Value{want[vip], nil} { // right and wrong
			must(t, nft.Tables{}.ApplyTask(fd, path, []kernel.Op{{Key: vip, Want: spec, Have: have}}))
		}
		want[vip] = spec
		same(t, k.dump(t, false), want)
	}
	del := []kernel.Op{{Key: vip, Have: want[vip]}}
	delete(want, vip)
	for range 2 {
		must(t, nft.Tables{}.ApplyTask(fd, path, del))
		same(t, k.dump(t, false), want)
	}
	for range 2 {
		must(t, nft.Tables{}.ApplyTask(fd, path, kernel.Diff(want, kernel.State{})))
		same(t, k.dump(t, false), kernel.State{})
	}
}

// Any state may follow any other, and the dump always says what was applied.
func TestAnyStateMayFollowAnyOther(t *testing.T) {
	h := &host{name: "sluice-any", fd: newNetns(t), have: kernel.State{}}
	r := rand.New(rand.NewPCG(1, 2)) // any numbers, the same at each run
	ip := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, 1, byte(n)}) }
	mac := func() model.MAC { return model.MACFor(ip(r.IntN(6))) }
	for range 60 {
		want := kernel.State{}
		if r.IntN(8) > 0 {
			spec := kernel.BridgeTableSpec{Router: model.MACFor(ip(r.IntN(2)))}
			if r.IntN(2) == 0 {
				spec.Uplink = "vxlan0"
			}
			want[kernel.BridgeTable{NS: h.name}] = spec
			for range r.IntN(30) {
				vip := ip(100 + r.IntN(4))
				switch r.IntN(5) {
				case 0:
					sched := []string{"rr", "wrr", "sh"}[r.IntN(3)]
					want[kernel.VIP{NS: h.name, IP: vip}] = kernel.VIPSpec{Scheduler: sched, Slots: r.IntN(4)}
				case 1:
					want[kernel.Slot{NS: h.name, VIP: vip, Slot: r.IntN(4)}] = kernel.SlotSpec{MAC: mac()}
				case 2:
					want[kernel.Alive{NS: h.name, VIP: vip, MAC: mac()}] = kernel.AliveSpec{}
				case 3:
					want[kernel.Member{NS: h.name, IP: ip(r.IntN(4))}] = kernel.MemberSpec{MAC: mac()}
				case 4:
					want[kernel.Other{NS: h.name, VIP: vip, Client: ip(r.IntN(4))}] = kernel.OtherSpec{MAC: mac()}
				}
			}
		}
		h.apply(t, want)
	}
}

func TestApplyRefusesWhatItCannotDo(t *testing.T) {
	h, want := bare(t)
	six := netip.MustParseAddr("fd00::1")
	four := netip.MustParseAddr(vip1)
	for _, op := range []kernel.Op{
		{Key: kernel.VIP{NS: h.name, IP: six}, Want: kernel.VIPSpec{Scheduler: "rr"}},
		{Key: kernel.VIP{NS: h.name, IP: four}, Want: kernel.VIPSpec{Scheduler: "lc"}},
		{Key: kernel.VIP{NS: h.name, IP: four}, Want: kernel.VIPSpec{Scheduler: "rr", Slots: -1}},
		{Key: kernel.VIP{NS: "sluice-other", IP: four}, Want: kernel.VIPSpec{Scheduler: "rr"}},
		{Key: kernel.Slot{NS: h.name, VIP: four, Slot: -1}, Want: kernel.SlotSpec{}},
		{Key: kernel.Slot{NS: h.name, VIP: four}, Want: kernel.AliveSpec{}},
		{Key: kernel.Netns{Name: "x"}, Want: kernel.NetnsSpec{}},
	} {
		if err := (nft.Tables{}).ApplyBridge(h.fd, h.name, []kernel.Op{op}); err == nil {
			t.Errorf("%s: no error", op)
		}
	}
	same(t, h.dump(t), want)
}

// A damaged table is seen by the dump, and what the difference says repairs it.
func TestDamageIsRepaired(t *testing.T) {
	vip, pick := "10.240.0.1", "vip-10.240.0.1"
	for name, damage := range map[string]string{
		"table deleted":          "delete table bridge sluice",
		"table asleep":           "add table bridge sluice { flags dormant; }",
		"table flushed":          "flush table bridge sluice",
		"chain flushed":          "flush chain bridge sluice tcp-packet",
		"base chain flushed":     "flush chain bridge sluice prerouting",
		"base chain deleted":     "flush chain bridge sluice prerouting; delete chain bridge sluice prerouting",
		"base chain elsewhere":   "flush chain bridge sluice prerouting; delete chain bridge sluice prerouting; add chain bridge sluice prerouting { type filter hook forward priority 0; }",
		"foreign rule":           "insert rule bridge sluice refuse drop",
		"foreign rule at an end": "add rule bridge sluice udp-new drop comment \"x\"",
		"foreign chain":          "add chain bridge sluice foreign { type filter hook input priority 0; policy drop; }",
		"foreign chain in use":   "add chain bridge sluice foreign; add rule bridge sluice foreign drop; insert rule bridge sluice vip jump foreign",
		"vip's chain flushed":    "flush chain bridge sluice " + pick,
		"vip's rule replaced":    "flush chain bridge sluice " + pick + "; add rule bridge sluice " + pick + " meta mark set 1 comment \"rr slots 4 [00000000]\"",
		"vip's rule doubled":     "add rule bridge sluice " + pick + " accept",
		"vip not in the set":     "delete element bridge sluice vips { " + vip + " }",
		"vip not in the map":     "delete element bridge sluice pick { " + vip + " }",
		"vip elsewhere":          "delete element bridge sluice pick { " + vip + " }; add element bridge sluice pick { " + vip + " : jump vip-10.240.0.2 }",
		"vip gone":               "delete element bridge sluice vips { " + vip + " }; delete element bridge sluice pick { " + vip + " }; flush chain bridge sluice " + pick + "; delete chain bridge sluice " + pick,
		"foreign vip":            "add chain bridge sluice vip-10.240.7.7; add element bridge sluice pick { 10.240.7.7 : jump vip-10.240.7.7 }",
		"chain of no vip":        "add chain bridge sluice vip-10.240.7.7",
		"slot gone":              "delete element bridge sluice slots { " + vip + " . 0x1 }",
		"slot changed":           "delete element bridge sluice slots { " + vip + " . 0x1 }; add element bridge sluice slots { " + vip + " . 0x1 : 02:00:00:00:00:01 }",
		"foreign slot":           "add element bridge sluice slots { " + vip + " . 0x63 : 02:00:00:00:00:01 }",
		"foreign alive":          "add element bridge sluice alive { " + vip + " . 02:00:00:00:00:01 }",
		"alive flushed":          "flush set bridge sluice alive",
		"member twice":           "add element bridge sluice members { 10.240.90.0 . 02:00:00:00:00:01 }",
		"member gone":            "delete element bridge sluice members { 10.240.90.0 . 02:42:0a:f0:5a:00 }",
		"foreign other":          "add element bridge sluice others { 10.240.90.1 . " + vip + " : 02:00:00:00:00:01 }",
	} {
		t.Run(name, func(t *testing.T) {
			h, want := bare(t)
			run(t, h.fd, "nft", damage)
			have := h.dump(t)
			if maps.Equal(have, want) {
				t.Fatal("the dump does not show it")
			}
			ops := kernel.Diff(have, want)
			must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, ops))
			same(t, h.dump(t), want)
			// The rules are really as they were, not only described so.
			fresh, _ := bare(t)
			if got, want := rules(t, h), rules(t, fresh); got != want {
				t.Errorf("rules after the repair:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// rules is the table as nft prints it, without the elements, whose order may
// differ, and with its parts sorted.
func rules(t *testing.T, h *host) string {
	out := run(t, h.fd, "nft", "-t", "list", "table", "bridge", "sluice")
	out = strings.TrimSuffix(strings.TrimPrefix(out, "table bridge sluice {\n"), "}\n")
	parts := strings.Split(out, "\n\n")
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	slices.Sort(parts)
	return strings.Join(parts, "\n")
}

func TestDamageOfTaskTableIsRepaired(t *testing.T) {
	for name, damage := range map[string]string{
		"table deleted":        "delete table ip sluice",
		"chain flushed":        "flush chain ip sluice prerouting",
		"chain deleted":        "flush chain ip sluice output; delete chain ip sluice output",
		"foreign rule":         "insert rule ip sluice prerouting drop",
		"translation gone":     "flush map ip sluice in",
		"loop gone":            "flush map ip sluice loop",
		"loop without":         "add element ip sluice loop { 10.255.0.102 : 10.255.0.2 }",
		"loop elsewhere":       "flush map ip sluice loop; add element ip sluice loop { 10.255.0.100 : 10.255.0.3 }",
		"translated elsewhere": "flush map ip sluice in; add element ip sluice in { 10.255.0.100 : 10.255.0.3 }",
		"foreign translation":  "add element ip sluice in { 10.255.0.102 : 10.255.0.2 }",
	} {
		t.Run(name, func(t *testing.T) {
			const path = "/k"
			k := &task{name: "k", fd: newNetns(t), have: kernel.State{}}
			addr := netip.MustParseAddr("10.255.0.2")
			want := kernel.State{
				kernel.TaskTable{Sandbox: path}:                               kernel.TaskTableSpec{},
				kernel.TaskVIP{Sandbox: path, VIP: netip.MustParseAddr(vip1)}: kernel.TaskVIPSpec{Addr: addr, Loop: true},
				kernel.TaskVIP{Sandbox: path, VIP: netip.MustParseAddr(vip2)}: kernel.TaskVIPSpec{Addr: addr},
			}
			if name == "translation gone" {
				delete(want, kernel.TaskVIP{Sandbox: path, VIP: netip.MustParseAddr(vip1)})
			}
			k.apply(t, want)
			run(t, k.fd, "nft", damage)
			have := k.dump(t, false)
			if maps.Equal(have, want) {
				t.Fatal("the dump does not show it")
			}
			must(t, nft.Tables{}.ApplyTask(k.fd, path, kernel.Diff(have, want)))
			same(t, k.dump(t, false), want)
		})
	}
}

// A table that another version made, with sets of other types, is replaced.
func TestTableOfAnotherVersionIsReplaced(t *testing.T) {
	h := &host{name: "sluice-old", fd: newNetns(t)}
	run(t, h.fd, "nft", `add table bridge sluice { map slots { type ipv4_addr : ether_addr; elements = { 10.0.0.1 : 02:00:00:00:00:01 }; }; set mine { type ether_addr; }; chain x { ether daddr set ip daddr map @slots; }; }`)
	same(t, h.dump(t), kernel.State{})
	want := manyServices(h.name, 2, 2)
	must(t, nft.Tables{}.ApplyBridge(h.fd, h.name, kernel.Diff(kernel.State{}, want)))
	same(t, h.dump(t), want)
}

// fill puts n flows from nowhere into a connection map.
func fill(t *testing.T, h *host, name string, n int) {
	t.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(h.fd), nftables.AsLasting())
	must(t, err)
	defer c.CloseLasting()
	set, err := c.GetSetByName(&nftables.Table{Name: "sluice", Family: nftables.TableFamilyBridge}, name)
	must(t, err)
	const part = 500
	for i := 0; i < n; i += part {
		var list []nftables.SetElement
		for j := i; j < min(n, i+part); j++ {
			key := []byte{192, 0, 2, 1, 192, 0, 2, 2, byte(j >> 8), byte(j), 0, 0, byte(j >> 16), 0, 0, 0}
			list = append(list, nftables.SetElement{Key: key, Val: bytes.Repeat([]byte{2}, 6)})
		}
		must(t, c.SetAddElements(set, list))
		must(t, c.Flush())
	}
}

func TestFullMapRefusesTCPAndServesUDP(t *testing.T) {
	l := newLab(t, byNFT())
	a, b, c := l.tasks["a"], l.tasks["b"], l.tasks["c"]
	b.serve(t, "0.0.0.0:80")
	c.serve(t, "0.0.0.0:80")
	l.set(service{vip: vip1, ready: []*task{b, c}})
	old, err := a.dial("", vip1+":80")
	must(t, err)
	defer old.Close()
	const size = 1 << 18
	fill(t, l.one, "tcp-flows", size-1) // and the one open connection
	fill(t, l.one, "udp-flows", size)
	if _, err := a.dial("", vip1+":80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("new connection: %v, want refused", err)
	}
	must(t, old.echo("still here"))
	// A closed connection makes room for a new one, although the map of closing
	// ones is full; the kernel collects what was deleted once a second.
	fill(t, l.one, "tcp-closing", size)
	old.Close()
	tick, late := time.NewTicker(50*time.Millisecond), time.After(patience)
	defer tick.Stop()
	for {
		next, err := a.dial("", vip1+":80")
		if err == nil {
			next.Close()
			break
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("no room after a connection closed: %v", err)
		}
	}
	// Each datagram is spread by itself.
	pc := a.udp(t, "")
	got := map[string]int{}
	for range 4 {
		b, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
		got[parseAnswer(string(b)).server]++
	}
	wantHits(t, got, map[string]int{"b": 2, "c": 2})
}
