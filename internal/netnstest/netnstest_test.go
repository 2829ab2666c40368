package netnstest

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestNamespaceHasLoopbackOnly(t *testing.T) {
	Need(t, Root)
	New(t).Must(func() error {
		links, err := netlink.LinkList()
		if err == nil && len(links) != 1 {
			t.Errorf("links: %v, want lo alone", links)
		}
		return err
	})
}

func TestDoReturnsToCaller(t *testing.T) {
	Need(t, Root)
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	want := errors.New("of the closure")
	ns := New(t)
	if err := ns.Do(func() error {
		in, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil || in == before {
			t.Errorf("inside: %s, %v; want another namespace than %s", in, err, before)
		}
		return want
	}); err != want {
		t.Errorf("Do: %v, want %v", err, want)
	}
	if after, _ := os.Readlink("/proc/thread-self/ns/net"); after != before {
		t.Errorf("after: %s, want %s", after, before)
	}
}

func TestHostsOfLANReachEachOther(t *testing.T) {
	Need(t, Root, Bridge, Veth)
	hosts := LAN(t, 3)
	for _, h := range hosts[1:] {
		if err := Exchange(hosts[0].NS, h.NS, h.Addr, 2); err != nil {
			t.Error(err)
		}
	}
}

func TestExchangeFailsWithoutPath(t *testing.T) {
	Need(t, Root)
	a, b := New(t), New(t)
	if err := Exchange(a, b, netip.MustParseAddr("127.0.0.1"), 1); err == nil {
		t.Error("datagrams pass between namespaces that are not connected")
	}
}

func TestRequiredFeatureMustBeThere(t *testing.T) {
	for _, tc := range []struct {
		require       string
		failed, skips bool
	}{
		{"", false, true},
		{"vxlan", false, true},
		{"vxlan,no such feature", true, false},
		{"all", true, false},
	} {
		t.Setenv(RequireEnv, tc.require)
		r := &recorder{TB: t}
		r.run(func() { Need(r, "no such feature") })
		if r.failed != tc.failed || r.skipped != tc.skips {
			t.Errorf("REQUIRE=%q: failed %v, skipped %v; want %v, %v", tc.require, r.failed, r.skipped, tc.failed, tc.skips)
		}
	}
}

// recorder is a test that only notes how it ended.
type recorder struct {
	testing.TB
	failed, skipped bool
}

func (r *recorder) run(f func()) {
	defer func() {
		if p := recover(); p != nil && p != r {
			panic(p)
		}
	}()
	f()
}
func (r *recorder) Helper()               {}
func (r *recorder) Fatalf(string, ...any) { r.failed = true; panic(r) }
func (r *recorder) Skipf(string, ...any)  { r.skipped = true; panic(r) }
