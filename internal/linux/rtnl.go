package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Messages are built here rather than with netlink.LinkAdd and its kin for three
// reasons: a veth pair is born in both namespaces, with its master, by one
// message (1 ms instead of 20: a move between namespaces waits for RCU); the
// flags of a bridge port change together; and a dump skips the statistics and
// reads the port flags that the library's parser leaves out.

const (
	// rtnlTimeout bounds the wait for one answer. The kernel's rtnl lock is held
	// for tens of milliseconds by namespace clean-ups; seconds mean a stuck kernel.
	rtnlTimeout = 10 * time.Second
	// dumpTries is how often a dump that raced with a change is repeated.
	dumpTries = 4

	// From include/uapi/linux: if_link.h, rtnetlink.h, net_namespace.h.
	extSkipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	netnsaNSID   = 1      // NETNSA_NSID
	netnsaFD     = 3      // NETNSA_FD
	// A bit of struct br_boolopt_multi, which is the values and which of them count
	// (if_bridge.h; Linux 5.0).
	brNoLLLearn = 1 << 0 // BR_BOOLOPT_NO_LL_LEARN
)

// conn is a route netlink socket of one namespace. The library locks it per request.
type conn struct {
	sockets map[int]*nl.SocketHandle
}

// dial opens a socket in the calling thread's namespace.
func dial() (*conn, error) {
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w%s", err, hint(err))
	}
	tv := unix.NsecToTimeval(rtnlTimeout.Nanoseconds())
	// The text of an extended acknowledgement says what errno cannot.
	if err := errors.Join(s.SetSendTimeout(&tv), s.SetReceiveTimeout(&tv), s.SetExtAck(true)); err != nil {
		s.Close()
		return nil, fmt.Errorf("set up netlink socket: %w", err)
	}
	return &conn{sockets: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}}, nil
}

func (c *conn) close() {
	for _, s := range c.sockets {
		s.Close()
	}
}

// header is the fixed part of a message, for types that the library has no name for.
type header []byte

func (h header) Len() int          { return len(h) }
func (h header) Serialize() []byte { return h }

// request starts a message of the given type.
func (c *conn) request(typ, flags int) *nl.NetlinkRequest {
	return &nl.NetlinkRequest{
		NlMsghdr: unix.NlMsghdr{
			Len:   unix.SizeofNlMsghdr,
			Type:  uint16(typ),
			Flags: unix.NLM_F_REQUEST | uint16(flags),
		},
		Sockets: c.sockets,
	}
}

// do sends a change and waits for its acknowledgement.
func (c *conn) do(req *nl.NetlinkRequest) error {
	req.Flags |= unix.NLM_F_ACK
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// dump collects what parse makes of each message of a dump. One that raced with
// a change is repeated; if it keeps racing the error is kernel.ErrInterrupted.
func dump[T any](c *conn, build func() *nl.NetlinkRequest, typ uint16, parse func([]byte) (T, bool)) ([]T, error) {
	for range dumpTries {
		var out []T
		req := build()
		req.Flags |= unix.NLM_F_DUMP
		err := req.ExecuteIter(unix.NETLINK_ROUTE, typ, func(m []byte) bool {
			if v, ok := parse(m); ok {
				out = append(out, v)
			}
			return true
		})
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue
		}
		return out, err
	}
	return nil, kernel.ErrInterrupted
}

// device is what we read of a link.
type device struct {
	index  int
	name   string
	alias  string
	kind   string
	mtu    int
	mac    model.MAC
	up     bool
	master int // index; 0: none
	peer   int // index of the other end in the namespace peerNS
	peerNS int // id of the namespace as seen from here; -1: the same one
	vni    model.VNI
	port   uint16
	local  netip.Addr
	remote netip.Addr // ipip: the only sender; unspecified: anybody
	loose  bool       // rp_filter is 2
	learn  bool       // VXLAN learns VTEPs from packets
	quiet  bool       // bridge port: neither learns nor floods, ARP is suppressed; bridge: see isDeaf
}

// attrs calls f for each route attribute in b. A malformed tail ends it.
func attrs(b []byte, f func(typ uint16, val []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		// The two top bits mark nested and network-order attributes.
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:n])
		n = (n + unix.RTA_ALIGNTO - 1) &^ (unix.RTA_ALIGNTO - 1)
		b = b[min(n, len(b)):]
	}
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

func flag(b []byte) bool { return len(b) > 0 && b[0] != 0 }

func toMAC(b []byte) (m model.MAC) {
	if len(b) == len(m) {
		copy(m[:], b)
	}
	return m
}

// parseLink reads an RTM_NEWLINK message.
func parseLink(b []byte) (device, bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return device{}, false
	}
	d := device{
		index:  int(int32(binary.NativeEndian.Uint32(b[4:]))),
		up:     binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP != 0,
		peerNS: -1,
	}
	var data, port []byte
	attrs(b[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			d.name = unix.ByteSliceToString(v)
		case unix.IFLA_IFALIAS:
			d.alias = unix.ByteSliceToString(v)
		case unix.IFLA_MTU:
			d.mtu = int(u32(v))
		case unix.IFLA_ADDRESS:
			d.mac = toMAC(v)
		case unix.IFLA_MASTER:
			d.master = int(u32(v))
		case unix.IFLA_LINK:
			d.peer = int(u32(v))
		case unix.IFLA_LINK_NETNSID:
			d.peerNS = int(int32(u32(v)))
		case unix.IFLA_AF_SPEC:
			d.loose = isLoose(v)
		case unix.IFLA_LINKINFO:
			attrs(v, func(typ uint16, v []byte) {
				switch typ {
				case nl.IFLA_INFO_KIND:
					d.kind = unix.ByteSliceToString(v)
				case nl.IFLA_INFO_DATA:
					data = v
				case nl.IFLA_INFO_SLAVE_DATA:
					port = v
				}
			})
		}
	})
	switch d.kind {
	case "vxlan":
		parseVXLAN(&d, data)
	case kindIPIP:
		parseIPIP(&d, data)
	}
	d.quiet = isQuiet(port) && !d.learn
	if d.kind == string(kernel.Bridge) {
		d.quiet = isDeaf(data)
	}
	return d, true
}

