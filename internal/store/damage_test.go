package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"sluice/internal/model"
)

var quiet = slog.New(slog.DiscardHandler)

// history is a state file after some life: with free pages, an overflow page and
// a tree of more than one level.
type history struct {
	old, new         []byte // the file before and after the last change
	oldSet, newSet   map[string]string
	pageSize, offset int
}

func live(t testing.TB) history {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	s, err := Open(path, quiet)
	if err != nil {
		t.Fatal(err)
	}
	commit := func(puts []model.Record, deletes []model.RecordKey) {
		if err := s.Commit(t.Context(), puts, deletes); err != nil {
			t.Fatal(err)
		}
	}
	var many []model.Record
	for i := range 100 {
		many = append(many, rec("lease", fmt.Sprint(i), bytes.Repeat([]byte{byte(i)}, 100)))
	}
	commit(many, nil)
	commit([]model.Record{rec("key", "large", bytes.Repeat([]byte("L"), 9000))}, nil)
	commit(nil, []model.RecordKey{key("lease", "7"), key("lease", "8")})
	h := history{oldSet: load(t, s), pageSize: os.Getpagesize()}
	if h.old, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	commit([]model.Record{rec("network", "n", []byte("new")), rec("lease", "1", []byte("changed"))}, []model.RecordKey{key("lease", "9")})
	h.newSet = load(t, s)
	if h.new, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return h
}

// opened opens file, however broken, and tells what was made of it. It fails the
// test if the outcome is not one of: the old state, the new state, either less
// lost records, or the whole file kept aside byte for byte; or if the
// store does not work afterwards.
func (h history) opened(t testing.TB, what string, file []byte) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(path, quiet)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	got, st := load(t, s), s.Status()
	lost := 0
	for _, d := range st.Damage {
		lost += len(d.Records)
	}
	outcome := ""
	switch {
	case lost == 0 && len(st.Kept) == 1:
		outcome = "kept aside"
		if kept, err := os.ReadFile(st.Kept[0]); err != nil || !bytes.Equal(kept, file) {
			t.Errorf("%s: the kept file differs from the damaged one: %v", what, err)
		}
		if len(got) != 0 || len(st.Damage) == 0 {
			t.Errorf("%s: kept aside, yet %d records, damage %v", what, len(got), st.Damage)
		}
	case maps.Equal(got, h.newSet):
		outcome = "new"
	case maps.Equal(got, h.oldSet):
		outcome = "old"
	case lost > 0 && len(st.Kept) == 1 && (subset(got, h.newSet, lost) || subset(got, h.oldSet, lost)):
		outcome = "salvaged"
	default:
		t.Errorf("%s: %d records that never were a state; damage %v", what, len(got), st.Damage)
	}
	got["after/x"] = "y"
	if err := s.Commit(t.Context(), []model.Record{rec("after", "x", []byte("y"))}, nil); err != nil {
		t.Errorf("%s: commit afterwards: %v", what, err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("%s: close: %v", what, err)
	}
	again, err := Open(path, quiet)
	if err != nil {
		t.Fatalf("%s: second open: %v", what, err)
	}
	if !maps.Equal(load(t, again), got) {
		t.Errorf("%s: content after reopening differs", what)
	}
	if err := again.Close(); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
	return outcome
}

func subset(got, of map[string]string, lost int) bool {
	for k, v := range got {
		if w, ok := of[k]; !ok || v != w {
			return false
		}
	}
	return len(got)+lost == len(of)
}

func TestAFileCutAtEachPageBoundaryIsKeptAside(t *testing.T) {
	h := live(t)
	used := 0
	for n := 0; n <= len(h.new); n += h.pageSize / 2 {
		if got := h.opened(t, fmt.Sprintf("cut at %d of %d", n, len(h.new)), h.new[:n]); got == "new" {
			used++
		} else if got != "kept aside" {
			t.Errorf("cut at %d: %s", n, got)
		}
	}
	t.Logf("%d cuts, %d of them behind the last used page", 1+2*len(h.new)/h.pageSize, used)
}

// bbolt writes data pages in any order, syncs, and then writes one meta page. A
// power loss leaves any subset of the data pages, in whole sectors, and the meta
// page only if the data was synced.
func TestAPowerLossLeavesTheOldStateOrTheNew(t *testing.T) {
	h := live(t)
	var changed []int // sectors of 512 bytes, the unit a disk writes whole
	h.old = append(h.old, make([]byte, len(h.new)-len(h.old))...)
	for at := 2 * h.pageSize; at < len(h.new); at += 512 {
		if !bytes.Equal(h.old[at:at+512], h.new[at:at+512]) {
			changed = append(changed, at)
		}
	}
	if len(changed) < 4 {
		t.Fatalf("only %d sectors differ", len(changed))
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		file := bytes.Clone(h.old)
		for _, at := range changed {
			if i > 0 && rnd.IntN(2) == 0 {
				copy(file[at:at+512], h.new[at:at+512])
			}
		}
		if got := h.opened(t, fmt.Sprintf("before the meta page, round %d", i), file); got != "old" {
			t.Errorf("round %d: %s", i, got)
		}
	}
	if got := h.opened(t, "all written", h.new); got != "new" {
		t.Errorf("all written: %s", got)
	}
}

