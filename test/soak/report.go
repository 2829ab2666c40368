package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// report is what was done and found. Its fields are of the run's goroutine; the
// methods may be called from two.
type report struct {
	Seed        uint64        `json:"seed"`
	Asked       time.Duration `json:"askedNs"`
	Took        time.Duration `json:"tookNs"`
	Interrupted bool          `json:"interrupted"`

	Operations []operationDone  `json:"operations"`
	Faults     []faultDone      `json:"faults"`
	Requests   map[string]count `json:"requests"` // by kind
	Allowed    int              `json:"failuresAllowed"`
	Unexcused  []unexcused      `json:"failuresNotExplained"`
	// AllowedBy counts failures by what may have hurt them; one may have several.
	AllowedBy map[string]int `json:"failuresByFault"`

	Plugins        []hostUsage `json:"plugins"`
	AddressesStart int         `json:"addressesStart"`
	AddressesEnd   int         `json:"addressesEnd"`
	Left           string      `json:"left,omitempty"`

	Wrong []string `json:"wrong"` // the verdict: none is well
	Logs  string   `json:"logs,omitempty"`

	mu sync.Mutex // guards what operations are noted in
}

type operationDone struct {
	What  string        `json:"what"`
	Kind  string        `json:"kind"`
	Hosts []string      `json:"hosts,omitempty"`
	At    time.Duration `json:"atNs"`
	Took  time.Duration `json:"tookNs"`
	Error string        `json:"error,omitempty"`
}

type faultDone struct {
	What   string        `json:"what"`
	Hosts  []string      `json:"hosts"`
	At     time.Duration `json:"atNs"`
	Lasted time.Duration `json:"lastedNs"`
	Healed time.Duration `json:"healedNs"` // after its end
	Bound  time.Duration `json:"healBoundNs"`
	Harm   string        `json:"mayHurt"`
	Why    string        `json:"why"`
}

type unexcused struct {
	Stream string        `json:"stream"`
	At     time.Duration `json:"atNs"`
	What   string        `json:"what"`
}

func newReport(c config) *report {
	return &report{Seed: c.seed, Asked: c.span, AllowedBy: map[string]int{}, Wrong: []string{}}
}

// wrong makes the verdict bad, for a reason.
func (r *report) wrong(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if what := fmt.Sprintf(format, args...); !slices.Contains(r.Wrong, what) {
		r.Wrong = append(r.Wrong, what)
	}
}

