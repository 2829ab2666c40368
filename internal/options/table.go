package options

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"sluice/internal/model"
)

// The keys.
const (
	prefix = "sluice."

	Datapath  = prefix + "datapath"
	Mode      = prefix + "mode"
	Scheduler = prefix + "scheduler"
	Weight    = prefix + "weight"
	VNI       = prefix + "vni"
	MTU       = prefix + "mtu"

	// SecretKey and Refused are added by the swarm's leader for the nodes.
	SecretKey = prefix + "secret-key"
	Refused   = prefix + "refused"
)

// engineMTU is the engine's own key for the MTU; people carry it over from the
// bridge and overlay drivers.
const engineMTU = "com.docker.network.driver.mtu"

// Bounds of the numbers.
const (
	// MinMTU is what every IPv4 host must accept in one datagram (RFC 791
	// section 3.1).
	MinMTU = 576
	// MaxMTU leaves room for VXLAN's 50 bytes under the kernel's limit of 65535
	// for the devices on the path (include/uapi/linux/if_ether.h ETH_MAX_MTU),
	// and is a figure people remember.
	MaxMTU = 65000
	// MaxWeight keeps the slots that a weighted choice is spread over few: the
	// kernel's ip_vs allows 65535, but ratios finer than 1:255 tell nothing.
	MaxWeight = 255
)

// Option describes one key for people.
type Option struct {
	Key      string
	Default  string // what holds if the key is not given, in words where it is no value
	Allowed  string // the values, as an error text and the manual list them
	Doc      string // one sentence
	Internal bool   // written by sluice for its nodes; people need not set it
	Secret   bool   // the value must not be printed
}

// option is a row: the description, and how a value, free of escapes and outer
// space, gets into the request. The error of set says what is wrong with the
// value; key and value are added by the caller.
type option[T any] struct {
	Option
	alias string // another key for the same; empty: none
	set   func(*T, string) error
}

// networkOptions is the table of `docker network create -o`.
var networkOptions = []option[NetworkRequest]{
	{
		Option: Option{Key: Datapath, Default: "auto", Allowed: datapaths.allowed(),
			Doc: "What balances connections to virtual IPs, on each node by itself: `nft` is nftables; `ipvs` is the kernel's ip_vs where the node has it, nftables where not. `auto` is `nft` in this version."},
		set: func(r *NetworkRequest, v string) (err error) {
			r.Options.Datapath, err = datapaths.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: Mode, Default: "dr", Allowed: modes.allowed(),
			Doc: "How a packet for a virtual IP gets to its backend. `dr`: by layer 2, the reply goes straight to the client and the client's address is kept."},
		set: func(r *NetworkRequest, v string) (err error) {
			r.Options.Mode, err = modes.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: Scheduler, Default: "rr", Allowed: schedulers.allowed(),
			Doc: "How a backend is chosen: `rr` in turn, `wrr` in turn by weight, `sh` by the client's address, so that one client keeps one backend."},
		set: func(r *NetworkRequest, v string) (err error) {
			r.Options.Scheduler, err = schedulers.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: VNI, Default: "allocated", Allowed: between(1, int(model.MaxVNI)),
			Doc: "The VXLAN network identifier."},
		set: func(r *NetworkRequest, v string) error {
			n, err := number(v, 1, int(model.MaxVNI))
			r.VNI = model.VNI(n)
			return err
		},
	},
	{
		Option: Option{Key: MTU, Default: "from the underlay", Allowed: between(MinMTU, MaxMTU),
			Doc: "MTU of the overlay in bytes, 50 less than the underlay carries. `com.docker.network.driver.mtu` means the same."},
		alias: engineMTU,
		set: func(r *NetworkRequest, v string) (err error) {
			r.MTU, err = number(v, MinMTU, MaxMTU)
			return err
		},
	},
	{
		Option: Option{Key: SecretKey, Default: "made once per swarm", Allowed: "16, 24 or 32 bytes in hexadecimal or base64", Internal: true, Secret: true,
			Doc: "The key that encrypts gossip between the nodes. The leader adds it to the network."},
		set: func(r *NetworkRequest, v string) error {
			key, err := DecodeKey(v)
			r.Key = Key(key)
			return err
		},
	},
	{
		Option: Option{Key: Refused, Default: "none", Allowed: "text", Internal: true,
			Doc: "Why the leader refused the network; every node repeats it to the engine, so that `docker service ps` shows it."},
		set: func(r *NetworkRequest, v string) error {
			r.Refused = v
			return nil
		},
	},
}

