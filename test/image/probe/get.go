package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// try is one request and what came of it, as printed.
type try struct {
	N      int     `json:"n"`
	OK     bool    `json:"ok"`
	Millis float64 `json:"ms"`
	// Reply is the answer: the server's JSON, or a string if it is none.
	Reply json.RawMessage `json:"reply,omitempty"`
	Error string          `json:"error,omitempty"`
}

// summary is the sum of tries.
type summary struct {
	Tries   int            `json:"tries"`
	OK      int            `json:"ok"`
	Failed  int            `json:"failed"`
	Slowest float64        `json:"slowest_ms"`
	Resent  int            `json:"resent,omitempty"` // connections whose SYN went out again: it or its answer was lost, or was later than 1 s (RFC 6298, 2.1)
	Hosts   map[string]int `json:"hosts"`
	Errors  map[string]int `json:"errors,omitempty"`
}

func (s *summary) add(t try) {
	s.Tries++
	s.Slowest = max(s.Slowest, t.Millis)
	if !t.OK {
		s.Failed++
		s.Errors[t.Error]++
		return
	}
	s.OK++
	var a answer
	if json.Unmarshal(t.Reply, &a) == nil && a.Host != "" {
		s.Hosts[a.Host]++
	}
}

func get(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("get", flag.ContinueOnError)
	f.Bool("tcp", true, "ask by TCP: one line there, one back")
	udp := f.Bool("udp", false, "ask by UDP")
	web := f.Bool("http", false, "ask by HTTP")
	ping := f.Bool("ping", false, "ask by ICMP echo; needs CAP_NET_RAW")
	keep := f.Bool("keep", false, "ask by HTTP on one connection, as long as the server keeps it")
	path := f.String("path", "/", "`path` to ask for by HTTP")
	n := f.Int("n", 1, "number of tries; 0 is until --for or SIGTERM ends them")
	span := f.Duration("for", 0, "go on for this long")
	every := f.Duration("every", 0, "time between the beginnings of tries")
	timeout := f.Duration("timeout", time.Second, "time that one try may take")
	source := f.Int("source-port", 0, "port to ask from; 0 is any")
	distinct := f.Int("distinct", 0, "demand answers of at least this many different hosts")
	sum := f.Bool("summary", false, "print one line about all tries only")
	if err := parse(f, args, 1, stderr); err != nil {
		return err
	}
	c := client{addr: f.Arg(0), path: *path, sourcePort: *source}
	ask, port := c.tcp, "80"
	switch {
	case *udp:
		ask, port = c.udp, "53"
	case *keep:
		pool := &http.Transport{DialContext: (&net.Dialer{}).DialContext}
		defer pool.CloseIdleConnections()
		ask = func(ctx context.Context, _ int) ([]byte, error) { return c.fetch(ctx, pool) }
	case *web:
		ask = c.http
	case *ping:
		ask, port = c.ping, ""
	}
	if _, _, err := net.SplitHostPort(c.addr); err != nil && port != "" {
		c.addr = net.JoinHostPort(c.addr, port)
	}
	if *span > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *span)
		defer cancel()
		if !isSet(f, "n") {
			*n = 0
		}
	}
	all := summary{Hosts: map[string]int{}, Errors: map[string]int{}}
	for i := 1; (*n == 0 || i <= *n) && ctx.Err() == nil; i++ {
		begun := time.Now()
		// Not of ctx: a try that has begun is finished and counted.
		tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), *timeout)
		reply, err := ask(tctx, i)
		cancel()
		t := try{N: i, OK: err == nil, Millis: millis(time.Since(begun)), Reply: asJSON(reply)}
		if err != nil {
			t.Reply, t.Error = nil, err.Error()
		}
		all.add(t)
		if !*sum {
			stdout.Write(line(t))
		}
		if rest := *every - time.Since(begun); rest > 0 {
			pause(ctx, rest)
		}
	}
	if *sum {
		all.Resent = int(c.resent.Load())
		stdout.Write(line(all))
	}
	if all.Failed > 0 || all.OK == 0 || len(all.Hosts) < *distinct {
		return errVerdict
	}
	return nil
}

