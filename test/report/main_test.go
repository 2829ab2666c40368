package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

func TestTracks(t *testing.T) {
	got := tracks([]string{"--", "a", "b", "--", "--", "-count=1", "c", "==", "--", "==", "there:", "d"})
	none := map[name][]string{}
	want := [][]group{{{args: []string{"a", "b"}, output: none}, {args: []string{"-count=1", "c"}, output: none}}, {{"there", []string{"d"}, none}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("tracks %v, want %v", got, want)
	}
}

func TestSummaryNamesSkipsAndFailures(t *testing.T) {
	var out bytes.Buffer
	r := tally{out: &out, passed: map[name]string{}}
	here, there := group{output: map[name][]string{}}, group{label: "in a VM", output: map[name][]string{}}
	for _, e := range []event{
		{Action: "run", Package: "p", Test: "TestA"},
		{Action: "pass", Package: "p", Test: "TestA"},
		{Action: "output", Package: "p", Test: "TestB", Output: "=== RUN   TestB\n"},
		{Action: "output", Package: "p", Test: "TestB", Output: "    x_test.go:3: missing: vxlan\n"},
		{Action: "skip", Package: "p", Test: "TestB"},
		{Action: "output", Package: "p", Test: "TestC", Output: "    x_test.go:9: broken\n"},
		{Action: "fail", Package: "p", Test: "TestC"},
		{Action: "fail", Package: "p"},
		{Action: "output", Package: "q", Output: "SKIP: needs root\n"},
		{Action: "pass", Package: "q"},
		{Action: "output", Package: "r", Output: "does not build\n"},
		{Action: "fail", Package: "r"},
	} {
		r.add(here, e)
	}
	for _, e := range []event{
		{Action: "pass", Package: "p", Test: "TestA"},
		{Action: "output", Package: "p", Test: "TestD", Output: "    x_test.go:3: missing: ipvs\n"},
		{Action: "skip", Package: "p", Test: "TestD"},
		{Action: "pass", Package: "p", Test: "TestD"},
		{Action: "output", Package: "s", Test: "TestE", Output: "    x_test.go:7: too slow\n"},
		{Action: "fail", Package: "s", Test: "TestE"},
		{Action: "pass", Package: "t"},
	} {
		r.add(there, e)
	}
	r.summary()
	for _, want := range []string{
		"p TestB: x_test.go:3: missing: vxlan", "x_test.go:9: broken", "q: needs root", "does not build", "  r\n",
		"but\n  in a VM: p TestD\n", "pass t in a VM",
		"in a VM:\n    x_test.go:7: too slow\n",
		"\n2 passed, 3 failed, 2 skipped\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, out.String())
		}
	}
}
