package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"sluice/internal/model"
)

// inOwnMounts runs fn with a small tmpfs of its own at dir. It starts this test
// again as a process with its own mount namespace, so nothing is left behind
// however it ends.
func inOwnMounts(t *testing.T, fn func(t *testing.T, dir string)) {
	const child = "SLUICE_STORE_TEST_MOUNTS"
	if os.Getenv(child) == "" {
		if os.Getuid() != 0 {
			t.Skip("needs root, to mount a tmpfs in a mount namespace of its own")
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	// 256 KiB: room for the file and one growth of it.
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	fn(t, dir)
}

func remount(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|flags, ""); err != nil {
		t.Fatal(err)
	}
}

func TestAFullDiskIsSaidAndHealsByItself(t *testing.T) {
	inOwnMounts(t, func(t *testing.T, dir string) {
		s := open(t, filepath.Join(dir, "state.db"))
		put(t, s, "k", "first", "1")
		fill(t, filepath.Join(dir, "filler"))

		want := load(t, s)
		var full error
		for i := 0; full == nil && i < 1000; i++ {
			name, value := fmt.Sprint(i), strings.Repeat("v", 1000)
			if full = s.Commit(t.Context(), []model.Record{rec("k", name, []byte(value))}, nil); full == nil {
				want["k/"+name] = value
			}
		}
		if full == nil || !strings.Contains(full.Error(), syscall.ENOSPC.Error()) {
			t.Fatalf("got %v, want ENOSPC", full)
		}
		if !strings.Contains(full.Error(), "free space on the file system of "+dir) {
			t.Errorf("the error does not say what to do: %v", full)
		}
		wantLoad(t, s, want)
		if s.Status().Trouble == nil {
			t.Error("status does not tell")
		}
		// What needs no room still works: a removal, once more, and the same again.
		if err := s.Commit(t.Context(), nil, []model.RecordKey{key("k", "never was")}); err != nil {
			t.Errorf("a change that changes nothing: %v", err)
		}

		if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
			t.Fatal(err)
		}
		put(t, s, "k", "after", "x")
		want["k/after"] = "x"
		if tr := s.Status().Trouble; tr != nil {
			t.Errorf("still in trouble: %v", tr)
		}
		wantLoad(t, s, want)
		wantLoad(t, reopen(t, s), want)
	})
}

func TestAFullDiskAtTheFirstStart(t *testing.T) {
	inOwnMounts(t, func(t *testing.T, dir string) {
		fill(t, filepath.Join(dir, "filler"))
		s := open(t, filepath.Join(dir, "state.db"))
		if err := s.Commit(t.Context(), []model.Record{rec("k", "a", []byte("1"))}, nil); err == nil || !strings.Contains(err.Error(), "free space") {
			t.Errorf("got %v", err)
		}
		if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
			t.Fatal(err)
		}
		put(t, s, "k", "b", "2")
		wantLoad(t, reopen(t, s), map[string]string{"k/b": "2"})
	})
}

func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	page := bytes.Repeat([]byte("f"), os.Getpagesize())
	for err == nil {
		_, err = f.Write(page)
	}
	if cerr := f.Close(); !errors.Is(err, syscall.ENOSPC) || cerr != nil {
		t.Fatal(err, cerr)
	}
}

func TestAReadOnlyDiskIsSaidAndHealsByItself(t *testing.T) {
	inOwnMounts(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "state.db")

		remount(t, dir, syscall.MS_RDONLY)
		s := open(t, path) // nothing there, and nothing can be made
		err := s.Commit(t.Context(), []model.Record{rec("k", "a", nil)}, nil)
		if !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "remount it writable") {
			t.Errorf("got %v", err)
		}
		remount(t, dir, 0)
		put(t, s, "k", "a", "1")
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}

		remount(t, dir, syscall.MS_RDONLY)
		s = open(t, path) // there, to be read
		wantLoad(t, s, map[string]string{"k/a": "1"})
		if st := s.Status(); st.Trouble == nil || st.Since.IsZero() {
			t.Errorf("status %+v", st)
		}
		if err := s.Commit(t.Context(), []model.Record{rec("k", "b", nil)}, nil); !errors.Is(err, syscall.EROFS) {
			t.Errorf("got %v", err)
		}
		remount(t, dir, 0)
		put(t, s, "k", "b", "2")
		want := map[string]string{"k/a": "1", "k/b": "2"}
		s = reopen(t, s)
		wantLoad(t, s, want)
		if st := s.Status(); st.Trouble != nil || st.Damage != nil || st.Kept != nil {
			t.Errorf("status %+v", st)
		}
	})
}

func TestADamagedFileOnAFullDiskIsServedAndReplacedLater(t *testing.T) {
	inOwnMounts(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "state.db")
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
		fill(t, filepath.Join(dir, "filler"))
		s = open(t, path)
		wantLoad(t, s, map[string]string{"k/good": "fine"})
		if err := s.Commit(t.Context(), []model.Record{rec("k", "x", nil)}, nil); err == nil {
			t.Error("saved on a full disk")
		}
		if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
			t.Fatal(err)
		}
		put(t, s, "k", "y", "2")
		wantLoad(t, reopen(t, s), map[string]string{"k/good": "fine", "k/y": "2"})
	})
}
