package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sluice/internal/keyring"
	"sluice/internal/model"
)

// journal is a store in memory that fails on demand.
type journal struct {
	mu      sync.Mutex
	records []model.Record
	fail    error
}

func (j *journal) Commit(_ context.Context, puts []model.Record, dels []model.RecordKey) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.fail != nil {
		return j.fail
	}
	j.records = append(j.records, puts...)
	j.records = slices.DeleteFunc(j.records, func(r model.Record) bool {
		return slices.Contains(dels, model.RecordKey{Kind: r.Kind, Key: r.Key})
	})
	return nil
}

func key(b byte) []byte { return bytes.Repeat([]byte{b}, keyring.Size) }

func equal(a, b [][]byte) bool { return slices.EqualFunc(a, b, bytes.Equal) }

func TestTheFirstKeyIsMadeAndKept(t *testing.T) {
	j, changes := &journal{}, 0
	r := keyring.New(j, nil, nil, func() { changes++ })
	if n := len(r.Keys()); n != 0 {
		t.Fatalf("%d keys before the first network", n)
	}
	first, err := r.Current(t.Context())
	if err != nil || len(first) != keyring.Size || bytes.Equal(first, key(0)) {
		t.Fatalf("a key of %d bytes, %v", len(first), err)
	}
	if again, err := r.Current(t.Context()); err != nil || !bytes.Equal(first, again) {
		t.Errorf("another key: %v", err)
	}
	if changes != 1 {
		t.Errorf("told %d times", changes)
	}
	later := keyring.New(j, append(j.records, model.Record{Kind: "vni", Value: key(9)}), nil, nil)
	if !equal(later.Keys(), [][]byte{first}) {
		t.Error("a restart has lost it")
	}
	if other, err := keyring.New(&journal{}, nil, nil, nil).Current(t.Context()); err != nil || bytes.Equal(other, first) {
		t.Errorf("two swarms have the same key: %v", err)
	}
}

// TestAllNodesSendWithTheSameKey, whatever the order in which they learn of them.
func TestAllNodesSendWithTheSameKey(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := rapid.SliceOfNDistinct(rapid.Byte(), 1, 5, rapid.ID).Draw(t, "keys")
		j := &journal{}
		a, b := keyring.New(j, nil, nil, nil), keyring.New(&journal{}, nil, nil, nil)
		for _, k := range all {
			if err := a.Add(t.Context(), key(k)); err != nil {
				t.Fatal(err)
			}
		}
		for _, k := range rapid.Permutation(all).Draw(t, "order") {
			if err := errors.Join(b.Add(t.Context(), key(k)), b.Add(t.Context(), key(k))); err != nil {
				t.Fatal(err)
			}
		}
		if len(a.Keys()) != len(all) || !equal(a.Keys(), b.Keys()) {
			t.Fatalf("%x and %x", a.Keys(), b.Keys())
		}
		if later := keyring.New(j, j.records, nil, nil); !equal(a.Keys(), later.Keys()) {
			t.Fatalf("after a restart: %x, before: %x", later.Keys(), a.Keys())
		}
		if current, err := a.Current(t.Context()); err != nil || !bytes.Equal(current, a.Keys()[0]) {
			t.Fatalf("sends with %x, %v", current, err)
		}
	})
}

func TestAConfiguredKeyIsTheOnlyOne(t *testing.T) {
	j := &journal{}
	before := keyring.New(j, nil, nil, nil)
	if err := before.Add(t.Context(), key(1)); err != nil {
		t.Fatal(err)
	}
	r := keyring.New(j, j.records, key(2), func() { t.Error("told of a change") })
	for _, k := range []byte{1, 3, 4, 5, 6} { // some of which have a smaller hash
		if err := r.Add(t.Context(), key(k)); err != nil {
			t.Fatal(err)
		}
	}
	if current, err := r.Current(t.Context()); err != nil || !bytes.Equal(current, key(2)) || !equal(r.Keys(), [][]byte{key(2)}) {
		t.Errorf("sends with %x of %x, %v", current, r.Keys(), err)
	}
	if len(j.records) != 1 {
		t.Errorf("%d records", len(j.records))
	}
}

