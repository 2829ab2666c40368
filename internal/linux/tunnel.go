package linux

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// A tunnel takes the packets out that IPVS has put into another (RFC 2003):
//
//	eth0 ─▶ IPIP to the task's address ─▶ slt0aff0003 ─▶ prerouting: VIP → own address ─▶ the task
//	eth0 ◀──────────────────────────────────────────────────────────── its answer, as it is
//
// It only receives, from whoever reaches the task, and takes out whatever is in a
// packet: the task's table (kernel.TaskTable) drops what is not for a VIP. What it
// would send with does not matter, but for what keeps the kernel from refusing it:
// TTL as the inner packet's, no path MTU discovery.
//
// Two things make the kernel take the inner packet, whose source is a client that
// is reached by eth0, not by the tunnel (__fib_validate_source in
// net/ipv4/fib_frontend.c):
//
//   - rp_filter of the device is 2, loose. The kernel takes the larger of the
//     device's and that of all, which may be 1, strict.
//   - The device has an address, as without one any rp_filter but 0 drops what does
//     not come the way that an answer would go. It is the task's own once more, of
//     scope host: nothing is routed by it, no source address is chosen for it, and a
//     program that lists its addresses finds none that it did not have.

const (
	kindIPIP = "ipip"

	// Of include/uapi/linux: if_link.h, ip.h.
	inetConf         = 1 // IFLA_INET_CONF
	devconfRPFilter  = 8 // IPV4_DEVCONF_RP_FILTER, counted from 1
	rpFilterLoose    = 2
	sizeofDevconfOne = 4
)

// tunnelName is the prefix and the address in hexadecimal: 11 of the 15 characters
// that a name may have.
func tunnelName(addr netip.Addr) string {
	return fmt.Sprintf("%s%x", kernel.TaskTunnelPrefix, addr.AsSlice())
}

func tunnelAlias(addr netip.Addr) string { return aliasPrefix + "tunnel to " + addr.String() }

func parseIPIP(d *device, data []byte) {
	attrs(data, func(typ uint16, v []byte) {
		switch typ {
		case nl.IFLA_IPTUN_LOCAL:
			d.local, _ = netip.AddrFromSlice(v)
		case nl.IFLA_IPTUN_REMOTE:
			d.remote, _ = netip.AddrFromSlice(v)
		}
	})
}

// isLoose reads rp_filter from the part of a link's message that is of address
// families: all IPv4 settings of the device, in an array.
func isLoose(spec []byte) (loose bool) {
	attrs(spec, func(typ uint16, v []byte) {
		if typ != unix.AF_INET {
			return
		}
		attrs(v, func(typ uint16, v []byte) {
			if at := (devconfRPFilter - 1) * sizeofDevconfOne; typ == inetConf && len(v) >= at {
				loose = u32(v[at:]) == rpFilterLoose
			}
		})
	})
	return loose
}

// looseAttr is the part of a message that sets rp_filter to loose.
func looseAttr() *nl.RtAttr {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(inetConf, nil).AddRtAttr(devconfRPFilter, nl.Uint32Attr(rpFilterLoose))
	return spec
}

// anybody reports whether a tunnel takes packets from every sender.
func (d device) anybody() bool { return !d.remote.IsValid() || d.remote.IsUnspecified() }

// tunnels lists the addresses that tunnels of ours take packets to: those that are
// up and lack nothing.
func (c *conn) tunnels() ([]netip.Addr, error) {
	ls, err := c.links(kindIPIP)
	if err != nil {
		return nil, err
	}
	good := map[int]netip.Addr{}
	for _, d := range ls {
		if d.kind == kindIPIP && d.local.Is4() && d.name == tunnelName(d.local) && d.ours() && d.anybody() && d.up && d.loose {
			good[d.index] = d.local
		}
	}
	if len(good) == 0 {
		return nil, nil
	}
	as, err := c.addrs()
	if err != nil {
		return nil, err
	}
	whole := map[netip.Addr]bool{}
	for _, a := range as {
		if local, ok := good[a.index]; ok && a.prefix == netip.PrefixFrom(local, 32) {
			whole[local] = true
		}
	}
	return slices.Collect(maps.Keys(whole)), nil
}

