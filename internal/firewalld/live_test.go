package firewalld_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"sluice/internal/firewalld"
	"sluice/internal/kernel"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/linux"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
	"sluice/internal/netnstest"
	"sluice/internal/reconcile"
)

// soon is five times the second in which what gives notice is mended. long is for
// firewalld itself, which takes a second or two to start or reload on an idle machine.
const (
	soon = 5 * time.Second
	long = 60 * time.Second
)

// box is a host with a system bus and a firewalld of its own: the network namespace
// is a test's, /run and firewalld's configuration are its own too.
type box struct {
	host   *netnstest.NS
	init   *exec.Cmd
	bus    string // the system bus's socket as this process sees it
	daemon *exec.Cmd
}

// newBox starts all but firewalld, which has the given backend.
func newBox(t *testing.T, host *netnstest.NS, backend string) *box {
	t.Helper()
	for _, program := range []string{"firewalld", "firewall-cmd", "dbus-daemon", "unshare", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("missing: %s (the command)", program)
		}
	}
	b := &box{host: host}
	const script = `set -e
		mount -t tmpfs tmpfs /run
		mkdir -p /run/dbus /run/firewalld
		cp -r /etc/firewalld /run/etc
		mount --bind /run/etc /etc/firewalld
		sed -i "s/^FirewallBackend=.*/FirewallBackend=$0/" /etc/firewalld/firewalld.conf
		exec dbus-daemon --system --nofork --nopidfile --print-address=1`
	b.init = exec.Command("nsenter", "--net="+host.Path(), "--", "unshare", "-m", "--propagation", "private", "sh", "-c", script, backend)
	out, err := b.init.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.init.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, b.init) })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil { // it is ready
		t.Fatalf("start a system bus: %q, %v", line, err)
	}
	b.bus = fmt.Sprintf("/proc/%d/root/run/dbus/system_bus_socket", b.init.Process.Pid)
	t.Cleanup(func() { b.stopDaemon(t) })
	return b
}

func end(t *testing.T, c *exec.Cmd) {
	t.Helper()
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := c.Wait(); err != nil && c.ProcessState == nil {
		t.Error(err)
	}
}

// command runs something on the host.
func (b *box) command(args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", fmt.Sprint(b.init.Process.Pid), "-m", "-n", "--"}, args...)...)
}

func (b *box) run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.command(args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// startDaemon starts firewalld and returns when it works.
func (b *box) startDaemon(t *testing.T) {
	t.Helper()
	b.daemon = b.command("firewalld", "--nofork", "--nopid")
	var said bytes.Buffer // complete when it has ended
	b.daemon.Stdout, b.daemon.Stderr = &said, &said
	if err := b.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(long)
	for b.command("firewall-cmd", "--state").Run() != nil {
		if time.Now().After(deadline) {
			b.stopDaemon(t)
			t.Fatalf("firewalld does not start: %s", said.String())
		}
	}
}

func (b *box) stopDaemon(t *testing.T) {
	t.Helper()
	if b.daemon != nil {
		end(t, b.daemon)
		b.daemon = nil
	}
}

// answers reports whether a datagram from another host comes through to a port.
func answers(t *testing.T, from, to *netnstest.NS, port int) bool {
	t.Helper()
	var l net.PacketConn
	to.Must(func() (err error) {
		l, err = net.ListenPacket("udp4", fmt.Sprintf("192.0.2.1:%d", port))
		return err
	})
	defer l.Close()
	from.Must(func() error {
		c, err := net.Dial("udp4", fmt.Sprintf("192.0.2.1:%d", port))
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("hello"))
		return err
	})
	if err := l.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil { // a hundred times a way of microseconds
		t.Fatal(err)
	}
	_, _, err := l.ReadFrom(make([]byte, 16))
	return err == nil
}

// wait waits for a condition and returns how long that took.
func wait(t *testing.T, what string, limit time.Duration, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Errorf("%s: not after %v", what, limit)
			break
		}
	}
	return time.Since(start)
}

// Whatever firewalld does, what sluice has in the kernel comes back within a second of
// it, and the ports by which nodes talk are open.
func TestPeaceWithFirewalld(t *testing.T) {
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.VXLAN, netnstest.IPTables, netnstest.NFTables)
	for _, backend := range []string{"nftables", "iptables"} {
		t.Run(backend, func(t *testing.T) { peace(t, backend) })
	}
}

