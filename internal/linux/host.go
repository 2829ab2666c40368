package linux

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// UnderlayMTU is the MTU in bytes of the host's device that has the address
// vtep: what a VXLAN packet, headers included, may measure. It is
// kernel.ErrNotExist if no device has the address. Like all here it waits for Dump and
// Apply: who has no time for that remembers the answer.
func (k *Kernel) UnderlayMTU(vtep netip.Addr) (int, error) {
	d, err := k.underlay(vtep)
	if err != nil {
		return 0, fmt.Errorf("find MTU of underlay: %w", err)
	}
	return d.mtu, nil
}

// UnderlayDevice is the name of the host's device that has the address vtep; errors
// are as UnderlayMTU's.
func (k *Kernel) UnderlayDevice(vtep netip.Addr) (string, error) {
	d, err := k.underlay(vtep)
	if err != nil {
		return "", fmt.Errorf("find device of underlay: %w", err)
	}
	return d.name, nil
}

func (k *Kernel) underlay(vtep netip.Addr) (device, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	as, err := k.host.conn.addrs()
	if err != nil {
		return device{}, err
	}
	for _, a := range as {
		if a.prefix.Addr() == vtep.Unmap() {
			return k.host.conn.linkByIndex(a.index)
		}
	}
	return device{}, fmt.Errorf("address %s %w on any device of the host; set the data-path address of the engine to one of its own", vtep, kernel.ErrNotExist)
}

// HostPrefixes are the IPv4 networks that the host itself uses, masked, in order,
// each once: those of its addresses and the destinations of its routes in any
// table, but for the default route, loopback, and what leads into our own networks. A
// pool must stay away from them.
func (k *Kernel) HostPrefixes() ([]netip.Prefix, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	as, err := k.host.conn.addrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's prefixes: %w", err)
	}
	rs, err := k.host.conn.destinations()
	if err != nil {
		return nil, fmt.Errorf("list the host's prefixes: %w", err)
	}
	veths, err := k.host.conn.links("veth")
	if err != nil {
		return nil, fmt.Errorf("list the host's prefixes: %w", err)
	}
	kept := map[int]bool{}
	for _, d := range veths {
		kept[d.index] = d.ours() && k.isMesh(d.name)
	}
	for _, a := range as {
		if !kept[a.index] {
			rs = append(rs, a.prefix.Masked())
		}
	}
	rs = slices.DeleteFunc(rs, func(p netip.Prefix) bool { return p.Bits() == 0 || p.Addr().IsLoopback() })
	slices.SortFunc(rs, func(a, b netip.Prefix) int { return a.Compare(b) })
	return slices.Compact(rs), nil
}

// destinations dumps those of unicast IPv4 routes that are not ours. Local and broadcast ones
// only repeat addresses.
func (c *conn) destinations() ([]netip.Prefix, error) {
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETROUTE, 0)
		msg := &nl.RtMsg{}
		msg.Family = unix.AF_INET
		req.AddData(msg)
		return req
	}
	ps, err := dump(c, build, unix.RTM_NEWROUTE, parseDestination)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return ps, nil
}

func parseDestination(b []byte) (netip.Prefix, bool) {
	if len(b) < unix.SizeofRtMsg || b[7] != unix.RTN_UNICAST || b[5] == routeProtocol {
		return netip.Prefix{}, false
	}
	ip := netip.IPv4Unspecified() // a route without RTA_DST is the default one
	attrs(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
		if typ == unix.RTA_DST {
			ip, _ = netip.AddrFromSlice(v)
		}
	})
	p := netip.PrefixFrom(ip, int(b[1]))
	return p.Masked(), p.IsValid()
}
