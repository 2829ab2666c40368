package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bolt "go.etcd.io/bbolt"

	"sluice/internal/model"
)

func rec(kind, key string, value []byte) model.Record {
	return model.Record{Kind: kind, Key: key, Value: value}
}

func key(kind, key string) model.RecordKey { return model.RecordKey{Kind: kind, Key: key} }

func logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func open(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(path, logger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func reopen(t testing.TB, s *Store) *Store {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, s.path)
}

func put(t testing.TB, s *Store, kind, name, value string) {
	t.Helper()
	if err := s.Commit(t.Context(), []model.Record{rec(kind, name, []byte(value))}, nil); err != nil {
		t.Fatal(err)
	}
}

func load(t testing.TB, s *Store) map[string]string {
	t.Helper()
	rs, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, r := range rs {
		out[r.Kind+"/"+r.Key] = string(r.Value)
	}
	return out
}

func wantLoad(t testing.TB, s *Store, want map[string]string) {
	t.Helper()
	if d := cmp.Diff(want, load(t, s)); d != "" {
		t.Errorf("content (-want +got):\n%s", d)
	}
}

func TestWhatWasCommittedIsThereAfterReopening(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "deep", "er", "state.db"))
	put(t, s, "network", "n1", "one")
	err := s.Commit(t.Context(),
		[]model.Record{rec("network", "n2", []byte("two")), rec("lease", "10.0.0.2", nil)},
		[]model.RecordKey{key("network", "n1"), key("network", "never was")})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"network/n2": "two", "lease/10.0.0.2": ""}
	wantLoad(t, s, want)
	s = reopen(t, s)
	wantLoad(t, s, want)
	if st := s.Status(); st.Damage != nil || st.Kept != nil || st.Trouble != nil || st.Records != 2 {
		t.Errorf("status %+v", st)
	}
}

func TestLoadIsOrderedAndValuesAreNeverNil(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	if err := s.Commit(t.Context(), []model.Record{rec("b", "1", []byte("value")), rec("a", "2", nil), rec("a", "1", nil)}, nil); err != nil {
		t.Fatal(err)
	}
	rs, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []model.Record{rec("a", "1", []byte{}), rec("a", "2", []byte{}), rec("b", "1", []byte("value"))}
	if d := cmp.Diff(want, rs); d != "" {
		t.Error(d)
	}
}

func TestBadRecordsAreRefusedWhole(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	good := rec("network", "n", nil)
	for name, r := range map[string]model.Record{
		"no kind": rec("", "k", nil), "no key": rec("k", "", nil), "NUL": rec("a\x00b", "k", nil),
		"long key": rec("k", strings.Repeat("x", maxName+1), nil), "long value": rec("k", "k", make([]byte, maxValue+1)),
	} {
		if err := s.Commit(t.Context(), []model.Record{good, r}, nil); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	wantLoad(t, s, map[string]string{})
	// The largest that is allowed is stored and read back.
	big := rec(strings.Repeat("k", maxName), strings.Repeat("x", maxName), bytes.Repeat([]byte("v"), maxValue))
	if err := s.Commit(t.Context(), []model.Record{big}, nil); err != nil {
		t.Fatal(err)
	}
	want := load(t, s)
	wantLoad(t, reopen(t, s), want)
}

func TestAChangeThatChangesNothingIsNotWritten(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "a", "1")
	before, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	put(t, s, "k", "a", "1")
	if err := s.Commit(t.Context(), nil, []model.RecordKey{key("k", "absent")}); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(s.path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("the file changed")
	}
}

