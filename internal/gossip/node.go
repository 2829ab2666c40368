package gossip

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// Node is this host's membership in the cluster. All methods are safe for
// concurrent use.
type Node struct {
	name     string
	addr     netip.AddrPort // where others reach us
	log      *slog.Logger
	keys     *keyring
	ml       *memberlist.Memberlist
	queue    *memberlist.TransmitLimitedQueue
	counters counters
	alive    atomic.Int32 // members alive but us; the queue asks under its own lock

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // goroutines of this package; added to by spawn only

	changed chan struct{} // cap 1, see Changed
	publish chan struct{} // cap 1, wakes publishLoop
	rejoin  chan struct{} // cap 1, wakes rejoinLoop

	// mu guards what follows. Rank 2: memberlist calls back with its own locks
	// held (rank 1), so no method of memberlist that locks is called under mu.
	mu        sync.Mutex
	running   bool // spawn is allowed
	replica   *replica
	members   map[string]*member
	greet     []string // members to be sent our table
	seeds     []netip.AddrPort
	strangers map[netip.AddrPort]struct{} // who wrote to us without being a member
	streams   map[string]int              // stream messages under way, by peer
	snapshot  Tables                      // cache; nil after a change
}

// member is what memberlist and the exchanges told about another node. It stays
// for as long as the owner has a table or is alive.
type member struct {
	node  *memberlist.Node // replaced, never changed: senders use it unlocked
	addr  netip.AddrPort
	alive bool
	since time.Time // of alive

	heard  time.Time // last answer to a probe
	agreed time.Time // last answer that said "same"
}

// New starts a node. It does not wait for contact with others.
//
// It fails with ErrNoKey if conf has no key, and with an error that names the
// address if that cannot be bound. The caller must call Close in the end.
func New(conf Config) (*Node, error) {
	if err := conf.validate(); err != nil {
		return nil, err
	}
	keys, err := newKeyring(conf.Keys)
	if err != nil {
		return nil, err
	}
	if conf.Logger == nil {
		conf.Logger = slog.New(slog.DiscardHandler)
	}
	n := &Node{
		name:      conf.Name,
		log:       conf.Logger,
		keys:      keys,
		changed:   make(chan struct{}, 1),
		publish:   make(chan struct{}, 1),
		rejoin:    make(chan struct{}, 1),
		members:   make(map[string]*member),
		seeds:     conf.Seeds,
		strangers: make(map[netip.AddrPort]struct{}),
		streams:   make(map[string]int),
		replica:   newReplica(conf.Name, Incarnation{Start: conf.Incarnation}, netip.AddrPort{}),
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.queue = &memberlist.TransmitLimitedQueue{
		NumNodes:       func() int { return 1 + int(n.alive.Load()) },
		RetransmitMult: 4, // memberlist's own for a LAN: 4·log10(N+1) sends per message
	}

	mc, err := conf.memberlistConfig(n.ctx, keys.ring, n.log)
	if err != nil {
		n.cancel()
		return nil, err
	}
	mc.Delegate = delegate{n}
	mc.Events = events{n}
	mc.Conflict = conflicts{n}
	ml, err := memberlist.Create(mc)
	if err != nil {
		n.cancel()
		return nil, errors.Join(fmt.Errorf("start gossip node %s: %w", conf.Name, err), discard(mc.Transport))
	}

	self := ml.LocalNode()
	n.mu.Lock()
	n.ml = ml
	n.addr = addrOf(self.Addr, self.Port)
	n.replica.own.addr = n.addr
	n.running = true
	n.mu.Unlock()

	n.spawn(n.publishLoop)
	n.spawn(n.syncLoop)
	n.spawn(n.rejoinLoop)
	return n, nil
}

// Addr returns where others reach this node.
func (n *Node) Addr() netip.AddrPort { return n.addr }

// spawn runs f in a goroutine that Close waits for, or returns false if the node
// does not run.
func (n *Node) spawn(f func()) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.spawnLocked(f)
}

