package monitor

import (
	"cmp"
	"strings"

	"github.com/VictoriaMetrics/metrics"

	"sluice/internal/diag"
)

// text is the answer to a collector, in the text format of Prometheus.
func text(st diag.Status, ss diag.Services, stopping bool) string {
	set := metrics.NewSet()
	// The same labels twice are the same metric: GetOrCreate, for nothing here may
	// panic over what the swarm tells.
	gauge := func(name string, value float64, labels ...string) {
		set.GetOrCreateGauge(series(name, labels), nil).Set(value)
	}
	counter := func(name string, value uint64, labels ...string) {
		set.GetOrCreateCounter(series(name, labels)).Set(value)
	}

	gauge("sluice_node_info", 1, "version", st.Version, "node", st.Node, "host", st.Host, "role", st.Role, "scope", st.Scope, "engine", st.Engine, "datapath", st.Datapath)
	gauge("sluice_draining", truth(st.Published.Drained || stopping))
	gauge("sluice_problems", float64(len(st.Problems)))
	gauge("sluice_networks", float64(st.Networks))
	gauge("sluice_endpoints", float64(st.Endpoints))
	gauge("sluice_services", float64(st.Services))
	gauge("sluice_resident_memory_bytes", float64(st.Memory))

	gauge("sluice_state_saved", truth(st.State.Saved))
	counter("sluice_state_damages_total", uint64(max(st.State.Damaged, 0)))

	peers := map[string]int{diag.PeerPresent: 0, diag.PeerLost: 0}
	for _, p := range st.Gossip.Peers {
		peers[p.State]++
	}
	for state, n := range peers {
		gauge("sluice_peers", float64(n), "state", state)
	}

	counter("sluice_loop_rounds_total", st.Loop.Rounds)
	counter("sluice_loop_changes_total", st.Loop.Changes)
	counter("sluice_loop_failures_total", st.Loop.Failures)
	for kind, n := range st.Loop.DriftByKind {
		counter("sluice_drift_total", n, "kind", kind)
	}
	gauge("sluice_loop_last_round_seconds", st.Loop.LastRound.Seconds())
	if !st.Loop.ReadBack.IsZero() {
		gauge("sluice_loop_read_back_timestamp_seconds", float64(st.Loop.ReadBack.Unix()))
	}
	for _, c := range st.Calls {
		counter("sluice_engine_calls_total", c.Calls, "method", c.Method)
		counter("sluice_engine_calls_failed_total", c.Failed, "method", c.Method)
	}

	for _, a := range st.Addresses {
		for _, x := range []struct {
			state string
			n     int
		}{{"used", a.Used}, {"free", a.Free}, {"leaked", a.Leaked}} {
			gauge("sluice_ipam_addresses", float64(x.n), "network", a.Network, "subnet", a.Subnet, "state", x.state)
		}
	}

	counter("sluice_missed_connections_total", st.Published.Missed)
	for _, n := range st.Guard.Networks {
		counter("sluice_guard_dropped_total", n.Frames, "network", n.Network)
	}
	gauge("sluice_published_ports", float64(st.Published.Served), "state", "served")
	gauge("sluice_published_ports", float64(st.Published.Lost), "state", "lost")
	gauge("sluice_published_ports", float64(st.Published.Idle), "state", "idle")
	for _, p := range ss.Ports {
		port, proto, _ := strings.Cut(p.Port, "/")
		labels := []string{"port", port, "proto", proto, "addr", p.Addr, "service", cmp.Or(p.Service, p.ServiceID), "network", p.Network}
		if p.Owner == nil {
			gauge("sluice_published_port_served", truth(p.State == diag.PortServed), labels...)
			continue
		}
		gauge("sluice_published_port_lost", 1, append(labels, "owner_kind", p.Owner.Kind, "owner", cmp.Or(p.Owner.Name, p.Owner.ID))...)
	}
	for _, s := range ss.Services {
		ready := 0
		for _, b := range s.Backends {
			if b.State == diag.StateReady {
				ready++
			}
		}
		labels := []string{"service", cmp.Or(s.Name, s.ID), "network", s.Network}
		gauge("sluice_service_backends", float64(len(s.Backends)), labels...)
		gauge("sluice_service_backends_ready", float64(ready), labels...)
	}

	var b strings.Builder
	set.WritePrometheus(&b)
	return b.String()
}

func truth(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// value is what the text format has for a character that would end a label.
var value = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// series is a metric's name with its labels, which are names and values in turn.
func series(name string, labels []string) string {
	if len(labels) == 0 {
		return name
	}
	var b strings.Builder
	b.WriteString(name)
	for i := 0; i+1 < len(labels); i += 2 {
		sep := byte(',')
		if i == 0 {
			sep = '{'
		}
		b.WriteByte(sep)
		b.WriteString(labels[i] + "=" + `"` + value.Replace(strings.ToValidUTF8(labels[i+1], "?")) + `"`)
	}
	b.WriteByte('}')
	return b.String()
}
