package ipvs_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	mobyipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/netnstest"
)

const ns = "sluice-a"

func service(mark uint32) kernel.IPVSService { return kernel.IPVSService{NS: ns, Mark: mark} }
func dest(mark uint32, ip string) kernel.IPVSDest {
	return kernel.IPVSDest{NS: ns, Mark: mark, IP: netip.MustParseAddr(ip)}
}

// lab is a namespace with IPVS.
type lab struct {
	t  testing.TB
	b  *ipvs.Balancer
	ns *netnstest.NS
}

func newLab(t testing.TB) lab {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.IPVS)
	return lab{t, ipvs.New(), netnstest.New(t)}
}

func (l lab) apply(ops ...kernel.Op) {
	l.t.Helper()
	if err := errors.Join(l.b.Apply(l.ns.FD(), ns, ops)...); err != nil {
		l.t.Fatal(err)
	}
}

func (l lab) dump() kernel.State {
	l.t.Helper()
	st, err := l.b.Dump(l.ns.FD(), ns)
	if err != nil {
		l.t.Fatal(err)
	}
	return st
}

func (l lab) same(want kernel.State) {
	l.t.Helper()
	if d := cmp.Diff(want.Text(), l.dump().Text()); d != "" {
		l.t.Fatalf("wanted (-) and dumped (+) differ:\n%s", d)
	}
}

// set leads from what is there to want.
func (l lab) set(want kernel.State) {
	l.t.Helper()
	l.apply(kernel.Diff(l.dump(), want)...)
	l.same(want)
}

// other is a handle of somebody else's.
func (l lab) other() *mobyipvs.Handle {
	l.t.Helper()
	h, err := mobyipvs.New(l.ns.Path())
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(h.Close)
	return h
}

func TestEverySchedulerReadsBack(t *testing.T) {
	l := newLab(t)
	l.same(kernel.State{})
	// All that Linux 6.12 has (net/netfilter/ipvs).
	for _, s := range []string{"rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos"} {
		l.set(kernel.State{
			service(7):            kernel.IPVSServiceSpec{Scheduler: s},
			dest(7, "10.255.0.2"): kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR},
		})
	}
	err := l.b.Apply(l.ns.FD(), ns, []kernel.Op{{Key: service(8), Want: kernel.IPVSServiceSpec{Scheduler: "dice"}}})[0]
	if !errors.Is(err, kernel.ErrUnsupported) {
		t.Errorf("scheduler dice: %v, want %v", err, kernel.ErrUnsupported)
	}
}

func TestEveryFieldReadsBack(t *testing.T) {
	l := newLab(t)
	for _, persist := range []int{0, 1, 86400} {
		for _, bits := range []int{1, 24, 31, 32} {
			if persist == 0 {
				bits = 0
			}
			for _, flag := range []bool{false, true} {
				l.set(kernel.State{
					kernel.IPVSTimeouts{NS: ns}: kernel.IPVSTimeoutsSpec{TCP: 10800, FIN: 60, UDP: 120},
					service(1<<32 - 1):          kernel.IPVSServiceSpec{Scheduler: "sh", Persist: persist, PersistBits: bits, Fallback: flag, OnePacket: flag},
				})
			}
		}
	}
	// One address on the client's port and on two others: three destinations.
	nat := kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT}
	ports := kernel.State{service(1): kernel.IPVSServiceSpec{Scheduler: "rr", OnePacket: true}}
	for _, p := range []uint16{0, 1, 65535} {
		k := dest(1, "10.255.0.2")
		k.Port = p
		ports[k] = nat
	}
	l.set(ports)
	for k := range ports {
		if d, ok := k.(kernel.IPVSDest); ok && d.Port == 1 {
			delete(ports, k)
		}
	}
	l.set(ports)
	for _, m := range []kernel.IPVSMethod{kernel.IPVSDR, kernel.IPVSNAT, kernel.IPVSTun} {
		for _, weight := range []int{0, 1, 65535} {
			l.set(kernel.State{
				service(1):            kernel.IPVSServiceSpec{Scheduler: "rr"},
				dest(1, "10.255.0.2"): kernel.IPVSDestSpec{Weight: weight, Method: m, Upper: weight, Lower: weight / 2},
			})
		}
	}
}

