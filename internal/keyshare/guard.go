package keyshare

import (
	"net"
	"net/netip"
	"sync"
	"time"
)

const (
	// maxConns is how many connections may be open: more than the nodes that gossip
	// is made for, and some 10 MB of memory.
	maxConns = 256
	// maxOfOne is how many of them one address may have. A node has one; a second one
	// may begin before the end of the first was seen.
	maxOfOne = 4
)

// guard is a listener that bounds connections, in number and in time. Those beyond
// are closed at once.
type guard struct {
	net.Listener
	life time.Duration // of each

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu  sync.Mutex
	all int
	of  map[netip.Addr]int
}

func newGuard(l net.Listener, life time.Duration) *guard {
	return &guard{Listener: l, life: life, of: make(map[netip.Addr]int)}
}

// Accept implements net.Listener.
func (g *guard) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		addr := remote(c)
		if !g.enter(addr) {
			_ = c.Close() // nothing was sent on it
			continue
		}
		end := time.AfterFunc(g.life, func() { _ = c.Close() }) // who uses it sees that, and closes it too
		out := &guarded{Conn: c, leave: sync.OnceFunc(func() {
			end.Stop()
			g.exit(addr)
		})}
		return out, nil
	}
}

func remote(c net.Conn) netip.Addr {
	if t, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return t.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

func (g *guard) enter(a netip.Addr) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.all >= maxConns || g.of[a] >= maxOfOne {
		return false
	}
	g.all++
	g.of[a]++
	return true
}

func (g *guard) exit(a netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.all--
	if g.of[a]--; g.of[a] == 0 {
		delete(g.of, a)
	}
}

// guarded is a connection that makes room when it is closed.
type guarded struct {
	net.Conn
	leave func()
}

// Close implements net.Conn.
func (c *guarded) Close() error {
	c.leave()
	return c.Conn.Close()
}
