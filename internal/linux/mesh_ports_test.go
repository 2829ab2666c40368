package linux

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

// ranged is a range of ports of the lab's service that has one.
func ranged(p model.Proto, lo, hi uint16) kernel.MeshRange {
	return kernel.MeshRange{Proto: p, Lo: lo, Hi: hi}
}

// A range is one element, and all of it is published, and nothing else.
func TestMeshOfARange(t *testing.T) { onBoth(t, meshRange) }

func meshRange(t *testing.T, l *meshLab) {
	for _, h := range l.hosts {
		for name, ask := range askers() {
			for _, port := range rangePorts() {
				if port >= rangeLo && port <= rangeHi {
					l.want(t, fmt.Sprintf("%s to %d", name, port), ask, l.client, h.at(port), "192.0.2.4")
				} else if a, err := ask(l.client, "", h.at(port)); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("%s to %d, which is beyond: %v, %v; want it refused", name, port, a, err)
				}
			}
			l.want(t, name+" by 127.0.0.1", ask, h.w.host, fmt.Sprintf("127.0.0.1:%d", rangeHi), h.mesh.String())
		}
		out := run(t, h.w.host, "nft list table ip sluice-mesh")
		if n := strings.Count(out, "8000-8999 : "+h.alias(105).String()); n != 2 { // TCP and UDP
			t.Errorf("host %d has %d elements for the two ranges:\n%s", h.n, n, out)
		}
	}
}

// While a range grows, shrinks, is split and moved, whoever connects to a port that
// stays is served.
func TestMeshOfAChangingRange(t *testing.T) {
	l := newMeshLab(t, false, "dr")
	h := l.hosts[0]
	alias := kernel.MeshRangeSpec{Alias: h.alias(105)}
	base := l.state(h, model.Taken)
	delete(base, ranged(model.TCP, rangeLo, rangeHi))
	delete(base, ranged(model.UDP, rangeLo, rangeHi))
	with := func(of ...[2]uint16) kernel.State {
		want := kernel.State{}
		maps.Copy(want, base)
		for _, r := range of {
			want[ranged(model.TCP, r[0], r[1])] = alias
			want[ranged(model.UDP, r[0], r[1])] = alias
		}
		return want
	}
	states := []kernel.State{
		with([2]uint16{8000, 8999}),
		with([2]uint16{8000, 8998}),
		with([2]uint16{8002, 9500}),
		with([2]uint16{8000, 8600}, [2]uint16{8602, 8999}), // a process has one
		with([2]uint16{8400, 8500}, [2]uint16{8501, 8999}),
		with([2]uint16{8500, 8501}),
	}
	single := with([2]uint16{8000, 8499})
	for _, p := range []model.Proto{model.TCP, model.UDP} {
		single[kernel.MeshPort{Proto: p, Port: 8500}] = kernel.MeshPortSpec{Alias: alias.Alias, To: 8500}
	}
	states = append(states, single)

	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	var asked [2]atomic.Int64
	defer func() {
		stop()
		clients.Wait()
	}()
	for i, ask := range []asker{askTCP, askUDP} {
		clients.Go(func() {
			for ctx.Err() == nil {
				if a, err := ask(l.client, "", h.at(8500)); err != nil || a.server == "" {
					t.Errorf("a port that stays: %v, %v", a, err)
					return
				}
				asked[i].Add(1)
			}
		})
	}
	// A flow of UDP that is to such a port goes on, too.
	c, err := dialMesh(l.client, "udp4", "", h.at(8500))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	first, err := question(c)
	if err != nil {
		t.Fatal(err)
	}
	have := with([2]uint16{8000, 8999})
	for round := range 60 {
		want := states[(round+1)%len(states)]
		// A step of the loop between two dumps.
		for i, err := range h.k.Apply(t.Context(), kernel.Diff(have, want)) {
			if err != nil {
				t.Fatalf("round %d, operation %d: %v", round, i, err)
			}
		}
		have = want
		if err := c.SetDeadline(time.Now().Add(meshPatience)); err != nil {
			t.Fatal(err)
		}
		if a, err := question(c); err != nil || a.client != first.client {
			t.Fatalf("round %d: a flow that stays: %v, %v; it began with %v", round, a, err, first)
		}
	}
	stop()
	clients.Wait()
	for i := range asked {
		if asked[i].Load() < 60 {
			t.Errorf("only %d questions were asked meanwhile", asked[i].Load())
		}
	}
	if ops := kernel.Diff(h.dump(t), have); len(ops) > 0 {
		t.Errorf("still to do: %v", ops)
	}
}

// Ports at single addresses of the node are published there and nowhere else.
func TestMeshOfOneAddress(t *testing.T) { onBoth(t, meshBinds) }

