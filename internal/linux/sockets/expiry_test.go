package sockets_test

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"sluice/internal/model"
	"sluice/lb/expiry"
)

// TestIdleTimeoutEndsSilentConnectionsAlone runs what the plugin runs: a task whose
// service has an idle timeout, a client, and connections of every kind.
func TestIdleTimeoutEndsSilentConnectionsAlone(t *testing.T) {
	l := newLab(t)
	const limit = 3 * time.Second // short, and long beside a stall of this machine
	second := netip.MustParseAddr("192.0.2.101")
	l.task.Must(func() error { return addAddress(second) })
	_, accepted := l.listen(l.task.NS, "tcp", "[::]:80")
	_, elsewhere := l.listen(l.client.NS, "tcp4", "0.0.0.0:80")

	busyClient, busyServer := l.dial(l.client.NS, "192.0.2.1:80", accepted)
	own, ownPeer := l.dial(l.task.NS, "192.0.2.2:80", elsewhere)
	otherClient, otherServer := l.dial(l.client.NS, "192.0.2.101:80", accepted)
	client, server := l.dial(l.client.NS, "192.0.2.1:80", accepted)

	stop := talk(t, busyClient, busyServer)
	ended := start(t, expiry.Config{
		Sockets: l.s, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		View: func() model.View {
			return model.View{Endpoints: map[model.EndpointID]model.Endpoint{"e": {
				Addr: l.task.Addr, Phase: model.Taken, Sandbox: l.task.Path(),
				Task: model.Task{Service: "web"}, Options: model.ServiceOptions{Idle: int(limit / time.Second)},
			}}}
		},
	})
	// The young one comes when the silent one is on its last half second.
	for end := time.Now().Add(patience); l.list()[remote(server)].Idle < limit-500*time.Millisecond; {
		if time.Now().After(end) {
			t.Fatalf("listed: %+v", l.list())
		}
	}
	youngClient, youngServer := l.dial(l.client.NS, "192.0.2.1:80", accepted)

	l.fails(client, syscall.ECONNRESET)
	l.fails(server, syscall.ECONNABORTED)
	stop()
	for name, pair := range map[string][2]net.Conn{
		"busy": {busyClient, busyServer}, "young": {youngClient, youngServer},
		"the task's own": {own, ownPeer}, "of another address": {otherClient, otherServer},
	} {
		t.Run(name, func(t *testing.T) {
			l := l
			l.t = t
			l.says(pair[0], pair[1])
			l.says(pair[1], pair[0])
		})
	}
	if got := ended()["web"]; got != 1 {
		t.Errorf("%d connections were ended, want one", got)
	}
}

// TestDrainEndsWhatAServerStillServes: a server that was told to stop has closed its
// listener, and goes on with what is open, of which nothing is silent.
func TestDrainEndsWhatAServerStillServes(t *testing.T) {
	l := newLab(t)
	stops, accepted := l.listen(l.task.NS, "tcp4", "0.0.0.0:80")
	_, elsewhere := l.listen(l.client.NS, "tcp4", "0.0.0.0:80")
	own, ownPeer := l.dial(l.task.NS, "192.0.2.2:80", elsewhere)
	client, server := l.dial(l.client.NS, "192.0.2.1:80", accepted)
	stops.Close()
	const drain = 2 * time.Second // long beside a stall of this machine
	leaves := time.Now()
	ended := start(t, expiry.Config{
		Sockets: l.s, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		View: func() model.View {
			return model.View{Endpoints: map[model.EndpointID]model.Endpoint{"e": {
				Addr: l.task.Addr, Phase: model.Taken, Sandbox: l.task.Path(), Leaves: leaves,
				Task: model.Task{Service: "web"}, Options: model.ServiceOptions{Drain: int(drain / time.Second)},
			}}}
		},
	})
	for time.Since(leaves) < drain/2 {
		l.says(client, server)
		l.says(server, client)
	}
	l.fails(client, syscall.ECONNRESET)
	l.fails(server, syscall.ECONNABORTED)
	if late := time.Since(leaves); late < drain {
		t.Errorf("ended after %s, want %s", late, drain)
	}
	l.says(own, ownPeer)
	l.says(ownPeer, own)
	if got := ended()["web"]; got != 1 {
		t.Errorf("%d connections were ended, want one", got)
	}
}

// start runs an Ender until ended is called, which says what it has ended, or until
// the test ends.
func start(t *testing.T, cfg expiry.Config) (ended func() map[model.ServiceID]uint64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	e := expiry.New(cfg)
	var wg sync.WaitGroup
	wg.Go(func() { e.Run(ctx) })
	ended = func() map[model.ServiceID]uint64 {
		cancel()
		wg.Wait() // the sides know of an end a moment before it is counted
		return e.Ended()
	}
	t.Cleanup(func() { ended() })
	return ended
}

// talk passes a byte from the server to the client every 100 ms, a thirtieth of
// the limit, until stop is called.
func talk(t *testing.T, client, server net.Conn) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			if _, err := server.Write([]byte("x")); err != nil {
				t.Errorf("a busy connection: %v", err)
				return
			}
			if _, err := client.Read(make([]byte, 1)); err != nil {
				t.Errorf("a busy connection: %v", err)
				return
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(stop)
	return stop
}

// addAddress gives eth0 another address.
func addAddress(a netip.Addr) error {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	return netlink.AddrAdd(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}})
}
