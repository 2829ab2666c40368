package nft_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/model"
	lb "sluice/lb/service"
)

// schedulers are those of ip_vs that a datapath has; nftables counts no
// connections, so it has those that need not.
func schedulers(datapath string) []string {
	all := []string{"rr", "wrr", "sh", "mh", "dh", "fo"}
	if datapath == lb.IPVS {
		all = append(all, "lc", "wlc", "sed", "nq", "lblc", "lblcr", "ovf")
	}
	return all
}

// holds opens n connections that stay open, and counts who answered.
func (l *lab) holds(k *task, address string, n int) (conns []*conn, hits map[string]int) {
	l.t.Helper()
	hits = map[string]int{}
	for range n {
		c, err := k.dial("", address)
		must(l.t, err)
		l.t.Cleanup(func() { c.Close() })
		conns = append(conns, c)
		hits[c.server]++
	}
	return conns, hits
}

// A task that has just become ready gets a tenth of its share, and then all, and what is
// open notices neither.
func TestSlowStart(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		s := service{vip: vip1, ready: l.names("bc"), options: model.ServiceOptions{SlowStart: 60}}
		l.set(s)
		conns, hits := l.holds(a, vip1+":80", 4)
		wantHits(t, hits, map[string]int{"b": 2, "c": 2})
		s.ready, s.fresh = l.names("bcd"), l.names("d")
		l.set(s)
		wantHits(t, l.hits(a, vip1+":80", 21), map[string]int{"b": 10, "c": 10, "d": 1})
		s.fresh = nil
		l.set(s)
		wantHits(t, l.hits(a, vip1+":80", 9), map[string]int{"b": 3, "c": 3, "d": 3})
		for _, c := range conns {
			must(t, c.echo("still there"))
			c.Close()
		}
	})
}

// weighted names tasks as often as they have shares: b3 c1 is bbbc.
func (l *lab) weighted(s string) []*task {
	var out strings.Builder
	for f := range strings.FieldsSeq(s) {
		out.WriteString(strings.Repeat(f[:1], int(f[1]-'0')))
	}
	return l.names(out.String())
}

// Over each whole cycle, everybody gets as many as it has shares, however the
// turns are laid.
func TestTurnsByWeightAreExact(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		for _, c := range []struct {
			scheduler, weights string
			cycle              int
			want               map[string]int
		}{
			{"rr", "b3 c1 d2", 3, map[string]int{"b": 1, "c": 1, "d": 1}},
			{"wrr", "b3 c1 d2", 6, map[string]int{"b": 3, "c": 1, "d": 2}},
			{"wrr", "b2 c2 d4", 4, map[string]int{"b": 1, "c": 1, "d": 2}},
		} {
			l.set()
			l.set(service{vip: vip1, scheduler: c.scheduler, ready: l.weighted(c.weights)})
			for range 3 {
				wantHits(t, l.hits(l.tasks["a"], vip1+":80", c.cycle), c.want)
			}
		}
	})
}

// backend is a model of a destination in ip_vs: its list of them, what it counts.
type backend struct {
	name             string
	weight           int
	active, inactive int
}

// load is what ip_vs weighs against the weight: ip_vs_dest_conn_overhead.
func (b *backend) load() int { return b.active<<8 + b.inactive }

// least is the first in the list with the least load for its weight.
func least(bs []*backend, load, weight func(*backend) int) *backend {
	var best *backend
	for _, b := range bs {
		if best == nil || load(best)*weight(b) > load(b)*weight(best) {
			best = b
		}
	}
	return best
}

