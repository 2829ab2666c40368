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
// kernel.ErrNotExist if no device has the address.
func (k *Kernel) UnderlayMTU(vtep netip.Addr) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	as, err := k.host.conn.addrs()
	if err != nil {
		return 0, fmt.Errorf("find MTU of underlay: %w", err)
	}
	for _, a := range as {
		if a.prefix.Addr() != vtep.Unmap() {
			continue
		}
		d, err := k.host.conn.linkByIndex(a.index)
		if err != nil {
			return 0, fmt.Errorf("find MTU of underlay: %w", err)
		}
		return d.mtu, nil
	}
	return 0, fmt.Errorf("find MTU of underlay: address %s %w on any device of the host; set the data-path address of the engine to one of its own", vtep, kernel.ErrNotExist)
}

// HostPrefixes are the IPv4 networks that the host itself uses, masked, in order,
// each once: those of its addresses and the destinations of its routes in any
// table, but for the default route and loopback. A pool must stay away from them.
func (k *Kernel) HostPrefixes() ([]netip.Prefix, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	as, err := k.host.conn.addrs()
	if err != nil {
		return nil, fmt.Errorf("list the host's prefixes: %w", err)
	}
	rs, err := k.host.conn.routes()
	if err != nil {
		return nil, fmt.Errorf("list the host's prefixes: %w", err)
	}
	for _, a := range as {
		rs = append(rs, a.prefix.Masked())
	}
	rs = slices.DeleteFunc(rs, func(p netip.Prefix) bool { return p.Bits() == 0 || p.Addr().IsLoopback() })
	slices.SortFunc(rs, func(a, b netip.Prefix) int { return a.Compare(b) })
	return slices.Compact(rs), nil
}

// routes dumps the destinations of unicast IPv4 routes. Local and broadcast ones
// only repeat addresses.
func (c *conn) routes() ([]netip.Prefix, error) {
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETROUTE, 0)
		msg := &nl.RtMsg{}
		msg.Family = unix.AF_INET
		req.AddData(msg)
		return req
	}
	ps, err := dump(c, build, unix.RTM_NEWROUTE, parseRoute)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return ps, nil
}

func parseRoute(b []byte) (netip.Prefix, bool) {
	if len(b) < unix.SizeofRtMsg || b[7] != unix.RTN_UNICAST {
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
