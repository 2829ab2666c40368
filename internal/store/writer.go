package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"

	"sluice/internal/model"
)

// maxTogether is how many changes share one transaction: bbolt's own bound for
// a batch, some 10 ms of work before the first caller hears anything.
const maxTogether = 1000

const (
	// retryEvery is how often it is tried whether the disk is well again: as long as
	// the loop takes to see what else has changed behind its back. It is one small
	// transaction, and only while something is wrong.
	retryEvery = 5 * time.Second
	// room in bytes is what must be free on a disk that was full before it counts as
	// well: a record of usual size, and the pages that bbolt copies for it.
	room = 64 << 10
)

// writer owns the database: one goroutine opens, writes and closes it.
type writer struct {
	s     *Store
	db    *database   // nil: closed after a failure, opened again by the next change
	known fs.FileInfo // the file that holds what is in memory; nil: none does
	doubt error       // why the file that was written last is not to be read again; nil: it may be
	disk  tally
	fold  map[model.RecordKey][]byte // found at opening: what must be written to bring the file up to memory
}

func (w *writer) run() {
	defer close(w.s.done)
	// Should somebody cut the file short while it is mapped, a touch of the lost
	// part is a fault. Make it a panic of this goroutine, which write recovers.
	debug.SetPanicOnFault(true)
	again := time.NewTicker(retryEvery)
	defer again.Stop()
	for {
		select {
		case <-w.s.stop:
			w.together(w.s.takeOwed())
			w.s.mu.Lock()
			w.s.closeErr = w.close()
			w.s.mu.Unlock()
			return
		case c := <-w.s.queue:
			w.together([]*change{c})
		case <-again.C:
			w.together(w.s.takeOwed())
			if w.s.troubled() {
				w.retry()
			}
		}
	}
}

// together takes a group and whatever else waits by now, and answers all of it.
func (w *writer) together(group []*change) {
	if len(group) == 0 {
		return
	}
	for len(group) < maxTogether {
		select {
		case c := <-w.s.queue:
			group = append(group, c)
			continue
		default:
		}
		break
	}
	// After the queue: what waits there may have been asked for after what is owed.
	group = append(w.s.takeOwed(), group...)
	all := map[model.RecordKey][]byte{}
	for _, c := range group {
		maps.Copy(all, c.apply)
	}
	before := w.have(all)
	w.s.atWork(time.Now())
	defer func() { w.s.atWork(time.Time{}) }()
	err := w.save(all)
	should := maps.Clone(before) // by what the callers are told
	for _, c := range group {
		told := err
		if c.puts == 0 {
			told = nil // opening the file again compares it with memory, and writes the difference
		}
		if told != nil {
			told = fmt.Errorf("save %s: %w", c, told)
		}
		if !c.settled.CompareAndSwap(false, true) {
			continue // its caller has given up, and was told that nothing is changed
		}
		if told == nil {
			maps.Copy(should, c.apply)
			if err != nil {
				w.s.applied(c.apply)
			}
		}
		c.result <- told
	}
	if err == nil {
		w.takeBack(all, should)
	}
}

// have is what is durable of the keys of a change; nil: there is no record.
func (w *writer) have(all map[model.RecordKey][]byte) map[model.RecordKey][]byte {
	out := make(map[model.RecordKey][]byte, len(all))
	for k := range all {
		out[k] = w.s.records[k]
	}
	return out
}

// takeBack undoes what was written and nobody waited for. If the disk refuses, memory
// is right, and the file when it is opened again.
func (w *writer) takeBack(written, should map[model.RecordKey][]byte) {
	undo := map[model.RecordKey][]byte{}
	for k, v := range written {
		want := should[k]
		if (v == nil) != (want == nil) || !bytes.Equal(v, want) {
			undo[k] = want
		}
	}
	if len(undo) == 0 {
		return
	}
	w.s.log.Warn("the disk answered too late; what it wrote is taken back", "file", w.s.path, "records", len(undo))
	w.s.atWork(time.Now())
	if err := w.save(undo); err != nil {
		w.s.applied(undo) // Status has the error
	}
}

