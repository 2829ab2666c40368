package cluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Snapshot is the network state of a host as sorted lines, each beginning with
// its kind: link, addr, route, rule, nft, iptables, ipvs, netns, mount. What
// changes by itself (counters, timeouts, interface numbers, carrier) is not in
// it, so that two snapshots are equal when nothing was left behind.
type Snapshot []string

// Diff returns what is different in after: lines that are gone begin with "-",
// lines that are new with "+". It is empty when nothing is.
func (s Snapshot) Diff(after Snapshot) []string {
	var diff []string
	count := map[string]int{}
	for _, line := range s {
		count[line]++
	}
	for _, line := range after {
		count[line]--
	}
	for line, n := range count {
		for ; n > 0; n-- {
			diff = append(diff, "-"+line)
		}
		for ; n < 0; n++ {
			diff = append(diff, "+"+line)
		}
	}
	slices.SortFunc(diff, func(a, b string) int { return cmp.Or(cmp.Compare(a[1:], b[1:]), cmp.Compare(a, b)) })
	return diff
}

// snapshotScript prints the state of a host in parts; the line before each says
// what follows and in which namespace: "" is the host's own, others are named
// by their pin. A tool or kernel part that is missing leaves its part empty.
const snapshotScript = `
part() { printf '\n\001%s\001%s\n' "$1" "$2"; }
scan() {
	ns=$1; shift
	part link "$ns";     "$@" ip -j -d link show
	part addr "$ns";     "$@" ip -j addr show
	part route "$ns";    "$@" ip -o route show table all
	part rule "$ns";     "$@" ip -o rule show
	part nft "$ns";      "$@" nft --stateless list ruleset 2>/dev/null || "$@" nft list tables
	part ipvs "$ns";     "$@" cat /proc/net/ip_vs 2>/dev/null
}
scan ""
part iptables ""; iptables-save; ip6tables-save
part mount "";    cat /proc/self/mountinfo
part netns "";    ls -1 /run/netns 2>/dev/null
awk '{ for (i = 7; i <= NF; i++) if ($i == "-") { if ($(i+1) == "nsfs") print $5; break } }' /proc/self/mountinfo | sort -u |
while read -r pin; do
	part netns ""; echo "$pin"
	nsenter --net="$pin" true 2>/dev/null && scan "$pin" nsenter --net="$pin"
done
exit 0
`

// Snapshot reads the host's network state, in its own namespace and in every
// pinned one.
func (h *Host) Snapshot(ctx context.Context) (Snapshot, error) {
	out, err := h.Exec(ctx, "/bin/sh", "-c", snapshotScript)
	if err != nil {
		return nil, fmt.Errorf("snapshot of %s: %w", h.name, err)
	}
	return parseSnapshot(out)
}

// SettledSnapshot reads until two snapshots in a row are the same, and returns that.
// An engine puts some of its rules first again and again, by removing and adding
// them in two steps (20.10: the jump to DOCKER-USER, whenever it makes a network or
// starts); a snapshot from between lacks what the next has.
func (h *Host) SettledSnapshot(ctx context.Context) (Snapshot, error) {
	var last Snapshot
	err := Wait(ctx, h.name+" does not change", func(ctx context.Context) error {
		s, err := h.Snapshot(ctx)
		if err != nil {
			return err
		}
		diff := last.Diff(s)
		last = s
		if len(diff) > 0 {
			return errors.New(strings.Join(diff, "\n"))
		}
		return nil
	})
	return last, err
}

func parseSnapshot(out string) (Snapshot, error) {
	var s Snapshot
	for part := range strings.SplitSeq(out, "\n\x01") {
		head, body, _ := strings.Cut(part, "\n")
		kind, ns, ok := strings.Cut(head, "\x01")
		if !ok {
			continue
		}
		lines, err := normalise(kind, body)
		if err != nil {
			return nil, fmt.Errorf("snapshot: %s in namespace %q: %w", kind, ns, err)
		}
		if ns != "" {
			kind += " in " + ns
		}
		for _, line := range lines {
			s = append(s, kind+" "+line)
		}
	}
	slices.Sort(s)
	return s, nil // duplicates too: a rule that is there twice is a finding
}

