package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
	"time"

	"sluice/internal/model"
)

// Size of a new key in bytes: AES-256.
const Size = 32

// kindKey is the kind of a ring's durable records: SHA-256 of the key → key.
const kindKey = "gossip-key"

// Journal keeps a ring's records. Commit is one durable transaction.
type Journal interface {
	Commit(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error
}

// Ring is the set of known keys. It is safe for concurrent use.
type Ring struct {
	journal Journal
	changed func()
	fixed   bool // the key is configured; no other is taken

	// mu guards keys. Rank 1: the journal's lock is taken under it.
	mu   sync.Mutex
	keys [][]byte // sorted by hash: the first is the one to send with
	// learned is when each key was learned, by its hash; a key of a former life is
	// not among them.
	learned map[string]time.Time
	unsaved map[string]bool // by hash: in keys, but not in the journal
}

// New makes a ring of the configured key, if any, and of durable records; those
// of other kinds are ignored. A configured key is the only one: the operator
// has decided. changed is called after each new key, and must not block.
func New(journal Journal, records []model.Record, configured []byte, changed func()) *Ring {
	r := &Ring{journal: journal, changed: changed, learned: make(map[string]time.Time), unsaved: make(map[string]bool)}
	if len(configured) > 0 {
		r.keys, r.fixed = [][]byte{bytes.Clone(configured)}, true
		return r
	}
	for _, rec := range records {
		// One that gossip cannot take would keep it from starting.
		if rec.Kind == kindKey && slices.Contains([]int{16, 24, 32}, len(rec.Value)) { // AES
			r.insert(rec.Value)
		}
	}
	return r
}

func hash(key []byte) []byte {
	h := sha256.Sum256(key)
	return h[:]
}

// insert adds a key at its place; false if it is there.
func (r *Ring) insert(key []byte) bool {
	i, found := slices.BinarySearchFunc(r.keys, hash(key), func(k, h []byte) int { return bytes.Compare(hash(k), h) })
	if found {
		return false
	}
	r.keys = slices.Insert(r.keys, i, bytes.Clone(key))
	return true
}

// Keys returns the known keys, the one to send with first. It is empty before
// the first network.
func (r *Ring) Keys() [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.keys)
}

// Current is the key to send with. If none is known, a new one is made.
func (r *Ring) Current(ctx context.Context) ([]byte, error) {
	r.mu.Lock()
	if len(r.keys) > 0 {
		defer r.mu.Unlock()
		return r.keys[0], nil
	}
	key := make([]byte, Size)
	rand.Read(key) // never fails since Go 1.24
	err := r.addLocked(ctx, key)
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	r.announce()
	return key, nil
}

// Add puts a key into the ring, durably. One that is there is no error; beside
// a configured key none is taken, which is no error either. A key that cannot be
// recorded is used all the same, as the other nodes do; the error says so, and
// each further Add of it tries again.
func (r *Ring) Add(ctx context.Context, key []byte) error {
	r.mu.Lock()
	known := slices.ContainsFunc(r.keys, func(k []byte) bool { return bytes.Equal(k, key) })
	if r.fixed || known && !r.unsaved[name(key)] {
		r.mu.Unlock()
		return nil
	}
	err := r.addLocked(ctx, key)
	if err != nil && !known {
		r.insert(key)
		r.learned[name(key)] = time.Now()
		r.unsaved[name(key)] = true
	}
	r.mu.Unlock()
	if !known {
		r.announce()
	}
	return err
}

func (r *Ring) addLocked(ctx context.Context, key []byte) error {
	rec := model.Record{Kind: kindKey, Key: name(key), Value: bytes.Clone(key)}
	if err := r.journal.Commit(ctx, []model.Record{rec}, nil); err != nil {
		return fmt.Errorf("record the gossip key: %w", err)
	}
	r.insert(key)
	if !r.unsaved[name(key)] { // else it was learned when it could not be recorded
		r.learned[name(key)] = time.Now()
	}
	delete(r.unsaved, name(key))
	return nil
}

// name is a key's in the journal.
func name(key []byte) string { return hex.EncodeToString(hash(key)) }

// ForgetBefore drops, durably, the keys that were learned before t: those of a
// swarm that the node has left, which nobody in the next one knows. A configured
// key stays.
func (r *Ring) ForgetBefore(ctx context.Context, t time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fixed {
		return nil
	}
	var dels []model.RecordKey
	old := func(key []byte) bool { return r.learned[name(key)].Before(t) }
	for _, key := range r.keys {
		if old(key) {
			dels = append(dels, model.RecordKey{Kind: kindKey, Key: name(key)})
		}
	}
	if len(dels) == 0 {
		return nil
	}
	if err := r.journal.Commit(ctx, nil, dels); err != nil {
		return fmt.Errorf("forget %d gossip keys: %w", len(dels), err)
	}
	r.keys = slices.DeleteFunc(r.keys, old)
	for _, k := range dels {
		delete(r.learned, k.Key)
		delete(r.unsaved, k.Key)
	}
	return nil
}

// announce tells the listener. It must be called without the lock.
func (r *Ring) announce() {
	if r.changed != nil {
		r.changed()
	}
}
