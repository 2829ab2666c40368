package linux

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"sluice/internal/kernel"
)

// Apply does ops in the order given and returns one result for each; nil is done.
// Every op stands by itself: one that fails does not keep the next from being
// tried. Neighbouring ops on the filter are done together, so are the nftables
// ops of one namespace and those of one task, each in one transaction, and the
// deletions of devices in one namespace: they share their result. Ops on IPVS
// among those of nftables keep their place, and have results of their own. When ctx ends,
// what is left has its error.
func (k *Kernel) Apply(ctx context.Context, ops []kernel.Op) []error {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.host.devices)
	for _, s := range k.spaces {
		clear(s.devices)
	}
	defer k.beforeLocked(ops)()
	errs := make([]error, len(ops))
	for i := 0; i < len(ops); {
		n, phase := 1, ops[i].Key.Phase()
		for i+n < len(ops) && together(ops[i], ops[i+n]) {
			n++
		}
		run, out := ops[i:i+n], errs[i:i+n]
		i += n
		err := ctx.Err()
		if err == nil && k.closed {
			err = fs.ErrClosed
		}
		switch {
		case err != nil:
			fill(out, err)
		case phase == kernel.PhaseFilter:
			k.applyFilter(run, out)
		case phase == kernel.PhaseVIP || phase == kernel.PhaseTask:
			k.applyTables(run, out)
		case phase == kernel.PhaseMesh || phase == kernel.PhaseGuard:
			fill(out, k.applyMesh(run))
		case isLinkDelete(run[0]):
			fill(out, k.deleteLinks(run))
		default:
			out[0] = k.applyOne(run[0])
		}
		for j, err := range out {
			if err != nil {
				out[j] = fmt.Errorf("%s %s: %w", verb(run[j]), run[j].Key, err)
			}
		}
	}
	return errs
}

// together reports whether b, which follows a, is done in one go with it.
func together(a, b kernel.Op) bool {
	switch phase := a.Key.Phase(); phase {
	case kernel.PhaseFilter, kernel.PhaseVIP, kernel.PhaseTask, kernel.PhaseMesh, kernel.PhaseGuard:
		return b.Key.Phase() == phase
	}
	return isLinkDelete(a) && isLinkDelete(b) && a.Key.Netns() == b.Key.Netns()
}

func isLinkDelete(o kernel.Op) bool {
	_, ok := o.Key.(kernel.Link)
	return ok && o.Want == nil
}

func fill(out []error, err error) {
	for i := range out {
		out[i] = err
	}
}

func verb(o kernel.Op) string {
	switch {
	case o.Want == nil:
		return "delete"
	case o.Have == nil:
		return "create"
	}
	return "change"
}

// applyOne does an op that is not part of a transaction.
func (k *Kernel) applyOne(o kernel.Op) error {
	if key, ok := o.Key.(kernel.Netns); ok {
		return k.applyNetns(key, o.Want)
	}
	s, err := k.spaceLocked(o.Key.Netns())
	if errors.Is(err, kernel.ErrNotExist) && o.Want == nil {
		return nil // the namespace went, and what was in it
	}
	if err != nil {
		return err
	}
	switch key := o.Key.(type) {
	case kernel.Sysctl:
		err = k.applySysctl(s, key, o.Want)
	case kernel.Link:
		err = k.applyLink(s, key, o.Want)
	case kernel.Addr:
		err = s.applyAddr(key, o.Want)
	case kernel.Neigh:
		err = s.applyNeigh(key, o.Want)
	case kernel.FDB:
		err = s.applyFDB(key, o.Want)
	case kernel.Route:
		if err = s.applyRoute(key, o.Want); err == nil && o.Want == nil && s == k.host {
			k.forgetBlock(key.Prefix)
		}
	default:
		err = fmt.Errorf("objects of type %T are unknown here", key)
	}
	if err != nil {
		return fmt.Errorf("%w%s", err, hint(err))
	}
	return nil
}

// applyMesh does ops on the host's table for published ports.
func (k *Kernel) applyMesh(ops []kernel.Op) error {
	if k.cfg.Tables == nil {
		return errNoTables
	}
	err := k.cfg.Tables.ApplyHost(k.host.fd(), ops)
	if err == nil {
		k.forgetFlows(ops)
	}
	return err
}

// applyNetns makes or deletes a namespace. Its devices go first: the kernel
// destroys the devices of a namespace some time after the last user has left, and
// until then refuses their VNI to others and keeps the containers' ends.
func (k *Kernel) applyNetns(key kernel.Netns, want kernel.Value) error {
	if !k.owns(key.Name) {
		return fmt.Errorf("want a plain name that starts with %q", k.cfg.NetnsPrefix)
	}
	if want != nil {
		return k.pin(key.Name)
	}
	s, err := k.spaceLocked(key.Name)
	if err == nil {
		err = s.deleteOurs(func(device) bool { return true })
	}
	if err != nil && !errors.Is(err, kernel.ErrNotExist) {
		return err
	}
	k.dropLocked(key.Name) // our own descriptors would keep it alive
	return k.unpin(key.Name)
}

// deleteLinks deletes devices of one namespace. What is not ours is not there for us.
func (k *Kernel) deleteLinks(ops []kernel.Op) error {
	s, err := k.spaceLocked(ops[0].Key.Netns())
	if errors.Is(err, kernel.ErrNotExist) {
		return nil // the namespace went, and what was in it
	}
	if err != nil {
		return err
	}
	want := make(map[kernel.Link]bool, len(ops))
	for _, o := range ops {
		want[o.Key.(kernel.Link)] = true
	}
	err = s.deleteOurs(func(d device) bool {
		return want[kernel.Link{NS: s.name, Name: d.name, Kind: kernel.LinkKind(d.kind)}]
	})
	if err != nil {
		return fmt.Errorf("%w%s", err, hint(err))
	}
	return nil
}

