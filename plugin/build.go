package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"sluice/driver"
	"sluice/driver/overlay"
	"sluice/internal/diag"
	"sluice/internal/dockerapi"
	"sluice/internal/firewalld"
	"sluice/internal/keyring"
	"sluice/internal/keyshare"
	"sluice/internal/linux"
	"sluice/internal/linux/ipvs"
	"sluice/internal/linux/nft"
	"sluice/internal/linux/ports"
	"sluice/internal/linux/sockets"
	"sluice/internal/model"
	"sluice/internal/monitor"
	"sluice/internal/plan"
	"sluice/internal/reconcile"
	"sluice/internal/store"
	"sluice/internal/view"
	"sluice/ipam"
	"sluice/lb/expiry"
	"sluice/lb/publish"
	"sluice/lb/service"
)

// parts is everything that lives as long as the process, by name.
type parts struct {
	cfg    Config
	log    *slog.Logger
	store  *store.Store
	kernel *linux.Kernel
	hub    *view.Hub
	ring   *keyring.Ring
	loop   *reconcile.Loop
	driver *driver.Driver
	ipam   *refusals
	engine *dockerapi.Reader
	gossip *gossiper
	giver  *keyGiver
	asker  *keyAsker
	expiry *expiry.Ender
	ports  *ports.Holder
	diag   *diag.Server

	monitor  *monitor.Monitor  // nil: nobody is answered
	firewall *firewalld.Keeper // nil: firewalld is left alone
	publish  *publish.Publisher
	underlay underlay
	follower *follower // of the engine; runEngine's alone, but for its channel

	noIPVS    error // why networks that ask for IPVS do not get it here; nil if they do
	noMesh    error // why this node has no published ports, and its tasks none; nil if they have
	noDestroy error // why silent connections cannot be ended here; nil if they can

	tunnel   atomic.Pointer[error]          // why tasks here cannot take packets in tunnels; nil until asked for
	routes   atomic.Pointer[[]netip.Prefix] // the host's, for IPAM to stay away from
	features atomic.Pointer[[]string]       // what the kernel lacks; nil until probed
}

