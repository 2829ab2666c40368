package gossip

import (
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// publishLoop sends the own table's changes as soon as there are any.
func (n *Node) publishLoop() {
	for {
		select {
		case <-n.ctx.Done():
			return
		case <-n.publish:
			n.publishNow()
			n.greetNow()
		}
	}
}

func (n *Node) publishNow() {
	n.mu.Lock()
	d, ok := n.replica.own.unpublished()
	ok = ok && !n.replica.left
	peers := n.peersLocked()
	n.mu.Unlock()
	if !ok {
		return
	}
	if len(peers) > directLimit {
		d.relay = true
		rand.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
		peers = peers[:directFanout]
	}
	n.counters.published.Add(uint64(len(d.records)))
	msgs := encodeDelta(d)
	if packets, ok := packets(msgs, maxBurst); ok {
		for _, p := range packets {
			n.enqueue(p)
			for _, to := range peers {
				n.sendPacket(to, p)
			}
		}
		return
	}
	whole := envelope(msgs...)
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, to := range peers {
		n.sendStreamLocked(to, whole)
	}
}

// greetNow sends the own table to nodes that have just become members: they may
// have missed changes, and ours may be of a new incarnation. A large table is
// left to the probe.
func (n *Node) greetNow() {
	n.mu.Lock()
	var peers []*memberlist.Node
	for _, name := range n.greet {
		if m := n.members[name]; m != nil && m.alive {
			peers = append(peers, m.node)
		}
	}
	n.greet = nil
	if len(peers) == 0 || n.replica.left {
		n.mu.Unlock()
		return
	}
	packet := n.probeLocked()
	if n.replica.own.size < maxPacket {
		d := n.replica.own.since(version{})
		if table := envelope(d.encode()); len(table) <= maxPacket {
			packet = table
		}
	}
	n.mu.Unlock()

	for _, to := range peers {
		n.sendPacket(to, packet)
	}
}

func (n *Node) probeLocked() []byte {
	p := probe{from: n.name, addr: n.addr, hash: n.replica.hash()}
	return envelope(p.encode())
}

// syncLoop runs anti-entropy and drops what has expired.
func (n *Node) syncLoop() {
	for {
		t := time.NewTimer(jitter(syncInterval))
		select {
		case <-n.ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		n.mu.Lock()
		n.replica.expire(time.Now())
		for name, m := range n.members {
			if !m.alive && n.replica.version(name) == (version{}) {
				delete(n.members, name) // gone, and nothing left of it
			}
		}
		peer, p := n.randomPeerLocked(), n.probeLocked()
		n.mu.Unlock()
		if peer != nil {
			n.counters.rounds.Add(1)
			n.sendPacket(peer, p)
		}
	}
}

// jitter spreads d by a fifth up and down, so that nodes started together do not
// act together.
func jitter(d time.Duration) time.Duration {
	return d*4/5 + rand.N(d*2/5)
}

func (n *Node) randomPeerLocked() *memberlist.Node {
	peers := n.peersLocked()
	if len(peers) == 0 {
		return nil
	}
	return peers[rand.N(len(peers))]
}

// receive handles one packet or stream message. It does not block: packets are
// handled one after another.
func (n *Node) receive(b []byte) {
	err := decode(b, func(msg any) {
		n.mu.Lock()
		defer n.mu.Unlock()
		if !n.running {
			return
		}
		switch m := msg.(type) {
		case *delta:
			if n.tookLocked(n.replica.applyDelta(m)) && m.relay {
				n.enqueue(envelope(m.encode()))
			}
		case *grave:
			if n.tookLocked(n.replica.applyGrave(m, time.Now())) {
				if o := n.members[m.owner]; o != nil && !o.alive {
					delete(n.members, m.owner)
				}
				n.enqueue(envelope(m.encode()))
			}
		case *probe:
			n.probedLocked(m)
		case *agree:
			n.heardLocked(m.from, m.hash == n.replica.hash())
		case *digest:
			n.comparedLocked(m)
		}
	})
	if err != nil {
		n.counters.malformed.Add(1)
		n.log.Debug("gossip message rejected", "bytes", len(b), "err", err)
	}
}

// tookLocked accounts for an outcome and reports whether it was news.
func (n *Node) tookLocked(o outcome) bool {
	switch o {
	case outcomeStale:
		n.counters.stale.Add(1)
	case outcomeRejected:
		n.counters.rejected.Add(1)
	case outcomeRefuted:
		n.refutedLocked()
	case outcomeApplied:
		n.counters.applied.Add(1)
		n.touchLocked()
		return true
	}
	return false
}

func (n *Node) refutedLocked() {
	n.counters.refuted.Add(1)
	n.log.Warn("gossip knew a later version of this node's own table; published it again",
		"node", n.name, "incarnation", n.replica.own.inc)
	n.touchLocked()
	wake(n.publish)
}

func (n *Node) probedLocked(p *probe) {
	peer := n.peerLocked(p.from, p.addr)
	if h := n.replica.hash(); h == p.hash {
		n.heardLocked(p.from, true)
		a := agree{from: n.name, hash: h}
		n.spawnLocked(func() { n.sendPacket(peer, envelope(a.encode())) })
		return
	}
	n.heardLocked(p.from, false)
	d := digest{from: n.name, addr: n.addr, reply: true, items: n.replica.digest()}
	n.sendLocked(peer, d.encode())
}

func (n *Node) comparedLocked(d *digest) {
	peer := n.peerLocked(d.from, d.addr)
	answer, lacking, refuted := n.replica.compare(d.items)
	if refuted {
		n.refutedLocked()
	}
	n.heardLocked(d.from, len(answer) == 0 && !lacking)
	if d.reply && lacking {
		mine := digest{from: n.name, addr: n.addr, items: n.replica.digest()}
		answer = append(answer, mine.encode())
	}
	if len(answer) > 0 {
		n.counters.answers.Add(1)
		n.sendLocked(peer, answer...)
	}
}

func (n *Node) heardLocked(name string, agreed bool) {
	m := n.members[name]
	if m == nil {
		return
	}
	m.heard = time.Now()
	if agreed {
		m.agreed = m.heard
	}
}

// maxStrangers bounds the addresses remembered of nodes that know us without our
// knowing them; they are few and soon joined.
const maxStrangers = 16

// peerLocked finds the node to answer to. One that is no member at this address,
// but has the key, is to become one: it may have moved, or memberlist of each
// side may have missed the other.
func (n *Node) peerLocked(name string, addr netip.AddrPort) *memberlist.Node {
	if m := n.members[name]; m != nil && m.alive && m.addr == addr {
		return m.node
	}
	if len(n.strangers) < maxStrangers && name != n.name && addr.IsValid() {
		n.strangers[addr] = struct{}{}
	}
	return &memberlist.Node{Name: name, Addr: addr.Addr().AsSlice(), Port: addr.Port()}
}

// sendLocked answers a peer: in one packet if it fits, else in streams.
func (n *Node) sendLocked(to *memberlist.Node, msgs ...[]byte) {
	if p, ok := packets(msgs, 1); ok {
		n.spawnLocked(func() { n.sendPacket(to, p[0]) })
		return
	}
	n.sendStreamLocked(to, streams(msgs)...)
}

func (n *Node) sendPacket(to *memberlist.Node, p []byte) {
	n.counters.packetsOut.Add(1)
	if err := n.ml.SendBestEffort(to, p); err != nil {
		n.counters.sendErrors.Add(1)
	}
}

// sendStreamLocked sends envelopes to a peer, one stream after another, unless
// too much is under way; anti-entropy will then come back to it.
func (n *Node) sendStreamLocked(to *memberlist.Node, envelopes ...[]byte) {
	total := 0
	for _, c := range n.streams {
		total += c
	}
	if total >= maxStreams || n.streams[to.Name] >= maxStreamsPerPeer {
		n.counters.deferred.Add(1)
		return
	}
	started := n.spawnLocked(func() {
		for _, e := range envelopes {
			n.counters.streamsOut.Add(1)
			if err := n.ml.SendReliable(to, e); err != nil {
				n.counters.sendErrors.Add(1)
				n.log.Debug("gossip stream failed", "node", to.Name, "bytes", len(e), "err", err)
				break
			}
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.streams[to.Name]--; n.streams[to.Name] == 0 {
			delete(n.streams, to.Name)
		}
	})
	if started {
		n.streams[to.Name]++
	}
}

// enqueue adds a packet to the broadcast queue. It may be called under mu: under
// its own lock the queue calls nothing that locks.
// While there is nobody to send to nothing is queued: whoever comes compares.
func (n *Node) enqueue(packet []byte) {
	if n.alive.Load() == 0 || len(packet) > maxPacket || n.queue.NumQueued() >= maxQueued {
		return
	}
	n.queue.QueueBroadcast(broadcast(packet))
}

// broadcast is a packet in the queue. Later changes do not replace earlier ones
// there: that would tear gaps into what a receiver knows.
type broadcast []byte

func (broadcast) Invalidates(memberlist.Broadcast) bool { return false }
func (b broadcast) Message() []byte                     { return b }
func (broadcast) Finished()                             {}
func (broadcast) UniqueBroadcast()                      {}
