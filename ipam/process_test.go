package ipam

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"sluice/internal/model"
	"sluice/internal/store"
	"sluice/ipam/pool"
)

// This file has what linear_test.go and leaders_test.go look at: processes with a
// journal on a real file, that end at any commit and start over, histories of calls,
// and mistakes to be found.

// verbs are what the clients call.
type verbs interface {
	RequestPool(context.Context, PoolRequest) (PoolReply, error)
	ReleasePool(context.Context, ReleasePoolRequest) error
	RequestAddress(context.Context, AddressRequest) (AddressReply, error)
	ReleaseAddress(context.Context, ReleaseAddressRequest) error
	Bind(context.Context, model.NetworkID, netip.Prefix, bool) error
	Free(context.Context, model.NetworkID) error
	Confirm(context.Context, model.NetworkID, []netip.Addr, time.Time) (pool.Confirmation, error)
	Pools() []pool.Listing
}

// errEnded is what a call of a process gets that ended before the call had an effect.
var errEnded = errors.New("the process has ended")

// mortal is the journal of a process that ends at a given commit.
type mortal struct {
	Journal
	left  atomic.Int64 // commits until the end; below 1: it does not end
	lands bool         // the last one is written
	dead  atomic.Bool
	fault func() bool // whether a commit fails that would not
}

func (m *mortal) Commit(ctx context.Context, puts []Record, deletes []RecordKey) error {
	switch {
	case m.dead.Load():
		return errEnded
	case m.fault():
		return errFault
	case m.left.Add(-1) != 0:
		return m.Journal.Commit(ctx, puts, deletes)
	}
	m.dead.Store(true)
	if !m.lands {
		return errEnded
	}
	// Who called will not hear of it, and the test knows what it had been told.
	return m.Journal.Commit(ctx, puts, deletes)
}

// flaw is a planted mistake: what it makes of a process's parts. The zero value is none.
type flaw struct {
	journal func(Journal) Journal
	verbs   func(*Allocator) verbs
}

// process is a manager's plugin over its lives.
type process struct {
	verbs
	rnd    *rand.Rand
	dir    string
	life   int
	disk   *store.Store
	j      *mortal
	flaw   flaw
	faulty bool // some commits fail, and the process ends at one
}

// newProcess starts one. Its file is in memory if the machine has such a directory:
// the end of a process loses nothing of what it has written, flushed or not.
func newProcess(t *testing.T, seed uint64, f flaw, faulty bool) *process {
	dir, err := os.MkdirTemp("/dev/shm", "sluice-ipam")
	if err != nil {
		dir = t.TempDir()
	}
	p := &process{rnd: rand.New(rand.NewPCG(seed, 99)), dir: dir, flaw: f, faulty: faulty}
	if err := p.start(); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *process) file() string { return filepath.Join(p.dir, fmt.Sprintf("state-%d", p.life)) }

func (p *process) start() error {
	var err error
	if p.disk, err = store.Open(p.file(), slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	if st := p.disk.Status(); len(st.Damage) > 0 {
		return fmt.Errorf("the file is damaged: %+v", st.Damage)
	}
	p.j = &mortal{Journal: p.disk, lands: p.rnd.IntN(2) == 0, fault: func() bool { return p.faulty && p.rnd.IntN(12) == 0 }}
	p.j.left.Store(int64(5 + p.rnd.IntN(40))) // a history has some 40 commits
	var j Journal = p.j
	if p.flaw.journal != nil {
		j = p.flaw.journal(p.j)
	}
	a, err := Open(context.Background(), Config{Journal: j})
	if err != nil {
		return err
	}
	p.verbs = a
	if p.flaw.verbs != nil {
		p.verbs = p.flaw.verbs(a)
	}
	return nil
}

// restart begins the next life with what is in the file now, whatever the store would
// still write at its end. No call may be under way.
func (p *process) restart() error {
	b, err := os.ReadFile(p.file())
	if err != nil {
		return err
	}
	if err := p.stop(); err != nil {
		return err
	}
	p.life++
	if err := os.WriteFile(p.file(), b, 0o600); err != nil {
		return err
	}
	return p.start()
}

func (p *process) stop() error { return errors.Join(p.disk.Close(), os.Remove(p.file())) }

// remove ends the process for good.
func (p *process) remove(t *testing.T) {
	if err := errors.Join(p.stop(), os.RemoveAll(p.dir)); err != nil {
		t.Error(err)
	}
}

// history collects calls with the order in which they began and ended.
type history struct {
	clock atomic.Int64
	mu    sync.Mutex
	ops   []porcupine.Operation
}

// call runs f, and keeps it unless it tells that it had no effect.
func (h *history) call(client int, in any, f func() (out any, effect bool)) {
	begin := h.clock.Add(1)
	out, effect := f()
	end := h.clock.Add(1)
	if effect {
		h.mu.Lock()
		h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: in, Call: begin, Output: out, Return: end})
		h.mu.Unlock()
	}
}