func TestBadValuesAreRefused(t *testing.T) {
	l := newLab(t)
	good := kernel.IPVSServiceSpec{Scheduler: "rr"}
	l.apply(kernel.Op{Key: service(1), Want: good})
	before := l.dump()
	for _, o := range []kernel.Op{
		{Key: service(0), Want: good},
		{Key: service(2), Want: kernel.IPVSServiceSpec{}},
		{Key: service(2), Want: kernel.IPVSServiceSpec{Scheduler: "rr", Persist: 5}},
		{Key: service(2), Want: kernel.IPVSServiceSpec{Scheduler: "rr", PersistBits: 24}},
		{Key: service(2), Want: kernel.MarkSpec{}},
		{Key: dest(1, "10.0.0.1"), Want: kernel.IPVSDestSpec{Weight: 65536, Method: kernel.IPVSDR}},
		{Key: dest(1, "10.0.0.1"), Want: kernel.IPVSDestSpec{Weight: -1, Method: kernel.IPVSDR}},
		{Key: dest(1, "10.0.0.1"), Want: kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR, Lower: 1}},
		{Key: dest(1, "10.0.0.1"), Want: kernel.IPVSDestSpec{Weight: 1}},
		{Key: kernel.IPVSDest{NS: ns, Mark: 1, IP: netip.MustParseAddr("10.0.0.1"), Port: 80}, Want: kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}},
		{Key: kernel.IPVSDest{NS: ns, Mark: 1, IP: netip.MustParseAddr("10.0.0.1"), Port: 80}, Want: kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSTun}},
		{Key: dest(1, "fd00::1"), Want: kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}},
		{Key: kernel.IPVSTimeouts{NS: ns}, Want: kernel.IPVSTimeoutsSpec{TCP: 1, FIN: 1}},
		{Key: kernel.IPVSService{NS: "sluice-b", Mark: 3}, Want: good},
		{Key: kernel.Mark{NS: ns}, Want: kernel.MarkSpec{Mark: 1}},
	} {
		if err := l.b.Apply(l.ns.FD(), ns, []kernel.Op{o})[0]; err == nil {
			t.Errorf("%s is done", o)
		}
	}
	l.same(before)
	// A process's own namespace is never meant.
	if err := l.b.Apply(0, ns, []kernel.Op{{Key: service(2), Want: good}})[0]; err == nil {
		t.Error("descriptor 0 is taken for a namespace")
	}
}

func TestWhatIsMissingOrThereAlready(t *testing.T) {
	l := newLab(t)
	rr, one := kernel.IPVSServiceSpec{Scheduler: "rr"}, kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}
	// What was believed to be there has gone, and the other way round.
	l.apply(kernel.Op{Key: service(1), Have: kernel.IPVSServiceSpec{Scheduler: "wlc"}, Want: rr})
	l.apply(kernel.Op{Key: service(1), Want: rr})
	l.apply(kernel.Op{Key: dest(1, "10.0.0.1"), Have: kernel.IPVSDestSpec{Weight: 9}, Want: one})
	l.apply(kernel.Op{Key: dest(1, "10.0.0.1"), Want: one})
	l.same(kernel.State{service(1): rr, dest(1, "10.0.0.1"): one})
	for range 2 {
		l.apply(kernel.Op{Key: dest(1, "10.0.0.1"), Have: one}, kernel.Op{Key: dest(2, "10.0.0.1"), Have: one})
	}
	for range 2 {
		l.apply(kernel.Op{Key: service(1), Have: rr})
	}
	l.same(kernel.State{})
	for _, have := range []kernel.Value{nil, one} {
		err := l.b.Apply(l.ns.FD(), ns, []kernel.Op{{Key: dest(1, "10.0.0.1"), Have: have, Want: one}})[0]
		if !errors.Is(err, kernel.ErrNotExist) {
			t.Errorf("destination of no service: %v, want %v", err, kernel.ErrNotExist)
		}
	}
}

