package nft

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// The maps of table ip sluice.
const (
	mapIn   = "in"   // VIP -> the task's own address, for what arrives
	mapLoop = "loop" // the same, for what the task itself sends to a VIP that only it serves

	mapInPorts   = "in-ports"   // VIP . protocol . port -> the task's own address . port
	mapLoopPorts = "loop-ports" // the same, for what the task itself sends
)

// The chains of table ip sluice that translate are named after their hooks; the
// others keep out of the task what its tunnel has taken out of other packets, and
// may not. For those of the routing mesh see taskmesh.go.
const (
	chainOutput = "output"
	chainEntry  = "entry"
	chainInner  = "inner-packet"
)

// entryPriority is before conntrack, -200, which remembers nothing of what is
// dropped, and so before the chain that translates: the address is still the VIP.
// It is that of iptables' raw table (NF_IP_PRI_RAW), whose order does not matter.
const entryPriority = -300

// taskPriority is just before -100 (NF_IP_PRI_NAT_DST), where iptables' nat
// table hangs, which the engine's DNS rules are in: a packet to a VIP is none of
// theirs, so the order decides nothing, but two chains at one priority would
// run in the order of their making. It must be above -200, conntrack.
const taskPriority = -110

// taskRuleset is table ip sluice. Its chains that translate see the first packet of
// each connection; conntrack translates the others, and the answers back.
//
// A tunnel takes packets from everybody who reaches the task's address, and anything
// may be in them. Only what is for a VIP of the task's comes through.
//
// Nothing is said of the source address: a client's stays as it is, and a task
// that calls itself has chosen its own address on the VIP's network before the
// output hook moves the connection to lo.
func taskRuleset() ruleset {
	types := []nftables.SetDatatype{nftables.TypeIPAddr}
	portTypes := []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService}
	place := nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService) // fails on none of the two
	// A packet without ports is of a protocol that no element has.
	toPort := func(name string) []expr.Any {
		return part(
			ipDaddr(r0), ipProtocol(r1), thDport(r2), mapped(r0, r0, name),
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r0, RegProtoMin: r1, Specified: true},
		)
	}
	to := func(name string) []expr.Any {
		return part(
			ipDaddr(r0), mapped(r0, r0, name),
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r0},
		)
	}
	tunnel := part(
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: r0},
		is(r0, []byte(kernel.TaskTunnelPrefix)...), // the name's first octets
	)
	return ruleset{
		family: nftables.TableFamilyIPv4, table: tableName,
		sets: []set{
			{name: mapIn, key: types, data: nftables.TypeIPAddr},
			{name: mapLoop, key: types, data: nftables.TypeIPAddr},
			{name: mapInPorts, key: portTypes, data: place},
			{name: mapLoopPorts, key: portTypes, data: place},
		},
		chains: []chain{
			{name: chainEntry, typ: nftables.ChainTypeFilter, hook: unix.NF_INET_PRE_ROUTING, priority: entryPriority},
			{name: chainInner},
			{name: chainPrerouting, typ: nftables.ChainTypeNAT, hook: unix.NF_INET_PRE_ROUTING, priority: taskPriority},
			{name: chainOutput, typ: nftables.ChainTypeNAT, hook: unix.NF_INET_LOCAL_OUT, priority: taskPriority},
		},
		rules: []rule{
			newRule(chainEntry, "out of a tunnel", tunnel, goTo(chainInner)),
			// Kernels before 6.10 take no map as a set: the address found is for nothing.
			newRule(chainInner, "for a VIP", part(ipDaddr(r0), mapped(r0, r1, mapIn)), accept()),
			newRule(chainInner, "for nobody else", drop()),
			newRule(chainPrerouting, "from a port of a VIP to the task's", toPort(mapInPorts)),
			newRule(chainPrerouting, "from a VIP to the task", to(mapIn)),
			newRule(chainOutput, "the task to itself, by port", toPort(mapLoopPorts)),
			newRule(chainOutput, "the task to itself", to(mapLoop)),
		},
	}
}

// taskMaps are the maps that Apply writes: all.
func taskMaps() []string { return []string{mapIn, mapLoop, mapInPorts, mapLoopPorts} }

// DumpTask returns what table ip sluice in a task's namespace holds: the VIPs of
// all networks that the task is on, and of those that it was on. nsFD refers to
// the namespace, sandbox is its path. Unless the table is intact, it translates
// nothing for sure, and there are no objects: a TaskVIP that is reported works.
//
// A translation that is there in part only has the zero value.
//
// kernel.ErrInterrupted: the rules of the namespace changed all the while.
func (Tables) DumpTask(nsFD int, sandbox string) (kernel.State, error) {
	rs := taskRuleset()
	f, err := read(nsFD, rs.family, rs.table, taskMaps())
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", sandbox, err)
	}
	meshes := foundMeshes(f)
	rs = withMesh(rs, meshes)
	st := kernel.State{}
	ok, err := rs.intact(f)
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", sandbox, err)
	}
	if !ok {
		return st, nil
	}
	st[kernel.TaskTable{Sandbox: sandbox}] = kernel.TaskTableSpec{}
	for _, m := range meshes {
		st[kernel.TaskMesh{Sandbox: sandbox, Addr: m.addr}] = m.spec
	}
	for _, m := range []string{mapIn, mapLoop} {
		for key := range f.elems[m] {
			vip, ok := keyIP(key, 0)
			if !ok {
				continue
			}
			st[kernel.TaskVIP{Sandbox: sandbox, VIP: vip}] = taskVIPState(f, vip)
		}
	}
	for _, m := range []string{mapInPorts, mapLoopPorts} {
		for key := range f.elems[m] {
			vip, ok1 := keyIP(key, 0)
			proto, port, ok2 := keyProtoPort(key, 4)
			if ok1 && ok2 {
				st[kernel.TaskPort{Sandbox: sandbox, VIP: vip, Proto: proto, Port: port}] = taskPortState(f, key)
			}
		}
	}
	return st, nil
}

