package store

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"sluice/internal/model"
)

// platter is a directory on a disk that may lose its power: what a sync has
// promised, and what may or may not be there after it.
//
// It is crueller than file systems are: of what is not synced, any sectors of any
// writes may be there, in any order; a file's new size may be missing although its
// data is there; the directory's changes may be there in any choice, and are never
// by a sync of a file.
type platter struct {
	names map[string]*file // durable
	moves []move           // since the directory was synced
	open  map[int]*file
}

type file struct {
	durable []byte
	pending []call // pwrite64 and ftruncate
}

// move is one change of the directory: drop goes, and name is given to file.
type move struct {
	drop, name string
	file       *file
}

const sector = 512 // bytes: what a disk writes whole

func newPlatter(files map[string][]byte) *platter {
	p := &platter{names: map[string]*file{}, open: map[int]*file{}}
	for name, b := range files {
		p.names[name] = &file{durable: bytes.Clone(b)}
	}
	return p
}

// now is the directory as a process sees it.
func (p *platter) now() map[string]*file {
	out := maps.Clone(p.names)
	for _, m := range p.moves {
		m.apply(out)
	}
	return out
}

func (m move) apply(names map[string]*file) {
	if m.drop != "" {
		delete(names, m.drop)
	}
	if m.name != "" {
		names[m.name] = m.file
	}
}

// do takes a call that was done, and reports whether it was one that writes.
func (p *platter) do(t *testing.T, c call) bool {
	t.Helper()
	switch c.op {
	case "open":
		f := p.now()[c.name]
		if f == nil && c.create {
			f = &file{}
			p.moves = append(p.moves, move{name: c.name, file: f})
		}
		if f == nil && c.name != "." {
			t.Fatalf("opened %s, which is not there", c.name)
		}
		p.open[c.fd] = f
		return c.create
	case "close":
		delete(p.open, c.fd)
		return false
	case "link":
		p.moves = append(p.moves, move{name: c.to, file: p.now()[c.name]})
	case "rename":
		p.moves = append(p.moves, move{drop: c.name, name: c.to, file: p.now()[c.name]})
	case "unlink":
		p.moves = append(p.moves, move{drop: c.name})
	case "sync":
		if c.name == "." {
			p.names, p.moves = p.now(), nil
			return true
		}
		f := p.open[c.fd]
		f.durable, f.pending = f.content(func() bool { return true }), nil
	case "pwrite64", "ftruncate":
		f := p.open[c.fd]
		f.pending = append(f.pending, c)
	}
	return true
}

// content is the file with those of its pending sectors that there says.
func (f *file) content(there func() bool) []byte {
	b := bytes.Clone(f.durable)
	grow := func(n int) {
		if n > len(b) {
			b = append(b, make([]byte, n-len(b))...)
		}
	}
	for _, c := range f.pending {
		if c.op == "ftruncate" {
			if there() {
				grow(int(c.at))
				b = b[:c.at]
			}
			continue
		}
		for i := 0; i < len(c.data); i += sector {
			if there() {
				part := c.data[i:min(i+sector, len(c.data))]
				grow(int(c.at) + i + len(part))
				copy(b[int(c.at)+i:], part)
			}
		}
	}
	return b
}