// build makes the parts and wires them; nothing runs yet. It changes nothing in
// the kernel but for making /proc/sys writable to this process. calls counts the
// engine's calls, for diagnosis.
func build(ctx context.Context, cfg Config, calls func() []diag.Call, log *slog.Logger) (*parts, error) {
	p := &parts{cfg: cfg, log: log}
	local := cfg.Scope == scopeLocal
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the state directory: %w", err)
	}
	// The engine makes a propagatedMount for all to look into. On a disk that cannot be
	// written the file's own mode has to do.
	if at, err := os.Stat(cfg.StateDir); err != nil || at.Mode().Perm() != 0o700 {
		if err := os.Chmod(cfg.StateDir, 0o700); err != nil {
			log.Warn("state directory stays as open as it is", "err", err)
		}
	}
	var err error
	if p.store, err = store.Open(filepath.Join(cfg.StateDir, "state.db"), log); err != nil {
		return nil, err
	}
	records, err := p.store.Load(ctx)
	if err != nil {
		return nil, errors.Join(err, p.store.Close())
	}

	kcfg := linux.Config{NetnsDir: filepath.Join(cfg.HostRun, "netns"), Tables: nft.Tables{}, IPVS: ipvs.New(), Log: log}
	if local {
		kcfg.NetnsPrefix, kcfg.LinkPrefix, kcfg.NoFilter = overlay.LocalNetnsPrefix, overlay.LocalTaskEndPrefix, true
		kcfg.MeshPrefix = overlay.LocalMeshPrefix
	}
	if p.kernel, err = linux.New(kcfg); err != nil {
		return nil, errors.Join(err, p.store.Close())
	}
	p.underlay.ask = p.kernel.UnderlayMTU
	if err := linux.RemountSysctl(); err != nil {
		return nil, errors.Join(err, p.kernel.Close(), p.store.Close())
	}

	// Before the first plan: one by the other datapath would reset connections.
	datapath := service.IPVS
	if cfg.NoIPVS {
		p.noIPVS = errors.New("setting DATAPATH=nft")
	} else {
		p.noIPVS = p.kernel.HasIPVS()
	}
	if p.noIPVS != nil {
		datapath = service.NFT
	}
	p.noMesh = p.kernel.HasMesh()
	missing := blank(records, p.store.Status())
	p.hub, err = view.New(view.Config{
		Journal: p.store, Now: time.Now, VXLANPort: cfg.VXLANPort, Datapath: datapath, Log: log,
		MeshPool: cfg.MeshPool, NoMesh: p.noMesh != nil, MTU: p.overlayMTU,
		Blank: missing && p.serving(ctx), Alone: local,
		Changed: p.changed,
	}, records)
	if err != nil {
		// A record that is not understood is of a later version or damaged; the
		// rest serves, and what is missing is taken over from the engine.
		log.Error("some records are not understood and were left out", "err", err)
	}
	p.ring = keyring.New(p.store, records, cfg.GossipKey.Bytes(), p.keyed)
	p.loop = reconcile.New(reconcile.Config{Kernel: p.kernel, View: p.hub.View, Plan: plan.Host, Observe: p.observe, Notices: p.kernel.Notices, Log: log})
	files := &keyshare.Files{
		Socket: filepath.Join(cfg.HostRun, "docker.sock"), Proc: "/proc",
		DataRoot: func() string { return p.hub.Engine().DataRoot },
	}
	p.giver = newKeyGiver(cfg, p.hub, p.ring, files.Read, log)
	p.asker = &keyAsker{cfg: cfg, hub: p.hub, ring: p.ring, identity: files.Read, ask: keyshare.Ask, log: log}
	p.gossip = newGossiper(cfg, p.hub, p.ring, p.asker.state, log)
	if p.ports, err = ports.New("/proc"); err != nil {
		return nil, errors.Join(err, p.kernel.Close(), p.store.Close())
	}
	p.publish = publish.New(publish.Config{View: p.hub.View, Sockets: p.ports, Taken: p.hub.SetTaken, Reserved: cfg.reserved(), Log: log})
	sock := sockets.New()
	p.noDestroy = sock.Probe()
	p.expiry = expiry.New(expiry.Config{View: p.hub.View, Sockets: sock, Log: log})

	book, err := driver.NewBook(p.store, records)
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	icfg := ipam.Config{
		Scope: ipam.ScopeGlobal, Supernets: cfg.Pools, Bits: cfg.SubnetBits,
		Routes: p.hostRoutes, NetworkName: p.networkName, Held: p.heldAddresses, Journal: p.store, Log: log,
		Blank: missing,
	}
	if local {
		icfg.Scope = ipam.ScopeLocal
	}
	allocator, err := ipam.Open(ctx, icfg)
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	p.ipam = &refusals{Allocator: allocator, now: time.Now}
	p.refreshHost()

	p.driver = driver.New(driver.Config{
		Intents: p.hub, Allocations: book, Pools: p.ipam, Keys: p.ring, Loop: p.loop,
		UnderlayMTU: p.underlay.mtu, Hint: p.gossip.hint, Local: local, HostRun: cfg.HostRun, Log: log,
		Abilities: driver.Abilities{NoIPVS: p.noIPVS, NoTunnel: p.askTunnel(p.kernel.HasTunnel)},
	})
	p.engine, err = dockerapi.New(dockerapi.Config{
		Socket: filepath.Join(cfg.HostRun, "docker.sock"), PluginID: pluginID(), Log: log,
	})
	if err != nil {
		return nil, errors.Join(err, p.close())
	}
	p.follower = &follower{
		scope: cfg.Scope, now: time.Now, hub: p.hub, driver: p.driver, pools: p.ipam, keys: p.ring, wake: p.gossip.wake,
		named: make(chan string, 1), log: log, gone: make(map[model.NetworkID]time.Time),
	}
	p.diag = diag.NewServer(diag.Config{
		Version: version(), Scope: cfg.Scope, Settings: describeConfig(os.Getenv), Hub: p.hub, Loop: p.loop, Sockets: p.publish,
		Datapath: p.datapath, Traffic: p.kernel.Traffic, Dropped: p.kernel.Dropped, Ended: p.expiry.Ended, Abilities: p.abilities,
		Calls: calls, Gossip: p.gossip.state, Pools: p.pools, Leases: p.ipam.Pools, Refusals: p.ipam.problems,
		Trouble: p.trouble, Firewall: p.firewallState, State: p.stateFile, Memory: residentBytes, Log: log,
	})
	if !local && cfg.Firewalld {
		p.firewall = firewalld.New(firewalld.Config{
			Socket: filepath.Join(cfg.HostRun, "dbus/system_bus_socket"), Want: p.nodePorts, Log: log,
			Reloaded: func() { p.loop.Suspect("firewalld has made its rules anew, or came or went") },
		})
	}
	if !local && cfg.Metrics.IsValid() {
		p.monitor = monitor.New(monitor.Config{Addr: cfg.Metrics, Node: p.diag, Log: log})
	}
	return p, nil
}

