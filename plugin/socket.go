package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/docker/go-plugins-helpers/sdk"

	"sluice/driver"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/ipam"
)

// networkDriver is what serves NetworkDriver.*; driver.Driver does.
type networkDriver interface {
	Allocate(context.Context, driver.AllocateRequest) (map[string]string, error)
	Free(context.Context, model.NetworkID) error
	CreateNetwork(context.Context, driver.CreateRequest) error
	DeleteNetwork(context.Context, model.NetworkID) error
	CreateEndpoint(context.Context, driver.EndpointRequest) (driver.EndpointReply, error)
	DeleteEndpoint(context.Context, model.NetworkID, model.EndpointID) error
	Join(context.Context, driver.JoinRequest) (driver.JoinReply, error)
	Leave(context.Context, model.NetworkID, model.EndpointID) error
	Discovered(context.Context, driver.Node) error
}

// ipamDriver is what serves IpamDriver.*; ipam.Allocator does.
type ipamDriver interface {
	RequestPool(context.Context, ipam.PoolRequest) (ipam.PoolReply, error)
	ReleasePool(context.Context, ipam.ReleasePoolRequest) error
	RequestAddress(context.Context, ipam.AddressRequest) (ipam.AddressReply, error)
	ReleaseAddress(context.Context, ipam.ReleaseAddressRequest) error
}

const (
	// budget is how long a call may work. The engine has no limit of its own: it
	// keeps 30 s only after `docker plugin enable` by the command, none after
	// `plugin install` or after its own restart (moby plugin/manager.go, reload),
	// and a call on the swarm's leader that hangs stops the allocation of every
	// service of the cluster. A second is promised; grace is part of it.
	budget = 900 * time.Millisecond
	// grace is for a call to return with its own error once its context has
	// ended, which says more than "too slow". After it the engine is answered
	// without the call.
	grace = 100 * time.Millisecond

	// maxBody is far above the largest request known, a Join with some hundred
	// published ports (about 100 bytes each), and far below what hurts.
	maxBody = 1 << 20
	// maxLogged is how much of a body goes into a debug line.
	maxLogged = 4 << 10
)

// socket answers the engine's calls. It is an http.Handler, safe for concurrent
// use, and lives as long as the process.
type socket struct {
	scope string
	log   *slog.Logger
	mux   *http.ServeMux
	stats map[string]*methodStats // by method; fixed after newSocket

	once  sync.Once
	ready chan struct{} // closed when the fields below are set, for good
	net   networkDriver
	ipam  ipamDriver
	err   error // why every call is refused; nil: none is
}

// newSocket makes a socket for networks of a scope. Its calls wait, within
// their budget, until attach or refuse is called.
func newSocket(scope string, log *slog.Logger) *socket {
	s := &socket{
		scope: scope,
		log:   log,
		mux:   http.NewServeMux(),
		stats: make(map[string]*methodStats),
		ready: make(chan struct{}),
	}
	s.register()
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		// 404 is what the engine takes for "this driver does not have the method".
		s.log.Debug("unknown method", "op", r.Method+" "+r.URL.Path)
		s.reply(w, http.StatusNotFound, errorBody{"sluice has no method " + r.Method + " " + r.URL.Path})
	})
	return s
}

// attach gives the calls those who answer them. Only the first of all calls to
// attach and refuse counts.
func (s *socket) attach(n networkDriver, i ipamDriver) {
	s.once.Do(func() {
		s.net, s.ipam = n, i
		close(s.ready)
	})
}

// refuse answers every call but those for capabilities and address spaces with
// err. These two are answered even so: a driver that the engine does not know
// fails with "could not resolve driver", and err would reach nobody.
func (s *socket) refuse(err error) {
	s.once.Do(func() {
		s.err = err
		close(s.ready)
	})
}

// parts waits for attach or refuse.
func (s *socket) parts(ctx context.Context) (networkDriver, ipamDriver, error) {
	select {
	case <-s.ready:
		return s.net, s.ipam, s.err
	case <-ctx.Done():
		return nil, nil, errors.New("sluice is still starting on this node; try again in a few seconds, and look into the engine's log if that does not help")
	}
}

// ServeHTTP implements http.Handler.
func (s *socket) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// errorBody is the answer that both APIs read as an error, if the status is not
// 200. (With status 200 the IPAM API reads "Error" instead, so an error never
// has 200.)
type errorBody struct{ Err string }

// empty is the answer of a verb that has nothing to say.
type empty struct{}

// constant registers a method whose request has no body and whose answer never
// changes.
func constant[Res any](s *socket, method string, res Res) {
	st := s.count(method)
	s.mux.HandleFunc("POST /"+method, func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		s.reply(w, http.StatusOK, res)
		st.add(time.Since(start), nil)
		s.log.Debug("call", "op", method)
	})
}

