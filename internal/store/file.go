package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"sluice/internal/model"
)

// format is the number of the layout that this package writes: the buckets
// below and what record.go puts in them. It grows when an older sluice would
// misread the file.
const format = "1"

// The buckets of the file.
var (
	bucketMeta    = []byte("sluice")  // keyFormat and keyTally, sealed
	bucketRecords = []byte("records") // keyBytes → sealed value

	keyFormat = []byte("format")
	keyTally  = []byte("tally")
)

// The errors that Open answers with instead of starting a fresh file.
var (
	// ErrLocked: another process has the file open.
	ErrLocked = errors.New("is in use by another process")
	// ErrNewer: the file was written by a later version of sluice.
	ErrNewer = errors.New("was written by a newer version of sluice")
)

// lockWait is how long Open waits for a predecessor to let go of the file. The
// engine starts a plugin about half a second after the old process has gone;
// the kernel drops the lock with the process.
const (
	lockWait  = 2 * time.Second
	lockRetry = 20 * time.Millisecond
)

// damageError is a reason not to believe a file.
type damageError struct{ reason error }

func (e damageError) Error() string { return e.reason.Error() }
func (e damageError) Unwrap() error { return e.reason }

// content is what a file holds.
type content struct {
	records map[model.RecordKey][]byte
	bad     []string // names, as far as they can be read, of records that are not to be believed
	tally   tally    // as stored
	note    error    // a lost meta page: sound, but perhaps one change old
}

// database is an open file.
type database struct {
	bolt *bolt.DB
	file *os.File // the lock's and bbolt's
	info fs.FileInfo
}

func (d *database) close() error { return d.bolt.Close() }

// abandon lets go of a database that has panicked: bbolt may hold its own locks
// for ever then, and Close would wait for them. The mapping stays behind, and
// with it the open file, so the file's lock must be given back by name.
func (d *database) abandon() error {
	return errors.Join(syscall.Flock(int(d.file.Fd()), syscall.LOCK_UN), d.file.Close())
}

// openFile locks, verifies and opens the file at path. A missing file is
// fs.ErrNotExist; one that must not be believed is a damageError, and ErrNewer,
// ErrLocked are as they say. With readOnly nothing is written, and the lock is shared.
func openFile(ctx context.Context, path string, readOnly bool) (*database, content, error) {
	flags, lock := os.O_RDWR, syscall.LOCK_EX
	if readOnly {
		flags, lock = os.O_RDONLY, syscall.LOCK_SH
	}
	f, err := lockedFile(ctx, path, flags, lock)
	if err != nil {
		return nil, content{}, err
	}
	d, c, err := openLocked(f, readOnly)
	if err != nil {
		return nil, content{}, errors.Join(err, ignoreClosed(f.Close()))
	}
	return d, c, nil
}

// lockedFile opens path and takes its lock. A file that was renamed between the
// two is let go again, and the one that is at path then is tried.
func lockedFile(ctx context.Context, path string, flags, lock int) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		f, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0) // a FIFO at path must not hang us
		if err != nil {
			return nil, err
		}
		err = syscall.Flock(int(f.Fd()), lock|syscall.LOCK_NB)
		if err == nil {
			if samePlace(f, path) {
				return f, nil
			}
			err = syscall.EWOULDBLOCK
		}
		if cerr := f.Close(); cerr != nil {
			return nil, cerr
		}
		if err != syscall.EWOULDBLOCK {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s %w; two plugins must not share a state directory: disable the other, or set another directory for this one", path, ErrLocked)
		case <-time.After(lockRetry):
		}
	}
}

func samePlace(f *os.File, path string) bool {
	have, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(have, there)
}

