package model

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestPublishedPortsAreRead(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Published
		list []PortRange
	}{
		{"80", "80/tcp", []PortRange{{TCP, 80, 80, 80}}},
		{"81:80/tcp", "81:80/tcp", []PortRange{{TCP, 81, 81, 80}}},
		{" 53/UDP ; 53/tcp;53/udp", "53/tcp;53/udp", []PortRange{{TCP, 53, 53, 53}, {UDP, 53, 53, 53}}},
		{"8000-8010:9000-9010/sctp", "8000-8010:9000-9010/sctp", []PortRange{{SCTP, 8000, 8010, 9000}}},
		{"1-65535", "1-65535/tcp", []PortRange{{TCP, 1, 65535, 1}}},
		{"65535;65534", "65534-65535/tcp", []PortRange{{TCP, 65534, 65535, 65534}}},
		// What continues each other is one, whatever stands between.
		{"82:182;80-81:180-181;81/udp", "80-82:180-182/tcp;81/udp", []PortRange{{TCP, 80, 82, 180}, {UDP, 81, 81, 81}}},
		{"80-90;85-95;88", "80-95/tcp", []PortRange{{TCP, 80, 95, 80}}},
		{"80;81:80", "80/tcp;81:80/tcp", []PortRange{{TCP, 80, 80, 80}, {TCP, 81, 81, 80}}},
	} {
		got, err := ParsePublished(c.in)
		if err != nil || got != c.want || !slices.Equal(got.List(), c.list) {
			t.Errorf("%q: got %q, %v, %v; want %q, %v", c.in, got, got.List(), err, c.want, c.list)
		}
		if again, err := ParsePublished(string(got)); err != nil || again != got {
			t.Errorf("%q reads back as %q, %v", got, again, err)
		}
	}
	if got := Published("80/tcp;x;90/tcp").List(); len(got) != 2 {
		t.Errorf("of what is partly unreadable: %v", got)
	}
}

func TestPublishedPortsAreRefused(t *testing.T) {
	many := make([]string, MaxPublished+1)
	for i := range many {
		many[i] = PortRange{TCP, uint16(2*i + 1), uint16(2*i + 1), uint16(2*i + 1)}.String()
	}
	for in, want := range map[string]string{
		"":                        `"" is no port`,
		"0":                       `"0" is no port`,
		"80/icmp":                 `protocol "icmp" is none of tcp, udp, sctp`,
		"90-80":                   `range 90-80 ends before it begins`,
		"80-81:90":                `2 ports lead to 1`,
		"80;80:81":                `port 80/tcp leads to both 80 and 81`,
		"80-90:180-190;85":        `port 85/tcp leads to both 185 and 85`,
		"80:81:82":                `"81:82" is no port`,
		"80;;81":                  `"" is no port`,
		strings.Join(many, ";"):   `33 ranges that do not continue each other, and at most 32`,
		"0.0.0.0:80":              `"0.0.0.0" is no port`,
		"published=80,target=443": `is no port`,
	} {
		if got, err := ParsePublished(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %q, %v; want an error with %q", in, got, err, want)
		}
	}
}

// TestEqualSetsOfPortsAreEqualValues: however a set of ports is written.
func TestEqualSetsOfPortsAreEqualValues(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var items []string
		want := make(map[PortMap]bool)
		for range rapid.IntRange(1, 8).Draw(t, "items") {
			lo := rapid.Uint16Range(1, 30).Draw(t, "lo")
			r := PortRange{rapid.SampledFrom([]Proto{TCP, UDP}).Draw(t, "proto"), lo, lo + rapid.Uint16Range(0, 5).Draw(t, "more"), lo + 100}
			items = append(items, r.String())
			for p := r.Lo; p <= r.Hi; p++ {
				want[PortMap{r.Proto, p, p + 100}] = true
			}
		}
		one, err := ParsePublished(strings.Join(items, ";"))
		if err != nil {
			t.Fatal(err)
		}
		var single []string
		for m := range want {
			single = append(single, m.String())
		}
		if two, err := ParsePublished(strings.Join(single, ";")); err != nil || one != two {
			t.Fatalf("%q and %q, %v", one, two, err)
		}
		for _, r := range one.List() {
			for p := r.Lo; p <= r.Hi; p++ {
				if m := (PortMap{r.Proto, p, r.To + (p - r.Lo)}); !want[m] {
					t.Fatalf("%v is not in %v", m, items)
				} else {
					delete(want, m)
				}
			}
		}
		if len(want) > 0 {
			t.Fatalf("%q lacks %v", one, want)
		}
	})
}

