package keyshare

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/internal/options"
)

// patience bounds what takes milliseconds on an idle machine.
const patience = 10 * time.Second

// manager is one of swarm1, with a Server at 127.0.0.1.
type manager struct {
	*Server
	addr netip.AddrPort

	mu      sync.Mutex
	id      Identity
	idErr   error
	keys    [][]byte
	nodes   []string      // that it lists
	asked   chan struct{} // of the keys
	logged  bytes.Buffer
	stop    context.CancelFunc
	limited limits
}

func (m *manager) change(f func()) {
	m.mu.Lock()
	f()
	m.mu.Unlock()
	m.Wake()
}

func (m *manager) Write(b []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.logged.Write(b)
}

func (m *manager) log() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.logged.String()
}

func gossipKey(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func newManager(t *testing.T, id Identity, change ...func(*manager)) *manager {
	t.Helper()
	m := &manager{id: id, nodes: []string{"m1", "w1"}, asked: make(chan struct{}, 16), limited: limits{hold, slow, life}}
	for _, f := range change {
		f(m)
	}
	m.Server = NewServer(ServerConfig{
		Identity: func() (Identity, error) { m.mu.Lock(); defer m.mu.Unlock(); return m.id, m.idErr },
		Keys: func() [][]byte {
			m.mu.Lock()
			defer m.mu.Unlock()
			select {
			case m.asked <- struct{}{}:
			default:
			}
			return slices.Clone(m.keys)
		},
		Member: func(node string) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			if !slices.Contains(m.nodes, node) {
				return fmt.Errorf("node %s is not listed", node)
			}
			return nil
		},
		Log: slog.New(slog.NewTextHandler(m, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	m.limits = m.limited
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.addr = l.Addr().(*net.TCPAddr).AddrPort()
	ctx, cancel := context.WithCancel(context.Background())
	m.stop = cancel
	done := make(chan error, 1)
	go func() { done <- m.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Error("the server does not end")
		}
		for _, k := range m.keys {
			if strings.Contains(m.logged.String(), options.EncodeKey(k)) {
				t.Error("a key is in the log")
			}
		}
		if strings.Contains(m.logged.String(), "PRIVATE KEY") {
			t.Error("a private key is in the log")
		}
	})
	return m
}

func (m *manager) ask(t *testing.T, id Identity) ([][]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	return Ask(ctx, id, m.addr)
}

// wasAsked waits until a request has found out that there are no keys.
func (m *manager) wasAsked(t *testing.T) {
	t.Helper()
	select {
	case <-m.asked:
	case <-time.After(patience):
		t.Fatal("nobody was let to ask for keys")
	}
}

// tells waits until the log says something: a refusal may be heard before it is
// logged.
func (m *manager) tells(t *testing.T, what string) {
	t.Helper()
	for end := time.Now().Add(patience); !strings.Contains(m.log(), what); runtime.Gosched() {
		if time.Now().After(end) {
			t.Fatalf("not in the log: %q in %s", what, m.log())
		}
	}
}

func with(keys ...[]byte) func(*manager) { return func(m *manager) { m.keys = keys } }

func equal(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

func TestANodeOfTheSwarmGetsTheKeys(t *testing.T) {
	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t), with(gossipKey(1), gossipKey(2)))
	for _, who := range []card{c.node(t, "w1", "swarm-worker", "swarm1"), c.node(t, "m1", managerRole, "swarm1")} {
		got, err := m.ask(t, who.identity(t))
		if err != nil || !equal(got, m.keys) {
			t.Errorf("%d keys, %v", len(got), err)
		}
	}
	m.tells(t, `msg="gossip key given to a node of the swarm" node=w1`)
}

func TestTheFirstKeyEndsTheWait(t *testing.T) {
	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t))
	type answer struct {
		keys [][]byte
		err  error
	}
	answers := make(chan answer, 1)
	id := c.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	go func() {
		keys, err := m.ask(t, id)
		answers <- answer{keys, err}
	}()
	m.wasAsked(t) // there were none
	m.Wake()      // for nothing
	m.change(func() { m.keys = [][]byte{gossipKey(3)} })
	if a := <-answers; a.err != nil || !equal(a.keys, [][]byte{gossipKey(3)}) {
		t.Errorf("%d keys, %v", len(a.keys), a.err)
	}
}

