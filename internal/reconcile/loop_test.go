package reconcile_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

func TestWaitReturnsWhenTheKernelHasTheRevision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		rev := f.wish(add(1))
		r := f.wait(t, rev)
		if r.View.Revision < rev || !f.has(1) || len(r.Failed) > 0 {
			t.Errorf("round of revision %d, object there: %t, failed: %v", r.View.Revision, f.has(1), r.Failed)
		}
		if _, ok := r.Have[object(1)]; !ok {
			t.Error("the round does not know what it has done")
		}
		if l := f.Last(); l.View.Revision != r.View.Revision {
			t.Errorf("the last round is of revision %d", l.View.Revision)
		}
		// A revision that is done needs no round.
		synctest.Wait()
		before := f.Stats().Rounds
		f.wait(t, rev-1)
		if after := f.Stats().Rounds; after != before {
			t.Errorf("%d rounds to wait for what is done", after-before)
		}
	})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.kernel.with(func() { f.kernel.dumpTo = kernel.ErrInterrupted })
		time.Sleep(time.Second) // a dump that is younger than 50 ms would still be good
		f.Doubt()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if _, err := f.Wait(ctx, f.wish(add(1))); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestTriggersAreMerged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		synctest.Wait()
		f.kernel.delay = 10 * time.Millisecond // nobody applies now
		before := f.Stats().Rounds
		f.Trigger()
		synctest.Wait() // the round has begun and takes its time
		for range 1000 {
			f.Trigger()
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := f.Stats().Rounds - before; n != 2 {
			t.Errorf("1001 triggers made %d rounds, want the one that ran and one more", n)
		}
	})
}

func TestAChangeNeedsNoDump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		before := f.Stats().Dumps
		for i := 2; i < 10; i++ {
			if r := f.wait(t, f.wish(add(i))); r.Read != nil {
				t.Fatalf("round %d has read the kernel back", i)
			}
		}
		if n := f.Stats().Dumps - before; n != 0 {
			t.Errorf("%d dumps", n)
		}
	})
}

func TestAFailureIsRepeatedAndHarmsNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		refused := errors.New("refused")
		f.kernel.with(func() { f.kernel.fail[object(2)] = refused })
		rev := f.wish(add(1, 2, 3))
		r := f.wait(t, rev)
		if !errors.Is(r.Failed[object(2)], refused) || len(r.Failed) != 1 {
			t.Fatalf("failed: %v", r.Failed)
		}
		if !f.has(1) || !f.has(3) {
			t.Error("the others were not made")
		}

		time.Sleep(time.Minute)
		synctest.Wait()
		f.kernel.mu.Lock()
		dumps := slices.Clone(f.kernel.dumps)
		f.kernel.mu.Unlock()
		var gaps []time.Duration
		for i := 2; i < len(dumps); i++ { // the first was at the start, the second is the first repetition
			gaps = append(gaps, dumps[i].Sub(dumps[i-1]))
		}
		want := []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond, 1600 * time.Millisecond, 3200 * time.Millisecond, 5 * time.Second, 5 * time.Second}
		if len(gaps) < len(want) || !slices.Equal(gaps[:len(want)], want) {
			t.Errorf("repeated after %v, want %v …", gaps, want)
		}

		f.kernel.with(func() { delete(f.kernel.fail, object(2)) })
		time.Sleep(interval)
		synctest.Wait()
		if !f.has(2) || len(f.Last().Failed) > 0 {
			t.Error("it was not made when it could be")
		}
	})
}

// TestANewFailureIsRepeatedSoon: one that lasts must not make others wait.
func TestANewFailureIsRepeatedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.kernel.with(func() {
			f.kernel.fail[object(1)], f.kernel.fail[object(2)] = errors.New("for ever"), kernel.ErrNotExist
		})
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Minute)
		f.wait(t, f.wish(add(2)))
		f.kernel.with(func() { delete(f.kernel.fail, object(2)) })
		time.Sleep(100 * time.Millisecond)
		synctest.Wait()
		if !f.has(2) {
			t.Error("it waits for the other's turn")
		}
	})
}

