package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"sluice/internal/diag"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/ipam/pool"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// Config is what `docker plugin set sluice:latest NAME=VALUE` decides.
type Config struct {
	Scope      string         // scopeGlobal or scopeLocal
	VXLANPort  uint16         // UDP destination port of VXLAN
	GossipPort uint16         // TCP and UDP
	GossipBind netip.Addr     // invalid: the engine's data-path address
	GossipKey  options.Key    // empty: the swarm's own, which the leader makes
	KeyPort    uint16         // TCP; where managers give the key to nodes without one
	Pools      []netip.Prefix // where subnets come from, in the order they are used
	SubnetBits int            // prefix length of a subnet that nobody chose
	MeshPool   netip.Prefix   // of the addresses by which published ports are told apart
	Metrics    netip.AddrPort // to answer health checks and collectors at; invalid: nowhere
	Firewalld  bool           // have firewalld open the nodes' ports, where it runs
	NoIPVS     bool           // do without ip_vs, as if the kernel lacked it
	LogLevel   slog.Level
	StateDir   string // what must outlive the process: intents, leases
	HostRun    string // where this process sees the host's /run
}

// The scopes of the plugin's networks, in the engine's words.
const (
	scopeGlobal = "global" // networks of the swarm
	scopeLocal  = "local"  // networks of this engine
)

// setting is a row of the table: the environment variable, its default as text,
// its meaning, and how a value gets into the Config. The error of set says what
// is wrong with the value and what is allowed.
type setting struct {
	name, value, doc string
	secret           bool
	set              func(c *Config, value string) error
}

