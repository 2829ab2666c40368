package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/netnstest"
)

// send sends n datagrams of size octets with a mark to an address of the loopback
// device. IPVS meets what a namespace itself sends in its output hook.
func send(t *testing.T, ns *netnstest.NS, mark, n, size int) {
	t.Helper()
	ns.Must(func() error {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			return errors.Join(c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark)
			}), err)
		}}
		for range n {
			c, err := d.Dial("udp4", "127.0.0.2:53") // a port of its own for each: a connection to IPVS
			if err != nil {
				return err
			}
			if _, err := c.Write(make([]byte, size)); err != nil {
				return err
			}
			if err := c.Close(); err != nil {
				return err
			}
		}
		return nil
	})
}

// listed reads `ipvsadm -Ln --stats --exact`, or without --stats the numbers of
// connections, for services by mark.
func listed(t *testing.T, ns *netnstest.NS, name string) map[kernel.Key]kernel.Traffic {
	t.Helper()
	out := map[kernel.Key]kernel.Traffic{}
	read := func(line func(key kernel.Key, f []string), args ...string) {
		var text []byte
		ns.Must(func() (err error) {
			text, err = exec.Command("ipvsadm", append([]string{"-Ln", "--exact"}, args...)...).CombinedOutput()
			return err
		})
		var mark uint32
		for l := range strings.Lines(string(text)) {
			f := strings.Fields(l)
			switch {
			case len(f) > 2 && f[0] == "FWM":
				n, err := strconv.ParseUint(f[1], 10, 32)
				if err != nil {
					t.Fatalf("%q: %v", l, err)
				}
				mark = uint32(n)
				line(kernel.IPVSService{NS: name, Mark: mark}, f[2:])
			case len(f) > 2 && f[0] == "->" && mark != 0:
				at, err := netip.ParseAddrPort(f[1])
				if err != nil {
					t.Fatalf("%q: %v", l, err)
				}
				line(kernel.IPVSDest{NS: name, Mark: mark, IP: at.Addr(), Port: at.Port()}, f[2:])
			}
		}
	}
	number := func(s string) uint64 {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	read(func(key kernel.Key, f []string) {
		f = f[len(f)-5:] // connections, packets in and out, bytes in and out
		out[key] = kernel.Traffic{
			Connections: number(f[0]), PacketsIn: number(f[1]), PacketsOut: number(f[2]), BytesIn: number(f[3]), BytesOut: number(f[4]),
		}
	}, "--stats")
	read(func(key kernel.Key, f []string) {
		if _, ok := key.(kernel.IPVSDest); ok { // method, weight, active, inactive
			c := out[key]
			c.Active, c.Inactive = int(number(f[2])), int(number(f[3]))
			out[key] = c
		}
	})
	return out
}

func TestTrafficIsWhatIpvsadmSays(t *testing.T) {
	netnstest.Need(t, netnstest.Root, netnstest.IPVS, netnstest.IPVSAdm)
	const name = "sluice-a"
	space, b := netnstest.New(t), New()
	one, two := netip.MustParseAddr("127.0.0.3"), netip.MustParseAddr("127.0.0.4")
	service := kernel.IPVSService{NS: name, Mark: 7}
	want := kernel.State{
		service: kernel.IPVSServiceSpec{Scheduler: "rr"},
		kernel.IPVSDest{NS: name, Mark: 7, IP: one}:              kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT},
		kernel.IPVSDest{NS: name, Mark: 7, IP: two, Port: 65000}: kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT},
		kernel.IPVSService{NS: name, Mark: 9}:                    kernel.IPVSServiceSpec{Scheduler: "wlc"},
	}
	if err := errors.Join(b.Apply(space.FD(), name, kernel.Diff(kernel.State{}, want))...); err != nil {
		t.Fatal(err)
	}
	const datagrams, size = 10, 100
	send(t, space, 7, datagrams, size)
	deadline := time.Now().Add(20 * time.Second) // ten times the kernel's interval of adding up
	for {
		got, err := b.Traffic(space.FD(), name)
		if err != nil {
			t.Fatal(err)
		}
		if got[service].Connections < datagrams {
			if time.Now().After(deadline) {
				t.Fatalf("%+v, want %d connections", got[service], datagrams)
			}
			continue
		}
		if d := cmp.Diff(listed(t, space, name), got); d != "" {
			t.Errorf("ipvsadm (-) and Traffic (+) differ:\n%s", d)
		}
		const ip, udp = 20, 8 // headers
		if s := got[service]; s.PacketsIn != datagrams || s.BytesIn != datagrams*(ip+udp+size) {
			t.Errorf("service: %+v, want %d packets of %d octets", s, datagrams, ip+udp+size)
		}
		for key := range want {
			if _, ok := got[key]; !ok {
				t.Errorf("no counters of %s", key)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%d counters, want %d", len(got), len(want))
		}
		if d := got[kernel.IPVSDest{NS: name, Mark: 7, IP: two, Port: 65000}]; d.Connections != datagrams/2 || d.Inactive != datagrams/2 {
			t.Errorf("destination: %+v, want half of the connections, each remembered", d)
		}
		return
	}
}

