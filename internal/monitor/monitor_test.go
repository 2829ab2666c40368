package monitor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/diag"
	"sluice/internal/golden"
	"sluice/internal/model"
)

// node serves 81/tcp.
type node struct {
	ill      error
	status   diag.Status
	services diag.Services
}

func (n *node) Healthy() error { return n.ill }
func (n *node) Serves(port uint16, proto model.Proto) (string, error) {
	if n.ill != nil {
		return "", n.ill
	}
	if port == 81 && proto == model.TCP {
		return "port 81/tcp leads to service web", nil
	}
	return "", errors.New("no service publishes it")
}
func (n *node) Status() diag.Status     { return n.status }
func (n *node) Services() diag.Services { return n.services }

func get(t *testing.T, h http.Handler, method, path string) *httptest.ResponseRecorder {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(method, path, nil))
	return rec
}

func TestHealth(t *testing.T) {
	drained := &node{ill: errors.New("the swarm has this node paused or drained")}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	for _, c := range []struct {
		name, path string
		node       *node
		ctx        context.Context
		want       int
		words      string
	}{
		{"the node", "/healthz", new(node), t.Context(), 200, "ok: the node is fine\n"},
		{"a port", "/healthz?port=81", new(node), t.Context(), 200, "ok: port 81/tcp leads to service web\n"},
		{"with its protocol", "/healthz?port=81&proto=tcp", new(node), t.Context(), 200, "ok: "},
		{"with another", "/healthz?port=81&proto=udp", new(node), t.Context(), 503, "no: no service publishes it\n"},
		{"another port", "/healthz?port=82", new(node), t.Context(), 503, "no: no service publishes it\n"},
		{"a drained node", "/healthz", drained, t.Context(), 503, "no: the swarm has this node paused or drained\n"},
		{"its port", "/healthz?port=81", drained, t.Context(), 503, "no: the swarm has this node paused or drained\n"},
		{"a node that is stopped", "/healthz", new(node), stopped, 503, "no: sluice is being stopped\n"},
		{"its port too", "/healthz?port=81", new(node), stopped, 503, "no: sluice is being stopped\n"},
		{"no number", "/healthz?port=web", new(node), t.Context(), 400, "want /healthz"},
		{"port 0", "/healthz?port=0", new(node), t.Context(), 400, "want /healthz"},
		{"a large port", "/healthz?port=65536", new(node), t.Context(), 400, "want /healthz"},
		{"an empty port", "/healthz?port=", new(node), t.Context(), 400, "want /healthz"},
		{"two ports", "/healthz?port=81&port=82", new(node), t.Context(), 400, "twice"},
		{"a protocol in the port", "/healthz?port=81/tcp", new(node), t.Context(), 400, "want /healthz"},
		{"a protocol without ports", "/healthz?port=81&proto=icmp", new(node), t.Context(), 400, "want /healthz"},
		{"an empty protocol", "/healthz?port=81&proto=", new(node), t.Context(), 400, "want /healthz"},
		{"a protocol alone", "/healthz?proto=tcp", new(node), t.Context(), 400, "without a port"},
		{"a misspelt name", "/healthz?prot=udp&port=81", new(node), t.Context(), 400, "not asked for"},
		{"a broken query", "/healthz?port=%zz", new(node), t.Context(), 400, "want /healthz"},
		{"a bad query while it stops", "/healthz?port=web", new(node), stopped, 400, "want /healthz"},
		{"something else", "/", new(node), t.Context(), 404, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := New(Config{Node: c.node, Log: slog.New(slog.DiscardHandler)}).handler(c.ctx)
			rec := get(t, h, http.MethodGet, c.path)
			if rec.Code != c.want || !strings.Contains(rec.Body.String(), c.words) {
				t.Errorf("%d %s, want %d %s", rec.Code, rec.Body, c.want, c.words)
			}
			if c.want != 404 && get(t, h, http.MethodPost, c.path).Code != http.StatusMethodNotAllowed {
				t.Error("it can be posted to")
			}
		})
	}
}

