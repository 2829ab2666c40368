package model

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// MaxLabel bounds a condition on a label in bytes: 64 of them have to fit into a record
// of gossip, which takes 32 KiB. What people write has some dozen.
const MaxLabel = 255

// MaxFilters bounds the lists of addresses, prefixes and labels of a published
// service: they are in the gossip of all nodes, and long ones belong in a firewall.
const MaxFilters = 64

// Addrs is a set of IPv4 addresses of nodes, in the one text form that ParseAddrs
// makes, so that equal sets are equal values. Empty is all addresses.
type Addrs string

// ParseAddrs reads a list like 192.0.2.1;198.51.100.1. 0.0.0.0 is all addresses.
func ParseAddrs(s string) (Addrs, error) {
	var all []netip.Addr
	var any bool
	for item := range strings.SplitSeq(s, ";") {
		item = strings.TrimSpace(item)
		a, err := netip.ParseAddr(item)
		switch {
		case err != nil || !a.Is4():
			return "", fmt.Errorf("%q is no IPv4 address", item)
		case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
			return "", fmt.Errorf("%s is no address of a node", item)
		}
		any = any || a.IsUnspecified()
		all = append(all, a)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	all = slices.Compact(all)
	if len(all) > MaxFilters {
		return "", fmt.Errorf("%d addresses, and at most %d", len(all), MaxFilters)
	}
	if any {
		return "", nil
	}
	return Addrs(joined(all)), nil
}

// List is the addresses one by one, nil for all.
func (as Addrs) List() []netip.Addr {
	return listed(string(as), func(s string) (netip.Addr, bool) {
		a, err := netip.ParseAddr(s)
		return a, err == nil && a.Is4()
	})
}

// Prefixes is a set of IPv4 addresses of clients, in the one text form that
// ParsePrefixes makes, so that equal sets are equal values. Empty is all.
type Prefixes string

// ParsePrefixes reads a list like 10.0.0.0/8;192.0.2.7. The result has no prefix
// twice, none within another, and one for two that are its halves.
func ParsePrefixes(s string) (Prefixes, error) {
	var all []netip.Prefix
	for item := range strings.SplitSeq(s, ";") {
		p, err := parsePrefix(strings.TrimSpace(item))
		if err != nil {
			return "", err
		}
		all = append(all, p)
	}
	all = joinPrefixes(all)
	if len(all) > MaxFilters {
		return "", fmt.Errorf("%d prefixes, and at most %d", len(all), MaxFilters)
	}
	if all[0].Bits() == 0 {
		return "", nil
	}
	return Prefixes(joined(all)), nil
}

func parsePrefix(item string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(item); err == nil && a.Is4() {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(item)
	if err != nil || !p.Addr().Is4() {
		return netip.Prefix{}, fmt.Errorf("%q is no IPv4 prefix", item)
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s is an address in a prefix, which is %s", item, p.Masked())
	}
	return p, nil
}

// joinPrefixes sorts prefixes and makes them as few as they can be.
func joinPrefixes(all []netip.Prefix) []netip.Prefix {
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var out []netip.Prefix
	for _, p := range all {
		if n := len(out); n > 0 && out[n-1].Overlaps(p) {
			continue // the wider one comes first
		}
		out = append(out, p)
		// What has become whole may be the other half of what stands before it.
		for n := len(out); n > 1; n = len(out) {
			a, b := out[n-2], out[n-1]
			whole := netip.PrefixFrom(a.Addr(), a.Bits()-1)
			if a.Bits() != b.Bits() || whole != whole.Masked() || !whole.Contains(b.Addr()) {
				break
			}
			out = append(out[:n-2], whole)
		}
	}
	return out
}

// List is the prefixes one by one, nil for all.
func (ps Prefixes) List() []netip.Prefix {
	return listed(string(ps), func(s string) (netip.Prefix, bool) {
		p, err := parsePrefix(s)
		return p, err == nil
	})
}

// Labels says which nodes, by the labels that the swarm has given them, in the
// one text form that ParseLabels makes. Empty is all nodes.
type Labels string

// label is one condition.
type label struct {
	key, value string
	not        bool
}

func (l label) String() string {
	if l.not {
		return l.key + "!=" + l.value
	}
	return l.key + "=" + l.value
}

// ParseLabels reads a list like zone=a;disk!=slow, all of which must hold. As in
// constraints of a service, == is =, node.labels. may come first, and a label
// that a node does not have is empty. Case does not matter: the docker command
// lower-cases what it reads of this.
func ParseLabels(s string) (Labels, error) {
	var all []label
	equal := make(map[string]string)
	for item := range strings.SplitSeq(s, ";") {
		l, err := parseLabel(item)
		if err != nil {
			return "", err
		}
		if had, ok := equal[l.key]; ok && !l.not && had != l.value {
			return "", fmt.Errorf("%q is to be both %q and %q", l.key, had, l.value)
		}
		if !l.not {
			equal[l.key] = l.value
		}
		all = append(all, l)
	}
	for _, l := range all {
		if v, ok := equal[l.key]; ok && l.not && v == l.value {
			return "", fmt.Errorf("%q is to be %q and not to be", l.key, v)
		}
	}
	slices.SortFunc(all, func(a, b label) int { return strings.Compare(a.String(), b.String()) })
	all = slices.Compact(all)
	if len(all) > MaxFilters {
		return "", fmt.Errorf("%d labels, and at most %d", len(all), MaxFilters)
	}
	return Labels(joined(all)), nil
}

func parseLabel(item string) (label, error) {
	key, value, ok := strings.Cut(strings.ToLower(item), "=")
	if !ok {
		return label{}, fmt.Errorf("%q is neither key=value nor key!=value", strings.TrimSpace(item))
	}
	key, not := strings.CutSuffix(key, "!")
	if !not {
		value = strings.TrimPrefix(value, "=")
	}
	key, value = strings.TrimSpace(key), strings.TrimSpace(value)
	key = strings.TrimPrefix(key, "node.labels.")
	switch {
	case key == "":
		return label{}, fmt.Errorf("%q names no label", strings.TrimSpace(item))
	case strings.HasPrefix(key, "node.") || strings.HasPrefix(key, "engine.labels."):
		return label{}, fmt.Errorf("%q is no label of a node", key)
	case strings.ContainsAny(key+value, "=!"):
		return label{}, fmt.Errorf("%q has more than one = or !=", strings.TrimSpace(item))
	case len(key)+len(value)+len("!=") > MaxLabel:
		return label{}, fmt.Errorf("%.32q… is longer than %d bytes", strings.TrimSpace(item), MaxLabel)
	}
	return label{key, value, not}, nil
}

// Match reports whether a node with these labels is meant. What cannot be read
// means no node: better a port that is not open than one that should not be.
func (ls Labels) Match(labels map[string]string) bool {
	if ls == "" {
		return true
	}
	for item := range strings.SplitSeq(string(ls), ";") {
		l, err := parseLabel(item)
		if err != nil || (fold(labels, l.key) == l.value) == l.not {
			return false
		}
	}
	return true
}

// Keys are the labels that are asked for, sorted, each once.
func (ls Labels) Keys() []string {
	keys := listed(string(ls), func(s string) (string, bool) {
		l, err := parseLabel(s)
		return l.key, err == nil
	})
	slices.Sort(keys)
	return slices.Compact(keys)
}

// fold is a label's value without case. Of several keys that differ in case only,
// the smallest that there is counts, so that all nodes take the same.
func fold(labels map[string]string, key string) string {
	if v, ok := labels[key]; ok {
		return strings.ToLower(v)
	}
	var as string
	for k := range labels {
		if strings.EqualFold(k, key) && (as == "" || k < as) {
			as = k
		}
	}
	return strings.ToLower(labels[as])
}

// Source says as whose a task sees a connection from outside.
type Source string

// The sources. The client's own is empty, so that it is not in records.
const (
	Keep       Source = ""
	Masquerade Source = "masquerade"
)

// joined is the text of a list.
func joined[T fmt.Stringer](all []T) string {
	texts := make([]string, len(all))
	for i, v := range all {
		texts[i] = v.String()
	}
	return strings.Join(texts, ";")
}

// listed is what can be read of a list.
func listed[T any](text string, read func(string) (T, bool)) []T {
	if text == "" {
		return nil
	}
	var out []T
	for item := range strings.SplitSeq(text, ";") {
		if v, ok := read(item); ok {
			out = append(out, v)
		}
	}
	return out[:min(len(out), MaxFilters)]
}