// serviceOptions is the table of driver-opt of a service's network.
var serviceOptions = []option[model.ServiceOptions]{
	{
		Option: Option{Key: Scheduler, Default: "the network's", Allowed: schedulers.allowed(),
			Doc: "As the network option, for this service."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Scheduler, err = schedulers.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: Mode, Default: "the network's", Allowed: modes.allowed(),
			Doc: "As the network option, for this service."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Mode, err = modes.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: Weight, Default: "1", Allowed: between(1, MaxWeight),
			Doc: "Weight of each task of the service, for scheduler `wrr`."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Weight, err = number(v, 1, MaxWeight)
			return err
		},
	},
}

// word is one value of a choice. An empty no means that it is served; else no
// says why this version refuses a word that people know from elsewhere.
type word struct{ name, no string }

type choice []word

const (
	needsCounts = "needs the number of open connections of each backend, which only the kernel's ip_vs keeps, and this version serves what every node can, by nft too"
	needsIPVS   = "is a scheduler of the kernel's ip_vs, and this version serves what every node can, by nft too"
)

// The choices. The schedulers are those of the kernel (net/netfilter/ipvs/ of
// Linux 6.12), so that a name copied from an ipvsadm or keepalived
// configuration gets an answer that fits it.
var (
	datapaths = choice{{name: "auto"}, {name: "ipvs"}, {name: "nft"}}
	modes     = choice{{name: "dr"},
		{"nat", "is not served: this version forwards by layer 2 (dr) only"},
		{"tun", "is not served: this version forwards by layer 2 (dr) only"}}
	schedulers = choice{{name: "rr"}, {name: "wrr"}, {name: "sh"},
		{"lc", needsCounts}, {"wlc", needsCounts}, {"sed", needsCounts}, {"nq", needsCounts},
		{"lblc", needsCounts}, {"lblcr", needsCounts}, {"ovf", needsCounts},
		{"dh", needsIPVS}, {"fo", needsIPVS}, {"mh", needsIPVS}, {"twos", needsCounts}}
)

// parse returns the word that v names in any case.
func (c choice) parse(v string) (string, error) {
	v = strings.ToLower(v)
	for _, w := range c {
		switch {
		case w.name != v:
		case w.no != "":
			return "", fmt.Errorf("%s %s", v, w.no)
		default:
			return w.name, nil
		}
	}
	return "", fmt.Errorf("unknown")
}

// allowed lists the words that are served.
func (c choice) allowed() string {
	var names []string
	for _, w := range c {
		if w.no == "" {
			names = append(names, w.name)
		}
	}
	return strings.Join(names, ", ")
}

func between(lo, hi int) string { return fmt.Sprintf("a number from %d to %d", lo, hi) }

// number reads a decimal number in [lo, hi].
func number(v string, lo, hi int) (int, error) {
	// Base 10, not 0: 0100 is somebody's hundred, not sixty-four.
	n, err := strconv.ParseInt(v, 10, 32)
	switch {
	case err != nil:
		return 0, fmt.Errorf("not a number")
	case n < int64(lo) || n > int64(hi):
		return 0, fmt.Errorf("out of range")
	}
	return int(n), nil
}

// unescape undoes %XX. The text of an internal option is ours and never
// escaped, so it is not passed here.
func unescape(v string) (string, error) {
	u, err := url.PathUnescape(v)
	if err != nil {
		return "", fmt.Errorf("a %% must start an escape like %%2f; write %%25 for the sign itself")
	}
	return strings.TrimSpace(u), nil
}
