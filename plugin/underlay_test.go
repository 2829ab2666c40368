package main

import (
	"errors"
	"net/netip"
	"testing"
)

// TestUnderlayIsRemembered: the kernel is not asked for what it said before, until that is
// read anew; that there is no device is not remembered.
func TestUnderlayIsRemembered(t *testing.T) {
	one, other := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	gone := errors.New("gone")
	devices, asked := map[netip.Addr]int{one: 1500}, 0
	u := underlay{ask: func(a netip.Addr) (int, error) {
		asked++
		if mtu, ok := devices[a]; ok {
			return mtu, nil
		}
		return 0, gone
	}}
	again := func() { u.refresh(one) }
	for _, step := range []struct {
		what  string
		do    func()
		of    netip.Addr
		mtu   int
		err   error
		asked int
	}{
		{"not known yet", func() {}, one, 1500, nil, 1},
		{"remembered", func() { devices[one] = 9000 }, one, 1500, nil, 1},
		{"refreshed", again, one, 9000, nil, 2},
		{"an address without a device", func() {}, other, 0, gone, 3},
		{"the first is still known", func() {}, one, 9000, nil, 3},
		{"the other has a device by now", func() { devices[other] = 1400 }, other, 1400, nil, 4},
		{"read before it is wanted", again, one, 9000, nil, 5},
		{"the device is gone", func() { delete(devices, one); again() }, one, 0, gone, 7},
		{"and back", func() { devices[one] = 1280 }, one, 1280, nil, 8},
	} {
		step.do()
		if mtu, err := u.mtu(step.of); mtu != step.mtu || !errors.Is(err, step.err) || asked != step.asked {
			t.Errorf("%s: %d, %v, asked %d times; want %d, %v, %d times", step.what, mtu, err, asked, step.mtu, step.err, step.asked)
		}
	}
}
