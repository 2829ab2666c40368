package linux

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// parse turns a datagram of the kernel into notices.
func (w *watcher) parse(s *earSocket, b []byte) {
	msgs, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		w.told.TellOther("unreadable news of " + inName(s.sub.name)) // are news
		return
	}
	for _, m := range msgs {
		switch {
		case s.tables:
			w.hearTable(s.sub, m)
		case strings.HasPrefix(s.sub.name, taskPrefix):
			if !s.sub.own {
				w.hearTask(s.sub, m)
			}
		default:
			w.hearObject(s.sub, m)
		}
	}
}

// interesting reports whether a device, or what is on it, may be an object of ours.
func (w *watcher) interesting(s *sub, d device) bool {
	kind := kernel.LinkKind(d.kind)
	if s.name == "" {
		// By the name alone: our mark is put on after the device is made, and of that the
		// kernel gives no notice while the device is down, as a container's end is until
		// it has left.
		return kind == kernel.Veth && (strings.HasPrefix(d.name, w.k.cfg.LinkPrefix) || w.k.isMesh(d.name))
	}
	if !d.ours() {
		return false
	}
	return kind == kernel.Bridge || kind == kernel.VXLAN || kind == kernel.Veth
}

// on is the device of that index, if what is on it is ours: on the host, only
// the ends of networks have something.
func (w *watcher) on(s *sub, index int) (device, bool) {
	d, ok := s.devices[index]
	return d, ok && (s.name != "" || w.k.isMesh(d.name))
}

// hearObject tells of links and what is on them, in the host's namespace and ours.
func (w *watcher) hearObject(s *sub, m syscall.NetlinkMessage) {
	gone := false
	switch m.Header.Type {
	case unix.RTM_DELLINK, unix.RTM_DELADDR, unix.RTM_DELNEIGH, unix.RTM_DELROUTE:
		gone = true
	}
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		w.hearLink(s, m.Data, gone)
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		a, ok := parseAddr(m.Data)
		d, ours := w.on(s, a.index)
		if ok && ours && a.prefix.Addr().Is4() {
			w.tell(kernel.Addr{NS: s.name, Dev: d.name, Prefix: a.prefix}, kernel.AddrSpec{}, gone)
		}
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		n, ok := parseNeigh(m.Data)
		d, ours := w.on(s, n.index)
		switch {
		case !ok || !ours:
		case m.Data[0] == unix.AF_INET:
			w.tell(kernel.Neigh{NS: s.name, Dev: d.name, IP: n.ip}, kernel.NeighSpec{MAC: n.mac}, gone || n.state&unix.NUD_PERMANENT == 0)
		case m.Data[0] == unix.AF_BRIDGE:
			w.hearFDB(s, d, n, gone)
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(m.Data) < unix.SizeofRtMsg || m.Data[0] != unix.AF_INET {
			return
		}
		r, ours := parseRoute(m.Data)
		if !ours {
			if m.Header.Flags&unix.NLM_F_REPLACE == 0 || gone {
				return
			}
			// Somebody put a route of his own in the place of one that may be ours.
			m.Data[rtmProtocol] = routeProtocol
			r, _ = parseRoute(m.Data)
			gone = true
		}
		if d, ours := w.on(s, r.index); ours && r.prefix.IsValid() {
			w.tell(kernel.Route{NS: s.name, Dev: d.name, Prefix: r.prefix}, r.spec(), gone)
		}
	case unix.RTM_NEWNETCONF:
		w.hearNetconf(s, m.Data)
	}
}

func (w *watcher) tell(k kernel.Key, now kernel.Value, gone bool) {
	if gone {
		now = nil
	}
	w.told.Tell(k, now)
}

// hearLink tells of a link.
func (w *watcher) hearLink(s *sub, b []byte, gone bool) {
	if len(b) < unix.SizeofIfInfomsg {
		return
	}
	if b[0] == unix.AF_BRIDGE {
		if !gone { // a port that left its bridge is told as a link too
			w.hearPort(s, b)
		}
		return
	}
	d, _ := parseLink(b)
	was, known := s.devices[d.index]
	ours := w.interesting(s, d) && !gone
	if known && (!ours || was.name != d.name) {
		w.told.Tell(kernel.Link{NS: s.name, Name: was.name, Kind: kernel.LinkKind(was.kind)}, nil)
		delete(s.devices, d.index)
	}
	if ours {
		w.tellLink(s, d)
	}
}

