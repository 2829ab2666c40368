package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
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

// tally collects events.
type tally struct {
	out     io.Writer
	output  map[name][]string // of what has not ended yet
	label   string            // of the group that runs
	passed  map[name]string   // with the label of the group
	failed  []name
	skipped []skip
}

// skip is a test, or a part of a package, that was not run, and why.
type skip struct {
	name   name
	reason string
}

func main() {
	t := tally{out: os.Stdout, output: make(map[name][]string), passed: make(map[name]string)}
	ok := true
	for _, group := range groups(os.Args[1:]) {
		if label, ok := strings.CutSuffix(group[0], ":"); ok {
			t.label, group = label, group[1:]
		} else {
			t.label = ""
		}
		good, err := t.run(group)
		if err != nil {
			fmt.Fprintln(os.Stderr, "report:", err)
			os.Exit(1)
		}
		ok = ok && good
	}
	t.summary()
	if !ok || len(t.failed) > 0 {
		os.Exit(1)
	}
}

// groups splits arguments at "--".
func groups(args []string) [][]string {
	var out [][]string
	for len(args) > 0 {
		n := slices.Index(args, "--")
		if n < 0 {
			n = len(args)
		}
		if n > 0 {
			out = append(out, args[:n])
		}
		args = args[min(n+1, len(args)):]
	}
	return out
}

// run runs go test; false if it failed.
func (t *tally) run(args []string) (bool, error) {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	lines := bufio.NewScanner(events)
	lines.Buffer(nil, 16<<20) // a test may print a table on one line
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			fmt.Fprintln(t.out, lines.Text()) // the go command's own words
			continue
		}
		t.add(e)
	}
	if err := lines.Err(); err != nil {
		return false, err
	}
	return cmd.Wait() == nil, nil
}

// add takes one event.
func (t *tally) add(e event) {
	n := name{e.Package, e.Test}
	switch e.Action {
	case "output", "build-output":
		t.output[n] = append(t.output[n], e.Output)
		return
	case "pass":
		if n.test != "" {
			t.passed[n] = t.label
		}
	case "fail":
		// A package fails with its tests; it counts only if none of them did.
		if n.test != "" || !slices.ContainsFunc(t.failed, func(f name) bool { return f.pkg == n.pkg }) {
			t.failed = append(t.failed, n)
		}
		fmt.Fprint(t.out, strings.Join(t.output[n], ""))
	case "skip":
		if n.test != "" {
			t.skipped = append(t.skipped, skip{n, reason(t.output[n])})
		}
	default:
		return
	}
	if n.test == "" && e.Action != "skip" {
		where := ""
		if t.label != "" {
			where = " " + t.label
		}
		fmt.Fprintf(t.out, "%-4s %s%s %.1fs\n", e.Action, n.pkg, where, e.Elapsed)
		// What a package skips as a whole, it says itself.
		for _, line := range t.output[n] {
			if after, ok := strings.CutPrefix(line, "SKIP: "); ok {
				t.skipped = append(t.skipped, skip{n, strings.TrimSpace(after)})
			}
		}
	}
	delete(t.output, n)
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
