package model

import (
	"slices"
	"strings"
	"testing"
)

func TestSchedulersThatCountConnectionsNeedIPVS(t *testing.T) {
	var counting, others []string
	for _, s := range Schedulers() {
		if s.Doc == "" || strings.Contains(s.Doc, "|") {
			t.Errorf("%s: %q is no text for a table", s.Name, s.Doc)
		}
		if NeedsIPVS(s.Name) {
			counting = append(counting, s.Name)
		} else {
			others = append(others, s.Name)
		}
	}
	if want := strings.Fields("lc wlc sed nq lblc lblcr ovf"); !slices.Equal(counting, want) {
		t.Errorf("%v need ip_vs, want %v", counting, want)
	}
	if want := strings.Fields("rr wrr sh dh fo mh"); !slices.Equal(others, want) {
		t.Errorf("%v do not need ip_vs, want %v", others, want)
	}
	if NeedsIPVS("") || NeedsIPVS("fastest") {
		t.Error("what is no scheduler needs nothing")
	}
}
