package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"sluice/internal/diag"
	"sluice/internal/firewalld"
	"sluice/internal/model"
	"sluice/internal/view"
	"sluice/lb/service"
)

// hostAge is how old the host's routes may be when a subnet is chosen, and the MTU of its
// underlay when a network is made. They change when a person changes them.
const hostAge = 10 * time.Second

// readEngine reads the local engine until ctx ends.
func (p *parts) readEngine(ctx context.Context) {
	if err := p.engine.Run(ctx); err != nil && ctx.Err() == nil {
		p.log.Error("the engine is not read any more", "err", err)
	}
}

// runEngine carries what the local engine tells to who needs it.
func (p *parts) runEngine(ctx context.Context) {
	// What waits for a time to pass is looked at now and then, change or not.
	tick := time.NewTicker(restPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-p.engine.Changed():
		}
		p.follower.follow(ctx, p.engine.Snapshot())
		p.hub.Ripen()
	}
}

// runKernel turns the kernel's notices into rounds of the loop, and probes once
// what this kernel can do.
func (p *parts) runKernel(ctx context.Context) {
	if features, err := p.kernel.Features(ctx); err != nil {
		p.log.Error("the kernel's features could not be probed", "err", err)
	} else {
		missing := []string{}
		for _, f := range features {
			if f.Err != nil {
				missing = append(missing, f.Err.Error())
				p.log.Error("this kernel lacks a feature", "err", f.Err)
			}
		}
		p.features.Store(&missing)
	}
	notices, err := p.kernel.Watch(ctx)
	if err != nil {
		// The loop still reads back at its interval.
		p.log.Error("changes in the kernel will be seen late", "err", err)
	}
	tick := time.NewTicker(hostAge)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-notices:
			if !ok {
				notices = nil
				continue
			}
			p.loop.Notice()
		case <-tick.C:
			p.refreshHost()
		}
	}
}

// nodePorts are those that the other nodes send to, and where they come in.
func (p *parts) nodePorts() firewalld.Want {
	device := ""
	if vtep := p.hub.View().Self.VTEP; vtep.IsValid() {
		var err error
		if device, err = p.kernel.UnderlayDevice(vtep); err != nil {
			p.log.Debug("no zone of firewalld by the node's address", "err", err)
		}
	}
	return wantPorts(p.cfg, p.hub.Engine().Manager, device, p.hub.Peers())
}

// wantPorts is nothing as long as the device with the node's address is not known: a
// zone that was opened by guess stays open. It is asked for again.
func wantPorts(cfg Config, manager bool, device string, peers []view.Peer) firewalld.Want {
	if device == "" {
		return firewalld.Want{}
	}
	want := firewalld.Want{Device: device, Ports: []firewalld.Port{
		{Number: cfg.VXLANPort, Proto: "udp"}, {Number: cfg.GossipPort, Proto: "tcp"}, {Number: cfg.GossipPort, Proto: "udp"},
	}}
	if manager && !unused(cfg) {
		want.Ports = append(want.Ports, firewalld.Port{Number: cfg.KeyPort, Proto: "tcp"})
	}
	for _, peer := range peers {
		if a, err := netip.ParseAddr(peer.VTEP); err == nil {
			want.Peers = append(want.Peers, a)
		}
	}
	return want
}

// firewallState is what firewalld has for this node.
func (p *parts) firewallState() string {
	if p.firewall == nil {
		return ""
	}
	state, _ := p.firewall.State() // what it refuses is among the problems
	return state
}

// runDiag serves the diagnosis socket, under the plugin's name once it is known.
func (p *parts) runDiag(ctx context.Context) {
	dir := filepath.Join(p.cfg.HostRun, filepath.Base(diag.SocketDir))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.log.Error("no diagnosis socket", "err", err)
		return
	}
	name := "sluice"
	if p.cfg.Scope == scopeLocal {
		name = "sluice-local"
	}
	serving, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { p.serveDiag(serving, dir, name) })
	select {
	case <-ctx.Done():
	case told := <-p.follower.named:
		if told != name {
			stop()
			wg.Wait()
			p.serveDiag(ctx, dir, told)
		}
	}
	wg.Wait()
	stop()
}