func (n *Node) spawnLocked(f func()) bool {
	if !n.running {
		return false
	}
	n.wg.Go(f)
	return true
}

// wake makes sure that the receiver of a cap-1 channel will look again.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// touchLocked notes that what Snapshot returns has changed.
func (n *Node) touchLocked() {
	n.snapshot = nil
	wake(n.changed)
}

// edit changes the own table and lets everybody know.
func (n *Node) edit(f func(o *ownTable) (bool, error)) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case !n.running:
		return ErrClosed
	case n.replica.left:
		return ErrLeft
	}
	changed, err := f(n.replica.own)
	if changed {
		n.touchLocked()
		wake(n.publish)
	}
	return err
}

func checkEntry(key string, value []byte) error {
	if key == "" || len(key) > MaxKey {
		return fmt.Errorf("key of %d bytes: %w, want 1 to %d", len(key), ErrTooLarge, MaxKey)
	}
	if len(value) > MaxValue {
		return fmt.Errorf("value of %d bytes: %w, want up to %d", len(value), ErrTooLarge, MaxValue)
	}
	return nil
}

// Put sets a key of this node's table. It returns at once; peers within reach
// know it milliseconds later, all others by anti-entropy. A value that is there
// already costs nothing. It fails with ErrTooLarge, ErrTableFull, ErrLeft or
// ErrClosed; the value is copied.
func (n *Node) Put(key string, value []byte) error {
	if err := checkEntry(key, value); err != nil {
		return fmt.Errorf("put %.64q: %w", key, err)
	}
	value = append([]byte{}, value...)
	err := n.edit(func(o *ownTable) (bool, error) { return o.put(key, value) })
	if err != nil {
		return fmt.Errorf("put %.64q: %w", key, err)
	}
	return nil
}

// Delete removes a key of this node's table; an absent key is no error. Errors
// are ErrLeft and ErrClosed.
func (n *Node) Delete(key string) error {
	err := n.edit(func(o *ownTable) (bool, error) { return o.remove(key, time.Now()), nil })
	if err != nil {
		return fmt.Errorf("delete %.64q: %w", key, err)
	}
	return nil
}

// Replace makes the node's table hold exactly entries, sending only what
// differs. On error the table holds its former entries with some of the new; a
// second call with what fits repairs it. Errors are those of Put.
func (n *Node) Replace(entries map[string][]byte) error {
	fresh := make(map[string][]byte, len(entries))
	for k, v := range entries {
		if err := checkEntry(k, v); err != nil {
			return fmt.Errorf("replace table, %.64q: %w", k, err)
		}
		fresh[k] = bytes.Clone(v)
	}
	err := n.edit(func(o *ownTable) (changed bool, err error) {
		// Deletions first, they make room; nothing goes out before the lock is
		// released, so peers get both in one batch.
		for k, r := range o.records {
			if _, ok := fresh[k]; !ok && !r.deleted {
				changed = o.remove(k, time.Now()) || changed
			}
		}
		for k, v := range fresh {
			put, err := o.put(k, v)
			changed = put || changed
			if err != nil {
				return changed, err
			}
		}
		return changed, nil
	})
	if err != nil {
		return fmt.Errorf("replace table: %w", err)
	}
	return nil
}

// Complete says that this node has published again everything it had before it
// was restarted: until then peers keep showing the entries of its former
// incarnation that the new one has not overwritten or deleted. Calling it again
// does nothing. Errors are ErrLeft and ErrClosed.
func (n *Node) Complete() error {
	err := n.edit(func(o *ownTable) (bool, error) { return o.finish(), nil })
	if err != nil {
		return fmt.Errorf("complete table: %w", err)
	}
	return nil
}

// Changed returns a channel that gets a value after Snapshot or Members may have
// changed. Notices coalesce: there is at most one waiting, and only one receiver
// gets it.
func (n *Node) Changed() <-chan struct{} { return n.changed }