// lose writes into dir what is left after a power loss in this moment.
func (p *platter) lose(t *testing.T, dir string, rnd *rand.Rand, often int) {
	t.Helper()
	there := func() bool { return rnd.IntN(4) < often } // 0 never, 4 always
	names := maps.Clone(p.names)
	for _, m := range p.moves {
		if there() {
			m.apply(names)
		}
	}
	// One content for each file, whatever the number of its names.
	contents := map[*file][]byte{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		f := names[name]
		if _, done := contents[f]; !done {
			b := f.content(there)
			if often < 4 && len(b) > len(f.durable) && rnd.IntN(4) == 0 {
				b = b[:len(f.durable)]
			}
			contents[f] = b
		}
		if err := os.WriteFile(filepath.Join(dir, name), contents[f], 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// step is one change of a workload.
type step struct {
	puts    []model.Record
	deletes []model.RecordKey
}

// steps are changes as a node makes them: mostly small, some that make the file
// grow, and removals that free pages for the next.
func steps(seed uint64, n int) []step {
	rnd := rand.New(rand.NewPCG(seed, 1))
	out := make([]step, n)
	for i := range out {
		for range 1 + rnd.IntN(4) {
			size := rnd.IntN(300)
			if rnd.IntN(6) == 0 {
				size = rnd.IntN(12000)
			}
			value := bytes.Repeat([]byte{byte(i + 1)}, size)
			out[i].puts = append(out[i].puts, rec("k", strconv.Itoa(rnd.IntN(40)), value))
		}
		for range rnd.IntN(3) {
			out[i].deletes = append(out[i].deletes, key("k", strconv.Itoa(rnd.IntN(40))))
		}
	}
	return out
}

// states are the contents before the first step, and after each.
func states(before map[string]string, steps []step) []map[string]string {
	out := []map[string]string{before}
	for _, s := range steps {
		now := maps.Clone(out[len(out)-1])
		for _, r := range s.puts {
			now[r.Kind+"/"+r.Key] = string(r.Value)
		}
		for _, k := range s.deletes {
			delete(now, k.Kind+"/"+k.Key)
		}
		out = append(out, now)
	}
	return out
}

// liveSteps does the steps in the child, with a restart in the middle.
func liveSteps(t *testing.T, dir string, all []step) {
	t.Helper()
	s := open(t, filepath.Join(dir, "state.db"))
	for i, st := range all {
		if i == len(all)/2 {
			s = reopen(t, s)
		}
		mark("begin %d", i+1)
		if err := s.Commit(t.Context(), st.puts, st.deletes); err != nil {
			t.Fatal(err)
		}
		mark("done %d", i+1)
	}
}

// TestAPowerLossAtAnyMomentLosesNothing replays what the store asked of the kernel
// up to each moment, loses the power there, and opens what is left: all that was
// acknowledged must be in it, and nothing that never was a state.
func TestAPowerLossAtAnyMomentLosesNothing(t *testing.T) {
	seed := rand.Uint64()
	if text := os.Getenv("SLUICE_STORE_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	good := map[string]string{"k/0": "fine", "k/1": "fine too"}
	for _, w := range []struct {
		name    string
		steps   int
		before  map[string]string // what is known at the start
		file    func(t *testing.T) []byte
		damaged bool // that the file was damaged may be told
	}{
		{"first start", 30, map[string]string{}, nil, false},
		{"a record is damaged", 2, good, func(t *testing.T) []byte {
			return bytes.ReplaceAll(stateFile(t, good, rec("k", "bad", []byte("MARKER"))), []byte("MARKER"), []byte("MARKEd"))
		}, true},
		{"the file is damaged", 2, map[string]string{}, func(t *testing.T) []byte { return stateFile(t, good)[:8192] }, true},
	} {
		t.Run(w.name, func(t *testing.T) {
			if dir := os.Getenv(inChild); dir != "" {
				seed, err := strconv.ParseUint(os.Getenv("SLUICE_STORE_TEST_SEED"), 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				liveSteps(t, dir, steps(seed, w.steps))
				return
			}
			t.Setenv("SLUICE_STORE_TEST_SEED", strconv.FormatUint(seed, 10))
			dir, trace := t.TempDir(), filepath.Join(t.TempDir(), "trace")
			before := map[string][]byte{}
			if w.file != nil {
				before["state.db"] = w.file(t)
				if err := os.WriteFile(filepath.Join(dir, "state.db"), before["state.db"], 0o600); err != nil {
					t.Fatal(err)
				}
			}
			strace(t, dir, "-xx", "-s", "1048576", "-o", trace, "-e", traced)

			all := states(w.before, steps(seed, w.steps))
			disk, rnd := newPlatter(before), rand.New(rand.NewPCG(seed, 2))
			begun, done, points, images := 0, 0, 0, 0
			for _, c := range readTrace(t, trace, dir) {
				if c.op == "mark" {
					var n int
					if _, err := fmt.Sscanf(c.mark, "begin %d", &n); err == nil {
						begun = n
					} else if _, err := fmt.Sscanf(c.mark, "done %d", &n); err == nil {
						done = n
					}
					continue
				}
				if !disk.do(t, c) {
					continue
				}
				points++
				chances := []int{0, 1, 2, 3, 4}
				if w.file == nil { // many moments, and fewer files
					chances = []int{0, 1 + rnd.IntN(3), 4}
				}
				for _, often := range slices.Concat(chances, chances[1:len(chances)-1]) {
					images++
					what := fmt.Sprintf("seed %d, power lost after call %d (%s %s), during step %d", seed, points, c.op, c.name, begun)
					afterPowerLoss(t, what, disk, rnd, often, all[done:begun+1], before["state.db"], w.damaged)
					if t.Failed() {
						return
					}
				}
			}
			if done != w.steps || points < 3*w.steps {
				t.Errorf("%d steps and %d calls that write were seen: the trace is not whole", done, points)
			}
			t.Logf("seed %d: %d moments, %d images", seed, points, images)
		})
	}
}

// afterPowerLoss opens what a power loss has left, and checks that it is one of want.
func afterPowerLoss(t *testing.T, what string, disk *platter, rnd *rand.Rand, often int, want []map[string]string, damaged []byte, tells bool) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sluice-store-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	disk.lose(t, dir, rnd, often)
	s, err := Open(filepath.Join(dir, "state.db"), quiet)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	defer s.Close()
	got, st := load(t, s), s.Status()
	if !slices.ContainsFunc(want, func(m map[string]string) bool { return maps.Equal(m, got) }) {
		t.Errorf("%s: %d records, which is none of the %d states that it may be; %+v", what, len(got), len(want), st)
	}
	if st.Trouble != nil || st.Damage != nil && !tells {
		t.Errorf("%s: a power loss counts as damage: %+v", what, st)
	}
	if damaged != nil && !keeps(t, dir, damaged) {
		t.Errorf("%s: the damaged file is lost", what)
	}
	if err := s.Commit(context.Background(), []model.Record{rec("after", "it", nil)}, nil); err != nil {
		t.Errorf("%s: commit: %v", what, err)
	}
}

// keeps reports whether a file in dir has content.
func keeps(t *testing.T, dir string, content []byte) bool {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		return err == nil && bytes.Equal(b, content)
	})
}

// stateFile is a file with records.
func stateFile(t *testing.T, records map[string]string, more ...model.Record) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state.db")
	s, err := Open(path, quiet)
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range records {
		more = append(more, rec(k[:1], k[2:], []byte(v)))
	}
	if err := s.Commit(t.Context(), more, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
