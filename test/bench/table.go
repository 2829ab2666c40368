package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// unit says how a row's numbers are written.
type unit string

const (
	seconds unit = "s" // of durations
	mib     unit = "MiB"
	count   unit = ""
	ratio   unit = "×"
)

// goal is a row before it is measured. A limit of 0 is none: the number is told
// for its own sake.
type goal struct {
	what    string
	unit    unit
	limit   float64 // of the median
	limit99 float64 // of the 99th percentile
	atLeast bool    // the limit is a lower one
}

// table collects rows. It belongs to one goroutine.
type table struct{ rows [][]string }

// add makes a row of samples.
func (t *table) add(g goal, samples []float64) {
	med, p99 := quantile(samples, 0.5), quantile(samples, 0.99)
	if g.atLeast {
		p99 = quantile(samples, 0.01) // the bad end is the low one
	}
	row := []string{g.what, "-", g.unit.text(med), g.unit.text(p99), "-", "-", load()}
	if len(samples) == 1 {
		row[3] = "-"
	}
	if g.limit > 0 {
		row[1] = g.unit.text(g.limit)
		share, good := med/g.limit, med <= g.limit
		if g.limit99 > 0 {
			row[1] += ", p99 " + g.unit.text(g.limit99)
			share, good = max(share, p99/g.limit99), good && p99 <= g.limit99
		}
		if g.atLeast {
			row[1] = "≥ " + row[1]
			good = med >= g.limit
		}
		row[4], row[5] = fmt.Sprintf("%.2f", share), "met"
		if !good {
			row[5] = "MISSED"
		}
	}
	t.rows = append(t.rows, row)
}

// maxWhy keeps an error from widening the table; the whole text goes to stderr.
const maxWhy = 80

// missing makes a row of what could not be measured.
func (t *table) missing(what, why string) {
	why, _, _ = strings.Cut(why, "\n")
	if len(why) > maxWhy {
		why = why[:maxWhy] + "…"
	}
	t.rows = append(t.rows, []string{what, "-", "-", "-", "-", "missing: " + why, load()})
}

func (t *table) print(w io.Writer) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	fmt.Fprintf(w, "\n%s, %d processors, Linux %s, %s\n\n", processor(), runtime.NumCPU(), unix.ByteSliceToString(u.Release[:]), runtime.Version())
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	head := []string{"goal", "limit", "median", "p99", "of limit", "verdict", "load"}
	for _, r := range slices.Insert(slices.Clone(t.rows), 0, head) {
		fmt.Fprintln(tw, strings.Join(r, "\t"))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nload is the 1-minute average when the row was done; where it is above %d, something else had the processors too, and times are too long.\n", runtime.NumCPU())
	return err
}

// text writes three digits.
func (u unit) text(v float64) string {
	switch u {
	case seconds:
		return round(time.Duration(v * 1e9)).String()
	case count:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g %s", v, u)
}

func round(d time.Duration) time.Duration {
	step := time.Duration(1)
	for d/step >= 1000 {
		step *= 10
	}
	return d.Round(step)
}

// quantile is the smallest sample that at least the share q does not exceed.
func quantile(samples []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(samples))
	if len(s) == 0 {
		return math.NaN()
	}
	return s[max(0, int(math.Ceil(q*float64(len(s))))-1)]
}

// load is the 1-minute load average, of the whole machine.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}

// processor is the model of the machine's processor.
func processor() string {
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return cmp.Or(runtime.GOARCH, "unknown processor")
}

// timed is how long f takes, in seconds.
func timed(f func() error) (float64, error) {
	began := time.Now()
	err := f()
	return time.Since(began).Seconds(), err
}

// spent is the processor time that f costs this process, garbage collection
// included, in seconds. On a busy machine the wall clock tells of the others.
func spent(f func()) (float64, error) {
	var before, after unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &before); err != nil {
		return 0, err
	}
	f()
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &after); err != nil {
		return 0, err
	}
	return float64(after.Nano()-before.Nano()) / 1e9, nil
}
