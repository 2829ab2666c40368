package model

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// PortRange is a run of ports of a node, and those of the task which they lead
// to: Lo to To, Lo+1 to To+1, and so on.
type PortRange struct {
	Proto      Proto
	Lo, Hi, To uint16
}

// String is the form that ParsePublished reads.
func (r PortRange) String() string {
	s := span(r.Lo, r.Hi)
	if r.To != r.Lo {
		s += ":" + span(r.To, r.To+(r.Hi-r.Lo))
	}
	return s + "/" + string(r.Proto)
}

func span(lo, hi uint16) string {
	if lo == hi {
		return fmt.Sprint(lo)
	}
	return fmt.Sprintf("%d-%d", lo, hi)
}

// HostPort is a port of this host.
type HostPort struct {
	Proto Proto
	Addr  netip.Addr // of the host; invalid: all
	Port  uint16
}

// String is for people: 80/tcp, or 80/tcp of 192.0.2.1.
func (p HostPort) String() string {
	s := fmt.Sprintf("%d/%s", p.Port, p.Proto)
	if p.Addr.IsValid() {
		s += " of " + p.Addr.String()
	}
	return s
}

// HostRange is a run of ports of this host, both ends included.
type HostRange struct {
	Proto  Proto
	Addr   netip.Addr // of the host; invalid: all
	Lo, Hi uint16
}

// Compare orders ports by protocol, number and address.
func (p HostPort) Compare(o HostPort) int {
	return cmp.Or(cmp.Compare(p.Proto, o.Proto), cmp.Compare(p.Port, o.Port), p.Addr.Compare(o.Addr))
}

// Published are the ports of nodes at which a service answers, in the one text
// form that ParsePublished makes, so that equal sets are equal values. Empty is
// none.
type Published string

// MaxPublished bounds a list of published ranges, after neighbours were joined.
// What a node has for each grows with ranges, not with ports, and all nodes have
// the list in their gossip.
const MaxPublished = 32

// MaxHostPorts bounds the ports that a service publishes, counted for each address that
// they are bound to: all of one protocol. A node has a socket of some 3 KiB for each, and
// tries those of other nodes' addresses again and again.
const MaxHostPorts = 1 << 16

// Ports is how many ports of a node they are.
func (p Published) Ports() int {
	n := 0
	for _, r := range p.List() {
		n += int(r.Hi-r.Lo) + 1
	}
	return n
}

// ParsePublished reads a list like 81:80;443;8000-8010:9000-9010/udp: the port or
// range of the node, that of the task if it is another, and the protocol, tcp
// unless given. The result is sorted, and ranges that continue each other are one.
func ParsePublished(s string) (Published, error) {
	var all []PortRange
	for item := range strings.SplitSeq(strings.ToLower(s), ";") {
		r, err := parseRange(strings.TrimSpace(item))
		if err != nil {
			return "", err
		}
		all = append(all, r)
	}
	all, err := joinRanges(all)
	if err != nil {
		return "", err
	}
	if len(all) > MaxPublished {
		return "", fmt.Errorf("%d ranges that do not continue each other, and at most %d", len(all), MaxPublished)
	}
	texts := make([]string, len(all))
	for i, r := range all {
		texts[i] = r.String()
	}
	return Published(strings.Join(texts, ";")), nil
}

func parseRange(item string) (PortRange, error) {
	ports, proto, given := strings.Cut(item, "/")
	p := Proto(proto)
	if !given {
		p = TCP
	}
	if p.Number() == 0 {
		return PortRange{}, fmt.Errorf("%q: protocol %q is none of tcp, udp, sctp", item, proto)
	}
	from, to, remapped := strings.Cut(ports, ":")
	lo, hi, err := portRange(from)
	if err != nil {
		return PortRange{}, fmt.Errorf("%q: %w", item, err)
	}
	first, last := lo, hi
	if remapped {
		if first, last, err = portRange(to); err != nil {
			return PortRange{}, fmt.Errorf("%q: %w", item, err)
		}
	}
	if hi-lo != last-first {
		return PortRange{}, fmt.Errorf("%q: %d ports lead to %d", item, hi-lo+1, last-first+1)
	}
	return PortRange{Proto: p, Lo: uint16(lo), Hi: uint16(hi), To: uint16(first)}, nil
}

// joinRanges sorts ranges and makes one of those that overlap or continue each
// other. It refuses a port that leads to two.
func joinRanges(all []PortRange) ([]PortRange, error) {
	slices.SortFunc(all, func(a, b PortRange) int {
		return cmp.Or(cmp.Compare(a.Lo, b.Lo), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Hi, b.Hi), cmp.Compare(a.To, b.To))
	})
	last := make(map[Proto]int) // where the last range of each protocol is in out
	var out []PortRange
	for _, r := range all {
		i, ok := last[r.Proto]
		if ok {
			p := &out[i]
			same := int(r.To)-int(r.Lo) == int(p.To)-int(p.Lo)
			switch {
			case r.Lo <= p.Hi && !same:
				return nil, fmt.Errorf("port %d/%s leads to both %d and %d", r.Lo, r.Proto, p.To+(r.Lo-p.Lo), r.To)
			case same && int(r.Lo) <= int(p.Hi)+1:
				p.Hi = max(p.Hi, r.Hi)
				continue
			}
		}
		last[r.Proto] = len(out)
		out = append(out, r)
	}
	return out, nil
}

// List is the ranges one by one, nil for none. What ParsePublished has not made,
// such as a record of another node may hold, is as far as it can be read.
func (p Published) List() []PortRange {
	if p == "" {
		return nil
	}
	var out []PortRange
	for item := range strings.SplitSeq(string(p), ";") {
		if r, err := parseRange(item); err == nil {
			out = append(out, r)
		}
	}
	return out[:min(len(out), MaxPublished)]
}
