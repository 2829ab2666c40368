package main

import (
	"context"
	"fmt"
	"slices"

	"sluice/test/cluster"
)

// blow is how a fault is done and ended.
type blow struct {
	// away: the host is no manager to ask while it lasts.
	away   bool
	strike func(context.Context, *lab, []*cluster.Host) error
	// end is nil for a fault that has no length.
	end func(context.Context, *lab, []*cluster.Host) error
}

// each does something on every host that is struck.
func each(do func(*cluster.Host, context.Context) error) func(context.Context, *lab, []*cluster.Host) error {
	return func(ctx context.Context, _ *lab, hs []*cluster.Host) error {
		for _, h := range hs {
			if err := do(h, ctx); err != nil {
				return err
			}
		}
		return nil
	}
}

// sendPlugin sends a signal to the plugin, after a command that knows its pid as $0.
func sendPlugin(name, before string) func(context.Context, *lab, []*cluster.Host) error {
	return each(func(h *cluster.Host, ctx context.Context) error {
		pid, err := h.PluginPID(ctx)
		if err == nil {
			_, err = h.Exec(ctx, "sh", "-c", before+"kill -"+name+" $0", pid)
		}
		return err
	})
}

// docker runs a command line on the hosts.
func docker(args ...string) func(context.Context, *lab, []*cluster.Host) error {
	return each(func(h *cluster.Host, ctx context.Context) error {
		_, err := h.Docker(ctx, args...)
		return err
	})
}

// onHost damages what sluice has in the hosts' own namespace.
func onHost(script string) blow {
	return blow{strike: each(func(h *cluster.Host, ctx context.Context) error {
		_, err := h.ExecNet(ctx, "sh", "-ec", script)
		return err
	})}
}

// inNetwork damages what it has in that of the network which is asked all the time.
func inNetwork(script string) blow {
	return blow{strike: func(ctx context.Context, l *lab, hs []*cluster.Host) error {
		for _, h := range hs {
			if _, err := h.InNetwork(ctx, l.calmID, "sh", "-ec", script); err != nil {
				return err
			}
		}
		return nil
	}}
}

// meshPair is the host's end of the links by which published ports lead into networks.
const meshPair = "$(ip -br link | grep -o '^slm[^@ ]*' | head -n 1)"

// blows are the ways to do the faults of the policy.
var blows = map[string]blow{
	"plugin killed":      {strike: sendPlugin("KILL", "")},
	"plugins killed":     {strike: sendPlugin("KILL", "")},
	"plugin frozen":      {strike: sendPlugin("STOP", ""), end: sendPlugin("CONT", "")},
	"plugin disabled":    {strike: docker("plugin", "disable", "-f", plugin), end: docker("plugin", "enable", plugin)},
	"state file damaged": {strike: sendPlugin("KILL", "dd if=/dev/urandom of=/proc/$0/root/var/lib/sluice/state.db bs=4096 count=4 conv=notrunc 2>/dev/null; ")},
	"engine killed":      {true, each((*cluster.Host).KillEngine), each((*cluster.Host).StartEngine)},
	"engine stopped":     {true, each((*cluster.Host).StopEngine), each((*cluster.Host).StartEngine)},
	"power off":          {true, each((*cluster.Host).PowerOff), each((*cluster.Host).PowerOn)},
	"hosts cut off": {true,
		func(ctx context.Context, l *lab, hs []*cluster.Host) error {
			return l.cluster.Partition(ctx, l.number(hs[0]), l.number(hs[1]))
		},
		func(ctx context.Context, l *lab, hs []*cluster.Host) error {
			return l.cluster.Heal(ctx, l.number(hs[0]), l.number(hs[1]))
		}},
	// The balancer's rules; with IPVS these are the marks'.
	"network's table":     inNetwork("nft delete table bridge sluice 2>/dev/null || nft delete table ip sluice"),
	"VXLAN device":        inNetwork("ip link del vxlan0"),
	"VXLAN device is off": inNetwork("ip link set vxlan0 down"),
	"forwarding entries":  inNetwork("bridge fdb show dev vxlan0 | while read mac rest; do bridge fdb del $mac dev vxlan0 self || true; bridge fdb del $mac dev vxlan0 master || true; done 2>/dev/null"),
	"neighbours":          inNetwork("ip neigh flush dev br0 nud permanent"),
	"bridge's addresses":  inNetwork("ip addr flush dev br0"),
	"network's sysctls":   inNetwork("sysctl -qw net.ipv4.ip_forward=1"),
	"mesh's table":        onHost("nft delete table ip sluice-mesh"),
	"mesh's pair":         onHost("ip link del " + meshPair),
	"mesh's chain":        onHost("iptables -F SLUICE-MESH"),
	"VXLAN chain":         onHost("iptables -F SLUICE-VXLAN"),
}

// struck are the hosts of an action.
func (l *lab) struck(a action) (hs []*cluster.Host) {
	for _, i := range a.hosts {
		hs = append(hs, l.cluster.Host(i))
	}
	return hs
}

// number is what the cluster calls a host.
func (l *lab) number(h *cluster.Host) int { return slices.Index(l.cluster.Hosts(), h) + 1 }

// strike begins a fault.
func (l *lab) strike(ctx context.Context, a action) error {
	b := blows[a.kind]
	hs := l.struck(a)
	for _, h := range hs {
		if b.away {
			l.setAway(h, true)
		}
	}
	if err := b.strike(ctx, l, hs); err != nil {
		return fmt.Errorf("%s: %w", a, err)
	}
	return nil
}

// relieve ends a fault.
func (l *lab) relieve(ctx context.Context, a action) error {
	b := blows[a.kind]
	hs := l.struck(a)
	if b.end != nil {
		if err := b.end(ctx, l, hs); err != nil {
			return fmt.Errorf("end of %s: %w", a, err)
		}
	}
	for _, h := range hs {
		l.setAway(h, false)
	}
	return nil
}