func meshBinds(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	run(t, h.w.host, "ip addr add %s/32 dev docker_gwbridge", bound())
	run(t, h.w.host, "ip addr add %s/32 dev docker_gwbridge", bound().Next())
	run(t, l.client, "ip route add 203.0.113.0/24 via %s", h.addr)
	to := func(a netip.Addr) string { return fmt.Sprintf("%s:%d", a, boundPort) }
	for name, ask := range askers() {
		l.want(t, name, ask, l.client, to(h.addr), "192.0.2.4")
		l.want(t, name+" to the other", ask, l.client, to(bound()), "192.0.2.4")
		l.want(t, name+" from the host itself", ask, h.w.host, to(h.addr), h.mesh.String())
		for _, a := range []netip.Addr{bound().Next(), l.hosts[1].addr, l.hosts[2].addr} {
			if s, err := ask(l.client, "", to(a)); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s to %s, which does not have the port: %v, %v; want it refused", name, a, s, err)
			}
		}
		if s, err := ask(h.w.host, "", to(netip.AddrFrom4([4]byte{127, 0, 0, 1}))); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s to 127.0.0.1, which does not have the port: %v, %v; want it refused", name, s, err)
		}
	}
}

// Who may connect is asked of each connection, whatever else the client has open.
func TestMeshOfSomeClients(t *testing.T) { onBoth(t, meshAllows) }

func meshAllows(t *testing.T, l *meshLab) {
	for _, h := range l.hosts {
		for name, ask := range askers() {
			l.want(t, name+" from who is allowed", ask, l.far, h.at(allowPort), "198.51.100.2")
			// One local port, open to a service that allows all, then to this one.
			local := "192.0.2.4:40077"
			if _, err := ask(l.client, local, h.at(keepPort)); err != nil {
				t.Errorf("%s to what allows all: %v", name, err)
			}
			if a, err := short(ask, l.client, local, h.at(allowPort)); err == nil {
				t.Errorf("%s: %v answered who is not allowed", name, a)
			}
			other := l.hosts[h.n%3]
			if a, err := short(ask, other.w.host, "", h.at(allowPort)); err == nil {
				t.Errorf("%s: %v answered another node, which is not allowed", name, a)
			}
			l.want(t, name+" from the host itself", ask, h.w.host, h.at(allowPort), h.mesh.String())
		}
	}
	// A connection that was let in goes on when the list has it no more; the next is not let in.
	h := l.hosts[0]
	c, err := dialMesh(l.far, "tcp4", "", h.at(allowPort))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := l.state(h, model.Taken)
	want[kernel.MeshAllow{Alias: h.alias(103)}] = kernel.MeshAllowSpec{From: "203.0.113.0/24"}
	h.lead(t, want)
	if a, err := question(c); err != nil || a.server == "" {
		t.Errorf("open when the list changed: %v, %v", a, err)
	}
	if a, err := short(askTCP, l.far, "", h.at(allowPort)); err == nil {
		t.Errorf("%v answered who is allowed no more", a)
	}
}

// needSCTP skips the test where sockets cannot be of SCTP.
func needSCTP(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err != nil {
		t.Skipf("missing: sctp (sockets of SCTP: %v)", err)
	}
	unix.Close(fd)
}

// SCTP is translated as TCP is: its addresses stay its own only with one on each side.
func TestMeshOfSCTP(t *testing.T) {
	needSCTP(t)
	onBoth(t, meshSCTP)
}

func meshSCTP(t *testing.T, l *meshLab) {
	h := l.hosts[0]
	want := l.state(h, model.Taken)
	want[kernel.MeshPort{Proto: model.SCTP, Port: keepPort}] = kernel.MeshPortSpec{Alias: h.alias(100), To: 80}
	h.lead(t, want)
	for i := range 2 {
		serveSCTP(t, l.hosts[i].task)
	}
	for range 4 {
		l.client.Must(func() error { return dialSCTP(h.addr, keepPort) })
	}
}

// serveSCTP answers at port 80 of a task.
func serveSCTP(t *testing.T, task *netnstest.NS) {
	t.Helper()
	task.Must(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: 80}), unix.Listen(fd, 8)); err != nil {
			return err
		}
		var done sync.WaitGroup
		t.Cleanup(func() {
			unix.Shutdown(fd, unix.SHUT_RDWR)
			unix.Close(fd)
			done.Wait()
		})
		done.Go(func() {
			for {
				c, _, err := unix.Accept(fd)
				if err != nil {
					return
				}
				unix.Write(c, []byte("here"))
				unix.Close(c)
			}
		})
		return nil
	})
}

func dialSCTP(to netip.Addr, port int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(meshPatience))
	for _, opt := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, opt, &wait); err != nil {
			return err
		}
	}
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4(), Port: port}); err != nil {
		return fmt.Errorf("connect by SCTP: %w", err)
	}
	buf := make([]byte, 16)
	n, err := unix.Read(fd, buf)
	if err != nil || string(buf[:n]) != "here" {
		return fmt.Errorf("SCTP answered %q, %v", buf[:n], err)
	}
	return nil
}
