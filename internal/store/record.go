package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"

	"sluice/internal/model"
)

// Limits of a record. A value is an intent written as JSON: the largest, a
// network with its options, stays below 64 KiB. The limits keep a mistake of
// a caller from filling the disk of the node, and keys far below bbolt's 32 KiB.
const (
	maxName  = 1 << 10
	maxValue = 1 << 20
)

func checkKey(k model.RecordKey) error {
	switch {
	case k.Kind == "" || k.Key == "":
		return fmt.Errorf("record %q: kind and key must not be empty", name(k))
	case strings.IndexByte(k.Kind, 0) >= 0:
		return fmt.Errorf("record %q: the kind holds a NUL byte", name(k))
	case len(k.Kind) > maxName || len(k.Key) > maxName:
		return fmt.Errorf("record %.80q: kind and key are limited to %d bytes each", name(k), maxName)
	}
	return nil
}

// name is for people: kind/key.
func name(k model.RecordKey) string { return k.Kind + "/" + k.Key }

// keyBytes is the key in the records bucket: kind, NUL, key. A kind holds no
// NUL, so no two names meet, and records of a kind lie side by side.
func keyBytes(k model.RecordKey) []byte {
	return append(append(append(make([]byte, 0, len(k.Kind)+1+len(k.Key)), k.Kind...), 0), k.Key...)
}

func parseKey(b []byte) (model.RecordKey, bool) {
	kind, key, ok := bytes.Cut(b, []byte{0})
	k := model.RecordKey{Kind: string(kind), Key: string(key)}
	return k, ok && checkKey(k) == nil
}

// A sealed value is its checksum, 8 bytes big-endian, and then the value.
const sealSize = 8

var errSeal = errors.New("checksum does not match")

// sum is FNV-1a (64 bit) over the bucket key's length, the key and the value.
// FNV is what bbolt seals its own meta pages with; for values of some hundred
// bytes it costs well under a microsecond, next to an fsync of 250.
func sum(key, value []byte) uint64 {
	h := fnv.New64a()
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(key)))
	for _, p := range [][]byte{n[:], key, value} {
		_, _ = h.Write(p) // a hash.Hash never returns an error
	}
	return h.Sum64()
}

func seal(key, value []byte) []byte {
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, sealSize+len(value)), sum(key, value)), value...)
}

// unseal gives a copy of the value: what bbolt hands out is its mapping of the
// file, valid during the transaction only.
func unseal(key, sealed []byte) ([]byte, error) {
	if len(sealed) < sealSize {
		return nil, fmt.Errorf("%d bytes, too short for a checksum: %w", len(sealed), errSeal)
	}
	value := sealed[sealSize:]
	if binary.BigEndian.Uint64(sealed) != sum(key, value) {
		return nil, errSeal
	}
	return bytes.Clone(value), nil
}

// tally is the seal of the whole set: how many records, and the sum (modulo
// 2^64) of their checksums. It is kept up to date by adding and subtracting.
type tally struct {
	count  uint64
	digest uint64
}

func (t *tally) add(key, value []byte)    { t.count++; t.digest += sum(key, value) }
func (t *tally) remove(key, value []byte) { t.count--; t.digest -= sum(key, value) }

func (t tally) bytes() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, t.count), t.digest)
}

func parseTally(b []byte) (tally, error) {
	if len(b) != 16 {
		return tally{}, fmt.Errorf("tally has %d bytes, want 16", len(b))
	}
	return tally{count: binary.BigEndian.Uint64(b), digest: binary.BigEndian.Uint64(b[8:])}, nil
}
