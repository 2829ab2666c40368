package ipam

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// Journal keeps the state of the address space over restarts.
type Journal interface {
	// Load returns all records of the kinds below, in any order. Records of other
	// kinds are passed over.
	Load(ctx context.Context) ([]Record, error)
	// Commit makes all puts and deletes durable. After an error none of them is, but
	// that a process which ends at once may leave all of them. It has returned before
	// the next one is called. A delete of what is not there is no error; no key is both
	// put and deleted.
	Commit(ctx context.Context, puts []Record, deletes []RecordKey) error
}

// Record is one entry of the journal; its Value is JSON.
type Record = model.Record

// RecordKey names a Record.
type RecordKey = model.RecordKey

// Kinds of records and their keys.
const (
	KindPool  = "ipam.pool"  // PoolID
	KindLease = "ipam.lease" // space/cidr@address
	KindLast  = "ipam.last"  // space/name of the list
)

// format is the version of the values. A value of another version stops Open.
const format = 1

type poolValue struct {
	Format  int             `json:"format"`
	Owner   model.NetworkID `json:"owner,omitempty"`
	Gateway netip.Addr      `json:"gateway,omitzero"`
	Epoch   uint64          `json:"epoch"`
	Cursor  netip.Addr      `json:"cursor,omitzero"`
	Settled bool            `json:"settled,omitempty"`
}

type leaseValue struct {
	Format int    `json:"format"`
	Epoch  uint64 `json:"epoch"`
}

type lastValue struct {
	Format int          `json:"format"`
	Subnet netip.Prefix `json:"subnet"`
}

// recordsLocked turns a change of the table into what the journal has to do.
func (a *Allocator) recordsLocked(c pool.Change) (puts []Record, deletes []RecordKey, err error) {
	put := func(kind, key string, value any) {
		b, e := json.Marshal(value)
		if e != nil && err == nil {
			err = fmt.Errorf("encode %s %s: %w", kind, key, e)
		}
		puts = append(puts, Record{Kind: kind, Key: key, Value: b})
	}
	for _, id := range c.DropPools {
		deletes = append(deletes, RecordKey{Kind: KindPool, Key: id.String()})
		for _, l := range a.table.Leases(id) {
			if !l.Gateway { // which is part of the pool's record
				deletes = append(deletes, RecordKey{Kind: KindLease, Key: a.leaseKey(id.Subnet, l.Address)})
			}
		}
	}
	for _, l := range c.DropLeases {
		deletes = append(deletes, RecordKey{Kind: KindLease, Key: a.leaseKey(l.Subnet, l.Address)})
	}
	for _, p := range c.Pools {
		put(KindPool, p.ID.String(), poolValue{format, p.Owner, p.Gateway, p.Epoch, p.Cursor, p.Settled})
	}
	for _, l := range c.Leases {
		put(KindLease, a.leaseKey(l.Subnet, l.Address), leaseValue{format, l.Epoch})
	}
	for _, l := range c.Last {
		put(KindLast, a.space+"/"+l.List, lastValue{format, l.Subnet})
	}
	return puts, deletes, err
}

func (a *Allocator) leaseKey(subnet netip.Prefix, addr netip.Addr) string {
	return a.space + "/" + subnet.String() + "@" + addr.String()
}

// restore fills a table with the records of its space. Those of the other space
// are left where they are: the plugin was run with another Scope before.
func restore(t *pool.Table, space string, records []Record) error {
	var pools []pool.PoolRecord
	var leases []pool.LeaseRecord
	var last []pool.LastRecord
	for _, r := range records {
		key, mine := strings.CutPrefix(r.Key, space+"/")
		if !mine {
			continue
		}
		var err error
		switch r.Kind {
		case KindPool:
			var p pool.PoolRecord
			if p, err = decodePool(r); err == nil {
				pools = append(pools, p)
			}
		case KindLease:
			var l pool.LeaseRecord
			if l, err = decodeLease(key, r.Value); err == nil {
				leases = append(leases, l)
			}
		case KindLast:
			var v lastValue
			if err = decode(r.Value, &v, &v.Format); err == nil {
				last = append(last, pool.LastRecord{List: key, Subnet: v.Subnet})
			}
		}
		if err != nil {
			return fmt.Errorf("record %s %s: %w", r.Kind, r.Key, err)
		}
	}
	return pool.Restore(t, pools, leases, last)
}

func decodePool(r Record) (pool.PoolRecord, error) {
	id, err := pool.ParseID(r.Key)
	if err != nil {
		return pool.PoolRecord{}, err
	}
	var v poolValue
	if err := decode(r.Value, &v, &v.Format); err != nil {
		return pool.PoolRecord{}, err
	}
	return pool.PoolRecord{ID: id, Owner: v.Owner, Gateway: v.Gateway, Epoch: v.Epoch, Cursor: v.Cursor, Settled: v.Settled}, nil
}

func decodeLease(key string, value []byte) (pool.LeaseRecord, error) {
	cidr, addr, ok := strings.Cut(key, "@")
	if !ok {
		return pool.LeaseRecord{}, fmt.Errorf("key has no address")
	}
	var l pool.LeaseRecord
	var err error
	if l.Subnet, err = netip.ParsePrefix(cidr); err != nil {
		return pool.LeaseRecord{}, err
	}
	if l.Address, err = netip.ParseAddr(addr); err != nil {
		return pool.LeaseRecord{}, err
	}
	var v leaseValue
	if err := decode(value, &v, &v.Format); err != nil {
		return pool.LeaseRecord{}, err
	}
	l.Epoch = v.Epoch
	return l, nil
}

// decode reads a value and looks at its version.
func decode(value []byte, into any, version *int) error {
	if err := json.Unmarshal(value, into); err != nil {
		return err
	}
	if *version != format {
		return fmt.Errorf("format %d, this version of sluice reads %d", *version, format)
	}
	return nil
}