// choosers are models of the schedulers that go by open connections, after
// net/netfilter/ipvs/ip_vs_*.c; nil is a refusal.
func choosers() map[string]func([]*backend) *backend {
	weight := func(b *backend) int { return b.weight }
	wlc := func(bs []*backend) *backend { return least(bs, (*backend).load, weight) }
	sed := func(bs []*backend) *backend { return least(bs, func(b *backend) int { return b.active + 1 }, weight) }
	// overloaded: it has more than its weight, and another less than half of its own.
	overloaded := func(x *backend, bs []*backend) bool {
		return x.active > x.weight && slices.ContainsFunc(bs, func(b *backend) bool { return b.active*2 < b.weight })
	}
	var local *backend    // lblc: who has the address
	var locals []*backend // lblcr: who have it, the latest first
	return map[string]func([]*backend) *backend{
		"lc": func(bs []*backend) *backend {
			return least(bs, (*backend).load, func(*backend) int { return 1 })
		},
		"wlc": wlc,
		"sed": sed,
		"nq": func(bs []*backend) *backend {
			if i := slices.IndexFunc(bs, func(b *backend) bool { return b.active == 0 }); i >= 0 {
				return bs[i]
			}
			return sed(bs)
		},
		"lblc": func(bs []*backend) *backend {
			if local == nil || overloaded(local, bs) {
				local = wlc(bs)
			}
			return local
		},
		"lblcr": func(bs []*backend) *backend {
			// Of these, the one with the least load times weight, as the kernel has it.
			best := least(locals, (*backend).load, func(b *backend) int { return 1 })
			for _, b := range locals {
				if best.load()*b.weight > b.load()*best.weight {
					best = b
				}
			}
			if best == nil || overloaded(best, bs) {
				best = wlc(bs)
				if !slices.Contains(locals, best) {
					locals = append([]*backend{best}, locals...)
				}
			}
			return best
		},
		"fo": func(bs []*backend) *backend {
			return slices.MaxFunc(bs, func(a, b *backend) int { return a.weight - b.weight })
		},
		// The kernel's capacity is one more than the weight.
		"ovf": func(bs []*backend) *backend {
			var best *backend
			for _, b := range bs {
				if b.active <= b.weight && (best == nil || b.weight > best.weight) {
					best = b
				}
			}
			return best
		},
	}
}

// With connections held open, each scheduler's choices are those of its model, one
// by one: the models differ from each other within these.
func TestHeldConnections(t *testing.T) {
	// nftables counts no connections.
	onThose(t, isIPVS, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		seen := map[string]string{}
		for scheduler, choose := range choosers() {
			l.set()
			l.set(service{vip: vip1, scheduler: scheduler, ready: l.weighted("b3 c1 d2")})
			bs := []*backend{{name: "d", weight: 2}, {name: "c", weight: 1}, {name: "b", weight: 3}} // the last one made is first
			var got, want []string
			var conns []*conn
			var owner []*backend
			hold := func(n int) {
				for range n {
					b := choose(bs)
					c, err := a.dial("", vip1+":80")
					switch {
					case errors.Is(err, unix.ECONNREFUSED):
						got = append(got, "refused")
					case err != nil:
						t.Fatalf("%s: %v", scheduler, err)
					default:
						got, conns = append(got, c.server), append(conns, c)
					}
					if b == nil {
						want = append(want, "refused")
					} else {
						want, owner = append(want, b.name), append(owner, b)
						b.active++
					}
				}
			}
			hold(11)
			// One loses all that it has; ip_vs remembers them for 10 s, as inactive.
			for i, c := range conns {
				if i < len(owner) && owner[i].name == "b" {
					owner[i].active--
					owner[i].inactive++
					c.reset()
				}
			}
			hold(7)
			if !slices.Equal(got, want) {
				t.Errorf("%s: answered by %v, want %v", scheduler, got, want)
			}
			key := strings.Join(want, " ")
			if other := seen[key]; other != "" {
				t.Errorf("%s and %s do not differ here", scheduler, other)
			}
			seen[key] = scheduler
			for _, c := range conns {
				c.reset()
			}
		}
	})
}