// retry tries whether the disk is well again, and writes what it lacks.
func (w *writer) retry() {
	w.s.atWork(time.Now())
	defer w.s.atWork(time.Time{})
	// The file may have free pages on a disk that has none, so that small changes
	// succeed and the next larger one does not.
	if err := tryRoom(w.s.path); err != nil && !errors.Is(err, fs.ErrNotExist) { // a directory that is gone, opening makes
		w.s.failed(err)
		return
	}
	if err := w.save(nil); err != nil {
		w.s.log.Debug("state still cannot be saved", "err", err) // Status has it
	}
}

// save makes all durable and then visible. What fails on a database that was
// open already is tried once more on one that is opened afresh: that heals a
// file that was damaged while it was in use, without the caller noticing.
func (w *writer) save(all map[model.RecordKey][]byte) error {
	again := w.db != nil
	err := w.try(all)
	if err != nil && again {
		w.s.log.Warn("state could not be saved; opening the file again", "file", w.s.path, "err", err)
		err = w.try(all)
	}
	if err != nil {
		w.s.failed(err)
		return w.s.explain(err)
	}
	w.fold = nil
	w.s.succeeded(all)
	return nil
}

func (w *writer) try(all map[model.RecordKey][]byte) error {
	if err := w.ready(); err != nil {
		return err
	}
	todo := make(map[model.RecordKey][]byte, len(w.fold)+len(all))
	maps.Copy(todo, w.fold)
	for k, v := range all {
		if w.changes(k, v) {
			todo[k] = v
		}
	}
	if len(todo) == 0 && !w.s.troubled() { // else only a write proves that the disk is well
		return nil
	}
	return w.write(todo)
}

// changes reports whether setting k to v differs from what is durable. Only the
// writer changes records, so reading them here needs no lock.
func (w *writer) changes(k model.RecordKey, v []byte) bool {
	if _, ok := w.fold[k]; ok {
		return true
	}
	have, ok := w.s.records[k]
	return ok != (v != nil) || !bytes.Equal(have, v)
}

// ready has a database at hand that is the one at path.
func (w *writer) ready() error {
	if w.db != nil {
		if samePlace(w.db.file, w.s.path) {
			return nil
		}
		// Somebody removed or replaced the file: what goes into ours now would be
		// gone at the next start.
		w.s.log.Warn("the state file was moved or removed while in use; writing it again", "file", w.s.path)
		if err := w.close(); err != nil {
			return err
		}
	}
	if there, err := os.Stat(w.s.path); err == nil {
		reason := w.doubt
		if reason == nil && (w.known == nil || !os.SameFile(there, w.known)) {
			reason = errors.New("it appeared while sluice was running and is not the file that sluice had open")
		}
		if reason != nil {
			if err := w.startOver(there, reason); err != nil {
				return err
			}
		}
	}
	c, err := w.open(context.Background())
	if err != nil {
		return err
	}
	w.fold = differences(w.s.records, c.records)
	return nil
}

// open opens the file, or a fresh one in the place of a missing or damaged one;
// where single records are damaged, the fresh one has the others.
func (w *writer) open(ctx context.Context) (content, error) {
	d, c, err := openFile(ctx, w.s.path, false)
	var damage damageError
	if errors.As(err, &damage) || errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EISDIR) {
		if aerr := w.setAside(err); aerr != nil {
			return content{}, errors.Join(err, aerr)
		}
		err = fs.ErrNotExist
	}
	if errors.Is(err, fs.ErrNotExist) {
		// Somebody may have removed the directory too.
		if merr := os.MkdirAll(filepath.Dir(w.s.path), 0o700); merr != nil {
			return content{}, fmt.Errorf("make the state directory: %w", merr)
		}
		// Another process may be faster; its file is then as good as ours.
		if cerr := createFile(w.s.path); cerr != nil && !errors.Is(cerr, fs.ErrExist) && !errors.Is(cerr, fs.ErrNotExist) {
			return content{}, fmt.Errorf("create: %w", cerr)
		}
		d, c, err = openFile(ctx, w.s.path, false)
	}
	if err == nil && len(c.bad) > 0 {
		d, c, err = w.salvage(ctx, d, c)
	}
	if err != nil {
		return content{}, err
	}
	w.db, w.known, w.disk, w.doubt = d, d.info, c.tally, nil
	if err := sweep(w.s.path); err != nil {
		w.s.log.Warn("left-over of an interrupted start was not removed", "file", w.s.path, "err", err)
	}
	if c.note != nil {
		w.s.found(Damage{File: w.s.path, Reason: fmt.Sprintf("%v; the other meta page was used, the last change may be missing", c.note)})
	}
	return c, nil
}

