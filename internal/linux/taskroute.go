package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// What a task answers from its address on a network leaves by that network:
//
//	ip rule   5100: from 10.255.0.3 lookup 184483843        the address as a number
//	ip rule  32768: ipproto udp lookup 184483843             where no other has a way
//	table     10.255.0.0/20 dev eth0 src 10.255.0.3
//	          default via 10.255.0.1 dev eth0
//
// By the rule, the route is right before anything of the packet is decided: MTU,
// RST, ICMP errors, and the reverse lookup of strict rp_filter. The table's number
// is the address, so that each network of a task has one, and none is counted out.
//
// The second rule is for tasks of internal networks, which have no default route: what
// a server sends that is bound to no address has no source when its route is looked
// for. The rule is behind all that the task has, and for UDP alone, so that the
// connections which a task tries to make outside fail at once, as without it.

// taskRule is the rule's place. Those of VPN programs come before it (wg-quick takes
// places below the kernel's 32766 from the top down, others small numbers).
const taskRule = 5100

// lastRule is the place of the second: behind the kernel's own, of which the last is
// 32767 (FR_TABLE_DEFAULT in net/ipv4/fib_rules.c).
const lastRule = 32768

// Of include/uapi/linux/fib_rules.h.
const (
	sizeofRule   = 12 // struct fib_rule_hdr
	ruleSrcLen   = 2
	ruleAction   = 7
	actToTable   = 1  // FR_ACT_TO_TBL
	fraSrc       = 2  // FRA_SRC
	fraPriority  = 6  // FRA_PRIORITY
	fraTable     = 15 // FRA_TABLE
	fraProtocol  = 21 // FRA_PROTOCOL, from Linux 4.17
	fraIPProto   = 22 // FRA_IP_PROTO, from Linux 4.17
	bitsOfSource = 32
)

// fromRule is a rule of ours.
type fromRule struct {
	addr  netip.Addr // the source; invalid: the rule is the second, for any
	table uint32
}

// tableOf is the number of an address's table.
func tableOf(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// addrOf is the reverse of tableOf.
func addrOf(table uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, table)))
}

func parseRule(b []byte) (r fromRule, ok bool) {
	if len(b) < sizeofRule || b[ruleAction] != actToTable {
		return r, false
	}
	var place uint32
	var ours, udp bool
	attrs(b[sizeofRule:], func(typ uint16, v []byte) {
		switch typ {
		case fraSrc:
			r.addr, _ = netip.AddrFromSlice(v)
		case fraPriority:
			place = u32(v)
		case fraTable:
			r.table = u32(v)
		case fraProtocol:
			ours = len(v) > 0 && v[0] == routeProtocol
		case fraIPProto:
			udp = len(v) > 0 && v[0] == unix.IPPROTO_UDP
		}
	})
	if place == lastRule {
		return r, ours && udp && b[ruleSrcLen] == 0
	}
	return r, ours && place == taskRule && b[ruleSrcLen] == bitsOfSource && r.addr.Is4()
}

// rules dumps the rules of ours.
func (c *conn) rules() ([]fromRule, error) {
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETRULE, 0)
		msg := make([]byte, sizeofRule)
		msg[0] = unix.AF_INET
		req.AddData(header(msg))
		return req
	}
	rs, err := dump(c, build, unix.RTM_NEWRULE, parseRule)
	if err != nil {
		return nil, fmt.Errorf("list routing rules: %w", err)
	}
	return rs, nil
}

func (c *conn) ruleRequest(typ, flags int, r fromRule) *nl.NetlinkRequest {
	req := c.request(typ, flags)
	msg := make([]byte, sizeofRule)
	msg[0], msg[ruleAction] = unix.AF_INET, actToTable
	place := uint32(lastRule)
	if r.addr.IsValid() {
		msg[ruleSrcLen], place = bitsOfSource, taskRule
	}
	req.AddData(header(msg))
	if r.addr.IsValid() {
		req.AddData(nl.NewRtAttr(fraSrc, r.addr.AsSlice()))
	} else {
		req.AddData(nl.NewRtAttr(fraIPProto, []byte{unix.IPPROTO_UDP}))
	}
	req.AddData(nl.NewRtAttr(fraPriority, nl.Uint32Attr(place)))
	req.AddData(nl.NewRtAttr(fraTable, nl.Uint32Attr(r.table)))
	req.AddData(nl.NewRtAttr(fraProtocol, []byte{routeProtocol}))
	return req
}

