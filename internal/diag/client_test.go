package diag_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
)

func TestSocketNames(t *testing.T) {
	for alias, want := range map[string]string{
		"": "", "sluice": "sluice", "sluice:latest": "sluice", "sluice:v2": "sluice:v2", "example.org/net/sluice:latest": "example.org_net_sluice",
	} {
		if got := diag.SocketName(alias); got != want {
			t.Errorf("%q: %q, want %q", alias, got, want)
		}
	}
}

func TestFindSocket(t *testing.T) {
	for _, c := range []struct {
		name, plugin string
		files        []string
		want         string   // file found
		words        []string // of the error
	}{
		{"the only one", "", []string{"sluice.sock"}, "sluice.sock", nil},
		{"other files do not count", "", []string{"sluice.sock", "README", "lock"}, "sluice.sock", nil},
		{"by name", "sluice", []string{"sluice.sock", "sluice-local.sock"}, "sluice.sock", nil},
		{"as docker plugin ls shows it", "sluice:latest", []string{"sluice.sock", "sluice-local.sock"}, "sluice.sock", nil},
		{"with a repository", "me/sluice", []string{"me_sluice.sock", "sluice.sock"}, "me_sluice.sock", nil},
		{"by a beginning", "sluice-l", []string{"sluice.sock", "sluice-local.sock"}, "sluice-local.sock", nil},
		{"nothing there", "", nil, "", []string{"is sluice enabled", "docker plugin ls"}},
		{"nothing there by that name", "sluice", []string{"lock"}, "", []string{"is sluice enabled"}},
		{"several", "", []string{"a.sock", "b.sock"}, "", []string{"several plugins", "--plugin", "a, b"}},
		{"several by a beginning", "s", []string{"s1.sock", "s2.sock", "t.sock"}, "", []string{"--plugin s", "s1, s2"}},
		{"another name", "other", []string{"a.sock", "b.sock"}, "", []string{`no plugin "other"`, "a, b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, f := range c.files {
				if err := os.WriteFile(filepath.Join(dir, f), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			got, err := diag.FindSocket(dir, c.plugin)
			if c.want != "" && (err != nil || got != filepath.Join(dir, c.want)) {
				t.Errorf("%s, %v", got, err)
			}
			hasWords(t, err, c.words)
		})
	}
	_, err := diag.FindSocket(filepath.Join(t.TempDir(), "none"), "")
	hasWords(t, err, []string{"is sluice enabled"})
}

func hasWords(t *testing.T, err error, words []string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("error %v, want %q in it", err, w)
		}
	}
}

// listen serves h on a new socket until the test ends.
func listen(t *testing.T, h http.Handler) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
	return path
}

func TestWhatAskTellsWhenThereIsNoAnswer(t *testing.T) {
	hang := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	half := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, `{"version":`)
		w.(http.Flusher).Flush()
		hang(w, r)
	})
	says := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
	}
	stale := filepath.Join(t.TempDir(), "stale.sock")
	l, err := net.Listen("unix", stale)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, socket string
		words        []string
	}{
		{"no socket", filepath.Join(t.TempDir(), "none.sock"), []string{"no such file", "does the plugin run", "docker plugin ls"}},
		{"a socket without a process", stale, []string{"connection refused", "does the plugin run"}},
		{"a hanging plugin", listen(t, hang), []string{"does not answer in time", "journalctl"}},
		{"a plugin that stops midway", listen(t, half), []string{"read the answer"}},
		{"another version", listen(t, http.NotFoundHandler()), []string{"404", "different versions"}},
		{"no JSON", listen(t, says("hello")), []string{"different versions"}},
		{"another type", listen(t, says(`{"version":7}`)), []string{"different versions"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			_, err := diag.Ask(ctx, c.socket, diag.PathStatus, new(diag.Status))
			hasWords(t, err, append(c.words, c.socket))
			if err != nil && strings.Contains(err.Error(), "http://") {
				t.Errorf("a made-up URL is in the text: %v", err)
			}
		})
	}
}

func TestAskWithoutPermission(t *testing.T) {
	if os.Getuid() == 0 {
		t.Skip("missing: a user who is not root; root may connect to every socket")
	}
	path := listen(t, http.NotFoundHandler())
	if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	_, err := diag.Ask(t.Context(), path, diag.PathStatus, new(diag.Status))
	hasWords(t, err, []string{"permission denied", "run as root"})
}

func TestAskReadsTheAnswer(t *testing.T) {
	w := worker()
	w.cfg.Gossip = func() (bool, string) { return true, "running" }
	path := listen(t, w.server())
	var s diag.Status
	raw, err := diag.Ask(t.Context(), path, diag.PathStatus, &s)
	if err != nil || s.Node != "node1" || !strings.Contains(string(raw), `"node":"node1"`) {
		t.Errorf("%+v, %v", s, err)
	}
}
