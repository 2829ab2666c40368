package ipvs

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
)

// The library's numbers of 32 bits wrap, of bytes within seconds of a fast link,
// and it passes over the ones of 64 bits; so the counters are read here.

// Of include/uapi/linux/ip_vs.h.
const (
	cmdGetService = 4 // IPVS_CMD_GET_SERVICE
	cmdGetDest    = 8 // IPVS_CMD_GET_DEST

	cmdAttrService = 1 // IPVS_CMD_ATTR_SERVICE
	cmdAttrDest    = 2 // IPVS_CMD_ATTR_DEST

	svcAttrFamily  = 1  // IPVS_SVC_ATTR_AF
	svcAttrMark    = 5  // IPVS_SVC_ATTR_FWMARK
	svcAttrStats   = 10 // IPVS_SVC_ATTR_STATS
	svcAttrStats64 = 12 // IPVS_SVC_ATTR_STATS64, since Linux 4.1

	destAttrAddr     = 1  // IPVS_DEST_ATTR_ADDR
	destAttrPort     = 2  // IPVS_DEST_ATTR_PORT
	destAttrActive   = 7  // IPVS_DEST_ATTR_ACTIVE_CONNS
	destAttrInactive = 8  // IPVS_DEST_ATTR_INACT_CONNS
	destAttrStats    = 10 // IPVS_DEST_ATTR_STATS
	destAttrFamily   = 11 // IPVS_DEST_ATTR_ADDR_FAMILY, since Linux 3.18
	destAttrStats64  = 12 // IPVS_DEST_ATTR_STATS64, since Linux 4.1

	statsConns      = 1 // IPVS_STATS_ATTR_CONNS
	statsPacketsIn  = 2
	statsPacketsOut = 3
	statsBytesIn    = 4
	statsBytesOut   = 5
)

const (
	// sizeofGenlHeader is struct genlmsghdr of linux/genetlink.h.
	sizeofGenlHeader = 4
	// countTimeout bounds the wait for one message. Reading waits for no writer in
	// the kernel but IPVS's own lock, which is held for microseconds.
	countTimeout = 5 * time.Second
	// dumpTries is how often a list that raced with a change is read again.
	dumpTries = 4
)

// Traffic returns what IPVS has counted for the services and destinations that
// Dump reports, in the namespace that nsFD refers to, under the name ns. The
// kernel adds its CPUs' counters up every two seconds: they may be as old as that.
// The numbers of connections of a destination are of this moment.
//
// Any number of goroutines may call it, also while another one is in Apply.
//
// kernel.ErrUnsupported: there is no ip_vs.
// kernel.ErrInterrupted: lists changed all the while.
func (b *Balancer) Traffic(nsFD int, ns string) (map[kernel.Key]kernel.Traffic, error) {
	c, err := b.count(nsFD)
	if err != nil {
		return nil, fmt.Errorf("netns %s: %w", ns, err)
	}
	defer c.socket.Close()
	out := map[kernel.Key]kernel.Traffic{}
	services, err := list(c, cmdGetService, nil, parseServiceCount)
	if err != nil {
		return nil, fmt.Errorf("netns %s: ipvs: list services: %w", ns, err)
	}
	for _, s := range services {
		if s.mark == 0 || s.family != unix.AF_INET {
			continue
		}
		out[kernel.IPVSService{NS: ns, Mark: s.mark}] = s.Traffic
		which := nl.NewRtAttr(cmdAttrService, nil)
		which.AddRtAttr(svcAttrFamily, nl.Uint16Attr(unix.AF_INET))
		which.AddRtAttr(svcAttrMark, nl.Uint32Attr(s.mark))
		// A service that has gone meanwhile has no destinations.
		dests, err := list(c, cmdGetDest, which, parseDestCount)
		if err != nil {
			return nil, fmt.Errorf("netns %s: ipvs: list destinations of fwm %d: %w", ns, s.mark, err)
		}
		for _, d := range dests {
			if d.ip.Is4() {
				out[kernel.IPVSDest{NS: ns, Mark: s.mark, IP: d.ip, Port: d.port}] = d.Traffic
			}
		}
	}
	return out, nil
}

// counter is a generic netlink socket in a namespace.
type counter struct {
	family uint16 // IPVS's number
	socket *nl.NetlinkSocket
	conn   map[int]*nl.SocketHandle
}

