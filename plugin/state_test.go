package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"sluice/internal/model"
	"sluice/internal/store"
)

func TestTheStateFilesTroubleIsToldWithWhereAndWhatToDo(t *testing.T) {
	const dir = "/var/lib/docker/plugins/x/propagated-mount"
	if ps := stateProblems(store.Status{Records: 3}, dir); ps != nil {
		t.Errorf("nothing is wrong, yet %+v", ps)
	}
	ps := stateProblems(store.Status{
		Damage:  []store.Damage{{Reason: "cut short", File: "/var/lib/sluice/state.db.damaged-1"}},
		Trouble: errors.New("no space left on device; free space"), Since: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}, dir)
	if len(ps) != 2 {
		t.Fatalf("%+v", ps)
	}
	for i, words := range [][]string{
		{"damaged", "cut short", "state.db.damaged-1"},
		{"cannot be saved", "03:04:05", "no space left", "free space"},
	} {
		for _, w := range words {
			if !strings.Contains(ps[i].What, w) {
				t.Errorf("%q lacks %q", ps[i].What, w)
			}
		}
		if !strings.Contains(ps[i].Do, dir) {
			t.Errorf("what to do does not say where: %q", ps[i].Do)
		}
	}
}

func TestANodeWhoseRecordsMayBeIncompleteIsBlank(t *testing.T) {
	some := []model.Record{{Kind: "self", Key: "self"}}
	for name, c := range map[string]struct {
		records []model.Record
		st      store.Status
		want    bool
	}{
		"all is well":         {some, store.Status{}, false},
		"first start":         {nil, store.Status{}, true},
		"a damaged file":      {some, store.Status{Damage: []store.Damage{{}}}, true},
		"a disk that is full": {some, store.Status{Trouble: errors.New("full")}, true},
	} {
		if got := blank(c.records, c.st); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}
