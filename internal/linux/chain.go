package linux

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"sluice/internal/kernel"
)

// The rules of the filter, as text. This file only reads and computes; filter.go
// runs iptables.
//
//	INPUT          -p udp --dport 4799 -j SLUICE-VXLAN
//	SLUICE-VXLAN   -s 192.0.2.2/32 -j ACCEPT      one for each peer
//	               -j DROP                        last

const (
	filterTable = "filter"
	filterChain = "SLUICE-VXLAN"
	inputChain  = "INPUT"
)

// chainRules is what `iptables -S` says of our chain and of INPUT.
type chainRules struct {
	exists bool     // the chain
	rules  []string // of the chain, without "-A SLUICE-VXLAN "
	jumps  []string // rules of INPUT that lead to it, without "-A INPUT "
}

// ownRules keeps of a listing the rules of chain, without their "-A chain ".
func ownRules(lines []string, chain string) []string {
	var out []string
	for _, l := range lines {
		if r, ok := strings.CutPrefix(l, "-A "+chain+" "); ok {
			out = append(out, r)
		}
	}
	return out
}

// jumpsOf keeps the rules that lead to our chain, by jump or by goto.
func jumpsOf(rules []string) []string {
	var out []string
	for _, r := range rules {
		f := strings.Fields(r)
		if n := len(f); n >= 2 && f[n-1] == filterChain && (f[n-2] == "-j" || f[n-2] == "-g") {
			out = append(out, r)
		}
	}
	return out
}

func jumpRule(port uint16) string {
	return fmt.Sprintf("-p udp -m udp --dport %d -j %s", port, filterChain)
}

func acceptRule(vtep netip.Addr) string { return "-s " + vtep.String() + "/32 -j ACCEPT" }

const dropRule = "-j DROP"

// parseAccept reads what acceptRule writes.
func parseAccept(rule string) (netip.Addr, bool) {
	s, ok := strings.CutPrefix(rule, "-s ")
	if !ok {
		return netip.Addr{}, false
	}
	s, ok = strings.CutSuffix(s, "/32 -j ACCEPT")
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(s)
	return a, err == nil && a.Is4() && acceptRule(a) == rule
}

// parseJump reads what jumpRule writes.
func parseJump(rule string) (uint16, bool) {
	s, ok := strings.CutPrefix(rule, "-p udp -m udp --dport ")
	if !ok {
		return 0, false
	}
	s, ok = strings.CutSuffix(s, " -j "+filterChain)
	if !ok {
		return 0, false
	}
	p, err := strconv.ParseUint(s, 10, 16)
	return uint16(p), err == nil && jumpRule(uint16(p)) == rule
}

// state is the rules as objects. Anything that is not exactly as we make it
// gives the filter port 0, which no plan wants: it is then repaired or, if
// unwanted, deleted.
func (c chainRules) state() kernel.State {
	out := kernel.State{}
	if !c.exists && len(c.jumps) == 0 {
		return out
	}
	want := map[netip.Addr]bool{}
	for _, r := range c.rules {
		if a, ok := parseAccept(r); ok {
			out[kernel.FilterPeer{VTEP: a}] = kernel.FilterPeerSpec{}
			want[a] = true
		}
	}
	port := uint16(0)
	if fix := c.plan(want); len(c.jumps) == 1 && fix.clean() {
		port, _ = parseJump(c.jumps[0])
	}
	out[kernel.Filter{}] = kernel.FilterSpec{Port: port}
	return out
}

// repair is what leads from the rules there to one ACCEPT for each wanted peer
// and DROP at the end. Done in the order of its fields, no wanted peer is shut
// out at any moment that it was not before.
type repair struct {
	insert []netip.Addr // at the top
	drop   bool         // append DROP
	remove []int        // positions from 1, counted before the insertions, the highest first
}

func (r repair) clean() bool { return len(r.insert) == 0 && !r.drop && len(r.remove) == 0 }

// plan computes the repair of the chain for these peers.
func (c chainRules) plan(peers map[netip.Addr]bool) repair {
	var out repair
	kept := map[netip.Addr]bool{}
	last, blocked := len(c.rules)-1, false
	for i, r := range c.rules {
		a, isAccept := parseAccept(r)
		switch {
		case isAccept && peers[a] && !kept[a] && !blocked:
			kept[a] = true
			continue
		case r == dropRule && i == last:
			continue
		case !isAccept:
			blocked = true // what follows may never be reached
		}
		out.remove = append([]int{i + 1}, out.remove...)
	}
	out.drop = last < 0 || c.rules[last] != dropRule
	for a := range peers {
		if !kept[a] {
			out.insert = append(out.insert, a)
		}
	}
	return out
}
