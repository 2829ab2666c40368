package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// ledgerFile is the list of a cluster's boxes, inside its directory. It is what
// makes a cluster of a killed run findable.
const ledgerFile = "boxes.json"

// ledger records which processes hold the cluster's namespaces. It is written
// before such a process is allowed to do anything (see box.go), so a crash at
// any point leaves no process that the ledger does not know.
type ledger struct {
	path string

	mu    sync.Mutex // guards boxes and the file
	boxes map[string]process
}

// record adds or replaces the process of a box, on disk first.
func (l *ledger) record(name string, p process) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	next := maps.Clone(l.boxes)
	if next == nil {
		next = map[string]process{}
	}
	next[name] = p
	text, err := json.MarshalIndent(next, "", "\t")
	if err != nil {
		return fmt.Errorf("record box %s: %w", name, err)
	}
	// Rename is atomic: a reader sees the old list or the new one.
	if err := os.WriteFile(l.path+".new", text, 0o600); err != nil {
		return fmt.Errorf("record box %s: %w", name, err)
	}
	if err := os.Rename(l.path+".new", l.path); err != nil {
		return fmt.Errorf("record box %s: %w", name, err)
	}
	l.boxes = next
	return nil
}

// readLedger returns the processes recorded in dir; none if there is no ledger.
func readLedger(dir string) (map[string]process, error) {
	text, err := os.ReadFile(filepath.Join(dir, ledgerFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var boxes map[string]process
	if err := json.Unmarshal(text, &boxes); err != nil {
		return nil, fmt.Errorf("read %s: %w", filepath.Join(dir, ledgerFile), err)
	}
	return boxes, nil
}

// claim makes dir the caller's until the returned file is closed. The lock is
// on the directory itself, so that it vanishes with it and leaves no lock file.
func claim(dir string) (*os.File, error) {
	for {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		f, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed by its last owner in between
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("directory %s belongs to a cluster of another running process; use another Dir, or wait for that process", dir)
			}
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		// The last owner removes the directory while it holds the lock: what we
		// have locked may be a directory without a name.
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if named, err := os.Stat(dir); err == nil && os.SameFile(mine, named) {
			return f, nil
		}
		f.Close()
	}
}

// sweep ends and removes everything that a cluster left in dir; the caller has
// claimed it. The directory itself stays, empty.
func sweep(ctx context.Context, dir string) error {
	boxes, err := readLedger(dir)
	if err != nil {
		return err
	}
	var errs []error
	for name, p := range boxes {
		if err := p.kill(ctx); err != nil {
			errs = append(errs, fmt.Errorf("end %s: %w", name, err))
		}
	}
	if len(errs) > 0 {
		// With a host alive its files are in use: keep them and the ledger.
		return errors.Join(errs...)
	}
	if err := removeHostCgroups(cgroupName(dir), filepath.Join(dir, "*")); err != nil {
		errs = append(errs, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