// settings is the one table of settings. config.json repeats names, defaults
// and descriptions, because the engine reads them there, and a test compares.
//
// The binary has the defaults itself and takes empty for unset: `docker plugin
// upgrade` keeps the settings of the old version, so what a new version adds is
// missing from its environment (moby plugin/manager_linux.go, upgradePlugin).
var settings = []setting{
	{
		name: "SCOPE", value: scopeGlobal,
		doc: "global: networks of the swarm. local: networks of this engine only, for a second alias of the plugin.",
		set: func(c *Config, v string) error {
			if v != scopeGlobal && v != scopeLocal {
				return fmt.Errorf("want %s or %s", scopeGlobal, scopeLocal)
			}
			c.Scope = v
			return nil
		},
	},
	{
		// Not 4789: the engine's own overlay networks hold it on every swarm node.
		name: "VXLAN_PORT", value: "4799",
		doc: "UDP port of VXLAN, the same on every node. 4789 belongs to Docker's own overlay networks.",
		set: func(c *Config, v string) (err error) { c.VXLANPort, err = port(v); return err },
	},
	{
		// Not 7946: the engine's own gossip holds it on every swarm node.
		name: "GOSSIP_PORT", value: "7947",
		doc: "TCP and UDP port on which the nodes talk to each other, the same on every node. 7946 belongs to the engine.",
		set: func(c *Config, v string) (err error) { c.GossipPort, err = port(v); return err },
	},
	{
		name: "GOSSIP_BIND", value: "",
		doc: "IPv4 address to listen on for the other nodes. Empty: the engine's data-path address.",
		set: func(c *Config, v string) error {
			if v == "" {
				return nil
			}
			a, err := netip.ParseAddr(v)
			if err != nil || !a.Is4() || a.IsUnspecified() {
				return errors.New("want an IPv4 address of this node, or nothing for the engine's data-path address")
			}
			c.GossipBind = a
			return nil
		},
	},
	{
		name: "GOSSIP_KEY", value: "", secret: true,
		doc: "Key of the nodes' talk: 16, 24 or 32 bytes in hexadecimal or base64, the same on every node. Empty: the swarm's leader makes one.",
		set: func(c *Config, v string) error {
			if v == "" {
				return nil
			}
			key, err := options.DecodeKey(v)
			c.GossipKey = options.Key(key)
			return err
		},
	},
	{
		// The one after gossip's.
		name: "KEY_PORT", value: "7948",
		doc: "TCP port on which managers give the gossip key to nodes of the swarm that have no network yet, the same on every node. Not used with GOSSIP_KEY.",
		set: func(c *Config, v string) (err error) { c.KeyPort, err = port(v); return err },
	},
	{
		// The far end of 10.0.0.0/8: Swarm takes subnets from its near end, the
		// bridge driver from 172.17.0.0 and 192.168.0.0.
		name: "POOL", value: "10.255.0.0/16..10.240.0.0/16",
		doc: "Where subnets come from for networks created without --subnet: IPv4 prefixes separated by commas; A/n..B/n is A, B and every /n between, in that order.",
		set: func(c *Config, v string) (err error) { c.Pools, err = pools(v); return err },
	},
	{
		// 4096 addresses: a sixteenth is kept for nodes, the rest is more tasks than
		// one network of a swarm is known to hold well.
		name: "SUBNET_SIZE", value: "20",
		doc: "Prefix length of a subnet taken from POOL.",
		set: func(c *Config, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil {
				return errors.New("want the length of an IPv4 prefix, such as 20")
			}
			c.SubnetBits = n
			return nil // its range is pool.List's to judge, with POOL
		},
	},
	{
		// Nobody's network, and ordinary unicast to Linux: see ingress.DefaultPool.
		name: "MESH_POOL", value: "250.0.0.0/8",
		doc: "Addresses that published ports are led by inside of hosts and networks: an IPv4 /8 that is nobody's, the same on every node.",
		set: func(c *Config, v string) (err error) { c.MeshPool, err = ingress.ParsePool(v); return err },
	},
	{
		// For a node whose ip_vs is broken or not allowed. A network's own option
		// is for all nodes.
		name: "DATAPATH", value: "auto",
		doc: "What this node may serve virtual IPs with. auto: ip_vs where the kernel has it. nft: nftables, as if it had not.",
		set: func(c *Config, v string) error {
			if v != "auto" && v != service.NFT {
				return fmt.Errorf("want auto or %s", service.NFT)
			}
			c.NoIPVS = v == service.NFT
			return nil
		},
	},
	{
		// Off is for who opens ports by hand: firewalld's own lists then say all.
		name: "FIREWALLD", value: "auto",
		doc: "What to do where the host's firewalld runs. auto: have it open VXLAN_PORT and GOSSIP_PORT, and on managers KEY_PORT, in the zones that the nodes' packets come by. off: nothing. Not with SCOPE=local.",
		set: func(c *Config, v string) error {
			if v != "auto" && v != "off" {
				return errors.New("want auto or off")
			}
			c.Firewalld = v == "auto"
			return nil
		},
	},
	{
		// Empty is unset, as for all settings, so nowhere has a word of its own.
		name: "METRICS_ADDR", value: "0.0.0.0:9247",
		doc: "Address and TCP port for GET /healthz and GET /metrics, which anybody may ask who reaches it. off: none. Not with SCOPE=local.",
		set: func(c *Config, v string) error {
			c.Metrics = netip.AddrPort{}
			if strings.EqualFold(v, "off") {
				return nil
			}
			a, err := netip.ParseAddrPort(v)
			if err != nil || a.Port() == 0 {
				return errors.New("want an address of this node and a port, such as 0.0.0.0:9247 or 127.0.0.1:9247, or off")
			}
			c.Metrics = a
			return nil
		},
	},
	{
		name: "LOG_LEVEL", value: "info",
		doc: "debug, info, warn or error. The engine's log shows the lines.",
		set: func(c *Config, v string) error {
			if !slices.Contains([]string{"debug", "info", "warn", "error"}, strings.ToLower(v)) {
				return errors.New("want debug, info, warn or error")
			}
			return c.LogLevel.UnmarshalText([]byte(v))
		},
	},
	{
		// The propagated mount of config.json: it outlives the process, a disabled
		// plugin and an upgrade.
		name: "STATE_DIR", value: "/var/lib/sluice",
		doc: "Directory in the plugin for what must survive a restart. The default is the only one that survives an upgrade of the plugin.",
		set: func(c *Config, v string) (err error) { c.StateDir, err = absolute(v); return err },
	},
	{
		name: "HOST_RUN", value: "/host/run",
		doc: "Where the plugin finds the host's /run.",
		set: func(c *Config, v string) (err error) { c.HostRun, err = absolute(v); return err },
	},
}

