package driver

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strconv"
	"sync"

	"sluice/internal/model"
)

// Allocated VNIs lie in the upper part of the 24-bit space. Docker's own
// overlay counts up from 4096, and people choose small numbers; with the same
// UDP port either would clash.
const (
	firstVNI model.VNI = 1 << 20
	countVNI           = uint32(model.MaxVNI - firstVNI + 1)
)

// kindVNI is the kind of a Book's durable records: network id → VNI.
const kindVNI = "vni"

// errTaken is part of what is said of a wish that cannot be had.
var errTaken = errors.New("is in use")

// Journal keeps a Book's records. Commit is one durable transaction.
type Journal interface {
	Commit(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error
}

// Book is the leader's register of VNIs. Every node may hold one; only the
// leader's is asked, and a new leader learns from the options that the engine
// replays to it.
type Book struct {
	journal Journal

	// mu guards byNetwork and byVNI. Rank 1: the journal's lock is taken under it.
	mu        sync.Mutex
	byNetwork map[model.NetworkID]model.VNI
	byVNI     map[model.VNI]model.NetworkID
}

// NewBook makes a Book from durable records; those of other kinds are ignored.
func NewBook(journal Journal, records []model.Record) (*Book, error) {
	b := &Book{journal: journal, byNetwork: make(map[model.NetworkID]model.VNI), byVNI: make(map[model.VNI]model.NetworkID)}
	for _, r := range records {
		if r.Kind != kindVNI {
			continue
		}
		n, err := strconv.ParseUint(string(r.Value), 10, 24)
		if err != nil {
			return nil, fmt.Errorf("stored VNI of network %s: %w", r.Key, err)
		}
		b.set(model.NetworkID(r.Key), model.VNI(n))
	}
	return b, nil
}

func (b *Book) set(id model.NetworkID, v model.VNI) {
	b.byNetwork[id], b.byVNI[v] = v, id
}

// VNI implements Allocations. The choice follows from the network's id, so that
// two leaders that know nothing of each other agree unless there is a clash.
func (b *Book) VNI(ctx context.Context, id model.NetworkID, wish model.VNI) (model.VNI, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	had, has := b.byNetwork[id]
	if has && (wish == 0 || wish == had) {
		return had, nil
	}
	v := wish
	if v == 0 {
		var ok bool
		if v, ok = b.free(id); !ok {
			return 0, fmt.Errorf("all %d VNIs are in use; remove a network", countVNI)
		}
	} else if owner, taken := b.byVNI[v]; taken && owner != id {
		return 0, fmt.Errorf("VNI %d %w by network %s; choose another sluice.vni, or leave it out", v, errTaken, owner.Short())
	}
	r := model.Record{Kind: kindVNI, Key: string(id), Value: []byte(strconv.FormatUint(uint64(v), 10))}
	if err := b.journal.Commit(ctx, []model.Record{r}, nil); err != nil {
		return 0, fmt.Errorf("record the VNI of network %s: %w", id.Short(), err)
	}
	if has {
		delete(b.byVNI, had)
	}
	b.set(id, v)
	return v, nil
}

// free is the first unused VNI from the hash of the id onwards.
func (b *Book) free(id model.NetworkID) (model.VNI, bool) {
	h := fnv.New32a()
	h.Write([]byte(id)) // never fails: hash.Hash
	start := h.Sum32() % countVNI
	for i := range countVNI {
		v := firstVNI + model.VNI((start+i)%countVNI)
		if _, taken := b.byVNI[v]; !taken {
			return v, true
		}
	}
	return 0, false
}

// Owner implements Allocations.
func (b *Book) Owner(v model.VNI) model.NetworkID {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.byVNI[v]
}

// Networks implements Allocations.
func (b *Book) Networks() []model.NetworkID {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Collect(maps.Keys(b.byNetwork))
}

// Free implements Allocations; an unknown network is no error.
func (b *Book) Free(ctx context.Context, id model.NetworkID) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	v, has := b.byNetwork[id]
	if !has {
		return nil
	}
	if err := b.journal.Commit(ctx, nil, []model.RecordKey{{Kind: kindVNI, Key: string(id)}}); err != nil {
		return fmt.Errorf("free the VNI of network %s: %w", id.Short(), err)
	}
	delete(b.byNetwork, id)
	delete(b.byVNI, v)
	return nil
}
