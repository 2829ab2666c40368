package main

import (
	"strings"
	"testing"
)

// FuzzConfig gives any value to any setting: what is wrong is named, without its
// value if that is a secret, and leaves the default in its place.
func FuzzConfig(f *testing.F) {
	for i, s := range settings {
		f.Add(uint8(i), s.value)
	}
	for _, v := range []string{"0", "65536", "10.0.0.0/8,10.0.0.0/9", ":9247", "[::1]:1", "off", "/", "../x", strings.Repeat("ab", 32), "debug"} {
		for i := range settings {
			f.Add(uint8(i), v)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, value string) {
		set := settings[int(which)%len(settings)]
		c, err := parseConfig(func(name string) string {
			if name == set.name {
				return value
			}
			return ""
		})
		if err != nil && !strings.Contains(err.Error(), set.name) {
			t.Errorf("%s=%q: the error does not name it: %v", set.name, value, err)
		}
		if v := strings.TrimSpace(value); err != nil && set.secret && len(v) > 8 && strings.Contains(err.Error(), v) {
			t.Errorf("%s: the error tells the secret: %v", set.name, err)
		}
		if c.VXLANPort == 0 || c.StateDir == "" || c.HostRun == "" || len(c.Pools) == 0 || !c.MeshPool.IsValid() {
			t.Errorf("%s=%q leaves %+v", set.name, value, c)
		}
		describeConfig(func(string) string { return value })
	})
}
