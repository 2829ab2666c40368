package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sluice/driver/overlay"
	"sluice/internal/gossip"
)

const (
	// learnTimeout bounds how long the plugin may take to know and to make all.
	learnTimeout = 2 * time.Minute
	// memoryWatch is three read-backs of the kernel by the plugin's loop, each of
	// which makes garbage.
	memoryWatch = 16 * time.Second
	memoryEvery = 250 * time.Millisecond
)

// neighbours starts the swarm's other nodes, which have all of its tasks, and
// waits until this node's kernel has the way to each. leave ends them.
func neighbours(ctx context.Context, n *node) (leave func(), err error) {
	var all []*gossip.Node
	leave = func() {
		for _, g := range all {
			_ = g.Close() // the process ends soon, and its sockets with it
		}
	}
	defer func() {
		if err != nil {
			leave()
		}
	}()
	seed := netip.AddrPortFrom(peerAddr(0), gossipPort)
	for i := range nodes {
		hub, err := member(ctx, i, nodes, peerAddr(i))
		if err != nil {
			return nil, err
		}
		g, err := gossip.New(gossip.Config{
			Name: string(hub.Self().Node), Incarnation: uint64(time.Now().UnixNano()), BindAddr: netip.AddrPortFrom(peerAddr(i), gossipPort),
			Keys: [][]byte{n.key}, Seeds: []netip.AddrPort{seed}, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return nil, err
		}
		all = append(all, g)
		if err := errors.Join(g.Replace(hub.Records()), g.Complete()); err != nil {
			return nil, err
		}
	}
	ns, err := netns.GetFromPath(filepath.Join(netnsDir, netnsName()))
	if err != nil {
		return nil, fmt.Errorf("the network's namespace: %w", err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	br, err := h.LinkByName(overlay.BridgeName)
	if err != nil {
		return nil, err
	}
	return leave, until(ctx, learnTimeout, "the kernel has the way to every task", func() (bool, error) {
		got, err := h.NeighList(br.Attrs().Index, unix.AF_INET)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			return false, nil
		}
		return len(got) >= services*tasks, err
	})
}

// memory watches the plugin's resident size.
func memory(ctx context.Context, t *table, n *node) error {
	ctx, cancel := context.WithTimeout(ctx, memoryWatch)
	defer cancel()
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	var rss []float64
	for {
		select {
		case <-ctx.Done():
			peak, err := n.resident("VmHWM")
			if err != nil {
				return err
			}
			what := fmt.Sprintf("plugin's resident memory, %d services × %d backends", services, tasks)
			t.add(goal{what: what, unit: mib, limit: 64}, rss)
			t.add(goal{what: "  its peak, while it learnt of them", unit: mib}, []float64{peak})
			return nil
		case <-tick.C:
			v, err := n.resident("VmRSS")
			if err != nil {
				return err
			}
			rss = append(rss, v)
		}
	}
}
