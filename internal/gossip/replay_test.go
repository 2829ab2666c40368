package gossip

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/memberlist"

	"sluice/internal/gossip/memnet"
)

// tap is somebody who listens: what has been sent, in this order.
type tap struct {
	mu      sync.Mutex // guards what follows
	over    bool
	packets []recorded
	streams []*recorded // what each stream's caller has sent
}

type recorded struct {
	to    string
	bytes []byte
}

// on has the tap listen to what a node sends.
func (p *tap) on(c *Config) { c.Transport = tapped{c.Transport, p} }

type tapped struct {
	memberlist.NodeAwareTransport
	by *tap
}

func (t tapped) WriteTo(b []byte, addr string) (time.Time, error) {
	t.by.mu.Lock()
	if !t.by.over {
		t.by.packets = append(t.by.packets, recorded{addr, bytes.Clone(b)})
	}
	t.by.mu.Unlock()
	return t.NodeAwareTransport.WriteTo(b, addr)
}

func (t tapped) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

func (t tapped) DialTimeout(addr string, d time.Duration) (net.Conn, error) {
	c, err := t.NodeAwareTransport.DialTimeout(addr, d)
	if err != nil {
		return nil, err
	}
	t.by.mu.Lock()
	defer t.by.mu.Unlock()
	if t.by.over {
		return c, nil
	}
	sent := &recorded{to: addr}
	t.by.streams = append(t.by.streams, sent)
	return tappedConn{c, t.by, sent}, nil
}

func (t tapped) DialAddressTimeout(a memberlist.Address, d time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, d)
}

type tappedConn struct {
	net.Conn
	by   *tap
	sent *recorded
}

func (c tappedConn) Write(b []byte) (int, error) {
	c.by.mu.Lock()
	c.sent.bytes = append(c.sent.bytes, b...)
	c.by.mu.Unlock()
	return c.Conn.Write(b)
}

// stranger is who has listened, and has no key.
type stranger struct {
	t  *testing.T
	at *memnet.Transport
}

func (s stranger) packet(p recorded) {
	s.t.Helper()
	if _, err := s.at.WriteTo(p.bytes, p.to); err != nil {
		s.t.Fatal(err)
	}
}

// stream sends all of a stream, as far as it is taken.
func (s stranger) stream(p recorded) {
	s.t.Helper()
	conn, err := s.at.DialTimeout(p.to, time.Second)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	conn.Write(p.bytes) // who is not understood is hung up on
	advance(time.Millisecond)
}

