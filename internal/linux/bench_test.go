package linux

import (
	"fmt"
	"net/netip"
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// crowd is a network with a number of endpoints here and elsewhere.
func crowd(own, remote int) kernel.State {
	s := kernel.State{
		kernel.Netns{Name: "sluice-net"}:                                kernel.NetnsSpec{},
		kernel.Link{NS: "sluice-net", Name: "br0", Kind: kernel.Bridge}: kernel.LinkSpec{Alias: "sluice net", MTU: 1450, MAC: model.MAC{2, 1}},
		kernel.Link{NS: "sluice-net", Name: "vxlan0", Kind: kernel.VXLAN}: kernel.LinkSpec{
			Alias: "sluice net", MTU: 1450, Master: "br0", Quiet: true, VNI: 5000, Port: 4799, Local: netip.MustParseAddr("192.0.2.1"),
		},
	}
	for i := range own {
		k, v := pair(i)
		s[k] = v
	}
	ip := netip.MustParseAddr("10.255.4.0")
	for range remote {
		ip = ip.Next()
		s[kernel.Neigh{NS: "sluice-net", Dev: "br0", IP: ip}] = kernel.NeighSpec{MAC: model.MACFor(ip)}
		s[kernel.FDB{NS: "sluice-net", Dev: "vxlan0", MAC: model.MACFor(ip)}] = kernel.FDBSpec{VTEP: netip.MustParseAddr("192.0.2.2")}
	}
	return s
}

func pair(i int) (kernel.Link, kernel.LinkSpec) {
	return kernel.Link{NS: "sluice-net", Name: fmt.Sprintf("slv%d", i), Kind: kernel.Veth}, kernel.LinkSpec{
		Alias: fmt.Sprintf("sluice ep%d", i), MTU: 1450, Master: "br0",
		Peer: fmt.Sprintf("slc%d", i), PeerMAC: model.MAC{2, 0x42, 10, 255, byte(i >> 8), byte(i)},
	}
}

// BenchmarkVethCreate is the kernel's part of a Join.
func BenchmarkVethCreate(b *testing.B) {
	k, _ := newHost(b, nil)
	apply(b, k, crowd(0, 0))
	for i := 0; b.Loop(); i++ {
		key, want := pair(i)
		if err := k.Apply(b.Context(), []kernel.Op{{Key: key, Want: want}})[0]; err != nil {
			b.Fatal(err)
		}
		if i%500 == 499 { // a bridge has at most 1024 ports
			b.StopTimer()
			apply(b, k, crowd(0, 0))
			b.StartTimer()
		}
	}
}

// BenchmarkPeerCreate is what one remote endpoint costs: neighbour and forwarding entry.
func BenchmarkPeerCreate(b *testing.B) {
	k, _ := newHost(b, nil)
	apply(b, k, crowd(0, 0))
	ops := kernel.Diff(crowd(0, 0), crowd(0, 1))
	for b.Loop() {
		for _, err := range k.Apply(b.Context(), ops) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkDump reads a node with 100 endpoints of its own and 1000 elsewhere;
// "filter" is the part of it that runs iptables.
func BenchmarkDump(b *testing.B) {
	k, _ := newHost(b, nil)
	apply(b, k, crowd(100, 1000))
	b.Run("whole", func(b *testing.B) {
		for b.Loop() {
			if s, err := k.Dump(b.Context(), nil); err != nil || len(s) < 2100 {
				b.Fatal(len(s), err)
			}
		}
	})
	b.Run("namespace", func(b *testing.B) {
		k.mu.Lock()
		defer k.mu.Unlock()
		for b.Loop() {
			if _, err := k.dumpSpace(k.spaces["sluice-net"], kernel.State{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("filter", func(b *testing.B) {
		k.mu.Lock()
		defer k.mu.Unlock()
		for b.Loop() {
			if err := k.dumpFilter(kernel.State{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkVethDelete deletes 100 pairs at once, as after the end of a big service.
func BenchmarkVethDelete(b *testing.B) {
	k, _ := newHost(b, nil)
	for b.Loop() {
		b.StopTimer()
		apply(b, k, crowd(100, 0))
		b.StartTimer()
		apply(b, k, crowd(0, 0))
	}
}
