package ipam

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"sluice/ipam/pool"
)

var errFault = errors.New("disk full")

// fakeJournal keeps records as a store does: all of a commit or nothing. It
// counts commits, fails those it is told to, and holds its user to the contract.
type fakeJournal struct {
	t       testing.TB
	records map[RecordKey][]byte
	commits int
	fault   bool // the next commit fails
	loadErr error
}

func newJournal(t testing.TB) *fakeJournal {
	return &fakeJournal{t: t, records: map[RecordKey][]byte{}}
}

func (j *fakeJournal) Load(context.Context) ([]Record, error) {
	rs := []Record{{Kind: "store.network", Key: GlobalSpace + "/not ours", Value: []byte("x")}}
	for k, v := range j.records {
		rs = append(rs, Record{Kind: k.Kind, Key: k.Key, Value: slices.Clone(v)})
	}
	return rs, j.loadErr
}

func (j *fakeJournal) Commit(_ context.Context, puts []Record, deletes []RecordKey) error {
	if j.fault {
		j.fault = false
		return errFault
	}
	if len(puts)+len(deletes) == 0 {
		j.t.Error("commit of nothing")
	}
	j.commits++
	seen := map[RecordKey]bool{}
	once := func(k RecordKey) {
		if seen[k] {
			j.t.Errorf("%v twice in one commit", k)
		}
		seen[k] = true
	}
	for _, k := range deletes {
		once(k)
		delete(j.records, k)
	}
	for _, r := range puts {
		k := RecordKey{Kind: r.Kind, Key: r.Key}
		once(k)
		j.records[k] = r.Value
	}
	return nil
}

func (j *fakeJournal) clone() *fakeJournal {
	return &fakeJournal{t: j.t, records: maps.Clone(j.records)}
}

func open(t testing.TB, scope Scope, j Journal) *Allocator {
	t.Helper()
	a, err := Open(t.Context(), Config{Scope: scope, Journal: j})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestOpenRefusesAJournalItCannotTrust(t *testing.T) {
	const p = GlobalSpace + "/10.0.0.0/24"
	good := Record{Kind: KindPool, Key: p, Value: []byte(`{"format":1,"epoch":1,"gateway":"10.0.0.1"}`)}
	for _, tt := range []struct {
		name    string
		records []Record
		want    string
	}{
		{"good", []Record{good, {Kind: KindLease, Key: p + "@10.0.0.9", Value: []byte(`{"format":1,"epoch":1}`)}}, ""},
		{"the other space", []Record{{Kind: KindPool, Key: LocalSpace + "/10.0.0.0/24", Value: []byte("x")}}, ""},
		{"not JSON", []Record{{Kind: KindPool, Key: p, Value: []byte("x")}}, "record ipam.pool " + p},
		{"another format", []Record{{Kind: KindPool, Key: p, Value: []byte(`{"format":2}`)}}, "format 2, this version of sluice reads 1"},
		{"bad id", []Record{{Kind: KindPool, Key: GlobalSpace + "/10.0.0.1/24", Value: nil}}, "is not one of sluice's"},
		{"no epoch", []Record{{Kind: KindPool, Key: p, Value: []byte(`{"format":1}`)}}, "without an epoch"},
		{"overlap", []Record{good, {Kind: KindPool, Key: GlobalSpace + "/10.0.0.0/16", Value: []byte(`{"format":1,"epoch":1}`)}}, "overlaps"},
		{"gateway outside", []Record{{Kind: KindPool, Key: p, Value: []byte(`{"format":1,"epoch":1,"gateway":"10.0.1.1"}`)}}, "gateway 10.0.1.1 is outside"},
		{"gateway kept for nodes", []Record{{Kind: KindPool, Key: p, Value: []byte(`{"format":1,"epoch":1,"gateway":"10.0.0.250"}`)}}, "keeps for the nodes"},
		{"sub-pool without room", []Record{{Kind: KindPool, Key: p + "/10.0.0.240/28", Value: []byte(`{"format":1,"epoch":1}`)}}, "holds no address"},
		{"two pools of a network", []Record{
			{Kind: KindPool, Key: p, Value: []byte(`{"format":1,"epoch":1,"owner":"a"}`)},
			{Kind: KindPool, Key: GlobalSpace + "/10.0.1.0/24", Value: []byte(`{"format":1,"epoch":1,"owner":"a"}`)}}, "network a owns pool"},
		{"lease without a pool", []Record{{Kind: KindLease, Key: p + "@10.0.0.9", Value: []byte(`{"format":1,"epoch":1}`)}}, "no pool 10.0.0.0/24"},
		{"lease outside", []Record{good, {Kind: KindLease, Key: p + "@10.0.1.9", Value: []byte(`{"format":1,"epoch":1}`)}}, "no pool"},
		{"lease of the network address", []Record{good, {Kind: KindLease, Key: p + "@10.0.0.0", Value: []byte(`{"format":1,"epoch":1}`)}}, "network address"},
		{"lease of the gateway", []Record{good, {Kind: KindLease, Key: p + "@10.0.0.1", Value: []byte(`{"format":1,"epoch":1}`)}}, "it is the gateway"},
		{"lease key", []Record{{Kind: KindLease, Key: p, Value: []byte(`{"format":1}`)}}, "key has no address"},
		{"lease subnet", []Record{{Kind: KindLease, Key: GlobalSpace + "/x@10.0.0.1", Value: []byte(`{"format":1}`)}}, "record ipam.lease"},
		{"lease address", []Record{{Kind: KindLease, Key: p + "@x", Value: []byte(`{"format":1}`)}}, "record ipam.lease"},
		{"lease value", []Record{good, {Kind: KindLease, Key: p + "@10.0.0.9", Value: []byte(`{`)}}, "record ipam.lease"},
		{"last subnet", []Record{{Kind: KindLast, Key: GlobalSpace + "/", Value: []byte(`{"format":1,"subnet":"x"}`)}}, "record ipam.last"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := newJournal(t)
			for _, r := range tt.records {
				j.records[RecordKey{Kind: r.Kind, Key: r.Key}] = r.Value
			}
			_, err := Open(t.Context(), Config{Journal: j})
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("err = %v, want %q", err, tt.want)
			}
		})
	}
	j := newJournal(t)
	j.loadErr = errFault
	if _, err := Open(t.Context(), Config{Journal: j}); !errors.Is(err, errFault) {
		t.Errorf("unreadable journal: %v", err)
	}
	if _, err := Open(t.Context(), Config{Journal: newJournal(t), Bits: 31}); !errors.Is(err, pool.ErrInvalid) {
		t.Errorf("bad settings: %v", err)
	}
}