// TestTriggersDoNotPutARepetitionOff: a busy node must still heal.
func TestTriggersDoNotPutARepetitionOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.kernel.with(func() { f.kernel.fail[object(1)] = kernel.ErrNotExist })
		f.wait(t, f.wish(add(1)))
		for range 20 {
			f.Trigger()
			synctest.Wait()
		}
		f.kernel.with(func() { delete(f.kernel.fail, object(1)) })
		time.Sleep(60 * time.Millisecond)
		synctest.Wait()
		if !f.has(1) {
			t.Error("20 triggers have made the repetition late")
		}
	})
}

func TestADumpInDoubtChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Second) // a dump that is younger than 50 ms would still be good
		f.kernel.with(func() { f.kernel.dumpTo, f.kernel.rounds = kernel.ErrInterrupted, nil })
		rev := f.wish(func(s kernel.State) { clear(s) })
		f.Doubt()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		f.kernel.mu.Lock()
		if len(f.kernel.rounds) > 0 {
			t.Errorf("changed %v", f.kernel.rounds)
		}
		f.kernel.mu.Unlock()
		if s := f.Stats(); s.DumpError == "" {
			t.Error("nobody is told")
		}
		if l := f.Last(); l.View.Revision >= rev {
			t.Error("a round that did nothing counts as done")
		}
		f.kernel.with(func() { f.kernel.dumpTo = nil })
		f.wait(t, rev)
		if s := f.Stats(); f.has(1) || s.DumpError != "" {
			t.Errorf("object still there: %t, error still told: %q", f.has(1), s.DumpError)
		}
	})
}

func TestDriftIsMendedAndCounted(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy=%t", busy), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := start(t)
				f.wait(t, f.wish(add(1, 2)))
				time.Sleep(time.Second)
				if n := f.Stats().Drift; n != 0 {
					t.Fatalf("drift before any: %d", n)
				}
				f.kernel.with(func() { // another hand; no notice is given
					delete(f.kernel.state, object(1))
					f.kernel.state[object(7)] = kernel.SysctlSpec{}
				})
				for range int(interval/time.Second) + 1 {
					if busy {
						f.Trigger()
					}
					time.Sleep(time.Second)
				}
				synctest.Wait()
				if !f.has(1) || f.has(7) {
					t.Error("it was not mended within the interval")
				}
				if n := f.Stats().Drift; n != 2 {
					t.Errorf("counted %d changes, want 2", n)
				}
			})
		})
	}
}

// TestWhatIsToBeReadBackWaitsForItsTime: the observer asks for a read-back after every
// round until it has seen what was made; rounds in between would find nothing new.
func TestWhatIsToBeReadBackWaitsForItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.mu.Lock()
		f.unread = true
		f.mu.Unlock()
		before := f.Stats()
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Second)
		synctest.Wait() // would not return
		f.mu.Lock()
		f.unread = false
		f.mu.Unlock()
		after := f.Stats()
		// One read-back in 50 ms, beside each a round that came too soon, and the wish.
		if rounds, dumps := after.Rounds-before.Rounds, after.Dumps-before.Dumps; dumps < 15 || rounds > 2*dumps+2 {
			t.Errorf("%d rounds and %d read-backs in a second", rounds, dumps)
		}
	})
}

func TestANoticeIsFollowedAtOnceButNotTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		time.Sleep(time.Second)
		f.kernel.with(func() {
			delete(f.kernel.state, object(1))
			f.kernel.dumps = nil
		})
		f.Doubt()
		synctest.Wait()
		if !f.has(1) {
			t.Error("not mended at once")
		}
		for range 100 { // our own change causes notices, too
			f.Doubt()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		f.kernel.mu.Lock()
		defer f.kernel.mu.Unlock()
		if n := len(f.kernel.dumps); n < 2 || n > 4 {
			t.Errorf("%d dumps for 101 notices in 100 ms, want one in 50 ms, and one after the last", n)
		}
	})
}

