package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// probeTable is the name that Probe tries things under; it exists only inside
// transactions.
const probeTable = "sluice-probe"

// feature is something that the tables need.
type feature struct {
	name    string // as a person knows it
	option  string // the kernel's configuration option
	ruleset ruleset
}

// Probe tries whether the kernel has what the tables need, in the namespace that
// nsFD refers to. Each try is one transaction that makes a table and deletes it
// again, so no packet ever meets it. Trying loads modules where that is allowed.
//
// kernel.ErrUnsupported: the text names what is missing. Any other error says
// nothing about the kernel.
func (Tables) Probe(nsFD int) error { return probe(nsFD, features()) }

// ProbeMesh is Probe for what published ports need besides: of the host, and of tasks
// that answer UDP.
func (Tables) ProbeMesh(nsFD int) error { return probe(nsFD, meshFeatures()) }

// meshFeatures are those of the routing mesh, from the parts to the whole.
func meshFeatures() []feature {
	// TEST-NET-1 and 2 (RFC 5737).
	own, gw := netip.AddrFrom4([4]byte{192, 0, 2, 1}), netip.AddrFrom4([4]byte{198, 51, 100, 1})
	subnet := netip.PrefixFrom(own, 24).Masked()
	host := meshRuleset(kernel.MeshTableSpec{Devices: "probe"})
	back := backRuleset(kernel.BackTableSpec{Router: model.MAC{2}, Pool: subnet, Bits: 24})
	task := withMesh(taskRuleset(), []meshed{{own, kernel.TaskMeshSpec{Pool: subnet, MAC: model.MAC{2}, Subnet: subnet, UDP: true, Default: gw}}})
	for _, rs := range []*ruleset{&host, &back, &task} {
		rs.table = probeTable
	}
	base := chain{name: "c", typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: meshPriority}
	ip := func(parts ...[]expr.Any) ruleset {
		return ruleset{
			family: nftables.TableFamilyIPv4, table: probeTable, chains: []chain{base},
			rules: []rule{newRule(base.name, "probe", parts...)},
		}
	}
	return []feature{
		{"types of addresses (fib)", "CONFIG_NFT_FIB_IPV4", ip(part(&expr.Fib{Register: r0, FlagDADDR: true, ResultADDRTYPE: true}, is(r0, native(unix.RTN_LOCAL)...)))},
		{"sockets", "CONFIG_NFT_SOCKET", ip(part(&expr.Socket{Key: expr.SocketKeyTransparent, Register: r0}))},
		{"the host's published ports", "CONFIG_NFT_NAT", host},
		{"the way back", "CONFIG_NF_TABLES_BRIDGE", back},
		{"published ports in a task", "CONFIG_NFT_REJECT", task},
	}
}

// probe tries a list of features.
func probe(nsFD int, list []feature) error {
	var missing []error
	for _, f := range list {
		err := try(nsFD, f.ruleset)
		switch {
		case err == nil:
		case lacks(err):
			missing = append(missing, fmt.Errorf("nftables: %s (%s): %w: %w", f.name, f.option, kernel.ErrUnsupported, err))
		default:
			return fmt.Errorf("probe nftables: %s: %w", f.name, err)
		}
	}
	return errors.Join(missing...)
}

