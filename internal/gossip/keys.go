package gossip

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"

	"github.com/hashicorp/memberlist"
)

// keyring is memberlist's keyring with the order that makes all nodes choose the
// same primary key: by SHA-256, lowest first.
type keyring struct {
	mu   sync.Mutex // serialises changes; readers use memberlist's own lock
	ring *memberlist.Keyring
}

func newKeyring(keys [][]byte) (*keyring, error) {
	keys, err := sortKeys(keys)
	if err != nil {
		return nil, err
	}
	ring, err := memberlist.NewKeyring(keys, keys[0])
	if err != nil {
		return nil, fmt.Errorf("make gossip keyring: %w", err)
	}
	return &keyring{ring: ring}, nil
}

// sortKeys validates, copies, orders and deduplicates keys.
func sortKeys(keys [][]byte) ([][]byte, error) {
	if len(keys) == 0 {
		return nil, ErrNoKey
	}
	sorted := make([][]byte, len(keys))
	for i, k := range keys {
		if memberlist.ValidateKey(k) != nil {
			return nil, fmt.Errorf("gossip key %d of %d has %d bytes: want 16, 24 or 32", i+1, len(keys), len(k))
		}
		sorted[i] = bytes.Clone(k)
	}
	slices.SortFunc(sorted, func(a, b []byte) int {
		ha, hb := sha256.Sum256(a), sha256.Sum256(b)
		return bytes.Compare(ha[:], hb[:])
	})
	return slices.CompactFunc(sorted, bytes.Equal), nil
}

// add makes the ring hold key too.
func (k *keyring) add(key []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.setLocked(append(slices.Clone(k.ring.GetKeys()), key))
}

// set makes the ring hold exactly keys.
func (k *keyring) set(keys [][]byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.setLocked(keys)
}

// setLocked changes memberlist's ring in the only order that is safe.
//
// memberlist's RemoveKey shifts a slice that its readers may be walking
// unlocked. Removing the last key shifts nothing: so the keys to stay are first
// brought to the front, the primary last and thus foremost, and the others are
// then taken from the end.
func (k *keyring) setLocked(keys [][]byte) error {
	keep, err := sortKeys(keys)
	if err != nil {
		return err
	}
	for _, key := range keep {
		if err := k.ring.AddKey(key); err != nil {
			return fmt.Errorf("add gossip key: %w", err)
		}
	}
	for _, key := range slices.Backward(keep) {
		if err := k.ring.UseKey(key); err != nil {
			return fmt.Errorf("choose primary gossip key: %w", err)
		}
	}
	for all := k.ring.GetKeys(); len(all) > len(keep); all = k.ring.GetKeys() {
		if err := k.ring.RemoveKey(all[len(all)-1]); err != nil {
			return fmt.Errorf("remove gossip key: %w", err)
		}
	}
	return nil
}

// ids names the keys, the primary first, without telling them: the start of a
// hash that is used for nothing else.
func (k *keyring) ids() []string {
	keys := k.ring.GetKeys()
	ids := make([]string, len(keys))
	for i, key := range keys {
		sum := sha256.Sum256(append([]byte("sluice gossip key id\x00"), key...))
		ids[i] = hex.EncodeToString(sum[:4])
	}
	return ids
}
