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
	passed  int
	failed  []name
	skipped []string // with the reason
}

func main() {
	t := tally{out: os.Stdout, output: make(map[name][]string)}
	ok := true
	for _, group := range groups(os.Args[1:]) {
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
			t.passed++
		}
	case "fail":
		// A package fails with its tests; it counts only if none of them did.
		if n.test != "" || !slices.ContainsFunc(t.failed, func(f name) bool { return f.pkg == n.pkg }) {
			t.failed = append(t.failed, n)
		}
		fmt.Fprint(t.out, strings.Join(t.output[n], ""))
	case "skip":
		if n.test != "" {
			t.skipped = append(t.skipped, n.String()+": "+reason(t.output[n]))
		}
	default:
		return
	}
	if n.test == "" && e.Action != "skip" {
		fmt.Fprintf(t.out, "%-4s %s %.1fs\n", e.Action, n.pkg, e.Elapsed)
		// What a package skips as a whole, it says itself.
		for _, line := range t.output[n] {
			if after, ok := strings.CutPrefix(line, "SKIP: "); ok {
				t.skipped = append(t.skipped, n.pkg+": "+strings.TrimSpace(after))
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
	if len(t.skipped) > 0 {
		fmt.Fprintln(t.out, "\nnot run on this machine:")
		for _, s := range t.skipped {
			fmt.Fprintln(t.out, "  "+s)
		}
	}
	if len(t.failed) > 0 {
		fmt.Fprintln(t.out, "\nfailed:")
		for _, f := range t.failed {
			fmt.Fprintln(t.out, "  "+f.String())
		}
	}
	fmt.Fprintf(t.out, "\n%d passed, %d failed, %d skipped\n", t.passed, len(t.failed), len(t.skipped))
}
