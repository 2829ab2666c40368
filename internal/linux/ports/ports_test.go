package ports

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

var (
	everywhere netip.Addr
	loopback   = netip.MustParseAddr("127.0.0.1")
	second     = netip.MustParseAddr("127.0.0.2") // all of 127.0.0.0/8 is of lo
)

func at(proto model.Proto, addr netip.Addr, port uint16) model.HostPort {
	return model.HostPort{Proto: proto, Addr: addr, Port: port}
}

// holding is a Holder in a namespace of its own.
type holding struct {
	*Holder
	ns *netnstest.NS
}

func start(t *testing.T) holding {
	t.Helper()
	netnstest.Need(t, netnstest.Root)
	h, err := New("/proc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return holding{h, netnstest.New(t)}
}

func (h holding) set(want ...model.HostPort) (failed map[model.HostPort]error) {
	h.ns.Must(func() error { failed = h.Set(want); return nil })
	return failed
}

// must sets ports of which all can be had.
func (h holding) must(t *testing.T, want ...model.HostPort) {
	t.Helper()
	if failed := h.set(want...); len(failed) > 0 {
		t.Fatalf("not held: %v", failed)
	}
	slices.SortFunc(want, model.HostPort.Compare)
	if got := h.Held(); !slices.Equal(got, want) {
		t.Fatalf("held %v, want %v", got, want)
	}
}

// option is a socket option that another process may hope to get in by.
type option struct {
	name string
	opt  int // 0: none
}

var options = []option{{"no option", 0}, {"SO_REUSEADDR", unix.SO_REUSEADDR}, {"SO_REUSEPORT", unix.SO_REUSEPORT}}

func (o option) config() net.ListenConfig {
	return net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		if o.opt == 0 {
			return nil
		}
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, o.opt, 1) }), err)
	}}
}

// listen is what another process does: networks are tcp4, udp4, tcp, …
func (h holding) listen(o option, network, addr string) (c io.Closer, err error) {
	err = h.ns.Do(func() error {
		var err error
		lc := o.config()
		if strings.HasPrefix(network, "tcp") {
			c, err = lc.Listen(context.Background(), network, addr)
		} else {
			c, err = lc.ListenPacket(context.Background(), network, addr)
		}
		return err
	})
	return c, err
}

func TestNobodyElseGetsAHeldPort(t *testing.T) {
	h := start(t)
	h.must(t, at(model.TCP, everywhere, 80), at(model.UDP, everywhere, 80), at(model.TCP, loopback, 81), at(model.UDP, loopback, 81))
	for _, proto := range []string{"tcp", "udp"} {
		for _, c := range []struct {
			network, addr string
			refused       bool
		}{
			{"4", "0.0.0.0:80", true}, {"4", "127.0.0.1:80", true}, {"4", "127.0.0.2:80", true}, {"", "[::]:80", true}, {"6", "[::1]:80", false},
			{"4", "127.0.0.1:81", true}, {"4", "0.0.0.0:81", true}, {"4", "127.0.0.2:81", false},
		} {
			for _, o := range options {
				l, err := h.listen(o, proto+c.network, c.addr)
				if err == nil {
					l.Close()
				}
				if c.refused != errors.Is(err, unix.EADDRINUSE) || !c.refused && err != nil {
					t.Errorf("%s%s %s with %s: %v, refused should be %t", proto, c.network, c.addr, o.name, err, c.refused)
				}
			}
		}
	}
}

