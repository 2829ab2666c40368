package nft_test

import (
	"strings"
	"testing"
)

func TestLeastConnections(t *testing.T) {
	for _, scheduler := range []string{"lc", "wlc"} {
		t.Run(scheduler, func(t *testing.T) {
			l := newLab(t, byIPVS())
			l.serveAll("0.0.0.0:80")
			l.set(service{vip: vip1, scheduler: scheduler, ready: l.names("bcd")})
			a := l.tasks["a"]
			conns, hits := l.holds(a, vip1+":80", 9)
			wantHits(t, hits, map[string]int{"b": 3, "c": 3, "d": 3})
			// One loses all of its connections; the next ones are for it.
			for _, c := range conns {
				if c.server == "d" {
					c.reset()
				}
			}
			_, hits = l.holds(a, vip1+":80", 3)
			wantHits(t, hits, map[string]int{"d": 3})
		})
	}
}

func TestLeastConnectionsByWeight(t *testing.T) {
	l := newLab(t, byIPVS())
	l.serveAll("0.0.0.0:80")
	for _, scheduler := range []string{"wlc", "sed"} {
		l.set(service{vip: vip1})
		l.set(service{vip: vip1, scheduler: scheduler, ready: l.names("bbd")})
		conns, hits := l.holds(l.tasks["a"], vip1+":80", 9)
		wantHits(t, hits, map[string]int{"b": 6, "d": 3})
		for _, c := range conns {
			c.reset()
		}
	}
}

// The mark is for IPVS alone. VXLAN would route by it, and a host's rules may have
// the same number.
func TestNoMarkLeaves(t *testing.T) {
	l := newLab(t, byIPVS())
	l.serveAll("0.0.0.0:80")
	l.set(service{vip: vip1, ready: l.names("bd")})
	run(t, l.one.fd, "nft", "add table ip watch; "+
		"add chain ip watch in { type filter hook input priority -200; }; add rule ip watch in meta mark != 0 counter; "+
		"add chain ip watch out { type filter hook postrouting priority 300; }; add rule ip watch out meta mark != 0 counter")
	wantHits(t, l.hits(l.tasks["a"], vip1+":80", 4), map[string]int{"b": 2, "d": 2})
	out := run(t, l.one.fd, "nft", "list", "chain", "ip", "watch", "out")
	if !strings.Contains(out, "packets 0") {
		t.Errorf("marked packets leave:\n%s", out)
	}
	if in := run(t, l.one.fd, "nft", "list", "chain", "ip", "watch", "in"); strings.Contains(in, "packets 0") {
		t.Errorf("no packet is marked when it comes:\n%s", in)
	}
}

// Established connections stay when the whole is made anew, as after a restart.
func TestIPVSConnectionsOutliveARepair(t *testing.T) {
	l := newLab(t, byIPVS())
	l.serveAll("0.0.0.0:80")
	web := service{vip: vip1, ready: l.names("bcd")}
	l.set(web)
	conns, _ := l.holds(l.tasks["a"], vip1+":80", 6)
	run(t, l.one.fd, "nft", "delete table ip sluice")
	for _, c := range conns {
		must(t, c.echo("without marks"))
	}
	l.one.have = l.one.dump(t)
	l.set(web)
	for _, c := range conns {
		must(t, c.echo("with marks"))
	}
}
