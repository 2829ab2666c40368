package monitor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"sluice/internal/diag"
	"sluice/internal/model"
)

// Node is what is asked of the node; *diag.Server answers. Its methods do not wait, but
// for Status, which reads a counter of each network from the kernel.
type Node interface {
	Healthy() error
	Serves(port uint16, proto model.Proto) (string, error)
	Status() diag.Status
	Services() diag.Services
}

// Config is what a Monitor is made of.
type Config struct {
	Addr netip.AddrPort // to listen on
	Node Node
	Log  *slog.Logger
	// Listen makes the listener. Nil: TCP, on Addr.
	Listen func() (net.Listener, error)
}

const (
	// retry is between two attempts to listen on a port that somebody has.
	retry = 5 * time.Second
	// requestTime is for a request to come in, and again for its answer to go out: both
	// are a packet or some, and a collector on a bad line has its own limit of 10 s.
	requestTime = 10 * time.Second
	// idleTime outlives the gap between the questions of a balancer or a collector that
	// keeps its connection, mostly 15 s or less.
	idleTime = time.Minute
	// maxHeader bounds the head of a request in bytes; those that come have some hundred.
	maxHeader = 4 << 10
	// maxConns bounds connections. Each takes some 20 KB, and the plugin as a whole
	// shall stay below 64 MiB; a node has few balancers and collectors.
	maxConns = 64
	// maxOfOne is how many of them one address may have: a balancer that asks for twenty
	// ports at once has them, and three addresses are not enough to keep it out.
	maxOfOne = 20
	// scrapedFor is how long an answer to collectors is used again: each is a look at
	// everything, tens of milliseconds on a large node, and anybody may ask.
	scrapedFor = time.Second
	// endTime is for the answers under way when the process ends, of the 10 s that the
	// engine gives it for everything.
	endTime = time.Second
)

// Monitor answers. Its methods may be called from any goroutine, Run only once.
type Monitor struct {
	cfg Config

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu  sync.Mutex
	err error // why it does not listen; nil: it does, or has not begun

	// scraping guards what follows. Rank: what Node locks is locked under it.
	scraping sync.Mutex
	scraped  time.Time // when text was made
	stopping bool      // as text has it
	text     string
}

// New makes a Monitor; Run starts it.
func New(cfg Config) *Monitor {
	// A switch of the library, for the types of metrics to be told. It is never
	// turned back.
	metrics.ExposeMetadata(true)
	if cfg.Listen == nil {
		cfg.Listen = func() (net.Listener, error) { return net.Listen(network(cfg.Addr), cfg.Addr.String()) }
	}
	return &Monitor{cfg: cfg}
}

// network is the network of an address, by its name in package net: there, 0.0.0.0 of
// "tcp" is all addresses of IPv6, too.
func network(a netip.AddrPort) string {
	if a.Addr().Is4() {
		return "tcp4"
	}
	return "tcp"
}

// State says why nobody is answered; nil if they are, or will be in a moment.
func (m *Monitor) State() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Run answers until end is closed. Once ctx has ended it says that the node stops. A
// port that is taken is tried again until it can be had.
func (m *Monitor) Run(ctx context.Context, end <-chan struct{}) {
	for {
		l, err := m.cfg.Listen()
		if err == nil {
			m.told(nil)
			err = m.serve(ctx, end, l)
		}
		m.told(err)
		select {
		case <-end:
			return
		case <-time.After(retry):
		}
	}
}

// told keeps why nobody is answered, and logs it if it is news.
func (m *Monitor) told(err error) {
	m.mu.Lock()
	was := m.err
	m.err = err
	m.mu.Unlock()
	switch {
	case err != nil && (was == nil || was.Error() != err.Error()):
		m.cfg.Log.Error("health checks and metrics are not answered, will be retried", "err", err)
	case err == nil && was != nil:
		m.cfg.Log.Info("health checks and metrics are answered", "op", m.cfg.Addr.String())
	}
}