// taskRoutes are the routes of a task: for each address with a rule of ours what its
// table says; the zero value if that is not all that belongs there.
func (c *conn) taskRoutes() (map[netip.Addr]kernel.TaskRouteSpec, error) {
	rules, err := c.rules()
	if err != nil || len(rules) == 0 {
		return nil, err
	}
	out := map[netip.Addr]kernel.TaskRouteSpec{}
	last := map[uint32]bool{} // tables that the second rule leads to
	for _, r := range rules {
		if !r.addr.IsValid() {
			last[r.table] = true
			out[addrOf(r.table)] = kernel.TaskRouteSpec{} // unless there is the first too
		}
	}
	seen := map[netip.Addr]bool{}
	for _, r := range rules {
		if !r.addr.IsValid() {
			continue
		}
		twice := seen[r.addr]
		seen[r.addr], out[r.addr] = true, kernel.TaskRouteSpec{}
		if twice || r.table != tableOf(r.addr) {
			continue
		}
		have, err := c.routes(int(r.table))
		if err != nil {
			return nil, err
		}
		spec, ok := specOfRoutes(have, r.addr)
		if !ok {
			continue
		}
		d, err := c.deviceOf(netip.PrefixFrom(r.addr, spec.Subnet.Bits()))
		if errors.Is(err, kernel.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		spec.Loose, spec.Last = d.loose, last[r.table]
		if d.index == have[0].index {
			out[r.addr] = spec
		}
	}
	return out, nil
}

// specOfRoutes reads what a table is for.
func specOfRoutes(rs []route, addr netip.Addr) (spec kernel.TaskRouteSpec, ok bool) {
	if len(rs) != 2 || rs[0].index != rs[1].index {
		return spec, false
	}
	for _, r := range rs {
		switch {
		case r.typ != unix.RTN_UNICAST:
		case r.prefix.Bits() == 0 && r.via.IsValid():
			spec.Gateway = r.via
		case r.prefix.Bits() > 0 && !r.via.IsValid() && r.src == addr:
			spec.Subnet = r.prefix
		}
	}
	return spec, spec.Gateway.IsValid() && spec.Subnet.IsValid()
}

// deviceOf is the device that has an address with this length of prefix: a tunnel of
// ours may have it too, without one.
func (c *conn) deviceOf(p netip.Prefix) (device, error) {
	as, err := c.addrs()
	if err != nil {
		return device{}, err
	}
	for _, a := range as {
		if a.prefix == p {
			return c.linkByIndex(a.index)
		}
	}
	return device{}, fmt.Errorf("a device with address %s %w in the task's namespace", p, kernel.ErrNotExist)
}

// applyTaskRoute makes rule and table of an address, or deletes them. The rule comes
// last and goes first: without a route in its table it would lead to main.
func (c *conn) applyTaskRoute(o kernel.Op) error {
	addr, want := o.Key.(kernel.TaskRoute).Addr, o.Want
	if !addr.Is4() {
		return fmt.Errorf("address %s is not IPv4: %w", addr, kernel.ErrUnsupported)
	}
	table := tableOf(addr)
	rules, err := c.rules()
	if err != nil {
		return err
	}
	have, err := c.routes(int(table))
	if err != nil {
		return err
	}
	var missing []fromRule
	if want != nil {
		missing = append(missing, fromRule{addr, table})
		if want.(kernel.TaskRouteSpec).Last {
			missing = append(missing, fromRule{table: table})
		}
	}
	for _, r := range rules {
		if r.addr != addr && (r.addr.IsValid() || r.table != table) {
			continue
		}
		if i := slices.Index(missing, r); i >= 0 {
			missing = slices.Delete(missing, i, i+1)
			continue
		}
		if err := absentOK(c.do(c.ruleRequest(unix.RTM_DELRULE, 0, r))); err != nil {
			return fmt.Errorf("delete rule: %w", err)
		}
	}
	var routes []route
	if want != nil {
		spec := want.(kernel.TaskRouteSpec)
		d, err := c.deviceOf(netip.PrefixFrom(addr, spec.Subnet.Bits()))
		if err != nil {
			return err
		}
		if spec.Loose && !d.loose {
			if err := c.setLink(d.name, 0, []*nl.RtAttr{looseAttr()}); err != nil {
				return fmt.Errorf("set rp_filter of %s: %w", d.name, err)
			}
		}
		routes = []route{
			{index: d.index, table: int(table), typ: unix.RTN_UNICAST, prefix: spec.Subnet, src: addr},
			{index: d.index, table: int(table), typ: unix.RTN_UNICAST, prefix: netip.PrefixFrom(netip.IPv4Unspecified(), 0), via: spec.Gateway},
		}
	}
	for _, r := range have {
		if !hasRoute(routes, r) {
			if err := c.deleteRoute(r); err != nil {
				return fmt.Errorf("delete route to %s: %w", r.prefix, err)
			}
		}
	}
	for _, r := range routes {
		if err := c.do(c.routeRequest(unix.RTM_NEWROUTE, replace, r)); err != nil {
			return fmt.Errorf("route to %s: %w", r.prefix, err)
		}
	}
	for _, r := range missing {
		err := c.do(c.ruleRequest(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, r))
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("rule: %w", err)
		}
	}
	return nil
}

