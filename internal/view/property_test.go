package view

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

// play does one random thing to a node.
func play(t *rapid.T, n *node) {
	ids := rapid.SampledFrom([]model.EndpointID{one, two, "e3"})
	nets := rapid.SampledFrom([]model.NetworkID{web, "dbnetwork"})
	some := func(what string) bool { return rapid.Bool().Draw(t, what) }
	switch rapid.IntRange(0, 10).Draw(t, "call") {
	case 0:
		net := network(nets.Draw(t, "network"))
		net.Local = rapid.IntRange(0, 3).Draw(t, "local") == 0
		must[uint64](t)(n.PutNetwork(t.Context(), net))
	case 1:
		must[uint64](t)(n.DeleteNetwork(t.Context(), nets.Draw(t, "network")))
	case 2, 3:
		e := endpoint(ids.Draw(t, "endpoint"), "10.255.0.2", model.Phase(rapid.IntRange(0, 2).Draw(t, "phase")))
		e.Network, e.Left = nets.Draw(t, "network"), some("left")
		must[uint64](t)(n.PutEndpoint(t.Context(), e))
	case 4:
		must[uint64](t)(n.DeleteEndpoint(t.Context(), ids.Draw(t, "endpoint")))
	case 5:
		ok(t, n.SetVTEP(t.Context(), rapid.SampledFrom([]netip.Addr{addr("192.168.0.1"), addr("192.168.0.2")}).Draw(t, "vtep")))
	case 6:
		ok(t, n.SetEngine(t.Context(), snapshot(t, n.clock)))
	case 7:
		ok(t, n.SetTables(t.Context(), tables(t)))
	case 8:
		v := n.View()
		r := reconcile.Round{View: v, Want: kernel.State{}, Read: found(t, v)}
		for id := range v.Endpoints {
			r.Want[kernel.TaskVIP{Sandbox: v.Endpoints[id].Sandbox, VIP: vip}] = kernel.TaskVIPSpec{Addr: v.Endpoints[id].Addr}
			r.Want[kernel.TaskTunnel{Sandbox: v.Endpoints[id].Sandbox, Addr: v.Endpoints[id].Addr}] = kernel.TaskTunnelSpec{}
			r.Want[kernel.TaskMesh{Sandbox: v.Endpoints[id].Sandbox, Addr: v.Endpoints[id].Addr}] = kernel.TaskMeshSpec{}
		}
		_, err := n.Observe(t.Context(), r)
		ok(t, err)
	case 9:
		n.clock.now = n.clock.now.Add(time.Duration(rapid.IntRange(0, 60).Draw(t, "seconds")) * time.Second)
		ok(t, n.Sweep(t.Context(), found(t, n.View())))
	case 10:
		ok(t, n.Claim(t.Context()))
	}
}

// found is what the kernel shows of a view's endpoints, more or less.
func found(t *rapid.T, v model.View) kernel.State {
	s := kernel.State{}
	for _, id := range []model.EndpointID{one, two, "e3"} {
		e, known := v.Endpoints[id]
		if known && rapid.Bool().Draw(t, "pair") {
			s[kernel.Link{NS: overlay.NetnsName(v.Networks[e.Network]), Name: overlay.HostEnd(id), Kind: kernel.Veth}] = kernel.LinkSpec{}
		}
		if known && rapid.Bool().Draw(t, "translation") {
			s[kernel.TaskVIP{Sandbox: e.Sandbox, VIP: vip}] = kernel.TaskVIPSpec{Addr: e.Addr}
		}
		if known && rapid.Bool().Draw(t, "mesh") {
			s[kernel.TaskMesh{Sandbox: e.Sandbox, Addr: e.Addr}] = kernel.TaskMeshSpec{}
		}
		if known && rapid.Bool().Draw(t, "tunnel") {
			s[kernel.TaskTunnel{Sandbox: e.Sandbox, Addr: e.Addr}] = kernel.TaskTunnelSpec{}
		}
	}
	return s
}

