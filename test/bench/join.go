package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/docker/go-plugins-helpers/network"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sluice/driver/overlay"
	"sluice/internal/model"
)

const (
	// standing is the number of endpoints on the node while joins are measured.
	standing = 100
	// joinRuns gives a 99th percentile with two worse ones beyond it.
	joinRuns = 300
	// fewerRuns is for the cases without a limit.
	fewerRuns = 100
	// lull is between a container's end and the next one's start: the plugin reads
	// the kernel back 50 ms behind a notice of a change, and most containers do not
	// start in just that moment. Those that do have a row of their own.
	lull = 100 * time.Millisecond
	// settleTimeout bounds the wait for a deletion: a veth pair takes 20 ms, and
	// the plugin looks again after 5 s if it has missed a notice.
	settleTimeout = 15 * time.Second
)

// joins measures a container's way onto its network, alone on the node, then in
// a swarm of which the plugin knows 10,000 backends; and the plugin's memory there.
func joins(ctx context.Context, t *table) (err error) {
	n, err := newNode(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if said := n.close(); err != nil {
			err = fmt.Errorf("%w%s", err, said)
		}
	}()
	c := &crowd{node: n}
	defer func() { err = errors.Join(err, c.close()) }()
	for range standing {
		if _, err := c.add(ctx); err != nil {
			return err
		}
	}
	quiet, err := c.churn(ctx, joinRuns, true)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("CreateEndpoint + Join, %d endpoints on the node", standing)
	t.add(goal{what: what, unit: seconds, limit: 0.010, limit99: 0.050}, quiet)
	behind, err := c.churn(ctx, fewerRuns, false)
	if err != nil {
		return err
	}
	t.add(goal{what: "  right behind a DeleteEndpoint", unit: seconds}, behind)

	leave, err := neighbours(ctx, n)
	if err != nil {
		return err
	}
	defer leave()
	if err := memory(ctx, t, n); err != nil {
		return err
	}
	large, err := c.churn(ctx, fewerRuns, true)
	if err != nil {
		return err
	}
	t.add(goal{what: fmt.Sprintf("CreateEndpoint + Join, with %d services × %d backends", services, tasks), unit: seconds}, large)
	return nil
}

// crowd is the node's containers, oldest first.
type crowd struct {
	*node
	made int // ever
	all  []container
	// Namespaces whose container has ended, to be used again: the kernel destroys
	// one with all its locks held, 20 to 50 ms later.
	free []string
}

// container is an endpoint whose end is in a namespace of its own.
type container struct {
	id      model.EndpointID
	sandbox string // path
	link    string // the name that its end had in the host's namespace
}

// churn adds a container and removes the oldest, so many times, and returns how
// long CreateEndpoint and Join took together. With settled, the plugin has
// removed one before the next comes.
func (c *crowd) churn(ctx context.Context, times int, settled bool) ([]float64, error) {
	var out []float64
	for range times {
		took, err := c.add(ctx)
		if err != nil {
			return nil, err
		}
		out = append(out, took)
		if err := c.removeOldest(ctx, settled); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// add does what the engine does to start a container, and returns the plugin's
// share of it.
func (c *crowd) add(ctx context.Context) (float64, error) {
	i := c.made
	c.made++
	k := container{id: endpointID(services*tasks + i)}
	if len(c.free) == 0 {
		path, err := pinned(k.id.Short())
		if err != nil {
			return 0, err
		}
		c.free = append(c.free, path)
	}
	k.sandbox, c.free = c.free[0], c.free[1:]
	// Twice the crowd: an address rests before it is given again.
	addr := netip.PrefixFrom(containerAddr(i%(2*standing)), subnet.Bits())
	var joined network.JoinResponse
	took, err := timed(func() error {
		err := c.call(ctx, "NetworkDriver.CreateEndpoint", network.CreateEndpointRequest{
			NetworkID: networkID, EndpointID: string(k.id), Interface: &network.EndpointInterface{Address: addr.String()},
		}, nil)
		if err != nil {
			return err
		}
		return c.call(ctx, "NetworkDriver.Join", network.JoinRequest{NetworkID: networkID, EndpointID: string(k.id), SandboxKey: k.sandbox}, &joined)
	})
	if err != nil {
		return 0, err
	}
	k.link = joined.InterfaceName.SrcName
	if err := k.take(addr); err != nil {
		return 0, err
	}
	c.all = append(c.all, k)
	return took, nil
}

// take moves the container's end into its namespace, as the engine does.
func (k container) take(addr netip.Prefix) error {
	l, err := netlink.LinkByName(k.link)
	if err != nil {
		return fmt.Errorf("take %s: %w", k.link, err)
	}
	ns, err := netns.GetFromPath(k.sandbox)
	if err != nil {
		return fmt.Errorf("take %s: %w", k.link, err)
	}
	defer ns.Close()
	if err := netlink.LinkSetNsFd(l, int(ns)); err != nil {
		return fmt.Errorf("take %s: %w", k.link, err)
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	if l, err = h.LinkByName(k.link); err != nil {
		return fmt.Errorf("take %s: %w", k.link, err)
	}
	ip, err := netlink.ParseAddr(addr.String())
	if err != nil {
		return err
	}
	return errors.Join(h.LinkSetName(l, "eth0"), h.AddrAdd(l, ip), h.LinkSetUp(l))
}

// giveBack moves it back, as the engine does behind Leave.
func (k container) giveBack() error {
	ns, err := netns.GetFromPath(k.sandbox)
	if err != nil {
		return err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer h.Close()
	l, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("give back %s: %w", k.link, err)
	}
	return errors.Join(h.LinkSetDown(l), h.LinkSetName(l, k.link), h.LinkSetNsPid(l, os.Getpid()))
}

// removeOldest ends the oldest container.
func (c *crowd) removeOldest(ctx context.Context, settled bool) error {
	k := c.all[0]
	c.all = c.all[1:]
	if err := c.call(ctx, "NetworkDriver.Leave", network.LeaveRequest{NetworkID: networkID, EndpointID: string(k.id)}, nil); err != nil {
		return err
	}
	if err := k.giveBack(); err != nil {
		return err
	}
	if err := c.call(ctx, "NetworkDriver.DeleteEndpoint", network.DeleteEndpointRequest{NetworkID: networkID, EndpointID: string(k.id)}, nil); err != nil {
		return err
	}
	c.free = append(c.free, k.sandbox)
	if !settled {
		return nil
	}
	err := until(ctx, settleTimeout, "the pair of "+k.link+" is gone", func() (bool, error) {
		_, err := netlink.LinkByName(k.link)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return true, nil
		}
		return false, err
	})
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(lull):
		return nil
	}
}

// close lets go of the containers' namespaces; the rest ends with the process.
func (c *crowd) close() error {
	var errs []error
	for _, k := range c.all {
		c.free = append(c.free, k.sandbox)
	}
	for _, path := range c.free {
		errs = append(errs, unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	}
	return errors.Join(errs...)
}

// pinned makes a network namespace and mounts it where the engine does.
func pinned(name string) (string, error) {
	path := filepath.Join(sandboxDir, name)
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return "", err
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread belongs to the namespace and ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return "", fmt.Errorf("make a container's namespace: %w", err)
	}
	return path, nil
}

// netnsName is the network's namespace on this node.
func netnsName() string { return overlay.NetnsName(overlayNetwork()) }
