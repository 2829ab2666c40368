package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

const (
	// opTime bounds an operation with all that must follow it, while nothing else is
	// wrong: a task is started in 1 to 5 s, and stopped in as long as its
	// connections last; a machine that is busy takes several times as long.
	opTime = 60 * time.Second
	// demoteTime is for two changes of a node's role: swarm renews its certificate
	// for each and looks for such work now and then, 30 to 40 s in all.
	demoteTime = 2 * time.Minute
	// attemptTime bounds one command of an operation: what hangs in a fault is
	// tried again, by another manager.
	attemptTime = 20 * time.Second
)

// String is the action as a person would tell it.
func (a action) String() string {
	words := []string{a.kind}
	if a.name != "" {
		words = append(words, a.name)
	}
	switch a.kind {
	case opScale, opService:
		words = append(words, fmt.Sprintf("to %d", a.replicas))
	}
	if a.network != "" {
		words = append(words, "on "+a.network)
	}
	if a.port != 0 {
		words = append(words, fmt.Sprintf("port %d", a.port))
	}
	return strings.Join(append(words, a.options...), " ")
}

// names are the hosts of an action, where it is about any.
func (l *lab) names(a action) (names []string) {
	if _, fault := faults[a.kind]; !fault && !slices.Contains([]string{opDrain, opDemote, opClient, opNoClient, opAsk}, a.kind) {
		return nil
	}
	for _, h := range l.struck(a) {
		names = append(names, h.Name())
	}
	return names
}

// do does an operation and waits until what must follow has, trying again what fails:
// all of it may be done twice.
func (l *lab) do(ctx context.Context, a action) error {
	if a.kind == opDrain {
		return l.drain(ctx, a)
	}
	if a.kind == opDemote {
		return l.demote(ctx, a)
	}
	steps := []func(context.Context) error{func(ctx context.Context) error { return l.attempt(ctx, a) }}
	n, steady := l.steadyTasks()[a.name]
	if !steady {
		n = a.replicas
	}
	switch a.kind {
	case opRolling, opUpdate, opRollback, opPublish, opUnpublish:
		steps = append(steps, func(ctx context.Context) error { return l.updated(ctx, a.name) })
	}
	switch a.kind {
	case opService, opScale, opRolling, opUpdate, opRollback, opPublish, opUnpublish:
		steps = append(steps, func(ctx context.Context) error { return l.manager().HasTasks(ctx, a.name, n) })
	}
	for _, step := range steps {
		if err := try(ctx, a.String(), step); err != nil {
			return err
		}
	}
	return nil
}

// try tries until it succeeds or ctx ends.
func try(ctx context.Context, what string, step func(context.Context) error) error {
	return cluster.Wait(ctx, what, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, attemptTime)
		defer cancel()
		return step(ctx)
	})
}

// attempt gives the commands of an operation.
func (l *lab) attempt(ctx context.Context, a action) error {
	m, host := l.manager(), l.struck(a)[0]
	run := func(h *cluster.Host, args ...string) error {
		_, err := h.Docker(ctx, args...)
		return err
	}
	switch a.kind {
	case opNetwork:
		return unless("already exists", run(m, networkCreate(a.name, a.options...)...))
	case opNoNetwork:
		// Containers that have just gone may still be its.
		return unless("not found", run(m, "network", "rm", a.name))
	case opService:
		args := slices.Concat([]string{"service", "create", "-d", "--no-resolve-image", "--name", a.name, "--network", a.at,
			"--replicas", fmt.Sprint(a.replicas), "--stop-grace-period", "2s",
			// By default an update takes 5 s for each task, and waits for a person when
			// one does not start, as may be in a fault.
			"--update-parallelism", "0", "--update-monitor", "1s", "--update-failure-action", "continue",
			"--rollback-parallelism", "0", "--rollback-monitor", "1s", "--rollback-failure-action", "continue"}, a.options, []string{image.Probe})
		return unless("already exists", run(m, args...))
	case opNoService:
		return unless("not found", run(m, "service", "rm", a.name))
	case opScale:
		return run(m, "service", "scale", "-d", fmt.Sprintf("%s=%d", a.name, a.replicas))
	case opUpdate, opRolling:
		return run(m, "service", "update", "-d", "--no-resolve-image", "--force", a.name)
	case opRollback:
		// To what differs by nothing else from what runs now.
		if err := run(m, "service", "update", "-d", "--no-resolve-image", "--force", a.name); err != nil {
			return err
		}
		return run(m, "service", "rollback", "-d", a.name)
	case opPublish, opUnpublish:
		return run(m, "service", "update", "-d", "--no-resolve-image", "--network-rm", a.network, "--network-add", a.at, a.name)
	case opClient:
		if err := unless("already in use", run(host, clientRun(a.name, a.network)...)); err != nil {
			return err
		}
		return started(ctx, host, a.name) // it may have been made, and not started
	case opNoClient:
		return unless("No such container", run(host, "rm", "-f", a.name))
	case opAsk:
		return l.ask(ctx, a, host)
	}
	return fmt.Errorf("nobody knows how to do %q", a.kind)
}

