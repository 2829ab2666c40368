package nft

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

func TestTextsReadBack(t *testing.T) {
	for _, spec := range []kernel.BridgeTableSpec{
		{Router: model.MAC{2, 0x42, 10, 255, 0, 1}, Uplink: "vxlan0"},
		{Router: model.MAC{2, 0x42, 10, 255, 0, 1}},
		{Router: model.MAC{2, 0x42, 10, 255, 0, 1}, Uplink: "vxlan0", Open: 20000},
		{Open: 1},
		{},
	} {
		if got, ok := parseEntryText(entryText(spec)); !ok || got != spec {
			t.Errorf("%q reads back as %v, %v", entryText(spec), got, ok)
		}
	}
	for _, spec := range []kernel.GuardTableSpec{
		{Ports: "slv", Pool: netip.MustParsePrefix("250.0.0.0/8")}, {Ports: strings.Repeat("x", 15), Pool: netip.MustParsePrefix("240.1.2.3/32")},
	} {
		if got, ok := parseGuardText(guardText(spec)); !ok || got != spec {
			t.Errorf("%q reads back as %v, %v", guardText(spec), got, ok)
		}
	}
	for _, spec := range []kernel.VIPSpec{
		{Scheduler: "rr"}, {Scheduler: "wrr", Slots: 12}, {Scheduler: "sh", Slots: 1},
		{Scheduler: "rr", Slots: 1, Named: true}, {Scheduler: "rr", Slots: 1, NAT: true}, {Scheduler: "rr", Slots: 1, OnePacket: true},
		{Scheduler: "rr", Slots: 2, Persist: 300, PersistBits: 24}, longest,
	} {
		if got, ok := parsePickText(spec.String()); !ok || got != spec {
			t.Errorf("%q reads back as %v, %v", spec, got, ok)
		}
	}
	vip := netip.MustParseAddr("10.255.0.100")
	if got, ok := pickedVIP(pickChain(vip)); !ok || got != vip {
		t.Errorf("%q reads back as %v, %v", pickChain(vip), got, ok)
	}
	for _, s := range []string{"", "tcp-packet", "vip-", "vip-x", "vip-fd00::1", "vip-10.255.0.1.2"} {
		if a, ok := pickedVIP(s); ok {
			t.Errorf("chain %q is taken for that of %s", s, a)
		}
	}
}

// longest is the spec with the longest text.
var longest = kernel.VIPSpec{Scheduler: "wrr", Slots: 16381, Named: true, NAT: true, OnePacket: true, Persist: 31536000, PersistBits: 32}

// nft aborts on longer comments, and libnftnl has room for no more.
func TestCommentsAreShort(t *testing.T) {
	rs := bridgeRuleset(kernel.BridgeTableSpec{Router: model.MAC{0xff}, Uplink: strings.Repeat("x", 15), Open: 31536000})
	picks, err := pickRules(netip.MustParseAddr("255.255.255.255"), longest)
	if err != nil {
		t.Fatal(err)
	}
	all := netip.MustParsePrefix("255.255.255.255/32")
	allows, err := allowRules(all.Addr(), kernel.MeshAllowSpec{From: all.String()})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range slices.Concat(
		rs.rules, taskRuleset().rules, liftRuleset(kernel.LiftTableSpec{Router: model.MAC{0xff}}).rules, picks,
		backRuleset(kernel.BackTableSpec{Router: model.MAC{0xff}, Pool: all, Bits: 32}).rules,
		guardRuleset(kernel.GuardTableSpec{Ports: strings.Repeat("x", 15), Pool: all}).rules,
		meshRuleset(kernel.MeshTableSpec{Devices: strings.Repeat("x", 15)}).rules,
		netRules(strings.Repeat("x", 15), kernel.MeshNetSpec{Source: all.Addr(), Subnet: all}), allows,
		meshed{all.Addr(), kernel.TaskMeshSpec{Pool: all, MAC: model.MAC{0xff}, Subnet: all, UDP: true, Default: all.Addr()}}.rules(),
	) {
		c, err := r.comment(rs.family)
		if err != nil {
			t.Fatal(err)
		}
		if len(c) > 128 {
			t.Errorf("chain %s: comment of %d octets: %s", r.chain, len(c), c)
		}
	}
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	netnstest.Need(t, netnstest.Root)
	fd := netnstest.New(t).FD()
	list := features()
	for _, name := range []string{"a hash that does not exist", "another"} {
		list = append(list, feature{name, "CONFIG_NONE", ruleset{
			family: nftables.TableFamilyBridge, table: probeTable, chains: []chain{{name: "c"}},
			rules: []rule{newRule("c", "probe", part(&expr.Hash{DestRegister: r0, SourceRegister: r1, Length: 4, Modulus: 1, Type: 99}))},
		}})
	}
	err := probe(fd, list)
	if !errors.Is(err, kernel.ErrUnsupported) {
		t.Fatalf("probe: %v, want ErrUnsupported", err)
	}
	if text := err.Error(); !strings.Contains(text, "a hash that does not exist (CONFIG_NONE)") || !strings.Contains(text, "another") || strings.Contains(text, "numgen") {
		t.Errorf("probe: %v, want both missing features named and nothing else", err)
	}
	err = probe(-1, list)
	if err == nil || errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("probe of no namespace: %v, want an error that says nothing of the kernel", err)
	}
}