// applySysctl sets a key and remembers it as ours, or forgets it.
func (k *Kernel) applySysctl(s *space, key kernel.Sysctl, want kernel.Value) error {
	if want == nil {
		delete(s.sysctl, key.Name)
		return nil
	}
	err := k.within(s, func() error { return writeSysctl(key.Name, want.(kernel.SysctlSpec).Value) })
	if err == nil {
		s.sysctl[key.Name] = true
	}
	return err
}

// applyTables hands neighbouring ops of nftables and IPVS on, namespace by namespace.
func (k *Kernel) applyTables(ops []kernel.Op, errs []error) {
	done := map[string]bool{}
	for i := range ops {
		ns := ops[i].Key.Netns()
		if done[ns] {
			continue
		}
		done[ns] = true
		var batch []kernel.Op
		var at []int // where they stand in ops
		for j := i; j < len(ops); j++ {
			if ops[j].Key.Netns() == ns {
				batch, at = append(batch, ops[j]), append(at, j)
			}
		}
		for n, err := range k.applyNamespace(ns, batch) {
			if errors.Is(err, kernel.ErrNotExist) && batch[n].Want == nil {
				err = nil // what it was in has gone
			}
			errs[at[n]] = err
		}
	}
}

// applyNamespace does ops of one namespace in their order: rows of nftables each
// in one go, those of IPVS between them one by one.
func (k *Kernel) applyNamespace(ns string, ops []kernel.Op) []error {
	if sandbox, ok := sandboxOf(ops[0].Key); ok {
		return k.applyTask(sandbox, ops)
	}
	errs := make([]error, len(ops))
	for i := 0; i < len(ops); {
		n, ipvs := 1, kernel.IsIPVS(ops[i].Key)
		for i+n < len(ops) && kernel.IsIPVS(ops[i+n].Key) == ipvs {
			n++
		}
		run, out := ops[i:i+n], errs[i:i+n]
		i += n
		if !ipvs {
			fill(out, k.applyBatch(ns, run))
			continue
		}
		s, err := k.spaceLocked(ns)
		if err == nil && k.cfg.IPVS == nil {
			err = fmt.Errorf("IPVS %w: no adapter is configured", kernel.ErrUnsupported)
		}
		if err != nil {
			fill(out, err)
			continue
		}
		copy(out, k.cfg.IPVS.Apply(s.fd(), ns, run))
	}
	return errs
}

func (k *Kernel) applyBatch(ns string, ops []kernel.Op) error {
	if k.cfg.Tables == nil {
		return errNoTables
	}
	s, err := k.spaceLocked(ns)
	if err != nil {
		return err
	}
	return k.cfg.Tables.ApplyBridge(s.fd(), ns, ops)
}

// errNoTables is the error of an op on nftables without Config.Tables.
var errNoTables = fmt.Errorf("nftables %w: no adapter is configured", kernel.ErrUnsupported)

// applyTask does ops of one task: those of nftables in one go, and each tunnel and
// each route by itself.
func (k *Kernel) applyTask(sandbox string, ops []kernel.Op) []error {
	errs := make([]error, len(ops))
	var tables, tunnels, routes []kernel.Op
	var ofTables, ofTunnels, ofRoutes []int // where they stand in ops
	for i, o := range ops {
		switch o.Key.(type) {
		case kernel.TaskTunnel:
			tunnels, ofTunnels = append(tunnels, o), append(ofTunnels, i)
		case kernel.TaskRoute:
			routes, ofRoutes = append(routes, o), append(ofRoutes, i)
		default:
			tables, ofTables = append(tables, o), append(ofTables, i)
		}
	}
	spread := func(at []int, results []error) {
		for n, i := range at {
			errs[i] = results[n]
		}
	}
	err := withTask(sandbox, func(fd int) error {
		if len(routes) > 0 {
			spread(ofRoutes, k.applyEach(fd, sandbox, routes, (*conn).applyTaskRoute))
		}
		if len(tables) > 0 {
			err := errNoTables
			if k.cfg.Tables != nil {
				if err = k.giveDefaults(fd, sandbox, tables); err == nil {
					err = k.cfg.Tables.ApplyTask(fd, sandbox, tables)
				}
				if err == nil {
					k.forgetTask(fd, sandbox, tables)
				}
			}
			for _, i := range ofTables {
				errs[i] = err
			}
		}
		if len(tunnels) > 0 {
			spread(ofTunnels, k.applyEach(fd, sandbox, tunnels, k.applyTunnel))
		}
		return nil
	})
	if err != nil {
		fill(errs, err)
	}
	return errs
}

// applyEach does ops of one task, each by itself, over a connection to its namespace,
// open at fd.
func (k *Kernel) applyEach(fd int, sandbox string, ops []kernel.Op, do func(*conn, kernel.Op) error) []error {
	errs := make([]error, len(ops))
	err := k.inside(fd, sandbox, func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		for i, o := range ops {
			if err := do(c, o); err != nil {
				errs[i] = fmt.Errorf("%w%s", err, hint(err))
			}
		}
		return nil
	})
	if err != nil {
		fill(errs, err)
	}
	return errs
}

// sandboxOf is the path of the task's namespace that the object is in.
func sandboxOf(key kernel.Key) (string, bool) { return strings.CutPrefix(key.Netns(), "task:") }