// startOver puts what is in memory in the place of what is at the file's path. A
// file gives way to its successor only when that is whole: on a disk that goes on
// failing it is better than none.
func (w *writer) startOver(there fs.FileInfo, reason error) error {
	if !there.Mode().IsRegular() {
		return w.setAside(reason)
	}
	kept, err := replaceFile(w.s.path, w.s.records)
	if err != nil {
		return fmt.Errorf("%w; and a new file cannot be written: %w", reason, err)
	}
	w.s.found(Damage{File: kept, Reason: reason.Error()})
	w.doubt = nil
	return nil
}

func (w *writer) setAside(reason error) error {
	to, err := keepAside(w.s.path)
	if err != nil {
		return fmt.Errorf("set the damaged file aside: %w", err)
	}
	w.s.found(Damage{File: to, Reason: reason.Error()})
	return nil
}

// salvage puts a fresh file with the good records of c, which is open, in its
// place. It does not delete the bad ones where they are: a page that holds them
// has been changed by something else than bbolt, and bbolt may make it worse.
func (w *writer) salvage(ctx context.Context, d *database, c content) (*database, content, error) {
	kept, err := replaceFile(w.s.path, c.records)
	if err := errors.Join(err, d.close()); err != nil {
		return nil, content{}, fmt.Errorf("save the undamaged records into a new file: %w", err)
	}
	w.s.found(Damage{File: kept, Reason: errSeal.Error(), Records: c.bad})
	return openFile(ctx, w.s.path, false)
}

// write applies todo in one transaction.
func (w *writer) write(todo map[model.RecordKey][]byte) error {
	var now tally
	err := w.transaction(func(tx *bolt.Tx) error {
		now = w.disk
		records := tx.Bucket(bucketRecords)
		for k, v := range todo {
			key := keyBytes(k)
			if old := records.Get(key); old != nil {
				was, err := unseal(key, old)
				if err != nil {
					return damageError{fmt.Errorf("record %s: %w", name(k), err)}
				}
				now.remove(key, was)
			}
			if v == nil {
				if err := records.Delete(key); err != nil {
					return err
				}
				continue
			}
			if err := records.Put(key, seal(key, v)); err != nil {
				return err
			}
			now.add(key, v)
		}
		return tx.Bucket(bucketMeta).Put(keyTally, seal(keyTally, now.bytes()))
	})
	if err != nil {
		return err
	}
	w.disk = now
	return nil
}

// transaction runs fn in a transaction and commits it. After any failure the
// database is closed: what memory, page cache and disk hold may differ then (an
// fsync that failed once may "succeed" the next time without having written),
// so the next change opens and compares again.
func (w *writer) transaction(fn func(*bolt.Tx) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errors.Join(fmt.Errorf("bbolt: %v", p), w.db.abandon())
			w.db = nil
		}
	}()
	if err := w.db.bolt.Update(fn); err != nil {
		if isErrno(err, syscall.EIO) {
			w.doubt = err // whatever it reads like now; start over from memory
		}
		return errors.Join(err, w.close())
	}
	return nil
}

func (w *writer) close() error {
	if w.db == nil {
		return nil
	}
	db := w.db
	w.db = nil
	return db.close()
}
