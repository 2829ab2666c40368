package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"sluice/test/cluster"
)

// footprint is what a plugin's process holds.
type footprint struct {
	PID         string `json:"pid"`
	Memory      uint64 `json:"residentBytes"`
	Descriptors int    `json:"descriptors"`
	Threads     int    `json:"threads"`
}

// Limits of growth, from before the first network to after the last, both of them with
// nothing there.
const (
	// moreMemory is what the collector may keep of what has come and gone: Go lets a
	// heap double before it collects, and gives back what it does not use after
	// minutes only. Resident are 20 MiB, most of them the program's own text.
	moreMemory = 16 << 20
	// moreDescriptors are gossip's, which begins with the first network: two sockets,
	// one for the keys on a manager, and connections that are under way.
	moreDescriptors = 10
)

// usage follows what the plugins hold and mend.
type usage struct {
	empty map[string]footprint
	hosts map[string]*hostUsage
	names []string
}

type hostUsage struct {
	Host      string    `json:"host"`
	Empty     footprint `json:"empty"` // before the first network
	Start     footprint `json:"start"` // with what is there all the time
	Most      footprint `json:"most"`  // of each, at the end of a step
	End       footprint `json:"end"`   // after the last network
	Processes int       `json:"processes"`
	Drift     uint64    `json:"driftMended"`
	last      uint64    // of drift, by the process of End
}

// newUsage begins with what plugins hold before the first network, by host.
func newUsage(empty map[string]footprint) *usage {
	return &usage{hosts: map[string]*hostUsage{}, empty: empty}
}

// add takes in what a process holds and has mended since it was started.
func (u *usage) add(host string, f footprint, drift uint64) {
	x := u.hosts[host]
	if x == nil {
		x = &hostUsage{Host: host, Empty: u.empty[host], Start: f}
		u.hosts[host] = x
		u.names = append(u.names, host)
	}
	if x.End.PID != f.PID {
		x.Processes++
		x.last = 0
	}
	x.Drift += drift - min(x.last, drift)
	x.End, x.last = f, drift
	x.Most.Memory = max(x.Most.Memory, f.Memory)
	x.Most.Descriptors = max(x.Most.Descriptors, f.Descriptors)
	x.Most.Threads = max(x.Most.Threads, f.Threads)
}

// into puts it in the report, with a verdict.
func (u *usage) into(r *report) {
	for _, name := range u.names {
		x := u.hosts[name]
		r.Plugins = append(r.Plugins, *x)
		if x.End.Memory > x.Empty.Memory+moreMemory {
			r.wrong("the plugin on %s holds %s of memory after the last network, and held %s before the first", name, mega(x.End.Memory), mega(x.Empty.Memory))
		}
		if x.End.Descriptors > x.Empty.Descriptors+moreDescriptors {
			r.wrong("the plugin on %s holds %d descriptors after the last network, and held %d before the first", name, x.End.Descriptors, x.Empty.Descriptors)
		}
	}
}

func mega(bytes uint64) string { return fmt.Sprintf("%.1f MiB", float64(bytes)/(1<<20)) }

// measure asks all plugins.
func (r *run) measure(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, healPlugin)
	defer cancel()
	for _, h := range r.lab.cluster.Hosts() {
		err := cluster.Wait(ctx, "the plugin on "+h.Name()+" tells what it holds", func(ctx context.Context) error {
			f, err := read(ctx, h)
			if err != nil {
				return err
			}
			st, err := status(ctx, h)
			if err != nil {
				return err
			}
			for _, c := range st.Calls {
				if c.Panics > 0 {
					r.report.wrong("the plugin on %s: %d calls of %s ended by a mistake in sluice", h.Name(), c.Panics, c.Method)
				}
			}
			r.usage.add(h.Name(), f, st.Loop.Drift)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// read reads what the plugin's process holds, from proc(5).
func read(ctx context.Context, h *cluster.Host) (footprint, error) {
	pid, err := h.PluginPID(ctx)
	if err != nil {
		return footprint{}, err
	}
	out, err := h.Exec(ctx, "sh", "-c", `cat /proc/$0/status; echo Descriptors: $(ls /proc/$0/fd | wc -l)`, pid)
	if err != nil {
		return footprint{}, err
	}
	f := footprint{PID: pid}
	for line := range strings.Lines(out) {
		name, rest, _ := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if len(fields) == 0 {
			continue
		}
		n, err := strconv.Atoi(fields[0])
		if err != nil {
			continue // of no number
		}
		switch name {
		case "VmRSS":
			f.Memory = uint64(n) << 10 // in kB
		case "Threads":
			f.Threads = n
		case "Descriptors":
			f.Descriptors = n
		}
	}
	if f.Memory == 0 || f.Descriptors == 0 {
		return f, fmt.Errorf("process %s on %s tells nothing: %q", pid, h.Name(), out)
	}
	return f, nil
}