// normalise turns the output of one tool into lines that compare.
func normalise(kind, body string) ([]string, error) {
	switch kind {
	case "link":
		return linkLines(body)
	case "addr":
		return addrLines(body)
	}
	var lines []string
	for line := range strings.Lines(body) {
		line = strings.TrimRight(line, " \n")
		switch kind {
		case "mount":
			// proc(5): the fifth field is the mount point; behind a lone "-"
			// stands the type of file system.
			before, after, ok := strings.Cut(line, " - ")
			fields := strings.Fields(before)
			if !ok || len(fields) < 5 {
				continue
			}
			line = fields[4] + " " + strings.Fields(after)[0]
		case "iptables":
			if strings.HasPrefix(line, "#") {
				continue // dates
			}
			line = counters.ReplaceAllString(line, "")
		case "nft":
			if strings.HasPrefix(line, "#") {
				continue
			}
			line = volatileNft.ReplaceAllString(line, "")
		case "route":
			// Routes to link-local and multicast come and go with carriers.
			if strings.Contains(line, "fe80::") || strings.Contains(line, "ff00::") {
				continue
			}
			line = strings.TrimSpace(strings.ReplaceAll(line, " linkdown", ""))
		}
		if line != "" {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

var (
	counters    = regexp.MustCompile(` ?\[\d+:\d+\]`)
	volatileNft = regexp.MustCompile(` (packets \d+ bytes \d+|expires [0-9a-z]+)`)
)

func linkLines(body string) ([]string, error) {
	var links []struct {
		Ifname, Ifalias, Master string
		MTU                     int
		Linkinfo                struct {
			Kind string `json:"info_kind"`
		}
	}
	if strings.TrimSpace(body) == "" {
		return nil, nil
	}
	if err := json.Unmarshal([]byte(body), &links); err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range links {
		var line strings.Builder
		line.WriteString(fmt.Sprintf("%s mtu %d", l.Ifname, l.MTU))
		for _, f := range [][2]string{{"kind", l.Linkinfo.Kind}, {"master", l.Master}, {"alias", l.Ifalias}} {
			if f[1] != "" {
				line.WriteString(" " + f[0] + " " + f[1])
			}
		}
		lines = append(lines, line.String())
	}
	return lines, nil
}

func addrLines(body string) ([]string, error) {
	var links []struct {
		Ifname   string
		AddrInfo []struct {
			Local     netip.Addr
			Prefixlen int
		} `json:"addr_info"`
	}
	if strings.TrimSpace(body) == "" {
		return nil, nil
	}
	if err := json.Unmarshal([]byte(body), &links); err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range links {
		for _, a := range l.AddrInfo {
			// Link-local IPv6 appears with the first carrier of a bridge.
			if a.Local.Is6() && a.Local.IsLinkLocalUnicast() {
				continue
			}
			lines = append(lines, fmt.Sprintf("%s/%d dev %s", a.Local, a.Prefixlen, l.Ifname))
		}
	}
	return lines, nil
}

// Leftovers lists what a cluster in dir still holds on the machine: processes,
// mounts, cgroups and the directory itself. After Down it is empty; of a
// running cluster it shows what Down will remove.
func Leftovers(dir string) ([]string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	var left []string
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, path := range cmdlines {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		args := strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00")
		if len(args) == 3 && args[0] == innerName && args[1] == dir {
			left = append(left, "process "+strings.Split(path, "/")[2]+" "+args[2])
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			left = append(left, "mount "+f[4])
		}
	}
	groups, err := cgroups(cgroupName(dir))
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		left = append(left, "cgroup "+g)
	}
	if _, err := os.Lstat(dir); err == nil {
		left = append(left, "directory "+dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return left, nil
}

// Leftovers is [Leftovers] of this cluster.
func (c *Cluster) Leftovers() ([]string, error) { return Leftovers(c.o.Dir) }
