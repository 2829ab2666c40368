package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sluice/internal/model"
)

// TestCallsThatFailLoseNothing has the kernel refuse what the store asks of it, once,
// for a while, or for good. What was acknowledged stays, what was not does not show,
// and once the disk is well all is saved again.
func TestCallsThatFailLoseNothing(t *testing.T) {
	for _, call := range []string{"pwrite64", "fdatasync", "fsync", "ftruncate", "linkat", "renameat", "unlinkat"} {
		for _, fault := range []string{"EIO", "ENOSPC"} {
			// The first change makes 6 calls of the commonest kind, so some come before
			// the first file is there.
			for _, when := range []string{"1", "9", "2..12", "9+"} {
				t.Run(call+" "+fault+" "+when, func(t *testing.T) {
					if dir := os.Getenv(inChild); dir != "" {
						spoiled(t, dir, strings.HasSuffix(when, "+"))
						return
					}
					t.Parallel()
					dir := t.TempDir()
					out := strace(t, dir, "-o", "/dev/null", "-e", "trace="+call, "-e", "inject="+call+":error="+fault+":when="+when)
					want := map[string]string{}
					maybe := map[string]bool{} // the disk failed at the last moment: it may be there
					for line := range strings.Lines(out) {
						var k string
						if _, err := fmt.Sscanf(line, markPrefix+"saved %s", &k); err == nil {
							want["k/"+k] = k
						} else if _, err := fmt.Sscanf(line, markPrefix+"refused %s", &k); err == nil {
							maybe["k/"+k] = true
						}
					}
					s := open(t, filepath.Join(dir, "state.db"))
					got := load(t, s)
					for k := range maybe {
						if _, saved := want[k]; !saved {
							delete(got, k)
						}
					}
					if !maps.Equal(want, got) {
						t.Errorf("saved %d, found %d; %+v", len(want), len(got), s.Status())
					}
					put(t, s, "k", "after", "x")
				})
			}
		}
	}
}

// spoiled is the child of TestCallsThatFailLoseNothing. Calls are counted for each
// thread, and the writer may change its thread: the end of the faults shows only in
// changes that succeed.
func spoiled(t *testing.T, dir string, forGood bool) {
	s, err := Open(filepath.Join(dir, "state.db"), quiet)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	inRow := 0
	// A disk that others keep busy refuses nothing, but takes seconds; until it answers,
	// changes are refused at once.
	deadline := time.Now().Add(time.Minute)
	for i := 0; i < 25 || !forGood && inRow < 10 && time.Now().Before(deadline); i++ {
		k := fmt.Sprint(i)
		err := s.Commit(t.Context(), []model.Record{rec("k", k, []byte(k))}, nil)
		if err == nil {
			want["k/"+k] = k
			mark("saved %s", k)
			inRow++
		} else {
			inRow = 0
			mark("refused %s", k)
			late := errors.Is(err, context.DeadlineExceeded) // a machine that is busy: the disk has refused nothing
			if !late && !strings.Contains(err.Error(), "free space") && !strings.Contains(err.Error(), "kernel's log") {
				t.Errorf("the error does not say what to do: %v", err)
			}
			if !late && s.Status().Trouble == nil {
				t.Error("status does not tell")
			}
			time.Sleep(10 * time.Millisecond) // between two looks
		}
		if got := load(t, s); !maps.Equal(want, got) {
			t.Errorf("after change %d: %d records are visible, want %d", i, len(got), len(want))
		}
	}
	if !forGood && (inRow < 10 || s.Status().Trouble != nil) {
		t.Errorf("it did not heal: %+v", s.Status())
	}
	if err := s.Close(); err != nil {
		t.Log(err) // a disk that fails may fail here too
	}
}

// TestADiskThatHangsHoldsUpNobody: of those that want something saved the first wait
// a second, the others not at all.
func TestADiskThatHangsHoldsUpNobody(t *testing.T) {
	if dir := os.Getenv(inChild); dir != "" {
		hanging(t, dir)
		return
	}
	t.Parallel() // it mostly waits
	// Far longer than anybody waits, so that the hang outlasts what is asked meanwhile on
	// a machine that is busy.
	strace(t, t.TempDir(), "-o", "/dev/null", "-e", "trace=fdatasync", "-e", fmt.Sprintf("inject=fdatasync:delay_enter=%d:when=4", hang.Microseconds()))
}

const hang = 8 * time.Second

