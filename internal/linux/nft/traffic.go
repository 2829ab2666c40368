package nft

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// Traffic returns what is counted of each VIP in table bridge sluice of a network's
// namespace: how many connections began, which is how often a backend was chosen.
// A change of a VIP keeps the number, but for what comes while it is made. nsFD
// refers to the namespace, ns is its name. There is no table: nothing is counted.
//
// kernel.ErrInterrupted: the rules of the namespace changed all the while.
func (Tables) Traffic(nsFD int, ns string) (map[kernel.Key]kernel.Traffic, error) {
	c, err := dial(nsFD)
	if err != nil {
		return nil, fmt.Errorf("netns %s: %w", ns, err)
	}
	defer c.nl.Close()
	counts, err := c.counts(bridgeFamily, tableName, "")
	if err != nil {
		return nil, fmt.Errorf("netns %s: %w", ns, err)
	}
	out := make(map[kernel.Key]kernel.Traffic, len(counts))
	for name, n := range counts {
		if vip, ok := pickedVIP(name); ok {
			out[kernel.VIP{NS: ns, IP: vip}] = kernel.Traffic{Connections: n}
		}
	}
	return out, nil
}

// Dropped returns how many frames the source guard of a network's namespace has
// dropped since its table was made. nsFD refers to the namespace, ns is its name.
// There is no table: none.
//
// kernel.ErrInterrupted: the rules of the namespace changed all the while.
func (Tables) Dropped(nsFD int, ns string) (uint64, error) {
	c, err := dial(nsFD)
	if err != nil {
		return 0, fmt.Errorf("netns %s: %w", ns, err)
	}
	defer c.nl.Close()
	counts, err := c.counts(bridgeFamily, guardTable, chainDoubts)
	if err != nil {
		return 0, fmt.Errorf("netns %s: %w", ns, err)
	}
	return counts[chainDoubts], nil
}

// counts returns the packets that the counters of a table's rules have seen, by
// chain; of one chain only, if it is named.
func (c client) counts(family nftables.TableFamily, table, chain string) (map[string]uint64, error) {
	ask := []netlink.Attribute{name(unix.NFTA_RULE_TABLE, table)}
	if chain != "" {
		ask = append(ask, name(unix.NFTA_RULE_CHAIN, chain))
	}
	for range dumpAttempts {
		rules, err := c.request(unix.NFT_MSG_GETRULE, family, netlink.Dump, ask...)
		if errors.Is(err, unix.EINTR) || errors.Is(err, kernel.ErrInterrupted) {
			continue
		}
		if errors.Is(err, unix.ENOENT) {
			return nil, nil // no such table, or chain
		}
		if err != nil {
			return nil, fmt.Errorf("dump rules of table %s: %w", table, err)
		}
		out := map[string]uint64{}
		for _, as := range rules {
			if in, ch, _ := parseRule(as); in == table {
				if n, ok := parseCounter(as); ok {
					out[ch] += n
				}
			}
		}
		return out, nil
	}
	return nil, fmt.Errorf("dump rules of table %s: rules changed %d times meanwhile: %w", table, dumpAttempts, kernel.ErrInterrupted)
}

// parseCounter returns the packets that a rule's counters have seen; ok is false
// for a rule without.
func parseCounter(as []attr) (packets uint64, ok bool) {
	for _, a := range as {
		if a.typ != unix.NFTA_RULE_EXPRESSIONS {
			continue
		}
		for _, e := range attrs(a.data) {
			var kind string
			var data []byte
			for _, f := range attrs(e.data) {
				switch f.typ {
				case unix.NFTA_EXPR_NAME:
					kind = f.text()
				case unix.NFTA_EXPR_DATA:
					data = f.data
				}
			}
			if kind != "counter" {
				continue
			}
			for _, f := range attrs(data) {
				if f.typ == unix.NFTA_COUNTER_PACKETS && len(f.data) == 8 {
					packets += binary.BigEndian.Uint64(f.data)
					ok = true
				}
			}
		}
	}
	return packets, ok
}

// carry gives the rules that a VIP shall have the number that its rules so far
// have counted.
func (c *change) carry(nsFD int, rs ruleset) error {
	if len(c.counted) == 0 || c.remove {
		return nil
	}
	nl, err := dial(nsFD)
	if err != nil {
		return err
	}
	defer nl.nl.Close()
	for name := range c.counted {
		counts, err := nl.counts(rs.family, rs.table, name)
		if err != nil {
			return err
		}
		for _, r := range c.picks[name] {
			for _, e := range r.exprs {
				if x, ok := e.(*expr.Counter); ok {
					x.Packets = counts[name]
				}
			}
		}
	}
	return nil
}