// TestANewKeyThatCannotBeRecordedIsNotUsed: a restart would have another.
func TestANewKeyThatCannotBeRecordedIsNotUsed(t *testing.T) {
	disk := errors.New("no space left on device")
	j := &journal{fail: disk}
	r := keyring.New(j, nil, nil, func() { t.Error("told of a change") })
	if k, err := r.Current(t.Context()); !errors.Is(err, disk) || k != nil {
		t.Errorf("Current: %v", err)
	}
	if n := len(r.Keys()); n != 0 {
		t.Errorf("%d keys", n)
	}
}

// TestTheSwarmsKeyIsUsedWhileItCannotBeRecorded: the others use it already, and
// whoever brought it brings it again.
func TestTheSwarmsKeyIsUsedWhileItCannotBeRecorded(t *testing.T) {
	disk := errors.New("no space left on device")
	j, changes := &journal{fail: disk}, 0
	r := keyring.New(j, nil, nil, func() { changes++ })
	for range 2 {
		if err := r.Add(t.Context(), key(1)); !errors.Is(err, disk) {
			t.Errorf("Add: %v", err)
		}
	}
	if !equal(r.Keys(), [][]byte{key(1)}) || changes != 1 {
		t.Errorf("%d keys, told %d times", len(r.Keys()), changes)
	}
	j.fail = nil
	if err := r.Add(t.Context(), key(1)); err != nil || len(j.records) != 1 || changes != 1 {
		t.Errorf("%v; %d records, told %d times", err, len(j.records), changes)
	}
}

// TestTheCallersKeyIsItsOwn: what is in the ring does not change from outside.
func TestTheCallersKeyIsItsOwn(t *testing.T) {
	j := &journal{}
	r := keyring.New(j, nil, nil, nil)
	mine := key(1)
	if err := r.Add(t.Context(), mine); err != nil {
		t.Fatal(err)
	}
	clear(mine)
	if !equal(r.Keys(), [][]byte{key(1)}) || !bytes.Equal(j.records[0].Value, key(1)) {
		t.Error("the ring follows the caller's bytes")
	}
	r.Keys()[0] = nil
	if !equal(r.Keys(), [][]byte{key(1)}) {
		t.Error("the ring follows its own answer")
	}
}

func TestConcurrentUseMakesOneKey(t *testing.T) {
	r := keyring.New(&journal{}, nil, nil, func() {})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := r.Current(t.Context()); err != nil {
				t.Error(err)
			}
			r.Keys()
		})
	}
	wg.Wait()
	if n := len(r.Keys()); n != 1 {
		t.Errorf("%d keys", n)
	}
}

// TestKeysOfAFormerSwarmAreForgotten, on disk too, and what is newer is not.
func TestKeysOfAFormerSwarmAreForgotten(t *testing.T) {
	j := &journal{}
	former := keyring.New(j, nil, nil, nil)
	if err := former.Add(t.Context(), key(1)); err != nil {
		t.Fatal(err)
	}
	r := keyring.New(j, slices.Clone(j.records), nil, nil) // key 1 is of a former life
	began := time.Now()
	if err := r.Add(t.Context(), key(2)); err != nil {
		t.Fatal(err)
	}
	j.fail = errors.New("no space left on device")
	if err := r.ForgetBefore(t.Context(), began); !errors.Is(err, j.fail) || len(r.Keys()) != 2 {
		t.Errorf("not on disk, and yet forgotten: %v", err)
	}
	j.fail = nil
	if err := r.ForgetBefore(t.Context(), began); err != nil || !equal(r.Keys(), [][]byte{key(2)}) {
		t.Errorf("%d keys, %v", len(r.Keys()), err)
	}
	if later := keyring.New(j, j.records, nil, nil); !equal(later.Keys(), [][]byte{key(2)}) {
		t.Error("a restart brings it back")
	}
	if err := r.ForgetBefore(t.Context(), time.Now().Add(time.Hour)); err != nil || len(r.Keys()) != 0 {
		t.Errorf("%d keys, %v", len(r.Keys()), err)
	}
	fixed := keyring.New(j, nil, key(3), nil)
	if err := fixed.ForgetBefore(t.Context(), time.Now().Add(time.Hour)); err != nil || len(fixed.Keys()) != 1 {
		t.Error("a configured key was forgotten")
	}
}