func isSet(f *flag.FlagSet, name string) (set bool) {
	f.Visit(func(g *flag.Flag) { set = set || g.Name == name })
	return set
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// asJSON is text as it is if it is JSON, else as a JSON string.
func asJSON(text []byte) json.RawMessage {
	if json.Valid(text) {
		return json.RawMessage(strings.TrimSpace(string(text)))
	}
	return json.RawMessage(strings.TrimSpace(string(line(strings.TrimSpace(string(text))))))
}

// client knows whom to ask and how to leave.
type client struct {
	addr       string // host:port, or host to ping
	path       string
	sourcePort int
	resent     atomic.Int64 // see summary
}

func (c *client) dial(ctx context.Context, network string) (net.Conn, error) {
	var d net.Dialer
	if c.sourcePort > 0 {
		d.LocalAddr = &net.TCPAddr{Port: c.sourcePort}
		if network == "udp4" {
			d.LocalAddr = &net.UDPAddr{Port: c.sourcePort}
		}
		// Only then: with this option the kernel also gives sockets of UDP that ask for
		// any port one that others have, and who gets an answer is chance.
		d.Control = func(_, _ string, raw syscall.RawConn) error {
			var err error
			cerr := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			})
			return errors.Join(err, cerr)
		}
	}
	conn, err := d.DialContext(ctx, network, c.addr)
	if err != nil {
		return nil, err
	}
	if t, ok := conn.(*net.TCPConn); ok && c.sourcePort > 0 {
		// Closing with a reset leaves no TIME_WAIT, which would refuse the
		// same port to the next try for a minute.
		if err := t.SetLinger(0); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
	}
	if t, ok := conn.(*net.TCPConn); ok {
		again, err := retransmits(t)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		if again > 0 {
			c.resent.Add(1)
		}
	}
	if until, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(until); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
	}
	return conn, nil
}

// retransmits is how many packets of a connection were sent again.
func retransmits(t *net.TCPConn) (n uint32, err error) {
	raw, err := t.SyscallConn()
	if err != nil {
		return 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Total_retrans
		}
	})
	return n, errors.Join(err, cerr)
}

func (c *client) tcp(ctx context.Context, n int) ([]byte, error) { return c.exchange(ctx, "tcp4", n) }
func (c *client) udp(ctx context.Context, n int) ([]byte, error) { return c.exchange(ctx, "udp4", n) }

// exchange sends a line with the number of the try and returns the line that
// comes back, if it echoes the number.
func (c *client) exchange(ctx context.Context, network string, n int) ([]byte, error) {
	conn, err := c.dial(ctx, network)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "%d\n", n); err != nil {
		return nil, err
	}
	return readEcho(bufio.NewReader(conn), n)
}

func readEcho(in *bufio.Reader, n int) ([]byte, error) {
	text, err := in.ReadBytes('\n')
	if err != nil {
		return nil, err
	}
	var a answer
	if err := json.Unmarshal(text, &a); err != nil {
		return nil, fmt.Errorf("an answer of no probe: %q", text)
	}
	if a.Echo != fmt.Sprint(n) {
		return nil, fmt.Errorf("the answer is to %q, not to %d", a.Echo, n)
	}
	return text, nil
}

func (c *client) http(ctx context.Context, n int) ([]byte, error) {
	transport := &http.Transport{
		DisableKeepAlives: true, // each try is a connection
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return c.dial(ctx, "tcp4")
		},
	}
	return c.fetch(ctx, transport)
}

func (c *client) fetch(ctx context.Context, transport *http.Transport) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.addr+c.path, nil)
	if err != nil {
		return nil, err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, strings.TrimSpace(string(text)))
	}
	return text, err
}

// ICMP types of RFC 792.
const (
	echoReply   = 0
	echoRequest = 8
)

func (c *client) ping(ctx context.Context, n int) ([]byte, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "ip4:icmp", c.addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	until, _ := ctx.Deadline()
	if err := conn.SetDeadline(until); err != nil {
		return nil, err
	}
	id := uint16(os.Getpid())
	if _, err := conn.Write(echo(id, uint16(n))); err != nil {
		return nil, err
	}
	in := make([]byte, 1500)
	for {
		size, err := conn.Read(in)
		if err != nil {
			return nil, err
		}
		// A raw socket gets the IP header too, whose length in words is in its
		// first byte (raw(7), RFC 791), and sees all ICMP from that address.
		if m := in[min(size, int(in[0]&0xf)*4):size]; len(m) >= 8 && m[0] == echoReply && binary.BigEndian.Uint16(m[4:]) == id && binary.BigEndian.Uint16(m[6:]) == uint16(n) {
			return line(answer{Proto: "icmp", Local: conn.LocalAddr().String(), Peer: conn.RemoteAddr().String()}), nil
		}
	}
}

// echo is an echo request with its checksum (RFC 792, RFC 1071).
func echo(id, seq uint16) []byte {
	m := make([]byte, 8)
	m[0] = echoRequest
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], seq)
	var sum uint32
	for i := 0; i < len(m); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(m[i:]))
	}
	sum = sum>>16 + sum&0xffff
	sum += sum >> 16
	binary.BigEndian.PutUint16(m[2:], ^uint16(sum))
	return m
}