// Join makes addrs the addresses to be in contact with, instead of those of the
// last call. It returns at once; whatever is not a member is tried again and
// again, at rejoinInterval. Addresses of this node itself are passed over.
func (n *Node) Join(addrs []netip.AddrPort) {
	n.mu.Lock()
	n.seeds = append([]netip.AddrPort{}, addrs...)
	n.mu.Unlock()
	wake(n.rejoin)
}

// AddKey adds a key to the ring, see SetKeys. A key that is there is no error.
func (n *Node) AddKey(key []byte) error { return n.keys.add(key) }

// SetKeys replaces the keyring: one or more keys of 16, 24 or 32 bytes. Each of
// them decrypts; the one whose SHA-256 is lowest encrypts, so nodes with the same
// keys choose the same. To rotate: add the new key on all nodes, then set the
// new key alone on all nodes.
func (n *Node) SetKeys(keys [][]byte) error {
	err := n.keys.set(keys)
	wake(n.rejoin) // those who could not be understood may be now
	return err
}

// Forget removes the table of an owner that somebody knows to be gone, here and
// on all nodes. An unknown owner is no error; a living one is ErrAlive. An owner
// that was only unreachable publishes itself again when it is back.
func (n *Node) Forget(owner string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.running {
		return fmt.Errorf("forget %s: %w", owner, ErrClosed)
	}
	if m := n.members[owner]; owner == n.name || m != nil && m.alive {
		return fmt.Errorf("forget %s: %w", owner, ErrAlive)
	}
	g, ok := n.replica.forget(owner, time.Now())
	if !ok {
		return nil
	}
	delete(n.members, owner)
	n.touchLocked()
	n.announceLocked(g.encode())
	return nil
}

// announceLocked sends one message to everybody, by packets and by the
// broadcast queue.
func (n *Node) announceLocked(msg []byte) {
	packet := envelope(msg)
	targets := n.peersLocked()
	n.enqueue(packet)
	n.spawnLocked(func() {
		for _, to := range targets {
			n.sendPacket(to, packet)
		}
	})
}

// Leave removes this node's table from the cluster and says good-bye. The node
// still listens, so that others can ask, until Close; it cannot come back. Leave
// returns when the message has been sent some times, with ctx, or after
// leaveTimeout; an error says that some may see this node as suspended until
// anti-entropy tells them, if it has told anybody.
func (n *Node) Leave(ctx context.Context) error {
	n.mu.Lock()
	if !n.running {
		n.mu.Unlock()
		return fmt.Errorf("leave gossip: %w", ErrClosed)
	}
	done := make(chan error, 1)
	if !n.replica.left {
		g := n.replica.leave(time.Now())
		n.touchLocked()
		n.announceLocked(g.encode())
		if peer := n.randomPeerLocked(); peer != nil {
			n.sendStreamLocked(peer, envelope(g.encode())) // once for sure, if anything is
		}
	}
	n.spawnLocked(func() { done <- n.ml.Leave(leaveTimeout) })
	n.mu.Unlock()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("leave gossip: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("leave gossip: %w", ctx.Err())
	}
}

// Close ends the node without a word: others see it as suspended after some
// seconds, unless it has left. It waits for all goroutines of this package, which
// takes milliseconds, or leaveTimeout while a Leave is under way. Further calls do
// nothing.
func (n *Node) Close() error {
	n.mu.Lock()
	was := n.running
	n.running = false
	n.mu.Unlock()
	if !was {
		return nil
	}
	n.cancel()
	n.wg.Wait()
	if err := n.ml.Shutdown(); err != nil {
		return fmt.Errorf("close gossip: %w", err)
	}
	return nil
}

// peersLocked returns the other nodes that memberlist holds for alive.
func (n *Node) peersLocked() []*memberlist.Node {
	peers := make([]*memberlist.Node, 0, len(n.members))
	for _, m := range n.members {
		if m.alive {
			peers = append(peers, m.node)
		}
	}
	return peers
}

func addrOf(ip net.IP, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip) // an address of no known length is the zero Addr: unknown
	return netip.AddrPortFrom(a.Unmap(), port)
}