func TestANodeThatIsRemovedWhileItWaitsGetsNothing(t *testing.T) {
	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t))
	refused := make(chan error, 1)
	id := c.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	go func() {
		_, err := m.ask(t, id)
		refused <- err
	}()
	m.wasAsked(t)
	m.change(func() { m.nodes, m.keys = []string{"m1"}, [][]byte{gossipKey(1)} })
	if err := <-refused; err == nil || !strings.Contains(err.Error(), "node w1 is not listed") {
		t.Errorf("%v", err)
	}
}

func TestAManagerWithoutKeysSaysSoInTheEnd(t *testing.T) {
	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t), func(m *manager) { m.limited.hold = time.Millisecond })
	if keys, err := m.ask(t, c.node(t, "w1", "swarm-worker", "swarm1").identity(t)); err != nil || keys != nil {
		t.Errorf("%d keys, %v", len(keys), err)
	}
}

// TestWhoIsRefused: whoever is no node of this swarm now, or no manager.
func TestWhoIsRefused(t *testing.T) {
	c, other := newCA(t), newCA(t)
	boss := c.node(t, "m1", managerRole, "swarm1")
	worker := c.node(t, "w1", "swarm-worker", "swarm1")
	foreign := other.node(t, "w1", "swarm-worker", "swarm1")
	foreign.roots = c.pem // so that it does not refuse by itself
	for _, x := range []struct {
		name          string
		server, asker card
		want          string
	}{
		{"asked by another swarm's node", boss, foreign, "tls: "},
		{"asked by a removed node", boss, c.node(t, "gone", "swarm-worker", "swarm1"), "node gone is not listed"},
		{"asked with a certificate that has ended", boss, c.node(t, "w1", "swarm-worker", "swarm1", ended), "tls: "},
		{"asked with a certificate for servers alone", boss, c.node(t, "w1", "swarm-worker", "swarm1", func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), "tls: "},
		{"answered by another swarm's manager", other.node(t, "m1", managerRole, "swarm1"), worker, "unknown authority"},
		{"answered by a manager of another swarm of the same CA", c.node(t, "m1", managerRole, "swarm2"), worker, "another swarm"},
		{"answered by a worker", c.node(t, "w2", "swarm-worker", "swarm1"), worker, "swarm-manager"},
		{"answered by a worker with a manager's name", c.node(t, "w2", "swarm-worker", "swarm1", func(c *x509.Certificate) {
			c.DNSNames = []string{managerRole}
		}), worker, "is no manager"},
		{"answered with a certificate that has ended", c.node(t, "m1", managerRole, "swarm1", ended), worker, "expired"},
	} {
		t.Run(x.name, func(t *testing.T) {
			m := newManager(t, x.server.identity(t), with(gossipKey(1)))
			keys, err := m.ask(t, x.asker.identity(t))
			if err == nil || keys != nil || !strings.Contains(err.Error(), x.want) {
				t.Errorf("%d keys, %v, want %q; log: %s", len(keys), err, x.want, m.log())
			}
			if strings.Contains(m.log(), "given") {
				t.Error("given")
			}
		})
	}
}

