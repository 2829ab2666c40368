package options

import "sluice/internal/model"

// The keys.
const (
	prefix = "sluice."

	Datapath  = prefix + "datapath"
	Mode      = prefix + "mode"
	Scheduler = prefix + "scheduler"
	VNI       = prefix + "vni"
	MTU       = prefix + "mtu"

	Weight      = prefix + "weight"
	Ports       = prefix + "ports"
	Persistence = prefix + "persistence"
	Netmask     = prefix + "persistence.netmask"
	OnePacket   = prefix + "one-packet"
	Upper       = prefix + "threshold.upper"
	Lower       = prefix + "threshold.lower"
	IdleTimeout = prefix + "idle-timeout"
	Drain       = prefix + "drain"
	SlowStart   = prefix + "slow-start"

	Publish = prefix + "publish"
	Bind    = prefix + "publish.bind"
	Nodes   = prefix + "publish.nodes"
	Allow   = prefix + "publish.allow"
	Source  = prefix + "source"

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
	// MaxSeconds is 576 hours, 24 days: the kernel refuses timeouts of IPVS beyond
	// INT_MAX/HZ seconds (net/netfilter/ipvs/ip_vs_ctl.c ip_vs_set_timeout), which
	// is 24 days and 20 hours with 1000 ticks a second, the most that kernels have.
	MaxSeconds = 576 * 60 * 60
	// MaxConnections is the kernel's own: it compares with a signed number of 32 bits.
	MaxConnections = 1<<31 - 1
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
			Doc: "What balances connections to virtual IPs, on each node by itself: `ipvs` is the kernel's ip_vs, `nft` is nftables. `auto` is `ipvs` where the node has it, else `nft`; with `ipvs`, nodes without it refuse tasks."},
		set: func(r *NetworkRequest, v string) (err error) {
			r.Options.Datapath, err = datapaths.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: Mode, Default: "dr", Allowed: modes.allowed(),
			Doc: "How a packet for a virtual IP gets to its backend. `dr`: by layer 2, and the reply goes straight to the client. `tun`: as `dr`, in IPIP packets, whose 20 bytes senders learn of by path MTU discovery. `nat`: with the backend's own address, and the reply gets the virtual IP's back at the client's node. The backend sees the client's address in all of them."},
		set: func(r *NetworkRequest, v string) (err error) {
			r.Options.Mode, err = modes.parse(v)
			return err
		},
	},
	{
		Option: Option{Key: Scheduler, Default: "rr", Allowed: schedulers.allowed(),
			Doc: schedulersDoc()},
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
			Doc: "Weight of each task of the service, for schedulers that heed it."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Weight, err = number(v, 1, MaxWeight)
			return err
		},
	},
	{
		Option: Option{Key: Ports, Default: "all", Allowed: "up to 32 ports or ranges like 80;81:8080/tcp;5000-5003/udp",
			Doc: "The ports that the virtual IP has, each with the task's port behind `:` if that is another, and the protocol if it is not tcp. All other ports refuse."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Ports, err = model.ParsePorts(v)
			return err
		},
	},
	{
		Option: Option{Key: Persistence, Default: "off", Allowed: "off, or " + durations,
			Doc: "For how long a client's next connection goes to the backend of its last one."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Persist, err = persistence(v)
			return err
		},
	},
	{
		Option: Option{Key: Netmask, Default: "32", Allowed: "a prefix length from 1 to 32, or a mask like 255.255.255.0",
			Doc: "Which clients are one for `" + Persistence + "`: those whose addresses have this prefix in common."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.PersistBits, err = netmask(v)
			return err
		},
	},
	{
		Option: Option{Key: OnePacket, Default: "false", Allowed: "true, false",
			Doc: "Chooses a backend for each UDP packet by itself, for protocols of one question and one answer. Not in mode `nat`."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.OnePacket, err = boolean(v)
			return err
		},
	},
	{
		Option: Option{Key: Upper, Default: "0, no limit", Allowed: between(0, MaxConnections),
			Doc: "How many connections a task may have; beyond, it gets no new ones. It holds for each client's node, and each named port, by itself. Nodes that balance by nftables do not count them."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Upper, err = number(v, 0, MaxConnections)
			return err
		},
	},
	{
		Option: Option{Key: Lower, Default: "0, three quarters of the upper", Allowed: between(0, MaxConnections),
			Doc: "A task that had too many connections gets new ones again once it has fewer than this; not more than `" + Upper + "`."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Lower, err = number(v, 0, MaxConnections)
			return err
		},
	},
	{
		Option: Option{Key: IdleTimeout, Default: "none", Allowed: durations,
			Doc: "For how long an open TCP connection may be silent. Then the node of the task ends it, and both sides hear of it. Unset, it is forgotten after 3 h."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Idle, err = seconds(v)
			return err
		},
	},
	{
		Option: Option{Key: Drain, Default: "none", Allowed: durations,
			Doc: "For how long the open TCP connections of a leaving task may go on, from the moment that the swarm wants it gone, which is 3 s before its stop signal. Then its node ends them, and both sides hear of it. Unset, they go on until the task ends, which is its `--stop-grace-period` after that signal at the latest."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Drain, err = seconds(v)
			return err
		},
	},
	{
		Option: Option{Key: SlowStart, Default: "none", Allowed: durations,
			Doc: "For how long a task that has just become ready gets less than its share of new connections: from a tenth of it up to all, evenly over this time. With the schedulers `rr`, `wrr`, `lc`, `wlc`, `sed` and `nq`; `rr` is `wrr` then, and `lc` is `wlc`. Each node counts from when it hears that the task is ready."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.SlowStart, err = seconds(v)
			return err
		},
	},
	{
		Option: Option{Key: Publish, Default: "none", Allowed: "up to 32 ports or ranges like 81:80;443;8000-8010:9000-9010/udp",
			Doc: "Ports of every node of the swarm that lead to the tasks, each with the task's port behind `:` if that is another, and the protocol (tcp, udp, sctp) if it is not tcp. Of two services that publish one port, the older has it; one that sluice itself needs (GOSSIP_PORT and its like) is no service's."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Published, err = model.ParsePublished(v)
			return err
		},
	},
	{
		Option: Option{Key: Bind, Default: "all", Allowed: "up to 64 IPv4 addresses like 192.0.2.1;198.51.100.1",
			Doc: "The addresses of nodes at which `" + Publish + "` answers. A node with none of them has no such port; 0.0.0.0 is all."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Bind, err = model.ParseAddrs(v)
			return err
		},
	},
	{
		Option: Option{Key: Nodes, Default: "all", Allowed: "up to 64 conditions like zone=a;disk!=slow",
			Doc: "The nodes at which `" + Publish + "` answers: those whose labels (docker node update --label-add) meet all conditions. Case does not matter, and a label that a node does not have is empty."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Nodes, err = model.ParseLabels(v)
			return err
		},
	},
	{
		Option: Option{Key: Allow, Default: "all", Allowed: "up to 64 IPv4 prefixes or addresses like 10.0.0.0/8;192.0.2.7",
			Doc: "The clients outside of the node that `" + Publish + "` answers, by their addresses as the node sees them. To others the port is silent."},
		set: func(o *model.ServiceOptions, v string) (err error) {
			o.Allow, err = model.ParsePrefixes(v)
			return err
		},
	},
	{
		Option: Option{Key: Source, Default: "keep", Allowed: sources.allowed(),
			Doc: "Whom a task sees behind a connection to `" + Publish + "`. `keep`: the client's own address, but for clients on the node itself; `masquerade`: an address that the node has in the network; persistence and hashing by the client then take all clients of a node for one."},
		set: func(o *model.ServiceOptions, v string) error {
			w, err := sources.parse(v)
			if o.Source = model.Keep; w == string(model.Masquerade) {
				o.Source = model.Masquerade
			}
			return err
		},
	},
}