// dumpDevices adds the tunnels and routes of a task's namespace that are whole. One
// that is not is no object: it is made anew if it is wanted; if not, it is left, as it
// does nothing, and goes with the task.
func (k *Kernel) dumpDevices(fd int, sandbox string, out kernel.State) error {
	var there []netip.Addr
	var routes map[netip.Addr]kernel.TaskRouteSpec
	err := k.inside(fd, sandbox, func() error {
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.close()
		if there, err = c.tunnels(); err != nil {
			return err
		}
		routes, err = c.taskRoutes()
		return err
	})
	if err != nil {
		return fmt.Errorf("task %s: %w", sandbox, err)
	}
	for _, addr := range there {
		out[kernel.TaskTunnel{Sandbox: sandbox, Addr: addr}] = kernel.TaskTunnelSpec{}
	}
	for addr, spec := range routes {
		out[kernel.TaskRoute{Sandbox: sandbox, Addr: addr}] = spec
	}
	return nil
}

// applyTunnel makes the tunnel of a task, or deletes it.
func (k *Kernel) applyTunnel(c *conn, o kernel.Op) error {
	addr := o.Key.(kernel.TaskTunnel).Addr
	if o.Want == nil {
		return c.deleteTunnel(addr)
	}
	return k.makeTunnel(c, addr)
}

// makeTunnel makes the tunnel to addr, or mends the one that is there.
func (k *Kernel) makeTunnel(c *conn, addr netip.Addr) error {
	if !addr.Is4() {
		return fmt.Errorf("address %s is not IPv4: %w", addr, kernel.ErrUnsupported)
	}
	name, local := tunnelName(addr), addr.As4()
	d, err := c.link(name)
	missing := errors.Is(err, kernel.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	// One without alias, but with our name and kind, is what an earlier attempt left.
	if !missing && !d.ours() && (d.kind != kindIPIP || d.alias != "") {
		return fmt.Errorf("the name %s %w by a %s device that is not sluice's; delete it", name, kernel.ErrTaken, d.kind)
	}
	if !missing && (d.kind != kindIPIP || d.local != addr || !d.anybody()) {
		k.log.Info("make device anew", "op", name, "reason", fmt.Sprintf("kind %s, local %s, remote %s", d.kind, d.local, d.remote))
		if err := c.delLink(d.index); err != nil {
			return err
		}
		missing = true
	}
	if missing {
		err := c.newLink(name, 0, []*nl.RtAttr{kindAttr(kindIPIP, func(data *nl.RtAttr) {
			data.AddRtAttr(nl.IFLA_IPTUN_LOCAL, local[:])
			data.AddRtAttr(nl.IFLA_IPTUN_TTL, []byte{0})
			data.AddRtAttr(nl.IFLA_IPTUN_PMTUDISC, []byte{0})
		})})
		switch {
		case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT):
			return fmt.Errorf("a device of kind %s %w; load its module (modprobe ipip): %w", kindIPIP, kernel.ErrUnsupported, err)
		case errors.Is(err, unix.EEXIST):
			return fmt.Errorf("packets in packets to %s %w by another tunnel in the task's namespace; delete it: %w", addr, kernel.ErrTaken, err)
		case err != nil:
			return fmt.Errorf("make %s: %w", name, err)
		}
	}
	err = c.setLink(name, unix.IFF_UP, []*nl.RtAttr{nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(tunnelAlias(addr))), looseAttr()})
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	if d, err = c.link(name); err != nil {
		return err
	}
	req := c.request(unix.RTM_NEWADDR, replace)
	msg := nl.NewIfAddrmsg(unix.AF_INET)
	msg.Index, msg.Prefixlen, msg.Scope = uint32(d.index), 32, unix.RT_SCOPE_HOST
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, local[:]))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, local[:]))
	if err := c.do(req); err != nil {
		return fmt.Errorf("give %s its address: %w", name, err)
	}
	return nil
}

// deleteTunnel deletes the tunnel to addr, if it is there and ours.
func (c *conn) deleteTunnel(addr netip.Addr) error {
	d, err := c.link(tunnelName(addr))
	if errors.Is(err, kernel.ErrNotExist) {
		return nil
	}
	if err != nil || !d.ours() {
		return err
	}
	return c.delLink(d.index)
}
