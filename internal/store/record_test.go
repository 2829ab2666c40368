package store

import (
	"bytes"
	"testing"
)

// FuzzRecord reads any key and value: what is believed is what would be written.
func FuzzRecord(f *testing.F) {
	k := keyBytes(key("kind", "key"))
	f.Add(k, seal(k, []byte("value")))
	f.Add([]byte("no NUL"), []byte("short"))
	f.Add([]byte{0, 'k'}, []byte{})
	f.Add([]byte("a\x00b\x00c"), tally{1, 2}.bytes())
	f.Fuzz(func(t *testing.T, k, v []byte) {
		if key, ok := parseKey(k); ok && !bytes.Equal(keyBytes(key), k) {
			t.Errorf("key %q is read as %q", k, name(key))
		}
		if value, err := unseal(k, v); err == nil && !bytes.Equal(seal(k, value), v) {
			t.Errorf("value %q is read as %q", v, value)
		}
		if n, err := parseTally(v); err == nil && !bytes.Equal(n.bytes(), v) {
			t.Errorf("tally %q is read as %+v", v, n)
		}
	})
}