func hasRoute(all []route, r route) bool {
	return slices.Contains(all, r)
}

// outside is an address of nobody (TEST-NET-1, RFC 5737), for asking how the task
// reaches whoever is on no network of its own.
func outside() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, 1}) }

// defaultSource is the address that a socket which is bound to none answers an
// outsider from; own, if there is no way to one.
func (c *conn) defaultSource(own netip.Addr) (netip.Addr, error) {
	req := c.request(unix.RTM_GETROUTE, 0)
	msg := make([]byte, unix.SizeofRtMsg)
	msg[0], msg[rtmDstLen] = unix.AF_INET, bitsOfSource
	req.AddData(header(msg))
	req.AddData(nl.NewRtAttr(unix.RTA_DST, outside().AsSlice()))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWROUTE)
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		return own, nil // none, or one that says unreachable, prohibit or blackhole
	case err != nil:
		return own, fmt.Errorf("ask for the default route: %w", err)
	}
	src := own
	for _, m := range msgs {
		if len(m) < unix.SizeofRtMsg {
			continue
		}
		attrs(m[unix.SizeofRtMsg:], func(typ uint16, v []byte) {
			if typ == unix.RTA_PREFSRC {
				if a, ok := netip.AddrFromSlice(v); ok {
					src = a
				}
			}
		})
	}
	return src, nil
}

// giveDefaults fills in TaskMeshSpec.Default of ops on a task's tables.
func (k *Kernel) giveDefaults(fd int, sandbox string, ops []kernel.Op) error {
	for i, o := range ops {
		key, ok1 := o.Key.(kernel.TaskMesh)
		spec, ok2 := o.Want.(kernel.TaskMeshSpec)
		if !ok1 || !ok2 || !spec.UDP {
			continue
		}
		src, err := k.taskDefault(fd, sandbox, key.Addr)
		if err != nil {
			return err
		}
		spec.Default = src
		ops[i].Want = spec
	}
	return nil
}

// takeDefaults leaves TaskMeshSpec.Default out of what was found where it is right.
func (k *Kernel) takeDefaults(fd int, sandbox string, st kernel.State) error {
	for key, v := range st {
		mesh, ok := key.(kernel.TaskMesh)
		if !ok || !v.(kernel.TaskMeshSpec).UDP {
			continue
		}
		src, err := k.taskDefault(fd, sandbox, mesh.Addr)
		if err != nil {
			return err
		}
		if spec := v.(kernel.TaskMeshSpec); spec.Default == src {
			spec.Default = netip.Addr{}
			st[key] = spec
		}
	}
	return nil
}

// taskDefault asks for the default source in a task's namespace.
func (k *Kernel) taskDefault(fd int, sandbox string, own netip.Addr) (src netip.Addr, err error) {
	err = k.inside(fd, sandbox, func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		src, err = c.defaultSource(own)
		return err
	})
	if err != nil {
		err = fmt.Errorf("task %s: %w", sandbox, err)
	}
	return src, err
}