// TestCertificatesAreRenewed: each handshake takes what there is by then, and while
// swarm replaces its CA (docker swarm ca --rotate), certificates of the new one come
// with one of it that the old one has signed.
func TestCertificatesAreRenewed(t *testing.T) {
	before, after := newCA(t), newCA(t)
	crossed := signed(t, &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "swarm-ca"}, NotBefore: after.cert.NotBefore, NotAfter: after.cert.NotAfter,
		KeyUsage: x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}, before.cert, after.key, before.key)
	boss := func(c *ca) card { return c.node(t, "m1", managerRole, "swarm1") }
	m := newManager(t, boss(before).identity(t), with(gossipKey(1)))
	old := before.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	if _, err := m.ask(t, old); err != nil {
		t.Error(err)
	}
	between := boss(after)
	between.cert, between.roots = slices.Concat(between.cert, crossed.pem), before.pem
	m.change(func() { m.id = between.identity(t) })
	if _, err := m.ask(t, old); err != nil {
		t.Errorf("a manager with a certificate of the new CA: %v", err)
	}
	worker := after.node(t, "w1", "swarm-worker", "swarm1")
	worker.cert, worker.roots = slices.Concat(worker.cert, crossed.pem), before.pem
	if _, err := m.ask(t, worker.identity(t)); err != nil {
		t.Errorf("both with one of the new CA: %v", err)
	}
	m.change(func() { m.id = boss(after).identity(t) })
	if _, err := m.ask(t, old); err == nil {
		t.Error("the old CA is believed still")
	}
	worker.roots = after.pem
	if _, err := m.ask(t, worker.identity(t)); err != nil {
		t.Errorf("all new: %v", err)
	}
	m.change(func() { m.idErr = ErrLocked })
	if _, err := m.ask(t, worker.identity(t)); err == nil {
		t.Error("answered without an identity")
	}
	m.tells(t, "autolocked")
}

// TestWhatIsNoRequestIsRefused, whoever sends it.
func TestWhatIsNoRequestIsRefused(t *testing.T) {
	c := newCA(t)
	id := c.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t), with(gossipKey(1)))
	secret := options.EncodeKey(gossipKey(1))
	bare, older := id.client(), id.client()
	bare.Certificates = nil
	foreign := c.node(t, "w1", "swarm-worker", "swarm2").identity(t).client() // of the same CA
	foreign.VerifyConnection = nil
	older.MinVersion, older.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for _, x := range []struct {
		name string
		tls  *tls.Config // nil: none
		text string
		want string // "": nothing at all, or an alert
	}{
		{"plain HTTP", nil, "GET /v1/keys HTTP/1.1\r\nHost: x\r\n\r\n", "400 Bad Request"},
		{"garbage", nil, "\x16\x03\x01\xff\xff" + strings.Repeat("x", 70000), ""},
		{"no certificate", bare, "GET /v1/keys HTTP/1.1\r\nHost: x\r\n\r\n", ""},
		{"another swarm's", foreign, "GET /v1/keys HTTP/1.1\r\nHost: x\r\n\r\n", ""},
		{"TLS 1.2", older, "GET /v1/keys HTTP/1.1\r\nHost: x\r\n\r\n", ""},
		{"another path", id.client(), "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"},
		{"another method", id.client(), "POST /v1/keys HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"},
		{"a body", id.client(), "GET /v1/keys HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "404 Not Found"},
		{"a long header", id.client(), "GET /v1/keys HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 4*maxHeader) + "\r\n\r\n", "431 "},
		{"garbage in TLS", id.client(), "\x00\x01\x02\r\n\r\n", "400 Bad Request"},
	} {
		t.Run(x.name, func(t *testing.T) {
			got := send(t, m.addr, x.tls, x.text)
			if !strings.Contains(got, x.want) || strings.Contains(got, secret) || x.want == "" && strings.Contains(got, "HTTP") {
				t.Errorf("%q, want %q", got, x.want)
			}
		})
	}
	if _, err := m.ask(t, id); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

// send writes text, and returns all that comes back; errors are an answer too.
func send(t *testing.T, to netip.AddrPort, cfg *tls.Config, text string) string {
	t.Helper()
	c, err := net.Dial("tcp4", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if cfg != nil {
		c = tls.Client(c, cfg)
	}
	_, werr := io.WriteString(c, text)
	got, rerr := io.ReadAll(c)
	for _, err := range []error{werr, rerr} {
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			t.Errorf("left open: %v", err)
		}
	}
	return string(got)
}

func TestASlowClientIsLeft(t *testing.T) {
	c := newCA(t)
	short := func(m *manager) { m.limited.slow = 50 * time.Millisecond }
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t), with(gossipKey(1)), short)
	if got := send(t, m.addr, nil, ""); got != "" {
		t.Errorf("silent from the start: %q", got)
	}
	if got := send(t, m.addr, c.node(t, "w1", "swarm-worker", "swarm1").identity(t).client(), "GET /v1/"); strings.Contains(got, "200") {
		t.Errorf("silent in the middle of a request: %q", got)
	}
	brief := func(m *manager) { m.limited.life = 50 * time.Millisecond }
	m = newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t), brief)
	if _, err := m.ask(t, c.node(t, "w1", "swarm-worker", "swarm1").identity(t)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a connection outlives its time: %v", err)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	g := newGuard(nil, life)
	a := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}) }
	for i := range maxOfOne {
		if !g.enter(a(0)) {
			t.Errorf("connection %d of an address is refused", i+1)
		}
	}
	if g.enter(a(0)) {
		t.Error("one address has more than its share")
	}
	for i := range maxConns - maxOfOne {
		if !g.enter(a(1 + i)) {
			t.Fatalf("address %d is refused", i+1)
		}
	}
	if g.enter(a(maxConns)) {
		t.Error("more connections than there may be")
	}
	g.exit(a(0))
	if !g.enter(a(maxConns)) || len(g.of) != maxConns-maxOfOne+2 {
		t.Errorf("a place that is free is not given: %d addresses", len(g.of))
	}

	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t), with(gossipKey(1)))
	var open []net.Conn
	for range maxOfOne {
		c, err := net.Dial("tcp4", m.addr.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		open = append(open, c)
	}
	id := c.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	if _, err := m.ask(t, id); err == nil {
		t.Error("one more is answered")
	}
	for _, c := range open {
		c.Close()
	}
	for end := time.Now().Add(patience); ; {
		if _, err := m.ask(t, id); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatalf("the places of those that have gone are not free: %v", err)
		}
	}
}

