package options

import (
	"bytes"
	"strings"
	"testing"
)

// FuzzKey: a key is read or refused, and an error does not tell it.
func FuzzKey(f *testing.F) {
	for _, s := range []string{strings.Repeat("ab", 32), strings.Repeat("AB", 16), "", "xyz", strings.Repeat("0", 63)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		key, err := DecodeKey(s)
		if err != nil {
			if len(s) > 8 && strings.Contains(err.Error(), s) {
				t.Errorf("the error tells the key: %v", err)
			}
			return
		}
		if again, err := DecodeKey(EncodeKey(key)); err != nil || !bytes.Equal(again, key) {
			t.Errorf("%d bytes are read as others: %v", len(key), err)
		}
	})
}
