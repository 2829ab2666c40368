package store

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"sluice/internal/model"
)

// lateChange hands a change to the writer whose caller has given up already.
func lateChange(t *testing.T, s *Store, puts []model.Record, deletes ...model.RecordKey) {
	t.Helper()
	c, err := newChange(puts, deletes)
	if err != nil {
		t.Fatal(err)
	}
	c.settled.Store(true)
	s.queue <- c
}

// TestWhatCameTooLateIsTakenBack: who was told of an error goes on without, so none of
// it stays, be it new, or in the place of something, or the end of something.
func TestWhatCameTooLateIsTakenBack(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "a", "1")
	put(t, s, "k", "b", "")
	lateChange(t, s, []model.Record{rec("k", "a", []byte("2")), rec("k", "new", nil)}, key("k", "b"))
	put(t, s, "k", "after", "x")
	put(t, s, "k", "after", "y") // the first may have shared the transaction, and was answered before it was put right
	want := map[string]string{"k/a": "1", "k/b": "", "k/after": "y"}
	wantLoad(t, s, want)
	wantLoad(t, reopen(t, s), want)
}

// TestLateOnesAmongOthers: those that share a transaction with what came too late keep
// what they were told.
func TestLateOnesAmongOthers(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "all", "0")
	want := map[string]string{"k/all": "0"}
	for i := range 20 {
		var wg sync.WaitGroup
		for n := range 4 {
			mine := fmt.Sprintf("%d-%d", i, n)
			want["k/"+mine] = mine
			wg.Go(func() {
				if err := s.Commit(t.Context(), []model.Record{rec("k", mine, []byte(mine))}, nil); err != nil {
					t.Error(err)
				}
			})
			wg.Go(func() { lateChange(t, s, []model.Record{rec("k", "all", []byte(mine)), rec("k", "late"+mine, nil)}) })
		}
		wg.Wait()
	}
	put(t, s, "k", "after", "x")
	put(t, s, "k", "after", "y") // as above
	want["k/after"] = "y"
	wantLoad(t, s, want)
	wantLoad(t, reopen(t, s), want)
}

// TestARemovalIsOwedByADiskThatHangs: it is refused to nobody, and written before what
// comes later, also if nothing does but the end.
func TestARemovalIsOwedByADiskThatHangs(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	hang := func() { s.atWork(time.Now().Add(-2 * patience)) }
	remove := func(name string) {
		t.Helper()
		if err := s.Commit(t.Context(), nil, []model.RecordKey{key("k", name)}); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"a", "b", "c"} {
		put(t, s, "k", name, "1")
	}
	hang()
	remove("a")
	remove("b")
	if err := s.Commit(t.Context(), []model.Record{rec("k", "no", nil)}, []model.RecordKey{key("k", "c")}); err == nil {
		t.Error("a record was taken that cannot be written")
	}
	s.atWork(time.Time{})
	put(t, s, "k", "a", "2") // asked for after its removal
	want := map[string]string{"k/a": "2", "k/c": "1"}
	wantLoad(t, s, want)
	hang()
	remove("c")
	delete(want, "k/c")
	wantLoad(t, reopen(t, s), want)
}