func snapshot(t *rapid.T, c *clock) model.EngineSnapshot {
	s := swarm(rapid.SampledFrom([]model.NodeID{"nodeA", "nodeA", "nodeA", "nodeX"}).Draw(t, "node"), "192.168.0.1")
	s.SwarmValid, s.ContainersValid, s.NetworksValid = rapid.Bool().Draw(t, "swarm"), rapid.Bool().Draw(t, "containers"), rapid.Bool().Draw(t, "networks")
	s.ContainersAt = c.now
	for _, id := range []model.EndpointID{one, two} {
		if rapid.Bool().Draw(t, "runs") {
			s = runs(s, id)
		}
	}
	if rapid.Bool().Draw(t, "leads") {
		s = leads(s, rapid.SampledFrom([]string{"web", "renamed"}).Draw(t, "name"), model.TaskID("task-"+one.Short()))
	}
	return s
}

// tables is what gossip may bring: of two other nodes, and of this one.
func tables(t *rapid.T) []Table {
	var out []Table
	for _, owner := range []model.NodeID{"nodeA", "nodeB", "nodeC"} {
		if !rapid.Bool().Draw(t, "listed") {
			continue
		}
		entries := map[string][]byte{}
		if rapid.IntRange(0, 4).Draw(t, "node record") > 0 {
			entries[keyNode] = encode(nodeRecord{VTEP: addr(fmt.Sprintf("192.168.0.%d", owner[4])), Name: string(owner)})
		}
		for i := range 2 {
			if rapid.Bool().Draw(t, "endpoint record") {
				at := addr(fmt.Sprintf("10.255.1.%d", i+1))
				entries[fmt.Sprintf("endpoint/remote%d", i)] = encode(endpointRecord{
					Network: web, Addr: at, MAC: model.MACFor(at),
					Task: model.Task{ID: "task-r", Service: svc, VIP: vip, Ready: rapid.Bool().Draw(t, "ready")}, Prepared: vip,
					Tunnel: rapid.Bool().Draw(t, "tunnel"), Options: model.ServiceOptions{Ports: "80/tcp", Persist: 300, PersistBits: 24},
				})
			}
		}
		if rapid.IntRange(0, 3).Draw(t, "lead record") == 0 {
			entries[keyLead] = encode(leadRecord{Claim: uint64(rapid.IntRange(1, 4).Draw(t, "claim")), Confirmed: rapid.Bool().Draw(t, "confirmed")})
			entries[keyLeaving] = encode(leavingRecord{[]model.TaskID{"task-r"}})
			entries[keyService+string(svc)] = encode(serviceRecord{Name: "by " + string(owner), VIPs: map[model.NetworkID]netip.Addr{web: vip},
				Options: map[model.NetworkID]model.ServiceOptions{web: {Published: "80/tcp", Nodes: "zone=a"}}})
			entries[keyNetwork+string(web)] = encode(networkRecord{Name: "web", Subnet: network(web).Subnet, Gateway: network(web).Gateway, VNI: 7, MTU: 1450})
			entries[keyLabels+"nodeA"] = encode(labelsRecord{map[string]string{"zone": rapid.SampledFrom([]string{"a", "b"}).Draw(t, "zone")}})
		}
		if rapid.Bool().Draw(t, "entry record") {
			entries[keyEntry+string(web)] = encode(entryRecord{addr(fmt.Sprintf("10.255.15.%d", owner[4])), rapid.Uint16Range(1, 3).Draw(t, "number")})
		}
		if rapid.IntRange(0, 4).Draw(t, "nonsense") == 0 {
			entries["endpoint/bad"] = []byte("{")
		}
		out = append(out, Table{Owner: owner, Present: rapid.Bool().Draw(t, "present"), Whole: rapid.Bool().Draw(t, "whole"), Entries: entries})
	}
	return out
}

