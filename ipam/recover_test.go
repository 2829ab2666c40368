package ipam

import (
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"sluice/ipam/pool"
)

// TestWhatALostPoolCouldMisleadWaits: between the start of a process without records
// and the managers' lists, no subnet is chosen, and an address is not refused.
func TestWhatALostPoolCouldMisleadWaits(t *testing.T) {
	for _, tt := range []struct {
		name    string
		blank   bool
		scope   Scope
		after   time.Duration // until the pools are there; negative: never
		waited  time.Duration
		refused bool
	}{
		{"they come", true, ScopeGlobal, recoverWait / 2, recoverWait / 2, false},
		{"they do not come", true, ScopeGlobal, -1, recoverWait, true},
		{"nothing was lost", false, ScopeGlobal, -1, 0, true},
		{"networks of this engine only", true, ScopeLocal, -1, 0, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, err := Open(t.Context(), Config{Scope: tt.scope, Blank: tt.blank, Journal: newJournal(t)})
				if err != nil {
					t.Fatal(err)
				}
				lost := netip.MustParsePrefix("10.255.0.0/20") // the first that would be chosen
				if tt.after >= 0 {
					time.AfterFunc(tt.after, func() {
						if err := a.Recover(t.Context(), pool.Lost{Network: "web", Subnet: lost, Live: []netip.Addr{netip.MustParseAddr("10.255.0.2")}}); err != nil {
							t.Error(err)
						}
						a.Recovered()
						a.Recovered()
					})
				}
				begun := time.Now()
				got, err := a.RequestAddress(t.Context(), AddressRequest{PoolID: a.space + "/10.255.0.0/20"})
				if took := time.Since(begun); took != tt.waited {
					t.Errorf("the address waited %v, want %v", took, tt.waited)
				}
				switch {
				case tt.refused && !errors.Is(err, pool.ErrUnknownPool):
					t.Errorf("an address of an unknown pool: %v, %v", got, err)
				case !tt.refused && (err != nil || got.Address != netip.MustParsePrefix("10.255.0.3/20")):
					t.Errorf("the address is %v, %v", got, err)
				}
				begun = time.Now()
				p, err := a.RequestPool(t.Context(), PoolRequest{Space: a.space})
				switch never := tt.waited == recoverWait; {
				case never != errors.Is(err, pool.ErrInvalid):
					t.Errorf("the next network has %v, %v", p, err)
				case !tt.refused && p.Pool.Overlaps(lost):
					t.Errorf("the next network has %v, which is in use", p)
				}
				if took := time.Since(begun); took != 0 && tt.waited < recoverWait {
					t.Errorf("the pool waited %v", took)
				}
				synctest.Wait()
				time.Sleep(2 * recoverWait) // of the bubble: what was to come has
			})
		})
	}
}

func TestAPoolThatCannotBeRecordedDoesNotComeBack(t *testing.T) {
	j := newJournal(t)
	j.fault = true
	a, err := Open(t.Context(), Config{Blank: true, Journal: j})
	if err != nil {
		t.Fatal(err)
	}
	l := pool.Lost{Network: "web", Subnet: netip.MustParsePrefix("10.255.0.0/20")}
	if err := a.Recover(t.Context(), l); !errors.Is(err, errFault) || len(a.Snapshot()) > 0 {
		t.Errorf("%v, %v", err, a.Snapshot())
	}
	if err := a.Recover(t.Context(), l); err != nil || len(a.Snapshot()) != 1 {
		t.Errorf("%v, %v", err, a.Snapshot())
	}
}
