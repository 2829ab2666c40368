package diag_test

import (
	"encoding/json"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"sluice/internal/diag"
)

// FuzzAnswer prints whatever a plugin may answer, of another version even.
func FuzzAnswer(f *testing.F) {
	w := worker()
	w.cfg.Gossip = func() (bool, string) { return true, "running" }
	srv := w.server()
	for _, path := range []string{diag.PathStatus, diag.PathNetworks, diag.PathServices, diag.PathEntry, diag.PathConfig, diag.PathDiff, diag.PathService + "?name=shop"} {
		w := httptest.NewRecorder()
		srv.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		f.Add(w.Body.Bytes())
	}
	f.Add([]byte(`{"ports":[{"port":"x","path":{}}],"services":[{"backends":[{}]}],"problems":[{}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, a := range []diag.Answer{
			new(diag.Status), new(diag.Networks), new(diag.Services), new(diag.Entry), new(diag.Ports), new(diag.Settings), new(diag.Diff),
		} {
			if err := json.Unmarshal(raw, a); err != nil {
				continue
			}
			if text := a.Text(); text != "" && !strings.HasSuffix(text, "\n") {
				t.Errorf("%T: %q", a, text)
			}
			a.Found()
		}
	})
}

// FuzzAsk asks a server anything.
func FuzzAsk(f *testing.F) {
	for _, s := range []string{"shop", "", "81/tcp", "0", "81/sctp", "99999", "a b", "%"} {
		f.Add(s, s)
	}
	srv := worker().server()
	f.Fuzz(func(t *testing.T, a, b string) {
		if port, proto, err := diag.ParsePort(a); err == nil && (port == 0 || strings.Contains(a, "/") != (proto != "")) {
			t.Errorf("%q is port %d/%s", a, port, proto)
		}
		q := url.Values{"name": {a}, "network": {b}, "port": {a}}.Encode()
		for _, path := range []string{diag.PathService, diag.PathEntry} {
			w := httptest.NewRecorder()
			srv.ServeHTTP(w, httptest.NewRequest("GET", path+"?"+q, nil))
			if w.Code == 200 && !json.Valid(w.Body.Bytes()) || w.Body.Len() == 0 {
				t.Errorf("%s?%s: %d %q", path, q, w.Code, w.Body)
			}
		}
		if name := diag.SocketName(a); strings.Contains(name, "/") {
			t.Errorf("%q has socket %q", a, name)
		}
	})
}
