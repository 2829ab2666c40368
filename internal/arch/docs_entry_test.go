package arch

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/internal/reconcile"
	"sluice/internal/view"
	"sluice/lb/service"
)

// led is what `sluice entry` answers on the first of the two nodes of example, where
// the service publishes a port, and another one that a process has.
func led(t *testing.T, port string) diag.Ports {
	n := &leading{view: example(nil)[0]}
	n.view.Self.Datapath = service.IPVS
	n.view.Entries = make(map[model.NetworkID]map[model.NodeID]model.Entry)
	for id := range n.view.Networks {
		n.view.Entries[id] = map[model.NodeID]model.Entry{}
		for i, a := range []string{"10.255.15.1", "10.255.15.2"} {
			n.view.Entries[id][nodeID(i)] = model.Entry{Addr: netip.MustParseAddr(a), Number: uint16(i + 1), VTEP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})}
		}
		for sid, s := range n.view.Services {
			s.Options = map[model.NetworkID]model.ServiceOptions{id: {Published: "81:80/tcp;8443/tcp"}}
			n.view.Services[sid] = s
		}
	}
	n.view.Taken = map[model.HostPort]string{{Proto: model.TCP, Port: 8443}: "nginx (pid 811)"}
	for id, e := range n.view.Endpoints {
		e.Meshed = e.Task.ID != ""
		n.view.Endpoints[id] = e
	}
	for id, r := range n.view.Remotes {
		r.Meshed = true
		n.view.Remotes[id] = r
	}
	n.want = plan.Host(n.view)
	s := diag.NewServer(diag.Config{
		Hub: n, Loop: n, Sockets: n, Log: slog.New(slog.DiscardHandler), Traffic: n.traffic,
		Abilities: func() []diag.Ability { return nil },
	})
	a, err := s.Ports(t.Context(), port)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// leading is a node whose kernel has all that it should.
type leading struct {
	view model.View
	want kernel.State
}

func (n *leading) View() model.View             { return n.view }
func (n *leading) Engine() model.EngineSnapshot { return model.EngineSnapshot{HostName: "h1"} }
func (n *leading) Peers() []view.Peer {
	return []view.Peer{{Node: nodeID(1), Name: "h2", Present: true}}
}
func (n *leading) Unclaimed() map[model.NetworkID]error {
	return nil
}
func (n *leading) Stats() reconcile.Stats { return reconcile.Stats{LastDump: time.Now()} }
func (n *leading) Last() reconcile.Round  { return reconcile.Round{Want: n.want, Have: n.want} }
func (n *leading) Inspect(context.Context) ([]kernel.Op, error) {
	return nil, nil
}
func (n *leading) Failed() map[model.HostPort]error { return nil }
func (n *leading) Absent() map[netip.Addr]bool      { return nil }
func (n *leading) Missed() uint64                   { return 0 }

// traffic is 20 requests of curl by the published port, of which each task got half.
func (n *leading) traffic(context.Context, string) (map[kernel.Key]kernel.Traffic, error) {
	out := make(map[kernel.Key]kernel.Traffic)
	for k, v := range n.want {
		m, ok := k.(kernel.Mark)
		if !ok || m.VIP.As4()[0] != 250 {
			continue
		}
		mark := v.(kernel.MarkSpec).Mark
		out[kernel.IPVSService{NS: m.NS, Mark: mark}] = kernel.Traffic{Connections: 20, PacketsIn: 120, BytesIn: 7760}
		for k := range n.want {
			if d, ok := k.(kernel.IPVSDest); ok && d.Mark == mark {
				out[d] = kernel.Traffic{Connections: 10, PacketsIn: 60, BytesIn: 3880, Inactive: 10}
			}
		}
	}
	return out, nil
}
