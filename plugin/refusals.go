package main

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sluice/internal/diag"
	"sluice/internal/model"
	"sluice/ipam"
)

// refusals remembers what the IPAM side refused. The swarm's allocator tells
// nobody but the leader's log: the network stays without addresses, its tasks
// stay new, and `docker` shows no reason. `sluice networks` on the leader does.
type refusals struct {
	*ipam.Allocator
	now func() time.Time

	// mu guards last. Rank: nothing else is locked while it is held.
	mu   sync.Mutex
	last []refusal // oldest first
}

type refusal struct {
	at   time.Time
	text string
}

const (
	// maxRefusals is how many different texts are kept: one screen.
	maxRefusals = 8
	// refusalAge is how long one is shown. The allocator tries again every five
	// minutes at most, so one that still stands is newer.
	refusalAge = 10 * time.Minute
)

// note keeps an error; nil is passed through.
func (r *refusals) note(err error) error {
	if err == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = slices.DeleteFunc(r.last, func(o refusal) bool { return o.text == err.Error() })
	r.last = append(r.last, refusal{r.now(), err.Error()})
	if len(r.last) > maxRefusals {
		r.last = r.last[1:]
	}
	return err
}

// RequestPool implements ipamDriver.
func (r *refusals) RequestPool(ctx context.Context, q ipam.PoolRequest) (ipam.PoolReply, error) {
	reply, err := r.Allocator.RequestPool(ctx, q)
	return reply, r.note(err)
}

// RequestAddress implements ipamDriver.
func (r *refusals) RequestAddress(ctx context.Context, q ipam.AddressRequest) (ipam.AddressReply, error) {
	reply, err := r.Allocator.RequestAddress(ctx, q)
	return reply, r.note(err)
}

// Bind implements driver.Pools.
func (r *refusals) Bind(ctx context.Context, id model.NetworkID, pool netip.Prefix, again bool) error {
	return r.note(r.Allocator.Bind(ctx, id, pool, again))
}

// problems lists the refusals that are not old.
func (r *refusals) problems() []diag.Problem {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []diag.Problem
	for _, x := range r.last {
		if r.now().Sub(x.at) < refusalAge {
			out = append(out, diag.Problem{What: "refused at " + x.at.Format(time.TimeOnly) + ": " + x.text})
		}
	}
	return out
}
