package dockerapi

import (
	"context"
	"time"
)

// The pace of readings.
const (
	// settle is how long a reading waits after the event that asked for it, so that
	// a burst of events (a start sends five) costs one.
	settle = 5 * time.Millisecond
	// firstBackoff to lastBackoff is the pause after a failed reading or session,
	// doubled each time: short enough for a hiccup to go unnoticed, long enough for
	// an engine in trouble to be left in peace.
	firstBackoff = 250 * time.Millisecond
	lastBackoff  = 5 * time.Second
)

// followUps are the readings after the one that an event caused. The engine's
// list of containers shows an endpoint a few milliseconds after `start`, its
// gossip 24 ms after on the same node and 100 ms on others (measured); a busy
// machine takes longer.
var followUps = []time.Duration{50 * time.Millisecond, 250 * time.Millisecond, time.Second}

// part is one thing that is read again and again, by one goroutine.
type part struct {
	name    string
	timeout time.Duration        // of one reading
	every   func() time.Duration // to the next reading when nothing asks for one
	read    func(context.Context) error
	ended   func(started time.Time, err error) // after each reading; err is nil if it succeeded
	ask     chan struct{}                      // room for one: asking twice is asking once
}

// look asks for a reading soon.
func (p *part) look() {
	select {
	case p.ask <- struct{}{}:
	default:
	}
}

// run reads until ctx ends. The first reading is at once.
func (p *part) run(ctx context.Context) {
	var pc pace
	for {
		started := time.Now()
		rctx, cancel := context.WithTimeout(ctx, p.timeout)
		err := p.read(rctx)
		cancel()
		if ctx.Err() != nil {
			return // the session's end, not a fault of this part
		}
		p.ended(started, err)
		pc.done(started, time.Now(), p.every(), err == nil)
		if !p.wait(ctx, &pc) {
			return
		}
	}
}

// wait returns when the next reading is due, or false when ctx has ended.
func (p *part) wait(ctx context.Context, pc *pace) bool {
	for {
		timer := time.NewTimer(time.Until(pc.due()))
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
			return true
		case <-p.ask:
			timer.Stop()
			pc.asked(time.Now())
		}
	}
}

// pace decides when a part is read next.
type pace struct {
	next    time.Time
	pending []time.Time // follow-ups, ascending
	took    time.Duration
	backoff time.Duration // 0 after a good reading
}

// done notes a reading.
func (p *pace) done(started, now time.Time, every time.Duration, good bool) {
	p.took = now.Sub(started)
	for len(p.pending) > 0 && !p.pending[0].After(started) {
		p.pending = p.pending[1:]
	}
	if good {
		p.backoff = 0
		p.next = now.Add(every)
		return
	}
	p.backoff = grow(p.backoff)
	p.next = now.Add(p.backoff)
}

// asked notes an event. A part that is slow to read rests as long as it worked,
// so at most half of the time goes to it, however many events there are; and a
// failing one is not hurried.
func (p *pace) asked(now time.Time) {
	p.pending = p.pending[:0:0]
	for _, d := range followUps {
		p.pending = append(p.pending, now.Add(d))
	}
	soon := now.Add(max(settle, min(p.took, lastBackoff)))
	if p.backoff == 0 && soon.Before(p.next) {
		p.next = soon
	}
}

// due is when to read.
func (p *pace) due() time.Time {
	if len(p.pending) > 0 && p.backoff == 0 && p.pending[0].Before(p.next) {
		return p.pending[0]
	}
	return p.next
}

func grow(backoff time.Duration) time.Duration {
	return min(max(2*backoff, firstBackoff), lastBackoff)
}
