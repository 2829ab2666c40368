package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Partition stops all traffic between hosts a and b, in both directions; each
// still reaches everybody else. Stopping what is stopped is a success.
func (c *Cluster) Partition(ctx context.Context, a, b int) error {
	return c.setCut(ctx, a, b, true)
}

// Heal ends the partition between hosts a and b.
func (c *Cluster) Heal(ctx context.Context, a, b int) error {
	return c.setCut(ctx, a, b, false)
}

func (c *Cluster) setCut(ctx context.Context, a, b int, cut bool) error {
	ports := [2]string{port(c.Host(a).Addr()), port(c.Host(b).Addr())}
	slices.Sort(ports[:])
	c.cutMu.Lock()
	defer c.cutMu.Unlock()
	next := slices.DeleteFunc(slices.Clone(c.cuts), func(p [2]string) bool { return p == ports })
	if cut {
		next = append(next, ports)
	}
	if err := c.filterLocked(ctx, next, c.drops); err != nil {
		return fmt.Errorf("partition hosts %d and %d: %w", a, b, err)
	}
	c.cuts = next
	return nil
}

// Drop is what the underlay loses on the way from one host to another; the way back
// is another Drop.
type Drop struct {
	From, To int    // hosts, counted from 1
	Match    string // of which packets, as nft writes it: "udp dport 4799"; empty: of all
	Percent  int    // how many of a hundred, at random; 0: all
}

// SetDrops makes the underlay lose exactly what drops say, beside its partitions;
// none ends it.
func (c *Cluster) SetDrops(ctx context.Context, drops ...Drop) error {
	rules := make([]string, len(drops))
	for i, d := range drops {
		rules[i] = d.rule(port(c.Host(d.From).Addr()), port(c.Host(d.To).Addr()))
	}
	c.cutMu.Lock()
	defer c.cutMu.Unlock()
	if err := c.filterLocked(ctx, c.cuts, rules); err != nil {
		return fmt.Errorf("lose packets of the underlay: %w", err)
	}
	c.drops = rules
	return nil
}

// rule is the drop as nft writes it, between two ports of the underlay.
func (d Drop) rule(from, to string) string {
	parts := []string{fmt.Sprintf("iifname %q oifname %q", from, to)}
	if d.Match != "" {
		parts = append(parts, d.Match)
	}
	if d.Percent > 0 {
		parts = append(parts, fmt.Sprintf("numgen random mod 100 < %d", d.Percent))
	}
	return strings.Join(append(parts, "drop"), " ")
}

func (c *Cluster) filterLocked(ctx context.Context, cuts [][2]string, drops []string) error {
	_, err := c.underlay.run(ctx, true, cutRules(cuts, drops), tool("nft"), "-f", "-")
	return err
}

// cutRules is the underlay's whole filter, which replaces the last one in a
// single transaction.
func cutRules(cuts [][2]string, drops []string) string {
	var s strings.Builder
	// Adding first makes the deletion valid when there is no table yet.
	s.WriteString("add table bridge partition\ndelete table bridge partition\n")
	s.WriteString("table bridge partition {\n\tchain forward {\n\t\ttype filter hook forward priority 0; policy accept\n")
	for _, p := range cuts {
		fmt.Fprintf(&s, "\t\tiifname %q oifname %q drop\n", p[0], p[1])
		fmt.Fprintf(&s, "\t\tiifname %q oifname %q drop\n", p[1], p[0])
	}
	for _, d := range drops {
		s.WriteString("\t\t" + d + "\n")
	}
	s.WriteString("\t}\n}\n")
	return s.String()
}
