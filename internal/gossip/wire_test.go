package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func samples() []any {
	addr := netip.MustParseAddrPort("192.0.2.7:7947")
	addr6 := netip.MustParseAddrPort("[2001:db8::7]:7947")
	return []any{
		&delta{owner: "n1", inc: Incarnation{1 << 60, 3}, addr: addr, from: 4, to: 9, floor: 2, done: 5, relay: true,
			records: []change{{seq: 6, key: "a", value: []byte("x")}, {seq: 9, key: "b", deleted: true}, {seq: 12, key: "c", value: []byte{}}}},
		&delta{owner: "n1", inc: Incarnation{2, 0}, addr: addr6, to: 1, full: true,
			records:  []change{{seq: 1, key: "a", value: []byte("x")}},
			retained: []kept{{inc: Incarnation{1, 9}, seq: 77, key: "old", value: []byte("y")}}},
		&delta{owner: "empty", addr: netip.AddrPort{}},
		&grave{owner: "n2", inc: Incarnation{5, 1}, at: 1_800_000_000, forgot: true},
		&probe{from: "n3", addr: addr, hash: 0xdeadbeef},
		&agree{from: "n3", hash: 1},
		&digest{from: "n4", addr: addr6, reply: true, items: []digestItem{
			{"n1", version{inc: Incarnation{1, 0}, seq: 12}}, {"n2", version{inc: Incarnation{5, 1}, grave: true}}}},
		&digest{from: "n4", addr: addr},
	}
}

func encode(msg any) []byte { return msg.(interface{ encode() []byte }).encode() }

func decodeAll(b []byte) (msgs []any, err error) {
	err = decode(b, func(m any) { msgs = append(msgs, m) })
	return msgs, err
}

func TestMessagesSurviveTheWire(t *testing.T) {
	want := samples()
	var parts [][]byte
	for _, m := range want {
		parts = append(parts, encode(m))
	}
	got, err := decodeAll(envelope(parts...))
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		if !reflect.DeepEqual(got[i], want[i]) {
			t.Errorf("message %d is %+v, want %+v", i, got[i], want[i])
		}
	}
}

func TestDecodedMessagesDoNotShareTheInput(t *testing.T) {
	b := envelope(encode(samples()[0]))
	got, err := decodeAll(b)
	if err != nil {
		t.Fatal(err)
	}
	clear(b)
	if !reflect.DeepEqual(got[0], samples()[0]) {
		t.Errorf("it changed with the input: %+v", got[0])
	}
}