func TestWhatComesIsResetAndCounted(t *testing.T) {
	h := start(t)
	h.must(t, at(model.TCP, everywhere, 80), at(model.UDP, everywhere, 80))
	const times = 100 // more than waits at a socket, so that run has to go on
	for range times {
		h.ns.Must(func() error {
			c, err := net.DialTimeout("tcp4", "127.0.0.1:80", 5*time.Second)
			if errors.Is(err, unix.ECONNRESET) {
				return nil // already
			}
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				return fmt.Errorf("a client reads %v, want a reset", err)
			}
			return nil
		})
	}
	if got := h.Missed(); got != times {
		t.Errorf("%d connections counted, %d made", got, times)
	}
	h.ns.Must(func() error {
		c, err := net.Dial("udp4", "127.0.0.1:80")
		if err != nil {
			return err
		}
		defer c.Close()
		for range 1000 {
			if _, err := c.Write(make([]byte, 1000)); err != nil {
				return err
			}
		}
		return nil
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	if n, err := unix.IoctlGetInt(h.held[at(model.UDP, everywhere, 80)].fd, unix.SIOCINQ); err != nil || n != 0 {
		t.Errorf("%d octets wait at the UDP socket, %v", n, err)
	}
}

func TestAPortThatIsTakenSaysByWhom(t *testing.T) {
	h := start(t)
	self := fmt.Sprintf("(pid %d)", os.Getpid())
	for _, c := range []struct {
		network, addr string
		want          model.HostPort
		taken         bool
	}{
		{"tcp4", "0.0.0.0:90", at(model.TCP, everywhere, 90), true},
		{"tcp4", "127.0.0.1:90", at(model.TCP, everywhere, 90), true},
		{"tcp4", "0.0.0.0:90", at(model.TCP, loopback, 90), true},
		{"tcp4", "127.0.0.1:90", at(model.TCP, second, 90), false},
		{"tcp", "[::]:90", at(model.TCP, loopback, 90), true},
		{"tcp6", "[::]:90", at(model.TCP, everywhere, 90), false},
		{"udp4", "0.0.0.0:90", at(model.UDP, everywhere, 90), true},
		{"udp", "[::]:90", at(model.UDP, everywhere, 90), true},
		{"udp4", "127.0.0.1:90", at(model.UDP, loopback, 90), true},
		{"udp4", "127.0.0.1:90", at(model.TCP, loopback, 90), false},
	} {
		for _, o := range options {
			name := fmt.Sprintf("%s %s with %s, and %s", c.network, c.addr, o.name, c.want)
			l, err := h.listen(o, c.network, c.addr)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			err = h.set(c.want)[c.want]
			var taken *kernel.TakenError
			if !c.taken {
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
			} else if !errors.As(err, &taken) || !errors.Is(err, kernel.ErrTaken) || taken.Port != c.want || !strings.HasSuffix(taken.Process, self) || !strings.Contains(taken.Process, "ports.test") {
				t.Errorf("%s: %v", name, err)
			}
			l.Close()
			// Once it has gone, the next attempt has the port.
			h.must(t, c.want)
			h.must(t)
		}
	}
}

func TestAnOwnerThatCannotBeSeen(t *testing.T) {
	h := start(t)
	l, err := h.listen(option{}, "tcp4", "0.0.0.0:90")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h.proc = t.TempDir()
	p := at(model.TCP, everywhere, 90)
	if err := h.set(p)[p]; err == nil || err.Error() != "port 90/tcp is held by "+unseen {
		t.Errorf("got %v", err)
	}
}

func TestSetIsAboutDifferences(t *testing.T) {
	h := start(t)
	all, one, two := at(model.TCP, everywhere, 80), at(model.TCP, loopback, 80), at(model.TCP, second, 80)
	h.must(t, all)
	before := h.held[all]
	h.must(t, all)
	if h.held[all] != before {
		t.Error("what was held has been taken anew")
	}
	// From all addresses to some and back: what goes, goes first.
	h.must(t, one, two)
	h.must(t, two)
	if l, err := h.listen(option{}, "tcp4", "127.0.0.1:80"); err != nil {
		t.Errorf("a port that was let go: %v", err)
	} else {
		l.Close()
	}
	h.must(t, all)
	h.must(t)
	if l, err := h.listen(option{}, "tcp4", "0.0.0.0:80"); err != nil {
		t.Errorf("all were let go: %v", err)
	} else {
		l.Close()
	}
}

func TestWhatCannotBeHeldIsToldByPort(t *testing.T) {
	h := start(t)
	far, six, odd := at(model.TCP, netip.MustParseAddr("192.0.2.1"), 80), at(model.UDP, netip.IPv6Loopback(), 80), at("icmp", everywhere, 80)
	near := at(model.UDP, everywhere, 80)
	failed := h.set(far, six, odd, near)
	for p, want := range map[model.HostPort]error{far: kernel.ErrNotExist, six: kernel.ErrUnsupported, odd: kernel.ErrUnsupported} {
		if !errors.Is(failed[p], want) || !strings.Contains(failed[p].Error(), p.String()) {
			t.Errorf("%s: %v", p, failed[p])
		}
	}
	if len(failed) != 3 || !slices.Equal(h.Held(), []model.HostPort{near}) {
		t.Errorf("failed %v, held %v", failed, h.Held())
	}
}

// TestSCTP holds a port where the kernel has SCTP, and says so where it has not.
func TestSCTP(t *testing.T) {
	h := start(t)
	p := at(model.SCTP, everywhere, 80)
	failed := h.set(p)
	if errors.Is(failed[p], kernel.ErrUnsupported) {
		t.Logf("this kernel has no SCTP: %v", failed[p])
		return
	}
	if len(failed) > 0 {
		t.Fatal(failed)
	}
	other, err := New("/proc")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	var again map[model.HostPort]error
	h.ns.Must(func() error { again = other.Set([]model.HostPort{p}); return nil })
	if !errors.Is(again[p], kernel.ErrTaken) || !strings.Contains(again[p].Error(), "ports.test") {
		t.Errorf("a second one: %v", again)
	}
}

// TestARangeOfAThousandAndItsEnd: what was opened is closed, by Set and by Close.
func TestARangeOfAThousandAndItsEnd(t *testing.T) {
	h := start(t)
	var want []model.HostPort
	for i := range uint16(1000) {
		want = append(want, at(model.TCP, everywhere, 20000+i), at(model.UDP, everywhere, 20000+i))
	}
	before := descriptors(t)
	h.must(t, want...)
	if n := descriptors(t) - before; n != len(want) {
		t.Errorf("%d descriptors for %d ports", n, len(want))
	}
	h.must(t, want[:10]...)
	if n := descriptors(t) - before; n != 10 {
		t.Errorf("%d descriptors for 10 ports", n)
	}
	for range 2 {
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := descriptors(t) - before; n != -2 { // epoll and eventfd
		t.Errorf("%d descriptors after Close", n)
	}
	if failed := h.set(want...); len(failed)+len(h.Held()) > 0 {
		t.Errorf("a closed one holds %v", h.Held())
	}
}

func TestDescriptorsAreLeftToOthers(t *testing.T) {
	h := start(t)
	h.max = 3
	var want []model.HostPort
	for i := range uint16(5) {
		want = append(want, at(model.UDP, everywhere, 80+i))
	}
	failed := h.set(want...)
	if len(failed) != 2 || len(h.Held()) != 3 || !errors.Is(failed[want[4]], unix.EMFILE) {
		t.Errorf("held %v, not %v", h.Held(), failed)
	}
	h.must(t, want[3:]...)
}

func descriptors(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func TestTablesAreRead(t *testing.T) {
	// Lines of a machine with the least significant octet first; where that is
	// another, so are the words.
	if mustKernel(t, "0100007F") != loopback && mustKernel(t, "7F000001") != loopback {
		t.Error("127.0.0.1 is read in neither order")
	}
	if a := mustKernel(t, "00000000000000000000000000000000"); !a.Is6() || !a.IsUnspecified() {
		t.Errorf("[::] is %s", a)
	}
	r, ok := inetRow("   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0")
	if !ok || r.port != 80 || r.inode != 12345 || !r.listens || !r.meets(loopback) {
		t.Errorf("tcp: %+v, %t", r, ok)
	}
	r, ok = sctpRow("ffff9b1c f4c1a2 2   10  29     80    0     5501 127.0.0.1 ::1 ")
	if !ok || r.port != 80 || r.inode != 5501 || !r.meets(loopback) || r.meets(second) || !r.meets(everywhere) {
		t.Errorf("sctp: %+v, %t", r, ok)
	}
	for _, head := range []string{"", "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode", " ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS"} {
		if r, ok := inetRow(head); ok {
			t.Errorf("%q is %+v", head, r)
		}
		if r, ok := sctpRow(head); ok {
			t.Errorf("%q is %+v", head, r)
		}
	}
}

func mustKernel(t *testing.T, s string) netip.Addr {
	t.Helper()
	a, ok := kernelAddr(s)
	if !ok {
		t.Fatalf("%s is not read", s)
	}
	return a
}

func FuzzRows(f *testing.F) {
	f.Add("   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1")
	f.Add("ffff9b1c f4c1a2 2   10  29     80    0     5501 127.0.0.1 ::1")
	f.Fuzz(func(t *testing.T, text string) {
		for _, read := range []func(string) (row, bool){inetRow, sctpRow} {
			eachRow(strings.NewReader(text), read, func(r row) {
				if r.port == 0 || r.inode == 0 {
					t.Errorf("%q: %+v", text, r)
				}
				_ = r.meets(loopback)
			})
		}
	})
}

func TestOwnersOfNothing(t *testing.T) {
	if got := owners(t.TempDir(), nil); len(got) != 0 {
		t.Errorf("%v", slices.Collect(maps.Keys(got)))
	}
}
