package service_test

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"sluice/internal/model"
	"sluice/lb/service"
)

// TestDatagramsHaveAWayOfTheirOwn: unless the service is one in which UDP has to meet
// TCP, or only one of them can arrive. The way for the rest keeps its number, as what is
// open there goes on.
func TestDatagramsHaveAWayOfTheirOwn(t *testing.T) {
	const alias = "250.0.16.10"
	for name, c := range map[string]struct {
		options     model.ServiceOptions
		vip, meshed []model.PortMap
	}{
		"nothing asked":  {model.ServiceOptions{Published: "80;53/udp"}, []model.PortMap{{}, {Proto: model.UDP}}, []model.PortMap{{}, {Proto: model.UDP}}},
		"by connections": {model.ServiceOptions{Scheduler: "wlc", Published: "80;53/udp"}, []model.PortMap{{}, {Proto: model.UDP}}, []model.PortMap{{}, {Proto: model.UDP}}},
		"TCP published":  {model.ServiceOptions{Published: "80;81/sctp"}, []model.PortMap{{}, {Proto: model.UDP}}, []model.PortMap{{}}},
		"UDP published":  {model.ServiceOptions{Published: "53/udp"}, []model.PortMap{{}, {Proto: model.UDP}}, []model.PortMap{{}}},
		"persistence":    {model.ServiceOptions{Persist: 300, PersistBits: 32, Published: "80;53/udp"}, []model.PortMap{{}}, []model.PortMap{{}}},
		"a threshold":    {model.ServiceOptions{Upper: 10, Published: "80;53/udp"}, []model.PortMap{{}}, []model.PortMap{{}}},
		"source hash":    {model.ServiceOptions{Scheduler: "sh", Published: "80;53/udp"}, []model.PortMap{{}}, []model.PortMap{{}}},
		"Maglev":         {model.ServiceOptions{Scheduler: "mh", Published: "80;53/udp"}, []model.PortMap{{}}, []model.PortMap{{}}},
		"overflow":       {model.ServiceOptions{Scheduler: "ovf", Published: "80;53/udp"}, []model.PortMap{{}}, []model.PortMap{{}}},
		"locality":       {model.ServiceOptions{Scheduler: "lblcr", Published: "80;53/udp"}, []model.PortMap{{}}, []model.PortMap{{}}},
	} {
		w := newWorld()
		w.Self.Datapath = service.IPVS
		s := w.told(web, vipOn(net1, webVIP))
		s.Options = map[model.NetworkID]model.ServiceOptions{net1: c.options}
		w.Services[web] = s
		w.there("e1", web, webVIP, "10.255.0.3")
		got := make(map[netip.Addr][]model.PortMap)
		for _, x := range service.Ways(w.View, []service.Alias{{Network: net1, Service: web, Addr: addr(alias)}}) {
			got[x.At] = append(got[x.At], x.Port)
			const ofVIP, ofAlias = 1316591782, 2073732913
			if want := map[netip.Addr]uint32{webVIP: ofVIP, addr(alias): ofAlias}[x.At]; x.Port == (model.PortMap{}) && x.Mark != want {
				t.Errorf("%s: the way to %s has mark %d, want %d", name, x.At, x.Mark, want)
			}
		}
		if !slices.Equal(got[webVIP], c.vip) || !slices.Equal(got[addr(alias)], c.meshed) {
			t.Errorf("%s: ways %v, want %v and %v", name, got, c.vip, c.meshed)
		}
	}
}

// TestDatagramsYieldTheirMark: of two ways with the same hash it is the one for UDP that
// takes another number, whatever the order of their addresses.
func TestDatagramsYieldTheirMark(t *testing.T) {
	const hash = 1433975634 // of UDP from the task to its own VIP, and of all else to the other VIP
	vip, task, other := addr("10.255.0.47"), addr("10.255.8.213"), addr("10.255.6.20")
	w := newWorld()
	w.Self.Datapath = service.IPVS
	w.told(web, vipOn(net1, vip))
	w.told(db, vipOn(net1, other))
	w.here("e1", web, vip, task.String())
	w.there("e2", db, other, "10.255.0.4")
	marks := make(map[netip.Addr]uint32)
	for _, x := range service.Ways(w.View, nil) {
		if x.At == vip && x.Client == task && x.Port.Proto == model.UDP || x.At == other && x.Port.Proto == "" {
			marks[x.At] = x.Mark
		}
	}
	if want := map[netip.Addr]uint32{vip: hash + 1, other: hash}; !maps.Equal(marks, want) {
		t.Errorf("marks %v, want %v", marks, want)
	}
}