// handle registers a method. fn gets the decoded request and a context that
// ends with the budget or when the engine hangs up.
func handle[Req, Res any](s *socket, method string, fn func(context.Context, Req) (Res, error)) {
	st := s.count(method)
	s.mux.HandleFunc("POST /"+method, func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		var req Req
		if err == nil {
			err = unmarshal(body, &req)
		} else {
			err = badRequest{fmt.Errorf("read the request: %w", err)}
		}
		var res Res
		if err == nil {
			res, err = within(s, r.Context(), method, func(ctx context.Context) (Res, error) { return fn(ctx, req) })
		}
		took := time.Since(start)
		st.add(took, err)
		if err != nil {
			// The error's way ends here: the engine gets it, and what it does with
			// it differs by method, from a task's status to nothing at all.
			s.log.Warn("call failed", "op", method, "took", took, "err", err, "request", loggedJSON(body))
			s.reply(w, status(err), errorBody{err.Error()})
			return
		}
		s.log.Debug("call", "op", method, "took", took, "request", loggedJSON(body), "reply", loggedValue{res})
		s.reply(w, http.StatusOK, res)
	})
}

// within runs fn for at most budget and grace, and turns a panic into an error.
// A call that is late goes on alone; what it did is logged when it ends. The
// verbs are idempotent, so that the engine's undoing or asking again is right
// whatever became of it.
func within[Res any](s *socket, ctx context.Context, method string, fn func(context.Context) (Res, error)) (Res, error) {
	type outcome struct {
		res Res
		err error
	}
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, budget)
	done := make(chan outcome, 1)
	go func() {
		defer cancel()
		var o outcome
		defer func() {
			if p := recover(); p != nil {
				s.log.Error("panic in a call", "op", method, "err", p, "stack", string(debug.Stack()))
				o.err = panicked{fmt.Errorf("internal error in %s: %v; the engine's log has the details", method, p)}
			}
			done <- o
		}()
		o.res, o.err = fn(ctx)
	}()

	select {
	case o := <-done:
		return o.res, o.err
	case <-ctx.Done():
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case o := <-done:
		return o.res, o.err
	case <-timer.C:
	}
	go func() {
		o := <-done
		s.log.Warn("a call ended after it was answered as too slow", "op", method, "took", time.Since(start), "err", o.err)
	}()
	var none Res
	return none, late{fmt.Errorf("%s took longer than %s on this node; it may still complete; try again, and look for a slow disk if this repeats", method, budget+grace)}
}

// Kinds of errors of the socket's own, which the status and the counters tell apart.
type (
	badRequest struct{ error }
	panicked   struct{ error }
	late       struct{ error }
)

func (e badRequest) Unwrap() error { return e.error }

// status is the HTTP status of an error. Any but 200 and 404 will do for the
// engine.
func status(err error) int {
	var bad badRequest
	if errors.As(err, &bad) {
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

// unmarshal reads a request. An empty body is what the engine sends when it
// tries a call again whose answer it never got: its first attempt has used the
// body up (moby pkg/plugins/client.go). Taken for a request it would mean
// something else, so it is an error, and the engine undoes the call.
func unmarshal(body []byte, req any) error {
	if b := bytes.TrimSpace(body); len(b) == 0 || bytes.Equal(b, []byte("null")) {
		return badRequest{errors.New("the request is empty: the engine repeats a call whose answer it did not get; please try again")}
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if err := dec.Decode(req); err != nil {
		return badRequest{fmt.Errorf("the request is not understood: %w", err)}
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return badRequest{errors.New("the request is not understood: there is more behind its end")}
	}
	return nil
}

// reply writes v. A failure to write is the engine's hanging up, which it knows.
func (s *socket) reply(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		s.log.Error("encode a reply", "err", err)
		http.Error(w, "encode the reply: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", sdk.DefaultContentTypeV1_1)
	w.WriteHeader(status)
	if _, err := w.Write(b); err != nil {
		s.log.Debug("the engine did not take a reply", "err", err)
	}
}

// loggedJSON is a body as a log line shows it: secrets redacted, cut to
// maxLogged. The work is done only if the line is written.
type loggedJSON []byte

// LogValue implements slog.LogValuer.
func (b loggedJSON) LogValue() slog.Value {
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return slog.StringValue(fmt.Sprintf("(%d bytes that are not JSON)", len(b)))
	}
	out, err := json.Marshal(redact(v))
	if err != nil {
		return slog.StringValue("(" + err.Error() + ")")
	}
	if len(out) > maxLogged {
		return slog.StringValue(fmt.Sprintf("%s... (%d bytes)", out[:maxLogged], len(out)))
	}
	return slog.StringValue(string(out))
}

// loggedValue is loggedJSON of a value.
type loggedValue struct{ v any }

// LogValue implements slog.LogValuer.
func (l loggedValue) LogValue() slog.Value {
	b, err := json.Marshal(l.v)
	if err != nil {
		return slog.StringValue("(" + err.Error() + ")")
	}
	return loggedJSON(b).LogValue()
}

// redact replaces the values of secret options at any depth of v, in place.
func redact(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			if options.Secret(k) {
				v[k] = options.Redacted
			} else {
				v[k] = redact(v[k])
			}
		}
	case []any:
		for i := range v {
			v[i] = redact(v[i])
		}
	}
	return v
}
