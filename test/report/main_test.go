package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

func TestGroups(t *testing.T) {
	got := groups([]string{"--", "a", "b", "--", "--", "-count=1", "c"})
	if want := [][]string{{"a", "b"}, {"-count=1", "c"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("groups %v, want %v", got, want)
	}
}

func TestSummaryNamesSkipsAndFailures(t *testing.T) {
	var out bytes.Buffer
	r := tally{out: &out, output: map[name][]string{}, passed: map[name]string{}}
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
		r.add(e)
	}
	r.label = "in a VM"
	for _, e := range []event{
		{Action: "pass", Package: "p", Test: "TestA"},
		{Action: "output", Package: "p", Test: "TestD", Output: "    x_test.go:3: missing: ipvs\n"},
		{Action: "skip", Package: "p", Test: "TestD"},
		{Action: "pass", Package: "p", Test: "TestD"},
		{Action: "pass", Package: "s"},
	} {
		r.add(e)
	}
	r.summary()
	for _, want := range []string{
		"p TestB: x_test.go:3: missing: vxlan", "x_test.go:9: broken", "q: needs root", "does not build", "  r\n",
		"but\n  in a VM: p TestD\n", "pass s in a VM",
		"\n2 passed, 2 failed, 2 skipped\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, out.String())
		}
	}
}