// parseConfig reads the settings with getenv. The error names every setting
// that is wrong, with its value and what is allowed; the Config then has the
// defaults in their place.
//
// A plugin must not exit on such an error: the engine would start it again at
// once and for ever, and tell nobody why. It listens, and refuses each call
// with the error's text (see socket.refuse): `docker network create` and
// `docker service ps` show that to the person who can run `docker plugin set`.
func parseConfig(getenv func(string) string) (Config, error) {
	var c Config
	var errs []error
	for _, s := range settings {
		value := strings.TrimSpace(getenv(s.name))
		if value == "" {
			value = s.value
		}
		err := s.set(&c, value)
		if err == nil {
			continue
		}
		shown := strconv.Quote(value)
		if s.secret {
			shown = options.Redacted
		}
		errs = append(errs, fmt.Errorf("setting %s=%s: %w", s.name, shown, err))
		if err := s.set(&c, s.value); err != nil {
			errs = append(errs, fmt.Errorf("default of setting %s: %w", s.name, err))
		}
	}
	if c.VXLANPort == c.GossipPort {
		errs = append(errs, fmt.Errorf("settings VXLAN_PORT and GOSSIP_PORT are both %d: both use UDP; choose two ports", c.VXLANPort))
	}
	if c.KeyPort == c.GossipPort {
		errs = append(errs, fmt.Errorf("settings KEY_PORT and GOSSIP_PORT are both %d: both use TCP; choose two ports", c.KeyPort))
	}
	if port := c.Metrics.Port(); port == c.GossipPort || port == c.KeyPort {
		errs = append(errs, fmt.Errorf("setting METRICS_ADDR has port %d, as GOSSIP_PORT or KEY_PORT: all use TCP; choose another port", port))
	}
	for _, p := range c.Pools {
		if p.Overlaps(c.MeshPool) {
			errs = append(errs, fmt.Errorf("settings POOL and MESH_POOL both have %s; choose a MESH_POOL that no network has", p))
			break
		}
	}
	if err := (pool.List{Supernets: c.Pools, Bits: c.SubnetBits}).Check(); err != nil {
		errs = append(errs, fmt.Errorf("settings POOL and SUBNET_SIZE: %w", err))
	}
	if len(errs) == 0 {
		return c, nil
	}
	return c, fmt.Errorf("sluice is not configured rightly: %w; to repair it: docker plugin disable -f sluice:latest, docker plugin set sluice:latest NAME=VALUE, docker plugin enable sluice:latest",
		oneLine(errs))
}

// describeConfig lists every setting with what it is set to, for `sluice config`.
func describeConfig(getenv func(string) string) []diag.Setting {
	rows := make([]diag.Setting, 0, len(settings))
	for _, s := range settings {
		v := diag.Setting{Name: s.name, Value: strings.TrimSpace(getenv(s.name)), Doc: s.doc}
		if v.Value == "" {
			v.Value, v.Default = s.value, true
		}
		if s.secret && v.Value != "" {
			v.Value = options.Redacted
		}
		rows = append(rows, v)
	}
	return rows
}

func port(v string) (uint16, error) {
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || n == 0 {
		return 0, errors.New("want a port from 1 to 65535")
	}
	return uint16(n), nil
}

func absolute(v string) (string, error) {
	if !path.IsAbs(v) {
		return "", errors.New("want an absolute path inside the plugin")
	}
	return path.Clean(v), nil
}

// maxPools keeps a typing error such as 10.0.0.0/24..10.255.0.0/24 from making
// a list of 65281 pools, each of which every new network would be compared to.
const maxPools = 1024

