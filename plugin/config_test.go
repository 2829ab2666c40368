package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sluice/internal/options"
	"sluice/ipam/pool"
	"sluice/lb/ingress"
)

func env(m map[string]string) func(string) string {
	return func(name string) string { return m[name] }
}

func TestDefaultsHoldWithoutAnyEnvironment(t *testing.T) {
	// An upgraded plugin gets no value for settings that its former version did
	// not have; one that was set to nothing gets an empty one.
	got, err := parseConfig(env(nil))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Scope: "global", VXLANPort: 4799, GossipPort: 7947, KeyPort: 7948,
		Pools: pool.DefaultSupernets(), SubnetBits: pool.DefaultBits, MeshPool: ingress.DefaultPool(),
		Metrics: netip.MustParseAddrPort("0.0.0.0:9247"), Firewalld: true,
		LogLevel: slog.LevelInfo, StateDir: "/var/lib/sluice", HostRun: "/host/run",
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestSettingsAreRead(t *testing.T) {
	got, err := parseConfig(env(map[string]string{
		"SCOPE": "local", "VXLAN_PORT": "4789", "GOSSIP_PORT": " 7000 ", "GOSSIP_BIND": "192.0.2.7",
		"GOSSIP_KEY": strings.Repeat("41", 32), "KEY_PORT": "7001", "POOL": "10.8.0.0/14, 10.16.0.0/16..10.18.0.0/16", "SUBNET_SIZE": "24", "MESH_POOL": "11.0.0.0/8",
		"DATAPATH": "nft", "FIREWALLD": "off", "METRICS_ADDR": "127.0.0.1:9000", "LOG_LEVEL": "DEBUG", "STATE_DIR": "/state/", "HOST_RUN": "/hr",
	}))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Scope: "local", VXLANPort: 4789, GossipPort: 7000, GossipBind: netip.MustParseAddr("192.0.2.7"),
		GossipKey: options.Key(strings.Repeat("A", 32)), KeyPort: 7001,
		Pools: prefixes("10.8.0.0/14", "10.16.0.0/16", "10.17.0.0/16", "10.18.0.0/16"), SubnetBits: 24,
		MeshPool: netip.MustParsePrefix("11.0.0.0/8"),
		Metrics:  netip.MustParseAddrPort("127.0.0.1:9000"),
		NoIPVS:   true, LogLevel: slog.LevelDebug, StateDir: "/state", HostRun: "/hr",
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestBadSettingsAreNamedWithWhatIsAllowed(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"SCOPE", "swarm", `SCOPE="swarm": want global or local`},
		{"VXLAN_PORT", "0", "from 1 to 65535"},
		{"MESH_POOL", "10.0.0.0/8", "settings POOL and MESH_POOL both have 10.255.0.0/16"},
		{"MESH_POOL", "250.0.0.0/9", "no IPv4 prefix of length 8, such as 250.0.0.0/8"},
		{"VXLAN_PORT", "7947", "VXLAN_PORT and GOSSIP_PORT are both 7947"},
		{"GOSSIP_PORT", "7947/tcp", "from 1 to 65535"},
		{"KEY_PORT", "7947", "KEY_PORT and GOSSIP_PORT are both 7947"},
		{"KEY_PORT", "-1", "from 1 to 65535"},
		{"GOSSIP_BIND", "0.0.0.0", "an IPv4 address of this node"},
		{"GOSSIP_BIND", "eth0", "an IPv4 address of this node"},
		{"GOSSIP_KEY", "hunter2", "GOSSIP_KEY=(redacted): not a gossip key"},
		{"POOL", "10.255.0.0", "is no prefix"},
		{"POOL", "10.255.0.1/16", "bits set behind the prefix"},
		{"POOL", "fd00::/48", "want IPv4 prefixes"},
		{"POOL", "10.0.0.0/24..10.255.0.0/24", "65281 pools"},
		{"POOL", "10.0.0.0/16..10.9.0.0/17", "same length"},
		{"POOL", "10.0.0.0/8,10.1.0.0/16", "10.0.0.0/8 and 10.1.0.0/16 overlap"},
		{"POOL", "0.0.0.0/0", "whole Internet"},
		{"POOL", "127.0.0.0/16", "POOL and SUBNET_SIZE: "},
		{"SUBNET_SIZE", "12", "POOL and SUBNET_SIZE: "},
		{"SUBNET_SIZE", "/20", "length of an IPv4 prefix"},
		{"SUBNET_SIZE", "32", "POOL and SUBNET_SIZE: "},
		{"DATAPATH", "ipvs", "want auto or nft"},
		{"FIREWALLD", "on", "want auto or off"},
		{"METRICS_ADDR", "9247", "such as 0.0.0.0:9247"},
		{"METRICS_ADDR", "0.0.0.0:0", "such as 0.0.0.0:9247"},
		{"METRICS_ADDR", "localhost:9247", "or off"},
		{"METRICS_ADDR", "0.0.0.0:7947", "METRICS_ADDR has port 7947"},
		{"LOG_LEVEL", "info+2", "debug, info, warn or error"},
		{"STATE_DIR", "state", "absolute path"},
		{"HOST_RUN", "./run", "absolute path"},
	} {
		t.Run(c.name+"="+c.value, func(t *testing.T) {
			_, err := parseConfig(env(map[string]string{c.name: c.value}))
			if err == nil {
				t.Fatal("accepted")
			}
			text := err.Error()
			if !strings.Contains(text, c.want) || !strings.Contains(text, "docker plugin set") {
				t.Errorf("%s\nwants %q and how to repair it", text, c.want)
			}
			if strings.Contains(text, "hunter2") || strings.Contains(text, "\n") {
				t.Errorf("%q has a secret or more than a line", text)
			}
		})
	}
}