// busy is a node with something of everything.
func busy() *node {
	n := new(node)
	n.status = diag.Status{
		Version: "v1.2.3", Scope: "global", Node: "node1", Host: "h1", Role: "worker", Engine: "28.5.2", Datapath: "ipvs",
		Networks: 2, Endpoints: 3, Services: 2, Memory: 27 << 20,
		Published: diag.Published{Served: 2, Lost: 2, Idle: 1, Missed: 4, Drained: true},
		Addresses: []diag.AddressUse{{Network: "shop", Subnet: "10.255.0.0/20", Used: 6, Free: 3831, Leaked: 2}, {Subnet: "10.254.0.0/24", Free: 239}},
		Guard:     diag.Guard{Dropped: 7, Networks: []diag.Dropped{{Network: "web", ID: "w", Frames: 7}, {Network: "far", ID: "f"}}},
		Gossip:    diag.Gossip{Peers: []diag.Peer{{State: diag.PeerPresent}, {State: diag.PeerPresent}, {State: diag.PeerLost}}},
		Loop:      diag.LoopState{Rounds: 40, Changes: 52, Failures: 2, Drift: 1, DriftByKind: map[string]uint64{"link": 1, "fdb": 0}, LastRound: 12500 * time.Microsecond, ReadBack: time.Unix(1700000000, 0)},
		Calls:     []diag.Call{{Method: "NetworkDriver.Join", Calls: 4, Failed: 2}},
		Problems:  []diag.Problem{{What: "something"}},
	}
	n.services = diag.Services{
		Ports: []diag.Port{
			{Port: "81/tcp", To: "80", Service: "web", Network: "shop", State: diag.PortServed},
			{Port: "8000-8010/udp", Addr: "192.0.2.1", Service: "web", Network: "shop", State: diag.PortRefuses},
			{Port: "82/tcp", Service: "web", Network: "shop", State: diag.PortLost, Owner: &diag.Owner{Kind: diag.OwnerService, Name: "old"}},
			{Port: "83/tcp", Service: "web", Network: "shop", State: diag.PortLost, Owner: &diag.Owner{Kind: diag.OwnerProcess, Name: "ng\"i\\nx\n{} (pid 7)"}},
		},
		Services: []diag.Service{
			{Name: "web", Network: "shop", Backends: []diag.Backend{{State: diag.StateReady}, {State: "leaving"}}},
			{Name: "web", Network: "back"},
			{Name: "web", Network: "back"}, // never, and no reason to end the process
		},
	}
	return n
}

func TestMetrics(t *testing.T) {
	h := New(Config{Node: busy(), Log: slog.New(slog.DiscardHandler)}).handler(t.Context())
	rec := get(t, h, http.MethodGet, "/metrics")
	if rec.Code != http.StatusOK || rec.Header().Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("%d %v", rec.Code, rec.Header())
	}
	got := rec.Body.String()
	golden.Check(t, "metrics", got)
	// The format: a line is a remark, or a metric with its labels and a number; the
	// lines of one metric are together, behind its type.
	line := regexp.MustCompile(`^([a-z_]+)(\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)+\})? [0-9.e+-]+$`)
	told := make(map[string]bool)
	last := ""
	for l := range strings.Lines(got) {
		l = strings.TrimSuffix(l, "\n")
		if f := strings.Fields(l); f[0] == "#" {
			if f[1] == "TYPE" {
				if told[f[2]] {
					t.Errorf("type of %s is told twice", f[2])
				}
				told[f[2]], last = true, f[2]
			}
			continue
		}
		m := line.FindStringSubmatch(l)
		if m == nil || m[1] != last {
			t.Errorf("behind the type of %s: %q", last, l)
		}
	}
	if get(t, h, http.MethodPost, "/metrics").Code != http.StatusMethodNotAllowed {
		t.Error("it can be posted to")
	}
}

