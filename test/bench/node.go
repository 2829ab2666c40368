package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/options"
)

// Paths in the namespace of the bench, where /run is empty at first.
const (
	pluginSocket = "/run/docker/plugins/sluice.sock"
	engineSocket = "/run/docker.sock"
	sandboxDir   = "/run/docker/netns"
	netnsDir     = "/run/netns"
)

// startTimeout bounds the plugin's start, which takes about 50 ms.
const startTimeout = 10 * time.Second

// node is a host with the plugin on it, and the engine's side of its sockets.
type node struct {
	dir    string // state and log of the plugin
	plugin *exec.Cmd
	engine *http.Server
	cli    *http.Client
	key    []byte // of gossip, from the network's options
}

// newNode makes the host, starts the plugin and gives it the network. The caller
// closes it.
func newNode(ctx context.Context) (*node, error) {
	n := &node{}
	n.cli = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", pluginSocket)
	}}}
	for _, step := range []func(context.Context) error{host, n.serveEngine, n.build, n.start, n.addNetwork, n.restart} {
		if err := step(ctx); err != nil {
			return nil, fmt.Errorf("%w%s", err, n.close())
		}
	}
	return n, nil
}

// host gives this namespace a device with the addresses of all nodes.
func host(context.Context) error {
	// The engine mounts a directory that is called like the plugin's id here; the
	// plugin finds its id by that (proc(5), mountinfo).
	const mounted = "/run/bench/pluginbench"
	for _, dir := range []string{mounted, filepath.Dir(pluginSocket), sandboxDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(mounted, filepath.Dir(pluginSocket), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the plugin's directory: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "eth0", 1500
	eth0 := &netlink.Bridge{LinkAttrs: attrs} // not every kernel has dummy devices; bridges are needed anyway
	if err := netlink.LinkAdd(eth0); err != nil {
		return fmt.Errorf("add eth0: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, l := range []netlink.Link{lo, eth0} {
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", l.Attrs().Name, err)
		}
	}
	for i := -1; i < nodes; i++ {
		a := self
		if i >= 0 {
			a = peerAddr(i)
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(underlay.Bits(), 32)}}
		if err := netlink.AddrAdd(eth0, addr); err != nil {
			return fmt.Errorf("add %s to eth0: %w", a, err)
		}
	}
	return nil
}

// serveEngine tells the plugin who it is, as the engine of a worker does; what
// containers there are is not told, so none is missed.
func (n *node) serveEngine(context.Context) error {
	const api = "1.41"
	info, err := json.Marshal(map[string]any{"Name": "bench", "ServerVersion": "20.10.0", "Swarm": map[string]any{
		"NodeID": "nodebench0000000000000000", "NodeAddr": self.String(), "LocalNodeState": "active",
		"RemoteManagers": []any{map[string]any{"Addr": peerAddr(0).String() + ":2377"}},
	}})
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", api) })
	mux.HandleFunc("/v"+api+"/info", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(info) // a plugin that has gone is no fault of ours
	})
	mux.HandleFunc("/v"+api+"/events", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	l, err := net.Listen("unix", engineSocket)
	if err != nil {
		return err
	}
	n.engine = &http.Server{Handler: mux}
	go func() { _ = n.engine.Serve(l) }() // ends with ErrServerClosed at close
	return nil
}

// build makes the plugin's binary, like make does.
func (n *node) build(ctx context.Context) (err error) {
	if n.dir, err = os.MkdirTemp("", "sluice-bench-"); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", filepath.Join(n.dir, "plugin"), "./plugin")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

// start starts the plugin and waits until it answers.
func (n *node) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(n.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the plugin has its own descriptor
	n.plugin = exec.CommandContext(ctx, filepath.Join(n.dir, "plugin"))
	n.plugin.Stdout, n.plugin.Stderr = log, log
	n.plugin.Env = append(os.Environ(), "HOST_RUN=/run", "STATE_DIR="+filepath.Join(n.dir, "state"))
	if err := n.plugin.Start(); err != nil {
		return err
	}
	return until(ctx, startTimeout, "the plugin answers", func() (bool, error) {
		return n.call(ctx, "Plugin.Activate", struct{}{}, nil) == nil, nil
	})
}

// restart makes the plugin one that has run before: in its first minutes on a
// node it may remove nothing.
func (n *node) restart(ctx context.Context) error {
	n.stop()
	return n.start(ctx)
}

func (n *node) stop() {
	if n.plugin == nil || n.plugin.Process == nil {
		return
	}
	_ = n.plugin.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	_ = n.plugin.Wait()                          // by our signal
	n.plugin = nil
}

// close ends the plugin. The text is what it had to say last, for an error.
func (n *node) close() string {
	var said string
	n.stop()
	if n.engine != nil {
		_ = n.engine.Close()
	}
	if n.dir != "" {
		if log, err := os.ReadFile(filepath.Join(n.dir, "log")); err == nil && len(log) > 0 {
			said = "; the plugin's last line: " + lastLine(string(log))
		}
		_ = os.RemoveAll(n.dir)
	}
	return said
}

// addNetwork does what the swarm's leader and then this node's engine do for a
// network's first task.
func (n *node) addNetwork(ctx context.Context) error {
	// The data-path address, by node discovery (moby libnetwork/discoverapi: 1 is a node).
	err := n.call(ctx, "NetworkDriver.DiscoverNew", network.DiscoveryNotification{
		DiscoveryType: 1, DiscoveryData: map[string]any{"Address": self.String(), "BindAddress": self.String(), "Self": true},
	}, nil)
	if err != nil {
		return err
	}
	pool := map[string]any{"AddressSpace": "sluice-global", "Pool": subnet.String()}
	if err := n.call(ctx, "IpamDriver.RequestPool", pool, nil); err != nil {
		return err
	}
	data := network.IPAMData{Pool: subnet.String(), Gateway: fmt.Sprintf("%s/%d", gateway, subnet.Bits())}
	var told network.AllocateNetworkResponse
	err = n.call(ctx, "NetworkDriver.AllocateNetwork", network.AllocateNetworkRequest{NetworkID: networkID, IPv4Data: []network.IPAMData{data}}, &told)
	if err != nil {
		return err
	}
	if n.key, err = options.DecodeKey(told.Options[options.SecretKey]); err != nil {
		return fmt.Errorf("the network's key: %w", err)
	}
	generic := make(map[string]any)
	for k, v := range told.Options {
		generic[k] = v
	}
	return n.call(ctx, "NetworkDriver.CreateNetwork", network.CreateNetworkRequest{
		NetworkID: networkID, IPv4Data: []*network.IPAMData{&data}, Options: map[string]any{"com.docker.network.generic": generic},
	}, nil)
}

// call asks the plugin as the engine does.
func (n *node) call(ctx context.Context, method string, req, res any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://plugin/"+method, bytes.NewReader(body))
	if err != nil {
		return err
	}
	answer, err := n.cli.Do(r)
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", method, answer.Status, text)
	}
	if res == nil {
		return nil
	}
	return json.Unmarshal(text, res)
}

// resident is a line of the plugin's /proc/PID/status, in MiB: VmRSS or VmHWM.
func (n *node) resident(line string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.plugin.Process.Pid))
	if err != nil {
		return 0, err
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 3 && f[0] == line+":" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no %s", n.plugin.Process.Pid, line)
}

// until polls, which costs what is measured next nothing.
func until(ctx context.Context, bound time.Duration, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		done, err := ok()
		if done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %s: %w", what, bound, ctx.Err())
		case <-tick.C:
		}
	}
}
