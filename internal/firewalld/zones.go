package firewalld

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Port is one that other nodes send to.
type Port struct {
	Number uint16
	Proto  string // tcp or udp
}

// String is the port as firewall-cmd has it.
func (p Port) String() string { return strconv.Itoa(int(p.Number)) + "/" + p.Proto }

// Want is what should be open; the zero Want is nothing.
type Want struct {
	Ports  []Port
	Device string       // that has the node's address; empty: not known
	Peers  []netip.Addr // the other nodes
}

// zones is what firewalld says of its own.
type zones struct {
	standard string // what is nobody's is in it
	active   map[string]zone
}

// zone is one that has devices or sources.
type zone struct {
	devices []string
	sources []string // addresses, prefixes, MACs, ipset:NAME
}

// open lists the zones that packets of peers may come by, in order. The default zone
// is one only for a device that is known and in no zone: it may face the world.
func (z zones) open(want Want) []string {
	byDevice := ""
	if want.Device != "" {
		byDevice = z.standard
	}
	var out []string
	for name, a := range z.active {
		if slices.Contains(a.devices, want.Device) {
			byDevice = name
		}
		if slices.ContainsFunc(want.Peers, a.has) {
			out = append(out, name)
		}
	}
	if byDevice != "" {
		out = append(out, byDevice)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// has reports whether the address is among the zone's sources. Sets are not looked
// into: only firewalld knows their members, and many a set is of those to keep out.
func (z zone) has(a netip.Addr) bool {
	for _, s := range z.sources {
		if one, err := netip.ParseAddr(s); err == nil && one == a {
			return true
		}
		if p, err := netip.ParsePrefix(s); err == nil && p.Contains(a) {
			return true
		}
	}
	return false
}

// missing lists what of ports is not open by what a zone has, which firewalld gives
// as pairs of a port or a range of them and a protocol.
func missing(ports []Port, had [][]string) []Port {
	return slices.DeleteFunc(slices.Clone(ports), func(p Port) bool {
		return slices.ContainsFunc(had, func(h []string) bool {
			if len(h) != 2 || h[1] != p.Proto {
				return false
			}
			lo, hi, isRange := strings.Cut(h[0], "-")
			if !isRange {
				hi = lo
			}
			from, err1 := strconv.ParseUint(lo, 10, 16)
			to, err2 := strconv.ParseUint(hi, 10, 16)
			return err1 == nil && err2 == nil && from <= uint64(p.Number) && uint64(p.Number) <= to
		})
	})
}
