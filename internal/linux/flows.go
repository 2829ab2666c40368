package linux

import (
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// datagrams picks the flows of conntrack that are to one of these UDP ports. Flows of
// TCP end by themselves; one of UDP lasts as long as its client sends, and conntrack
// knows how it was translated, or that it was not.
type datagrams map[uint16]bool

// MatchConntrackFlow is what the library asks of each flow.
func (d datagrams) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	return f.Forward.Protocol == unix.IPPROTO_UDP && d[f.Forward.DstPort]
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
func changedDatagrams(ops []kernel.Op) datagrams {
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
	out := datagrams{}
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

// forgetFlows has conntrack forget the flows of published UDP ports that ops have
// changed. It is done after the change, so none comes up that is as before. That it
// failed shows nowhere but in the log: such flows go on as they were while they last.
func (k *Kernel) forgetFlows(ops []kernel.Op) {
	ports := changedDatagrams(ops)
	if len(ports) == 0 {
		return
	}
	err := k.within(k.host, func() error {
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, ports)
		return err
	})
	if err != nil {
		k.log.Warn("forget flows of published ports", "err", err)
	}
}