func TestTrafficOfNothing(t *testing.T) {
	netnstest.Need(t, netnstest.Root)
	space, b := netnstest.New(t), New()
	if _, lacking := b.look(); lacking != nil {
		if _, err := b.Traffic(space.FD(), "sluice-a"); !errors.Is(err, kernel.ErrUnsupported) {
			t.Errorf("without IPVS: %v, want %v", err, kernel.ErrUnsupported)
		}
		return
	}
	if got, err := b.Traffic(space.FD(), "sluice-a"); err != nil || len(got) != 0 {
		t.Errorf("%v, %v; want nothing", got, err)
	}
	if _, err := b.Traffic(0, "sluice-a"); err == nil {
		t.Error("descriptor 0 is taken for a namespace")
	}
}

// attr is an attribute as the kernel lays it out.
func attr(typ uint16, val ...byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(val)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, val...)
	return append(b, make([]byte, -len(b)&3)...)
}

func join(parts ...[]byte) (b []byte) {
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// A kernel before 4.1 has counters of 32 bits only, and one before 3.18 does not
// say of which family an address is.
func TestCountersOfOldKernels(t *testing.T) {
	u32 := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	u64 := func(n uint64) []byte { return binary.NativeEndian.AppendUint64(nil, n) }
	old := attr(destAttrStats, join(attr(statsConns, u32(3)...), attr(statsBytesIn, u64(9)...))...)
	addr := attr(destAttrAddr, append([]byte{10, 0, 0, 1}, make([]byte, 12)...)...)
	for _, tc := range []struct {
		name string
		dest []byte
		want kernel.Traffic
	}{
		{"32 bits", join(addr, old), kernel.Traffic{Connections: 3, BytesIn: 9}},
		{"both", join(addr, old, attr(destAttrStats64, attr(statsConns, u64(1<<33)...)...)), kernel.Traffic{Connections: 1 << 33, BytesIn: 9}},
	} {
		d, ok := parseDestCount(join(make([]byte, sizeofGenlHeader), attr(cmdAttrDest|unix.NLA_F_NESTED, tc.dest...)))
		if !ok || d.ip != netip.MustParseAddr("10.0.0.1") || d.Traffic != tc.want {
			t.Errorf("%s: %+v %v, want %+v", tc.name, d, ok, tc.want)
		}
	}
}

// Whatever netlink answers, reading it ends.
func FuzzParseCounts(f *testing.F) {
	f.Add([]byte{})
	f.Add(join(make([]byte, sizeofGenlHeader), attr(cmdAttrDest, attr(destAttrAddr, 10, 0, 0, 1)...)))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, ok := parseServiceCount(b)
		if d, is := parseDestCount(b); is && ok && len(b) < 2*sizeofGenlHeader {
			t.Error(fmt.Sprint("read out of nothing: ", d))
		}
	})
}