func TestAddressesAndPrefixesAreRead(t *testing.T) {
	for in, want := range map[string]Addrs{
		"192.0.2.1":                     "192.0.2.1",
		"198.51.100.1; 9.0.0.1;9.0.0.1": "9.0.0.1;198.51.100.1",
		"127.0.0.1":                     "127.0.0.1",
		"0.0.0.0;192.0.2.1":             "",
	} {
		if got, err := ParseAddrs(in); err != nil || got != want || (got == "") != (got.List() == nil) {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{"": "no IPv4 address", "::1": "no IPv4 address", "10.0.0.0/8": "no IPv4 address", "224.0.0.1": "no address of a node", "255.255.255.255": "no address of a node"} {
		if got, err := ParseAddrs(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %q, %v; want an error with %q", in, got, err, want)
		}
	}
	for in, want := range map[string]Prefixes{
		"10.0.0.0/8":                  "10.0.0.0/8",
		"192.0.2.7":                   "192.0.2.7/32",
		"10.1.0.0/16;10.0.0.0/8":      "10.0.0.0/8",
		"10.0.0.0/9;10.128.0.0/9":     "10.0.0.0/8",
		"10.64.0.0/10;10.128.0.0/10":  "10.64.0.0/10;10.128.0.0/10",
		"1.0.0.0;1.0.0.1;1.0.0.2/31":  "1.0.0.0/30",
		"0.0.0.0/1;128.0.0.0/1":       "",
		"0.0.0.0/0;192.0.2.7":         "",
		"1.0.0.2/31;1.0.0.1;1.0.0.4 ": "1.0.0.1/32;1.0.0.2/31;1.0.0.4/32",
	} {
		if got, err := ParsePrefixes(in); err != nil || got != want || (got == "") != (got.List() == nil) {
			t.Errorf("%q: got %q, %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{"": "no IPv4 prefix", "::/0": "no IPv4 prefix", "10.0.0.0/33": "no IPv4 prefix", "10.0.0.1/8": "10.0.0.1/8 is an address in a prefix, which is 10.0.0.0/8"} {
		if got, err := ParsePrefixes(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %q, %v; want an error with %q", in, got, err, want)
		}
	}
	long := make([]string, 0, MaxFilters+1)
	for i := range MaxFilters + 1 {
		long = append(long, netip.AddrFrom4([4]byte{10, 0, byte(i), 1}).String())
	}
	if _, err := ParseAddrs(strings.Join(long, ";")); err == nil {
		t.Error("65 addresses are taken")
	}
	if _, err := ParsePrefixes(strings.Join(long, ";")); err == nil {
		t.Error("65 prefixes are taken")
	}
}

func TestLabelsAreReadAndMatched(t *testing.T) {
	node := map[string]string{"Zone": "A", "disk": "ssd", "empty": ""}
	for _, c := range []struct {
		in   string
		want Labels
		keys []string
		meet bool
	}{
		{"zone=a", "zone=a", []string{"zone"}, true},
		{"zone == A", "zone=a", []string{"zone"}, true},
		{"node.labels.zone!=b; disk=ssd", "disk=ssd;zone!=b", []string{"disk", "zone"}, true},
		{"zone=b", "zone=b", []string{"zone"}, false},
		{"zone=a;disk!=ssd", "disk!=ssd;zone=a", []string{"disk", "zone"}, false},
		{"rack!=1;rack!=2;rack!=1", "rack!=1;rack!=2", []string{"rack"}, true},
		{"rack=", "rack=", []string{"rack"}, true},
		{"rack=1", "rack=1", []string{"rack"}, false},
		{"zone!=", "zone!=", []string{"zone"}, true},
		{"empty=", "empty=", []string{"empty"}, true},
	} {
		got, err := ParseLabels(c.in)
		if err != nil || got != c.want || !slices.Equal(got.Keys(), c.keys) || got.Match(node) != c.meet {
			t.Errorf("%q: got %q, %v, %t, %v; want %q, %v, %t", c.in, got, got.Keys(), got.Match(node), err, c.want, c.keys, c.meet)
		}
	}
	if !Labels("").Match(nil) || Labels("nonsense").Match(node) {
		t.Error("no condition means all nodes, an unreadable one none")
	}
	if (Labels("k=1")).Match(map[string]string{"K": "2", "k": "1"}) != true || Labels("k=1").Match(map[string]string{"kK": "1"}) {
		t.Error("the label as it is written counts first")
	}
	for in, want := range map[string]string{
		"": "neither key=value", "zone": "neither key=value", "=a": "names no label", "!=a": "names no label",
		"a=b=c": "more than one", "a!!=b": "more than one", "node.role=manager": "no label of a node", "engine.labels.os=x": "no label of a node",
		"zone=" + strings.Repeat("a", 250): "is longer than 255 bytes",
		"zone=a;zone=b":                    `is to be both "a" and "b"`, "zone!=a;zone=a": `is to be "a" and not to be`,
	} {
		if got, err := ParseLabels(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %q, %v; want an error with %q", in, got, err, want)
		}
	}
}

// FuzzPublish: what is taken reads back as itself, and what is refused leaves
// nothing.
func FuzzPublish(f *testing.F) {
	for _, s := range []string{"80", "81:80/tcp", "1-5/udp;7", "x", "10.0.0.0/8;192.0.2.1", "zone=a;disk!=slow", "node.labels.a==b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		again(t, s, ParsePublished)
		again(t, s, ParseAddrs)
		again(t, s, ParsePrefixes)
		again(t, s, ParseLabels)
		if p, err := ParsePublished(s); err == nil && len(p.List()) == 0 {
			t.Fatalf("%q is no ports", s)
		}
		_, _, _ = Published(s).List(), Addrs(s).List(), Prefixes(s).List()
		_, _ = Labels(s).Keys(), Labels(s).Match(map[string]string{"zone": "a"})
	})
}

func again[T ~string](t *testing.T, s string, parse func(string) (T, error)) {
	got, err := parse(s)
	switch {
	case err != nil && got != "":
		t.Fatalf("%q: refused, and yet %q", s, got)
	case err != nil || got == "":
		return
	}
	if twice, err := parse(string(got)); err != nil || twice != got {
		t.Fatalf("%q gives %q, which gives %q, %v", s, got, twice, err)
	}
}
