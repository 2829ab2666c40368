package gossip

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// strict is a transport that hands on only what is encrypted the way that all nodes do.
//
// memberlist reads an older way as well, in which messages are padded, and takes the
// padding off without a look. Which way it is, says an octet that nothing
// authenticates. So whoever has recorded a packet, and sends it again with that octet
// changed, ends a process that listens, and no key is needed for that; a stream that is
// short enough does the same
// (memberlist v0.7.0, security.go, decryptPayload and pkcs7decode).
type strict struct {
	memberlist.NodeAwareTransport
	packets  chan *memberlist.Packet
	streams  chan net.Conn
	shutdown func() error
}

// How messages begin (memberlist v0.7.0, net.go and security.go).
const (
	encrypted     = 10 // encryptMsg, the type of what a stream has; 4 octets of length follow
	encryptionWay = 1  // encryptionVersion: AES-GCM without padding, of protocol versions above 1
	wayInStream   = 5
)

var errNotOurWay = errors.New("not encrypted as gossip is")

// newStrict takes a transport over. Shutdown ends both.
func newStrict(t memberlist.NodeAwareTransport) *strict {
	s := &strict{NodeAwareTransport: t, packets: make(chan *memberlist.Packet), streams: make(chan net.Conn)}
	unread, ended := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case p := <-t.PacketCh():
				if len(p.Buf) == 0 || p.Buf[0] != encryptionWay {
					continue
				}
				select {
				case s.packets <- p:
				case <-unread:
				}
			case c := <-t.StreamCh():
				select {
				case s.streams <- &strictConn{Conn: c}:
				case <-unread:
					c.Close() // nobody asks for its error
				}
			case <-ended:
				return
			}
		}
	})
	s.shutdown = sync.OnceValue(func() error {
		// Listeners hand over what they have accepted before they end: it is taken from
		// them until then, and may be lost.
		close(unread)
		err := t.Shutdown()
		close(ended)
		wg.Wait()
		return err
	})
	return s
}

func (s *strict) PacketCh() <-chan *memberlist.Packet { return s.packets }
func (s *strict) StreamCh() <-chan net.Conn           { return s.streams }
func (s *strict) Shutdown() error                     { return s.shutdown() }

// DialTimeout and DialAddressTimeout open streams whose answers are looked at likewise.
func (s *strict) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	return checked(s.NodeAwareTransport.DialTimeout(addr, d))
}

func (s *strict) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return checked(s.NodeAwareTransport.DialAddressTimeout(a, d))
}

func checked(c net.Conn, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	return &strictConn{Conn: c}, nil
}

// strictConn is a stream, which has one message each way. Reading is for one goroutine
// at a time.
type strictConn struct {
	net.Conn
	read int // octets, until the message's beginning is past
}

// Read implements net.Conn. The error is errNotOurWay if the message begins otherwise
// than ours do.
func (c *strictConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	for _, octet := range b[:n] {
		if c.read > wayInStream {
			break
		}
		if c.read == 0 && octet != encrypted || c.read == wayInStream && octet != encryptionWay {
			return 0, errNotOurWay
		}
		c.read++
	}
	return n, err
}