// TestWhatWasRecordedDoesNoHarmAgain: somebody has recorded how a cluster began, lost
// contact and nodes, and forgot what it was told, and sends all of it again from an
// address of its own, in its order and backwards; then damaged, and then plain garbage.
func TestWhatWasRecordedDoesNoHarmAgain(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newCluster(t, 1)
		old := new(tap)
		for i := range 4 {
			c.start(nodeName(i), old.on)
		}
		c.waitConverged(ConvergenceBound)
		c.put("n03", "k", "v1")
		c.put("n02", "gone", "v1")
		c.waitConverged(3 * time.Second)
		if err := c.nodes["n02"].Delete("gone"); err != nil {
			t.Fatal(err)
		}
		c.put("n03", "k", "v2")
		c.split([]string{"n03"}, []string{"n00", "n01", "n02"})
		c.waitState(detection, []string{"n00", "n01", "n02"}, "n03", Suspended)
		c.net.Heal()
		c.waitConverged(ConvergenceBound)
		// One leaves and comes back, another is killed and comes back.
		if err := c.nodes["n01"].Leave(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.kill("n01")
		c.kill("n02")
		advance(detection)
		for _, name := range []string{"n01", "n02"} {
			if err := c.start(name, old.on).Complete(); err != nil {
				t.Fatal(err)
			}
			c.put(name, "k", "v3")
		}
		c.waitConverged(ConvergenceBound)
		c.waitState(ConvergenceBound, c.names(), "n03", Alive)
		advance(10 * time.Second)

		old.mu.Lock()
		old.over = true
		packets, streams := old.packets, old.streams
		old.mu.Unlock()
		if len(packets) < 100 || len(streams) < 10 {
			t.Fatalf("%d packets and %d streams recorded: that shows nothing", len(packets), len(streams))
		}
		before := show(c.nodes["n00"].Snapshot())
		s := stranger{t, c.net.Listen(netip.MustParseAddrPort("10.0.0.200:7947"))}
		same := func(after string) {
			t.Helper()
			advance(5 * time.Second)
			if d := c.difference(); d != "" {
				t.Errorf("after %s the nodes differ:\n%s", after, d)
			}
			if d := cmp.Diff(before, show(c.nodes["n00"].Snapshot())); d != "" {
				t.Errorf("after %s (-before +after)\n%s", after, d)
			}
			for _, name := range c.names() {
				if st := c.nodes[name].Status(); st.Peers != 3 {
					t.Errorf("after %s %s has %d peers, want 3", after, name, st.Peers)
				}
			}
		}
		again := func(what string, change func([]byte) []byte) {
			t.Helper()
			for _, p := range packets {
				s.packet(recorded{p.to, change(p.bytes)})
				advance(100 * time.Microsecond)
			}
			same("packets " + what)
			for _, p := range streams {
				s.stream(recorded{p.to, change(p.bytes)})
			}
			same("streams " + what)
		}
		again("sent again", bytes.Clone)
		slices.Reverse(packets)
		slices.Reverse(streams)
		again("sent again backwards", bytes.Clone)
		rng := rand.New(rand.NewPCG(1, 0))
		// The octet that says how it is encrypted is all that is not authenticated.
		again("that say to be padded, in packets", func(b []byte) []byte {
			return slices.Concat([]byte{0}, b[1:])
		})
		again("that say to be padded, in streams", func(b []byte) []byte {
			if b = bytes.Clone(b); len(b) > wayInStream {
				b[wayInStream] = 0
			}
			return b
		})
		again("with a bit changed", func(b []byte) []byte {
			b = bytes.Clone(b)
			if len(b) > 0 {
				b[rng.IntN(len(b))] ^= 1 << rng.IntN(8)
			}
			return b
		})
		again("cut short", func(b []byte) []byte { return b[:rng.IntN(len(b)+1)] })
		again("of garbage", func(b []byte) []byte {
			b = bytes.Clone(b)
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			return b
		})

		// The nodes still hear each other.
		c.put("n00", "k", "v4")
		c.waitEntry(3*time.Second, c.names(), "n00", "k", "v4")
	})
}

// TestStreamsBeginAsOursDo: in however small pieces a stream comes, what is not
// encrypted as ours are is not read any further.
func TestStreamsBeginAsOursDo(t *testing.T) {
	for _, c := range []struct {
		name  string
		bytes []byte
		want  error
	}{
		{"ours", []byte{encrypted, 0, 0, 0, 2, encryptionWay, 7, 0, 0}, nil},
		{"nothing", nil, nil},
		{"plain", []byte{8, 0, 0, 0, 2, encryptionWay, 7}, errNotOurWay},
		{"padded", []byte{encrypted, 0, 0, 0, 2, 0, 7}, errNotOurWay},
		{"a later way", []byte{encrypted, 0, 0, 0, 2, encryptionWay + 1, 7}, errNotOurWay},
	} {
		for _, piece := range []int{1, 3, 100} {
			near, far := net.Pipe()
			go func() {
				for b := range slices.Chunk(c.bytes, piece) {
					far.Write(b) // fails when the other end has hung up
				}
				far.Close()
			}()
			got, err := io.ReadAll(&strictConn{Conn: near})
			near.Close()
			if !errors.Is(err, c.want) || c.want == nil && !bytes.Equal(got, c.bytes) || c.want != nil && len(got) > wayInStream {
				t.Errorf("%s in pieces of %d: %v, %v; want %v", c.name, piece, got, err, c.want)
			}
		}
	}
}