func TestForeignServicesAreLeftAlone(t *testing.T) {
	l := newLab(t)
	h := l.other()
	for _, s := range []*mobyipvs.Service{
		{AddressFamily: unix.AF_INET, Protocol: unix.IPPROTO_TCP, Address: []byte{10, 0, 0, 9}, Port: 80, SchedName: "rr", Netmask: 0xffffffff},
		{AddressFamily: unix.AF_INET6, FWMark: 5, SchedName: "rr", Netmask: 128},
	} {
		if err := h.NewService(s); err != nil {
			t.Fatal(err)
		}
	}
	l.same(kernel.State{})
	// One of ours with flags that we would not give it (IP_VS_SVC_F_SCHED3, 0x20),
	// and a destination with a port that no packet would get.
	odd := &mobyipvs.Service{AddressFamily: unix.AF_INET, FWMark: 6, SchedName: "rr", Netmask: 0xffffffff, Flags: 0x20}
	if err := h.NewService(odd); err != nil {
		t.Fatal(err)
	}
	port := &mobyipvs.Destination{Address: []byte{10, 255, 0, 2}, Port: 80, Weight: 1, ConnectionFlags: mobyipvs.ConnFwdDirectRoute}
	if err := h.NewDestination(odd, port); err != nil {
		t.Fatal(err)
	}
	at80 := dest(6, "10.255.0.2")
	at80.Port = 80
	l.same(kernel.State{service(6): kernel.IPVSServiceSpec{}, at80: kernel.IPVSDestSpec{}})
	l.set(kernel.State{
		service(6): kernel.IPVSServiceSpec{Scheduler: "rr"},
		at80:       kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSNAT},
	})
	l.set(kernel.State{})
	if left, err := h.GetServices(); err != nil || len(left) != 2 {
		t.Errorf("left of two foreign services: %d, %v", len(left), err)
	}
}

// Many answers come in several messages.
func TestThousandsReadBack(t *testing.T) {
	l := newLab(t)
	want := kernel.State{}
	for i := range 1000 {
		mark := uint32(i + 1)
		want[service(mark)] = kernel.IPVSServiceSpec{Scheduler: "rr"}
		for j := range 3 {
			want[dest(mark, fmt.Sprintf("10.%d.0.%d", i%250, j+1))] = kernel.IPVSDestSpec{Weight: j, Method: kernel.IPVSDR}
		}
	}
	for j := range 3000 {
		want[dest(1, fmt.Sprintf("10.251.%d.%d", j/250, j%250+1))] = kernel.IPVSDestSpec{Weight: 1, Method: kernel.IPVSDR}
	}
	l.set(want)
	if have := l.dump(); !maps.Equal(have, want) {
		t.Errorf("%d objects of %d", len(have), len(want))
	}
	l.set(kernel.State{})
}

func TestProbe(t *testing.T) {
	netnstest.Need(t, netnstest.Root)
	space := netnstest.New(t)
	b := ipvs.New()
	err := b.Probe(space.FD())
	if _, lacking := netlink.GenlFamilyGet("IPVS"); lacking != nil {
		if !errors.Is(err, kernel.ErrUnsupported) {
			t.Errorf("a kernel without IPVS: %v, want %v", err, kernel.ErrUnsupported)
		}
		if _, err := b.Dump(space.FD(), ns); !errors.Is(err, kernel.ErrUnsupported) {
			t.Errorf("dump without IPVS: %v, want %v", err, kernel.ErrUnsupported)
		}
		return
	}
	if err != nil {
		t.Errorf("a kernel with IPVS: %v", err)
	}
	if st, err := b.Dump(space.FD(), ns); err != nil || len(st) != 0 {
		t.Errorf("left by the probe: %v, %v", st.Text(), err)
	}
}
