package main

import (
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// row is what was measured of one VIP: microseconds, but for bulk: 10^6 bit/s.
type row struct{ connects, requests, bulk, packets []float64 }

// result is a whole run.
type result struct {
	ways    []way
	missing map[string]string
	only    string // what was asked for, if not all
	rounds  int
	took    time.Duration
	idle    float64
	rows    map[string]row // by way/place
}

// print writes two tables in Markdown, with the first way as the measure.
func (r *result) print(w io.Writer) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	p := &printer{w: w}
	only := ""
	if r.only != "" {
		only = " ONLY=" + r.only
	}
	p.line("Made by `make bench-vm%s WRITE=docs/benchmarks.md`: Linux %s, %d processor, Docker's ip_vs and ours in the same kernel, %d rounds in %s. Processors were idle %.0f %% of the time.", only,
		unix.ByteSliceToString(u.Release[:]), runtime.NumCPU(), r.rounds, r.took.Round(time.Second), 100*r.idle)
	for _, place := range places {
		p.line("")
		p.line("Task on %s. In brackets: how many times as good as Docker's own.", map[string]string{"near": "the client's node", "far": "another node"}[place.name])
		p.line("")
		p.line("| network | connections/s | connection p50, p99 | request p50, p99 | small packet | to the task |")
		p.line("|---|---|---|---|---|---|")
		base := r.rows[r.ways[0].name+"/"+place.name]
		for _, w := range r.ways {
			x := r.rows[w.name+"/"+place.name]
			p.line("| %s | %.0f (%.2f) | %.0f µs (%.2f), %.0f µs | %.0f µs (%.2f), %.0f µs | %.1f µs (%.2f) | %.2f Gbit/s (%.2f) |", w.what,
				1e6/mean(x.connects), mean(base.connects)/mean(x.connects),
				quantile(x.connects, 0.5), quantile(base.connects, 0.5)/quantile(x.connects, 0.5), quantile(x.connects, 0.99),
				quantile(x.requests, 0.5), quantile(base.requests, 0.5)/quantile(x.requests, 0.5), quantile(x.requests, 0.99),
				quantile(x.packets, 0.5), quantile(base.packets, 0.5)/quantile(x.packets, 0.5),
				quantile(x.bulk, 0.5)/1000, quantile(x.bulk, 0.5)/quantile(base.bulk, 0.5))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.missing)) {
		p.line("")
		p.line("Not measured: %s: %s.", name, r.missing[name])
	}
	return p.err
}

// printer keeps the first error.
type printer struct {
	w   io.Writer
	err error
}

func (p *printer) line(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

func mean(samples []float64) float64 {
	sum := 0.0
	for _, s := range samples {
		sum += s
	}
	return sum / float64(max(len(samples), 1))
}

// quantile is the sample that a share q of the others is below; 0 of none.
func quantile(samples []float64, q float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}
