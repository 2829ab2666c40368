package driver_test

import (
	"testing"

	"sluice/driver"
	"sluice/internal/keyring"
	"sluice/internal/model"
)

// FuzzStored reads any record as a VNI and as a gossip key.
func FuzzStored(f *testing.F) {
	f.Add("vni", "n", []byte("1048576"))
	f.Add("vni", "n", []byte("16777216"))
	f.Add("vni", "", []byte("0"))
	f.Add("gossip-key", "", []byte{})
	f.Add("gossip-key", "x", make([]byte, 32))
	f.Fuzz(func(t *testing.T, kind, key string, value []byte) {
		records := []model.Record{{Kind: kind, Key: key, Value: value}}
		if b, err := driver.NewBook(newJournal(), records); err == nil {
			if v, err := b.VNI(t.Context(), "new", 0); err != nil || v > model.MaxVNI || v == 0 {
				t.Errorf("%q: VNI %d, %v", value, v, err)
			}
		}
		r := keyring.New(newJournal(), records, nil, nil)
		k, err := r.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		switch len(k) {
		case 16, 24, 32: // what gossip takes
		default:
			t.Errorf("a key of %d bytes is sent with", len(k))
		}
	})
}
