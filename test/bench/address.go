package main

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"sluice/internal/model"
	"sluice/internal/store"
	"sluice/ipam"
	"sluice/ipam/pool"
)

const (
	// addressBatch is how many requests are timed together: one takes less than
	// the clock's own 50 ns can be neglected against.
	addressBatch = 256
	// addressFill leaves a /16 nine tenths full, as no real one gets.
	addressFill = 9 << 16 / 10
	// commits that are timed, each with its flush to the disk.
	commits = 500
)

// addresses measures a request in memory, and one that is durable.
func addresses(ctx context.Context, t *table) error {
	inMemory, err := decisions()
	if err != nil {
		return err
	}
	t.add(goal{what: "address of a /16, in memory", unit: seconds, limit: 1e-6}, inMemory)

	dir, err := os.MkdirTemp("", "sluice-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s, err := store.Open(filepath.Join(dir, "state.db"), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	whole, share, err := durable(ctx, s)
	if err := errors.Join(err, s.Close()); err != nil {
		return err
	}
	t.add(goal{what: "  with its durable commit (" + dir + ")", unit: seconds}, whole)
	t.add(goal{what: "  share of the commit in that", unit: ratio}, share)
	return nil
}

// decisions are the times of single requests, each decision with its effect.
func decisions() ([]float64, error) {
	book := pool.NewTable(ipam.GlobalSpace, pool.Replayed, nil)
	id, claim, err := book.PlanClaim(subnet, netip.Prefix{})
	if err != nil {
		return nil, err
	}
	book.Apply(claim)
	var out []float64
	for range addressFill / addressBatch {
		took, err := timed(func() error {
			for range addressBatch {
				_, c, err := book.PlanAddress(id, pool.Want{})
				if err != nil {
					return err
				}
				book.Apply(c)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		out = append(out, took/addressBatch)
	}
	return out, nil
}

// stopwatch is a store that adds up the time of its commits.
type stopwatch struct {
	*store.Store
	spent time.Duration
}

// Commit implements ipam.Journal.
func (s *stopwatch) Commit(ctx context.Context, puts []model.Record, deletes []model.RecordKey) error {
	began := time.Now()
	err := s.Store.Commit(ctx, puts, deletes)
	s.spent += time.Since(began)
	return err
}

// durable are the times of whole requests, and which share of each its commit has.
func durable(ctx context.Context, s *store.Store) (whole, share []float64, err error) {
	journal := &stopwatch{Store: s}
	a, err := ipam.Open(ctx, ipam.Config{Journal: journal})
	if err != nil {
		return nil, nil, err
	}
	p, err := a.RequestPool(ctx, ipam.PoolRequest{Space: ipam.GlobalSpace, Pool: subnet.String()})
	if err != nil {
		return nil, nil, err
	}
	for range commits {
		journal.spent = 0
		took, err := timed(func() error {
			_, err := a.RequestAddress(ctx, ipam.AddressRequest{PoolID: p.PoolID})
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		whole, share = append(whole, took), append(share, journal.spent.Seconds()/took)
	}
	return whole, share, nil
}