func TestAPowerLossDuringTheFirstStartStartsAfresh(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.db")
	if err := createFile(path); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(whole); n += 512 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err := os.WriteFile(path+".new-1", whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(path, quiet)
		if err != nil {
			t.Fatal(err)
		}
		if st := s.Status(); st.Damage != nil || st.Kept != nil {
			t.Errorf("cut at %d: an interrupted first start counts as damage: %+v", n, st)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestEveryFlippedBitIsFound(t *testing.T) {
	h := live(t)
	outcomes := map[string]int{}
	rnd := rand.New(rand.NewPCG(3, 4))
	step := 211 // a prime, so that all offsets in a page come up; page headers are gone over below
	if testing.Short() {
		step = 1999
	}
	for at := rnd.IntN(step); at < len(h.new); at += step {
		file := bytes.Clone(h.new)
		file[at] ^= 1 << rnd.IntN(8)
		outcomes[h.opened(t, fmt.Sprintf("bit in byte %d", at), file)]++
	}
	for page := 0; page < len(h.new); page += h.pageSize * (1 + step/1000) {
		for at := page; at < page+32; at++ {
			file := bytes.Clone(h.new)
			file[at] ^= 1 << rnd.IntN(8)
			outcomes[h.opened(t, fmt.Sprintf("bit in byte %d", at), file)]++
		}
	}
	t.Log(outcomes)
	for _, o := range []string{"kept aside", "salvaged", "new"} {
		if outcomes[o] == 0 {
			t.Errorf("no flip led to %q: the test does not test it", o)
		}
	}
}

func TestAPageOfZerosOrOfAnotherPageIsFound(t *testing.T) {
	h := live(t)
	outcomes := map[string]int{}
	for to := 0; to < len(h.new); to += h.pageSize {
		file := bytes.Clone(h.new)
		clear(file[to : to+h.pageSize])
		outcomes[h.opened(t, fmt.Sprintf("zeros at %d", to), file)]++
		for from := 0; from < len(h.new); from += h.pageSize {
			file := bytes.Clone(h.new)
			copy(file[to:to+h.pageSize], h.new[from:])
			outcomes[h.opened(t, fmt.Sprintf("page at %d over %d", from, to), file)]++
		}
		// A write that was acknowledged and never reached the disk.
		if to < len(h.old) {
			file = bytes.Clone(h.new)
			copy(file[to:to+h.pageSize], h.old[to:])
			outcomes[h.opened(t, fmt.Sprintf("lost write at %d", to), file)]++
		}
	}
	t.Log(outcomes)
}

func TestAFlippedValueIsNotBelievedAndTheRestIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	s := open(t, path)
	put(t, s, "k", "good", "fine")
	put(t, s, "k", "bad", "MARKER")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(file, []byte("MARKER"), []byte("MARKEd")), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	wantLoad(t, s, map[string]string{"k/good": "fine"})
	st := s.Status()
	if len(st.Damage) != 1 || len(st.Damage[0].Records) != 1 || !strings.Contains(st.Damage[0].Records[0], "bad") {
		t.Errorf("damage %+v", st.Damage)
	}
	put(t, s, "k", "bad", "again")
	s = reopen(t, s)
	wantLoad(t, s, map[string]string{"k/good": "fine", "k/bad": "again"})
	if d := s.Status().Damage; d != nil {
		t.Errorf("found again: %+v", d)
	}
	if file, err = os.ReadFile(path + ".damaged-1"); err != nil || !bytes.Contains(file, []byte("MARKEd")) {
		t.Errorf("the damaged file is gone: %v", err)
	}
}

func TestForeignThingsAtThePathAreKeptAside(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"text":      func(p string) error { return os.WriteFile(p, []byte("hello"), 0o600) },
		"empty":     func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"zeros":     func(p string) error { return os.WriteFile(p, make([]byte, 1<<16), 0o600) },
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"other bbolt database": func(p string) error {
			db, err := bolt.Open(p, 0o600, nil)
			if err != nil {
				return err
			}
			return errors.Join(db.Update(func(tx *bolt.Tx) error {
				_, err := tx.CreateBucket([]byte("theirs"))
				return err
			}), db.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.db")
			// One that is there already must survive.
			if err := os.WriteFile(path+".damaged-1", []byte("earlier"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := make(path); err != nil {
				t.Fatal(err)
			}
			s := open(t, path)
			put(t, s, "k", "a", "1")
			st := s.Status()
			if len(st.Kept) != 2 || len(st.Damage) != 1 || st.Damage[0].File != path+".damaged-2" || st.Damage[0].Reason == "" {
				t.Errorf("status %+v", st)
			}
			if b, err := os.ReadFile(path + ".damaged-1"); err != nil || string(b) != "earlier" {
				t.Errorf("the earlier one: %q, %v", b, err)
			}
		})
	}
}

// A sound file must never be taken for a damaged one. Random lives of a file,
// through sizes from an inline bucket to a tree of three levels.
func TestVerifyAcceptsWhateverBoltWrites(t *testing.T) {
	rounds := 24
	if testing.Short() {
		rounds = 4
	}
	for seed := range uint64(rounds) {
		rnd := rand.New(rand.NewPCG(seed, 9))
		path := filepath.Join(t.TempDir(), "state.db")
		s, err := Open(path, quiet)
		if err != nil {
			t.Fatal(err)
		}
		keys := 1 + rnd.IntN([]int{5, 50, 500, 5000}[seed%4])
		for range 30 {
			var puts []model.Record
			var deletes []model.RecordKey
			for range 1 + rnd.IntN(keys) {
				k := fmt.Sprint(rnd.IntN(keys))
				if rnd.IntN(2) == 0 {
					puts = append(puts, rec("k", k, make([]byte, rnd.IntN(400))))
				} else {
					deletes = append(deletes, key("k", k))
				}
			}
			if rnd.IntN(10) == 0 {
				for i := range keys {
					deletes = append(deletes, key("k", fmt.Sprint(i)))
				}
			}
			if err := s.Commit(t.Context(), puts, deletes); err != nil {
				t.Fatal(err)
			}
			file, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if found, err := verify(bytes.NewReader(file), int64(len(file))); err != nil || found.lostMeta != nil {
				t.Fatalf("seed %d: %v, %v", seed, err, found.lostMeta)
			}
		}
		want := load(t, s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s, err = Open(path, quiet)
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(want, load(t, s)) || s.Status().Damage != nil {
			t.Errorf("seed %d: differs after reopening: %v", seed, s.Status().Damage)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// What verify lets pass, bbolt must be able to read, check and write without a
// fault. Seeds are real files; the fuzzer's changes are bytes at offsets, with
// the meta pages' checksums made good, so that it gets behind them.
func FuzzVerifiedFilesAreSafeForBolt(f *testing.F) {
	h := live(f)
	f.Add(uint32(h.pageSize*2+8), []byte{2}, uint32(h.pageSize*3), []byte{0, 1})
	f.Add(uint32(16+40), []byte{9}, uint32(16), []byte{})
	f.Fuzz(func(t *testing.T, at1 uint32, b1 []byte, at2 uint32, b2 []byte) {
		file := bytes.Clone(h.new)
		copy(file[int(at1)%len(file):], b1)
		copy(file[int(at2)%len(file):], b2)
		if _, err := verify(bytes.NewReader(file), int64(len(file))); err != nil {
			return
		}
		path := filepath.Join(t.TempDir(), "db")
		if err := os.WriteFile(path, file, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.Open(path, 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		// bbolt's own check looks at the headers of both meta pages, of which one may
		// be lost; two changes write both.
		for range 2 {
			if err := db.Update(fillAndEmpty); err != nil {
				t.Error(err)
			}
		}
		err = db.View(func(tx *bolt.Tx) error {
			for err := range tx.Check() {
				t.Errorf("bbolt's own check: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func fillAndEmpty(tx *bolt.Tx) error {
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
		for i := range 50 {
			if err := b.Put(fmt.Append(nil, "fuzz", i), make([]byte, 200)); err != nil {
				return err
			}
		}
		c := b.Cursor()
		for k, _ := c.First(); k != nil; k, _ = c.Next() {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
}

func TestVerifyReportsReadErrors(t *testing.T) {
	if _, err := verify(failing{}, 1<<16); err == nil {
		t.Error("accepted what cannot be read")
	}
	if _, err := verify(bytes.NewReader(nil), maxFile+1); err == nil {
		t.Error("accepted a file of any size")
	}
}

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, io.ErrUnexpectedEOF }

func TestOpenHonoursItsContextInTheLockWait(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "state.db"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := openFile(ctx, s.path, false); !errors.Is(err, ErrLocked) {
		t.Errorf("got %v", err)
	}
}