// askTunnel returns the question whether tasks here can take packets in tunnels. has
// is asked once, when a network or service first wants that: the kernel may load
// ipip then, which puts a device into every network namespace of the host.
func (p *parts) askTunnel(has func() error) func() error {
	return sync.OnceValue(func() error {
		err := has()
		p.tunnel.Store(&err)
		return err
	})
}

// changed follows every new revision of the view.
func (p *parts) changed(planned bool) {
	// The hub may call while build still works.
	if p.loop != nil && planned {
		p.loop.Trigger()
	}
	if p.expiry != nil && planned {
		p.expiry.Wake()
	}
	if p.publish != nil && planned {
		p.publish.Wake()
	}
	if p.gossip != nil {
		p.gossip.wake()
	}
}

// keyed follows every new gossip key.
func (p *parts) keyed() {
	if p.gossip != nil {
		p.gossip.wake()
	}
	if p.giver != nil {
		p.giver.server.Wake()
	}
}

// observe follows every round of the loop.
func (p *parts) observe(r reconcile.Round) {
	ctx := context.Background() // the records are this process's own; a commit takes milliseconds
	unread, err := p.hub.Observe(ctx, r)
	if err != nil {
		p.log.Error("state could not be recorded", "err", err)
	}
	if unread {
		p.loop.Doubt()
	}
	if r.Read == nil {
		return
	}
	if err := p.hub.Sweep(ctx, r.Read); err != nil {
		p.log.Error("state could not be recorded", "err", err)
	}
}

// run runs the parts until ctx ends and all of them have returned. The monitor is the
// last: until then it says that the node stops.
func (p *parts) run(ctx context.Context) {
	p.publish.Begin(ctx)
	var wg, last sync.WaitGroup
	end := make(chan struct{})
	if p.monitor != nil {
		last.Go(func() { p.monitor.Run(ctx, end) })
	}
	if p.firewall != nil {
		wg.Go(func() { p.firewall.Run(ctx) })
	}
	for _, f := range []func(context.Context){
		p.loop.Run, p.readEngine, p.runEngine, p.gossip.run, p.giver.run, p.asker.run, p.runKernel, p.expiry.Run, p.publish.Run, p.runDiag,
	} {
		wg.Go(func() { f(ctx) })
	}
	wg.Wait()
	close(end)
	last.Wait()
}

// close releases what build took.
func (p *parts) close() error { return errors.Join(p.ports.Close(), p.kernel.Close(), p.store.Close()) }

// overlayMTU is that of networks which leave it to the nodes.
func (p *parts) overlayMTU(vtep netip.Addr) (int, error) {
	mtu, err := p.underlay.mtu(vtep)
	return mtu - overlay.VXLANOverhead, err
}

// refreshHost reads again what is remembered of the host.
func (p *parts) refreshHost() {
	p.refreshRoutes()
	if vtep := p.hub.View().Self.VTEP; vtep.IsValid() {
		p.underlay.refresh(vtep)
	}
}

func (p *parts) hostRoutes() []netip.Prefix {
	if r := p.routes.Load(); r != nil {
		return *r
	}
	return nil
}

func (p *parts) refreshRoutes() {
	routes, err := p.kernel.HostPrefixes()
	if err != nil {
		p.log.Warn("the host's routes could not be read; new subnets are chosen by those read before", "err", err)
		return
	}
	p.routes.Store(&routes)
}

// heldAddresses are those of a network's endpoints, here and on the other nodes.
func (p *parts) heldAddresses(id model.NetworkID) []netip.Addr {
	var out []netip.Addr
	v := p.hub.View()
	for _, e := range v.Endpoints {
		if e.Network == id {
			out = append(out, e.Addr)
		}
	}
	for _, r := range v.Remotes {
		if r.Network == id {
			out = append(out, r.Addr)
		}
	}
	return out
}

// networkName is for error texts.
func (p *parts) networkName(id model.NetworkID) string {
	if n, ok := p.hub.Engine().Networks[id]; ok && n.Name != "" {
		return n.Name
	}
	return id.Short()
}
