package model

import (
	"strings"
	"testing"
)

// What people write as filters and addresses is read or refused, and what was read
// is written the same again.
func FuzzFilters(f *testing.F) {
	for _, s := range []string{
		"192.0.2.1;192.0.2.2", "10.0.0.0/8;192.0.2.1", "zone=a;disk!=slow", "node.labels.x==y", "", ";", "::1", "0.0.0.0", "0.0.0.0/0", "a=b;a!=b", "=", " 10.0.0.1 ",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if as, err := ParseAddrs(s); err == nil && as != "" { // all addresses
			if again, err := ParseAddrs(string(as)); err != nil || again != as {
				t.Errorf("%q is %q, which is %q, %v", s, as, again, err)
			}
			for _, a := range as.List() {
				if !a.Is4() {
					t.Errorf("%q has %s", s, a)
				}
			}
		}
		if ps, err := ParsePrefixes(s); err == nil && ps != "" { // from everywhere
			if again, err := ParsePrefixes(string(ps)); err != nil || again != ps {
				t.Errorf("%q is %q, which is %q, %v", s, ps, again, err)
			}
		}
		if ls, err := ParseLabels(s); err == nil {
			if again, err := ParseLabels(string(ls)); err != nil || again != ls {
				t.Errorf("%q is %q, which is %q, %v", s, ls, again, err)
			}
		}
		// Filters come from other nodes too, unread.
		Addrs(s).List()
		Labels(s).Match(map[string]string{"zone": "a", "": s})
	})
}

func FuzzMAC(f *testing.F) {
	for _, s := range []string{"02:42:0a:ff:00:02", "02-42-0A-FF-00-02", "", "00:00:00:00:00:00", "02:42:0a:ff:00:02:00:00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		m, err := ParseMAC(s)
		if err != nil {
			return
		}
		if again, err := ParseMAC(m.String()); err != nil || again != m {
			t.Errorf("%q is %s, which is %s, %v", s, m, again, err)
		}
		if !strings.Contains(m.String(), ":") {
			t.Errorf("%q prints as %q", s, m)
		}
	})
}
