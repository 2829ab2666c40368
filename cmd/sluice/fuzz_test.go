package main

import (
	"strings"
	"testing"
)

// FuzzArguments: whatever stands behind `sluice`, it ends with one of its three
// verdicts, and says why if nothing could be asked.
func FuzzArguments(f *testing.F) {
	for _, v := range verbs {
		f.Add(v.name + " x")
	}
	for _, s := range []string{"--json status", "entry --port 81", "--port", "-x", "service", "help", "version", "--plugin a status", "--", "status --socket /nowhere"} {
		f.Add(s)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, line string) {
		status, out, errs := sluice(t, dir, strings.Fields(line)...)
		switch {
		case status != exitWell && status != exitNoAnswer:
			t.Errorf("%q: exit status %d with no plugin to ask", line, status)
		case status == exitNoAnswer && errs == "":
			t.Errorf("%q: no word of why not", line)
		case status == exitWell && out == "":
			t.Errorf("%q: well, and nothing said", line)
		}
	})
}