// One client is always served by one backend, as long as nothing changes. All
// others of these fail here: they go by turns, or by what is open.
func TestOneClientOneBackend(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		for _, scheduler := range schedulers(l.one.datapath) {
			if !slices.Contains([]string{"sh", "mh", "dh", "fo", "lblc", "lblcr"}, scheduler) {
				continue
			}
			l.set()
			l.set(service{vip: vip1, scheduler: scheduler, ready: l.names("bcd")})
			for _, name := range []string{"a", "b", "d"} {
				hits := l.hits(l.tasks[name], vip1+":80", 20)
				if len(hits) != 1 || hits[name] != 0 {
					t.Errorf("%s: client %s was answered by %v, want one that is not itself", scheduler, name, hits)
				}
			}
		}
	})
}

// dh gives each VIP to one backend, for all clients, and different VIPs to
// different ones: 16 fall to one of 3 by chance once in 14 million (3^15).
func TestDestinationHashIsByVIP(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a, c := l.tasks["a"], l.addTask("e", l.one, 20)
		var services []service
		for i := range 16 {
			services = append(services, service{vip: fmt.Sprintf("10.255.0.%d", 100+i), scheduler: "dh", ready: l.names("bcd")})
		}
		l.set(services...)
		all := map[string]int{}
		for _, s := range services {
			// Not by hits: in a task, one client port to two VIPs would be one, and the
			// server sees another.
			hits := map[string]int{}
			for _, k := range []*task{a, a, c, c} {
				conn, err := k.dial("", s.vip+":80")
				must(t, err)
				hits[conn.server]++
				conn.reset()
			}
			if len(hits) != 1 {
				t.Errorf("%s: answered by %v, want one", s.vip, hits)
			}
			for who := range hits {
				all[who]++
			}
		}
		if len(all) < 2 {
			t.Errorf("the VIPs' backends are %v, want several", all)
		}
	})
}

// fo has all at the highest weight, then at the next when that leaves.
func TestFailover(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		for _, step := range []struct{ ready, leaving, want string }{
			{"b1 c3 d2", "", "c"},
			{"b1 d2", "c", "d"},
			{"b1", "cd", "b"},
			{"b1 d2", "c", "d"},
			{"b1 c3 d2", "", "c"},
		} {
			l.set(service{vip: vip1, scheduler: "fo", ready: l.weighted(step.ready), leaving: l.names(step.leaving)})
			wantHits(t, l.hits(l.tasks["a"], vip1+":80", 6), map[string]int{step.want: 6})
		}
	})
}

// A backend that leaves keeps what it has and gets nothing new, and nobody is
// refused because of it; when it has gone, what it had is reset.
func TestLeavingUnderEveryScheduler(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		// More than ovf ever fills here.
		opts := model.ServiceOptions{Weight: 100}
		for _, scheduler := range schedulers(l.one.datapath) {
			t.Run(scheduler, func(t *testing.T) {
				l := l.in(t)
				l.set()
				l.set(service{vip: vip1, scheduler: scheduler, ready: l.names("bcd"), options: opts})
				long, err := l.tasks["a"].dial("", vip1+":80")
				must(t, err)
				defer long.reset()
				rest := l.names(strings.ReplaceAll("bcd", long.server, ""))
				l.set(service{vip: vip1, scheduler: scheduler, ready: rest, leaving: l.names(long.server), options: opts})
				for _, name := range []string{"a", "b", "c", "d"} {
					for range 6 {
						c, err := l.tasks[name].dial("", vip1+":80")
						if err != nil {
							t.Errorf("client %s, while %s leaves: %v", name, long.server, err)
							continue
						}
						if c.server == long.server {
							t.Errorf("client %s was given %s, which leaves", name, c.server)
						}
						c.reset()
					}
				}
				must(t, long.echo("still there"))
				l.set(service{vip: vip1, scheduler: scheduler, ready: rest, options: opts})
				if err := long.echo("gone"); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("connection to the gone backend: %v, want reset", err)
				}
			})
		}
	})
}
