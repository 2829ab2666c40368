package gossip

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// memNet is a network in memory, fit for virtual time: it starts no goroutine of
// its own, nothing in it blocks but a dial into a partition, and every end can
// be shut down. Packets may be lost, delayed and so reordered; links can be cut
// in one direction. A stream needs both directions.
type memNet struct {
	mu    sync.Mutex
	rng   *rand.Rand
	hosts map[string]*memTransport
	cut   map[link]bool
	loss  float64
	delay time.Duration // packets take between half of it and all of it
	sent  int
}

type link struct{ from, to netip.Addr }

func newMemNet(seed uint64) *memNet {
	return &memNet{
		rng:   rand.New(rand.NewPCG(seed, 0)),
		hosts: make(map[string]*memTransport),
		cut:   make(map[link]bool),
		delay: time.Millisecond,
	}
}

func (n *memNet) setLoss(p float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = p
}

// block cuts the direction from a to b.
func (n *memNet) block(a, b netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[link{a.Addr(), b.Addr()}] = true
}

func (n *memNet) heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
}

func (n *memNet) listen(addr netip.AddrPort) *memTransport {
	t := &memTransport{
		net:     n,
		addr:    addr,
		packets: make(chan *memberlist.Packet, 4096), // a socket buffer of some MiB
		streams: make(chan net.Conn, 128),            // a listen backlog
		conns:   make(map[net.Conn]struct{}),
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[addr.String()] = t
	return t
}

// memTransport is one host's end. Its fields are guarded by net.mu.
type memTransport struct {
	net     *memNet
	addr    netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
	conns   map[net.Conn]struct{}
	down    bool
}

var _ memberlist.NodeAwareTransport = (*memTransport)(nil)

func (t *memTransport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.addr.Addr().AsSlice(), int(t.addr.Port()), nil
}

func (t *memTransport) WriteTo(b []byte, addr string) (time.Time, error) {
	n := t.net
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return now, err
	}
	if t.down {
		return now, net.ErrClosed
	}
	n.sent++
	if n.cut[link{t.addr.Addr(), to.Addr()}] || n.rng.Float64() < n.loss {
		return now, nil
	}
	p := &memberlist.Packet{Buf: append([]byte{}, b...), From: net.UDPAddrFromAddrPort(t.addr)}
	wait := n.delay/2 + time.Duration(n.rng.Int64N(int64(n.delay/2)+1))
	time.AfterFunc(wait, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if host := n.hosts[addr]; host != nil && !host.down {
			p.Timestamp = time.Now()
			select {
			case host.packets <- p:
			default: // a full socket buffer
			}
		}
	})
	return now, nil
}

func (t *memTransport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

func (t *memTransport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *memTransport) StreamCh() <-chan net.Conn           { return t.streams }

func (t *memTransport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, d)
}

var errRefused = errors.New("connection refused")

func (t *memTransport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	if t.net.blocked(t.addr, to) {
		<-time.After(timeout)
		return nil, os.ErrDeadlineExceeded
	}
	n := t.net
	n.mu.Lock()
	defer n.mu.Unlock()
	host := n.hosts[addr]
	if host == nil || host.down || t.down {
		return nil, errRefused
	}
	a, b := net.Pipe()
	near := &memConn{Conn: a, home: t, peer: to}
	far := &memConn{Conn: b, home: host, peer: t.addr}
	select {
	case host.streams <- far:
	default:
		return nil, errRefused
	}
	t.conns[near], host.conns[far] = struct{}{}, struct{}{}
	return near, near.SetDeadline(time.Now().Add(timeout))
}

// blocked says whether a stream between two hosts is impossible.
func (n *memNet) blocked(a, b netip.AddrPort) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[link{a.Addr(), b.Addr()}] || n.cut[link{b.Addr(), a.Addr()}]
}

func (t *memTransport) Shutdown() error {
	t.net.mu.Lock()
	t.down = true
	if t.net.hosts[t.addr.String()] == t {
		delete(t.net.hosts, t.addr.String())
	}
	open := make([]net.Conn, 0, len(t.conns))
	for c := range t.conns {
		open = append(open, c)
	}
	t.net.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
	return nil
}

// memConn is a stream that breaks when its link is cut or its host goes down.
type memConn struct {
	net.Conn
	home *memTransport
	peer netip.AddrPort
}

func (c *memConn) Write(b []byte) (int, error) {
	if c.home.net.blocked(c.home.addr, c.peer) {
		return 0, os.ErrDeadlineExceeded
	}
	return c.Conn.Write(b)
}

func (c *memConn) Close() error {
	c.home.net.mu.Lock()
	delete(c.home.conns, c)
	c.home.net.mu.Unlock()
	return c.Conn.Close()
}

func (c *memConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.peer) }
