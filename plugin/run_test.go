package main

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"sluice/internal/diag"
	"sluice/internal/firewalld"
	"sluice/internal/options"
	"sluice/internal/view"
)

// To find out about tunnels changes the host: it is done once, and not to report it.
func TestTunnelsAreReportedOnceAskedFor(t *testing.T) {
	for _, answer := range []error{nil, errors.New("ipip is not supported")} {
		asked := 0
		p := &parts{}
		ask := p.askTunnel(func() error { asked++; return answer })
		ipip := func(a diag.Ability) bool { return a.Name == "ipip" }
		if slices.ContainsFunc(p.abilities(), ipip) || asked > 0 {
			t.Errorf("asked %d times before anybody wanted to know", asked)
		}
		for range 2 {
			if err := ask(); !errors.Is(err, answer) {
				t.Errorf("%v, want %v", err, answer)
			}
		}
		all := p.abilities()
		if i := slices.IndexFunc(all, ipip); i < 0 || !errors.Is(all[i].Err, answer) || asked != 1 {
			t.Errorf("asked %d times, reported: %v", asked, all)
		}
	}
}

func TestPortsWantedOfFirewalld(t *testing.T) {
	nodes := []firewalld.Port{{Number: 4799, Proto: "udp"}, {Number: 7947, Proto: "tcp"}, {Number: 7947, Proto: "udp"}}
	withKey := append(slices.Clone(nodes), firewalld.Port{Number: 7948, Proto: "tcp"})
	peers := []netip.Addr{netip.MustParseAddr("192.0.2.2")}
	for _, c := range []struct {
		name    string
		manager bool
		key     string
		device  string
		want    firewalld.Want
	}{
		{"a worker", false, "", "eth0", firewalld.Want{Ports: nodes, Device: "eth0", Peers: peers}},
		{"a manager", true, "", "eth0", firewalld.Want{Ports: withKey, Device: "eth0", Peers: peers}},
		{"a manager that gives no key", true, "k", "eth0", firewalld.Want{Ports: nodes, Device: "eth0", Peers: peers}},
		{"the device is not known", true, "", "", firewalld.Want{}},
	} {
		cfg := Config{VXLANPort: 4799, GossipPort: 7947, KeyPort: 7948, GossipKey: options.Key(c.key)}
		if got := wantPorts(cfg, c.manager, c.device, []view.Peer{{VTEP: "192.0.2.2"}, {}}); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}
