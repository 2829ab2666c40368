package gossip

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// netTransport is memberlist's transport over UDP and TCP, with streams that
// cannot outstay their time: memberlist sets no deadline for writing a user
// message, and a peer that vanished in the middle would hold the writer until
// TCP gives up, a quarter of an hour later.
type netTransport struct {
	*memberlist.NetTransport
	ctx context.Context // ends dials and streams when the node closes
}

// bindTries is how often a port chosen by the kernel for TCP may turn out to be
// taken for UDP.
const bindTries = 10

func newNetTransport(ctx context.Context, bind netip.AddrPort, l *log.Logger) (*netTransport, error) {
	conf := &memberlist.NetTransportConfig{
		BindAddrs: []string{bind.Addr().Unmap().String()},
		BindPort:  int(bind.Port()),
		Logger:    l,
	}
	tries := 1
	if bind.Port() == 0 {
		tries = bindTries
	}
	var err error
	for range tries {
		var t *memberlist.NetTransport
		if t, err = memberlist.NewNetTransport(conf); err == nil {
			return &netTransport{NetTransport: t, ctx: ctx}, nil
		}
	}
	return nil, fmt.Errorf("bind gossip to %s: %w; is another node or plugin running there?", bind, err)
}

// DialAddressTimeout opens a stream that must be done within streamTimeout.
// memberlist sets deadlines of its own on some streams, from which on those hold.
func (t *netTransport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	conn, err := d.DialContext(t.ctx, "tcp", a.Addr)
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(timeout + streamTimeout)); err != nil {
		conn.Close()
		return nil, err
	}
	// The error of a Close that cuts a stream short tells nobody anything.
	stop := context.AfterFunc(t.ctx, func() { conn.Close() })
	return &boundConn{Conn: conn, stop: stop}, nil
}

// DialTimeout is DialAddressTimeout for callers that know no name.
func (t *netTransport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return t.DialAddressTimeout(memberlist.Address{Addr: addr}, timeout)
}

// boundConn is a connection that also closes with the node.
type boundConn struct {
	net.Conn
	stop func() bool
}

func (c *boundConn) Close() error {
	c.stop()
	return c.Conn.Close()
}

// discard shuts a transport down that no memberlist reads from: its listeners
// hand over what they have accepted before they end.
func discard(t memberlist.Transport) error {
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-t.PacketCh():
			case c := <-t.StreamCh():
				c.Close()
			case <-done:
				return
			}
		}
	}()
	defer close(done)
	return t.Shutdown()
}
