package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sluice/internal/model"
)

// ErrClosed is answered after Close.
var ErrClosed = errors.New("the store is closed")

// patience is how long a disk may be at work on one transaction before nobody
// waits for it any more: the time that a call of the engine may take.
const patience = time.Second

// Store is an open file. All methods may be called from any goroutine.
type Store struct {
	path  string
	log   *slog.Logger
	queue chan *change  // unbuffered: a change that was not handed over was not written
	stop  chan struct{} // closed by Close
	done  chan struct{} // closed when the writer has ended
	once  sync.Once     // of Close

	// mu guards what follows; nothing else is locked while it is held. The
	// writer alone changes it, but for owed.
	mu       sync.Mutex
	owed     []*change                  // removals that the disk had no time for: the writer's next
	records  map[model.RecordKey][]byte // durable; values are never changed in place
	damage   []Damage
	trouble  error // why the last transaction failed; nil once one has succeeded
	since    time.Time
	busy     time.Time // since when the disk is at work on a transaction; zero: it is not
	closeErr error

	w writer
}

// Damage is one file, or some records, that were not believed.
type Damage struct {
	Found   time.Time
	File    string   // where the damaged file is now
	Reason  string   // for people
	Records []string // names of the records that were lost; empty if all of the file was
}

// Status is the store's state, for people and metrics.
type Status struct {
	Path    string
	Records int
	Damage  []Damage // found since this process started
	Kept    []string // every damaged file beside the state file, also of earlier starts; none while the disk hangs
	Trouble error    // why changes cannot be saved at present; nil if they can
	Since   time.Time
}

// Open opens the state file at path, and makes it and its directory if there is
// none. A file that cannot be believed is kept aside and replaced by a fresh
// one; Status then tells. On a read-only, full or failing file system Open
// succeeds with what could be read, be it nothing, and Commit says what is wrong
// until it is put right: a node without its records is rebuilt from what the
// engine and the other nodes know, one that does not start serves nobody.
//
// Errors: ErrLocked after two seconds, and ErrNewer.
func Open(path string, log *slog.Logger) (*Store, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	s := &Store{
		path:    path,
		log:     log,
		queue:   make(chan *change),
		stop:    make(chan struct{}),
		done:    make(chan struct{}),
		records: map[model.RecordKey][]byte{},
	}
	s.w.s = s
	if err := s.start(context.Background()); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	go s.w.run()
	return s, nil
}

// start opens the file for the first time.
func (s *Store) start(ctx context.Context) error {
	err := os.MkdirAll(filepath.Dir(s.path), 0o700) // it holds keys
	if err == nil {
		var c content
		c, err = s.w.open(ctx)
		s.records = c.records
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, ErrLocked) || errors.Is(err, ErrNewer) {
		return err
	}
	// It cannot be opened for writing. What can be read is still worth having.
	d, c, rerr := openFile(ctx, s.path, true)
	switch {
	case rerr == nil:
		s.records = c.records
		s.w.known = d.info
		if len(c.bad) > 0 {
			s.found(Damage{File: s.path, Reason: errSeal.Error(), Records: c.bad})
		}
		if cerr := d.close(); cerr != nil {
			return cerr
		}
	case errors.Is(rerr, fs.ErrNotExist):
		s.records = map[model.RecordKey][]byte{}
	case errors.Is(rerr, ErrLocked) || errors.Is(rerr, ErrNewer):
		return rerr
	default:
		s.records = map[model.RecordKey][]byte{}
		s.w.doubt = rerr
		s.found(Damage{File: s.path, Reason: rerr.Error()})
	}
	s.failed(err)
	return nil
}

// Load gives every durable record, ordered by kind and key. The values are the
// caller's to keep but not to change.
func (s *Store) Load(ctx context.Context) ([]model.Record, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	out := make([]model.Record, 0, len(s.records))
	for k, v := range s.records {
		out = append(out, model.Record{Kind: k.Kind, Key: k.Key, Value: v})
	}
	s.mu.Unlock()
	slices.SortFunc(out, func(a, b model.Record) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Key, b.Key))
	})
	return out, nil
}

