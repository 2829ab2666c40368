package linux

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// FuzzParseRoutes: what a netlink message tells of rules, routes and devices holds
// together, or it is not read.
func FuzzParseRoutes(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, 64))
	f.Add(append(append(make([]byte, ruleAction), actToTable), make([]byte, 64)...))
	f.Add(append([]byte{unix.AF_INET, 33, 0, 0, 254, 3, 0, unix.RTN_UNICAST, 0, 0, 0, 0}, 8, 0, unix.RTA_DST, 0, 10, 0, 0, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, ok := parseRule(b); ok && r.addr.IsValid() && r.addr.Is4() {
			if addrOf(tableOf(r.addr)) != r.addr {
				t.Errorf("%x: rule of %s", b, r.addr)
			}
		}
		if p, ok := parseDestination(b); ok && (p.Bits() < 0 || p != p.Masked()) {
			t.Errorf("%x: destination %s", b, p)
		}
		var d device
		parseVXLAN(&d, b)
		parseIPIP(&d, b)
		if d, ok := parseLink(b); ok {
			incompatible(d, kernel.Link{NS: "sluice-a", Name: "vxlan0", Kind: kernel.VXLAN}, kernel.LinkSpec{VNI: 7, Port: 4799})
		}
	})
}

// FuzzMountinfo reads lines of mountinfo.
func FuzzMountinfo(f *testing.F) {
	f.Add("36 35 98:0 /root /point rw,noatime shared:1 master:2 - ext3 /dev/root rw")
	f.Add(`1 2 0:3 / /a\040b rw - tmpfs x`)
	f.Add("1 2 3 4 5 6 7")
	f.Fuzz(func(t *testing.T, line string) {
		point, _, ok := parseMount(line)
		if ok && (point == "" || len(strings.Fields(line)) < 7) {
			t.Errorf("%q is mounted at %q", line, point)
		}
		covers(point, line)
		for c := range strings.Lines(line) {
			parseAccept(c)
			parseJump(c)
			jumpsOf(ownRules([]string{c}, c))
		}
	})
}