// isDeaf reports whether a bridge learns nothing from frames for bridges alone.
func isDeaf(data []byte) (deaf bool) {
	attrs(data, func(typ uint16, v []byte) {
		if typ == unix.IFLA_BR_MULTI_BOOLOPT {
			deaf = u32(v)&brNoLLLearn != 0
		}
	})
	return deaf
}

func parseVXLAN(d *device, data []byte) {
	attrs(data, func(typ uint16, v []byte) {
		switch typ {
		case nl.IFLA_VXLAN_ID:
			d.vni = model.VNI(u32(v))
		case nl.IFLA_VXLAN_PORT:
			if len(v) >= 2 {
				d.port = binary.BigEndian.Uint16(v)
			}
		case nl.IFLA_VXLAN_LOCAL, nl.IFLA_VXLAN_LOCAL6:
			d.local, _ = netip.AddrFromSlice(v)
		case nl.IFLA_VXLAN_LEARNING:
			d.learn = flag(v)
		}
	})
}

// quietPort is what Quiet means, flag by flag.
var quietPort = []struct {
	attr int
	on   bool
}{
	{nl.IFLA_BRPORT_LEARNING, false},
	{nl.IFLA_BRPORT_UNICAST_FLOOD, false},
	{nl.IFLA_BRPORT_MCAST_FLOOD, false},
	{nl.IFLA_BRPORT_BCAST_FLOOD, false},
	{nl.IFLA_BRPORT_NEIGH_SUPPRESS, true},
}

// isQuiet reads the slave data of a bridge port.
func isQuiet(port []byte) bool {
	right := 0
	attrs(port, func(typ uint16, v []byte) {
		for _, q := range quietPort {
			if int(typ) == q.attr && flag(v) == q.on {
				right++
			}
		}
	})
	return right == len(quietPort)
}

// links dumps the links of the namespace, or only those of one kind.
func (c *conn) links(kind string) ([]device, error) {
	build := func() *nl.NetlinkRequest {
		req := c.request(unix.RTM_GETLINK, 0)
		req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
		req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(extSkipStats)))
		if kind != "" {
			info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
			info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
			req.AddData(info)
		}
		return req
	}
	ls, err := dump(c, build, unix.RTM_NEWLINK, parseLink)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return ls, nil
}

// link returns one link by name; kernel.ErrNotExist if there is none.
func (c *conn) link(name string) (device, error) {
	req := c.request(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(extSkipStats)))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if errors.Is(err, unix.ENODEV) || err == nil && len(msgs) == 0 {
		return device{}, fmt.Errorf("device %s %w", name, kernel.ErrNotExist)
	}
	if err != nil {
		return device{}, fmt.Errorf("find device %s: %w", name, err)
	}
	d, ok := parseLink(msgs[0])
	if !ok {
		return device{}, fmt.Errorf("find device %s: the kernel's answer is too short", name)
	}
	return d, nil
}

// newLink makes a device. flags are IFF_* to set.
func (c *conn) newLink(name string, flags uint32, as []*nl.RtAttr) error {
	return c.do(c.linkRequest(name, unix.NLM_F_CREATE|unix.NLM_F_EXCL, flags, as))
}

// setLink changes the device called name.
func (c *conn) setLink(name string, flags uint32, as []*nl.RtAttr) error {
	err := c.do(c.linkRequest(name, 0, flags, as))
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("device %s %w", name, kernel.ErrNotExist)
	}
	return err
}

func (c *conn) linkRequest(name string, create int, flags uint32, as []*nl.RtAttr) *nl.NetlinkRequest {
	req := c.request(unix.RTM_NEWLINK, create)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Flags, msg.Change = flags, flags
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	for _, a := range as {
		req.AddData(a)
	}
	return req
}

// delLink deletes the device of that index; one that has gone is no error.
func (c *conn) delLink(index int) error {
	req := c.request(unix.RTM_DELLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	if err := c.do(req); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// nsid is the id that the namespace open at fd has as seen from c; -1 if none yet.
func (c *conn) nsid(fd int) (int, error) {
	req := c.request(unix.RTM_GETNSID, 0)
	req.AddData(header{unix.AF_UNSPEC, 0, 0, 0}) // struct rtgenmsg, padded
	req.AddData(nl.NewRtAttr(netnsaFD, nl.Uint32Attr(uint32(fd))))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNSID)
	if err != nil {
		return -1, fmt.Errorf("ask for a namespace's id: %w", err)
	}
	id := -1
	for _, m := range msgs {
		if len(m) < 4 {
			continue
		}
		attrs(m[4:], func(typ uint16, v []byte) {
			if typ == netnsaNSID {
				id = int(int32(u32(v)))
			}
		})
	}
	return id, nil
}
