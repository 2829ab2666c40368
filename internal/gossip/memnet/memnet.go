package memnet

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

// Net is the network. Its methods may be called from any goroutine.
type Net struct {
	mu     sync.Mutex // guards all below, and the fields of Transports
	rng    *rand.Rand
	hosts  map[string]*Transport
	cut    map[link]bool
	frozen map[netip.Addr]*freeze
	loss   float64
	twice  float64
	delay  time.Duration // packets take between half of it and all of it
	sent   int
}

// freeze is a host that stands still.
type freeze struct {
	over chan struct{} // closed by Thaw
	held []func()      // what came meanwhile; called with the lock held
}

type link struct{ from, to netip.Addr }

// New is a network without hosts that loses nothing and delivers within a
// millisecond. What it does at random follows from seed.
func New(seed uint64) *Net {
	return &Net{
		rng:    rand.New(rand.NewPCG(seed, 0)),
		hosts:  make(map[string]*Transport),
		cut:    make(map[link]bool),
		frozen: make(map[netip.Addr]*freeze),
		delay:  time.Millisecond,
	}
}

// SetLoss makes each packet be lost with probability p.
func (n *Net) SetLoss(p float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = p
}

// SetTwice makes each packet be delivered twice with probability p.
func (n *Net) SetTwice(p float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.twice = p
}

// SetDelay makes each packet take between half of d and d, by which packets overtake
// each other.
func (n *Net) SetDelay(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay = d
}

// Block cuts the direction from a to b.
func (n *Net) Block(a, b netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[link{a, b}] = true
}

// Open ends Block.
func (n *Net) Open(a, b netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.cut, link{a, b})
}

// Heal ends all cuts.
func (n *Net) Heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
}

// Blocked says whether something from a does not reach b.
func (n *Net) Blocked(a, b netip.Addr) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[link{a, b}]
}

// Sent is the number of packets that were sent so far.
func (n *Net) Sent() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.sent
}

// Freeze stops a host: whoever sends there waits for Thaw, which must come.
func (n *Net) Freeze(a netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.frozen[a] == nil {
		n.frozen[a] = &freeze{over: make(chan struct{})}
	}
}

// Thaw ends Freeze: the host is told all that came meanwhile.
func (n *Net) Thaw(a netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.frozen[a]
	if f == nil {
		return
	}
	delete(n.frozen, a)
	close(f.over)
	for _, arrive := range f.held {
		arrive()
	}
}

// thawed returns when a host does not stand still.
func (n *Net) thawed(a netip.Addr) {
	for {
		n.mu.Lock()
		f := n.frozen[a]
		n.mu.Unlock()
		if f == nil {
			return
		}
		<-f.over
	}
}

// arriveLocked does what happens at a host, or has it wait if that stands still.
func (n *Net) arriveLocked(a netip.Addr, what func()) {
	if f := n.frozen[a]; f != nil {
		f.held = append(f.held, what)
		return
	}
	what()
}

// Listen makes the end of a host.
func (n *Net) Listen(addr netip.AddrPort) *Transport {
	t := &Transport{
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

// Transport is one host's end.
type Transport struct {
	net     *Net
	addr    netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
	conns   map[net.Conn]struct{}
	down    bool
}

var _ memberlist.NodeAwareTransport = (*Transport)(nil)

// FinalAdvertiseAddr, and all methods below, are memberlist's.
func (t *Transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.addr.Addr().AsSlice(), int(t.addr.Port()), nil
}

// WriteTo sends a packet.
func (t *Transport) WriteTo(b []byte, addr string) (time.Time, error) {
	n := t.net
	n.thawed(t.addr.Addr())
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
	copies := 1
	if n.rng.Float64() < n.twice {
		copies = 2
	}
	for range copies {
		p := &memberlist.Packet{Buf: append([]byte{}, b...), From: net.UDPAddrFromAddrPort(t.addr)}
		wait := n.delay/2 + time.Duration(n.rng.Int64N(int64(n.delay/2)+1))
		time.AfterFunc(wait, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.arriveLocked(to.Addr(), func() {
				if host := n.hosts[addr]; host != nil && !host.down {
					p.Timestamp = time.Now()
					select {
					case host.packets <- p:
					default: // a full socket buffer
					}
				}
			})
		})
	}
	return now, nil
}

// WriteToAddress is WriteTo.
func (t *Transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

// PacketCh has what came.
func (t *Transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh has the streams that others opened.
func (t *Transport) StreamCh() <-chan net.Conn { return t.streams }

// DialAddressTimeout is DialTimeout.
func (t *Transport) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, d)
}

var errRefused = errors.New("connection refused")

// DialTimeout opens a stream.
func (t *Transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	n := t.net
	n.thawed(t.addr.Addr())
	// TCP repeats what opens a connection after 1, 2, 4 s (RFC 6298).
	for rest, pause := timeout, time.Second; !n.passes(t.addr, to); rest, pause = rest-pause, 2*pause {
		if pause >= rest {
			<-time.After(rest)
			return nil, os.ErrDeadlineExceeded
		}
		<-time.After(pause)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	host := n.hosts[addr]
	if host == nil || host.down || t.down {
		return nil, errRefused
	}
	a, b := net.Pipe()
	near := &conn{Conn: a, home: t, peer: to}
	far := &conn{Conn: b, home: host, peer: t.addr}
	t.conns[near], host.conns[far] = struct{}{}, struct{}{}
	n.arriveLocked(to.Addr(), func() {
		select {
		case host.streams <- far:
		default:
			far.Conn.Close()
		}
	})
	return near, near.SetDeadline(time.Now().Add(timeout))
}

// passes reports whether an opening and its answer arrive.
func (n *Net) passes(a, b netip.AddrPort) bool {
	if n.blocked(a, b) {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.loss == 0 || n.rng.Float64() >= n.loss && n.rng.Float64() >= n.loss
}

// blocked says whether a stream between two hosts is impossible.
func (n *Net) blocked(a, b netip.AddrPort) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut[link{a.Addr(), b.Addr()}] || n.cut[link{b.Addr(), a.Addr()}]
}

// Shutdown ends the host: its streams break, and nothing reaches it any more.
func (t *Transport) Shutdown() error {
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

// conn is a stream that breaks when its link is cut or its host goes down.
type conn struct {
	net.Conn
	home *Transport
	peer netip.AddrPort
}

// Write sends, once the host does not stand still.
func (c *conn) Write(b []byte) (int, error) {
	c.home.net.thawed(c.home.addr.Addr())
	if c.home.net.blocked(c.home.addr, c.peer) {
		return 0, os.ErrDeadlineExceeded
	}
	return c.Conn.Write(b)
}

// Close ends the stream.
func (c *conn) Close() error {
	c.home.net.mu.Lock()
	delete(c.home.conns, c)
	c.home.net.mu.Unlock()
	return c.Conn.Close()
}

// RemoteAddr is the other host.
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.peer) }
