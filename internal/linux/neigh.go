package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// neigh is an entry of a neighbour or forwarding table.
type neigh struct {
	index  int
	state  uint16 // NUD_*
	flags  uint8  // NTF_*
	ip     netip.Addr
	mac    model.MAC
	master int // forwarding entries: the bridge it is in; 0: the device's own table
}

// sizeofNdmsg is struct ndmsg of linux/neighbour.h.
const sizeofNdmsg = 12

func parseNeigh(b []byte) (neigh, bool) {
	if len(b) < sizeofNdmsg {
		return neigh{}, false
	}
	n := neigh{
		index: int(int32(binary.NativeEndian.Uint32(b[4:]))),
		state: binary.NativeEndian.Uint16(b[8:]),
		flags: b[10],
	}
	attrs(b[sizeofNdmsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.NDA_DST:
			n.ip, _ = netip.AddrFromSlice(v)
		case unix.NDA_LLADDR:
			n.mac = toMAC(v)
		case unix.NDA_MASTER:
			n.master = int(u32(v))
		}
	})
	return n, true
}

// neighs dumps a family's table: AF_INET is ARP, AF_BRIDGE forwarding entries.
func (c *conn) neighs(family uint8) ([]neigh, error) {
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETNEIGH, 0)
		msg := make([]byte, sizeofNdmsg)
		msg[0] = family
		req.AddData(header(msg))
		return req
	}
	ns, err := dump(c, build, unix.RTM_NEWNEIGH, parseNeigh)
	if err != nil {
		return nil, fmt.Errorf("list neighbours of family %d: %w", family, err)
	}
	return ns, nil
}

// neighRequest is a message about one entry.
func (c *conn) neighRequest(typ, flags int, family uint8, n neigh) *nl.NetlinkRequest {
	req := c.request(typ, flags)
	msg := make([]byte, sizeofNdmsg)
	msg[0] = family
	binary.NativeEndian.PutUint32(msg[4:], uint32(n.index))
	binary.NativeEndian.PutUint16(msg[8:], n.state)
	msg[10] = n.flags
	req.AddData(header(msg))
	if n.ip.IsValid() {
		req.AddData(nl.NewRtAttr(unix.NDA_DST, n.ip.AsSlice()))
	}
	if family == unix.AF_BRIDGE || !n.mac.IsZero() {
		req.AddData(nl.NewRtAttr(unix.NDA_LLADDR, n.mac[:]))
	}
	return req
}

const replace = unix.NLM_F_CREATE | unix.NLM_F_REPLACE

