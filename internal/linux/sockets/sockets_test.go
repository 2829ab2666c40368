package sockets_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/linux/sockets"
	"sluice/internal/netnstest"
)

// patience bounds every wait; what is waited for takes milliseconds.
const patience = 10 * time.Second

// lab is a task and a client.
type lab struct {
	t            *testing.T
	s            *sockets.Sockets
	task, client *netnstest.Host
}

func newLab(t *testing.T) lab {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.Destroy)
	hosts := netnstest.LAN(t, 2)
	return lab{t, sockets.New(), hosts[0], hosts[1]}
}

// listen makes a server in ns that hands out what it accepts.
func (l lab) listen(ns *netnstest.NS, network, addr string) (net.Listener, <-chan net.Conn) {
	l.t.Helper()
	var s net.Listener
	ns.Must(func() (err error) {
		s, err = net.Listen(network, addr)
		return err
	})
	l.t.Cleanup(func() { s.Close() })
	return s, l.accept(s)
}

func (l lab) accept(s net.Listener) <-chan net.Conn {
	accepted := make(chan net.Conn, 16) // more than any test dials
	go func() {
		defer close(accepted)
		for {
			c, err := s.Accept()
			if err != nil {
				return // closed with the test
			}
			accepted <- c
		}
	}()
	l.t.Cleanup(func() {
		s.Close()
		for c := range accepted {
			c.Close()
		}
	})
	return accepted
}

// dial connects from ns, and waits for the server's side.
func (l lab) dial(ns *netnstest.NS, addr string, accepted <-chan net.Conn) (client, server net.Conn) {
	l.t.Helper()
	ns.Must(func() (err error) {
		client, err = net.DialTimeout("tcp", addr, patience)
		return err
	})
	l.t.Cleanup(func() { client.Close() })
	select {
	case server = <-accepted:
	case <-time.After(patience):
		l.t.Fatal("nothing was accepted")
	}
	l.t.Cleanup(func() { server.Close() })
	return client, server
}

func (l lab) list() map[netip.AddrPort]kernel.Conn {
	l.t.Helper()
	conns, err := l.s.Accepted(l.t.Context(), l.task.Path(), l.task.Addr)
	if err != nil {
		l.t.Fatal(err)
	}
	out := map[netip.AddrPort]kernel.Conn{}
	for _, c := range conns {
		out[c.Remote] = c
	}
	return out
}

func (l lab) end(want int, conns ...kernel.Conn) {
	l.t.Helper()
	got, err := l.s.End(l.t.Context(), l.task.Path(), conns)
	if err != nil || got != want {
		l.t.Fatalf("ended %d, %v; want %d", got, err, want)
	}
}

// says passes one byte from one side to the other.
func (l lab) says(from, to net.Conn) {
	l.t.Helper()
	b := make([]byte, 1)
	if _, err := from.Write([]byte("x")); err != nil {
		l.t.Fatal(err)
	}
	if err := to.SetReadDeadline(time.Now().Add(patience)); err != nil {
		l.t.Fatal(err)
	}
	if _, err := to.Read(b); err != nil {
		l.t.Fatal(err)
	}
}

// fails waits until a read fails, and with what.
func (l lab) fails(c net.Conn, want syscall.Errno) {
	l.t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		l.t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, want) {
		l.t.Fatalf("read: %v, want %v", err, want)
	}
}

func remote(c net.Conn) netip.AddrPort {
	a := c.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func TestKernelCanEndConnections(t *testing.T) {
	netnstest.Need(t, netnstest.Root, netnstest.Destroy)
	if err := sockets.New().Probe(); err != nil {
		t.Error(err)
	}
}

func TestEndedConnectionFailsOnBothSides(t *testing.T) {
	for _, tc := range []struct {
		name, network, addr string
		ipv6                bool
	}{
		{"of a server of IPv4", "tcp4", "0.0.0.0:80", false},
		{"of a server of one address", "tcp4", "192.0.2.1:80", false},
		{"of a server for both", "tcp", "[::]:80", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLab(t)
			_, accepted := l.listen(l.task.NS, tc.network, tc.addr)
			client, server := l.dial(l.client.NS, "192.0.2.1:80", accepted)
			otherClient, otherServer := l.dial(l.client.NS, "192.0.2.1:80", accepted)
			conns := l.list()
			c := conns[remote(server)]
			if len(conns) != 2 || c.IPv6 != tc.ipv6 || c.Local.String() != "192.0.2.1:80" || c.Cookie == 0 {
				t.Fatalf("listed: %+v", conns)
			}
			l.end(1, c)
			l.fails(client, syscall.ECONNRESET)
			l.fails(server, syscall.ECONNABORTED)
			l.says(otherClient, otherServer)
			l.says(otherServer, otherClient)
			if conns := l.list(); len(conns) != 1 || conns[remote(server)] != (kernel.Conn{}) {
				t.Errorf("listed after it: %+v", conns)
			}
			l.end(0, c) // and once more is nothing
		})
	}
}

