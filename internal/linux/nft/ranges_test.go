package nft_test

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"sluice/internal/kernel"
	"sluice/internal/linux/nft"
	"sluice/internal/model"
)

// rangesOf is a table with these ranges of TCP; each is "lo-hi" of an alias.
func rangesOf(of ...kernel.MeshRange) kernel.State {
	st := kernel.State{kernel.MeshTable{}: kernel.MeshTableSpec{Devices: "slm"}}
	for _, r := range of {
		st[r] = kernel.MeshRangeSpec{Alias: netip.MustParseAddr("250.0.16.100")}
	}
	return st
}

func tcpRange(lo, hi uint16) kernel.MeshRange {
	return kernel.MeshRange{Proto: model.TCP, Lo: lo, Hi: hi}
}

func TestAThousandPortsAreOneElement(t *testing.T) {
	fd := newNetns(t)
	want := rangesOf(tcpRange(8000, 8999))
	must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(kernel.State{}, want)))
	sameHost(t, fd, want)
	out := run(t, fd, "nft", "list", "table", "ip", "sluice-mesh")
	if n := strings.Count(out, "8000-8999 : 250.0.16.100"); n != 1 {
		t.Errorf("the range is listed %d times, want once:\n%s", n, out)
	}
	if n := strings.Count(out, "elements = {"); n != 1 || strings.Contains(out, "8001") {
		t.Errorf("there are more elements than one:\n%s", out)
	}
	// Two rules for each map, whatever is in them.
	if n := strings.Count(out, "@tcp-ranges"); n != 4 {
		t.Errorf("%d rules look up ranges of TCP, want 4:\n%s", n, out)
	}
}

// Whichever ranges follow each other, one change leads there, and one that is done
// twice is done once.
func TestRangesBecomeOthers(t *testing.T) {
	fd := newNetns(t)
	have := kernel.State{}
	other := kernel.MeshRangeSpec{Alias: netip.MustParseAddr("250.0.16.101")}
	next := func(want kernel.State) {
		t.Helper()
		for range 2 {
			must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(have, want)))
			sameHost(t, fd, want)
		}
		have = want
	}
	moved := rangesOf(tcpRange(8000, 8499), tcpRange(8500, 8999))
	moved[tcpRange(8500, 8999)] = other
	split := rangesOf(tcpRange(8000, 8499), tcpRange(8501, 8999))
	split[kernel.MeshPort{Proto: model.TCP, Port: 8500}] = kernel.MeshPortSpec{Alias: other.Alias, To: 80}
	both := rangesOf(tcpRange(1, 2), kernel.MeshRange{Proto: model.UDP, Lo: 1, Hi: 2}, kernel.MeshRange{Proto: model.SCTP, Lo: 1, Hi: 2})
	for _, want := range []kernel.State{
		rangesOf(tcpRange(8000, 8999)),
		rangesOf(tcpRange(8000, 8998)), // the same beginning
		rangesOf(tcpRange(8001, 8998)), // the same end
		rangesOf(tcpRange(8000, 8999)),
		split,
		moved, // neighbours
		rangesOf(tcpRange(7000, 9999)),
		rangesOf(tcpRange(0, 65535)),
		rangesOf(tcpRange(0, 1), tcpRange(65534, 65535)),
		rangesOf(),
		both,
		rangesOf(),
	} {
		next(want)
	}
	r := rand.New(rand.NewPCG(1, 1)) // any numbers; the same each time
	for range 60 {
		want := rangesOf()
		for lo := r.IntN(30); lo < 100; {
			hi := lo + 1 + r.IntN(30)
			want[tcpRange(uint16(lo), uint16(hi))] = kernel.MeshRangeSpec{Alias: netip.AddrFrom4([4]byte{250, 0, 16, byte(r.IntN(3))})}
			lo = hi + 1 + r.IntN(2)*r.IntN(20)
		}
		next(want)
	}
}

// A change that was cut short between its two steps leaves both maps with something
// in them; a person may do so too.
func TestRangesInBothMapsAreMended(t *testing.T) {
	want := rangesOf(tcpRange(8000, 8999))
	for name, damage := range map[string]string{
		"the second has what is wanted": "add element ip sluice-mesh tcp-ranges-2 { 8000-8999 : 250.0.16.100 }; " +
			"flush map ip sluice-mesh tcp-ranges; add element ip sluice-mesh tcp-ranges { 8000-8998 : 250.0.16.100 }",
		"the second has something else": "add element ip sluice-mesh tcp-ranges-2 { 8100-8200 : 250.0.16.101 }",
		"the second has it for another": "flush map ip sluice-mesh tcp-ranges; add element ip sluice-mesh tcp-ranges { 8000-8999 : 250.0.16.101 }; " +
			"add element ip sluice-mesh tcp-ranges-2 { 8000-8999 : 250.0.16.100 }",
		"neighbours without an end": "add element ip sluice-mesh tcp-ranges { 9000-9100 : 250.0.16.101, 9101-9200 : 250.0.16.102 }",
		"none has any":              "flush map ip sluice-mesh tcp-ranges",
		"a map is gone":             "flush chain ip sluice-mesh prerouting; flush chain ip sluice-mesh output; delete map ip sluice-mesh tcp-ranges",
	} {
		t.Run(name, func(t *testing.T) {
			fd := newNetns(t)
			must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(kernel.State{}, want)))
			run(t, fd, "nft", damage)
			ops := kernel.Diff(hostDump(t, fd), want)
			if len(ops) == 0 {
				t.Fatal("no difference is seen")
			}
			must(t, nft.Tables{}.ApplyHost(fd, ops))
			sameHost(t, fd, want)
			// And changes go on as ever.
			next := maps.Clone(want)
			next[tcpRange(1000, 1999)] = want[tcpRange(8000, 8999)]
			must(t, nft.Tables{}.ApplyHost(fd, kernel.Diff(want, next)))
			sameHost(t, fd, next)
		})
	}
}
