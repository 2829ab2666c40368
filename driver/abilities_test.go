package driver_test

import (
	"errors"
	"testing"

	"sluice/driver"
	"sluice/internal/model"
)

var (
	errNoIPVS = errors.New("IPVS is not supported")
	errNoIPIP = errors.New("ipip is not supported")
)

func noIPIP() error { return errNoIPIP }

func TestWhatThisKernelCannotDoIsRefused(t *testing.T) {
	lacking := driver.Abilities{NoIPVS: errNoIPVS, NoTunnel: noIPIP}
	for _, c := range []struct {
		name             string
		network, service map[string]string
		lacks            driver.Abilities
		words            []string // none: it is served
	}{
		{"ipvs where it is", map[string]string{"sluice.datapath": "ipvs", "sluice.scheduler": "wlc", "sluice.mode": "tun"},
			map[string]string{"sluice.threshold.upper": "9"}, driver.Abilities{}, nil},
		{"ipvs where it is not", map[string]string{"sluice.datapath": "ipvs"}, nil, lacking,
			[]string{"network webnetwork00", `sluice.datapath="ipvs"`, "IPVS is not supported", "allowed: auto", "modprobe ip_vs"}},
		{"auto is the nearest", map[string]string{"sluice.scheduler": "wlc"}, map[string]string{"sluice.scheduler": "lc"}, lacking, nil},
		{"tun without ipip", map[string]string{"sluice.mode": "tun"}, nil, lacking,
			[]string{"network webnetwork00", `sluice.mode="tun"`, "ipip is not supported", "allowed: dr, nat", "modprobe ipip"}},
		{"tun without ip_vs", map[string]string{"sluice.mode": "tun"}, nil, driver.Abilities{NoIPVS: errNoIPVS}, nil},
		{"nat needs nothing", map[string]string{"sluice.mode": "nat"}, map[string]string{"sluice.mode": "nat"}, lacking, nil},
		{"a service's tun without ipip", nil, map[string]string{"sluice.mode": "tun"}, lacking,
			[]string{"create endpoint aaaaaaaaaaaa", `sluice.mode="tun"`, "ipip is not supported", "allowed: dr, nat"}},
		{"thresholds without ip_vs", nil, map[string]string{"sluice.threshold.upper": "9"}, lacking,
			[]string{`sluice.threshold.upper="9"`, "IPVS is not supported", "allowed: 0"}},
		{"a service that counts on nft", map[string]string{"sluice.datapath": "nft"}, map[string]string{"sluice.scheduler": "nq"}, driver.Abilities{},
			[]string{`sluice.scheduler="nq"`, "sluice.datapath=nft", "allowed: rr, wrr"}},
		{"thresholds on nft", map[string]string{"sluice.datapath": "nft"}, map[string]string{"sluice.threshold.upper": "9"}, driver.Abilities{},
			[]string{`sluice.threshold.upper="9"`, "sluice.datapath=nft"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHostThat(t, false, c.lacks)
			opts := h.allocated(t, c.network)
			if opts["sluice.refused"] != "" {
				t.Fatalf("the leader needs no kernel for it: %s", opts["sluice.refused"])
			}
			err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: opts, Subnets: plain})
			if err == nil {
				_, err = h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20"), Options: c.service})
			}
			if c.words == nil && err != nil {
				t.Fatal(err)
			}
			complains(t, err, c.words...)
			v := h.hub.View()
			if refused := len(c.words) > 0; refused && len(v.Endpoints) > 0 || refused && c.service == nil && len(v.Networks) > 0 {
				t.Error("it was recorded all the same")
			}
		})
	}
}

// TestTunnelsAreLookedForOnlyIfWanted: looking for them changes the host.
func TestTunnelsAreLookedForOnlyIfWanted(t *testing.T) {
	for _, c := range []struct {
		network, service string
		want             int
	}{{"", "", 0}, {"dr", "nat", 0}, {"tun", "", 1}, {"", "tun", 1}, {"tun", "tun", 2}} {
		t.Run(c.network+"/"+c.service, func(t *testing.T) {
			asked := 0
			h := newHostThat(t, false, driver.Abilities{NoTunnel: func() error { asked++; return nil }})
			mode := func(m string) map[string]string {
				if m == "" {
					return nil
				}
				return map[string]string{"sluice.mode": m}
			}
			err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, mode(c.network)), Subnets: plain})
			if err != nil {
				t.Fatal(err)
			}
			_, err = h.CreateEndpoint(t.Context(), driver.EndpointRequest{
				Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20"), Options: mode(c.service),
			})
			if err != nil {
				t.Fatal(err)
			}
			if asked != c.want {
				t.Errorf("asked %d times, want %d", asked, c.want)
			}
		})
	}
}

// TestWhatIsThereIsTakenOverAsItIs: a kernel that has lost its ip_vs keeps the
// containers that run.
func TestWhatIsThereIsTakenOverAsItIs(t *testing.T) {
	h := newHostThat(t, false, driver.Abilities{NoIPVS: errNoIPVS, NoTunnel: noIPIP})
	opts := h.allocated(t, map[string]string{"sluice.datapath": "ipvs", "sluice.mode": "tun"})
	if err := h.Adopt(t.Context(), model.EngineSnapshot{
		Networks: map[model.NetworkID]model.EngineNetwork{web: {
			ID: web, Swarm: true, Options: opts, Subnet: plain[0].Pool, Gateway: plain[0].Gateway.Addr(),
		}},
		Containers: map[model.EndpointID]model.EngineEndpoint{webEnd: {Network: web, Addr: prefix("10.255.0.2/20").Addr()}},
	}); err != nil {
		t.Fatal(err)
	}
	if v := h.hub.View(); len(v.Networks) != 1 || len(v.Endpoints) != 1 {
		t.Errorf("taken over: %v, %v", v.Networks, v.Endpoints)
	}
}
