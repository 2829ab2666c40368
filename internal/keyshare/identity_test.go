package keyshare

import (
	"bytes"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestAnIdentityIsWhatTheCertificateSays(t *testing.T) {
	c := newCA(t)
	for _, x := range []struct {
		role    string
		manager bool
	}{{"swarm-manager", true}, {"swarm-worker", false}} {
		id := c.node(t, "n1", x.role, "swarm1").identity(t)
		if id.Node != "n1" || id.Swarm != "swarm1" || id.Manager != x.manager {
			t.Errorf("%s: %+v", x.role, id)
		}
	}
}

func TestWhatIsNoIdentity(t *testing.T) {
	c := newCA(t)
	good := c.node(t, "n1", "swarm-worker", "swarm1")
	subject := func(f func(*x509.Certificate)) card { return c.node(t, "n1", "swarm-worker", "swarm1", f) }
	for _, x := range []struct {
		name string
		card card
		want string
	}{
		{"nothing", card{}, "no certificate"},
		{"garbage", card{[]byte("x"), []byte("y"), good.roots}, "certificate and key"},
		{"no roots", card{good.cert, good.key, good.cert[:40]}, "roots of the swarm"},
		{"another's key", card{good.cert, c.node(t, "n1", "swarm-worker", "swarm1").key, good.roots}, "does not match"},
		{"no key", card{good.cert, good.cert, good.roots}, "certificate and key"},
		{"no id", subject(func(c *x509.Certificate) { c.Subject.CommonName = "" }), "not of a node of a swarm"},
		{"no swarm", subject(func(c *x509.Certificate) { c.Subject.Organization = nil }), "not of a node of a swarm"},
		{"two swarms", subject(func(c *x509.Certificate) { c.Subject.Organization = []string{"swarm1", "swarm2"} }), "not of a node of a swarm"},
		{"two roles", subject(func(c *x509.Certificate) { c.Subject.OrganizationalUnit = []string{"swarm-worker", managerRole} }), "not of a node of a swarm"},
	} {
		_, err := Parse(x.card.cert, x.card.key, x.card.roots)
		if err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
}

func TestAKeyOfAnAutolockedSwarmIsKnownAsThat(t *testing.T) {
	good := newCA(t).node(t, "n1", managerRole, "swarm1")
	for name, key := range map[string][]byte{
		"PKCS 8":             toPEM("ENCRYPTED PRIVATE KEY", []byte("?"), map[string]string{"kek-version": "9", "raft-dek": "CAES"}),
		"the form before it": toPEM("EC PRIVATE KEY", []byte("?"), map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-256-CBC,00", "kek-version": "9"}),
	} {
		if _, err := Parse(good.cert, key, good.roots); !errors.Is(err, ErrLocked) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// host is a data directory of an engine, whose socket this process listens on.
type host struct {
	Files
	dir  string
	data string
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{dir: t.TempDir()}
	l, err := net.Listen("unix", filepath.Join(h.dir, "docker.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	h.data = filepath.Join(h.dir, "docker")
	if err := os.MkdirAll(filepath.Join(h.data, filepath.Dir(certFile)), 0o700); err != nil {
		t.Fatal(err)
	}
	h.Socket, h.Proc, h.DataRoot = l.Addr().String(), "/proc", func() string { return h.data }
	return h
}

func (h *host) put(t *testing.T, c card) {
	t.Helper()
	for name, text := range map[string][]byte{certFile: c.cert, keyFile: c.key, rootsFile: c.roots} {
		if err := os.WriteFile(filepath.Join(h.data, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFilesAreFoundByTheEnginesSocket(t *testing.T) {
	h, c := newHost(t), newCA(t)
	if pid, err := listener(h.Socket); err != nil || pid != os.Getpid() {
		t.Fatalf("%d listens, %v; want %d", pid, err, os.Getpid())
	}
	if _, err := h.Read(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("before the node joins a swarm: %v", err)
	}
	h.put(t, c.node(t, "n1", "swarm-worker", "swarm1"))
	if id, err := h.Read(); err != nil || id.Node != "n1" {
		t.Errorf("%+v, %v", id, err)
	}
	// It joins another swarm, and the engine is asked anew after a while.
	h.put(t, newCA(t).node(t, "n2", "swarm-worker", "swarm2"))
	h.at = h.at.Add(-fresh)
	if id, err := h.Read(); err != nil || id.Node != "n2" {
		t.Errorf("%+v, %v", id, err)
	}
	h.at = h.at.Add(-fresh)
	for name, x := range map[string]struct {
		change func(*host)
		want   string
	}{
		"not told yet":      {func(h *host) { h.DataRoot = func() string { return "" } }, "has not told its data directory"},
		"no engine":         {func(h *host) { h.Socket += "x" }, "find the engine's process"},
		"nobody to look at": {func(h *host) { h.Proc = h.dir }, "look into the engine's process"},
		"it has ended":      {func(h *host) { h.put(t, c.node(t, "n1", "swarm-worker", "swarm1", ended)) }, "ended at"},
		"autolock":          {func(h *host) { h.put(t, card{c.pem, toPEM("ENCRYPTED PRIVATE KEY", nil, nil), c.pem}) }, "autolocked"},
		"a file without an end": {func(h *host) {
			h.put(t, card{bytes.Repeat([]byte{'x'}, maxFile+1), nil, nil})
		}, "larger than"},
		// It would lead to a file of this process, not of the engine's host.
		"a link that leads elsewhere": {func(h *host) {
			h.data = filepath.Join(h.dir, "moved")
			if err := os.Symlink(filepath.Join(h.dir, "docker"), h.data); err != nil {
				t.Fatal(err)
			}
		}, "escapes"},
	} {
		h := &host{Files: Files{Socket: h.Socket, Proc: "/proc"}, dir: h.dir, data: h.data}
		h.DataRoot = func() string { return h.data }
		x.change(h)
		if _, err := h.Read(); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", name, err, x.want)
		}
	}
}

// TestWhatWasReadServesForAWhile: those who reach the port do not decide how often
// the engine's socket is dialled.
func TestWhatWasReadServesForAWhile(t *testing.T) {
	h, c := newHost(t), newCA(t)
	h.put(t, c.node(t, "n1", "swarm-worker", "swarm1", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(time.Hour) }))
	if _, err := h.Read(); err != nil {
		t.Fatal(err)
	}
	h.put(t, c.node(t, "n2", "swarm-worker", "swarm1"))
	if id, err := h.Read(); err != nil || id.Node != "n1" {
		t.Errorf("%+v, %v", id, err)
	}
	h.last.ends = time.Now() // but not longer than the certificate itself
	if id, err := h.Read(); err != nil || id.Node != "n2" {
		t.Errorf("%+v, %v", id, err)
	}
}

func FuzzParse(f *testing.F) {
	good := newCA(f).node(f, "n1", "swarm-worker", "swarm1")
	f.Add(good.cert, good.key, good.roots)
	f.Add(slices.Concat(good.cert, good.roots), good.key, slices.Concat(good.roots, good.roots))
	f.Add([]byte("-----BEGIN"), toPEM("ENCRYPTED PRIVATE KEY", []byte("?"), nil), []byte{})
	f.Fuzz(func(t *testing.T, cert, key, roots []byte) {
		id, err := Parse(cert, key, roots)
		if err == nil && (id.Node == "" || id.Swarm == "" || id.roots == nil) {
			t.Errorf("%+v", id)
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"keys":["` + strings.Repeat("41", 32) + `"]}`))
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte(`{"keys":["` + strconv.Itoa(1) + `"]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := decode(b)
		if err == nil && len(keys) == 0 {
			t.Error("neither keys nor an error")
		}
		for _, k := range keys {
			if len(k) != 16 && len(k) != 24 && len(k) != 32 {
				t.Errorf("a key of %d bytes", len(k))
			}
		}
	})
}
