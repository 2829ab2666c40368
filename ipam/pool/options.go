package pool

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Keys of --ipam-opt.
const (
	optSize = "sluice.size"
	optPool = "sluice.pool"
)

// enginePrefix marks keys that the engine adds by itself; what they say is not
// for a user to know. The allocator leaves "com.docker.network.ipam.serial" in
// the stored options and sends it back (engine 20.10 to 28.5).
const enginePrefix = "com.docker.network."

// KeyAddressType is the option that tells what an address is requested for. The
// engine's map is used again for the second subnet of a network, so it turns up
// among the options of a RequestPool as well.
const KeyAddressType = "RequestAddressType"

// TypeGateway is the value of KeyAddressType in a request for the gateway.
const TypeGateway = enginePrefix + "gateway"

// KeySerial is in every address request of Swarm's allocator, and in none of a
// node's libnetwork.
const KeySerial = enginePrefix + "ipam.serial"

// Limits of sluice.size. 8: as large as a subnet can be. 29: a /30 has one
// address left beside the gateway.
const (
	minSize = minBits
	maxSize = maxBits - 1
)

// Options are the --ipam-opt of a network.
type Options struct {
	Bits int          // sluice.size: prefix length of an allocated subnet; 0 if not given
	Pool netip.Prefix // sluice.pool: where to take it from; zero if not given
}

// ParseOptions reads the --ipam-opt of a network. Unknown keys and bad values
// are refused with an *Error of kind ErrInvalid; the engine's own keys are
// passed over. Of several mistakes the first by key is reported.
func ParseOptions(opts map[string]string) (Options, error) {
	var o Options
	for _, key := range slices.Sorted(maps.Keys(opts)) {
		value := opts[key]
		switch {
		case key == KeyAddressType || strings.HasPrefix(key, enginePrefix):
		case key == optSize:
			bits, err := strconv.Atoi(value)
			if err != nil || checkSize(bits) != nil {
				return Options{}, refuse(ErrInvalid, "--ipam-opt %s=%q is not a prefix length; allowed are %d to %d", optSize, value, minSize, maxSize)
			}
			o.Bits = bits
		case key == optPool:
			p, err := ParseSubnet(value)
			if err != nil {
				return Options{}, refuse(ErrInvalid, "--ipam-opt %s=%q: %v", optPool, value, err)
			}
			o.Pool = p
		default:
			return Options{}, refuse(ErrInvalid, "unknown --ipam-opt %s=%q; allowed are %s (prefix length of the subnet, %d to %d) and %s (CIDR to take the subnet from)",
				key, value, optSize, minSize, maxSize, optPool)
		}
	}
	return o, nil
}

// List returns where the subnet of a network with these options comes from,
// given where it would come from without.
func (o Options) List(l List) (List, error) {
	if o.Bits != 0 {
		l.Bits = o.Bits
	}
	if o.Pool.IsValid() {
		l.Name, l.Supernets = o.Pool.String(), []netip.Prefix{o.Pool}
	}
	if err := l.Check(); err != nil {
		return List{}, refuse(ErrInvalid, "--ipam-opt: %v (%s=%d, %s=%s)", err, optSize, l.Bits, optPool, join(l.Supernets))
	}
	return l, nil
}

func checkSize(bits int) error {
	if bits < minSize || bits > maxSize {
		return refuse(ErrInvalid, "subnet size /%d is not allowed; choose /%d to /%d", bits, minSize, maxSize)
	}
	return nil
}