// taskVIPState returns the translation of a VIP, or the zero value if it is in pieces.
func taskVIPState(f found, vip netip.Addr) kernel.TaskVIPSpec {
	in, ok := f.elems[mapIn][ipKey(vip)]
	loop, loops := f.elems[mapLoop][ipKey(vip)]
	if !ok || loops && loop != in {
		return kernel.TaskVIPSpec{}
	}
	addr, _ := keyIP(in, 0)
	return kernel.TaskVIPSpec{Addr: addr, Loop: loops}
}

// taskPortState returns the translation of a port, or the zero value if it is in pieces.
func taskPortState(f found, key string) kernel.TaskPortSpec {
	in, ok := f.elems[mapInPorts][key]
	loop, loops := f.elems[mapLoopPorts][key]
	if !ok || loops && loop != in {
		return kernel.TaskPortSpec{}
	}
	addr, _ := keyIP(in, 0)
	to, _ := keyPort(in, 4)
	return kernel.TaskPortSpec{Addr: addr, To: to, Loop: loops}
}

// ApplyTask changes table ip sluice in a task's namespace in one transaction; an
// error means that nothing changed. Operations are of PhaseTask and this
// namespace; doing them again changes nothing.
//
// kernel.ErrNotExist: there is no table to put something in.
func (Tables) ApplyTask(nsFD int, sandbox string, ops []kernel.Op) error {
	if len(ops) == 0 {
		return nil
	}
	c, rs := newChange(), taskRuleset()
	fixed, made := false, false // whether rules may change; whether there is to be a table
	for _, op := range ops {
		if want := (kernel.TaskTable{Sandbox: sandbox}).Netns(); op.Key.Netns() != want {
			return fmt.Errorf("task %s: %s belongs to %s", sandbox, op.Key, op.Key.Netns())
		}
		switch op.Key.(type) {
		case kernel.TaskTable:
			if op.Want == nil {
				c = newChange() // what was said of its contents is void
				c.remove = true
			}
			fixed, made = true, op.Want != nil
		case kernel.TaskMesh:
			fixed = true
		default:
			if err := c.taskOp(op); err != nil {
				return fmt.Errorf("task %s: %w", sandbox, err)
			}
		}
	}
	if fixed && (made || !c.remove) {
		if err := c.mesh(nsFD, &rs, ops, made); err != nil {
			return fmt.Errorf("task %s: %w", sandbox, err)
		}
	}
	if err := commit(nsFD, rs, taskMaps(), c); err != nil {
		return fmt.Errorf("task %s: %w", sandbox, err)
	}
	return nil
}

// mesh has the fixed part made anew, with the networks that are there and what ops
// say of them. made says that the table itself is to be made.
func (c *change) mesh(nsFD int, rs *ruleset, ops []kernel.Op, made bool) error {
	f, err := read(nsFD, rs.family, rs.table, nil)
	if err != nil {
		return err
	}
	have := foundMeshes(f)
	if c.remove {
		have = nil
	}
	meshes, err := meshOps(have, ops)
	if err != nil {
		return err
	}
	if !made && !f.exists {
		if len(meshes) > 0 {
			return fmt.Errorf("nftables table %s: %w; make it first", rs.table, kernel.ErrNotExist)
		}
		return nil
	}
	*rs = withMesh(*rs, meshes)
	c.create = rs
	return nil
}

// taskOp adds an operation on an object in table ip sluice.
func (c *change) taskOp(op kernel.Op) error {
	switch k := op.Key.(type) {
	case kernel.TaskVIP:
		have, want, err := cast[kernel.TaskVIPSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.VIP); err != nil {
			return err
		}
		data := func(s kernel.TaskVIPSpec) translation { return translation{s.Addr, "", s.Loop} }
		return c.translate(op, mapIn, mapLoop, ipKey(k.VIP), data(have), data(want))
	case kernel.TaskPort:
		have, want, err := cast[kernel.TaskPortSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.VIP); err != nil {
			return err
		}
		if err := wantPorts(k, k.Proto); err != nil {
			return err
		}
		data := func(s kernel.TaskPortSpec) translation {
			return translation{s.Addr, portData(s.To) + "\x00\x00", s.Loop}
		}
		return c.translate(op, mapInPorts, mapLoopPorts, ipKey(k.VIP)+portKey(k.Proto, k.Port), data(have), data(want))
	}
	return fmt.Errorf("%s is not of table ip %s", op.Key, tableName)
}

// translation is where a VIP, or a port of it, leads to in a task.
type translation struct {
	addr netip.Addr
	port string // as data; empty: the same
	loop bool
}

// translate adds an operation on a translation: an element in the map of what
// arrives, and, if it loops, the same in that of what the task sends.
func (c *change) translate(op kernel.Op, in, loop, key string, have, want translation) error {
	data := func(v kernel.Value, t translation) (in, loop *string, err error) {
		if v == nil {
			return nil, nil, nil
		}
		if err := want4(op.Key, t.addr); err != nil {
			return nil, nil, err
		}
		in = new(ipKey(t.addr) + t.port)
		if t.loop {
			loop = in
		}
		return in, loop, nil
	}
	inWant, loopWant, err := data(op.Want, want)
	if err != nil {
		return err
	}
	inHave, loopHave, err := data(op.Have, have)
	if err != nil {
		c.sure = false // it is there in pieces
	}
	c.put(in, key, inHave, inWant)
	c.put(loop, key, loopHave, loopWant)
	return nil
}
