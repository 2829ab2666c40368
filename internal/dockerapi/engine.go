package dockerapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/docker/docker/api/types/versions"
	"github.com/docker/docker/client"
)

// oldestAPI is the API of engine 20.10, the oldest that sluice is tested with.
const oldestAPI = "1.41"

// maxBody bounds what is read of one answer: the tasks of a swarm with ten
// thousand of them, with five old ones each, take some 100 MB.
const maxBody = 256 << 20

// maxErrorBody bounds what is read of a refusal, which is one line of JSON.
const maxErrorBody = 4 << 10

// pingTimeout is the deadline of one ping. A booting engine answers none, and a
// running one within milliseconds, seconds when its disk is overloaded.
const pingTimeout = 5 * time.Second

var (
	// errNotFound: the engine does not have the object (any more).
	errNotFound = errors.New("not found")
	// errNotManager: only managers can answer, and this node is none, or the swarm
	// has no leader at the moment.
	errNotManager = errors.New("not a swarm manager, or no leader")
	// errTooOld: the engine speaks an older API than oldestAPI.
	errTooOld = errors.New("engine is too old")
)

type dialer func(ctx context.Context) (net.Conn, error)

func unixDialer(socket string) dialer {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
}

// engine is a connection to an engine that serves.
type engine struct {
	cli  *client.Client
	http *http.Client
	api  string
	seed maphash.Seed
}

// connect pings the engine once and agrees on an API version.
func connect(ctx context.Context, dial dialer) (*engine, error) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	cli, err := client.NewClientWithOpts(
		// Each part may be asking at once. Docker's client would keep two connections and
		// dial for each other request.
		client.WithHTTPClient(&http.Client{Transport: &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: len(partNames)}}),
		client.WithHost("unix:///engine.sock"), // for the form of requests only: dial knows the way
		client.WithDialContext(func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }))
	if err != nil {
		return nil, fmt.Errorf("make client: %w", err)
	}
	ping, err := cli.Ping(ctx)
	if err == nil {
		cli.NegotiateAPIVersionPing(ping)
		if versions.LessThan(cli.ClientVersion(), oldestAPI) {
			err = fmt.Errorf("it speaks API %s; sluice needs %s, which is Docker 20.10 or later: %w", cli.ClientVersion(), oldestAPI, errTooOld)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("ping engine: %w", err), cli.Close())
	}
	return &engine{cli: cli, http: cli.HTTPClient(), api: cli.ClientVersion(), seed: maphash.MakeSeed()}, nil
}

func (e *engine) close() error { return e.cli.Close() }

// get asks for path, by GET, and returns the body.
func (e *engine) get(ctx context.Context, path string, query url.Values) ([]byte, error) {
	u := url.URL{Scheme: "http", Host: client.DummyHost, Path: "/v" + e.api + path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	res, err := e.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // the address that it would add is a made-up one
		}
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	defer func() { _ = res.Body.Close() }() // all that matters of it has been read
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("GET %s: %w", path, refusal(res))
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxBody+1))
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	if len(body) > maxBody {
		return nil, fmt.Errorf("GET %s: the answer is longer than %d bytes", path, maxBody)
	}
	return body, nil
}

func refusal(res *http.Response) error {
	var msg struct{ Message string }
	text := res.Status
	if b, err := io.ReadAll(io.LimitReader(res.Body, maxErrorBody)); err == nil && json.Unmarshal(b, &msg) == nil && msg.Message != "" {
		text = strings.TrimSpace(msg.Message)
	}
	switch res.StatusCode {
	case http.StatusNotFound:
		return fmt.Errorf("%s: %w", text, errNotFound)
	case http.StatusServiceUnavailable:
		return fmt.Errorf("%s: %w", text, errNotManager)
	}
	return errors.New(text)
}

// fresh reports whether body differs from the one that *seen is of, and notes
// it. A body that is the same need not be decoded again, which is most of the
// work of polling. Two bodies of the same 64-bit sum are one in 10^19 polls.
func (e *engine) fresh(seen *uint64, body []byte) bool {
	s := maphash.Bytes(e.seed, body) | 1 // 0 is "none seen"
	if *seen == s {
		return false
	}
	*seen = s
	return true
}
