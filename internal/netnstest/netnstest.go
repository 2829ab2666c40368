package netnstest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NS is a network namespace. It lives until its test has ended.
type NS struct {
	t testing.TB

	mu   sync.Mutex // guards file against its end; nothing is locked under it
	file *os.File
}

// New makes an empty namespace whose loopback device is up.
func New(t testing.TB) *NS {
	t.Helper()
	ns := &NS{t: t}
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if ns.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(ns.close)
	return ns
}

// Open is the namespace at path, for instance one that the code under test made.
func Open(t testing.TB, path string) *NS {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatalf("open network namespace: %v", err)
	}
	ns := &NS{t: t, file: f}
	t.Cleanup(ns.close)
	return ns
}

func (ns *NS) close() {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	ns.file.Close()
}

// FD is an open descriptor of the namespace, and none once the test has ended: a
// request that it did not wait for may come too late.
func (ns *NS) FD() int {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	return int(ns.file.Fd())
}

// Path is a path of the namespace, good in this process as long as the test runs.
func (ns *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()) }

// Do runs f on a fresh thread inside the namespace and returns its error. Commands
// that f starts run there too; goroutines that it starts do not. The thread ends
// with f.
func (ns *NS) Do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(netns.NsHandle(ns.FD())); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// Must is Do for what may not fail.
func (ns *NS) Must(f func() error) {
	ns.t.Helper()
	if err := ns.Do(f); err != nil {
		ns.t.Fatal(err)
	}
}

// onThread runs f on a thread that ends with it: a goroutine that ends locked
// takes its thread along.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// Host is one host of a LAN.
type Host struct {
	*NS
	Addr netip.Addr // on its device eth0
}

// lanPrefix is TEST-NET-1 (RFC 5737): no real network has it.
var lanPrefix = netip.MustParsePrefix("192.0.2.0/24")

// MTU is that of the LAN, in bytes: Ethernet's.
const MTU = 1500

// LAN makes n hosts, at most 254, on one bridge. Host i has the address 192.0.2.(i+1).
func LAN(t testing.TB, n int) []*Host {
	t.Helper()
	under := New(t)
	under.Must(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "br0"
		attrs.Flags = net.FlagUp
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		return nil
	})
	hosts := make([]*Host, n)
	addr := lanPrefix.Addr()
	for i := range hosts {
		addr = addr.Next()
		h := &Host{NS: New(t), Addr: addr}
		under.Must(func() error { return plug(i, h) })
		h.Must(h.setUp)
		hosts[i] = h
	}
	return hosts
}

// plug connects a host to the bridge of the calling thread's namespace.
func plug(i int, h *Host) error {
	br, err := netlink.LinkByName("br0")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("host%d", i)
	attrs.Flags = net.FlagUp
	attrs.MTU = MTU
	attrs.MasterIndex = br.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(h.FD())}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add host %d: %w", i, err)
	}
	return nil
}

func (h *Host) setUp() error {
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	ip := &net.IPNet{IP: h.Addr.AsSlice(), Mask: net.CIDRMask(lanPrefix.Bits(), 32)}
	if err := netlink.AddrAdd(eth0, &netlink.Addr{IPNet: ip}); err != nil {
		return fmt.Errorf("add address: %w", err)
	}
	return netlink.LinkSetUp(eth0)
}

// Dir is a directory to pin namespaces in. When the test ends, what is mounted
// there is unmounted, whatever the test left.
func Dir(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "netns")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The code under test may have mounted the directory over itself, with a
		// copy of what was mounted in it before: layer by layer.
		for more := true; more; {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Errorf("clean up %s: %v", dir, err)
			}
			for _, e := range entries {
				for unmount(t, filepath.Join(dir, e.Name())) {
				}
			}
			more = unmount(t, dir)
		}
	})
	return dir
}

// unmount takes one mount away from path, if there is one.
func unmount(t testing.TB, path string) bool {
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err != nil && err != unix.EINVAL && err != unix.EPERM { // not mounted; not root, so nothing was
		t.Errorf("unmount %s: %v", path, err)
	}
	return err == nil
}
