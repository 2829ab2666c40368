package reconcile_test

import (
	"context"
	"log/slog"
	"maps"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
)

func TestWhatWasAskedForBeforeTheEndIsDone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		objects := make([]int, 40) // more than one portion of deletions
		for i := range objects {
			objects[i] = i
		}
		f.wait(t, f.wish(add(objects...)))
		f.kernel.delay = 100 * time.Millisecond
		f.wish(func(s kernel.State) { clear(s) })
		f.cancel() // before any trigger
		<-f.ended
		f.kernel.mu.Lock()
		defer f.kernel.mu.Unlock()
		if n := len(f.kernel.state); n > 0 {
			t.Errorf("%d objects are left", n)
		}
	})
}

func TestTheEndDoesNotWaitForAKernelThatRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t)
		synctest.Wait()
		f.kernel.with(func() { f.kernel.fail[object(1)] = kernel.ErrUnsupported })
		f.wish(add(1))
		begun := time.Now()
		f.cancel()
		<-f.ended
		if took := time.Since(begun); took > time.Second {
			t.Errorf("the end took %v", took)
		}
	})
}

func TestPartialViewTakesNothingForGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &fake{state: kernel.State{
			object(1): kernel.SysctlSpec{Value: "there"},
			object(2): kernel.SysctlSpec{Value: "old"},
		}, fail: map[kernel.Key]error{}}
		want := kernel.State{object(2): kernel.SysctlSpec{Value: "new"}, object(3): kernel.SysctlSpec{Value: "made"}}
		view := model.View{Revision: 1, Partial: true}
		l := reconcile.New(reconcile.Config{
			Kernel: k, View: func() model.View { return view }, Log: slog.New(slog.DiscardHandler),
			Plan: func(model.View) kernel.State { return want },
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); l.Run(ctx) }()
		if _, err := l.Wait(ctx, 1); err != nil {
			t.Fatal(err)
		}
		k.with(func() {
			whole := kernel.State{
				object(1): kernel.SysctlSpec{Value: "there"},
				object(2): kernel.SysctlSpec{Value: "old"},
				object(3): kernel.SysctlSpec{Value: "made"},
			}
			if !maps.Equal(k.state, whole) {
				t.Errorf("the kernel has\n%swant\n%s", k.state.Text(), whole.Text())
			}
		})
		cancel()
		<-ended
	})
}
