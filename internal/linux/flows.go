package linux

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// stale picks the flows of conntrack that are not to go on as they are. Flows of TCP
// end by themselves where what they lead to goes; one of UDP lasts as long as its client
// sends, and conntrack knows how it was translated, or that it was not.
type stale struct {
	ports   map[uint16]bool       // UDP to these ports
	here    func(netip.Addr) bool // of these addresses: a flow to elsewhere is none of ours
	aliases map[netip.Addr]bool   // UDP that leads to these
	block   netip.Prefix          // all that leads to one of these; invalid: none
	pool    netip.Prefix          // UDP to one of these, in a task; invalid: none
}

// MatchConntrackFlow is what the library asks of each flow.
func (s stale) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	to, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
	leads, ok2 := netip.AddrFromSlice(f.Reverse.SrcIP)
	if !ok1 || !ok2 {
		return false
	}
	to, leads = to.Unmap(), leads.Unmap()
	switch {
	case s.block.IsValid() && s.block.Contains(leads):
		return true
	case f.Forward.Protocol != unix.IPPROTO_UDP:
		return false
	case s.ports[f.Forward.DstPort] && s.here(to):
		return true
	}
	return s.aliases[leads] || s.pool.IsValid() && s.pool.Contains(to)
}

// lane is one port of one address of the host, or of all, and where it leads to.
type lane struct {
	bind  netip.Addr
	port  uint16
	alias netip.Addr
	to    uint16
}

// changedDatagrams are the UDP ports that lead elsewhere after ops than before: of a
// range that shrinks, or that is split, most do not.
func changedDatagrams(ops []kernel.Op) map[uint16]bool {
	before, after := map[lane]bool{}, map[lane]bool{}
	add := func(to map[lane]bool, k kernel.Key, v kernel.Value) {
		switch k := k.(type) {
		case kernel.MeshPort:
			if v, ok := v.(kernel.MeshPortSpec); ok && k.Proto == model.UDP {
				to[lane{k.Bind, k.Port, v.Alias, v.To}] = true
			}
		case kernel.MeshRange:
			if v, ok := v.(kernel.MeshRangeSpec); ok && k.Proto == model.UDP {
				for port := int(k.Lo); port <= int(k.Hi); port++ {
					to[lane{netip.Addr{}, uint16(port), v.Alias, uint16(port)}] = true
				}
			}
		}
	}
	for _, o := range ops {
		add(before, o.Key, o.Have)
		add(after, o.Key, o.Want)
	}
	out := map[uint16]bool{}
	for l := range before {
		if !after[l] {
			out[l.port] = true
		}
	}
	for l := range after {
		if !before[l] {
			out[l.port] = true
		}
	}
	return out
}

// changedAliases are those whose clients are seen as others than before, or let in by
// another list: what was settled for a flow when it began is not what is wanted now.
func changedAliases(ops []kernel.Op) map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	for _, o := range ops {
		switch k := o.Key.(type) {
		case kernel.MeshMasq:
			out[k.Alias] = true
		case kernel.MeshAllow:
			out[k.Alias] = true
		}
	}
	return out
}

// forgetFlows has conntrack forget the flows of published UDP ports that ops have
// changed. It is done after the change, so none comes up that is as before. That it
// failed shows nowhere but in the log: such flows go on as they were while they last.
func (k *Kernel) forgetFlows(ops []kernel.Op) {
	s := stale{ports: changedDatagrams(ops), aliases: changedAliases(ops)}
	if len(s.ports)+len(s.aliases) == 0 {
		return
	}
	as, err := k.host.conn.addrs()
	if err != nil {
		k.log.Warn("forget flows of published ports", "err", err)
		return
	}
	own := make(map[netip.Addr]bool, len(as))
	for _, a := range as {
		own[a.prefix.Addr()] = true
	}
	s.here = func(a netip.Addr) bool { return own[a] || a.IsLoopback() }
	k.forget(k.host.fd(), inName(k.host.name), s)
}

// forgetBlock has conntrack forget all that leads to aliases to which there is no way
// any more. Else it would go on to translate what clients send, and the host would send
// it wherever its default route leads. They are told: it comes to a port of the host.
func (k *Kernel) forgetBlock(block netip.Prefix) {
	k.forget(k.host.fd(), inName(k.host.name), stale{block: block})
}

// forgetTask has a task's conntrack forget the flows of UDP from entries, if ops change
// where they are led to: the address of the task's default route may be known only
// after they have begun.
func (k *Kernel) forgetTask(fd int, sandbox string, ops []kernel.Op) {
	for _, o := range ops {
		if _, ok := o.Key.(kernel.TaskMesh); !ok {
			continue
		}
		for _, v := range []kernel.Value{o.Have, o.Want} {
			if spec, ok := v.(kernel.TaskMeshSpec); ok && spec.UDP {
				k.forget(fd, sandbox, stale{pool: spec.Pool})
				return
			}
		}
	}
}

func (k *Kernel) forget(fd int, name string, s stale) {
	err := k.inside(fd, name, func() error {
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, s)
		return err
	})
	if err != nil {
		k.log.Warn("forget flows of published ports", "op", name, "err", err)
	}
}