// pools reads a comma-separated list of prefixes and ranges of prefixes.
func pools(v string) ([]netip.Prefix, error) {
	const want = "want IPv4 prefixes like 10.255.0.0/16, or ranges like 10.255.0.0/16..10.240.0.0/16, separated by commas"
	var list []netip.Prefix
	for item := range strings.SplitSeq(v, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(item), "..")
		if !isRange {
			last = first
		}
		a, errA := netip.ParsePrefix(strings.TrimSpace(first))
		b, errB := netip.ParsePrefix(strings.TrimSpace(last))
		switch {
		case errA != nil || errB != nil || !a.Addr().Is4() || !b.Addr().Is4():
			return nil, fmt.Errorf("%q is no prefix; %s", item, want)
		case a != a.Masked() || b != b.Masked():
			return nil, fmt.Errorf("%q has bits set behind the prefix; write the first address of the block", item)
		case a.Bits() != b.Bits():
			return nil, fmt.Errorf("%q: both ends of a range must have the same length", item)
		case a.Bits() == 0:
			return nil, fmt.Errorf("%q is the whole Internet; %s", item, want)
		}
		run, err := between(a, b, maxPools-len(list))
		if err != nil {
			return nil, fmt.Errorf("%q: %w", item, err)
		}
		list = append(list, run...)
	}
	for i, p := range list {
		if j := slices.IndexFunc(list[:i], p.Overlaps); j >= 0 {
			return nil, fmt.Errorf("%s and %s overlap; leave one out", list[j], p)
		}
	}
	return list, nil
}

// between lists a, b and the blocks of their length between them, in the order
// from a to b, if they are at most limit.
func between(a, b netip.Prefix, limit int) ([]netip.Prefix, error) {
	number := func(p netip.Prefix) int64 {
		o := p.Addr().As4()
		return (int64(o[0])<<24 | int64(o[1])<<16 | int64(o[2])<<8 | int64(o[3])) >> (32 - p.Bits())
	}
	from, to, step := number(a), number(b), int64(1)
	if from > to {
		step = -1
	}
	count := (to-from)*step + 1
	if count > int64(limit) {
		return nil, fmt.Errorf("%d pools, more than the %d that one list may have; write a larger block with a shorter prefix", count, maxPools)
	}
	list := make([]netip.Prefix, 0, count)
	for n := from; ; n += step {
		u := uint32(n << (32 - a.Bits()))
		list = append(list, netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(u >> 24), byte(u >> 16), byte(u >> 8), byte(u)}), a.Bits()))
		if n == to {
			return list, nil
		}
	}
}

// oneLine joins errs without line breaks: the text ends in a column of `docker
// service ps` and in lines of the engine's log.
func oneLine(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	texts := make([]string, len(errs))
	for i, err := range errs {
		texts[i] = err.Error()
	}
	return errors.New(strings.Join(texts, "; "))
}

// reserved are the ports that this process or the engine has or may come to need, with
// what for. At boot the plugin is there before the engine's swarm part.
func (c Config) reserved() map[model.HostPort]string {
	out := make(map[model.HostPort]string)
	if c.Scope == scopeLocal {
		return out
	}
	add := func(what string, port uint16, protos ...model.Proto) {
		for _, p := range protos {
			out[model.HostPort{Proto: p, Port: port}] = what
		}
	}
	// The engine's: management, gossip, VXLAN (docs.docker.com/engine/swarm/swarm-tutorial).
	add("the engine (swarm management)", 2377, model.TCP)
	add("the engine (its gossip)", 7946, model.TCP, model.UDP)
	add("the engine (its overlay)", 4789, model.UDP)
	own := func(setting string) string { return "sluice itself (setting " + setting + ")" }
	add(own("VXLAN_PORT"), c.VXLANPort, model.UDP)
	add(own("GOSSIP_PORT"), c.GossipPort, model.TCP, model.UDP)
	if !unused(c) {
		add(own("KEY_PORT"), c.KeyPort, model.TCP)
	}
	if c.Metrics.IsValid() {
		add(own("METRICS_ADDR"), c.Metrics.Port(), model.TCP)
	}
	return out
}
