package gossip

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// delegate, events and conflicts are what memberlist calls. It holds its locks
// meanwhile, see Node.mu.
type (
	delegate  struct{ n *Node }
	events    struct{ n *Node }
	conflicts struct{ n *Node }
)

// NodeMeta adds nothing: what others need to know is in the table.
func (delegate) NodeMeta(int) []byte { return nil }

func (d delegate) NotifyMsg(b []byte) { d.n.receive(b) }

func (d delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.n.queue.GetBroadcasts(overhead, limit)
}

// LocalState puts our digest into memberlist's exchange of membership, so that a
// node that joins has every table one round trip later.
func (d delegate) LocalState(bool) []byte {
	n := d.n
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.running {
		return nil
	}
	dig := digest{from: n.name, addr: n.addr, items: n.replica.digest()}
	return envelope(dig.encode())
}

func (d delegate) MergeRemoteState(b []byte, _ bool) { d.n.receive(b) }

func (e events) NotifyJoin(m *memberlist.Node) { e.n.sawAlive(m) }

func (e events) NotifyUpdate(m *memberlist.Node) { e.n.sawAlive(m) }

// NotifyLeave hears of death and of departure alike: memberlist does not tell
// them apart here (the State of the Node it passes is never set). The table of
// one that departed is removed by the grave it sends.
func (e events) NotifyLeave(m *memberlist.Node) {
	n := e.n
	n.mu.Lock()
	defer n.mu.Unlock()
	known := n.members[m.Name]
	if known == nil || !known.alive {
		return
	}
	known.alive, known.since = false, time.Now()
	n.alive.Add(-1)
	n.touchLocked()
	n.log.Info("gossip member lost", "node", m.Name, "addr", known.addr)
}

func (c conflicts) NotifyConflict(have, other *memberlist.Node) {
	c.n.counters.conflicts.Add(1)
	c.n.log.Error("two addresses use one node name; give each node its own name, or wait until the former address is dead",
		"node", have.Name, "addr", have.Address(), "other", other.Address())
}

func (n *Node) sawAlive(m *memberlist.Node) {
	if m.Name == n.name {
		return
	}
	node := *m
	node.Addr = slices.Clone(m.Addr)
	n.mu.Lock()
	defer n.mu.Unlock()
	known := n.members[m.Name]
	if known == nil {
		known = &member{}
		n.members[m.Name] = known
	}
	known.node, known.addr = &node, addrOf(node.Addr, node.Port)
	delete(n.strangers, known.addr)
	if !known.alive {
		known.alive, known.since = true, time.Now()
		n.alive.Add(1)
		n.greet = append(n.greet, m.Name)
		n.log.Info("gossip member found", "node", m.Name, "addr", known.addr)
		wake(n.publish)
	}
	n.touchLocked()
}

// rejoinLoop seeks contact with seeds, suspended owners and strangers.
func (n *Node) rejoinLoop() {
	for {
		n.tryJoin()
		pause := rejoinInterval
		if n.alive.Load() == 0 {
			pause = lonelyInterval
		}
		t := time.NewTimer(jitter(pause))
		select {
		case <-n.ctx.Done():
			t.Stop()
			return
		case <-n.rejoin:
			t.Stop()
		case <-t.C:
		}
	}
}

// tryJoin tries some of the addresses that ought to be members, at the same
// time, and waits for the outcome: at most streamTimeout to dial and as much to
// exchange.
func (n *Node) tryJoin() {
	n.mu.Lock()
	addrs := n.wantedLocked()
	clear(n.strangers)
	n.mu.Unlock()

	var wg sync.WaitGroup
	for _, a := range addrs {
		n.counters.joins.Add(1)
		wg.Go(func() {
			if _, err := n.ml.Join([]string{a.String()}); err != nil {
				n.counters.joinErrors.Add(1)
				n.log.Debug("gossip join failed", "addr", a, "err", err)
			}
		})
	}
	wg.Wait()
}

// wantedLocked picks up to rejoinFanout addresses that are not those of living
// members, strangers first: they are known to be up.
func (n *Node) wantedLocked() []netip.AddrPort {
	if n.replica.left {
		return nil
	}
	have := map[netip.AddrPort]struct{}{n.addr: {}}
	for _, m := range n.members {
		if m.alive {
			have[m.addr] = struct{}{}
		}
	}
	var wanted []netip.AddrPort
	add := func(a netip.AddrPort) {
		a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
		if _, ok := have[a]; !ok && a.IsValid() && a.Port() != 0 {
			have[a] = struct{}{}
			wanted = append(wanted, a)
		}
	}
	for a := range n.strangers {
		add(a)
	}
	first := len(wanted)
	for _, a := range n.seeds {
		add(a)
	}
	for owner, t := range n.replica.tables {
		m := n.members[owner]
		if m != nil && m.alive {
			continue
		}
		add(t.addr)
		if m != nil {
			add(m.addr)
		}
	}
	rest := wanted[first:]
	rand.Shuffle(len(rest), func(i, j int) { rest[i], rest[j] = rest[j], rest[i] })
	return wanted[:min(len(wanted), rejoinFanout)]
}
