package pool

import (
	"net/netip"
	"testing"
)

func TestParseOptions(t *testing.T) {
	for _, tt := range []struct {
		name string
		opts map[string]string
		want Options
		err  string
	}{
		{name: "none"},
		{name: "size", opts: map[string]string{"sluice.size": "24"}, want: Options{Bits: 24}},
		{name: "pool", opts: map[string]string{"sluice.pool": "10.9.0.0/16"}, want: Options{Pool: pfx("10.9.0.0/16")}},
		{name: "type leaking from the address request", opts: map[string]string{KeyAddressType: TypeGateway}},
		{name: "the allocator's serial", opts: map[string]string{KeySerial: "true", "sluice.size": "28"}, want: Options{Bits: 28}},
		{name: "unknown", opts: map[string]string{"sluice.sise": "24"}, err: `unknown --ipam-opt sluice.sise="24"; allowed are sluice.size (prefix length of the subnet, 8 to 29) and sluice.pool`},
		{name: "not a number", opts: map[string]string{"sluice.size": "/24"}, err: `sluice.size="/24" is not a prefix length; allowed are 8 to 29`},
		{name: "too small a subnet", opts: map[string]string{"sluice.size": "30"}, err: "allowed are 8 to 29"},
		{name: "too large a subnet", opts: map[string]string{"sluice.size": "7"}, err: "allowed are 8 to 29"},
		{name: "bad pool", opts: map[string]string{"sluice.pool": "10.9.0.1/16"}, err: `sluice.pool="10.9.0.1/16": pool 10.9.0.1/16 has host bits set`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseOptions(tt.opts)
			wantRefusal(t, err, ErrInvalid, tt.err)
			if got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestOptionsThatDoNotFitTheDefaults(t *testing.T) {
	defaults := List{Supernets: DefaultSupernets(), Bits: DefaultBits}
	_, err := Options{Bits: 12}.List(defaults)
	wantRefusal(t, err, ErrInvalid, "subnets of /12 do not fit into 10.255.0.0/16, 10.254.0.0/16")
	_, err = Options{Pool: pfx("10.9.0.0/24")}.List(defaults)
	wantRefusal(t, err, ErrInvalid, "sluice.size=20, sluice.pool=10.9.0.0/24")
	if _, err = (Options{Pool: pfx("10.9.0.0/24"), Bits: 26}).List(defaults); err != nil {
		t.Error(err)
	}
	wantRefusal(t, List{Bits: 20}.Check(), ErrInvalid, "no pools to take subnets from")
	wantRefusal(t, List{Supernets: DefaultSupernets(), Bits: 31}.Check(), ErrInvalid, "subnet size /31")
	wantRefusal(t, List{Supernets: []netip.Prefix{{}}, Bits: 20}.Check(), ErrInvalid, "is not an IPv4 subnet")
}
