package nft_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
)

func hostDump(t testing.TB, fd int) kernel.State {
	t.Helper()
	st, err := nft.Tables{}.DumpHost(fd)
	must(t, err)
	return st
}

// sameHost fails the test unless a dump comes to what is wanted: a walk of a map that
// the kernel is making larger may pass elements by.
func sameHost(t testing.TB, fd int, want kernel.State) {
	t.Helper()
	have := hostDump(t, fd)
	for late := time.Now().Add(patience); len(have) < len(want) && time.Now().Before(late); {
		have = hostDump(t, fd)
	}
	same(t, have, want)
}

// published is a host with a thousand ports of one service, and one more.
func published(t testing.TB) (fd int, want kernel.State) {
	fd = newNetns(t)
	alias := netip.MustParseAddr("250.0.16.100")
	want = kernel.State{
		kernel.MeshTable{}: kernel.MeshTableSpec{Devices: "slm"},
		kernel.MeshNet{Dev: "slm0123456789ab"}: kernel.MeshNetSpec{
			Source: netip.MustParseAddr("10.255.15.1"), Subnet: netip.MustParsePrefix("10.255.0.0/20"),
		},
		kernel.MeshMasq{Alias: alias}:         kernel.MeshMasqSpec{},
		kernel.MeshAllow{Alias: alias}:        kernel.MeshAllowSpec{From: "10.0.0.0/8 192.0.2.1/32"},
		kernel.MeshAllow{Alias: alias.Next()}: kernel.MeshAllowSpec{}, // nobody
		kernel.MeshPort{Bind: netip.MustParseAddr("192.0.2.1"), Proto: model.SCTP, Port: 9}: kernel.MeshPortSpec{Alias: alias, To: 9},
	}
	for i := range uint16(1000) {
		want[kernel.MeshPort{Proto: model.UDP, Port: 30000 + i}] = kernel.MeshPortSpec{Alias: alias, To: 40000 + i}
	}
	must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(kernel.State{}, want)))
	sameHost(t, fd, want)
	return fd, want
}

func TestMeshApplyIsIdempotent(t *testing.T) {
	fd, want := published(t)
	must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(kernel.State{}, want)))
	sameHost(t, fd, want)

	next := maps.Clone(want)
	net := kernel.MeshNet{Dev: "slm0123456789ab"}
	alias := netip.MustParseAddr("250.0.16.100")
	delete(next, net)
	delete(next, kernel.MeshAllow{Alias: alias})
	next[kernel.MeshNet{Dev: "slm1"}] = want[net]
	next[kernel.MeshPort{Proto: model.UDP, Port: 30000}] = kernel.MeshPortSpec{Alias: alias, To: 1}
	for range 2 {
		must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(want, next)))
		sameHost(t, fd, next)
	}
	for range 2 {
		must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(next, kernel.State{})))
		sameHost(t, fd, kernel.State{})
	}
	if out := run(t, fd, "nft", "list", "ruleset"); out != "" {
		t.Errorf("left:\n%s", out)
	}
	for key, v := range want {
		if p, ok := key.(kernel.MeshPort); ok && p.Port > 30000 || key == (kernel.MeshTable{}) {
			continue // one of a kind will do
		}
		if err := (nft.Tables{}).ApplyHost(fd, []kernel.Op{{Key: key, Want: v}}); !errors.Is(err, kernel.ErrNotExist) {
			t.Fatalf("%s without a table: %v, want %v", key, err, kernel.ErrNotExist)
		}
	}
}

// Whatever a person does to the table shows, and goes.
func TestMeshDamageIsSeenAndMended(t *testing.T) {
	fd, want := published(t)
	for _, damage := range [][]string{
		{"flush", "chain", "ip", "sluice-mesh", "forward"},
		{"add", "rule", "ip", "sluice-mesh", "input", "accept"},
		{"add", "chain", "ip", "sluice-mesh", "foreign"},
		{"flush", "chain", "ip", "sluice-mesh", "net-slm0123456789ab"},
		{"flush", "map", "ip", "sluice-mesh", "nets"},
		{"insert", "rule", "ip", "sluice-mesh", "allow-250.0.16.100", "return"},
		{"flush", "map", "ip", "sluice-mesh", "allow"},
		{"flush", "set", "ip", "sluice-mesh", "masked"},
		{"add", "table", "ip", "sluice-mesh", "{ flags dormant; }"},
		{"delete", "table", "ip", "sluice-mesh"},
	} {
		run(t, fd, "nft", damage...)
		ops := kernel.Diff(hostDump(t, fd), want)
		if len(ops) == 0 {
			t.Errorf("nft %v: no difference is seen", damage)
		}
		must(t, nft.Tables{}.ApplyHost(fd, ops))
		sameHost(t, fd, want)
	}
}