// TestAnswersThatAreNone: a manager's plugin may be of another version, or broken.
func TestAnswersThatAreNone(t *testing.T) {
	c := newCA(t)
	boss, id := c.node(t, "m1", managerRole, "swarm1").identity(t), c.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	many, err := json.Marshal(reply{slices.Repeat([]string{options.EncodeKey(gossipKey(1))}, maxKeys+1)})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name   string
		status int
		body   string
		want   string
	}{
		{"nothing", 200, "", "not understood"},
		{"garbage", 200, "hello", "not understood"},
		{"no keys", 200, `{"keys":[]}`, "0 keys"},
		{"too many", 200, string(many), "65 keys"},
		{"a short key", 200, `{"keys":["4141"]}`, "not a gossip key"},
		{"without an end", 200, strings.Repeat(" ", maxReply+1), "longer than"},
		{"elsewhere", 302, "", "refused"},
		{"a refusal", 403, "no\x1b[2J\nway" + strings.Repeat("!", 300), "refused: no [2J way!!!"},
	} {
		t.Run(x.name, func(t *testing.T) {
			l, err := tls.Listen("tcp4", "127.0.0.1:0", boss.server())
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", "https://"+r.Host+"/elsewhere")
				w.WriteHeader(x.status)
				if _, err := io.WriteString(w, x.body); err != nil {
					t.Error(err)
				}
			})}
			defer srv.Close()
			go srv.Serve(l)
			keys, err := Ask(t.Context(), id, l.Addr().(*net.TCPAddr).AddrPort())
			if err == nil || keys != nil || !strings.Contains(err.Error(), x.want) || len(err.Error()) > 2*maxRefusal {
				t.Errorf("%d keys, %v; want %q", len(keys), err, x.want)
			}
		})
	}
}

func TestAskEndsWithItsContext(t *testing.T) {
	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t))
	ctx, cancel := context.WithCancel(t.Context())
	ctx, end := context.WithTimeout(ctx, patience)
	defer end()
	go func() {
		<-m.asked
		cancel()
	}()
	if _, err := Ask(ctx, c.node(t, "w1", "swarm-worker", "swarm1").identity(t), m.addr); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestWhoWaitsIsToldOfTheEnd(t *testing.T) {
	c := newCA(t)
	m := newManager(t, c.node(t, "m1", managerRole, "swarm1").identity(t))
	refused := make(chan error, 1)
	id := c.node(t, "w1", "swarm-worker", "swarm1").identity(t)
	go func() {
		_, err := m.ask(t, id)
		refused <- err
	}()
	m.wasAsked(t)
	m.stop()
	if err := <-refused; err == nil || strings.Contains(err.Error(), "not understood") {
		t.Error(err)
	}
}
