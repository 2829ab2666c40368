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
	rounds  int
	took    time.Duration
	idle    float64
	rows    map[string]row // by way/place
}

func (r *result) name() string { return "datapaths" }

// machine begins a table: how it was made, if only what was asked for.
func (p *printer) machine(only string) {
	if p.err != nil {
		return
	}
	var u unix.Utsname
	if p.err = unix.Uname(&u); p.err != nil {
		return
	}
	if only != "" {
		only = " ONLY=" + only
	}
	p.line("Made by `make bench-vm%s WRITE=docs/benchmarks.md`: Linux %s, %d processor, Docker's ip_vs and ours in the same kernel.", only,
		unix.ByteSliceToString(u.Release[:]), runtime.NumCPU())
}

func (p *printer) effort(rounds int, took time.Duration, idle float64) {
	p.line("%d rounds in %s. Processors were idle %.0f %% of the time.", rounds, took.Round(time.Second), 100*idle)
}

// print writes two tables in Markdown, with the first way as the measure.
func (r *result) print(p *printer) {
	p.effort(r.rounds, r.took, r.idle)
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
}

// meshRow is what was measured of one door, in microseconds.
type meshRow struct{ connects, requests, datagrams, packets []float64 }

// meshResult is a whole run from outside.
type meshResult struct {
	doors  []door
	rounds int
	took   time.Duration
	idle   float64
	rows   map[string]meshRow // by gate/place
}

func (r *meshResult) name() string { return "mesh" }

// print writes two tables in Markdown, with two measures: the process, and Docker's.
func (r *meshResult) print(p *printer) {
	p.effort(r.rounds, r.took, r.idle)
	for _, place := range places {
		p.line("")
		p.line("Task on %s. In brackets: the share of the process's rate, and how many times as good as Docker's.", map[string]string{"near": "the node that is asked", "far": "another node"}[place.name])
		p.line("")
		p.line("| port of | connections/s | connection p50, p99 | request p50, p99 | UDP request p50, p99 | UDP packets/s |")
		p.line("|---|---|---|---|---|---|")
		process, dockers := r.rows[plain+"/near"], r.rows[docker+"/"+place.name]
		for _, d := range r.doors {
			if d.place != place.name && d.gate.name != plain {
				continue
			}
			x := r.rows[d.name()]
			rate := func(of func(meshRow) []float64, sum func([]float64) float64) string {
				each := perRound(of(x), r.rounds, sum)
				return fmt.Sprintf("%.0f (%.2f, %.2f)", 1e6/median(each),
					inTurns(perRound(of(process), r.rounds, sum), each), inTurns(perRound(of(dockers), r.rounds, sum), each))
			}
			time := func(of func(meshRow) []float64) string {
				each := perRound(of(x), r.rounds, median)
				return fmt.Sprintf("%.0f µs (%.2f, %.2f), %.0f µs", median(of(x)),
					inTurns(perRound(of(process), r.rounds, median), each), inTurns(perRound(of(dockers), r.rounds, median), each), quantile(of(x), 0.99))
			}
			connects := func(m meshRow) []float64 { return m.connects }
			p.line("| %s | %s | %s | %s | %s | %s |", d.gate.what, rate(connects, mean), time(connects),
				time(func(m meshRow) []float64 { return m.requests }),
				time(func(m meshRow) []float64 { return m.datagrams }),
				rate(func(m meshRow) []float64 { return m.packets }, median))
		}
	}
}

// perRound sums up the samples of each round.
func perRound(samples []float64, rounds int, sum func([]float64) float64) []float64 {
	var out []float64
	for round := range slices.Chunk(samples, max(len(samples)/max(rounds, 1), 1)) {
		out = append(out, sum(round))
	}
	return out
}

// inTurns is the usual ratio of two series of times in one round: what the machine
// does besides falls on both of a round, and less so on all rounds.
func inTurns(of, to []float64) float64 {
	var ratios []float64
	for i := range min(len(of), len(to)) {
		ratios = append(ratios, of[i]/to[i])
	}
	return median(ratios)
}

func median(samples []float64) float64 { return quantile(samples, 0.5) }

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
