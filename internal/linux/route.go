package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// routeProtocol marks routes and rules as ours (rtm_protocol): the letter s. The
// numbers that rt_protos of iproute2 names are others.
const routeProtocol = 0x73

// isMesh reports whether a device's name is that of the host's end of a network.
func (k *Kernel) isMesh(name string) bool { return strings.HasPrefix(name, k.cfg.MeshPrefix) }

// dumpKept adds what is on the host's ends of networks.
func (k *Kernel) dumpKept(kept map[int]device, out kernel.State) error {
	if len(kept) == 0 {
		return nil
	}
	return dumpOn(k.host, kept, out)
}

// route is an IPv4 route of ours.
type route struct {
	index  int
	table  int
	typ    uint8 // RTN_*
	prefix netip.Prefix
	via    netip.Addr // the next hop; invalid: none
	src    netip.Addr // what its packets are from; invalid: nothing is said
}

func (r route) spec() kernel.RouteSpec {
	return kernel.RouteSpec{Via: r.via, Local: r.typ == unix.RTN_LOCAL}
}

// Offsets in struct rtmsg of linux/rtnetlink.h.
const (
	rtmDstLen, rtmTable, rtmProtocol, rtmScope, rtmType, rtmFlags = 1, 4, 5, 6, 7, 8
)

func parseRoute(b []byte) (route, bool) {
	if len(b) < unix.SizeofRtMsg || b[rtmProtocol] != routeProtocol {
		return route{}, false
	}
	r := route{table: int(b[rtmTable]), typ: b[rtmType]}
	ip := netip.IPv4Unspecified() // a route without RTA_DST is the default one
	attrs(b[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.RTA_DST:
			ip, _ = netip.AddrFromSlice(v)
		case unix.RTA_OIF:
			r.index = int(u32(v))
		case unix.RTA_TABLE:
			r.table = int(u32(v))
		case unix.RTA_GATEWAY:
			r.via, _ = netip.AddrFromSlice(v)
		case unix.RTA_PREFSRC:
			r.src, _ = netip.AddrFromSlice(v)
		}
	})
	r.prefix = netip.PrefixFrom(ip, int(b[rtmDstLen]))
	return r, r.prefix.IsValid()
}

// routes dumps the routes of ours, of one table or, with 0, of all. The kernel
// filters by protocol (from Linux 4.20 on): a router's host may have a million others.
// By table it would too, but says of one that is not there what the library cannot read.
func (c *conn) routes(table int) ([]route, error) {
	// A kernel without the option sends them all.
	strict := c.strict(1) == nil
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETROUTE, 0)
		msg := make([]byte, unix.SizeofRtMsg)
		msg[0], msg[rtmProtocol] = unix.AF_INET, routeProtocol
		req.AddData(header(msg))
		return req
	}
	rs, err := dump(c, build, unix.RTM_NEWROUTE, parseRoute)
	if strict {
		err = errors.Join(err, c.strict(0))
	}
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	out := rs[:0]
	for _, r := range rs {
		if table == 0 || r.table == table {
			out = append(out, r)
		}
	}
	return out, nil
}

// strict has the kernel read all of a dump's request (1), or as it always did (0).
func (c *conn) strict(on int) error {
	return unix.SetsockoptInt(c.sockets[unix.NETLINK_ROUTE].Socket.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, on)
}

// routeRequest is a message about one route.
func (c *conn) routeRequest(typ, flags int, r route) *nl.NetlinkRequest {
	req := c.request(typ, flags)
	msg := make([]byte, unix.SizeofRtMsg)
	msg[0], msg[rtmDstLen] = unix.AF_INET, byte(r.prefix.Bits())
	msg[rtmProtocol], msg[rtmType] = routeProtocol, r.typ
	msg[rtmScope] = unix.RT_SCOPE_UNIVERSE
	switch {
	case r.typ == unix.RTN_LOCAL:
		msg[rtmScope] = unix.RT_SCOPE_HOST
	case !r.via.IsValid():
		msg[rtmScope] = unix.RT_SCOPE_LINK
	default:
		binary.NativeEndian.PutUint32(msg[rtmFlags:], unix.RTNH_F_ONLINK)
	}
	req.AddData(header(msg))
	req.AddData(nl.NewRtAttr(unix.RTA_DST, r.prefix.Addr().AsSlice()))
	req.AddData(nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(r.index))))
	req.AddData(nl.NewRtAttr(unix.RTA_TABLE, nl.Uint32Attr(uint32(r.table))))
	if r.via.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_GATEWAY, r.via.AsSlice()))
	}
	if r.src.IsValid() {
		req.AddData(nl.NewRtAttr(unix.RTA_PREFSRC, r.src.AsSlice()))
	}
	return req
}

// deleteRoute deletes a route of ours; one that has gone is no error.
func (c *conn) deleteRoute(r route) error {
	return absentOK(c.do(c.routeRequest(unix.RTM_DELROUTE, 0, r)))
}

// applyRoute makes the route, or deletes it. A local one stands in another table
// than one with a next hop, so what is there is looked at first.
func (s *space) applyRoute(k kernel.Route, want kernel.Value) error {
	if !k.Prefix.Addr().Is4() || k.Prefix != k.Prefix.Masked() {
		return fmt.Errorf("route to %s: want an IPv4 prefix without host bits", k.Prefix)
	}
	d, err := s.device(k.Dev)
	if want == nil && errors.Is(err, kernel.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var spec kernel.RouteSpec
	if want != nil {
		if spec = want.(kernel.RouteSpec); spec.Local == spec.Via.Is4() {
			return fmt.Errorf("next hop %q: want an IPv4 address, or a local route without", spec.Via)
		}
	}
	have, err := s.conn.routes(0)
	if err != nil {
		return err
	}
	for _, r := range have {
		if r.index == d.index && r.prefix == k.Prefix && (want == nil || r.spec() != spec) {
			if err := s.conn.deleteRoute(r); err != nil {
				return err
			}
		}
	}
	if want == nil {
		return nil
	}
	r := route{index: d.index, table: unix.RT_TABLE_MAIN, typ: unix.RTN_UNICAST, prefix: k.Prefix, via: spec.Via}
	if spec.Local {
		r.table, r.typ = unix.RT_TABLE_LOCAL, unix.RTN_LOCAL
	}
	return s.conn.do(s.conn.routeRequest(unix.RTM_NEWROUTE, replace, r))
}