func TestDistinctSaysEachErrorOnce(t *testing.T) {
	a, b := errors.New("a"), errors.New("b")
	err := distinct(errors.Join(errors.Join(errors.Join(a, b), a), b))
	if err.Error() != "a\nb" || !errors.Is(err, a) || !errors.Is(err, b) {
		t.Errorf("got %q", err)
	}
}

// Whatever netlink answers, decoding it ends.
func FuzzDecode(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 'x', 0, 0, 0})
	f.Add([]byte{12, 0, 3, 0x80, 8, 0, 1, 0x80, 4, 0, 1, 0x80})
	f.Add([]byte{4, 0, 7, 0, 0xff, 0xff, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		as := attrs(b)
		parseChain(as)
		_, _, comment := parseRule(as)
		parseSet(as)
		m := map[string]string{}
		parseElems(as, m)
		parseEntryText(uncomment(comment))
		parsePickText(uncomment(comment))
		_, err := bridgeLayout("sluice-fuzz").state(found{
			exists: true,
			rules:  map[string][]string{chainPrerouting: {comment}, pickPrefix + "10.0.0.1": {comment}},
			chains: map[string]chain{pickPrefix + "10.0.0.1": {name: pickPrefix + "10.0.0.1"}},
			elems:  map[string]map[string]string{setVIPs: m, mapPick: m, mapSlots: m, setAlive: m, setMembers: m, mapOthers: m, setDrains: m, setNamed: m, mapPorts: m, setOnePacket: m, setNAT: m, mapReal: m},
		})
		if err != nil {
			t.Error(err)
		}
		_, err = liftLayout("sluice-fuzz").state(found{
			exists: true, rules: map[string][]string{chainPrerouting: {comment}},
			elems: map[string]map[string]string{setLiftFrom: m, setLiftTo: m},
		})
		if err != nil {
			t.Error(err)
		}
		_, err = guardLayout("sluice-fuzz").state(found{
			exists: true, rules: map[string][]string{chainPrerouting: {comment}},
			elems: map[string]map[string]string{mapGuardPorts: m, mapGuardAddrs: m},
		})
		if err != nil {
			t.Error(err)
		}
		rules := map[string][]string{chainPrerouting: {comment}, netPrefix + "slm0": {comment}, allowPrefix + "10.0.0.1": {comment}}
		meshed := found{exists: true, rules: rules, elems: map[string]map[string]string{
			mapBound: m, mapPublished: m, setMasq: m, mapNets: m, mapAllow: m, mapEntries: m,
		}, chains: map[string]chain{netPrefix + "slm0": {name: netPrefix + "slm0"}, allowPrefix + "10.0.0.1": {name: allowPrefix + "10.0.0.1"}}}
		if _, err := meshLayout().state(meshed); err != nil {
			t.Error(err)
		}
		if _, err := backLayout("sluice-fuzz").state(meshed); err != nil {
			t.Error(err)
		}
		if _, err := withMesh(taskRuleset(), foundMeshes(meshed)).intact(meshed); err != nil {
			t.Error(err)
		}
	})
}

func TestMeshTextsReadBack(t *testing.T) {
	pool, subnet := netip.MustParsePrefix("250.0.0.0/8"), netip.MustParsePrefix("10.255.0.0/20")
	own, gw := netip.MustParseAddr("10.255.0.3"), netip.MustParseAddr("172.18.0.3")
	for _, m := range []meshed{
		{own, kernel.TaskMeshSpec{Pool: pool, MAC: model.MACFor(own), Subnet: subnet}},
		{own, kernel.TaskMeshSpec{Pool: pool, MAC: model.MACFor(own), Subnet: subnet, UDP: true, Default: gw}},
	} {
		if got, ok := parseMeshed(m.text()); !ok || got != m {
			t.Errorf("%q reads back as %v, %v", m.text(), got, ok)
		}
	}
	for _, s := range []string{
		"mesh 10.255.0.3 from 250.0.0.1/8 at 02:42:0a:ff:00:03 in 10.255.0.0/20", // host bits
		"mesh ::1 from 250.0.0.0/8 at 02:42:0a:ff:00:03 in 10.255.0.0/20",
		"mesh 10.255.0.3 from ::/0 at 02:42:0a:ff:00:03 in 10.255.0.0/20 udp ::1", "mesh", "",
	} {
		if m, ok := parseMeshed(s); ok {
			t.Errorf("%q is taken for %v", s, m)
		}
	}
}