// hearPort tells of the flags of a bridge's port, which the bridge does.
func (w *watcher) hearPort(s *sub, b []byte) {
	d, known := s.devices[int(int32(binary.NativeEndian.Uint32(b[4:])))]
	if !known {
		return
	}
	attrs(b[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) {
		if typ == unix.IFLA_PROTINFO {
			d.quiet = isQuiet(v) && !d.learn
			w.tellLink(s, d)
		}
	})
}

func (w *watcher) tellLink(s *sub, d device) {
	s.devices[d.index] = d
	w.told.Tell(kernel.Link{NS: s.name, Name: d.name, Kind: kernel.LinkKind(d.kind)}, specOf(d, s.devices[d.master].name))
}

// hearFDB tells of half of a forwarding entry, as dumpFDB reads them. That the
// bridge's half is there is not told: it would hide that the other has gone.
func (w *watcher) hearFDB(s *sub, d device, n neigh, gone bool) {
	if d.kind != "vxlan" && d.kind != "veth" || n.mac[0]&1 != 0 {
		return
	}
	key := kernel.FDB{NS: s.name, Dev: d.name, MAC: n.mac}
	static := n.state&unix.NUD_NOARP != 0 && n.state&unix.NUD_PERMANENT == 0
	switch {
	case d.kind == "veth":
		if n.master != 0 {
			w.tell(key, kernel.FDBSpec{}, gone || !static)
		}
	case n.master == 0:
		if n.state&(unix.NUD_PERMANENT|unix.NUD_NOARP) == 0 {
			n.ip = netip.Addr{} // will age: as good as missing
		}
		w.tell(key, kernel.FDBSpec{VTEP: n.ip}, gone)
	case n.state&unix.NUD_PERMANENT != 0: // the port's own MAC
	case gone || !static:
		w.told.Tell(key, nil)
	}
}

// From include/uapi/linux/netconf.h.
const (
	sizeofNetconf     = 4 // struct netconfmsg, padded
	netconfIndex      = 1 // NETCONFA_IFINDEX
	netconfForwarding = 2 // NETCONFA_FORWARDING
	netconfRPFilter   = 3 // NETCONFA_RP_FILTER
	netconfAll        = -1
	netconfDefault    = -2
)

// hearNetconf tells of those sysctls that the kernel gives notice of.
func (w *watcher) hearNetconf(s *sub, b []byte) {
	if len(b) < sizeofNetconf || b[0] != unix.AF_INET || s.name == "" {
		return
	}
	place := ""
	values := map[string]string{}
	attrs(b[sizeofNetconf:], func(typ uint16, v []byte) {
		switch n := int(int32(u32(v))); typ {
		case netconfIndex:
			switch n {
			case netconfAll:
				place = "all"
			case netconfDefault:
				place = "default"
			default:
				place = strings.ReplaceAll(s.devices[n].name, ".", "/")
			}
		case netconfForwarding:
			values["forwarding"] = strconv.Itoa(n)
		case netconfRPFilter:
			values["rp_filter"] = strconv.Itoa(n)
		}
	})
	if place == "" {
		return
	}
	for name, value := range values {
		key := "net.ipv4.conf." + place + "." + name
		if place == "all" && name == "forwarding" {
			key = "net.ipv4.ip_forward" // the same variable, which is written by this name
		}
		w.told.Tell(kernel.Sysctl{NS: s.name, Name: key}, kernel.SysctlSpec{Value: value})
	}
}

// hearTask tells of a task's tunnels, and of routes and rules of ours there.
func (w *watcher) hearTask(s *sub, m syscall.NetlinkMessage) {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if d, ok := parseLink(m.Data); ok && d.ours() && strings.HasPrefix(d.name, kernel.TaskTunnelPrefix) {
			w.told.TellOther("device " + d.name + " in " + s.name)
		}
	case unix.RTM_DELROUTE, unix.RTM_NEWROUTE:
		if r, ok := parseRoute(m.Data); ok {
			w.told.TellOther("route to " + r.prefix.String() + " in " + s.name)
		}
	case unix.RTM_DELRULE, unix.RTM_NEWRULE:
		if r, ok := parseRule(m.Data); ok {
			w.told.TellOther("rule for table " + strconv.Itoa(int(r.table)) + " in " + s.name)
		}
	}
}