func peace(t *testing.T, backend string) {
	hosts := netnstest.LAN(t, 2)
	host, peer := hosts[0].NS, hosts[1].NS
	b := newBox(t, host, backend)
	task := filepath.Join(netnstest.Dir(t), "task")
	dir := netnstest.Dir(t)
	k, err := linux.New(linux.Config{NetnsDir: dir, HostNetns: host.Path(), Tables: nft.Tables{}})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	want := kerneltest.Example()
	for key, v := range kerneltest.Full(task, false) { // with the host's part of the mesh
		switch key.Phase() {
		case kernel.PhaseGuard, kernel.PhaseMesh, kernel.PhaseFilter:
			if key.Netns() == "" {
				want[key] = v
			}
		}
	}
	delete(want, kernel.FilterPeer{VTEP: netip.MustParseAddr("192.0.2.3")})
	loop := reconcile.New(reconcile.Config{
		Kernel: k, Notices: k.Notices, View: func() model.View { return model.View{Revision: 1} },
		Plan: func(model.View) kernel.State { return want }, Log: slog.New(slog.DiscardHandler),
		Interval: time.Hour, // notices must do
	})
	keeper := firewalld.New(firewalld.Config{
		Socket: b.bus, Reloaded: loop.Doubt, Log: slog.New(slog.DiscardHandler),
		Want: func() firewalld.Want {
			return firewalld.Want{Ports: []firewalld.Port{{Number: 4799, Proto: "udp"}, {Number: 7947, Proto: "udp"}, {Number: 7947, Proto: "tcp"}}, Device: "eth0"}
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	notices, err := k.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { loop.Run(ctx) })
	wg.Go(func() { keeper.Run(ctx) })
	wg.Go(func() {
		for range notices {
			loop.Notice()
		}
	})
	r, err := loop.Wait(ctx, 1)
	if err != nil || len(r.Failed) > 0 {
		t.Fatalf("%v, refused: %v", err, r.Failed)
	}
	right := func() bool {
		have, err := k.Dump(t.Context(), nil)
		return err == nil && len(kernel.Diff(have, want)) == 0
	}
	wait(t, "all is there", soon, right)
	if state, err := keeper.State(); state != "firewalld: not running" || err != nil {
		t.Errorf("without firewalld: %q, %v", state, err)
	}
	open := func() bool { return answers(t, peer, host, 7947) }
	if !open() {
		t.Fatal("without a firewall the peer is not heard")
	}
	b.startDaemon(t)
	if answers(t, peer, host, 7999) {
		t.Fatal("firewalld lets all through: the test shows nothing")
	}
	wait(t, "the port is open after firewalld's start", soon, open)
	if state, err := keeper.State(); !strings.Contains(state, "4799/udp 7947/udp 7947/tcp open in zone") || err != nil {
		t.Errorf("state: %q, %v", state, err)
	}
	for _, step := range []struct {
		name string
		do   func()
	}{
		{"reload", func() { b.run(t, "firewall-cmd", "--reload") }},
		{"complete reload", func() { b.run(t, "firewall-cmd", "--complete-reload") }},
		{"panic", func() { b.run(t, "firewall-cmd", "--panic-on"); b.run(t, "firewall-cmd", "--panic-off") }},
		{"restart", func() { b.stopDaemon(t); b.startDaemon(t) }},
		{"the default zone is another", func() { b.run(t, "firewall-cmd", "--set-default-zone=internal") }},
	} {
		step.do()
		rules := wait(t, step.name+": all is there again", soon, right)
		port := wait(t, step.name+": the port is open again", soon, open)
		t.Logf("%s: rules after %v, port after %v more", step.name, rules.Round(time.Millisecond), port.Round(time.Millisecond))
		if text := b.run(t, "iptables", "-S"); !strings.Contains(text, "SLUICE-VXLAN") || !strings.Contains(text, "-A FORWARD -j SLUICE-MESH") {
			t.Errorf("%s:\n%s", step.name, text)
		}
	}
	b.stopDaemon(t)
	wait(t, "all is there without firewalld", soon, right)
	wait(t, "its end is seen", soon, func() bool { s, _ := keeper.State(); return s == "firewalld: not running" })
	if _, err := os.Stat(b.bus); err != nil {
		t.Error(err)
	}
}
