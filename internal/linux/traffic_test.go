package linux

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/linux/ipvs"
	"sluice/internal/netnstest"
)

// counting is a Tables and an IPVS that counts, and whose Apply waits to be let go.
type counting struct {
	traffic map[kernel.Key]kernel.Traffic
	err     error
	entered chan struct{} // Apply is in it
	release chan struct{}
}

func (c counting) DumpBridge(int, string) (kernel.State, error) { return kernel.State{}, nil }
func (c counting) DumpHost(int) (kernel.State, error)           { return kernel.State{}, nil }
func (c counting) ApplyHost(int, []kernel.Op) error             { return nil }
func (c counting) ApplyBridge(int, string, []kernel.Op) error {
	close(c.entered)
	<-c.release
	return nil
}
func (c counting) DumpTask(int, string) (kernel.State, error)     { return kernel.State{}, nil }
func (c counting) ApplyTask(int, string, []kernel.Op) error       { return nil }
func (c counting) Dump(int, string) (kernel.State, error)         { return kernel.State{}, nil }
func (c counting) Apply(_ int, _ string, ops []kernel.Op) []error { return make([]error, len(ops)) }
func (c counting) Traffic(int, string) (map[kernel.Key]kernel.Traffic, error) {
	return c.traffic, c.err
}

var (
	trafficVIP  = kernel.VIP{NS: "sluice-net", IP: netip.MustParseAddr("10.255.0.7")}
	trafficIPVS = kernel.IPVSService{NS: "sluice-net", Mark: 7}
)

// newCounting is a kernel with a namespace and two adapters that count.
func newCounting(t *testing.T) (k *Kernel, tables, lvs counting) {
	t.Helper()
	tables = counting{
		traffic: map[kernel.Key]kernel.Traffic{trafficVIP: {Connections: 3}},
		entered: make(chan struct{}), release: make(chan struct{}),
	}
	lvs = counting{traffic: map[kernel.Key]kernel.Traffic{trafficIPVS: {Connections: 5, Active: 1}}}
	k, _ = newHost(t, tables)
	k.cfg.IPVS = lvs
	apply(t, k, kernel.State{kernel.Netns{Name: "sluice-net"}: kernel.NetnsSpec{}})
	return k, tables, lvs
}

// dropping counts what a guard has dropped.
type dropping struct{ counting }

func (dropping) Dropped(int, string) (uint64, error) { return 7, nil }

func TestDroppedAsksTheTables(t *testing.T) {
	k, tables, _ := newCounting(t)
	if n, err := k.Dropped("sluice-net"); n != 0 || err != nil {
		t.Errorf("tables that do not count: %d, %v; want 0", n, err)
	}
	k.cfg.Tables = dropping{tables}
	if n, err := k.Dropped("sluice-net"); n != 7 || err != nil {
		t.Errorf("%d, %v; want 7", n, err)
	}
	if _, err := k.Dropped("sluice-gone"); !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("no such namespace: %v", err)
	}
	if _, err := k.Dropped("docker0"); err == nil {
		t.Error("a namespace that is not ours is read")
	}
}

func TestTrafficJoinsBothDatapaths(t *testing.T) {
	k, tables, lvs := newCounting(t)
	want := maps.Clone(tables.traffic)
	maps.Copy(want, lvs.traffic)
	same := func(want map[kernel.Key]kernel.Traffic) {
		t.Helper()
		if got, err := k.Traffic(t.Context(), "sluice-net"); err != nil || !maps.Equal(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
	same(want)
	lvs.traffic, lvs.err = nil, kernel.ErrUnsupported
	k.cfg.IPVS = lvs
	same(tables.traffic)
	k.cfg.IPVS = nil
	same(tables.traffic)
	lvs.err = kernel.ErrInterrupted
	k.cfg.IPVS = lvs
	if got, err := k.Traffic(t.Context(), "sluice-net"); got != nil || !errors.Is(err, kernel.ErrInterrupted) {
		t.Errorf("%v, %v; want %v", got, err, kernel.ErrInterrupted)
	}
	k.cfg.Tables, k.cfg.IPVS = nil, nil
	same(nil)
}

func TestTrafficOfNoNamespace(t *testing.T) {
	k, _, _ := newCounting(t)
	if _, err := k.Traffic(t.Context(), "sluice-none"); !errors.Is(err, kernel.ErrNotExist) {
		t.Errorf("%v, want %v", err, kernel.ErrNotExist)
	}
	for _, name := range []string{"", "other", "sluice-net/../other", "../sluice-net"} {
		if _, err := k.Traffic(t.Context(), name); err == nil {
			t.Errorf("%q is taken for one of ours", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Traffic(ctx, "sluice-net"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

func TestTrafficDoesNotWaitForApply(t *testing.T) {
	k, tables, _ := newCounting(t)
	done := make(chan []error, 1)
	go func() {
		done <- k.Apply(t.Context(), []kernel.Op{{Key: kernel.BridgeTable{NS: "sluice-net"}, Want: kernel.BridgeTableSpec{}}})
	}()
	<-tables.entered
	if got, err := k.Traffic(t.Context(), "sluice-net"); err != nil || len(got) != 2 {
		t.Errorf("%v, %v; want two counters", got, err)
	}
	select {
	case <-done:
		t.Error("Apply has ended; nothing is shown")
	default:
	}
	close(tables.release)
	if err := errors.Join(<-done...); err != nil {
		t.Error(err)
	}
}

// Real counters, with the real adapter.
func TestTrafficOfIPVS(t *testing.T) {
	netnstest.Need(t, netnstest.IPVS)
	k, _ := newHost(t, nil)
	k.cfg.IPVS = ipvs.New()
	apply(t, k, kernel.State{
		kernel.Netns{Name: "sluice-net"}: kernel.NetnsSpec{},
		trafficIPVS:                      kernel.IPVSServiceSpec{Scheduler: "rr"},
	})
	got, err := k.Traffic(t.Context(), "sluice-net")
	if _, ok := got[trafficIPVS]; err != nil || !ok {
		t.Errorf("%v, %v; want counters of %s", got, err, trafficIPVS)
	}
}
