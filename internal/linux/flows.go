package linux

import (
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

// forgetFlows has conntrack forget the flows of published UDP ports that ops have
// changed. It is done after the change, so none comes up that is as before. That it
// failed shows nowhere but in the log: such flows go on as they were while they last.
func (k *Kernel) forgetFlows(ops []kernel.Op) {
	ports := datagrams{}
	for _, o := range ops {
		if p, ok := o.Key.(kernel.MeshPort); ok && p.Proto == model.UDP {
			ports[p.Port] = true
		}
	}
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