// serve answers on l until end is closed, and closes l.
func (m *Monitor) serve(ctx context.Context, end <-chan struct{}, l net.Listener) error {
	srv := &http.Server{
		Handler:           m.handler(ctx),
		ReadHeaderTimeout: requestTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      requestTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		// What clients do wrong is no matter for the engine's log.
		ErrorLog: slog.NewLogLogger(m.cfg.Log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(limit(l, maxConns, maxOfOne)) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", m.cfg.Addr, err)
	case <-end:
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	err := srv.Shutdown(bounded)
	if err != nil {
		err = errors.Join(fmt.Errorf("end the answers under way: %w", err), srv.Close())
	}
	if e := <-failed; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// handler answers. Once ctx has ended, the node stops.
func (m *Monitor) handler(ctx context.Context) http.Handler {
	var mux http.ServeMux
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		text, status := m.health(ctx.Err() != nil, r.URL.RawQuery)
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(status)
		m.write(w, text+"\n")
	})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		m.write(w, m.scrape(ctx.Err() != nil))
	})
	return &mux
}

func (m *Monitor) write(w http.ResponseWriter, text string) {
	if _, err := w.Write([]byte(text)); err != nil {
		m.cfg.Log.Debug("answer not delivered", "err", err)
	}
}

// scrape is the answer to a collector.
func (m *Monitor) scrape(stopping bool) string {
	m.scraping.Lock()
	defer m.scraping.Unlock()
	if now := time.Now(); m.text == "" || m.stopping != stopping || now.Sub(m.scraped) >= scrapedFor {
		m.text, m.scraped, m.stopping = text(m.cfg.Node.Status(), m.cfg.Node.Services(), stopping), now, stopping
	}
	return m.text
}

// health is the answer to a health check and its HTTP status. query is like
// port=81&proto=udp; without a port, it is the node that is asked for.
func (m *Monitor) health(stopping bool, query string) (string, int) {
	port, proto, err := question(query)
	if err != nil {
		return err.Error(), http.StatusBadRequest
	}
	if stopping {
		return "no: sluice is being stopped", http.StatusServiceUnavailable
	}
	text := "the node is fine"
	if port == 0 {
		err = m.cfg.Node.Healthy()
	} else {
		text, err = m.cfg.Node.Serves(port, proto)
	}
	if err != nil {
		return "no: " + err.Error(), http.StatusServiceUnavailable
	}
	return "ok: " + text, http.StatusOK
}

// question reads what is asked for. Port 0 is none.
func question(query string) (uint16, model.Proto, error) {
	const want = "want /healthz, or /healthz?port=81, or /healthz?port=81&proto=udp"
	q, err := url.ParseQuery(query)
	if err != nil {
		return 0, "", fmt.Errorf("%w; %s", err, want)
	}
	for k, vs := range q {
		if k != "port" && k != "proto" || len(vs) != 1 {
			return 0, "", fmt.Errorf("%q is not asked for, or twice; %s", k, want)
		}
	}
	if !q.Has("port") {
		if q.Has("proto") {
			return 0, "", errors.New("a protocol without a port; " + want)
		}
		return 0, "", nil
	}
	proto := string(model.TCP)
	if q.Has("proto") {
		proto = q.Get("proto")
	}
	port, p, err := diag.ParsePort(q.Get("port") + "/" + proto)
	if err != nil {
		return 0, "", fmt.Errorf("%w; %s", err, want)
	}
	return port, p, nil
}

// limited is a listener with bounds on open connections. Who comes beyond that of all
// waits in the kernel; who comes beyond that of one address is cut off, as it would
// keep others out.
type limited struct {
	net.Listener
	each int // of one address
	free chan struct{}
	done chan struct{}
	once sync.Once

	// mu guards of. Rank: nothing else is locked while it is held.
	mu sync.Mutex
	of map[netip.Addr]int
}

func limit(l net.Listener, all, each int) net.Listener {
	return &limited{Listener: l, each: each, free: make(chan struct{}, all), done: make(chan struct{}), of: make(map[netip.Addr]int)}
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			<-l.free
			return nil, err
		}
		var from netip.Addr
		if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			from = t.AddrPort().Addr().Unmap()
		}
		if !l.enter(from) {
			_ = c.Close() // nothing was sent on it
			continue
		}
		return &conn{Conn: c, free: sync.OnceFunc(func() { l.exit(from); <-l.free })}, nil
	}
}

func (l *limited) enter(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[a] >= l.each {
		return false
	}
	l.of[a]++
	return true
}

func (l *limited) exit(a netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[a]--; l.of[a] == 0 {
		delete(l.of, a)
	}
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type conn struct {
	net.Conn
	free func()
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.free()
	return err
}