// Commit saves puts and removes deletes, all or nothing, and returns when that
// is durable. Deletes apply after puts; deleting what is absent succeeds, and a
// change that changes nothing costs no write. Commits that wait at the same time
// are written together, in the order in which they were taken.
//
// A change that only removes is not refused for the disk's sake: what it names is
// gone already. It is written when something can be, before whatever is asked for
// later; after a crash before that, the records are there again.
//
// Commit waits a second at most for a disk that does not answer, and not at all
// once it has been waited for so long. After an error none of the change stays: what
// a disk wrote that answered too late, or failed at the last moment, is taken back
// before the next change is written. Only a crash before that leaves it to be found.
func (s *Store) Commit(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error {
	c, err := newChange(puts, deletes)
	if err != nil {
		return err
	}
	select {
	case <-s.stop:
		return ErrClosed
	default:
	}
	if err := s.stuck(); err != nil {
		if s.owe(c) {
			return nil
		}
		return fmt.Errorf("save %s: nothing was changed: %w", c, err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case s.queue <- c:
	case <-s.stop:
		return ErrClosed
	case <-ctx.Done():
		if s.owe(c) {
			return nil
		}
		return fmt.Errorf("save %s: the disk is busy, nothing was changed: %w", c, ctx.Err())
	}
	select {
	case err := <-c.result:
		return err
	case <-ctx.Done():
		if c.puts == 0 {
			return nil // the writer has it
		}
		if !c.settled.CompareAndSwap(false, true) {
			return <-c.result // it came at the same moment
		}
		return fmt.Errorf("save %s: the disk has not answered in time, so nothing was changed: what it may still write is taken back: %w", c, ctx.Err())
	}
}

// owe keeps a change for the writer that the disk has no time for, if it only removes.
func (s *Store) owe(c *change) bool {
	if c.puts > 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.owed = append(s.owed, c)
	return true
}

// takeOwed hands over what is owed, in the order in which it was asked for.
func (s *Store) takeOwed() []*change {
	s.mu.Lock()
	defer s.mu.Unlock()
	owed := s.owed
	s.owed = nil
	return owed
}

// Status is a copy of the store's state.
func (s *Store) Status() Status {
	s.mu.Lock()
	st := Status{Path: s.path, Records: len(s.records), Damage: slices.Clone(s.damage), Trouble: s.trouble, Since: s.since}
	busy := s.busy
	s.mu.Unlock()
	if err := s.stuck(); err != nil {
		st.Trouble, st.Since = err, busy
		return st // to look for files would wait for the disk, too
	}
	// Glob's only error is a malformed pattern, and a path with such characters then lists nothing.
	if kept, err := filepath.Glob(s.path + ".damaged-*"); err == nil {
		st.Kept = kept
	}
	return st
}

// Close waits for the transaction at work, then closes the file. Load and
// Status keep answering.
func (s *Store) Close() error {
	s.once.Do(func() { close(s.stop) })
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closeErr
}

func (s *Store) found(d Damage) {
	d.Found = time.Now()
	s.log.Error("state was damaged", "file", d.File, "err", d.Reason, "records", d.Records)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damage = append(s.damage, d)
}

// failed notes that nothing could be saved. It is logged when it is news: it is
// tried again every few seconds.
func (s *Store) failed(err error) {
	err = s.explain(err)
	s.mu.Lock()
	news := s.trouble == nil || s.trouble.Error() != err.Error()
	if s.trouble == nil {
		s.since = time.Now()
	}
	s.trouble = err
	s.mu.Unlock()
	if news {
		s.log.Error("state cannot be saved, will be retried", "err", err)
	}
}

func (s *Store) succeeded(now map[model.RecordKey][]byte) {
	s.mu.Lock()
	was := s.trouble
	s.trouble, s.since = nil, time.Time{}
	s.mu.Unlock()
	if was != nil {
		s.log.Info("state is saved again", "file", s.path)
	}
	s.applied(now)
}

// troubled reports whether the last transaction failed.
func (s *Store) troubled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble != nil
}

// atWork notes that the disk has been given something to do, or has done it.
func (s *Store) atWork(since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy = since
}

// stuck says that the disk has been at one transaction for too long; nil if not.
func (s *Store) stuck() error {
	s.mu.Lock()
	busy := s.busy
	s.mu.Unlock()
	if busy.IsZero() || time.Since(busy) < patience {
		return nil
	}
	return fmt.Errorf("%s: the disk has not answered for %s; see the kernel's log for the disk's errors (it is waited for)",
		s.path, time.Since(busy).Round(time.Second))
}

// applied makes a change visible.
func (s *Store) applied(now map[model.RecordKey][]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, v := range now {
		if v == nil {
			delete(s.records, k)
		} else {
			s.records[k] = v
		}
	}
}

// explain adds to the system's error what a person can do about it.
func (s *Store) explain(err error) error {
	dir := filepath.Dir(s.path)
	hint := "see the kernel's log for the disk's errors"
	switch {
	case errors.Is(err, ErrLocked), errors.Is(err, ErrNewer):
		return err
	case isErrno(err, syscall.ENOSPC), isErrno(err, syscall.EDQUOT):
		hint = "free space on the file system of " + dir
	case isErrno(err, syscall.EROFS):
		hint = "the file system of " + dir + " is read-only: remount it writable"
	case isErrno(err, syscall.ENOENT):
		hint = "the directory is gone: make it again, or disable and enable the plugin; what is in memory is written then"
	case errors.Is(err, fs.ErrPermission):
		hint = "give the plugin write access to " + dir
	case isErrno(err, syscall.EMFILE), isErrno(err, syscall.ENFILE):
		hint = "too many open files: raise the limit"
	}
	return fmt.Errorf("%s: %w; %s (tried again every few seconds)", s.path, err, hint)
}

// isErrno is errors.Is, and also finds a system error that bbolt has put into a
// text: its grow formats what truncate and fsync answer with %s.
func isErrno(err error, no syscall.Errno) bool {
	return errors.Is(err, no) || strings.HasSuffix(err.Error(), ": "+no.Error())
}

// change is one Commit on its way to the writer.
type change struct {
	puts, deletes int
	apply         map[model.RecordKey][]byte // nil value: delete
	result        chan error                 // room for one, so that the writer never waits for a caller that has gone
	settled       atomic.Bool                // the first to set it decides: the caller has given up, or the writer answers
}

func newChange(puts []model.Record, deletes []model.RecordKey) (*change, error) {
	c := &change{puts: len(puts), deletes: len(deletes), apply: make(map[model.RecordKey][]byte, len(puts)+len(deletes)), result: make(chan error, 1)}
	for _, r := range puts {
		k := model.RecordKey{Kind: r.Kind, Key: r.Key}
		if err := checkKey(k); err != nil {
			return nil, fmt.Errorf("save: %w", err)
		}
		if len(r.Value) > maxValue {
			return nil, fmt.Errorf("save: record %s has %d bytes, at most %d are stored", name(k), len(r.Value), maxValue)
		}
		c.apply[k] = r.Value
		if r.Value == nil {
			c.apply[k] = []byte{} // nil is a deletion
		}
	}
	for _, k := range deletes {
		if err := checkKey(k); err != nil {
			return nil, fmt.Errorf("save: %w", err)
		}
		c.apply[k] = nil
	}
	return c, nil
}

// String is for errors: what was asked for.
func (c *change) String() string {
	return fmt.Sprintf("%d records and %d removals", c.puts, c.deletes)
}

// differences gives what must be written on top of disk to arrive at mem.
func differences(mem, disk map[model.RecordKey][]byte) map[model.RecordKey][]byte {
	out := map[model.RecordKey][]byte{}
	for k, v := range mem {
		if have, ok := disk[k]; !ok || !bytes.Equal(have, v) {
			out[k] = v
		}
	}
	for k := range disk {
		if _, ok := mem[k]; !ok {
			out[k] = nil
		}
	}
	return out
}
