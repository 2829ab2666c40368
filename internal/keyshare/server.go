package keyshare

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"sluice/internal/options"
)

// path is what is asked for. Another form of the answer would get another path.
const path = "/v1/keys"

const (
	// hold is how long a request waits for the first key. Nodes without a network
	// then ask once a minute each.
	hold = time.Minute
	// slow is for a handshake, for a request's header, and for an answer: each is one
	// or two packets, and a busy machine may take a second.
	slow = 5 * time.Second
	// life is of a connection, whatever it is used for.
	life = hold + 4*slow
	// maxHeader bounds a request's header, which is some hundred bytes.
	maxHeader = 4 << 10
)

// ServerConfig is what a Server is made of. The functions are called from many
// goroutines and must not block.
type ServerConfig struct {
	Identity func() (Identity, error)
	Keys     func() [][]byte // the keys that are known now
	// Member says why a node, by swarm's id, is none of the swarm's now; nil if it is.
	Member func(node string) error
	Log    *slog.Logger
}

// Server gives keys to nodes of the swarm. Its methods may be called from any
// goroutine.
type Server struct {
	cfg    ServerConfig
	limits limits

	// mu guards changed. Rank: nothing else is locked while it is held.
	mu      sync.Mutex
	changed chan struct{} // closed when the keys change
}

// limits are the Server's, which tests shorten.
type limits struct{ hold, slow, life time.Duration }

// NewServer makes a Server; Serve starts it.
func NewServer(cfg ServerConfig) *Server {
	return &Server{cfg: cfg, limits: limits{hold, slow, life}, changed: make(chan struct{})}
}

// Wake says that the keys have changed. It does not wait.
func (s *Server) Wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Server) waker() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// Serve answers on l until ctx ends, and returns when all that it started has
// ended. It closes l. An error means that it could not go on.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx) // ends the requests that wait
	defer cancel()
	var conns sync.WaitGroup
	srv := &http.Server{
		Handler: http.HandlerFunc(s.answer),
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew: // told by srv.Serve itself
				conns.Add(1)
			case http.StateClosed:
				conns.Done()
			}
		},
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ReadHeaderTimeout: s.limits.slow, // of the handshake too
		WriteTimeout:      s.limits.hold + s.limits.slow,
		MaxHeaderBytes:    maxHeader,
		// Whoever scans ports causes a line: nothing that a person must know.
		ErrorLog: slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
	}
	srv.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() }) // of connections that are of no more use
	defer stop()
	err := srv.Serve(tls.NewListener(newGuard(l, s.limits.life), &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			id, err := s.cfg.Identity()
			if err != nil {
				return nil, err
			}
			return id.server(), nil
		},
	}))
	cancel()
	_ = srv.Close()
	conns.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// reply is the body of an answer with keys, each as options.EncodeKey writes it.
type reply struct {
	Keys []string `json:"keys"`
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet || r.URL.Path != path || r.ContentLength != 0 {
		http.Error(w, "GET "+path+" is all that is answered", http.StatusNotFound)
		return
	}
	// The handshake has verified it; whose it is, is told again here.
	leaf := r.TLS.PeerCertificates[0]
	node, _, _, err := subject(leaf.Subject)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	timer := time.NewTimer(s.limits.hold)
	defer timer.Stop()
	for {
		changed := s.waker() // before the keys are looked at, so that no change falls in between
		// Anew each time: a node may be removed while it waits.
		if err := s.cfg.Member(node); err != nil {
			s.cfg.Log.Info("a node asked for the gossip key and was refused", "node", node, "addr", r.RemoteAddr, "err", err)
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		if keys := s.cfg.Keys(); len(keys) > 0 {
			s.give(w, r, node, keys)
			return
		}
		select {
		case <-changed:
		case <-timer.C:
			w.WriteHeader(http.StatusNoContent)
			return
		case <-r.Context().Done():
			http.Error(w, "this manager stops giving keys", http.StatusServiceUnavailable) // nothing at all would be 200
			return
		}
	}
}

func (s *Server) give(w http.ResponseWriter, r *http.Request, node string, keys [][]byte) {
	var out reply
	for _, k := range keys[:min(len(keys), maxKeys)] { // the one to send with is the first
		out.Keys = append(out.Keys, options.EncodeKey(k))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if err := json.NewEncoder(w).Encode(out); err != nil {
		s.cfg.Log.Info("the gossip key did not get to a node, which will ask again", "node", node, "addr", r.RemoteAddr, "err", err)
		return
	}
	s.cfg.Log.Info("gossip key given to a node of the swarm", "node", node, "addr", r.RemoteAddr)
}
