package driver_test

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"

	"sluice/driver"
	"sluice/internal/model"
)

func book(t *testing.T, j *journal) *driver.Book {
	t.Helper()
	b, err := driver.NewBook(j, j.list())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestABookRemembers(t *testing.T) {
	j := newJournal()
	b := book(t, j)
	given, err := b.VNI(t.Context(), web, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.VNI(t.Context(), "chosen", 77); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*driver.Book{"now": b, "after a restart": book(t, j)} {
		if again, err := b.VNI(t.Context(), web, 0); err != nil || again != given {
			t.Errorf("%s: %d, then %d, %v", name, given, again, err)
		}
		_, err := b.VNI(t.Context(), "third", 77)
		complains(t, err, "VNI 77 is in use by network chosen", "sluice.vni")
	}
	if err := b.Free(t.Context(), "chosen"); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*driver.Book{"now": b, "after a restart": book(t, j)} {
		if got, err := b.VNI(t.Context(), "third", 77); err != nil || got != 77 {
			t.Errorf("%s: a freed VNI: %d, %v", name, got, err)
		}
	}
}

func TestAWishReplacesWhatANetworkHad(t *testing.T) {
	j := newJournal()
	b := book(t, j)
	had, err := b.VNI(t.Context(), web, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.VNI(t.Context(), web, 77); err != nil || got != 77 {
		t.Fatalf("got %d, %v", got, err)
	}
	for name, b := range map[string]*driver.Book{"now": b, "after a restart": book(t, j)} {
		if got, err := b.VNI(t.Context(), "another", had); err != nil || got != had {
			t.Errorf("%s: the former one is not free: %d, %v", name, got, err)
		}
	}
}

func TestABookThatCannotBeWrittenPromisesNothing(t *testing.T) {
	j := newJournal()
	b := book(t, j)
	j.fail = errDisk
	_, err := b.VNI(t.Context(), web, 77)
	complains(t, err, "record the VNI of network webnetwork00", errDisk.Error())
	j.fail = nil
	if got, err := b.VNI(t.Context(), "another", 77); err != nil || got != 77 {
		t.Errorf("it is taken by the one that failed: %d, %v", got, err)
	}
	j.fail = errDisk
	complains(t, b.Free(t.Context(), "another"), errDisk.Error())
	j.fail = nil
	if _, err := b.VNI(t.Context(), web, 77); err == nil {
		t.Error("it is free although that was not recorded")
	}
}

func TestADamagedBookIsReported(t *testing.T) {
	for _, value := range []string{"", "x", "-1", "16777216"} {
		if _, err := driver.NewBook(nil, []model.Record{{Kind: "vni", Key: "web", Value: []byte(value)}}); err == nil {
			t.Errorf("%q: no error", value)
		}
	}
	if _, err := driver.NewBook(nil, []model.Record{{Kind: "lease", Key: "web", Value: []byte("x")}}); err != nil {
		t.Error(err)
	}
}

// TestNoVNITwice, whatever is asked for and freed, and over restarts.
func TestNoVNITwice(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		j := newJournal()
		b := book(t, j)
		has := map[model.NetworkID]model.VNI{}
		for range rapid.IntRange(1, 30).Draw(rt, "calls") {
			id := model.NetworkID(fmt.Sprint("net", rapid.IntRange(0, 5).Draw(rt, "network")))
			switch rapid.IntRange(0, 3).Draw(rt, "call") {
			case 0:
				if err := b.Free(rt.Context(), id); err != nil {
					rt.Fatal(err)
				}
				delete(has, id)
			case 1:
				b = book(t, j)
			default:
				wish := model.VNI(rapid.SampledFrom([]uint32{0, 0, 1, 2, uint32(model.MaxVNI)}).Draw(rt, "wish"))
				v, err := b.VNI(rt.Context(), id, wish)
				if err != nil {
					continue
				}
				if v == 0 || v > model.MaxVNI || wish != 0 && v != wish {
					rt.Fatalf("%s wished %d and got %d", id, wish, v)
				}
				has[id] = v
			}
			seen := map[model.VNI]model.NetworkID{}
			for id, v := range has {
				if other, twice := seen[v]; twice {
					rt.Fatalf("VNI %d for %s and %s", v, id, other)
				}
				seen[v] = id
			}
		}
	})
}