// TestManyCollectorsAreOneLook: an answer is used again for a second, but not beyond
// the signal to end.
func TestManyCollectorsAreOneLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := busy()
		n.status.Published.Drained = false
		ctx, stop := context.WithCancel(t.Context())
		h := New(Config{Node: n, Log: slog.New(slog.DiscardHandler)}).handler(ctx)
		says := func(line string) {
			t.Helper()
			if got := get(t, h, http.MethodGet, "/metrics").Body.String(); !strings.Contains(got, "\n"+line+"\n") {
				t.Errorf("no %q in\n%s", line, got)
			}
		}
		says("sluice_loop_rounds_total 40")
		n.status.Loop.Rounds = 41
		says("sluice_loop_rounds_total 40")
		time.Sleep(scrapedFor)
		says("sluice_loop_rounds_total 41")
		says("sluice_draining 0")
		stop()
		says("sluice_draining 1")
	})
}

// memory is a listener without a network.
type memory struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newMemory() *memory { return &memory{conns: make(chan net.Conn), done: make(chan struct{})} }

func (l *memory) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *memory) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *memory) Addr() net.Addr { return &net.TCPAddr{} }

// from is a connection from an address.
type from struct {
	net.Conn
	addr netip.Addr
}

func (c from) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(netip.AddrPortFrom(c.addr, 4242)) }

// dial connects from an address of a machine of that number, or fails once the
// listener is closed.
func (l *memory) dial(machine byte) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case l.conns <- from{b, netip.AddrFrom4([4]byte{192, 0, 2, machine})}:
		return a, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// TestThePortIsTriedAgainAndAnswersToTheEnd: a taken port is told once and had later;
// from the signal on the answer is no, until the process has ended.
func TestThePortIsTriedAgainAndAnswersToTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemory()
		tries := 0
		var log bytes.Buffer
		m := New(Config{
			Addr: netip.MustParseAddrPort("0.0.0.0:9247"), Node: new(node), Log: slog.New(slog.NewTextHandler(&log, nil)),
			Listen: func() (net.Listener, error) {
				if tries++; tries < 4 {
					return nil, errors.New("address already in use")
				}
				return l, nil
			},
		})
		ctx, stop := context.WithCancel(t.Context())
		end, ended := make(chan struct{}), make(chan struct{})
		go func() { m.Run(ctx, end); close(ended) }()
		synctest.Wait()
		if err := m.State(); err == nil || !strings.Contains(err.Error(), "already in use") {
			t.Errorf("state %v", err)
		}
		time.Sleep(4 * retry)
		synctest.Wait()
		if m.State() != nil || strings.Count(log.String(), "not answered") != 1 || strings.Count(log.String(), "are answered") != 1 {
			t.Errorf("state %v, told %s", m.State(), &log)
		}
		client := http.Client{Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext:       func(context.Context, string, string) (net.Conn, error) { return l.dial(200) },
		}}
		ask := func() (int, string) {
			resp, err := client.Get("http://node/healthz")
			if err != nil {
				return 0, err.Error()
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return resp.StatusCode, string(b)
		}
		if status, text := ask(); status != 200 {
			t.Errorf("%d %s", status, text)
		}
		stop()
		time.Sleep(time.Second)
		if status, text := ask(); status != 503 || !strings.Contains(text, "being stopped") {
			t.Errorf("after the signal: %d %s", status, text)
		}
		close(end)
		<-ended
		if status, _ := ask(); status != 0 {
			t.Errorf("after the end: %d", status)
		}
	})
}