func (p *parts) serveDiag(ctx context.Context, dir, name string) {
	l, err := listen(filepath.Join(dir, name+diag.SocketSuffix))
	if err == nil {
		err = serve(ctx, l, p.diag, p.log)
	}
	if err != nil {
		p.log.Error("no diagnosis socket", "err", err)
	}
}

// datapath says how service VIPs are served here.
func (p *parts) datapath() (name, why string) {
	name, why = service.IPVS, "the kernel has it; networks that ask for nft get that"
	if p.noIPVS != nil {
		name, why = service.NFT, "all that this node has: "+p.noIPVS.Error()
	}
	switch missing := p.features.Load(); {
	case missing == nil:
		why += "; the rest of the kernel is not probed yet"
	case len(*missing) > 0:
		return "none", strings.Join(*missing, "; ")
	}
	return name, why
}

// abilities are what this node's kernel has or lacks without harm to the rest.
func (p *parts) abilities() []diag.Ability {
	out := []diag.Ability{
		{Name: diag.AbilityIPVS, Use: "balances virtual IPs, with every scheduler; looked for when the plugin starts", Err: p.noIPVS},
		{Name: diag.AbilityMesh, Use: "has published ports, and lets tasks here answer at those of all nodes", Err: p.noMesh},
	}
	if err := p.tunnel.Load(); err != nil {
		out = append(out, diag.Ability{Name: "ipip", Use: "lets tasks take packets in tunnels, for mode tun", Err: *err})
	}
	return append(out, diag.Ability{Name: "SOCK_DESTROY", Use: "ends connections that are silent, or of leaving tasks, where a service asks for that", Err: p.noDestroy})
}

// trouble lists what the parts have to report.
func (p *parts) trouble() []diag.Problem {
	var out []diag.Problem
	if m := p.features.Load(); m != nil {
		for _, what := range *m {
			out = append(out, diag.Problem{What: what, Do: "use a kernel that has it; networks on this node do not work without"})
		}
	}
	if _, err := p.expiry.State(); err != nil {
		out = append(out, diag.Problem{
			What: "connections are not ended here: " + err.Error(),
			Do:   "do what the text says, or remove the idle timeout and the drain time of the services that run here",
		})
	}
	if p.monitor != nil {
		if err := p.monitor.State(); err != nil {
			out = append(out, diag.Problem{
				What: "health checks and metrics are not answered: " + err.Error(),
				Do:   "end the program that has the port, or set METRICS_ADDR; it is tried again every few seconds",
			})
		}
	}
	if p.firewall != nil {
		if _, err := p.firewall.State(); err != nil {
			out = append(out, diag.Problem{
				What: strings.ReplaceAll(err.Error(), "\n", "; "), // one for each port that was refused
				Do:   "open the ports by hand, as docs/operations.md has it; or set FIREWALLD=off. It is tried again every half minute",
			})
		}
	}
	out = append(append(out, p.giver.problem()...), p.asker.problem()...)
	return append(out, stateProblems(p.store.Status(), p.hostStateDir())...)
}

// pools is the use of the pools that this process decides on.
func (p *parts) pools() map[model.NetworkID]diag.Pool {
	out := make(map[model.NetworkID]diag.Pool)
	for _, s := range p.ipam.Snapshot() {
		if s.Network != "" {
			out[s.Network] = diag.Pool{Used: s.Used, Size: s.Used + s.Free}
		}
	}
	return out
}

// pluginID is this plugin's id in the engine, by the directory that the engine
// mounts for its socket; empty if the process runs otherwise.
func pluginID() string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	return pluginIDIn(string(b))
}

// pluginIDIn finds the id in the text of mountinfo (proc(5)): the mount on
// /run/docker/plugins has a root that ends in it.
func pluginIDIn(mountinfo string) string {
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) > 4 && f[4] == filepath.Dir(socketPath) {
			return filepath.Base(f[3])
		}
	}
	return ""
}

// residentBytes is the resident size of this process; 0 if the kernel does not tell.
func residentBytes() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	pages, err := secondField(string(b))
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}

func secondField(s string) (uint64, error) {
	f := strings.Fields(s)
	if len(f) < 2 {
		return 0, errors.New("too short")
	}
	n, err := strconv.ParseUint(f[1], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("statm: %w", err)
	}
	return n, nil
}

// version is what the build recorded of its source.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		return info.Main.Version
	}
	return "unknown"
}
