package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// startServer serves TCP and UDP on a port of loopback each and returns them.
func startServer(t *testing.T, readyAt time.Time) (tcp, udp string) {
	t.Helper()
	s := &server{host: "here", readyAt: readyAt, web: newHandedListener()}
	s.http = &http.Server{Handler: s.routes()}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := listenUDP(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		c.Close()
		s.http.Close()
	})
	go s.acceptAll(l)
	go s.answerDatagrams(c)
	go s.http.Serve(s.web)
	return l.Addr().String(), c.LocalAddr().String()
}

// probe runs a command line and returns its exit code and what it printed.
func probe(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestEveryProtocolNamesBothEnds(t *testing.T) {
	tcp, udp := startServer(t, time.Time{})
	for _, row := range []struct{ proto, addr, echo string }{
		{"tcp", tcp, "1"}, {"http", tcp, "/"}, {"udp", udp, "1"},
	} {
		t.Run(row.proto, func(t *testing.T) {
			code, out, errs := probe(t, "get", "--"+row.proto, row.addr)
			var got try
			var a answer
			if err := json.Unmarshal([]byte(out), &got); err != nil {
				t.Fatalf("%v: %s%s", err, out, errs)
			}
			if err := json.Unmarshal(got.Reply, &a); err != nil {
				t.Fatalf("%v: %s", err, got.Reply)
			}
			peer, err := netip.ParseAddrPort(a.Peer)
			if err != nil || peer.Addr().String() != "127.0.0.1" {
				t.Errorf("peer %q, want 127.0.0.1 and a port", a.Peer)
			}
			want := answer{Host: "here", Proto: row.proto, Local: row.addr, Peer: a.Peer, Ready: true, Echo: row.echo}
			if code != good || a != want {
				t.Errorf("exit %d, answer %+v, want 0 and %+v", code, a, want)
			}
		})
	}
}

func TestAConnectionClosedWithoutAWordGetsOneAnswer(t *testing.T) {
	tcp, _ := startServer(t, time.Time{})
	c, err := net.Dial("tcp4", tcp)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if _, err := out.ReadFrom(c); err != nil || strings.Count(out.String(), "\n") != 1 {
		t.Errorf("got %q, %v, want one line", out.String(), err)
	}
}

func TestExitCodesAreVerdicts(t *testing.T) {
	tcp, udp := startServer(t, time.Now().Add(time.Hour))
	_, port, err := net.SplitHostPort(tcp)
	if err != nil {
		t.Fatal(err)
	}
	nobody := "127.0.0.1:1" // tcpmux, a reserved port
	for _, row := range []struct {
		name string
		args []string
		want int
		says string
	}{
		{"answered", []string{"get", "-n", "3", "--summary", tcp}, good, `"hosts":{"here":3}`},
		{"same source port again", []string{"get", "-n", "3", "--source-port", "40404", "--summary", tcp}, good, `"ok":3`},
		{"refused", []string{"get", "-n", "2", "--summary", nobody}, bad, `"failed":2`},
		{"one host of two demanded", []string{"get", "-n", "3", "--distinct", "2", "--summary", tcp}, bad, `"ok":3`},
		{"until a time", []string{"get", "--for", "50ms", "--every", "10ms", "--udp", "--summary", udp}, good, `"failed":0`},
		{"connection held", []string{"hold", "--for", "50ms", "--every", "5ms", tcp}, good, `"gaps":0`},
		{"nothing to hold", []string{"hold", nobody}, bad, "refused"},
		{"not ready yet", []string{"health", "--port", port}, bad, "503"},
		{"load of two", []string{"load", "--to", "a=" + tcp + ",b=" + tcp, "--rounds", "2", "--bulk", "100000", "--packets", "10"}, good, `"name":"b"`},
		{"load of nobody", []string{"load", "--to", "a=" + nobody}, bad, "refused"},
		{"load of no address", []string{"load", "--to", "a"}, bad, "NAME=ADDR:PORT"},
		{"no such command", []string{"put"}, usage, "usage"},
		{"no such flag", []string{"get", "--no-such-flag", tcp}, usage, "no-such-flag"},
		{"no address", []string{"get"}, usage, "0 arguments, want 1"},
		{"port out of range", []string{"serve", "--tcp", "70000"}, usage, "1 to 65535"},
		{"bad address to bind", []string{"serve", "--tcp", "80", "--bind", "somewhere"}, bad, "any, own or an IPv4"},
	} {
		t.Run(row.name, func(t *testing.T) {
			code, out, errs := probe(t, row.args...)
			if code != row.want || !strings.Contains(out+errs, row.says) {
				t.Errorf("exit %d, want %d with %q in:\n%s%s", code, row.want, row.says, out, errs)
			}
		})
	}
}

func TestReadyServerIsHealthy(t *testing.T) {
	tcp, _ := startServer(t, time.Time{})
	_, port, err := net.SplitHostPort(tcp)
	if err != nil {
		t.Fatal(err)
	}
	if code, _, errs := probe(t, "health", "--port", port); code != good {
		t.Errorf("exit %d: %s", code, errs)
	}
}

func TestTurnsMeasureEchoServers(t *testing.T) {
	// Free a moment before, for both protocols as a rule.
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := free.Addr().String()
	_, port, err := net.SplitHostPort(at)
	if err := errors.Join(err, free.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	var said, errs bytes.Buffer
	go func() { ended <- run(ctx, []string{"echo", "--port", port}, &said, &errs) }()
	for begun := time.Now(); time.Since(begun) < patience; {
		if code, _, _ := probe(t, "get", "--udp", "--timeout", "100ms", at); code == good {
			break
		}
	}
	for _, row := range []struct {
		name string
		args []string
		want int
		says string
	}{
		{"client is told", []string{"get", at}, good, `"peer":"127.0.0.1:`},
		{"by UDP", []string{"get", "--udp", at}, good, `"proto":"udp"`},
		{"two in turns", []string{"turns", "--rounds", "2", "--to", "a=" + at + ",b=" + at}, good, `"name":"b"`},
		{"nobody", []string{"turns", "--to", "a=127.0.0.1:1"}, bad, "refused"},
		{"a name instead of an address", []string{"turns", "--to", "a=localhost:80"}, bad, "NAME=ADDR:PORT"},
	} {
		t.Run(row.name, func(t *testing.T) {
			code, out, errs := probe(t, row.args...)
			if code != row.want || !strings.Contains(out+errs, row.says) {
				t.Errorf("exit %d, want %d with %q in:\n%s%s", code, row.want, row.says, out, errs)
			}
		})
	}
	var got turned
	_, out, _ := probe(t, "turns", "--rounds", "2", "--connects", "3", "--requests", "4", "--datagrams", "5", "--batches", "6", "--to", "a="+at)
	if err := json.Unmarshal([]byte(out), &got); err != nil || len(got.Targets) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	a := got.Targets[0]
	if n := []int{len(a.Connects), len(a.Requests), len(a.Datagrams), len(a.Packets)}; !slices.Equal(n, []int{6, 8, 10, 12}) {
		t.Errorf("%v were measured in two rounds of 3, 4, 5 and 6", n)
	}
	stop()
	if code := <-ended; code != good {
		t.Errorf("the server ended with %d: %s%s", code, said.String(), errs.String())
	}
}

func TestServeEndsWithOpenConnectionsServed(t *testing.T) {
	// The port is free a moment before; nobody else asks for ports of loopback
	// in so short a time.
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, term := context.WithCancel(t.Context())
	ended := make(chan int)
	started := make(chan struct{}, 1)
	go func() {
		ended <- run(ctx, []string{"serve", "--tcp", port, "--bind", "127.0.0.1"}, signalWriter{started}, signalWriter{started})
	}()
	<-started
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := make([]byte, 1024)
	for _, say := range []func(){term, func() {}} {
		if _, err := c.Write([]byte("still there?\n")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(in); err != nil {
			t.Fatalf("an open connection is not served: %v", err)
		}
		say()
	}
	c.Close()
	if code := <-ended; code != good {
		t.Errorf("exit %d, want 0", code)
	}
}

// signalWriter tells that something was written.
type signalWriter struct{ wrote chan struct{} }

func (w signalWriter) Write(p []byte) (int, error) {
	select {
	case w.wrote <- struct{}{}:
	default:
	}
	return len(p), nil
}

func TestEchoHasAValidChecksum(t *testing.T) {
	m := echo(0x1234, 7)
	var sum uint32
	for i := 0; i < len(m); i += 2 {
		sum += uint32(m[i])<<8 | uint32(m[i+1])
	}
	// RFC 1071: the ones' complement sum over a message with its checksum is
	// all ones.
	if sum>>16+sum&0xffff != 0xffff {
		t.Errorf("checksum of % x does not add up", m)
	}
}

// TestEachAskerHasAPortOfItsOwn: of a thousand that may share theirs, two do.
func TestEachAskerHasAPortOfItsOwn(t *testing.T) {
	server, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c := client{addr: server.LocalAddr().String()}
	seen := map[string]bool{}
	for range 1000 {
		conn, err := c.dial(t.Context(), "udp4")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		at := conn.LocalAddr().String()
		if seen[at] {
			t.Fatalf("two have %s", at)
		}
		seen[at] = true
	}
}