// TestTheAddressIsTheOneAskedFor: 0.0.0.0 is not all addresses of IPv6, and the port
// answers over a real connection.
func TestTheAddressIsTheOneAskedFor(t *testing.T) {
	if got := network(netip.MustParseAddrPort("0.0.0.0:9247")); got != "tcp4" {
		t.Error(got)
	}
	if got := network(netip.MustParseAddrPort("[::]:9247")); got != "tcp" {
		t.Error(got)
	}
	l, err := net.Listen(network(netip.MustParseAddrPort("127.0.0.1:0")), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := New(Config{Node: new(node), Log: slog.New(slog.DiscardHandler), Listen: func() (net.Listener, error) { return l, nil }})
	end, ended := make(chan struct{}), make(chan struct{})
	go func() { m.Run(t.Context(), end); close(ended) }()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for path, want := range map[string]string{"/healthz?port=81": "ok: port 81/tcp", "/metrics": "sluice_draining 0"} {
		resp, err := c.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(b), want) {
			t.Errorf("%s: %d %v %s", path, resp.StatusCode, err, b)
		}
	}
	// A long head is refused before it is read to its end.
	req, err := http.NewRequest(http.MethodGet, "http://"+l.Addr().String()+"/healthz", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Long", strings.Repeat("x", 64<<10))
	if resp, err := c.Do(req); err == nil {
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("a head of 64 KiB: %d", resp.StatusCode)
		}
		if err := resp.Body.Close(); err != nil {
			t.Error(err)
		}
	}
	close(end)
	<-ended
}

// TestOneMachineDoesNotKeepOthersOut: it is cut off, and let in again when it has
// closed what it had.
func TestOneMachineDoesNotKeepOthersOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemory()
		m := New(Config{Node: new(node), Log: slog.New(slog.DiscardHandler), Listen: func() (net.Listener, error) { return l, nil }})
		end, ended := make(chan struct{}), make(chan struct{})
		go func() { m.Run(t.Context(), end); close(ended) }()
		ask := func(machine byte) error {
			c, err := l.dial(machine)
			if err != nil {
				return err
			}
			if _, err := io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n"); err != nil {
				return err
			}
			_, err = io.ReadAll(c)
			return err
		}
		var greedy []net.Conn
		for range maxOfOne {
			c, err := l.dial(1)
			if err != nil {
				t.Fatal(err)
			}
			greedy = append(greedy, c)
		}
		if err := ask(1); err == nil {
			t.Errorf("one more than %d of one machine was answered", maxOfOne)
		}
		if err := ask(2); err != nil {
			t.Errorf("another machine: %v", err)
		}
		if err := greedy[0].Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := ask(1); err != nil {
			t.Errorf("the machine that has closed one: %v", err)
		}
		for _, c := range greedy[1:] {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		close(end)
		<-ended
	})
}

// TestSilentClientsAreCutOff, and leave room for the next.
func TestSilentClientsAreCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemory()
		m := New(Config{Node: new(node), Log: slog.New(slog.DiscardHandler), Listen: func() (net.Listener, error) { return l, nil }})
		end, ended := make(chan struct{}), make(chan struct{})
		go func() { m.Run(t.Context(), end); close(ended) }()
		var silent []net.Conn
		for i := range maxConns {
			c, err := l.dial(byte(i))
			if err != nil {
				t.Fatal(err)
			}
			silent = append(silent, c)
		}
		asked := make(chan string, 1)
		go func() {
			c, err := l.dial(200)
			if err != nil {
				asked <- err.Error()
				return
			}
			if _, err := io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n"); err != nil {
				asked <- err.Error()
				return
			}
			b, err := io.ReadAll(c)
			if err != nil {
				asked <- err.Error()
				return
			}
			asked <- string(b)
		}()
		synctest.Wait()
		select {
		case text := <-asked:
			t.Errorf("one more than %d was answered: %s", maxConns, text)
		default:
		}
		began := time.Now()
		if text := <-asked; !strings.Contains(text, "200 OK") || time.Since(began) > requestTime {
			t.Errorf("after %s: %s", time.Since(began), text)
		}
		for _, c := range silent {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		close(end)
		<-ended
	})
}