func TestDamagedMessagesAreRejected(t *testing.T) {
	for _, m := range samples() {
		whole := envelope(encode(m))
		for i := range whole {
			if i != 1 && len(whole[:i]) > 0 { // one byte is an empty envelope
				if _, err := decodeAll(whole[:i]); err == nil {
					t.Errorf("%T cut to %d of %d bytes is accepted", m, i, len(whole))
				}
			}
		}
		if _, err := decodeAll(envelope(append(encode(m), 0))); !errors.Is(err, errInvalid) {
			t.Errorf("%T with a byte more: %v", m, err)
		}
	}
	inc := Incarnation{Start: 1}
	addr := netip.MustParseAddrPort("192.0.2.7:7947")
	for _, tc := range []struct {
		name string
		b    []byte
		want error
	}{
		{"nothing", nil, errTruncated},
		{"other version", []byte{wireVersion + 1}, errVersion},
		{"no kind", envelope(nil), errTruncated},
		{"no owner", envelope((&grave{inc: inc}).encode()), errInvalid},
		{"long owner", envelope((&grave{owner: strings.Repeat("x", MaxName+1)}).encode()), errTooLong},
		{"long value", envelope((&delta{owner: "o", to: 1, records: []change{{seq: 1, key: "k", value: make([]byte, MaxValue+1)}}}).encode()), errTooLong},
		{"range backwards", envelope((&delta{owner: "o", from: 2, to: 1}).encode()), errInvalid},
		{"record before its range", envelope((&delta{owner: "o", from: 2, to: 3, records: []change{{seq: 2, key: "k"}}}).encode()), errInvalid},
		{"retained from itself", envelope((&delta{owner: "o", inc: inc, full: true, retained: []kept{{inc: inc, key: "k"}}}).encode()), errInvalid},
		{"nowhere to answer", envelope((&probe{from: "p"}).encode()), errInvalid},
		{"a list longer than the message", envelope(append((&digest{from: "p", addr: addr}).encode()[:11], 0xff, 0xff, 0xff, 0xff, 0x0f)), errTruncated},
	} {
		if _, err := decodeAll(tc.b); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestUnknownKindsArePassedOver(t *testing.T) {
	got, err := decodeAll(envelope([]byte{99, 1, 2, 3}, encode(samples()[3])))
	if err != nil || len(got) != 1 {
		t.Errorf("got %d messages, error %v; want one and none", len(got), err)
	}
}

func TestSplitPartsFitPacketsAndJoin(t *testing.T) {
	for _, size := range []int{0, 10, 300, 1000} {
		d := delta{owner: strings.Repeat("o", MaxName), inc: Incarnation{1 << 63, 1}, addr: netip.MustParseAddrPort("[2001:db8::7]:7947"), from: 1 << 40, floor: 1 << 39, done: 1 << 40}
		for i := range 100 {
			d.to = d.from + 2*uint64(i) + 1
			d.records = append(d.records, change{seq: d.to, key: strings.Repeat("k", size/4+1), value: make([]byte, size*3/4)})
		}
		at, n := d.from, 0
		for _, p := range d.split() {
			if b := envelope(p.encode()); len(b) > maxPacket {
				t.Errorf("values of %d: a part of %d bytes", size, len(b))
			}
			if p.from != at {
				t.Errorf("values of %d: a part begins at %d, the one before ended at %d", size, p.from, at)
			}
			at, n = p.to, n+len(p.records)
		}
		if at != d.to || n != len(d.records) {
			t.Errorf("values of %d: parts end at %d with %d records, want %d and %d", size, at, n, d.to, len(d.records))
		}
	}
}

func TestPacketsFillUp(t *testing.T) {
	var msgs [][]byte
	for range 40 {
		msgs = append(msgs, make([]byte, 100))
	}
	got, ok := packets(msgs, 4)
	if !ok || len(got) != 4 {
		t.Fatalf("%d packets, ok %t, want 4", len(got), ok)
	}
	for _, p := range got {
		if len(p) > maxPacket {
			t.Errorf("packet of %d bytes", len(p))
		}
	}
	if _, ok := packets(msgs, 3); ok {
		t.Error("fits into three")
	}
	if _, ok := packets([][]byte{make([]byte, maxPacket)}, 4); ok {
		t.Error("a message larger than a packet fits one")
	}
}

func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		f.Add(envelope(encode(m)))
	}
	f.Add(envelope(encode(samples()[0]), encode(samples()[4])))
	f.Add([]byte{wireVersion, 0xff, 0xff, 0xff, 0xff, 0x0f, kindDelta})
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		msgs, err := decodeAll(b)
		if !bytes.Equal(b, before) {
			t.Fatal("decoding changed the input")
		}
		if err != nil {
			return
		}
		// What parses must survive another trip, and the state must take it.
		r := newReplica("n1", Incarnation{Start: 7}, netip.AddrPort{})
		for _, m := range msgs {
			again, err := decodeAll(envelope(encode(m)))
			if err != nil || len(again) != 1 || !reflect.DeepEqual(again[0], m) {
				t.Fatalf("%+v became %+v, %v", m, again, err)
			}
			feed(r, m)
			feed(r, m)
		}
		for _, tab := range r.tables {
			tab.entries()
		}
		if n := len(r.digest()); n > 1+len(msgs) {
			t.Fatalf("%d owners from %d messages", n, len(msgs))
		}
	})
}

// feed gives a message to a replica and returns what it answers.
func feed(r *replica, msg any) [][]byte {
	switch m := msg.(type) {
	case *delta:
		r.applyDelta(m)
	case *grave:
		r.applyGrave(m, epoch)
	case *digest:
		answer, _, _ := r.compare(m.items)
		return answer
	}
	return nil
}

func benchDelta(n int) delta {
	d := delta{owner: "node", inc: Incarnation{Start: 1}, to: uint64(n), full: true}
	for i := range n {
		d.records = append(d.records, change{seq: uint64(i + 1), key: fmt.Sprintf("endpoint/%032d", i), value: make([]byte, 200)})
	}
	return d
}

func BenchmarkEncode10k(b *testing.B) {
	d := benchDelta(10_000)
	for b.Loop() {
		b.SetBytes(int64(len(d.encode())))
	}
}

func BenchmarkDecode10k(b *testing.B) {
	d := benchDelta(10_000)
	raw := envelope(d.encode())
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if _, err := decodeAll(raw); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkApplyTableOf10k(b *testing.B) {
	d := benchDelta(10_000)
	for b.Loop() {
		r := newReplica("me", Incarnation{Start: 1}, netip.AddrPort{})
		if r.applyDelta(&d) != outcomeApplied {
			b.Fatal("not applied")
		}
	}
}

func BenchmarkApply10kSingleChanges(b *testing.B) {
	d := benchDelta(10_000)
	for b.Loop() {
		r := newReplica("me", Incarnation{Start: 1}, netip.AddrPort{})
		for i := range d.records {
			one := delta{owner: d.owner, inc: d.inc, from: uint64(i), to: uint64(i + 1), records: d.records[i : i+1]}
			r.applyDelta(&one)
		}
	}
}
