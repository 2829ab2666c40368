package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/test/cluster"
)

// leftTime is how long things may take to go when the last network has: one that an
// engine forgot with its power is removed after a minute.
const leftTime = 2 * time.Minute

// keepState writes what plugins and swarm say of themselves to a directory, for a
// person who asks why something has not healed.
func (l *lab) keepState(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("keep what plugins say: %w", err)
	}
	var b strings.Builder
	for _, h := range l.cluster.Hosts() {
		for _, verb := range []string{"status", "networks", "services", "diff"} {
			// A problem that it names is what is wanted, and so is its silence.
			out, err := h.Exec(ctx, h.SluicePath(), verb)
			fmt.Fprintf(&b, "%s# sluice %s\n%s\n", h.Name(), verb, cmp.Or(out, fmt.Sprintln(err)))
		}
		for _, args := range [][]string{{"node", "ls"}, {"service", "ls"}, {"ps", "-a"}} {
			out, err := h.Docker(ctx, args...)
			fmt.Fprintf(&b, "%s# docker %s\n%s\n", h.Name(), strings.Join(args, " "), cmp.Or(out, fmt.Sprintln(err)))
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "state.txt"), []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("keep what plugins say: %w", err)
	}
	return nil
}

// nothingLeft waits until the hosts look as before the first network and the plugins
// know of nothing.
func (l *lab) nothingLeft(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leftTime)
	defer cancel()
	if err := l.useIngress(ctx); err != nil {
		return err
	}
	return cluster.Wait(ctx, "all hosts look as before the first network", func(ctx context.Context) error {
		for _, h := range l.cluster.Hosts() {
			after, err := h.Snapshot(ctx)
			if err != nil {
				return err
			}
			if diff := slices.DeleteFunc(l.before[h.Name()].Diff(after), cluster.EngineOwn); len(diff) > 0 {
				return fmt.Errorf("host %s:\n%s", h.Name(), strings.Join(diff, "\n"))
			}
			st, err := status(ctx, h)
			if err != nil {
				return err
			}
			if st.Networks+st.Endpoints+st.Services > 0 {
				return fmt.Errorf("the plugin on %s knows %d networks, %d endpoints, %d services", h.Name(), st.Networks, st.Endpoints, st.Services)
			}
			for _, p := range st.Gossip.Peers {
				if p.Endpoints > 0 {
					return fmt.Errorf("gossip on %s has %d endpoints of %s", h.Name(), p.Endpoints, p.Host)
				}
			}
		}
		return nil
	})
}

// remove removes everything that the soak has made.
func (l *lab) remove(ctx context.Context, p *plan) error {
	h := l.manager()
	names := append([]string{}, l.steady...)
	networks := append([]string{calm}, p.networks...)
	for _, s := range p.services {
		names = append(names, s.name)
	}
	for _, name := range names {
		if _, err := h.Docker(ctx, "service", "rm", name); unless("not found", err) != nil {
			return err
		}
	}
	for _, c := range p.clients {
		if _, err := l.cluster.Host(c.host).Docker(ctx, "rm", "-f", c.name); unless("No such container", err) != nil {
			return err
		}
	}
	for _, on := range l.cluster.Hosts() {
		if _, err := on.Docker(ctx, "rm", "-f", "client-"+on.Name()); unless("No such container", err) != nil {
			return err
		}
	}
	for _, name := range networks {
		rctx, cancel := context.WithTimeout(ctx, time.Minute)
		err := l.cluster.RemoveNetwork(rctx, name)
		cancel()
		if err != nil {
			return err
		}
	}
	return nil
}
