package model

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Proto is a transport protocol that has ports, by its name in lower case.
type Proto string

// The protocols.
const (
	TCP  Proto = "tcp"
	UDP  Proto = "udp"
	SCTP Proto = "sctp"
)

// Number is the protocol's number in an IP header (IANA); 0 if it is none of ours.
func (p Proto) Number() byte {
	switch p {
	case TCP:
		return 6
	case UDP:
		return 17
	case SCTP:
		return 132
	}
	return 0
}

// PortMap is a port of a virtual IP, and that of the task which it leads to.
type PortMap struct {
	Proto    Proto
	From, To uint16
}

// String is the form that ParsePorts reads.
func (m PortMap) String() string {
	if m.From == m.To {
		return fmt.Sprintf("%d/%s", m.From, m.Proto)
	}
	return fmt.Sprintf("%d:%d/%s", m.From, m.To, m.Proto)
}

// Ports are the ports that a virtual IP has, in the one text form that
// ParsePorts makes, so that equal lists are equal values. Empty is all ports.
type Ports string

// MaxPorts bounds a list of ports: each is a service of its own to ip_vs, with
// all backends, and once more for each of the node's own.
const MaxPorts = 32

// ParsePorts reads a list like 80;81:8080/tcp;5000-5003/udp: port or range, where
// it leads to if that is another, and the protocol, tcp unless given. A range
// leads to one of the same length. The result is sorted and free of repetition.
func ParsePorts(s string) (Ports, error) {
	var all []PortMap
	for item := range strings.SplitSeq(strings.ToLower(s), ";") {
		ms, err := parsePortItem(strings.TrimSpace(item))
		if err != nil {
			return "", err
		}
		if all = append(all, ms...); len(all) > MaxPorts {
			return "", fmt.Errorf("more than %d ports", MaxPorts)
		}
	}
	slices.SortFunc(all, func(a, b PortMap) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.To, b.To))
	})
	all = slices.Compact(all)
	texts := make([]string, len(all))
	for i, m := range all {
		if i > 0 && all[i-1].From == m.From && all[i-1].Proto == m.Proto {
			return "", fmt.Errorf("port %d/%s leads to both %d and %d", m.From, m.Proto, all[i-1].To, m.To)
		}
		texts[i] = m.String()
	}
	return Ports(strings.Join(texts, ";")), nil
}

func parsePortItem(item string) ([]PortMap, error) {
	ports, proto, given := strings.Cut(item, "/")
	p := Proto(proto)
	if !given {
		p = TCP
	}
	if p.Number() == 0 {
		return nil, fmt.Errorf("%q: protocol %q is none of tcp, udp, sctp", item, proto)
	}
	from, to, remapped := strings.Cut(ports, ":")
	lo, hi, err := portRange(from)
	if err != nil {
		return nil, fmt.Errorf("%q: %w", item, err)
	}
	first, last := lo, hi
	if remapped {
		if first, last, err = portRange(to); err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
	}
	if hi-lo != last-first {
		return nil, fmt.Errorf("%q: %d ports lead to %d", item, hi-lo+1, last-first+1)
	}
	if hi-lo >= MaxPorts {
		return nil, fmt.Errorf("%q: more than %d ports", item, MaxPorts)
	}
	out := make([]PortMap, 0, hi-lo+1)
	for i := range hi - lo + 1 {
		out = append(out, PortMap{Proto: p, From: uint16(lo + i), To: uint16(first + i)})
	}
	return out, nil
}

// portRange reads 80 or 80-89.
func portRange(s string) (lo, hi int, err error) {
	a, b, ranged := strings.Cut(s, "-")
	if lo, err = port(a); err != nil {
		return 0, 0, err
	}
	hi = lo
	if ranged {
		if hi, err = port(b); err != nil {
			return 0, 0, err
		}
	}
	if hi < lo {
		return 0, 0, fmt.Errorf("range %s ends before it begins", s)
	}
	return lo, hi, nil
}

func port(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no port", s)
	}
	return int(n), nil
}

// List is the ports one by one, nil for all. What ParsePorts has not made, such
// as a record of another node may hold, is as far as it can be read.
func (p Ports) List() []PortMap {
	if p == "" {
		return nil
	}
	var out []PortMap
	for item := range strings.SplitSeq(string(p), ";") {
		if ms, err := parsePortItem(item); err == nil {
			out = append(out, ms...)
		}
	}
	return out[:min(len(out), MaxPorts)]
}
