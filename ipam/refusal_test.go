package ipam

import (
	"errors"
	"strings"
	"testing"

	"sluice/ipam/pool"
)

// Every bad input is refused with what was asked, what is wrong and what to do,
// and leaves no trace in table or journal.
func TestBadInput(t *testing.T) {
	const p = GlobalSpace + "/10.60.0.0/24"
	gateway := map[string]string{"RequestAddressType": "com.docker.network.gateway"}
	for _, tt := range []struct {
		name string
		call any
		kind error
		want string
	}{
		{"empty pool request", PoolRequest{}, pool.ErrInvalid, `unknown address space ""; there are sluice-local and sluice-global`},
		{"unknown space", PoolRequest{Space: "LocalDefault"}, pool.ErrInvalid, `unknown address space "LocalDefault"`},
		{"bad CIDR", PoolRequest{Space: GlobalSpace, Pool: "10.0.0"}, pool.ErrInvalid, "is not a CIDR"},
		{"host bits", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.1/24"}, pool.ErrInvalid, "did you mean 10.0.0.0/24?"},
		{"/31", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/31"}, pool.ErrInvalid, "has no room"},
		{"/32", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/32"}, pool.ErrInvalid, "has no room"},
		{"/7", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/7"}, pool.ErrInvalid, "too large"},
		{"loopback", PoolRequest{Space: GlobalSpace, Pool: "127.0.0.0/16"}, pool.ErrInvalid, "loopback"},
		{"IPv6 with the flag", PoolRequest{Space: GlobalSpace, Pool: "fd00:88::/64", V6: true}, pool.ErrInvalid, "pool fd00:88::/64 is IPv6"},
		{"IPv6 without the flag", PoolRequest{Space: GlobalSpace, Pool: "fd00:88::/64", Options: gateway}, pool.ErrInvalid, "pool fd00:88::/64 is IPv6"},
		{"any IPv6", PoolRequest{Space: GlobalSpace, V6: true}, pool.ErrInvalid, "an IPv6 subnet was asked for"},
		{"sub-pool alone", PoolRequest{Space: GlobalSpace, SubPool: "10.0.0.0/25"}, pool.ErrInvalid, "sub-pool 10.0.0.0/25 needs a pool"},
		{"sub-pool outside", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/24", SubPool: "10.0.1.0/25"}, pool.ErrInvalid, "outside of pool 10.0.0.0/24"},
		{"sub-pool of nodes only", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/24", SubPool: "10.0.0.240/28"}, pool.ErrInvalid, "kept for nodes"},
		{"unknown option", PoolRequest{Space: GlobalSpace, Options: map[string]string{"size": "24"}}, pool.ErrInvalid, `unknown --ipam-opt size="24"; allowed are`},
		{"unknown option with a subnet", PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/24", Options: map[string]string{"size": "24"}}, pool.ErrInvalid, "unknown --ipam-opt"},
		{"bad option", PoolRequest{Space: GlobalSpace, Options: map[string]string{"sluice.size": "big"}}, pool.ErrInvalid, "is not a prefix length"},
		{"options that do not fit", PoolRequest{Space: GlobalSpace, Options: map[string]string{"sluice.size": "20", "sluice.pool": "10.9.0.0/24"}}, pool.ErrInvalid, "do not fit"},
		{"no subnet left", PoolRequest{Space: GlobalSpace, Options: map[string]string{"sluice.size": "24", "sluice.pool": "10.60.0.0/24"}}, pool.ErrExhausted, "no free subnet of /24 in 10.60.0.0/24"},
		{"overlap", PoolRequest{Space: GlobalSpace, Pool: "10.60.0.0/16"}, pool.ErrConflict, "overlaps network web (10.60.0.0/24)"},

		{"empty address request", AddressRequest{}, pool.ErrInvalid, `pool id "" is not one of sluice's`},
		{"space in the id", AddressRequest{PoolID: "other/10.60.0.0/24"}, pool.ErrInvalid, `unknown address space "other"`},
		{"not an address", AddressRequest{PoolID: p, Address: "web"}, pool.ErrInvalid, `address "web" is not an IPv4 address`},
		{"address with a mask", AddressRequest{PoolID: p, Address: "10.60.0.9/24"}, pool.ErrInvalid, "without a mask"},
		{"IPv6 address", AddressRequest{PoolID: p, Address: "fd00::9"}, pool.ErrInvalid, "is not an IPv4 address"},
		{"outside", AddressRequest{PoolID: p, Address: "10.61.0.9"}, pool.ErrInvalid, "outside of pool 10.60.0.0/24; choose one from 10.60.0.1 to 10.60.0.239"},
		{"network address", AddressRequest{PoolID: p, Address: "10.60.0.0"}, pool.ErrInvalid, "is the network address"},
		{"broadcast address", AddressRequest{PoolID: p, Address: "10.60.0.255"}, pool.ErrInvalid, "is the broadcast address"},
		{"a node's address", AddressRequest{PoolID: p, Address: "10.60.0.240"}, pool.ErrInvalid, "address 10.60.0.240 of pool 10.60.0.0/24 lies in 10.60.0.240/28, which sluice keeps for the nodes of the swarm; choose one from 10.60.0.1 to 10.60.0.239"},
		{"the gateway's address", AddressRequest{PoolID: p, Address: "10.60.0.1"}, pool.ErrInUse, "is the gateway"},
		{"gateway outside", AddressRequest{PoolID: p, Address: "10.61.0.1", Options: gateway}, pool.ErrInvalid, "outside of pool"},
		{"gateway among the nodes", AddressRequest{PoolID: p, Address: "10.60.0.254", Options: gateway}, pool.ErrInvalid, "keeps for the nodes"},
		{"unknown pool", AddressRequest{PoolID: GlobalSpace + "/10.61.0.0/24"}, pool.ErrUnknownPool, "is not known"},
		{"another sub-pool", AddressRequest{PoolID: p + "/10.60.0.0/25"}, pool.ErrUnknownPool, "is not known"},

		{"empty pool release", ReleasePoolRequest{}, pool.ErrInvalid, "is not one of sluice's"},
		{"empty address release", ReleaseAddressRequest{}, pool.ErrInvalid, "is not one of sluice's"},
		{"release of no address", ReleaseAddressRequest{PoolID: p}, pool.ErrInvalid, `address "" is not an IPv4 address`},
		{"release of an unknown pool", ReleasePoolRequest{PoolID: GlobalSpace + "/10.61.0.0/24"}, nil, ""},
		{"release of a free address", ReleaseAddressRequest{PoolID: p, Address: "10.60.0.77"}, nil, ""},
		{"release outside", ReleaseAddressRequest{PoolID: p, Address: "10.61.0.77"}, nil, ""},
		{"release of an unknown pool's address", ReleaseAddressRequest{PoolID: GlobalSpace + "/10.61.0.0/24", Address: "10.61.0.2"}, nil, ""},
		{"release in another space", ReleaseAddressRequest{PoolID: "other/10.61.0.0/24", Address: "10.61.0.2"}, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			j := newJournal(t)
			a := open(t, ScopeGlobal, j)
			ctx := t.Context()
			if _, err := a.RequestPool(ctx, PoolRequest{Space: GlobalSpace, Pool: "10.60.0.0/24"}); err != nil {
				t.Fatal(err)
			}
			if _, err := a.RequestAddress(ctx, AddressRequest{PoolID: p, Options: gateway}); err != nil {
				t.Fatal(err)
			}
			if err := a.Bind(ctx, "web", pfx("10.60.0.0/24"), false); err != nil {
				t.Fatal(err)
			}
			before, commits := describe(a), j.commits
			var err error
			switch r := tt.call.(type) {
			case PoolRequest:
				_, err = a.RequestPool(ctx, r)
			case AddressRequest:
				_, err = a.RequestAddress(ctx, r)
			case ReleasePoolRequest:
				err = a.ReleasePool(ctx, r)
			case ReleaseAddressRequest:
				err = a.ReleaseAddress(ctx, r)
			}
			if !errors.Is(err, tt.kind) || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("err = %v; want %v with %q", err, tt.kind, tt.want)
			}
			if after := describe(a); after != before || j.commits != commits {
				t.Errorf("%d commits, state\n%s\nwas\n%s", j.commits-commits, after, before)
			}
		})
	}
}

func TestBindRefusesBadInput(t *testing.T) {
	a := open(t, ScopeGlobal, newJournal(t))
	for _, err := range []error{
		a.Bind(t.Context(), "", pfx("10.0.0.0/24"), false),
		a.Bind(t.Context(), "web", pfx("10.0.0.1/24"), false),
		a.Bind(t.Context(), "web", pfx("fd00::/64"), false),
		a.Bind(t.Context(), "web", pfx("10.0.0.0/31"), false),
	} {
		if !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("err = %v", err)
		}
	}
	if err := a.Free(t.Context(), ""); err != nil {
		t.Error(err)
	}
	if got := describe(a); got != "" {
		t.Error(got)
	}
}

func TestExhaustedPool(t *testing.T) {
	a := open(t, ScopeGlobal, newJournal(t))
	r, err := a.RequestPool(t.Context(), PoolRequest{Space: GlobalSpace, Pool: "10.0.0.0/29"})
	if err != nil {
		t.Fatal(err)
	}
	for range 6 {
		if _, err := a.RequestAddress(t.Context(), AddressRequest{PoolID: r.PoolID}); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range []map[string]string{nil, {"RequestAddressType": "com.docker.network.gateway"}} {
		_, err = a.RequestAddress(t.Context(), AddressRequest{PoolID: r.PoolID, Options: o})
		if !errors.Is(err, pool.ErrExhausted) || !strings.Contains(err.Error(), "pool 10.0.0.0/29 has no free address: 6 in use; remove containers or services") {
			t.Errorf("err = %v", err)
		}
	}
}
