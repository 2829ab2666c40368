package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"time"
)

const (
	// every is the time between requests of a stream: with some thirty streams three
	// hundred a second, a tenth of a processor for the clients and as much for the
	// tasks.
	every = 100 * time.Millisecond
	// answerTime is what a request may take. A lost SYN is sent again after 1 s and
	// then 2 s; so long nothing may be lost.
	answerTime = 2 * time.Second
	// holdTime is how long a connection is kept, which is shorter than tasks that
	// are to stop serve theirs: see serveGrace.
	holdTime = 3 * time.Second
	// startAgain is the pause before a client is started again that could not be.
	startAgain = 200 * time.Millisecond
	// maxKept bounds the failures that are kept in words; all are counted.
	maxKept = 10_000
)

// Kinds of stream.
const (
	newConnections  = "new connections"
	keptConnections = "kept connections"
	datagrams       = "datagrams"
)

// stream is requests of one kind from one place to one service, all the time.
type stream struct {
	name    string
	kind    string
	way     way
	at      netip.AddrPort
	service string                                                       // whose tasks must answer
	peer    netip.Addr                                                   // as whom they must see the client; invalid: not looked at
	command func(ctx context.Context, args ...string) (*exec.Cmd, error) // of probe, at the client

	mu    sync.Mutex // guards what follows
	count count
	// good is since when no request has failed; zero until one succeeds after a
	// failure, and before the first.
	good time.Time
}

// count is what became of requests.
type count struct {
	OK      int           `json:"ok"`
	Failed  int           `json:"failed"`
	Slowest time.Duration `json:"slowestNs"` // of those that were answered
}

func (c *count) add(o count) {
	c.OK, c.Failed, c.Slowest = c.OK+o.OK, c.Failed+o.Failed, max(c.Slowest, o.Slowest)
}

// traffic is all streams. Its methods may be called from any goroutine.
type traffic struct {
	streams []*stream
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu       sync.Mutex // guards failures. Rank: after a stream's.
	failures []failure
}

// startTraffic runs streams until ctx ends or end is called.
func startTraffic(ctx context.Context, streams []*stream) *traffic {
	ctx, cancel := context.WithCancel(ctx)
	t := &traffic{streams: streams, stop: cancel}
	for _, s := range streams {
		t.wg.Go(func() {
			for ctx.Err() == nil {
				begun := time.Now()
				if err := t.run(ctx, s); err != nil && ctx.Err() == nil {
					// A client may have run for long before it ended.
					t.fail(s, time.Now(), min(time.Since(begun), answerTime), err.Error())
					wait(ctx, startAgain)
				}
			}
		})
	}
	return t
}

// end stops all requests and returns the failures.
func (t *traffic) end() []failure {
	t.stop()
	t.wg.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failures
}

// since is the time since when all streams have succeeded without a failure, and the
// streams of which that is not so.
func (t *traffic) since() (from time.Time, bad []string) {
	for _, s := range t.streams {
		s.mu.Lock()
		if s.good.IsZero() {
			bad = append(bad, s.name)
		} else if s.good.After(from) {
			from = s.good
		}
		s.mu.Unlock()
	}
	return from, bad
}

// counts sums up by kind of stream.
func (t *traffic) counts() map[string]count {
	sums := map[string]count{}
	for _, s := range t.streams {
		s.mu.Lock()
		sum := sums[s.kind]
		sum.add(s.count)
		sums[s.kind] = sum
		s.mu.Unlock()
	}
	return sums
}

// fail notes a failure that was known now and took so long.
func (t *traffic) fail(s *stream, until time.Time, took time.Duration, what string) {
	s.mu.Lock()
	s.count.Failed++
	s.good = time.Time{}
	s.mu.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.failures) < maxKept {
		t.failures = append(t.failures, failure{stream: s.name, way: s.way, from: until.Add(-took), until: until, what: what})
	}
}

// succeed notes n answers, the slowest of which took so long.
func (s *stream) succeed(n int, slowest time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count.add(count{OK: n, Slowest: slowest})
	if s.good.IsZero() {
		s.good = time.Now()
	}
}

// line is what probe prints for a request (get), a connection's first answer (hold:
// host alone), a slow one, or at its end (hold: sent).
type line struct {
	OK    bool
	MS    float64
	Error string
	Reply answer
	answer

	Sent     int
	Received int
	Longest  float64 `json:"longest_ms"`
}

// answer is a server's.
type answer struct{ Host, Peer string }

// run runs the client until it ends: a kept connection after its time, the others only
// with ctx. It is an error if there is no client, or if it ends by itself.
func (t *traffic) run(ctx context.Context, s *stream) error {
	args := []string{"get", "--n", "0", "--every", every.String(), "--timeout", answerTime.String(), s.at.String()}
	switch s.kind {
	case datagrams:
		args = append([]string{"get", "--udp"}, args[1:]...)
	case keptConnections:
		args = []string{"hold", "--for", holdTime.String(), "--every", every.String(), "--timeout", answerTime.String(), "--gap", answerTime.String(), s.at.String()}
	}
	cmd, err := s.command(ctx, args...)
	if err != nil {
		return fmt.Errorf("no client: %w", err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("no client: %w", err)
	}
	told := t.read(s, out)
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil, s.kind == keptConnections && told:
		return nil
	case s.kind == keptConnections:
		return fmt.Errorf("no connection: %w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return fmt.Errorf("the client has ended: %w: %s", err, strings.TrimSpace(stderr.String()))
}

// read takes in what a client prints, and says whether a kept connection has told its
// end.
func (t *traffic) read(s *stream, out io.Reader) (told bool) {
	for in := bufio.NewScanner(out); in.Scan(); {
		now := time.Now()
		var l line
		if err := json.Unmarshal(in.Bytes(), &l); err != nil {
			t.fail(s, now, answerTime, "the client says "+in.Text())
			continue
		}
		took := time.Duration(l.MS * float64(time.Millisecond))
		if s.kind != keptConnections {
			if l.OK {
				l.Error = s.wrong(l.Reply)
			}
			if l.Error != "" {
				t.fail(s, now, took, l.Error)
			} else {
				s.succeed(1, took)
			}
			continue
		}
		switch {
		case l.Sent > 0:
			told = true
			s.succeedOrNot(t, now, l)
		case l.Host != "":
			if what := s.wrong(l.answer); what != "" {
				t.fail(s, now, answerTime, what)
			} else {
				s.succeed(1, 0)
			}
		}
	}
	return told
}

// succeedOrNot notes what became of a kept connection.
func (s *stream) succeedOrNot(t *traffic, now time.Time, l line) {
	if l.Received > 1 {
		s.mu.Lock()
		s.count.add(count{OK: l.Received - 1, Slowest: time.Duration(l.Longest * float64(time.Millisecond))})
		s.mu.Unlock()
	}
	if l.Error != "" {
		t.fail(s, now, answerTime+every, fmt.Sprintf("after %d answers: %s", l.Received, l.Error))
	}
}

// wrong says what is wrong with an answer, empty if nothing is.
func (s *stream) wrong(a answer) string {
	if !strings.HasPrefix(a.Host, s.service+"-on-") {
		return fmt.Sprintf("%q has answered, not a task of %s", a.Host, s.service)
	}
	if !s.peer.IsValid() {
		return ""
	}
	if from, err := netip.ParseAddrPort(a.Peer); err != nil || from.Addr() != s.peer {
		return fmt.Sprintf("the task sees %q, not %s", a.Peer, s.peer)
	}
	return ""
}

// wait waits, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
