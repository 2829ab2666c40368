package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"sluice/driver"
	"sluice/internal/model"
	"sluice/ipam"
)

// fakeDriver records the last request of each verb and answers what it is told to.
type fakeDriver struct {
	mu   sync.Mutex
	got  map[string]any
	err  error                       // of every verb
	hook func(context.Context) error // runs first in every verb
}

func (f *fakeDriver) note(ctx context.Context, verb string, req any) error {
	if f.hook != nil {
		if err := f.hook(ctx); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.got == nil {
		f.got = make(map[string]any)
	}
	f.got[verb] = req
	return f.err
}

func (f *fakeDriver) calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.got)
}

type pair struct {
	Network  model.NetworkID
	Endpoint model.EndpointID
}

func (f *fakeDriver) Allocate(ctx context.Context, r driver.AllocateRequest) (map[string]string, error) {
	return map[string]string{"sluice.vni": "5", "sluice.secret-key": "hush"}, f.note(ctx, "Allocate", r)
}
func (f *fakeDriver) Free(ctx context.Context, n model.NetworkID) error {
	return f.note(ctx, "Free", n)
}
func (f *fakeDriver) CreateNetwork(ctx context.Context, r driver.CreateRequest) error {
	return f.note(ctx, "CreateNetwork", r)
}
func (f *fakeDriver) DeleteNetwork(ctx context.Context, n model.NetworkID) error {
	return f.note(ctx, "DeleteNetwork", n)
}
func (f *fakeDriver) CreateEndpoint(ctx context.Context, r driver.EndpointRequest) (driver.EndpointReply, error) {
	return driver.EndpointReply{MAC: model.MACFor(r.Addr.Addr())}, f.note(ctx, "CreateEndpoint", r)
}
func (f *fakeDriver) DeleteEndpoint(ctx context.Context, n model.NetworkID, e model.EndpointID) error {
	return f.note(ctx, "DeleteEndpoint", pair{n, e})
}
func (f *fakeDriver) Join(ctx context.Context, r driver.JoinRequest) (driver.JoinReply, error) {
	return driver.JoinReply{SrcName: "vx-1", DstPrefix: "eth"}, f.note(ctx, "Join", r)
}
func (f *fakeDriver) Leave(ctx context.Context, n model.NetworkID, e model.EndpointID) error {
	return f.note(ctx, "Leave", pair{n, e})
}
func (f *fakeDriver) Discovered(ctx context.Context, n driver.Node) error {
	return f.note(ctx, "Discovered", n)
}

// fakeIPAM gives 10.255.0.0/20 and what it is asked for.
type fakeIPAM struct{ fakeDriver }

func (f *fakeIPAM) RequestPool(ctx context.Context, r ipam.PoolRequest) (ipam.PoolReply, error) {
	return ipam.PoolReply{PoolID: r.Space + "/10.255.0.0/20", Pool: netip.MustParsePrefix("10.255.0.0/20")}, f.note(ctx, "RequestPool", r)
}
func (f *fakeIPAM) ReleasePool(ctx context.Context, r ipam.ReleasePoolRequest) error {
	return f.note(ctx, "ReleasePool", r)
}
func (f *fakeIPAM) RequestAddress(ctx context.Context, r ipam.AddressRequest) (ipam.AddressReply, error) {
	return ipam.AddressReply{Address: netip.MustParsePrefix("10.255.0.5/20")}, f.note(ctx, "RequestAddress", r)
}
func (f *fakeIPAM) ReleaseAddress(ctx context.Context, r ipam.ReleaseAddressRequest) error {
	return f.note(ctx, "ReleaseAddress", r)
}

var errNoDisk = errors.New("write intent: no space left on device")

// attached is a socket with fakes behind it.
func attached(t testing.TB) (*socket, *fakeDriver, *fakeIPAM) {
	t.Helper()
	s := newSocket(scopeGlobal, slog.New(slog.DiscardHandler))
	d, i := new(fakeDriver), new(fakeIPAM)
	s.attach(d, i)
	return s, d, i
}

// post calls a method as the engine does.
func post(s http.Handler, method, body string) (status int, reply string) {
	w := httptest.NewRecorder()
	r := httptest.NewRequest(http.MethodPost, "/"+method, strings.NewReader(body))
	r.Header.Set("Accept", "application/vnd.docker.plugins.v1.2+json")
	s.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}