func TestDeletionsAreDoneInPortions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		var many []int
		for i := range 40 {
			many = append(many, i)
		}
		f.wait(t, f.wish(add(many...)))
		f.kernel.with(func() { f.kernel.rounds = nil })
		f.kernel.delay = 60 * time.Millisecond // longer than the gap between two dumps
		drift := f.Stats().Drift
		rev := f.wish(func(s kernel.State) {
			clear(s)
			add(100)(s)
		})
		f.wait(t, rev)
		if !f.has(100) {
			t.Error("what is new waits for what goes")
		}
		f.Doubt() // deleted devices cause notices
		time.Sleep(time.Second)
		synctest.Wait()
		f.kernel.mu.Lock()
		defer f.kernel.mu.Unlock()
		var sizes []int
		for _, ops := range f.kernel.rounds {
			sizes = append(sizes, len(ops))
		}
		if want := []int{17, 16, 8}; !slices.Equal(sizes, want) {
			t.Errorf("portions of %v, want %v", sizes, want)
		}
		if n := f.Stats().Drift - drift; n != 0 {
			t.Errorf("%d postponed deletions count as drift", n)
		}
	})
}

func TestObserversAreToldOfEveryRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		synctest.Wait()
		f.wait(t, f.wish(add(1)))
		synctest.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		if n := uint64(len(f.observed)); n != f.Stats().Rounds {
			t.Fatalf("told of %d rounds of %d", n, f.Stats().Rounds)
		}
		first, last := f.observed[0], f.observed[len(f.observed)-1]
		if first.Read == nil || last.Read != nil {
			t.Errorf("read back first: %v, last: %v; want the first alone", first.Read, last.Read)
		}
		if _, ok := last.Want[object(1)]; !ok || last.View.Revision != f.rev {
			t.Errorf("last round: revision %d, want %v", last.View.Revision, last.Want)
		}
	})
}

// TestReadIsWhatWasFoundNotWhatWasMade: what counts as prepared depends on it.
func TestReadIsWhatWasFoundNotWhatWasMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		f.kernel.with(func() { delete(f.kernel.state, object(1)) })
		time.Sleep(time.Second)
		f.Doubt()
		synctest.Wait()
		r := f.Last()
		_, read := r.Read[object(1)]
		_, have := r.Have[object(1)]
		if read || !have {
			t.Errorf("read %t, have %t", read, have)
		}
	})
}

func TestInspectChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		f.wait(t, f.wish(add(1)))
		f.kernel.with(func() { delete(f.kernel.state, object(1)) })
		ops, err := f.Inspect(t.Context())
		if err != nil || len(ops) != 1 || ops[0].Key != object(1) {
			t.Errorf("found %v, %v", ops, err)
		}
		if f.has(1) {
			t.Error("it was mended")
		}
		f.kernel.with(func() { f.kernel.dumpTo = kernel.ErrInterrupted })
		if _, err := f.Inspect(t.Context()); !errors.Is(err, kernel.ErrInterrupted) {
			t.Errorf("got %v", err)
		}
		time.Sleep(interval)
		f.kernel.with(func() { f.kernel.dumpTo = nil })
		time.Sleep(interval)
		synctest.Wait()
		if !f.has(1) {
			t.Error("inspections have kept the loop from its work")
		}
		f.stop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.Inspect(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with the loop ended: %v", err)
		}
	})
}

func TestOnlyTakenTasksAreLookedIntoAndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fake{state: kernel.State{}}
		l := reconcile.New(reconcile.Config{
			Kernel: k, Log: slog.New(slog.DiscardHandler),
			View: func() model.View {
				return model.View{Revision: 1, Endpoints: map[model.EndpointID]model.Endpoint{
					"created": {Phase: model.Created, Sandbox: "/run/a"},
					"joined":  {Phase: model.Joined, Sandbox: "/run/b"},
					"taken":   {Phase: model.Taken, Sandbox: "/run/d"},
					"taken 2": {Phase: model.Taken, Sandbox: "/run/c"}, // of one task on two networks
					"taken 3": {Phase: model.Taken, Sandbox: "/run/c"},
					"nowhere": {Phase: model.Taken},
				}}
			},
			Plan: func(model.View) kernel.State { return kernel.State{} },
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			l.Run(ctx)
		}()
		synctest.Wait()
		cancel()
		<-ended
		if want := []string{"/run/c", "/run/d"}; !slices.Equal(k.boxes, want) {
			t.Errorf("looked into %v, want %v", k.boxes, want)
		}
	})
}
