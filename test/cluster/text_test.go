package cluster

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestSnapshotLeavesOutWhatChangesByItself(t *testing.T) {
	const first = "\n\x01link\x01\n" + `[{"ifindex":2,"ifname":"eth0","mtu":1500,"operstate":"UP","linkinfo":{"info_kind":"veth"}}]` +
		"\n\x01addr\x01\n" + `[{"ifname":"eth0","addr_info":[{"local":"10.77.0.11","prefixlen":24},{"local":"fe80::1","prefixlen":64}]}]` +
		"\n\x01route\x01\n10.77.0.0/24 dev eth0 linkdown \nfe80::/64 dev eth0\n" +
		"\n\x01nft\x01\n# Warning: managed\ntable ip a {\n\tcounter packets 1 bytes 2 accept\n\telements = { 10.0.0.1 expires 3s }\n}\n" +
		"\n\x01iptables\x01\n# Generated on Monday\n:INPUT ACCEPT [12:340]\n-A INPUT -j DROP\n" +
		"\n\x01mount\x01\n36 35 98:0 / /run rw,noatime master:1 - tmpfs tmpfs rw\n" +
		"\n\x01link\x01/run/netns/x\n" + `[{"ifname":"lo","mtu":65536}]` + "\n"
	second := strings.NewReplacer(`"ifindex":2`, `"ifindex":7`, "UP", "DOWN", " linkdown", "", "packets 1 bytes 2", "packets 9 bytes 9",
		"expires 3s", "expires 1m2s", "Monday", "Tuesday", "[12:340]", "[0:0]", "36 35", "77 66", "fe80::", "fe80::2").Replace(first)
	a, err := parseSnapshot(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseSnapshot(second)
	if err != nil {
		t.Fatal(err)
	}
	if diff := a.Diff(b); len(diff) > 0 {
		t.Errorf("snapshots differ:\n%s", strings.Join(diff, "\n"))
	}
	want := Snapshot{
		"addr 10.77.0.11/24 dev eth0",
		"iptables -A INPUT -j DROP",
		"iptables :INPUT ACCEPT",
		"link eth0 mtu 1500 kind veth",
		"link in /run/netns/x lo mtu 65536",
		"mount /run tmpfs",
		"nft \tcounter accept",
		"nft \telements = { 10.0.0.1 }",
		"nft table ip a {",
		"nft }",
		"route 10.77.0.0/24 dev eth0",
	}
	if !slices.Equal(a, want) {
		t.Errorf("snapshot is\n%s\nwant\n%s", strings.Join(a, "\n"), strings.Join(want, "\n"))
	}
}

func TestSnapshotDiffCounts(t *testing.T) {
	before := Snapshot{"link a", "link b", "netns x"}
	after := Snapshot{"link b", "link c", "netns x", "netns x"}
	if got, want := before.Diff(after), []string{"-link a", "+link c", "+netns x"}; !slices.Equal(got, want) {
		t.Errorf("diff is %q, want %q", got, want)
	}
}

func TestPortNamesFitTheKernel(t *testing.T) {
	for _, addr := range []string{"10.77.0.11", "255.255.255.255"} {
		// IFNAMSIZ is 16 with the final zero (net/if.h).
		if name := port(netip.MustParseAddr(addr)); len(name) > 15 {
			t.Errorf("port of %s is called %s, %d bytes", addr, name, len(name))
		}
	}
}
