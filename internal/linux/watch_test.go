package linux

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// Where the watch cannot wait for news it pauses between its attempts, and its end does
// not wait for a pause to end.
func TestAWatchInItsPauseEndsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, err := newWatcher(&Kernel{log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Close(w.epoll); err != nil {
			t.Fatal(err)
		}
		w.epoll = -1 // every wait fails
		go func() {
			w.run()
			close(w.done)
		}()
		synctest.Wait()
		start := time.Now()
		w.stop()
		if took := time.Since(start); took != 0 {
			t.Errorf("the end took %s, want none", took)
		}
	})
}