func TestAllBadSettingsAreToldAtOnceAndHaveDefaults(t *testing.T) {
	c, err := parseConfig(env(map[string]string{"SCOPE": "x", "VXLAN_PORT": "y", "LOG_LEVEL": "z"}))
	for _, name := range []string{"SCOPE", "VXLAN_PORT", "LOG_LEVEL"} {
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v does not name %s", err, name)
		}
	}
	if c.Scope != "global" || c.VXLANPort != 4799 || c.LogLevel != slog.LevelInfo {
		t.Errorf("got %+v", c)
	}
}

func TestDescribedSettingsTellWhatIsSetAndNoSecret(t *testing.T) {
	key := strings.Repeat("41", 16)
	rows := describeConfig(env(map[string]string{"GOSSIP_KEY": key, "LOG_LEVEL": "debug"}))
	if len(rows) != len(settings) {
		t.Fatalf("%d rows for %d settings", len(rows), len(settings))
	}
	for _, r := range rows {
		if isSet := r.Name == "GOSSIP_KEY" || r.Name == "LOG_LEVEL"; r.Default == isSet {
			t.Errorf("%s: default is %v", r.Name, r.Default)
		}
	}
	if strings.Contains(fmt.Sprint(rows), key) || !strings.Contains(fmt.Sprint(rows), options.Redacted) {
		t.Error("the key is shown, or nothing in its place")
	}
}

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range texts {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestHealthChecksAndMetricsCanBeOff(t *testing.T) {
	for _, off := range []string{"off", "OFF"} {
		if c, err := parseConfig(env(map[string]string{"METRICS_ADDR": off})); err != nil || c.Metrics.IsValid() {
			t.Errorf("%s: %v %v", off, c.Metrics, err)
		}
	}
}

// TestOwnPortsAreReserved, of what this process does only.
func TestOwnPortsAreReserved(t *testing.T) {
	const vxlan, gossip, gossipUDP, key, metrics = "4799/udp", "7947/tcp", "7947/udp", "7948/tcp", "9247/tcp"
	for _, c := range []struct {
		name string
		env  map[string]string
		want []string
	}{
		{"all", nil, []string{vxlan, gossip, gossipUDP, key, metrics}},
		{"a key of the operator's", map[string]string{"GOSSIP_KEY": strings.Repeat("0f", 32)}, []string{vxlan, gossip, gossipUDP, metrics}},
		{"no metrics", map[string]string{"METRICS_ADDR": "off"}, []string{vxlan, gossip, gossipUDP, key}},
		{"networks of one engine", map[string]string{"SCOPE": "local"}, nil},
	} {
		cfg, err := parseConfig(env(c.env))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		engine := 0
		for p, what := range cfg.reserved() {
			if strings.Contains(what, "the engine") {
				engine++ // 2377/tcp, 7946/tcp and udp, 4789/udp
				continue
			}
			got = append(got, p.String())
		}
		if want := min(len(c.want), 1) * 4; engine != want {
			t.Errorf("%s: %d ports of the engine, want %d", c.name, engine, want)
		}
		slices.Sort(got)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
