package linux

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"sluice/internal/kernel"
)

func TestChainAsState(t *testing.T) {
	peer := kernel.FilterPeer{VTEP: netip.MustParseAddr("192.0.2.2")}
	jump, accept := jumpRule(4799), acceptRule(peer.VTEP)
	for _, tc := range []struct {
		name  string
		chain chainRules
		port  int // of the filter; -1: no filter
		peer  bool
	}{
		{"nothing", chainRules{}, -1, false},
		{"whole", chainRules{true, []string{accept, dropRule}, []string{jump}}, 4799, true},
		{"without peers", chainRules{true, []string{dropRule}, []string{jump}}, 4799, false},
		{"without jump", chainRules{true, []string{accept, dropRule}, nil}, 0, true},
		{"two jumps", chainRules{true, []string{accept, dropRule}, []string{jump, jumpRule(4800)}}, 0, true},
		{"jump of another form", chainRules{true, []string{accept, dropRule}, []string{"-j " + filterChain}}, 0, true},
		{"empty", chainRules{true, nil, []string{jump}}, 0, false},
		{"DROP first", chainRules{true, []string{dropRule, accept}, []string{jump}}, 0, true},
		{"peer twice", chainRules{true, []string{accept, accept, dropRule}, []string{jump}}, 0, true},
		{"foreign rule", chainRules{true, []string{accept, "-s 203.0.113.0/24 -j ACCEPT", dropRule}, []string{jump}}, 0, true},
	} {
		got, want := tc.chain.state(), kernel.State{}
		if tc.port >= 0 {
			want[kernel.Filter{}] = kernel.FilterSpec{Port: uint16(tc.port)}
		}
		if tc.peer {
			want[peer] = kernel.FilterPeerSpec{}
		}
		if got.Text() != want.Text() {
			t.Errorf("%s:\n%swant\n%s", tc.name, got.Text(), want.Text())
		}
	}
}

func TestForwardAsState(t *testing.T) {
	whole := meshRules("slm")
	for _, tc := range []struct {
		name    string
		rules   forwardRules
		devices string // "-": no object
	}{
		{"nothing", forwardRules{}, "-"},
		{"whole", forwardRules{true, whole, []string{userJump, meshJump, "-j RETURN"}}, "slm"},
		{"rules of the engine between", forwardRules{true, whole, []string{userJump, "-j DOCKER-ISOLATION-STAGE-1", meshJump}}, "slm"},
		{"without an engine", forwardRules{true, whole, []string{"-i x -j ACCEPT", meshJump}}, "slm"},
		{"without jump", forwardRules{true, whole, []string{userJump}}, ""},
		{"jump before people's rules", forwardRules{true, whole, []string{meshJump, userJump}}, ""},
		{"jump behind DROP", forwardRules{true, whole, []string{userJump, "-j DROP", meshJump}}, ""},
		{"DROP before people's rules, which is not ours to judge", forwardRules{true, whole, []string{"-j DROP", userJump, meshJump}}, "slm"},
		{"two jumps", forwardRules{true, whole, []string{userJump, meshJump, "-s 10.0.0.0/8 -j " + meshChain}}, ""},
		{"empty", forwardRules{true, nil, []string{userJump, meshJump}}, ""},
		{"foreign rule", forwardRules{true, append([]string{"-j DROP"}, whole...), []string{userJump, meshJump}}, ""},
	} {
		want := kernel.State{}
		if tc.devices != "-" {
			want[kernel.Forward{}] = kernel.ForwardSpec{Devices: tc.devices}
		}
		if got := tc.rules.state(); got.Text() != want.Text() {
			t.Errorf("%s:\n%swant\n%s", tc.name, got.Text(), want.Text())
		}
	}
}

// passes is what the kernel does with a packet of src.
func passes(rules []string, src netip.Addr) bool {
	for _, r := range rules {
		if a, ok := parseAccept(r); ok && a == src {
			return true
		}
		if r == dropRule {
			return false
		}
	}
	return true
}

// Whatever is in the chain, the repair leads to one ACCEPT for each peer and DROP
// at the end, and on the way there nobody who may pass and did is shut out.
func TestRepairOfChain(t *testing.T) {
	addrs := make([]netip.Addr, 5)
	for i := range addrs {
		addrs[i] = netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
	}
	rapid.Check(t, func(t *rapid.T) {
		rule := rapid.OneOf(
			rapid.Custom(func(t *rapid.T) string { return acceptRule(rapid.SampledFrom(addrs).Draw(t, "peer")) }),
			rapid.SampledFrom([]string{dropRule, "-s 198.51.100.0/24 -j RETURN"}),
		)
		c := chainRules{exists: true, rules: rapid.SliceOfN(rule, 0, 8).Draw(t, "rules")}
		peers := map[netip.Addr]bool{}
		for _, a := range rapid.SliceOfDistinct(rapid.SampledFrom(addrs), rapid.ID).Draw(t, "peers") {
			peers[a] = true
		}
		rules := slices.Clone(c.rules)
		passed := map[netip.Addr]bool{}
		step := func() {
			for a := range peers {
				if passes(rules, a) {
					passed[a] = true
				} else if passed[a] {
					t.Fatalf("%s is shut out by %q", a, rules)
				}
			}
		}
		step()
		fix := c.plan(peers)
		for _, a := range fix.insert {
			rules = slices.Insert(rules, 0, acceptRule(a))
			step()
		}
		if fix.drop {
			rules = append(rules, dropRule)
			step()
		}
		for _, n := range fix.remove {
			at := n + len(fix.insert) - 1
			rules = slices.Delete(rules, at, at+1)
			step()
		}
		c.rules = rules
		if again := c.plan(peers); !again.clean() || len(rules) != len(peers)+1 {
			t.Fatalf("repair leads to %q, which asks for %+v", rules, again)
		}
	})
}

