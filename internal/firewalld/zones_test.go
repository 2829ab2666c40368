package firewalld

import (
	"net/netip"
	"slices"
	"testing"
)

func TestZonesOfPeers(t *testing.T) {
	peer := netip.MustParseAddr("192.0.2.2")
	for _, c := range []struct {
		name string
		z    zones
		want []string
	}{
		{"no zone has the device", zones{standard: "public"}, []string{"public"}},
		{"a zone has it", zones{standard: "public", active: map[string]zone{"internal": {devices: []string{"lo9", "eth0"}}}}, []string{"internal"}},
		{"peers are a source of another", zones{standard: "public", active: map[string]zone{"trusted": {sources: []string{"198.51.100.0/24", "192.0.2.0/24"}}}}, []string{"public", "trusted"}},
		{"a peer itself is", zones{standard: "public", active: map[string]zone{"trusted": {sources: []string{"192.0.2.2"}}}}, []string{"public", "trusted"}},
		{"others are", zones{standard: "public", active: map[string]zone{"work": {sources: []string{"198.51.100.0/24", "00:11:22:33:44:55"}}}}, []string{"public"}},
		{"a set is not looked into", zones{standard: "public", active: map[string]zone{"block": {sources: []string{"ipset:blacklist"}}}}, []string{"public"}},
		{"a set and a peer", zones{standard: "public", active: map[string]zone{"work": {sources: []string{"ipset:nodes", "192.0.2.2"}}}}, []string{"public", "work"}},
		{"nothing is known", zones{}, nil},
	} {
		if got := c.z.open(Want{Device: "eth0", Peers: []netip.Addr{peer}}); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestNoDefaultZoneForAnUnknownDevice(t *testing.T) {
	z := zones{standard: "public", active: map[string]zone{"internal": {devices: []string{"eth0"}}, "trusted": {sources: []string{"192.0.2.0/24"}}}}
	if got := z.open(Want{}); len(got) > 0 {
		t.Errorf("nothing is known of the node: %v", got)
	}
	if got := z.open(Want{Peers: []netip.Addr{netip.MustParseAddr("192.0.2.2")}}); !slices.Equal(got, []string{"trusted"}) {
		t.Errorf("only peers are known: %v", got)
	}
}

func TestMissingPorts(t *testing.T) {
	ports := []Port{{4799, "udp"}, {7947, "tcp"}, {7947, "udp"}}
	for _, c := range []struct {
		name string
		had  [][]string
		want []Port
	}{
		{"none is open", nil, ports},
		{"all are", [][]string{{"7947", "tcp"}, {"7947", "udp"}, {"4799", "udp"}}, nil},
		{"by a range", [][]string{{"4000-8000", "udp"}}, []Port{{7947, "tcp"}}},
		{"by the other protocol", [][]string{{"4799", "tcp"}}, ports},
		{"what is no port", [][]string{{"http", "tcp"}, {"1"}, {"8000-4000", "udp"}}, ports},
	} {
		if got := missing(ports, c.had); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}
