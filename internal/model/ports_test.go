package model

import (
	"slices"
	"strings"
	"testing"
)

func TestPortsAreRead(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Ports
		list []PortMap
	}{
		{"80", "80/tcp", []PortMap{{TCP, 80, 80}}},
		{"81:80/tcp", "81:80/tcp", []PortMap{{TCP, 81, 80}}},
		{" 53/UDP ; 53/tcp;53/udp", "53/tcp;53/udp", []PortMap{{TCP, 53, 53}, {UDP, 53, 53}}},
		{"5000-5002:6000-6002/sctp", "5000:6000/sctp;5001:6001/sctp;5002:6002/sctp",
			[]PortMap{{SCTP, 5000, 6000}, {SCTP, 5001, 6001}, {SCTP, 5002, 6002}}},
		{"443;80", "80/tcp;443/tcp", []PortMap{{TCP, 80, 80}, {TCP, 443, 443}}},
	} {
		got, err := ParsePorts(c.in)
		if err != nil || got != c.want || !slices.Equal(got.List(), c.list) {
			t.Errorf("%q: got %q, %v, %v; want %q, %v", c.in, got, got.List(), err, c.want, c.list)
		}
		if again, err := ParsePorts(string(got)); err != nil || again != got {
			t.Errorf("%q reads back as %q, %v", got, again, err)
		}
	}
}

func TestPortsAreRefused(t *testing.T) {
	for in, want := range map[string]string{
		"":                `"" is no port`,
		"0":               `"0" is no port`,
		"65536":           `"65536" is no port`,
		"80/icmp":         `protocol "icmp" is none of tcp, udp, sctp`,
		"80/":             `protocol "" is none of tcp, udp, sctp`,
		"90-80":           `range 90-80 ends before it begins`,
		"80-81:90":        `2 ports lead to 1`,
		"80;80:81":        `port 80/tcp leads to both 80 and 81`,
		"1-33":            `more than 32 ports`,
		"1-20;101-120":    `more than 32 ports`,
		"80:81:82":        `"81:82" is no port`,
		"80;;81":          `"" is no port`,
		"1-65535:1-65535": `more than 32 ports`,
	} {
		if got, err := ParsePorts(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %q, %v; want an error with %q", in, got, err, want)
		}
	}
}

func FuzzPorts(f *testing.F) {
	for _, s := range []string{"80", "81:80/tcp", "1-5/udp;7", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePorts(s)
		if err != nil {
			if p != "" {
				t.Fatalf("%q: refused, and yet %q", s, p)
			}
			return
		}
		again, err := ParsePorts(string(p))
		if err != nil || again != p || len(p.List()) == 0 {
			t.Fatalf("%q gives %q, which gives %q, %v", s, p, again, err)
		}
		_ = Ports(s).List()
	})
}