func openLocked(f *os.File, readOnly bool) (*database, content, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, content{}, err
	}
	if !info.Mode().IsRegular() {
		return nil, content{}, damageError{fmt.Errorf("it is not a file but %s", info.Mode())}
	}
	found, err := verify(f, info.Size())
	if err != nil {
		return nil, content{}, damageError{err}
	}
	db, err := bolt.Open(f.Name(), 0, &bolt.Options{
		ReadOnly:     readOnly,
		FreelistType: bolt.FreelistMapType, // the array type rescans itself at each allocation
		NoStatistics: true,
		Timeout:      lockWait, // not needed: the file that OpenFile hands over is locked already
		OpenFile:     func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
	if err != nil {
		return nil, content{}, fmt.Errorf("open %s: %w", f.Name(), err)
	}
	c, err := read(db)
	if err != nil {
		return nil, content{}, errors.Join(err, db.Close())
	}
	c.note = found.lostMeta
	return &database{bolt: db, file: f, info: info}, c, nil
}

// read takes everything out of a file and decides what of it to believe.
func read(db *bolt.DB) (content, error) {
	c := content{records: map[model.RecordKey][]byte{}}
	err := db.View(func(tx *bolt.Tx) error {
		about, records := tx.Bucket(bucketMeta), tx.Bucket(bucketRecords)
		if about == nil || records == nil {
			return damageError{errors.New("it is a bbolt database, but not sluice's")}
		}
		have, err := unseal(keyFormat, about.Get(keyFormat))
		if err != nil {
			return damageError{fmt.Errorf("format number: %w", err)}
		}
		if string(have) != format {
			return fmt.Errorf("%s has format %q, this version of sluice reads format %s: the file %w; install that version again, or move the file away to start without state",
				db.Path(), have, format, ErrNewer)
		}
		stored, err := unseal(keyTally, about.Get(keyTally))
		if err != nil {
			return damageError{fmt.Errorf("tally: %w", err)}
		}
		if c.tally, err = parseTally(stored); err != nil {
			return damageError{err}
		}
		return c.take(records)
	})
	return c, err
}

func (c *content) take(records *bolt.Bucket) error {
	var have tally
	err := records.ForEach(func(k, v []byte) error {
		key, ok := parseKey(k)
		value, err := unseal(k, v)
		if !ok || err != nil {
			c.bad = append(c.bad, name(key))
			return nil
		}
		c.records[key] = value
		have.add(k, value)
		return nil
	})
	if err != nil {
		return err
	}
	if have.count+uint64(len(c.bad)) != c.tally.count {
		return damageError{fmt.Errorf("it holds %d records, but was closed with %d", have.count+uint64(len(c.bad)), c.tally.count)}
	}
	if len(c.bad) == 0 && have.digest != c.tally.digest {
		return damageError{errors.New("its records are not those it was closed with")}
	}
	return nil
}

// createFile makes an empty file at path, whole or not at all, and never over
// an existing one.
func createFile(path string) error {
	return newFile(path, nil, func(tmp string) error { return os.Link(tmp, path) })
}

// replaceFile puts a file with records in the place of the one at path, which is
// kept under the name that is returned. A crash at any moment leaves a whole
// file at path.
func replaceFile(path string, records map[model.RecordKey][]byte) (kept string, err error) {
	err = newFile(path, records, func(tmp string) error {
		if kept, err = freeName(path); err != nil {
			return err
		}
		if err := os.Link(path, kept); err != nil {
			return err
		}
		// Else a power loss may keep the second of the two changes alone, and with it
		// no name of the damaged file.
		if err := syncDir(filepath.Dir(path)); err != nil {
			return err
		}
		return os.Rename(tmp, path)
	})
	return kept, err
}

// newFile writes a file beside path, syncs it, and lets place give it its name.
func newFile(path string, records map[model.RecordKey][]byte, place func(tmp string) error) (err error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if rerr := os.Remove(tmp.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	db, err := bolt.Open(tmp.Name(), 0o600, &bolt.Options{
		NoStatistics: true,
		OpenFile:     func(string, int, os.FileMode) (*os.File, error) { return tmp, nil },
	})
	if err != nil {
		return errors.Join(err, ignoreClosed(tmp.Close()))
	}
	err = db.Update(func(tx *bolt.Tx) error {
		about, err := tx.CreateBucket(bucketMeta)
		if err != nil {
			return err
		}
		into, err := tx.CreateBucket(bucketRecords)
		if err != nil {
			return err
		}
		var t tally
		for k, v := range records {
			key := keyBytes(k)
			t.add(key, v)
			if err := into.Put(key, seal(key, v)); err != nil {
				return err
			}
		}
		return errors.Join(
			about.Put(keyFormat, seal(keyFormat, []byte(format))),
			about.Put(keyTally, seal(keyTally, t.bytes())))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := place(tmp.Name()); err != nil {
		return err
	}
	return syncDir(dir)
}

// tryRoom writes a file beside path and removes it again. One that a crash leaves
// behind, sweep removes.
func tryRoom(path string) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(make([]byte, room))
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close(), os.Remove(f.Name()))
}

// sweep removes what a createFile that was cut off has left. It is called with
// the lock of the file at path held, when nobody can need a new one: whoever is
// just making one will be refused the name.
func sweep(path string) error {
	left, err := filepath.Glob(path + ".new-*")
	for _, f := range left {
		if rerr := os.Remove(f); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

// ignoreClosed drops the error of closing a file that bbolt closed before us.
func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// syncDir makes names durable; bbolt syncs the content of files only.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// keepAside renames what is at path and tells its new name.
func keepAside(path string) (string, error) {
	to, err := freeName(path)
	if err != nil {
		return "", err
	}
	if err := os.Rename(path, to); err != nil {
		return "", err
	}
	return to, syncDir(filepath.Dir(path))
}

// freeName is the first path.damaged-<n> that nothing has.
func freeName(path string) (string, error) {
	for n := 1; ; n++ {
		name := fmt.Sprintf("%s.damaged-%d", path, n)
		if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			return name, nil
		} else if err != nil {
			return "", err
		}
	}
}