func TestMeshRefusesWhatItCannotHold(t *testing.T) {
	fd := newNetns(t)
	six := netip.MustParseAddr("2001:db8::1")
	for _, op := range []kernel.Op{
		{Key: kernel.MeshTable{}, Want: kernel.MeshTableSpec{}},
		{Key: kernel.MeshTable{}, Want: kernel.MeshTableSpec{Devices: "a b"}},
		{Key: kernel.MeshPort{Proto: "icmp", Port: 1}, Want: kernel.MeshPortSpec{}},
		{Key: kernel.MeshPort{Proto: model.TCP, Port: 1}, Want: kernel.MeshPortSpec{Alias: six}},
		{Key: kernel.MeshPort{Proto: model.TCP, Port: 1, Bind: six}, Want: kernel.MeshPortSpec{}},
		{Key: kernel.MeshNet{Dev: "slm01234567890123"}, Want: kernel.MeshNetSpec{}},
		{Key: kernel.MeshNet{Dev: "slm0"}, Want: kernel.MeshNetSpec{Source: netip.MustParseAddr("10.0.0.1"), Subnet: netip.MustParsePrefix("10.0.0.1/8")}},
		{Key: kernel.MeshAllow{Alias: six}, Want: kernel.MeshAllowSpec{}},
		{Key: kernel.MeshAllow{Alias: netip.MustParseAddr("250.0.0.1")}, Want: kernel.MeshAllowSpec{From: "everybody"}},
		{Key: kernel.TaskTable{Sandbox: "/t"}, Want: kernel.TaskTableSpec{}},
	} {
		err := nft.Tables{}.ApplyHost(fd, []kernel.Op{op})
		if err == nil || errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("%s: %v, want it refused", op, err)
		}
	}
}

func TestTaskMeshIsPartOfTheTable(t *testing.T) {
	fd := newNetns(t)
	const path = "/k"
	addr := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	spec := func(own string) kernel.TaskMeshSpec {
		return kernel.TaskMeshSpec{
			Pool: netip.MustParsePrefix("250.0.0.0/8"), MAC: model.MACFor(addr(own)),
			Subnet: netip.PrefixFrom(addr(own), 20).Masked(),
		}
	}
	key := func(own string) kernel.TaskMesh { return kernel.TaskMesh{Sandbox: path, Addr: addr(own)} }
	table, vip := kernel.TaskTable{Sandbox: path}, kernel.TaskVIP{Sandbox: path, VIP: addr(vip1)}
	udp := spec("10.255.0.3")
	udp.UDP, udp.Default = true, addr("172.18.0.3")

	have := kernel.State{}
	for i, want := range []kernel.State{
		{table: kernel.TaskTableSpec{}, key("10.255.0.3"): spec("10.255.0.3"), vip: kernel.TaskVIPSpec{Addr: addr("10.255.0.3")}},
		{table: kernel.TaskTableSpec{}, key("10.255.0.3"): udp, vip: kernel.TaskVIPSpec{Addr: addr("10.255.0.3")}},
		{table: kernel.TaskTableSpec{}, key("10.255.0.3"): udp, key("10.254.0.3"): spec("10.254.0.3")},
		{table: kernel.TaskTableSpec{}, key("10.254.0.3"): spec("10.254.0.3"), vip: kernel.TaskVIPSpec{Addr: addr("10.255.0.3"), Loop: true}},
		{table: kernel.TaskTableSpec{}},
		{},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			for range 2 {
				must(t, nft.Tables{}.ApplyTask(fd, path, kernel.Diff(have, want)))
				st, err := nft.Tables{}.DumpTask(fd, path)
				must(t, err)
				same(t, st, want)
			}
			// Making the table once more loses nothing.
			if want[table] != nil {
				must(t, nft.Tables{}.ApplyTask(fd, path, []kernel.Op{{Key: table, Want: kernel.TaskTableSpec{}}}))
				st, err := nft.Tables{}.DumpTask(fd, path)
				must(t, err)
				same(t, st, want)
			}
		})
		have = want
	}

	err := nft.Tables{}.ApplyTask(fd, path, []kernel.Op{{Key: key("10.255.0.3"), Want: udp}})
	if !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("without a table: %v, want %v", err, kernel.ErrNotExist)
	}
	second := spec("10.254.0.3")
	second.UDP, second.Default = true, addr("172.18.0.3")
	err = nft.Tables{}.ApplyTask(fd, path, []kernel.Op{
		{Key: table, Want: kernel.TaskTableSpec{}}, {Key: key("10.255.0.3"), Want: udp}, {Key: key("10.254.0.3"), Want: second},
	})
	if !errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("UDP on two networks: %v, want %v", err, kernel.ErrUnsupported)
	}
}