// count opens a counter in the namespace that nsFD refers to.
func (b *Balancer) count(nsFD int) (*counter, error) {
	if nsFD <= 0 {
		// To the library, that is the namespace of this process: the host's.
		return nil, fmt.Errorf("ipvs: %d is no file descriptor of a network namespace", nsFD)
	}
	id, err := b.look()
	if err != nil {
		return nil, err
	}
	s, err := nl.GetNetlinkSocketAt(netns.NsHandle(nsFD), netns.None(), unix.NETLINK_GENERIC)
	if err != nil {
		return nil, fmt.Errorf("ipvs: open netlink socket: %w", err)
	}
	tv := unix.NsecToTimeval(countTimeout.Nanoseconds())
	if err := errors.Join(s.SetSendTimeout(&tv), s.SetReceiveTimeout(&tv)); err != nil {
		s.Close()
		return nil, fmt.Errorf("ipvs: set up netlink socket: %w", err)
	}
	return &counter{id, s, map[int]*nl.SocketHandle{unix.NETLINK_GENERIC: {Socket: s}}}, nil
}

// list collects what parse makes of each message of a dump. which names the
// service that is asked about; nil: none.
func list[T any](c *counter, cmd uint8, which *nl.RtAttr, parse func([]byte) (T, bool)) ([]T, error) {
	for range dumpTries {
		var out []T
		req := &nl.NetlinkRequest{
			NlMsghdr: unix.NlMsghdr{
				Len: unix.SizeofNlMsghdr, Type: c.family, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP,
			},
			Sockets: c.conn,
		}
		req.AddData(&nl.Genlmsg{Command: cmd, Version: 1})
		if which != nil {
			req.AddData(which)
		}
		err := req.ExecuteIter(unix.NETLINK_GENERIC, c.family, func(m []byte) bool {
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

// serviceCount is what is read of a service.
type serviceCount struct {
	family uint16
	mark   uint32
	kernel.Traffic
}

func parseServiceCount(m []byte) (s serviceCount, ok bool) {
	attrs(body(m), func(typ uint16, v []byte) {
		if typ != cmdAttrService {
			return
		}
		ok = true
		attrs(v, func(typ uint16, v []byte) {
			switch typ {
			case svcAttrFamily:
				s.family = uint16(number(v))
			case svcAttrMark:
				s.mark = uint32(number(v))
			case svcAttrStats, svcAttrStats64: // in this order
				parseStats(v, &s.Traffic)
			}
		})
	})
	return s, ok
}

// destCount is what is read of a destination.
type destCount struct {
	ip   netip.Addr
	port uint16
	kernel.Traffic
}

func parseDestCount(m []byte) (d destCount, ok bool) {
	attrs(body(m), func(typ uint16, v []byte) {
		if typ != cmdAttrDest {
			return
		}
		ok = true
		af := uint64(unix.AF_INET) // what it was before the kernel said so
		var addr []byte
		attrs(v, func(typ uint16, v []byte) {
			switch typ {
			case destAttrFamily:
				af = number(v)
			case destAttrAddr:
				addr = v // 16 octets, of which IPv4 has the first four
			case destAttrPort:
				if len(v) >= 2 {
					d.port = binary.BigEndian.Uint16(v)
				}
			case destAttrActive:
				d.Active = int(number(v))
			case destAttrInactive:
				d.Inactive = int(number(v))
			case destAttrStats, destAttrStats64: // in this order
				parseStats(v, &d.Traffic)
			}
		})
		if af == unix.AF_INET && len(addr) >= 4 {
			addr = addr[:4]
		}
		d.ip, _ = netip.AddrFromSlice(addr)
	})
	return d, ok
}

// parseStats reads the counters, of 32 or of 64 bits.
func parseStats(b []byte, t *kernel.Traffic) {
	attrs(b, func(typ uint16, v []byte) {
		switch typ {
		case statsConns:
			t.Connections = number(v)
		case statsPacketsIn:
			t.PacketsIn = number(v)
		case statsPacketsOut:
			t.PacketsOut = number(v)
		case statsBytesIn:
			t.BytesIn = number(v)
		case statsBytesOut:
			t.BytesOut = number(v)
		}
	})
}

// body is a message without its generic netlink header.
func body(m []byte) []byte { return m[min(sizeofGenlHeader, len(m)):] }

// number is an attribute in the machine's byte order, whatever its size; 0 if it has none.
func number(b []byte) uint64 {
	switch len(b) {
	case 2:
		return uint64(binary.NativeEndian.Uint16(b))
	case 4:
		return uint64(binary.NativeEndian.Uint32(b))
	case 8:
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

// attrs calls f for each attribute in b. A malformed tail ends it.
func attrs(b []byte, f func(typ uint16, val []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return
		}
		// The two top bits mark nested and network-order attributes.
		f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:n])
		n = (n + unix.NLA_ALIGNTO - 1) &^ (unix.NLA_ALIGNTO - 1)
		b = b[min(n, len(b)):]
	}
}