func TestConcurrentCommitsAllBecomeDurable(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	want := map[string]string{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for g := range 32 {
		wg.Go(func() {
			for i := range 20 {
				k, value := fmt.Sprintf("%d-%d", g, i), fmt.Sprintf("v%d", i)
				if err := s.Commit(t.Context(), []model.Record{rec("k", k, []byte(value))}, nil); err != nil {
					t.Error(err)
					return
				}
				if i%3 == 0 {
					if err := s.Commit(t.Context(), nil, []model.RecordKey{key("k", k)}); err != nil {
						t.Error(err)
					}
					continue
				}
				mu.Lock()
				want["k/"+k] = value
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	wantLoad(t, s, want)
	wantLoad(t, reopen(t, s), want)
}

func TestASecondProcessIsToldThatTheFileIsInUse(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	start := time.Now()
	_, err := Open(s.path, logger(t))
	if !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), s.path) {
		t.Fatalf("got %v, want ErrLocked", err)
	}
	if took := time.Since(start); took > 2*lockWait {
		t.Errorf("took %s", took)
	}
	put(t, s, "k", "a", "still works")
}

func TestOpenWaitsForThePredecessor(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "a", "1")
	opened := make(chan error, 1)
	var next *Store
	go func() {
		var err error
		next, err = Open(s.path, slog.New(slog.DiscardHandler))
		opened <- err
	}()
	select {
	case err := <-opened:
		t.Fatalf("opened beside another: %v", err)
	case <-time.After(3 * lockRetry):
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = next.Close() })
	wantLoad(t, next, map[string]string{"k/a": "1"})
}

func TestANewerFormatIsRefusedAndLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path)
	put(t, s, "k", "a", "1")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keyFormat, seal(keyFormat, []byte("2")))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(path, logger(t))
	if !errors.Is(err, ErrNewer) {
		t.Fatalf("got %v, want ErrNewer", err)
	}
	after, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the file was touched: %v", err)
	}
}

func TestAfterCloseNothingIsAccepted(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "a", "1")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), []model.Record{rec("k", "b", nil)}, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("commit after close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	wantLoad(t, s, map[string]string{"k/a": "1"})
}

func TestACommitWhoseContextEndedIsNotWritten(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 50 { // select picks at random; whichever it picks, the answer must be true
		err := s.Commit(ctx, []model.Record{rec("k", "a", []byte("1"))}, nil)
		if _, there := load(t, s)["k/a"]; err == nil && !there {
			t.Fatal("answered success, but the record is not there")
		}
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
}

func TestAFileThatIsRemovedWhileInUseIsWrittenAgain(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "a", "1")
	if err := os.Remove(s.path); err != nil {
		t.Fatal(err)
	}
	put(t, s, "k", "b", "2")
	wantLoad(t, reopen(t, s), map[string]string{"k/a": "1", "k/b": "2"})
}

func TestAForeignFilePutInPlaceIsKeptAside(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	put(t, s, "k", "a", "1")
	if err := os.Remove(s.path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, s, "k", "b", "2")
	kept, err := os.ReadFile(s.path + ".damaged-1")
	if err != nil || string(kept) != "precious" {
		t.Errorf("kept %q, %v", kept, err)
	}
	wantLoad(t, reopen(t, s), map[string]string{"k/a": "1", "k/b": "2"})
}

// A file that is cut short while it is mapped faults at the next touch. The
// store must survive that and write everything again.
func TestAFileCutShortWhileInUseHealsFromMemory(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	want := map[string]string{}
	for i := range 300 {
		key, value := fmt.Sprint(i), strings.Repeat("v", 100)
		put(t, s, "k", key, value)
		want["k/"+key] = value
	}
	if err := os.Truncate(s.path, 0); err != nil {
		t.Fatal(err)
	}
	put(t, s, "k", "after", "x")
	want["k/after"] = "x"
	wantLoad(t, s, want)
	if st := s.Status(); len(st.Damage) == 0 || len(st.Kept) != 1 || st.Trouble != nil {
		t.Errorf("status %+v", st)
	}
	wantLoad(t, reopen(t, s), want)
}

func TestLeftOversOfAnInterruptedStartAreRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	if err := os.WriteFile(path+".new-123", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, path)
	left, err := filepath.Glob(path + "*")
	if err != nil || len(left) != 1 {
		t.Errorf("left %v, %v", left, err)
	}
}

func BenchmarkCommit(b *testing.B) {
	value := bytes.Repeat([]byte("v"), 300)
	for _, filled := range []int{0, 10000} {
		s := open(b, filepath.Join(b.TempDir(), "state.db"))
		var rs []model.Record
		for i := range filled {
			rs = append(rs, rec("lease", fmt.Sprintf("10.%d.%d.1", i/256, i%256), value))
		}
		if err := s.Commit(b.Context(), rs, nil); err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprintf("alone/%d", filled), func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				if err := s.Commit(b.Context(), []model.Record{rec("k", fmt.Sprint(i%500), fmt.Append(nil, i))}, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("together64/%d", filled), func(b *testing.B) {
			b.SetParallelism(32) // of 2 processors: 64 callers
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i++ {
					if err := s.Commit(b.Context(), []model.Record{rec("k", fmt.Sprint(i%500), fmt.Append(value, i))}, nil); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}