// unless drops an error that says that the work is done already.
func unless(done string, err error) error {
	if err != nil && strings.Contains(err.Error(), done) {
		return nil
	}
	return err
}

// updated waits for the end of an update.
func (l *lab) updated(ctx context.Context, service string) error {
	out, err := l.manager().Docker(ctx, "service", "inspect", "--format", "{{with .UpdateStatus}}{{.State}}{{end}}", service)
	if err == nil && out != "completed" && out != "rollback_completed" {
		err = fmt.Errorf("its update is %q", out)
	}
	return err
}

// ask has a client ask a service by name, and one outside by its port on every host.
func (l *lab) ask(ctx context.Context, a action, from *cluster.Host) error {
	demand := func(out string, err error) error {
		var s struct {
			OK, Failed int
			Errors     map[string]int
		}
		if jerr := json.Unmarshal([]byte(out), &s); jerr != nil {
			return errors.Join(err, jerr)
		}
		if s.Failed > 0 {
			return fmt.Errorf("%d of %d requests failed: %v", s.Failed, s.OK+s.Failed, s.Errors)
		}
		return nil
	}
	for _, kind := range [][]string{{"--tcp", a.name + ":80"}, {"--udp", a.name + ":53"}} {
		if err := demand(from.InContainer(ctx, a.client, append([]string{"/probe", "get", "--summary", "-n", "4"}, kind...)...)); err != nil {
			return err
		}
	}
	if a.port == 0 {
		return nil
	}
	for _, h := range l.cluster.Hosts() {
		at := netip.AddrPortFrom(h.Addr(), uint16(a.port)).String()
		for _, kind := range [][]string{{"--tcp", at}, {"--udp", at}} {
			if err := demand(l.client.Exec(ctx, append([]string{l.probe, "get", "--summary", "-n", "4"}, kind...)...)); err != nil {
				return fmt.Errorf("by %s: %w", at, err)
			}
		}
	}
	return nil
}

// drain has a host's tasks go elsewhere, if they may, and come back.
func (l *lab) drain(ctx context.Context, a action) error {
	h := l.struck(a)[0]
	availability := func(is string) error {
		return try(ctx, a.String(), func(ctx context.Context) error {
			_, err := l.manager().Docker(ctx, "node", "update", "--availability", is, h.Name())
			return err
		})
	}
	tasks := func(service string, n int) error {
		return try(ctx, a.String(), func(ctx context.Context) error { return l.manager().HasTasks(ctx, service, n) })
	}
	if err := availability("drain"); err != nil {
		return err
	}
	// It is made active also if something else has failed.
	return errors.Join(tasks(pinned(h), 0), tasks(spread, hosts), availability("active"), tasks(pinned(h), 1))
}

// demote makes a manager a worker and a manager again.
func (l *lab) demote(ctx context.Context, a action) error {
	h := l.struck(a)[0]
	l.setAway(h, true)
	defer l.setAway(h, false)
	turn := func(verb string, manager bool) error {
		return try(ctx, a.String(), func(ctx context.Context) error {
			nodes, err := l.manager().Nodes(ctx)
			if err != nil {
				return err
			}
			led := slices.ContainsFunc(nodes, func(n cluster.Node) bool { return n.Leader && n.Manager })
			is := slices.ContainsFunc(nodes, func(n cluster.Node) bool { return n.Name == h.Name() && n.Ready && n.Manager })
			if led && is == manager {
				return nil
			}
			_, err = l.manager().Docker(ctx, "node", verb, h.Name())
			return errors.Join(err, fmt.Errorf("%s: not done yet: %+v", verb, nodes))
		})
	}
	if err := turn("demote", false); err != nil {
		return err
	}
	if err := h.WaitWorker(ctx); err != nil {
		return err
	}
	return turn("promote", true)
}