func (s *space) applyNeigh(k kernel.Neigh, want kernel.Value) error {
	if !k.IP.Is4() {
		return fmt.Errorf("neighbour %s: only IPv4 is supported", k.IP)
	}
	d, err := s.device(k.Dev)
	if want == nil && errors.Is(err, kernel.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if want == nil {
		return absentOK(s.conn.do(s.conn.neighRequest(unix.RTM_DELNEIGH, 0, unix.AF_INET, neigh{index: d.index, ip: k.IP})))
	}
	return s.conn.do(s.conn.neighRequest(unix.RTM_NEWNEIGH, replace, unix.AF_INET, neigh{
		index: d.index, state: unix.NUD_PERMANENT, ip: k.IP, mac: want.(kernel.NeighSpec).MAC,
	}))
}

// applyFDB sets or deletes both halves of an entry. They are set by one message:
// SELF is the VXLAN device's table, MASTER the bridge's; NOARP keeps either from
// ageing and is what the bridge calls static. (PERMANENT would tell the bridge
// that the MAC is its own.)
func (s *space) applyFDB(k kernel.FDB, want kernel.Value) error {
	d, err := s.device(k.Dev)
	if want == nil && errors.Is(err, kernel.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if want == nil {
		if d.kind == "veth" {
			return absentOK(s.conn.do(s.conn.neighRequest(unix.RTM_DELNEIGH, 0, unix.AF_BRIDGE, neigh{index: d.index, flags: unix.NTF_MASTER, mac: k.MAC})))
		}
		// One at a time: the kernel stops at the first half it does not find.
		self := s.conn.do(s.conn.neighRequest(unix.RTM_DELNEIGH, 0, unix.AF_BRIDGE, neigh{index: d.index, flags: unix.NTF_SELF, mac: k.MAC}))
		var master error
		if d.master != 0 && !k.MAC.IsZero() { // the zero MAC is a VXLAN idea; bridges have none
			master = s.conn.do(s.conn.neighRequest(unix.RTM_DELNEIGH, 0, unix.AF_BRIDGE, neigh{index: d.index, flags: unix.NTF_MASTER, mac: k.MAC}))
		}
		return errors.Join(absentOK(self), absentOK(master))
	}
	if d.master == 0 {
		return fmt.Errorf("bridge of %s %w", k.Dev, kernel.ErrNotExist)
	}
	n := neigh{
		index: d.index, state: unix.NUD_NOARP | unix.NUD_REACHABLE, flags: unix.NTF_SELF | unix.NTF_MASTER,
		mac: k.MAC, ip: want.(kernel.FDBSpec).VTEP,
	}
	if d.kind == "veth" {
		if n.ip.IsValid() {
			return fmt.Errorf("a VTEP is given for %s, which is no VXLAN device", k.Dev)
		}
		n.flags = unix.NTF_MASTER // it has no table of its own for frames that go out
	}
	return s.conn.do(s.conn.neighRequest(unix.RTM_NEWNEIGH, replace, unix.AF_BRIDGE, n))
}

// absentOK turns the errors of deleting what is not there into success.
func absentOK(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EADDRNOTAVAIL) {
		return nil
	}
	return err
}

// address is an IP address on a device.
type address struct {
	index  int
	prefix netip.Prefix
}

func parseAddr(b []byte) (address, bool) {
	if len(b) < unix.SizeofIfAddrmsg {
		return address{}, false
	}
	a := address{index: int(binary.NativeEndian.Uint32(b[4:]))}
	var ip netip.Addr
	attrs(b[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) {
		// LOCAL is ours; ADDRESS differs from it on point-to-point links, and
		// is the only one there is in IPv6.
		if typ == unix.IFA_LOCAL || typ == unix.IFA_ADDRESS && !ip.IsValid() {
			ip, _ = netip.AddrFromSlice(v)
		}
	})
	a.prefix = netip.PrefixFrom(ip, int(b[1]))
	return a, ip.IsValid()
}

// addrs dumps the IPv4 addresses of the namespace.
func (c *conn) addrs() ([]address, error) {
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETADDR, 0)
		req.AddData(nl.NewIfAddrmsg(unix.AF_INET))
		return req
	}
	as, err := dump(c, build, unix.RTM_NEWADDR, parseAddr)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	return as, nil
}

func (s *space) applyAddr(k kernel.Addr, want kernel.Value) error {
	if !k.Prefix.Addr().Is4() {
		return fmt.Errorf("address %s: only IPv4 is supported", k.Prefix)
	}
	d, err := s.device(k.Dev)
	if want == nil && errors.Is(err, kernel.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	typ, flags := unix.RTM_NEWADDR, replace
	if want == nil {
		typ, flags = unix.RTM_DELADDR, 0
	}
	req := s.conn.request(typ, flags)
	msg := nl.NewIfAddrmsg(unix.AF_INET)
	msg.Index = uint32(d.index)
	msg.Prefixlen = uint8(k.Prefix.Bits())
	req.AddData(msg)
	ip := k.Prefix.Addr().AsSlice()
	req.AddData(nl.NewRtAttr(unix.IFA_LOCAL, ip))
	req.AddData(nl.NewRtAttr(unix.IFA_ADDRESS, ip))
	err = s.conn.do(req)
	if want == nil {
		return absentOK(err)
	}
	return err
}
