package linux

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// Dump reads all objects of ours (see the package's text for which those are):
// those of the host, those in our namespaces, and the tables and tunnels in the
// tasks' namespaces at the paths given. A path that is missing, or is no network
// namespace, contributes nothing; a namespace that goes while it is read is
// skipped. On any error there is no state, as an incomplete one would read as
// "make it all again". Only the filter is left out instead, with a warning, if
// iptables fails. It is kernel.ErrInterrupted if changes kept racing with it.
func (k *Kernel) Dump(ctx context.Context, sandboxes []string) (kernel.State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, fs.ErrClosed
	}
	out := kernel.State{}
	k.watchLocked(sandboxes)
	names, err := k.namesLocked()
	if err != nil {
		return nil, err
	}
	claimed := map[int]bool{} // containers' ends whose other end is in a namespace of ours
	type end struct {
		key   kernel.Link
		index int
	}
	var ends []end // veth pairs whose container's end is in the host's namespace
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s, err := k.spaceLocked(name)
		if errors.Is(err, kernel.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		peers, err := k.dumpSpace(s, out)
		if err != nil {
			if _, gone := statNetns(k.path(name)); errors.Is(gone, kernel.ErrNotExist) {
				maps.DeleteFunc(out, func(k kernel.Key, _ kernel.Value) bool {
					return k == kernel.Netns{Name: name} || k.Netns() == name
				})
				continue
			}
			return nil, fmt.Errorf("dump namespace %s: %w", name, err)
		}
		for key, index := range peers {
			claimed[index] = true
			ends = append(ends, end{key, index})
		}
	}

	// After our namespaces: a pair that is seen there has its end here, or moved on.
	veths, err := k.host.conn.links("veth")
	if err != nil {
		return nil, fmt.Errorf("dump host: %w", err)
	}
	k.seenLocked("", veths)
	byIndex := make(map[int]device, len(veths))
	for _, d := range veths {
		byIndex[d.index] = d
	}
	kept := map[int]device{}
	for _, e := range ends {
		d, ok := byIndex[e.index]
		if !ok {
			continue // taken between the two looks: no peer, as if we had come later
		}
		spec := out[e.key].(kernel.LinkSpec)
		spec.Peer, spec.PeerMAC = d.name, d.mac
		if k.isMesh(d.name) {
			kept[d.index] = d
			spec.Kept = d.up && d.mtu == spec.MTU
		}
		out[e.key] = spec
	}
	if err := k.dumpKept(kept, out); err != nil {
		return nil, fmt.Errorf("dump host: %w", err)
	}
	orphans, err := k.orphans(veths, claimed)
	if err != nil {
		return nil, err
	}
	maps.Copy(out, orphans)

	if err := k.dumpSysctl(k.host, out); err != nil {
		return nil, fmt.Errorf("dump host: %w", err)
	}
	if err := k.dumpFilter(out); err != nil {
		// A broken iptables must not stop the networks. Objects that are left out
		// are at worst made again, and making them tells each its own error.
		k.log.Warn("dump filter", "err", err)
	}
	if k.cfg.Tables != nil && !k.cfg.NoFilter {
		t, err := k.cfg.Tables.DumpHost(k.host.fd())
		if err != nil {
			return nil, fmt.Errorf("dump host: %w", err)
		}
		maps.Copy(out, t)
	}
	if err := k.dumpTasks(ctx, sandboxes, out); err != nil {
		return nil, err
	}
	return out, nil
}

// orphans are containers' ends in the host's namespace that belong to no pair in
// a namespace of ours. One whose other end is in any namespace pinned beside ours
// is left alone: it may be of another sluice on this host.
func (k *Kernel) orphans(veths []device, claimed map[int]bool) (kernel.State, error) {
	out := kernel.State{}
	var pinned map[int]bool
	for _, d := range veths {
		if claimed[d.index] || d.kind != "veth" || !d.ours() || !strings.HasPrefix(d.name, k.cfg.LinkPrefix) && !k.isMesh(d.name) {
			continue
		}
		if pinned == nil {
			ids, err := k.pinnedIDs()
			if err != nil {
				return nil, err
			}
			pinned = ids
		}
		if d.peerNS >= 0 && pinned[d.peerNS] {
			continue
		}
		out[kernel.Link{Name: d.name, Kind: kernel.Veth}] = specOf(d, "")
	}
	return out, nil
}

