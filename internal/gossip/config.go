package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// DefaultPort carries gossip over TCP and UDP. It is the neighbour of 7946, which
// the Docker engine holds for its own.
const DefaultPort = 7947

// Times that users of the package may want to know.
const (
	// TombstoneTTL is how long an owner remembers a deletion. It covers ordinary
	// interruptions (a reboot, a switch replaced); a peer away for longer gets the
	// whole table, which costs bytes, not correctness.
	TombstoneTTL = 5 * time.Minute

	// GraveTTL is how long the cluster remembers that an owner left or was
	// forgotten. A node cut off for longer may bring its copy of the old table
	// back, as suspended: three days outlast a weekend.
	GraveTTL = 72 * time.Hour

	// ConvergenceBound is the time after which, once every node can reach every
	// other again and nothing is written any more, all nodes show the same tables,
	// for 100 nodes and up to 20 % of packets lost. It is the sum of:
	//
	//	 9 s  a try to join begun before the end of a partition times out
	//	      (streamTimeout), the next one (rejoinInterval with jitter) succeeds;
	//	      one success between two halves is enough
	//	 2 s  membership news, and refutations of "dead", reach all (gossipInterval,
	//	      log N rounds, doubled for loss)
	//	17 s  anti-entropy: log2(100) = 7 rounds of syncInterval spread a table to
	//	      all, 7 more catch the last ones; 1.2 for jitter
	//	 2 s  slack
	ConvergenceBound = 30 * time.Second
)

// Times and numbers of our own protocol.
const (
	// syncInterval is between two anti-entropy rounds of one node. A change that
	// was lost on its direct way is late by about this much. An agreeing round
	// costs two packets of some 60 bytes.
	syncInterval = time.Second

	// rejoinInterval is between two tries to reach seeds and suspended owners; it
	// is lonelyInterval while there is no other member at all, which is the state
	// of every node at its start.
	rejoinInterval = 3 * time.Second
	lonelyInterval = time.Second

	// rejoinFanout is how many addresses are tried at a time: enough that one half
	// of a healed partition finds the other in its first round even if two of
	// three hosts are down.
	rejoinFanout = 3

	// directLimit is the number of peers up to which every change is sent to each
	// of them at once. 32 packets cost about 0.3 ms; beyond, directFanout of them
	// get it and pass it on in their broadcast queues.
	directLimit  = 32
	directFanout = 8

	// maxBurst is the number of packets a batch of changes may take; a larger one
	// goes over streams, whose flow control spares the receivers' socket buffers.
	maxBurst = 8

	// maxQueued bounds memberlist's broadcast queue for our messages. At 3 peers
	// per gossipInterval it drains in some seconds; what is turned away is known
	// to most by the direct way and to all by anti-entropy.
	maxQueued = 256

	// maxStreams bounds the stream messages under way, maxStreamsPerPeer those to
	// one peer, so that a dead one holds few of them until its dial times out.
	maxStreams        = 16
	maxStreamsPerPeer = 2

	// streamTimeout bounds dialling and each side's reading and writing of a
	// stream: 8 MiB pass in 5 s at 15 Mbit/s.
	streamTimeout = 5 * time.Second

	// leaveTimeout bounds Leave if its context does not: twice the time that
	// memberlist's leave message needs to be sent its dozen times.
	leaveTimeout = 3 * time.Second
)

// Errors of New and of the verbs of a Node.
var (
	ErrNoKey     = errors.New("no gossip key: the node cannot talk before it has one")
	ErrClosed    = errors.New("gossip node is closed")
	ErrLeft      = errors.New("gossip node has left the cluster")
	ErrTooLarge  = errors.New("too large for a gossip table")
	ErrTableFull = fmt.Errorf("the node's gossip table is full (%d MiB)", MaxTable>>20)
	ErrAlive     = errors.New("the owner is alive and would announce itself again")
)

