package dockerapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/model"
)

// fakeEngine answers like an engine, from bodies by path, over connections in
// memory, so that tests run in virtual time.
type fakeEngine struct {
	api string

	mu       sync.Mutex
	bodies   map[string]string
	statuses map[string]int
	hang     map[string]bool // paths that are accepted and never answered; "*" is all
	refuse   bool            // dialling fails: no engine
	calls    map[string]int
	streams  map[chan string]bool
	dials    int
	server   *http.Server
	conns    chan net.Conn
	closed   chan struct{}
}

func newFakeEngine(t *testing.T, api string, bodies map[string]string) *fakeEngine {
	f := &fakeEngine{
		api: api, bodies: maps.Clone(bodies), statuses: map[string]int{}, hang: map[string]bool{}, calls: map[string]int{},
		streams: map[chan string]bool{}, conns: make(chan net.Conn), closed: make(chan struct{}),
	}
	f.server = &http.Server{Handler: f}
	go func() { _ = f.server.Serve(f) }() // ends with ErrServerClosed at Close
	t.Cleanup(func() { _ = f.server.Close() })
	return f
}

func (f *fakeEngine) Accept() (net.Conn, error) {
	select {
	case c := <-f.conns:
		return c, nil
	case <-f.closed:
		return nil, net.ErrClosed
	}
}

func (f *fakeEngine) Close() error {
	close(f.closed)
	return nil
}

func (f *fakeEngine) Addr() net.Addr { return &net.UnixAddr{Name: "fake", Net: "unix"} }

func (f *fakeEngine) dial(ctx context.Context) (net.Conn, error) {
	f.mu.Lock()
	refuse := f.refuse
	f.dials++
	f.mu.Unlock()
	if refuse {
		return nil, errors.New("connect: connection refused")
	}
	mine, theirs := net.Pipe()
	select {
	case f.conns <- theirs:
		return mine, nil
	case <-f.closed:
		return nil, errors.New("connect: no such file or directory")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fakeEngine) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Path
	if path != "/_ping" {
		want := "/v" + f.api
		if !strings.HasPrefix(path, want+"/") {
			http.Error(w, `{"message":"client version is too new"}`, http.StatusBadRequest)
			return
		}
		path = strings.TrimPrefix(path, want)
	}
	f.mu.Lock()
	f.calls[path]++
	hang, body, status := f.hang[path] || f.hang["*"], f.bodies[path], f.statuses[path]
	f.mu.Unlock()
	if hang {
		<-r.Context().Done()
		return
	}
	w.Header().Set("Api-Version", f.api)
	w.Header().Set("Content-Type", "application/json")
	switch {
	case status != 0:
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"message":"status %d for %s"}`, status, path)
	case path == "/_ping":
	case path == "/events":
		f.events(w, r)
	case body == "":
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"message":"no such thing: %s"}`, path)
	default:
		_, _ = w.Write([]byte(body)) // a client that has gone is no fault of ours
	}
}

func (f *fakeEngine) events(w http.ResponseWriter, r *http.Request) {
	ch := make(chan string, 16)
	f.mu.Lock()
	f.streams[ch] = true
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.streams, ch)
		f.mu.Unlock()
	}()
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e, ok := <-ch:
			if !ok {
				return
			}
			if _, err := w.Write([]byte(e)); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		}
	}
}

// emit sends an event to whoever listens.
func (f *fakeEngine) emit(typ, action string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ch := range f.streams {
		ch <- fmt.Sprintf(`{"Type":%q,"Action":%q,"Actor":{"ID":"x"},"timeNano":1}`+"\n", typ, action)
	}
}

// cut ends all event streams.
func (f *fakeEngine) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for ch := range f.streams {
		close(ch)
		delete(f.streams, ch)
	}
}

func (f *fakeEngine) set(change func(f *fakeEngine)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

func (f *fakeEngine) called(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[path]
}

// inBubble runs fn in virtual time with a Reader that follows f, and holds that
// Run ends with its context.
func inBubble(t *testing.T, api string, bodies map[string]string, before func(*fakeEngine), fn func(t *testing.T, f *fakeEngine, r *Reader)) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeEngine(t, api, bodies)
		if before != nil {
			before(f)
		}
		r, err := New(Config{Name: "sluice:latest", PluginID: "p1", Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)), dial: f.dial})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		fn(t, f, r)
		cancel()
		select {
		case err := <-done:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(time.Second):
			t.Error("Run did not end with its context")
		}
	})
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// within waits, in virtual time, until ok holds.
func within(t *testing.T, d time.Duration, what string, r *Reader, ok func(s model.EngineSnapshot) bool) model.EngineSnapshot {
	t.Helper()
	begun := time.Now()
	for {
		synctest.Wait()
		s := r.Snapshot()
		if ok(s) {
			return s
		}
		if time.Since(begun) >= d {
			text, err := json.MarshalIndent(s, "", " ")
			t.Fatalf("not within %s: %s; %v\n%s\n%+v", d, what, err, text, r.Status())
		}
		<-time.After(time.Millisecond)
	}
}

// pass lets virtual time pass.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}
