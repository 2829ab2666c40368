package view

import (
	"context"

	"sluice/internal/model"
)

// An intent that cannot be recorded is refused, and memory stays as it is: a
// container that a restart would forget is better started on another node. A fact
// that somebody tells cannot be refused - a container has gone, or runs already:
// memory has it at once, and what the journal could not take is kept here until it
// can. A process that ends before has the former records at its next start, and bears
// it: what has gone, Sweep finds out, and what runs, the engine and the kernel tell.

// unsaved are the records in which the journal is behind, as they should be.
type unsaved map[model.RecordKey]debt

type debt struct {
	value []byte
	gone  bool
}

// commitLocked makes a change durable. It leaves what is unsaved alone, so that
// an intent fails for reasons of its own only.
func (h *Hub) commitLocked(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error {
	if err := h.cfg.Journal.Commit(ctx, puts, deletes); err != nil {
		return err
	}
	for _, r := range puts { // newer than what was to be written
		delete(h.unsaved, model.RecordKey{Kind: r.Kind, Key: r.Key})
	}
	for _, k := range deletes {
		delete(h.unsaved, k)
	}
	return nil
}

// keepLocked makes facts durable, and with them those that it could not before.
// An error says that the journal is behind; the next call tries again.
func (h *Hub) keepLocked(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error {
	for _, k := range deletes {
		h.unsaved[k] = debt{gone: true}
	}
	for _, r := range puts {
		h.unsaved[model.RecordKey{Kind: r.Kind, Key: r.Key}] = debt{value: r.Value}
	}
	if len(h.unsaved) == 0 {
		return nil
	}
	puts, deletes = nil, nil
	for k, x := range h.unsaved {
		if x.gone {
			deletes = append(deletes, k)
		} else {
			puts = append(puts, model.Record{Kind: k.Kind, Key: k.Key, Value: x.value})
		}
	}
	if err := h.cfg.Journal.Commit(ctx, puts, deletes); err != nil {
		return err
	}
	clear(h.unsaved)
	return nil
}

// recordLocked is commitLocked for intents and keepLocked for facts.
func (h *Hub) recordLocked(ctx context.Context, c change) error {
	if !c.fact {
		return h.commitLocked(ctx, c.puts, c.deletes)
	}
	if err := h.keepLocked(ctx, c.puts, c.deletes); err != nil {
		// The journal tells people; the engine's next answer tries again.
		h.cfg.Log.Warn("what has happened is not recorded yet, will be retried", "err", err)
	}
	return nil
}