func (r *report) operation(a action, hosts []string, at, took time.Duration, err error) {
	o := operationDone{What: a.String(), Kind: a.kind, Hosts: hosts, At: at, Took: took}
	if err != nil {
		o.Error = err.Error()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Operations = append(r.Operations, o)
}

func (r *report) fault(a action, hosts []string, at, lasted, healed time.Duration, p policy) {
	r.Faults = append(r.Faults, faultDone{What: a.kind, Hosts: hosts, At: at, Lasted: lasted, Healed: healed, Bound: p.heal, Harm: p.harm.String(), Why: p.why})
}

// failure takes in a failure with what explains it.
func (r *report) failure(f failure, at time.Duration, by []window) {
	if len(by) > 0 {
		r.Allowed++
		for _, w := range by {
			r.AllowedBy[fmt.Sprint(w.what, " ", w.hosts)]++
		}
		return
	}
	r.Unexcused = append(r.Unexcused, unexcused{f.stream, at, f.what})
}

// String is what may be hurt, in words.
func (h harm) String() string {
	var words []string
	for _, x := range []struct {
		is   bool
		what string
	}{
		{h.clients, "its containers' requests"},
		{h.entries, "requests that it balances"},
		{h.servers, "requests that may get to its tasks"},
		{h.only, "requests to services that are nowhere else"},
		{h.between, "requests between the hosts"},
		{h.across, "requests between it and others"},
	} {
		if x.is {
			words = append(words, x.what)
		}
	}
	if len(words) == 0 {
		return "nothing"
	}
	return strings.Join(words, ", ")
}

// finish completes the verdict.
func (r *report) finish() {
	if n := len(r.Unexcused); n > 0 {
		r.wrong("%d requests failed and no fault explains it", n)
	}
}

// shown is how many unexplained failures the text lists; the JSON has all.
const shown = 20

// Text is the report for people.
func (r *report) Text() string {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(&b, "\nsoak: seed %d, %s of %s", r.Seed, r.Took.Round(time.Second), r.Asked)
	if r.Interrupted {
		b.WriteString(", interrupted")
	}
	b.WriteString("\n\n")
	fmt.Fprintln(t, "OPERATION\tDONE\tFAILED\tLONGEST")
	type sum struct {
		done, failed int
		longest      time.Duration
	}
	ops := map[string]sum{}
	for _, o := range r.Operations {
		s := ops[o.Kind]
		s.longest = max(s.longest, o.Took)
		if o.Error == "" {
			s.done++
		} else {
			s.failed++
		}
		ops[o.Kind] = s
	}
	for _, kind := range slices.Sorted(maps.Keys(ops)) {
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\n", kind, ops[kind].done, ops[kind].failed, round(ops[kind].longest))
	}
	t.Flush()
	b.WriteString("\n")
	fmt.Fprintln(t, "AT\tFAULT\tHOSTS\tLASTED\tHEALED\tBOUND\tMAY HURT")
	for _, f := range r.Faults {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", f.At.Round(time.Second), f.What, strings.Join(f.Hosts, " "), round(f.Lasted), round(f.Healed), f.Bound, f.Harm)
	}
	t.Flush()
	b.WriteString("\n")
	fmt.Fprintln(t, "REQUESTS\tANSWERED\tFAILED\tSLOWEST")
	for _, kind := range slices.Sorted(maps.Keys(r.Requests)) {
		c := r.Requests[kind]
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\n", kind, c.OK, c.Failed, round(c.Slowest))
	}
	t.Flush()
	fmt.Fprintf(&b, "\nfailures allowed: %d; not explained: %d\n", r.Allowed, len(r.Unexcused))
	for _, what := range slices.Sorted(maps.Keys(r.AllowedBy)) {
		fmt.Fprintf(&b, "  %6d  %s\n", r.AllowedBy[what], what)
	}
	for i, f := range r.Unexcused {
		if i == shown {
			fmt.Fprintf(&b, "  ... and %d more\n", len(r.Unexcused)-shown)
			break
		}
		fmt.Fprintf(&b, "  at %.1fs  %s: %s\n", f.At.Seconds(), f.Stream, f.What)
	}
	b.WriteString("\n")
	fmt.Fprintln(t, "PLUGIN\tPROCESSES\tDRIFT MENDED\tHOLDS\tMEMORY\tDESCRIPTORS\tTHREADS")
	for _, p := range r.Plugins {
		name := fmt.Sprintf("%s\t%d\t%d", p.Host, p.Processes, p.Drift)
		for _, x := range []struct {
			when string
			footprint
		}{{"before", p.Empty}, {"at the start", p.Start}, {"at most", p.Most}, {"after", p.End}} {
			fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\n", name, x.when, mega(x.Memory), x.Descriptors, x.Threads)
			name = "\t\t"
		}
	}
	t.Flush()
	fmt.Fprintf(&b, "\naddresses in use on network %s: %d at the start, %d at the end, with the same services\n", calm, r.AddressesStart, r.AddressesEnd)
	if len(r.Wrong) == 0 {
		b.WriteString("\nWELL: every failure is explained, everything healed in time, nothing is left\n")
		return b.String()
	}
	fmt.Fprintf(&b, "\nNOT WELL: seed %d\n", r.Seed)
	for _, w := range r.Wrong {
		fmt.Fprintf(&b, "  - %s\n", strings.ReplaceAll(w, "\n", "\n    "))
	}
	if r.Logs != "" {
		fmt.Fprintf(&b, "the engines' logs, with the plugins', are in %s\n", r.Logs)
	}
	return b.String()
}
