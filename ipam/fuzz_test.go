package ipam

import (
	"context"
	"encoding/json"
	"testing"
)

// single is a journal of one record.
type single struct{ Record }

func (o single) Load(context.Context) ([]Record, error)            { return []Record{o.Record}, nil }
func (single) Commit(context.Context, []Record, []RecordKey) error { return nil }

// A record that cannot be read keeps the allocator from starting; it never makes it
// panic, nor leaves it with what does not fit together.
func FuzzRecord(f *testing.F) {
	f.Add(KindPool, "sluice-global/10.255.0.0/20", []byte(`{"format":1,"owner":"n","gateway":"10.255.0.1","epoch":1,"cursor":"10.255.0.9"}`))
	f.Add(KindPool, "sluice-global/10.255.0.0/20/10.255.0.128/25", []byte(`{"format":1,"gateway":"1.2.3.4"}`))
	f.Add(KindLease, "sluice-global/10.255.0.0/20@10.255.0.2", []byte(`{"format":1,"epoch":1}`))
	f.Add(KindLast, "sluice-global/default", []byte(`{"format":1,"subnet":"10.255.0.0/20"}`))
	f.Add(KindLast, "sluice-global/default", []byte(`{"format":1,"subnet":"::/0"}`))
	f.Fuzz(func(t *testing.T, kind, key string, value []byte) {
		for _, scope := range []Scope{ScopeGlobal, ScopeLocal} {
			a, err := Open(t.Context(), Config{Scope: scope, Journal: single{Record{Kind: kind, Key: key, Value: value}}})
			if err != nil {
				continue
			}
			for _, p := range a.Snapshot() {
				a.Leases(p.ID)
				if _, err := json.Marshal(p); err != nil {
					t.Error(err)
				}
			}
			// Whatever is in it, a pool can be asked for; an error is an answer.
			r, err := a.RequestPool(t.Context(), PoolRequest{Space: a.space})
			if err == nil {
				_, err = a.RequestAddress(t.Context(), AddressRequest{PoolID: r.PoolID})
			}
			if err != nil {
				t.Logf("%v", err)
			}
		}
	})
}

// FuzzRequest sends any texts to the verbs: they are answered, and an address that is
// given is of its pool.
func FuzzRequest(f *testing.F) {
	f.Add(GlobalSpace, "10.255.0.0/20", "10.255.0.128/25", "10.255.0.200", false)
	f.Add(LocalSpace, "", "", "", false)
	f.Add("", "::/64", "", "::1", true)
	f.Add(GlobalSpace, "0.0.0.0/0", "10.0.0.0/33", "256.1.1.1", false)
	f.Fuzz(func(t *testing.T, space, subnet, sub, addr string, v6 bool) {
		a, err := Open(t.Context(), Config{Journal: single{}})
		if err != nil {
			t.Fatal(err)
		}
		id := space + "/" + subnet
		if r, err := a.RequestPool(t.Context(), PoolRequest{Space: space, Pool: subnet, SubPool: sub, V6: v6}); err == nil {
			id = r.PoolID
		}
		r, err := a.RequestAddress(t.Context(), AddressRequest{PoolID: id, Address: addr})
		if err == nil && !r.Address.IsValid() {
			t.Errorf("gave %v", r)
		}
		for _, err := range []error{
			a.ReleaseAddress(t.Context(), ReleaseAddressRequest{PoolID: id, Address: addr}),
			a.ReleasePool(t.Context(), ReleasePoolRequest{PoolID: id}),
		} {
			if err != nil && err.Error() == "" {
				t.Error("an error without a text")
			}
		}
	})
}
