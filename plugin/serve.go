package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"
)

// socketPath is where the engine looks for the socket that config.json names.
const socketPath = "/run/docker/plugins/sluice.sock"

// shutdownLimit is the budget of a call and a little more. The engine gives a
// plugin 10 s between SIGTERM and SIGKILL, for everything it has to end.
const shutdownLimit = budget + grace + 500*time.Millisecond

// listen makes a unix socket that root alone may use. A socket left by a
// process that was killed is removed; another file at that path is not.
func listen(path string) (net.Listener, error) {
	switch fi, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	case fi.Mode()&fs.ModeSocket == 0:
		return nil, fmt.Errorf("listen on %s: there is a file that is no socket; remove it", path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the socket of a former process: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The mode is set after the socket exists; until then the umask keeps others
	// from connecting, which takes the right to write.
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

// serve answers requests until ctx ends, then finishes those that are under way
// and returns. It closes l. An error means that it could not go on serving, or
// that requests were cut off at the end.
func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	// No timeouts on connections, and that is on purpose. Who may connect is
	// root, so there is no slow client to fear, while a connection that is
	// closed as idle in the moment the engine writes to it costs a call: the
	// engine repeats it without a body (see unmarshal). A negative IdleTimeout
	// is none.
	srv := &http.Server{
		Handler:     h,
		IdleTimeout: -1,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
	defer cancel()
	err := srv.Shutdown(end)
	if err != nil {
		err = errors.Join(fmt.Errorf("end the calls under way: %w", err), srv.Close())
	}
	if e := <-failed; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}
