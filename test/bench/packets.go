package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
)

// packetRuns is how often the ratio is measured; single ones differ by 0.04.
const packetRuns = 5

// packets compares connections and requests to a VIP with those to its backend's
// own address, by the benchmark of the package that makes the rules.
func packets(ctx context.Context, t *table) error {
	names, ratios, err := benchmarked(ctx, "./internal/linux/nft", "BenchmarkAgainstDirect", "1s", "vip/direct")
	for _, name := range names {
		// One in twenty is about what two runs of the same differ by.
		t.add(goal{what: "VIP / direct, rate of " + name, unit: ratio, limit: 0.95, atLeast: true}, ratios[name])
	}
	return err
}

// mesh compares published ports with a process on the node that is asked. There is no
// limit: what they must beat is Docker's own, which needs ip_vs and engines (make
// bench-vm).
func mesh(ctx context.Context, t *table) error {
	names, ratios, err := benchmarked(ctx, "./internal/linux", "BenchmarkMeshAgainstProcess", "500x", "mesh/process")
	for _, name := range names {
		t.add(goal{what: "published port / process, rate of " + name, unit: ratio, atLeast: true}, ratios[name])
	}
	return err
}

// benchmarked runs a benchmark and returns what it tells in a unit, by the names of
// its parts and of what stands before the unit, in the order in which they came.
func benchmarked(ctx context.Context, pkg, name, span, unit string) (names []string, found map[string][]float64, err error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^"+name+"$", "-benchtime", span, "-count", strconv.Itoa(packetRuns), pkg)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w: %s%s", strings.Join(cmd.Args, " "), err, out, stderr.Bytes())
	}
	found = make(map[string][]float64)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		for i := 1; i < len(f); i++ {
			what, is := strings.CutSuffix(f[i], unit)
			if !is {
				continue
			}
			v, err := strconv.ParseFloat(f[i-1], 64)
			if err != nil {
				return nil, nil, fmt.Errorf("read %q: %w", line, err)
			}
			part := strings.TrimPrefix(f[0], name+"/")
			if n := strings.LastIndexByte(part, '-'); n > 0 {
				part = part[:n] // behind it is GOMAXPROCS
			}
			if what = strings.TrimSuffix(what, "-"); what != "" {
				part += "/" + what
			}
			if found[part] == nil {
				names = append(names, part)
			}
			found[part] = append(found[part], v)
		}
	}
	if len(names) == 0 {
		return nil, nil, fmt.Errorf("nothing was measured: %s", lastLine(string(out)))
	}
	return names, found, nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
