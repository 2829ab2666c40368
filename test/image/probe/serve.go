package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// server is one run of probe serve.
type server struct {
	host    string
	readyAt time.Time
	// open counts TCP connections, which a stop waits for.
	open sync.WaitGroup
	http *http.Server
	// web takes over connections that turn out to speak HTTP.
	web *handedListener
	// When the last connection from elsewhere was accepted and the last datagram came;
	// 0: never. In nanoseconds since 1970.
	lastTCP, lastUDP atomic.Int64
}

// stopped is what the server says in the end: when it was told to stop, and when it
// was last asked. All in milliseconds since 1970; 0 is never.
type stopped struct {
	Term    float64 `json:"term"`
	LastTCP float64 `json:"lastTCP"` // accepted
	LastUDP float64 `json:"lastUDP"`
}

// sinceEpoch is a time of stopped.
func sinceEpoch(ns int64) float64 { return float64(ns) / 1e6 }

func serve(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("serve", flag.ContinueOnError)
	var tcp, udp ports
	f.Var(&tcp, "tcp", "TCP `ports` to answer, separated by commas")
	f.Var(&udp, "udp", "UDP `ports` to answer, separated by commas")
	bind := f.String("bind", "any", "listen on `any` address, on each address of its own, or on the one given (any|own|ADDR)")
	delay := f.Duration("delay-ready", 0, "time until /health says yes; everything is answered before, with ready=false")
	abrupt := f.Bool("exit-on-term", false, "on SIGTERM exit at once, instead of serving open connections to their end")
	grace := f.Duration("grace", 5*time.Second, "the longest time to serve open connections after SIGTERM")
	if err := parse(f, args, 0, stderr); err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	addrs, err := bindAddrs(*bind)
	if err != nil {
		return err
	}
	s := &server{host: host, readyAt: time.Now().Add(*delay), web: newHandedListener()}
	s.http = &http.Server{Handler: s.routes(), ReadHeaderTimeout: 10 * time.Second}
	var listeners []net.Listener
	for _, addr := range addrs {
		for _, p := range tcp {
			l, err := net.Listen("tcp4", netip.AddrPortFrom(addr, p).String())
			if err != nil {
				return err
			}
			listeners = append(listeners, l)
			go s.acceptAll(l)
		}
		for _, p := range udp {
			c, err := listenUDP(netip.AddrPortFrom(addr, p))
			if err != nil {
				return err
			}
			go s.answerDatagrams(c)
		}
	}
	go s.http.Serve(s.web)
	fmt.Fprintf(stdout, "%s serves tcp %v udp %v on %v\n", host, tcp, udp, addrs)

	<-ctx.Done()
	term := time.Now().UnixNano()
	defer func() {
		stdout.Write(line(stopped{sinceEpoch(term), sinceEpoch(s.lastTCP.Load()), sinceEpoch(s.lastUDP.Load())}))
	}()
	if *abrupt {
		return nil
	}
	// New connections are refused from here on; datagrams are answered to the
	// last moment.
	for _, l := range listeners {
		if err := l.Close(); err != nil {
			return err
		}
	}
	end, cancel := context.WithTimeout(context.Background(), *grace)
	defer cancel()
	idle := make(chan struct{})
	go func() {
		s.open.Wait()
		close(idle)
	}()
	// Shutdown closes idle HTTP connections; what is in use goes on.
	if err := s.http.Shutdown(end); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	select {
	case <-idle:
	case <-end.Done():
		fmt.Fprintln(stdout, "connections were still open at the end of the grace")
	}
	return nil
}

// ports is a flag: numbers separated by commas.
type ports []uint16

func (p *ports) String() string { return fmt.Sprint(*p) }

func (p *ports) Set(text string) error {
	for word := range strings.SplitSeq(text, ",") {
		n, err := strconv.ParseUint(word, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("%q is no port: want 1 to 65535", word)
		}
		*p = append(*p, uint16(n))
	}
	return nil
}

// bindAddrs are the addresses to listen on.
func bindAddrs(bind string) ([]netip.Addr, error) {
	switch bind {
	case "any":
		return []netip.Addr{netip.IPv4Unspecified()}, nil
	case "own":
		return ownAddrs()
	}
	addr, err := netip.ParseAddr(bind)
	if err != nil || !addr.Is4() {
		return nil, fmt.Errorf("--bind %s: want any, own or an IPv4 address", bind)
	}
	return []netip.Addr{addr}, nil
}

