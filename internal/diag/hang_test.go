package diag_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// TestAKernelThatHangsHoldsUpNoAnswer: what it has counted is missing, the answer says
// so and has the rest, and however often it is asked, one goroutine hangs in it.
func TestAKernelThatHangsHoldsUpNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := worker()
		w.view.Networks[far] = model.Network{ID: far, Name: "far"}
		var asked atomic.Int32
		end := make(chan struct{})
		w.cfg.Dropped = func(string) (uint64, error) {
			asked.Add(1)
			<-end
			return 0, nil
		}
		w.cfg.Traffic = func(context.Context, string) (map[kernel.Key]kernel.Traffic, error) {
			asked.Add(1)
			<-end
			return nil, nil
		}
		w.cfg.Gossip = func() (bool, string) { return w.up, w.gossip }
		s := w.server()
		for range 3 {
			begun := time.Now()
			st := s.Status()
			if took := time.Since(begun); took != 2*time.Second {
				t.Errorf("status took %s", took)
			}
			if len(st.Problems) != 1 || !strings.Contains(st.Problems[0].What, "counters of 2 networks are missing here: the kernel has not answered within 2s: far, web") {
				t.Errorf("problems %v", st.Problems)
			}
			if st.Networks != 2 || st.Endpoints != 1 {
				t.Errorf("the rest is missing: %+v", st)
			}
		}
		for range 3 {
			begun := time.Now()
			a, err := s.Service(t.Context(), "shop", "")
			if took := time.Since(begun); err != nil || took != 5*time.Second {
				t.Fatalf("service took %s: %v", took, err)
			}
			if len(a.Networks) != 1 || !strings.Contains(a.Networks[0].Uncounted, "the kernel has not answered within 5s") {
				t.Errorf("%+v", a)
			}
		}
		if n := asked.Load(); n != 2 {
			t.Errorf("asked %d times", n)
		}
		close(end)
		synctest.Wait()
		if st := s.Status(); len(st.Problems) > 0 {
			t.Errorf("it answers again: %v", st.Problems)
		}
	})
}