// Of include/uapi/linux/netfilter/nf_tables.h: attributes of rules, chains and of the
// end of a transaction. All that are objects name their table by attribute 1.
const (
	sizeofNfgen  = 4 // struct nfgenmsg
	nftaTable    = 1
	nftaRuleIn   = 2 // NFTA_RULE_CHAIN
	nftaChain    = 3 // NFTA_CHAIN_NAME
	nftaGenPID   = 2 // NFTA_GEN_PROC_PID
	nftaGenName  = 3 // NFTA_GEN_PROC_NAME
	subsysTables = unix.NFNL_SUBSYS_NFTABLES
)

// hearTable tells of changes to tables that are ours and to chains of iptables that we
// have something in. The kernel numbers the sender's socket, by its process if that has
// no other (netlink(7)): what we send comes from our own number or a negative one.
func (w *watcher) hearTable(s *sub, m syscall.NetlinkMessage) {
	if m.Header.Type>>8 != subsysTables || len(m.Data) < sizeofNfgen {
		return
	}
	what, table, names := m.Header.Type&0xff, "", [4]string{}
	var pid uint32
	attrs(m.Data[sizeofNfgen:], func(typ uint16, v []byte) {
		switch {
		case what == unix.NFT_MSG_NEWGEN && typ == nftaGenPID && len(v) == 4:
			pid = binary.BigEndian.Uint32(v)
		case typ == nftaTable || typ == nftaRuleIn || typ == nftaChain:
			names[typ] = unix.ByteSliceToString(v)
		}
	})
	if what == unix.NFT_MSG_NEWGEN {
		s.flush(w, ", by "+names[nftaGenName]+" (process "+strconv.Itoa(int(pid))+")")
		return
	}
	table = names[nftaTable]
	port := int32(m.Header.Pid)
	switch family := m.Data[0]; {
	case w.ownTable(s, family, table):
		if s.own && (port < 0 || port == w.pid) {
			return
		}
		table = "table " + familyName(family) + " " + table
	case s.name == "" && family == unix.NFPROTO_IPV4 && table == filterTable && !w.k.cfg.NoFilter:
		chain := names[nftaRuleIn]
		if what == unix.NFT_MSG_NEWCHAIN || what == unix.NFT_MSG_DELCHAIN {
			chain = names[nftaChain]
		}
		// Ours too: iptables works in processes of its own, whose numbers we do not
		// know, and a firewall that is loaded anew comes in several waves. We change
		// something there when nodes come and go.
		if !touches(what, chain) {
			return
		}
		table = "iptables chain " + chain
		if chain == "" {
			table = "table ip " + filterTable
		}
	default:
		return
	}
	text := table + " in " + inName(s.name)
	if len(s.changed) == 0 || s.changed[len(s.changed)-1] != text {
		s.changed = append(s.changed, text)
	}
}

// touches reports whether such a change in a chain of the filter table of iptables may
// be one to what is ours. Rules that others put into INPUT are none; in FORWARD they may
// come before ours.
func touches(what uint16, chain string) bool {
	switch chain {
	case filterChain, meshChain:
		return true
	case inputChain:
		return what == unix.NFT_MSG_DELRULE || what == unix.NFT_MSG_DELCHAIN
	case forwardChain:
		return what == unix.NFT_MSG_DELRULE || what == unix.NFT_MSG_NEWRULE || what == unix.NFT_MSG_DELCHAIN
	}
	return what == unix.NFT_MSG_DELTABLE
}

// tableName is that of a table of ours, or with a dash and another word its beginning.
const tableName = "sluice"

// ownTable reports whether a table is one that Tables may make there.
func (w *watcher) ownTable(s *sub, family byte, table string) bool {
	if w.k.cfg.Tables == nil || s.name == "" && w.k.cfg.NoFilter || family != unix.NFPROTO_IPV4 && family != unix.NFPROTO_BRIDGE {
		return false
	}
	return table == tableName || strings.HasPrefix(table, tableName+"-")
}

func familyName(family byte) string {
	if family == unix.NFPROTO_BRIDGE {
		return "bridge"
	}
	return "ip"
}

// flush tells of the tables that a transaction has touched. The kernel tells of its end,
// and of who it was, in a message of its own after all others (nf_tables_commit): these
// wait for it, as each alone would have the tables mended and nobody named.
func (s *sub) flush(w *watcher, by string) {
	for _, c := range s.changed {
		w.told.TellOther(c + by)
	}
	s.changed = s.changed[:0]
}