// pinnedIDs are the ids, as the host sees them, of all namespaces in NetnsDir.
func (k *Kernel) pinnedIDs() (map[int]bool, error) {
	names, err := readNames(k.cfg.NetnsDir)
	if err != nil {
		return nil, err
	}
	ids := map[int]bool{}
	for _, name := range names {
		f, _, err := openNetns(k.path(name))
		if errors.Is(err, kernel.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		id, err := k.host.conn.nsid(int(f.Fd()))
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
		ids[id] = true
	}
	return ids, nil
}

// specOf is a device as a value. See the package's text for a device that is down.
func specOf(d device, master string) kernel.LinkSpec {
	spec := kernel.LinkSpec{Alias: d.alias, MTU: d.mtu, Master: master, Quiet: d.quiet}
	if !d.up {
		spec.MTU = 0
	}
	switch kernel.LinkKind(d.kind) {
	case kernel.Bridge:
		spec.MAC = d.mac
	case kernel.VXLAN:
		spec.VNI, spec.Port, spec.Local = d.vni, d.port, d.local
	}
	return spec
}

// dumpSpace adds one of our namespaces. peers gives the index in the host's
// namespace of the container's end, for the veth pairs that have it there.
func (k *Kernel) dumpSpace(s *space, out kernel.State) (peers map[kernel.Link]int, err error) {
	out[kernel.Netns{Name: s.name}] = kernel.NetnsSpec{}
	peers = map[kernel.Link]int{}
	ls, err := s.conn.links("")
	if err != nil {
		return nil, err
	}
	k.seenLocked(s.name, ls)
	byIndex := make(map[int]device, len(ls))
	for _, d := range ls {
		byIndex[d.index] = d
	}
	for _, d := range ls {
		kind := kernel.LinkKind(d.kind)
		if !d.ours() || kind != kernel.Bridge && kind != kernel.VXLAN && kind != kernel.Veth {
			continue
		}
		key := kernel.Link{NS: s.name, Name: d.name, Kind: kind}
		out[key] = specOf(d, byIndex[d.master].name)
		if kind != kernel.Veth {
			continue
		}
		in, err := k.inHost(s, d)
		if err != nil {
			return nil, err
		}
		if in {
			peers[key] = d.peer
		}
	}
	if err := dumpOn(s, byIndex, out); err != nil {
		return nil, err
	}
	fdb, err := s.conn.neighs(unix.AF_BRIDGE)
	if err != nil {
		return nil, err
	}
	dumpFDB(s.name, fdb, byIndex, out)
	if err := k.dumpSysctl(s, out); err != nil {
		return nil, err
	}
	if k.cfg.Tables != nil {
		t, err := k.cfg.Tables.DumpBridge(s.fd(), s.name)
		if err != nil {
			return nil, err
		}
		maps.Copy(out, t)
	}
	if k.cfg.IPVS != nil {
		b, err := k.cfg.IPVS.Dump(s.fd(), s.name)
		if err != nil && !errors.Is(err, kernel.ErrUnsupported) { // without IPVS, there is nothing of it
			return nil, err
		}
		maps.Copy(out, b)
	}
	return peers, nil
}

// dumpOn adds addresses, neighbours and routes that are on devices of ours.
func dumpOn(s *space, byIndex map[int]device, out kernel.State) error {
	as, err := s.conn.addrs()
	if err != nil {
		return err
	}
	for _, a := range as {
		if d := byIndex[a.index]; d.ours() {
			out[kernel.Addr{NS: s.name, Dev: d.name, Prefix: a.prefix}] = kernel.AddrSpec{}
		}
	}
	arp, err := s.conn.neighs(unix.AF_INET)
	if err != nil {
		return err
	}
	for _, n := range arp {
		if d := byIndex[n.index]; d.ours() && n.state&unix.NUD_PERMANENT != 0 {
			out[kernel.Neigh{NS: s.name, Dev: d.name, IP: n.ip}] = kernel.NeighSpec{MAC: n.mac}
		}
	}
	rs, err := s.conn.routes(0)
	if err != nil {
		return err
	}
	for _, r := range rs {
		if d := byIndex[r.index]; d.ours() {
			out[kernel.Route{NS: s.name, Dev: d.name, Prefix: r.prefix}] = r.spec()
		}
	}
	return nil
}

// dumpFDB joins the halves of forwarding entries on our VXLAN devices, and reads
// those of the bridge that are for the network's end of a pair.
func dumpFDB(ns string, fdb []neigh, byIndex map[int]device, out kernel.State) {
	type halves struct {
		self   netip.Addr
		master bool
	}
	found := map[kernel.FDB]halves{}
	for _, n := range fdb {
		d := byIndex[n.index]
		if !d.ours() || d.kind != "vxlan" && d.kind != "veth" || n.mac[0]&1 != 0 {
			continue // a group address is the device's own filter
		}
		key := kernel.FDB{NS: ns, Dev: d.name, MAC: n.mac}
		if d.kind == "veth" {
			if n.master != 0 && n.master == d.master && n.state&unix.NUD_PERMANENT == 0 && n.state&unix.NUD_NOARP != 0 {
				out[key] = kernel.FDBSpec{}
			}
			continue
		}
		h := found[key]
		switch {
		case n.master != 0 && n.state&unix.NUD_PERMANENT != 0:
			continue // the port's own MAC
		case n.master != 0 && n.state&unix.NUD_NOARP == 0:
			continue // learned: ages by itself
		case n.master != 0:
			h.master = n.master == d.master
		default:
			h.self = n.ip
			if n.state&(unix.NUD_PERMANENT|unix.NUD_NOARP) == 0 {
				h.self = netip.Addr{} // will age: as good as missing
			}
		}
		found[key] = h
	}
	for key, h := range found {
		spec := kernel.FDBSpec{}
		if h.master {
			spec.VTEP = h.self
		}
		out[key] = spec
	}
}

// dumpSysctl reads the keys that we have set in s.
func (k *Kernel) dumpSysctl(s *space, out kernel.State) error {
	if len(s.sysctl) == 0 {
		return nil
	}
	return k.within(s, func() error {
		for _, name := range slices.Sorted(maps.Keys(s.sysctl)) {
			v, err := readSysctl(name)
			if errors.Is(err, kernel.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			out[kernel.Sysctl{NS: s.name, Name: name}] = kernel.SysctlSpec{Value: v}
		}
		return nil
	})
}

// dumpTasks reads the tables, the tunnels and the routes in the tasks' namespaces.
func (k *Kernel) dumpTasks(ctx context.Context, sandboxes []string, out kernel.State) error {
	for _, path := range sandboxes {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := withTask(path, func(fd int) error {
			if err := k.dumpDevices(fd, path, out); err != nil || k.cfg.Tables == nil {
				return err
			}
			t, err := k.cfg.Tables.DumpTask(fd, path)
			if err == nil {
				err = k.takeDefaults(fd, path, t)
			}
			maps.Copy(out, t)
			return err
		})
		if err != nil && !errors.Is(err, kernel.ErrNotExist) {
			return fmt.Errorf("dump namespace of a task: %w", err)
		}
	}
	return nil
}

// withTask calls f with a task's namespace open, no longer than f runs: an open
// descriptor keeps the namespace of a dead task alive.
func withTask(path string, f func(fd int) error) error {
	ns, _, err := openNetns(path)
	if err != nil {
		return err
	}
	return errors.Join(f(int(ns.Fd())), ns.Close())
}