// ownAddrs are the addresses of the interfaces, other than loopback.
func ownAddrs() ([]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	var own []netip.Addr
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err == nil && p.Addr().Is4() && !p.Addr().IsLoopback() {
			own = append(own, p.Addr())
		}
	}
	if len(own) == 0 {
		return nil, errors.New("no address of its own to listen on")
	}
	return own, nil
}

func (s *server) ready() bool { return !time.Now().Before(s.readyAt) }

func (s *server) answer(proto, local, peer, echo string) answer {
	return answer{Host: s.host, Proto: proto, Local: local, Peer: peer, Ready: s.ready(), Echo: echo}
}

func (s *server) acceptAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err) // such as too many open files; the next may succeed
			continue
		}
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok && !a.IP.IsLoopback() { // no health check
			s.lastTCP.Store(time.Now().UnixNano())
		}
		s.open.Add(1)
		go s.talk(&countedConn{Conn: c, in: bufio.NewReader(c), done: sync.OnceFunc(s.open.Done)})
	}
}

// countedConn is a connection whose first byte was looked at, and which says
// when it is closed.
type countedConn struct {
	net.Conn
	in   *bufio.Reader
	done func()
}

func (c *countedConn) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *countedConn) Close() error {
	defer c.done()
	return c.Conn.Close()
}

// talk answers one TCP connection in the protocol that the client begins with.
func (s *server) talk(c *countedConn) {
	first, err := c.in.Peek(1)
	if err == nil && 'A' <= first[0] && first[0] <= 'Z' {
		s.web.hand(c)
		return
	}
	defer c.Close()
	for n := 0; ; n++ {
		text, err := c.in.ReadString('\n')
		if err != nil && (n > 0 || !errors.Is(err, io.EOF)) {
			return
		}
		a := s.answer("tcp", c.LocalAddr().String(), c.RemoteAddr().String(), strings.TrimSpace(text))
		if _, werr := c.Write(line(a)); werr != nil || err != nil {
			return
		}
	}
}

func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/health", func(w http.ResponseWriter, r *http.Request) {
		if !s.ready() {
			http.Error(w, "not ready yet", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	// For load: how fast data comes here.
	mux.HandleFunc("POST /sink", func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(w, n)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		local := ""
		if a, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
			local = a.String()
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write(line(s.answer("http", local, r.RemoteAddr, r.URL.RequestURI()))) // a client that has gone needs no answer
	})
	return mux
}

// handedListener is a net.Listener of connections that somebody else accepted.
type handedListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newHandedListener() *handedListener {
	return &handedListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *handedListener) hand(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.closed:
		c.Close()
	}
}

func (l *handedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *handedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *handedListener) Addr() net.Addr { return &net.TCPAddr{} }

// listenUDP opens a socket that tells which address a datagram was sent to.
func listenUDP(at netip.AddrPort) (*net.UDPConn, error) {
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on udp %s: %w", at, err), c.Close())
	}
	return c, nil
}

// answerDatagrams answers as ordinary servers do: without naming a source, so
// that the kernel chooses it.
func (s *server) answerDatagrams(c *net.UDPConn) {
	port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	in := make([]byte, 64<<10) // the largest datagram
	oob := make([]byte, unix.CmsgSpace(unix.SizeofInet4Pktinfo))
	for {
		n, oobn, _, peer, err := c.ReadMsgUDPAddrPort(in, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err) // an ICMP error about an earlier answer
			continue
		}
		s.lastUDP.Store(time.Now().UnixNano())
		local := netip.AddrPortFrom(sentTo(oob[:oobn]), port)
		a := s.answer("udp", local.String(), peer.String(), strings.TrimSpace(string(in[:n])))
		if _, err := c.WriteToUDPAddrPort(line(a), peer); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
}

// sentTo is the destination of a datagram by its control message (ip(7),
// IP_PKTINFO: ipi_addr); the zero Addr if there is none.
func sentTo(oob []byte) netip.Addr {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}
	}
	for _, m := range messages {
		if m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo {
			// int ifindex, in_addr spec_dst, in_addr addr
			return netip.AddrFrom4([4]byte(m.Data[8:12]))
		}
	}
	return netip.Addr{}
}