// verdict tells whether the calls can be put into an order that the model allows. A
// right history is judged in a millisecond. A wrong one may take long, as all orders
// have to be tried: then nothing is said of it.
func (h *history) verdict(m porcupine.Model) porcupine.CheckResult {
	return porcupine.CheckOperationsTimeout(m, h.ops, time.Second)
}

func (h *history) String() string {
	var b strings.Builder
	for _, o := range h.ops {
		fmt.Fprintf(&b, "%d-%d client %d: %+v -> %+v\n", o.Call, o.Return, o.ClientId, o.Input, o.Output)
	}
	return b.String()
}

// twoSteps looks for a free address and takes it in two steps, and believes what it
// saw when the second finds it in use.
type twoSteps struct{ *Allocator }

func (b twoSteps) RequestAddress(ctx context.Context, r AddressRequest) (AddressReply, error) {
	if r.Address != "" || r.Options[pool.KeyAddressType] != "" {
		return b.Allocator.RequestAddress(ctx, r)
	}
	b.mu.Lock()
	id, err := pool.ParseID(r.PoolID)
	a, _, none := b.table.PlanAddress(id, pool.Want{})
	b.mu.Unlock()
	if err = errors.Join(err, none); err != nil {
		return AddressReply{}, none
	}
	for range 50 { // enough for the others to have a turn
		runtime.Gosched()
	}
	r.Address = a.String()
	reply, err := b.Allocator.RequestAddress(ctx, r)
	if errors.Is(err, pool.ErrInUse) {
		return AddressReply{Address: netip.PrefixFrom(a, id.Subnet.Bits())}, nil
	}
	return reply, err
}

// early applies a release and journals it then.
type early struct{ *Allocator }

func (b early) ReleaseAddress(ctx context.Context, r ReleaseAddressRequest) error {
	id, err := pool.ParseID(r.PoolID)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.table.PlanReleaseAddress(id, netip.MustParseAddr(r.Address), b.now())
	puts, deletes, err := b.recordsLocked(c)
	b.table.Apply(c)
	if err != nil || !c.Durable() {
		return err
	}
	return b.journal.Commit(ctx, puts, deletes)
}

// lazy writes a commit when the next one comes.
type lazy struct {
	Journal
	puts    []Record
	deletes []RecordKey
}

func (l *lazy) Commit(ctx context.Context, puts []Record, deletes []RecordKey) error {
	var err error
	if len(l.puts)+len(l.deletes) > 0 {
		err = l.Journal.Commit(ctx, l.puts, l.deletes)
	}
	if err == nil {
		l.puts, l.deletes = puts, deletes
	}
	return err
}

// dropping leaves out some records.
type dropping struct {
	Journal
	drops func(Record) bool
}

func (d dropping) Commit(ctx context.Context, puts []Record, deletes []RecordKey) error {
	return d.Journal.Commit(ctx, slices.DeleteFunc(puts, d.drops), deletes)
}
