package main

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// packetRuns is how often the ratio is measured; single ones differ by 0.04.
const packetRuns = 5

// packets compares connections and requests to a VIP with those to its backend's
// own address, by the benchmark of the package that makes the rules.
func packets(ctx context.Context, t *table) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkAgainstDirect$", "-benchtime", "1s", "-count", strconv.Itoa(packetRuns), "./internal/linux/nft")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s%s", strings.Join(cmd.Args, " "), err, out, stderr.Bytes())
	}
	ratios, names := make(map[string][]float64), []string(nil)
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		i := slices.Index(f, "vip/direct")
		if i < 1 {
			continue
		}
		v, err := strconv.ParseFloat(f[i-1], 64)
		if err != nil {
			return fmt.Errorf("read %q: %w", line, err)
		}
		name := strings.TrimPrefix(f[0], "BenchmarkAgainstDirect/")
		if n := strings.LastIndexByte(name, '-'); n > 0 {
			name = name[:n] // behind it is GOMAXPROCS
		}
		if ratios[name] == nil {
			names = append(names, name)
		}
		ratios[name] = append(ratios[name], v)
	}
	if len(names) == 0 {
		return fmt.Errorf("no ratio was measured: %s", lastLine(string(out)))
	}
	for _, name := range names {
		// One in twenty is about what two runs of the same differ by.
		t.add(goal{what: "VIP / direct, rate of " + name, unit: ratio, limit: 0.95, atLeast: true}, ratios[name])
	}
	return nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