func TestJumpsOfOthersAreNotOurs(t *testing.T) {
	in := []string{
		"-P INPUT ACCEPT",
		"-A INPUT -p udp -m udp --dport 4799 -j SLUICE-VXLAN",
		"-A INPUT -p udp -m comment --comment SLUICE-VXLAN -j ACCEPT",
		"-A INPUT -j SLUICE-VXLAN-2",
		"-A INPUT -g SLUICE-VXLAN",
	}
	got := jumpsOf(ownRules(in, inputChain))
	if want := []string{"-p udp -m udp --dport 4799 -j SLUICE-VXLAN", "-g SLUICE-VXLAN"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward":           "/proc/sys/net/ipv4/ip_forward",
		"net.ipv4.conf.eth0/1.proxyarp": "/proc/sys/net/ipv4/conf/eth0.1/proxyarp",
		"":                              "",
		"..etc":                         "",
		"net.//.//.//.etc":              "",
		"net..ipv4":                     "",
	} {
		if got, err := sysctlPath(name); got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", name, got, err, want)
		}
	}
}

// What a kernel lacks, it does not do: to forbid it is done already, to ask for it
// is not. Other keys are not to be missed.
func TestWhenMissing(t *testing.T) {
	for name, want := range map[string]string{
		"net.bridge.bridge-nf-call-iptables": "0",
		"net.ipv4.vs.conntrack":              "0",
		"net.ipv6.conf.all.disable_ipv6":     "1",
		"net.ipv4.vs.conn_reuse_mode":        "",
		"net.ipv4.ip_forward":                "",
	} {
		if got, ok := whenMissing(name); got != want || ok != (want != "") {
			t.Errorf("%s: %q, %v; want %q", name, got, ok, want)
		}
	}
}

func TestParseMount(t *testing.T) {
	for _, tc := range []struct {
		line   string
		point  string
		shared bool
		ok     bool
	}{
		{"36 35 98:0 / /run rw,noatime shared:1 master:2 - tmpfs tmpfs rw", "/run", true, true},
		{"36 35 98:0 / /run rw,noatime - tmpfs tmpfs rw", "/run", false, true},
		{"36 35 98:0 / /run rw,noatime master:2 - tmpfs shared:1 rw", "/run", false, true},
		{`36 35 98:0 / /a\040b rw shared:7 - tmpfs tmpfs rw`, "/a b", true, true},
		{"36 35 98:0 / /run", "", false, false},
		{"", "", false, false},
	} {
		point, shared, ok := parseMount(tc.line)
		if point != tc.point || shared != tc.shared || ok != tc.ok {
			t.Errorf("%q: %q %v %v", tc.line, point, shared, ok)
		}
	}
}

func TestIncompatible(t *testing.T) {
	local := netip.MustParseAddr("192.0.2.1")
	key := kernel.Link{NS: "sluice-a", Name: "vxlan0", Kind: kernel.VXLAN}
	want := kernel.LinkSpec{VNI: 7, Port: 4799, Local: local, MTU: 1450}
	for reason, d := range map[string]device{
		"":                                  {kind: "vxlan", vni: 7, port: 4799, local: local, mtu: 1000},
		"kind: bridge, want vxlan":          {kind: "bridge"},
		"vni: 5, want 7":                    {kind: "vxlan", vni: 5, port: 4799, local: local},
		"port: 8472, want 4799":             {kind: "vxlan", vni: 7, port: 8472, local: local},
		"local: invalid IP, want 192.0.2.1": {kind: "vxlan", vni: 7, port: 4799},
	} {
		if got := incompatible(d, key, want); got != reason {
			t.Errorf("%q, want %q", got, reason)
		}
	}
}

// The kernel is trusted, but a parser that can be made to panic is one that was
// not thought through.
func FuzzParseMessages(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 64))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseLink(b)
		parseNeigh(b)
		parseAddr(b)
		parseRoute(b)
	})
}

func FuzzRuleText(f *testing.F) {
	f.Add(acceptRule(netip.MustParseAddr("192.0.2.1")))
	f.Add(jumpRule(4799))
	f.Fuzz(func(t *testing.T, s string) {
		if a, ok := parseAccept(s); ok && acceptRule(a) != s {
			t.Errorf("%q reads as %s, which is written %q", s, a, acceptRule(a))
		}
		if p, ok := parseJump(s); ok && jumpRule(p) != s {
			t.Errorf("%q reads as %d, which is written %q", s, p, jumpRule(p))
		}
	})
}
