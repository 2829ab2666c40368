package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
)

// event is a line of go test -json (go doc test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Elapsed float64
	Output  string
}

// name is where an event belongs; the test is empty for the package itself.
type name struct{ pkg, test string }

func (n name) String() string {
	if n.test == "" {
		return n.pkg
	}
	return n.pkg + " " + n.test
}

// tally collects what became of tests. Groups of several tracks use it at once.
type tally struct {
	out io.Writer

	mu      sync.Mutex      // guards what follows, and out
	passed  map[name]string // with the label of the group
	failed  []name
	skipped []skip
	bad     bool // some run of go test failed
}

// group is a run of go test.
type group struct {
	label  string // where it runs; empty: here
	args   []string
	output map[name][]string // of what has not ended yet
}

// skip is a test, or a part of a package, that was not run, and why.
type skip struct {
	name   name
	reason string
}

func main() {
	t := tally{out: os.Stdout, passed: make(map[name]string)}
	var wait sync.WaitGroup
	for _, track := range tracks(os.Args[1:]) {
		wait.Go(func() {
			for _, g := range track {
				if err := t.run(g); err != nil {
					fmt.Fprintln(os.Stderr, "report:", err)
					t.fail()
				}
			}
		})
	}
	wait.Wait()
	t.summary()
	if t.bad || len(t.failed) > 0 {
		os.Exit(1)
	}
}

// tracks splits arguments at "==", and what is between at "--".
func tracks(args []string) [][]group {
	var out [][]group
	for track := range split(args, "==") {
		var groups []group
		for g := range split(track, "--") {
			label, labelled := strings.CutSuffix(g[0], ":")
			if labelled {
				g = g[1:]
			} else {
				label = ""
			}
			groups = append(groups, group{label: label, args: g, output: make(map[name][]string)})
		}
		if len(groups) > 0 {
			out = append(out, groups)
		}
	}
	return out
}

// split yields what is between separators, unless that is nothing.
func split(args []string, separator string) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		for len(args) > 0 {
			n := slices.Index(args, separator)
			if n < 0 {
				n = len(args)
			}
			if n > 0 && !yield(args[:n:n]) {
				return
			}
			args = args[min(n+1, len(args)):]
		}
	}
}

// fail notes that a run failed, whatever its tests said.
func (t *tally) fail() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bad = true
}

// run runs go test. The error says that it could not be run or understood.
func (t *tally) run(g group) error {
	cmd := exec.Command("go", append([]string{"test", "-json"}, g.args...)...)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(events)
	lines.Buffer(nil, 16<<20) // a test may print a table on one line
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.say(lines.Text()) // the go command's own words
			continue
		}
		t.add(g, e)
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if cmd.Wait() != nil {
		t.fail()
	}
	return nil
}

func (t *tally) say(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintln(t.out, text)
}

// add takes one event of a group.
func (t *tally) add(g group, e event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := name{e.Package, e.Test}
	switch e.Action {
	case "output", "build-output":
		g.output[n] = append(g.output[n], e.Output)
		return
	case "pass":
		if n.test != "" {
			t.passed[n] = g.label
		}
	case "fail":
		// A package fails with its tests; it counts only if none of them did.
		if n.test != "" || !slices.ContainsFunc(t.failed, func(f name) bool { return f.pkg == n.pkg }) {
			t.failed = append(t.failed, n)
		}
		if g.label != "" {
			fmt.Fprintf(t.out, "%s:\n", g.label)
		}
		fmt.Fprint(t.out, strings.Join(g.output[n], ""))
	case "skip":
		if n.test != "" {
			t.skipped = append(t.skipped, skip{n, reason(g.output[n])})
		}
	default:
		return
	}
	if n.test == "" && e.Action != "skip" {
		where := ""
		if g.label != "" {
			where = " " + g.label
		}
		fmt.Fprintf(t.out, "%-4s %s%s %.1fs\n", e.Action, n.pkg, where, e.Elapsed)
		// What a package skips as a whole, it says itself.
		for _, line := range g.output[n] {
			if after, ok := strings.CutPrefix(line, "SKIP: "); ok {
				t.skipped = append(t.skipped, skip{n, strings.TrimSpace(after)})
			}
		}
	}
	delete(g.output, n)
}

// reason is what a skipped test said, without the frame that go test puts around it.
func reason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		said = append(said, line)
	}
	if len(said) == 0 {
		return "no reason given"
	}
	return strings.Join(said, " ")
}

func (t *tally) summary() {
	var not, elsewhere []string
	for _, s := range t.skipped {
		if label, ok := t.passed[s.name]; ok {
			elsewhere = append(elsewhere, fmt.Sprintf("%s: %s", label, s.name))
		} else {
			not = append(not, fmt.Sprintf("%s: %s", s.name, s.reason))
		}
	}
	for _, list := range []struct {
		title string
		lines []string
	}{{"not run on this machine itself, but", elsewhere}, {"not run on this machine:", not}} {
		if len(list.lines) > 0 {
			fmt.Fprintln(t.out, "\n"+list.title)
		}
		for _, line := range list.lines {
			fmt.Fprintln(t.out, "  "+line)
		}
	}
	if len(t.failed) > 0 {
		fmt.Fprintln(t.out, "\nfailed:")
		for _, f := range t.failed {
			fmt.Fprintln(t.out, "  "+f.String())
		}
	}
	fmt.Fprintf(t.out, "\n%d passed, %d failed, %d skipped\n", len(t.passed), len(t.failed), len(not))
}