// TestARestartBeginsWhereTheFormerLifeEnded: from any point.
func TestARestartBeginsWhereTheFormerLifeEnded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := fresh(t)
		for range rapid.IntRange(0, 30).Draw(t, "calls") {
			play(t, n)
			if rapid.IntRange(0, 9).Draw(t, "restart") == 0 {
				n = n.restarted(t)
			}
		}
		again := n.restarted(t)
		// Not durable, and the difference: what a former leader wanted gone, of others' tasks;
		// that this one's engine has confirmed its claim; and what was said last by one that
		// has given up, or is heard in part.
		n.leaving, n.view, n.heard = nil, nil, false
		n.engine.Leader = false
		for _, t := range n.tables {
			t.whole, t.gaps = true, false
		}
		n.electLocked()
		n.heedLocked()
		if d := same(n.View(), again.View()); d != "" {
			t.Fatalf("before (-) and after (+):\n%s", d)
		}
		a, b := n.Records(), again.Records()
		delete(a, keyNode) // holds the host's name, which the engine tells anew
		delete(b, keyNode)
		if n.claim > 0 {
			a[keyLead] = encode(leadRecord{Claim: n.claim})
		}
		for key, raw := range a {
			if !slices.Equal(raw, b[key]) {
				t.Fatalf("record %s: before %s, after %s", key, raw, b[key])
			}
		}
		if len(a) != len(b) {
			t.Fatalf("%d records before, %d after", len(a), len(b))
		}
	})
}

// TestAViewIsTheSameEachTime: maps are walked in another order each time.
func TestAViewIsTheSameEachTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := fresh(t)
		for range rapid.IntRange(0, 20).Draw(t, "calls") {
			play(t, n)
		}
		first := n.View()
		for range 4 {
			n.mu.Lock()
			again := n.buildLocked()
			n.mu.Unlock()
			if d := same(first, again); d != "" {
				t.Fatalf("first (-) and again (+):\n%s", d)
			}
		}
	})
}

// FuzzDecode feeds other nodes' records, of any key, to the decoder.
func FuzzDecode(f *testing.F) {
	at := addr("10.255.0.2")
	f.Add(keyNode, string(encode(nodeRecord{VTEP: addr("192.168.0.1"), Name: "host"})))
	f.Add(keyLead, string(encode(leadRecord{Claim: 3})))
	f.Add(keyLeaving, string(encode(leavingRecord{[]model.TaskID{"t"}})))
	f.Add(keyDrained, string(encode(drainedRecord{[]model.NodeID{"n"}})))
	f.Add("endpoint/x", string(encode(endpointRecord{Network: web, Addr: at, MAC: model.MACFor(at), Prepared: vip})))
	f.Add("endpoint/y", string(encode(endpointRecord{Network: web, Addr: at, MAC: model.MACFor(at), Tunnel: true, Options: model.ServiceOptions{Mode: "tun", Ports: "80/tcp", Persist: 9, PersistBits: 32, OnePacket: true, Upper: 2, Lower: 1, Idle: 3}})))
	f.Add("service/x", string(encode(serviceRecord{Name: "web", VIPs: map[model.NetworkID]netip.Addr{web: vip}})))
	f.Add("entry/x", string(encode(entryRecord{addr("10.255.15.1"), 7})))
	f.Add("network/x", string(encode(networkRecord{Name: "web", Subnet: network(web).Subnet, Gateway: network(web).Gateway, VNI: 7})))
	f.Add("labels/x", string(encode(labelsRecord{map[string]string{"zone": "a"}})))
	f.Add("of-a-later-version", "anything")
	f.Fuzz(func(t *testing.T, key, raw string) {
		v, err := decode(key, []byte(raw))
		if err != nil {
			if v != nil {
				t.Errorf("%s: a value beside an error", key)
			}
			return
		}
		if r, ok := v.(endpointRecord); ok && (r.Network == "" || !r.Addr.Is4() || r.MAC.IsZero()) {
			t.Errorf("%s: accepted %+v", key, r)
		}
		if v == nil {
			return
		}
		// What was understood is understood the same when it is written again.
		again, err := decode(key, encode(v))
		if err != nil || string(encode(again)) != string(encode(v)) {
			t.Errorf("%s: %+v, then %+v, %v", key, v, again, err)
		}
	})
}