func hanging(t *testing.T, dir string) {
	s, err := Open(filepath.Join(dir, "state.db"), quiet)
	if err != nil {
		t.Fatal(err)
	}
	var took time.Duration
	want := map[string]string{"k/after": "x"}
	for i := range 100 { // calls are counted for each thread, and the writer may change its thread
		start := time.Now()
		err = s.Commit(context.Background(), []model.Record{rec("k", fmt.Sprint(i), nil), rec("k", "last", fmt.Append(nil, i))}, nil)
		took = time.Since(start)
		if err != nil {
			break
		}
		want["k/"+fmt.Sprint(i)], want["k/last"] = "", fmt.Sprint(i)
	}
	if !errors.Is(err, context.DeadlineExceeded) || took > hang/2 {
		t.Fatalf("after %s: %v", took, err)
	}
	// The disk got the change a little later than the store, and is in trouble when it
	// has had its second too.
	tells(t, s, true, hang/2)
	if st := s.Status(); st.Since.IsZero() {
		t.Errorf("status does not tell since when: %+v", st)
	}
	err = s.Commit(t.Context(), []model.Record{rec("k", "next", nil)}, nil)
	if err == nil || !strings.Contains(err.Error(), "(it is waited for)") { // what is said by those that do not wait
		t.Error(err)
	}
	if err := s.Commit(t.Context(), nil, []model.RecordKey{key("k", "0")}); err != nil {
		t.Errorf("a removal: %v", err)
	}
	delete(want, "k/0")
	tells(t, s, false, 10*hang)
	// The writer's next call, if it is another thread's fourth, is delayed as well.
	for s.Commit(t.Context(), []model.Record{rec("k", "after", []byte("x"))}, nil) != nil { // the test's own deadline ends this
		tells(t, s, false, 10*hang)
	}
	wantLoad(t, s, want) // none of what was refused
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wantLoad(t, open(t, s.path), want)
}

// TestAStateDirectoryThatIsRemovedIsMadeAgain, also when nothing is asked for.
func TestAStateDirectoryThatIsRemovedIsMadeAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, filepath.Join(dir, "state.db"))
	put(t, s, "k", "a", "1")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	put(t, s, "k", "b", "2")
	wantLoad(t, reopen(t, s), map[string]string{"k/a": "1", "k/b": "2"})
}

// TestRemovalsAreNotRefusedAndTheStoreHealsByItself: removals are taken on a disk that takes nothing, and are made good by the
// store alone when it is well again: nobody asks for anything more.
func TestRemovalsAreNotRefusedAndTheStoreHealsByItself(t *testing.T) {
	t.Parallel() // it mostly waits
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, filepath.Join(dir, "state.db"))
	put(t, s, "k", "stays", "1")
	put(t, s, "k", "goes", "2")
	// What is in the way of every write, as it is not when a file system that is in
	// use is to be made read-only: a file where the directory was.
	if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), nil, []model.RecordKey{key("k", "goes")}); err != nil {
		t.Errorf("a removal was refused: %v", err)
	}
	want := map[string]string{"k/stays": "1"}
	wantLoad(t, s, want)
	if s.Status().Trouble == nil {
		t.Error("status does not tell that the file is behind")
	}
	if err := s.Commit(t.Context(), []model.Record{rec("k", "new", nil)}, []model.RecordKey{key("k", "stays")}); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("got %v", err)
	}
	wantLoad(t, s, want)

	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	healed(t, s)
	wantLoad(t, reopen(t, s), want)
}

// healed waits until the store has found out by itself that its disk is well.
func healed(t *testing.T, s *Store) {
	t.Helper()
	tells(t, s, false, 3*retryEvery)
}

// tells waits until the store says that it is in trouble, or that it is not.
func tells(t *testing.T, s *Store, trouble bool, limit time.Duration) {
	t.Helper()
	end := time.Now().Add(limit)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for (s.Status().Trouble != nil) != trouble {
		if time.Now().After(end) {
			t.Fatalf("after %s, status is %+v", limit, s.Status())
		}
		<-tick.C
	}
}

// TestASmallChangeDoesNotEndAFullDisk: the file may have room inside that the disk
// has not.
func TestASmallChangeDoesNotEndAFullDisk(t *testing.T) {
	inOwnMounts(t, func(t *testing.T, dir string) {
		s := open(t, filepath.Join(dir, "state.db"))
		put(t, s, "k", "a", "1")
		fill(t, filepath.Join(dir, "filler"))
		large := rec("k", "large", make([]byte, 100<<10))
		if err := s.Commit(t.Context(), []model.Record{large}, nil); err == nil {
			t.Fatal("there is room: this test proves nothing")
		}
		if err := tryRoom(s.path); !isErrno(err, syscall.ENOSPC) {
			t.Errorf("room was found: %v", err)
		}
		if left, err := filepath.Glob(s.path + ".new-*"); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	})
}

func TestAFileThatCanBeNeitherReadNorMovedDoesNotKeepTheNodeDown(t *testing.T) {
	t.Parallel() // it mostly waits
	inOwnMounts(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "state.db")
		if err := os.WriteFile(path, []byte("not a database"), 0o600); err != nil {
			t.Fatal(err)
		}
		remount(t, dir, syscall.MS_RDONLY)
		s := open(t, path)
		wantLoad(t, s, map[string]string{})
		if st := s.Status(); st.Trouble == nil || len(st.Damage) != 1 {
			t.Errorf("status %+v", st)
		}
		remount(t, dir, 0)
		healed(t, s)
		put(t, s, "k", "a", "1")
		s = reopen(t, s)
		wantLoad(t, s, map[string]string{"k/a": "1"})
		if !keeps(t, dir, []byte("not a database")) {
			t.Error("the file is lost")
		}
	})
}