func TestOnlyConnectionsOfClientsAreListed(t *testing.T) {
	l := newLab(t)
	_, accepted := l.listen(l.task.NS, "tcp", "[::]:80")
	_, own := l.listen(l.client.NS, "tcp4", "0.0.0.0:80")
	_, onlyV6 := l.listen(l.task.NS, "tcp6", "[::]:81")
	stops, stopped := l.listen(l.task.NS, "tcp4", "0.0.0.0:82")
	high, gone := l.listen(l.task.NS, "tcp4", "0.0.0.0:40000")

	l.dial(l.task.NS, "192.0.2.2:80", own)      // what the task asks of another
	l.dial(l.task.NS, "127.0.0.1:80", accepted) // and of itself
	l.dial(l.task.NS, "[::1]:81", onlyV6)       // and by IPv6
	// Of servers that then listen no more. The second's port may be one of the task's own.
	_, last := l.dial(l.client.NS, "192.0.2.1:82", stopped)
	l.dial(l.client.NS, "192.0.2.1:40000", gone)
	stops.Close()
	high.Close()
	_, server := l.dial(l.client.NS, "192.0.2.1:80", accepted)
	_, itself := l.dial(l.task.NS, "192.0.2.1:80", accepted) // by its own address: its server's side alone

	conns := l.list()
	if len(conns) != 3 || !conns[remote(server)].Served || !conns[remote(itself)].Served {
		t.Errorf("listed %+v; want %s and %s", conns, remote(server), remote(itself))
	}
	if c := conns[remote(last)]; c.Cookie == 0 || c.Served {
		t.Errorf("listed %+v; want %s, not served", conns, remote(last))
	}
	others, err := l.s.Accepted(t.Context(), l.task.Path(), netip.MustParseAddr("192.0.2.9"))
	if err != nil || len(others) != 0 {
		t.Errorf("of another address: %v, %v", others, err)
	}
}

func TestSilenceIsThatOfBothSides(t *testing.T) {
	l := newLab(t)
	_, accepted := l.listen(l.task.NS, "tcp", "[::]:80")
	client, server := l.dial(l.client.NS, "192.0.2.1:80", accepted)
	// tick is the grain of the kernel's times at 100 Hz, its slowest clock, twice;
	// quiet is long beside it.
	const tick, quiet = 20 * time.Millisecond, 100 * time.Millisecond
	silent := func() kernel.Conn {
		t.Helper()
		for end := time.Now().Add(patience); time.Now().Before(end); {
			if c := l.list()[remote(server)]; c.Idle >= quiet {
				return c
			}
		}
		t.Fatalf("a silent connection: %+v", l.list())
		return kernel.Conn{}
	}
	for _, pair := range [][2]net.Conn{{client, server}, {server, client}} {
		before := silent()
		start := time.Now()
		l.says(pair[0], pair[1])
		if now, most := l.list()[remote(server)], time.Since(start)+tick; now.Idle > most {
			t.Errorf("silent for %s, a word, then for %s, want %s at most", before.Idle, now.Idle, most)
		}
		// Listed as silent for long, and spoken on since.
		before.Idle = time.Hour
		l.end(0, before)
	}
	// Half of it is closed: the other half may be in use for long, or forgotten.
	if err := client.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := server.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("read %d, %v; want the end", n, err)
	}
	l.end(1, silent())
	l.fails(client, syscall.ECONNRESET)
}

func TestPortUsedAgainIsNotHit(t *testing.T) {
	l := newLab(t)
	_, accepted := l.listen(l.task.NS, "tcp4", "0.0.0.0:80")
	from := func() (net.Conn, net.Conn) {
		t.Helper()
		var client net.Conn
		l.client.Must(func() (err error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: l.client.Addr.AsSlice(), Port: 40000}, Timeout: patience}
			client, err = d.Dial("tcp4", "192.0.2.1:80")
			return err
		})
		t.Cleanup(func() { client.Close() })
		select {
		case server := <-accepted:
			return client, server
		case <-time.After(patience):
			t.Fatal("nothing was accepted")
			return nil, nil
		}
	}
	client, server := from()
	old := l.list()[remote(server)]
	if err := client.(*net.TCPConn).SetLinger(0); err != nil { // RST: nothing of it stays
		t.Fatal(err)
	}
	client.Close()
	l.fails(server, syscall.ECONNRESET)
	server.Close()

	client, server = from()
	defer server.Close()
	if again := l.list()[remote(server)]; again.Cookie == old.Cookie || again.Remote != old.Remote {
		t.Fatalf("first %+v, then %+v", old, again)
	}
	l.end(0, old)
	l.says(client, server)
	l.says(server, client)
}

func TestNoNamespaceIsSaid(t *testing.T) {
	file := filepath.Join(t.TempDir(), "stale")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := sockets.New()
	for _, path := range []string{file, file + "/below", filepath.Join(t.TempDir(), "nothing")} {
		if _, err := s.Accepted(t.Context(), path, netip.MustParseAddr("192.0.2.1")); !errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("list in %s: %v, want %v", path, err, kernel.ErrNotExist)
		}
		if n, err := s.End(t.Context(), path, []kernel.Conn{{}}); n != 0 || !errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("end in %s: %d, %v, want %v", path, n, err, kernel.ErrNotExist)
		}
	}
}

func TestEndOfContextIsHeeded(t *testing.T) {
	l := newLab(t)
	_, accepted := l.listen(l.task.NS, "tcp4", "0.0.0.0:80")
	client, server := l.dial(l.client.NS, "192.0.2.1:80", accepted)
	c := l.list()[remote(server)]
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.s.Accepted(ctx, l.task.Path(), l.task.Addr); !errors.Is(err, context.Canceled) {
		t.Errorf("list: %v, want %v", err, context.Canceled)
	}
	if n, err := l.s.End(ctx, l.task.Path(), []kernel.Conn{c}); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("end: %d, %v, want %v", n, err, context.Canceled)
	}
	l.says(client, server)
}