// Config is what a Node needs to start. Name, Incarnation, BindAddr and Keys
// are required.
type Config struct {
	// Name identifies the node in the cluster and its table: 1 to MaxName bytes,
	// unique, the same over restarts.
	Name string

	// Incarnation orders the lives of this name: a persisted counter or the
	// current time in nanoseconds. It must be greater than any before; should it
	// not be (a clock set back), the node notices on contact and outbids its past.
	Incarnation uint64

	// BindAddr is where to listen, TCP and UDP. Port 0 lets the kernel choose one.
	BindAddr netip.AddrPort

	// AdvertiseAddr is where others reach this node. The zero value means
	// BindAddr, which must then not be the unspecified address.
	AdvertiseAddr netip.AddrPort

	// Keys is the initial keyring, see Node.SetKeys: at least one key of 16, 24 or
	// 32 bytes.
	Keys [][]byte

	// Seeds are the first addresses to join, see Node.Join.
	Seeds []netip.AddrPort

	// Logger receives this package's and memberlist's messages; nil drops them.
	Logger *slog.Logger

	// Transport replaces the network in tests; nil is UDP and TCP at BindAddr.
	Transport memberlist.NodeAwareTransport
}

func (c *Config) validate() error {
	switch {
	case c.Name == "" || len(c.Name) > MaxName:
		return fmt.Errorf("gossip node name %q: want 1 to %d bytes", c.Name, MaxName)
	case len(c.Keys) == 0:
		return ErrNoKey
	case !c.BindAddr.IsValid():
		return errors.New("gossip bind address is missing: set the address of this node that others reach, for example 192.0.2.10:7947")
	case !c.AdvertiseAddr.IsValid() && c.BindAddr.Addr().IsUnspecified():
		return fmt.Errorf("gossip advertise address is missing: it cannot be derived from bind address %s; set it, or bind one address", c.BindAddr)
	case c.AdvertiseAddr.IsValid() && (c.AdvertiseAddr.Addr().IsUnspecified() || c.AdvertiseAddr.Port() == 0):
		return fmt.Errorf("gossip advertise address %s: others cannot connect to it; set an address and port of this node", c.AdvertiseAddr)
	}
	return nil
}

// memberlistConfig starts from memberlist's settings for a LAN and names each
// departure with its reason.
func (c *Config) memberlistConfig(ctx context.Context, keys *memberlist.Keyring, log *slog.Logger) (*memberlist.Config, error) {
	m := memberlist.DefaultLANConfig()
	m.Name = c.Name
	m.Keyring = keys
	m.Logger = memberlistLogger(ctx, log)
	m.UDPBufferSize = udpBuffer

	// Failure detection: a node is probed about once a second by somebody, is
	// suspect after half a second without answer and dead 4·max(1, log10 N) s
	// later if three others agree: 5 to 9 s. Death only suspends, so a faster
	// verdict would buy nothing.
	m.ProbeInterval = time.Second
	m.ProbeTimeout = 500 * time.Millisecond
	m.SuspicionMult = 4

	// Broadcasts leave every 100 ms to 3 peers instead of every 200 ms: it costs
	// nothing while there is no news, and halves the time until a change that was
	// lost on its direct way is sent again.
	m.GossipInterval = 100 * time.Millisecond
	m.GossipNodes = 3

	// Membership lists are exchanged whole every 15 s instead of 30 s: this is
	// what tells a node about a member whose alive messages it missed.
	m.PushPullInterval = 15 * time.Second

	// A node that comes back under another address is accepted as soon as its old
	// one is dead; by default memberlist refuses it until it has been reclaimed.
	m.DeadNodeReclaimTime = time.Second

	m.TCPTimeout = streamTimeout

	// LZW costs a 100 KiB dictionary per packet and gains little on ids.
	m.EnableCompression = false

	if c.AdvertiseAddr.IsValid() {
		m.AdvertiseAddr = c.AdvertiseAddr.Addr().Unmap().String()
		m.AdvertisePort = int(c.AdvertiseAddr.Port())
	}
	transport := c.Transport
	if transport == nil {
		t, err := newNetTransport(ctx, c.BindAddr, m.Logger)
		if err != nil {
			return nil, err
		}
		transport = t
		m.BindPort = t.GetAutoBindPort()
	}
	m.Transport = newStrict(transport)
	return m, nil
}