// lacks reports whether the error is how a kernel says that it knows of no such
// thing: an object or expression type (ENOENT), a family (EAFNOSUPPORT), a flag
// or attribute (EINVAL, EOPNOTSUPP), the protocol (EPROTONOSUPPORT).
func lacks(err error) bool {
	for _, e := range []error{unix.ENOENT, unix.EAFNOSUPPORT, unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// try makes a ruleset and deletes it in one transaction.
func try(nsFD int, rs ruleset) error {
	b, err := newBatch(nsFD, rs)
	if err != nil {
		return err
	}
	if err := b.build(rs, &found{}); err != nil {
		return err
	}
	b.conn.DelTable(b.table)
	return b.flush()
}

// features goes from the parts to the whole, so that what is missing is named
// before something that needs it.
func features() []feature {
	var (
		ip, mac = nftables.TypeIPAddr, nftables.TypeEtherAddr
		pair    = []nftables.SetDatatype{ip, mac}
		base    = chain{name: "c", typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: bridgePriority}
	)
	bridge := func(sets []set, parts ...[]expr.Any) ruleset {
		return ruleset{
			family: bridgeFamily, table: probeTable, sets: sets, chains: []chain{base},
			rules: []rule{newRule(base.name, "probe", parts...)},
		}
	}
	flows := set{name: "m", key: pair, data: mac, timeout: lifeUDP, size: sizeFrags}
	spec := kernel.BridgeTableSpec{Router: model.MAC{2}, Uplink: "probe"}
	whole := bridgeRuleset(spec)
	whole.table = probeTable
	vip := netip.AddrFrom4([4]byte{192, 0, 2, 1}) // TEST-NET-1
	for _, s := range []kernel.VIPSpec{
		{Scheduler: schedulerRR, Slots: 1}, {Scheduler: schedulerSH, Slots: 1}, {Scheduler: schedulerRR, Slots: 1, Persist: 1, PersistBits: 24},
	} {
		// There is nothing in these to refuse.
		if rules, err := pickRules(vip, s); err == nil {
			whole.rules = append(whole.rules, rules...)
		}
	}
	whole.chains = append(whole.chains, chain{name: pickChain(vip)})
	task := taskRuleset()
	task.table = probeTable
	guard := guardRuleset(kernel.GuardTableSpec{Ports: "probe", Pool: netip.PrefixFrom(vip, 32)})
	guard.table = probeTable
	return []feature{
		{"tables of family bridge", "CONFIG_NF_TABLES_BRIDGE", bridge(nil, accept())},
		{"numgen", "CONFIG_NFT_NUMGEN", bridge(nil, part(&expr.Numgen{Register: r0, Modulus: 2, Type: unix.NFT_NG_INCREMENTAL}))},
		{"jhash", "CONFIG_NFT_HASH", bridge(nil, part(ipSaddr(r0),
			&expr.Hash{SourceRegister: r0, DestRegister: r1, Length: 4, Modulus: 2, Seed: hashSeed, Type: expr.HashTypeJenkins}))},
		{"setting ether daddr and pkttype", "Linux 4.10", bridge(nil, part(etherDaddr(r0), setEtherDaddr(r0)), setPktType(unix.PACKET_HOST))},
		{"concatenations", "Linux 4.1", bridge([]set{{name: "s", key: pair}}, part(ipDaddr(r0), etherDaddr(r1), inSet(r0, "s")))},
		{"verdict maps", "Linux 3.13", bridge([]set{{name: "v", key: []nftables.SetDatatype{ip}, data: nftables.TypeVerdict}}, part(ipDaddr(r0), vmap(r0, "v")))},
		{"maps with timeouts", "Linux 4.1", bridge([]set{flows}, part(ipSaddr(r0), etherDaddr(r1), mapped(r0, r4, "m")))},
		{"maps that packets add to", "Linux 4.1", bridge([]set{flows}, part(ipSaddr(r0), etherDaddr(r1), etherDaddr(r4), update("m", r0, r4, lifeUDP)))},
		{"maps that packets delete from", "Linux 5.4", bridge([]set{flows}, part(ipSaddr(r0), etherDaddr(r1), etherDaddr(r4), forget("m", r0, r4)))},
		{"counters", "Linux 3.13", bridge(nil, part(&expr.Counter{}))},
		{"the balancer as a whole", "CONFIG_NF_TABLES_BRIDGE", whole},
		{"the guard of containers' ports", "CONFIG_NF_TABLES_BRIDGE", guard},
		{"dnat to maps", "CONFIG_NFT_NAT", task},
	}
}
