package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// ours reports whether a device carries our mark.
func (d device) ours() bool { return strings.HasPrefix(d.alias, aliasPrefix) }

// doomed is the device group that deleteOurs puts devices in. Groups are numbers
// without owner, but in our namespaces there is nobody else: any but 0, which is
// every device's at first, would do. These are the letters "slc".
const doomed = 0x736c63

// deleteOurs deletes all devices of ours that which says. In our namespaces they
// go as a group: one wait for RCU (17-20 ms) instead of one for each. In the
// host's the group might be somebody's, so they go one by one.
func (s *space) deleteOurs(which func(device) bool) error {
	clear(s.devices)
	ls, err := s.conn.links("")
	if err != nil {
		return err
	}
	var group []device
	for _, d := range ls {
		if d.ours() && which(d) {
			group = append(group, d)
		}
	}
	if s.name == "" || len(group) < 2 {
		for _, d := range group {
			if err := s.conn.delLink(d.index); err != nil {
				return err
			}
		}
		return nil
	}
	mark := nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(doomed))
	for _, d := range group {
		if err := s.conn.setLink(d.name, 0, []*nl.RtAttr{mark}); err != nil && !errors.Is(err, kernel.ErrNotExist) {
			return err
		}
	}
	req := s.conn.request(unix.RTM_DELLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(mark)
	return absentOK(s.conn.do(req))
}

// device is a link by name, as it was when this Apply first asked.
func (s *space) device(name string) (device, error) {
	if d, ok := s.devices[name]; ok {
		return d, nil
	}
	d, err := s.conn.link(name)
	if err == nil {
		s.devices[name] = d
	}
	return d, err
}

// forget drops what a change of a device of that kind makes stale. Nothing refers
// to a veth; a bridge is the master of the others.
func (s *space) forget(kind kernel.LinkKind) {
	if kind != kernel.Veth {
		clear(s.devices)
	}
}

// applyLink makes or changes a device. What is there is looked at anew: creating
// what exists repairs it.
func (k *Kernel) applyLink(s *space, key kernel.Link, want kernel.Value) error {
	defer s.forget(key.Kind)
	d, err := s.conn.link(key.Name)
	missing := errors.Is(err, kernel.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	spec := want.(kernel.LinkSpec)
	if err := k.checkSpec(key, spec); err != nil {
		return err
	}
	if !missing && d.alias == "" && key.NS != "" {
		// Nobody but us makes devices in our namespaces, and one without alias
		// is what an earlier attempt left between making and marking it.
		k.log.Info("replace half-made device", "op", key.String())
		if err := s.conn.delLink(d.index); err != nil {
			return err
		}
		missing = true
	}
	if !missing && !d.ours() {
		return fmt.Errorf("the name %w by a %s device that is not sluice's; delete it", kernel.ErrTaken, d.kind)
	}
	if !missing {
		reason := incompatible(d, key, spec)
		if reason == "" && spec.Kept {
			if reason, err = k.lost(s, d); err != nil {
				return err
			}
		}
		if reason == "" {
			return k.changeLink(s, d, key, spec)
		}
		k.log.Info("make device anew", "op", key.String(), "reason", reason)
		if err := s.conn.delLink(d.index); err != nil {
			return err
		}
	}
	switch key.Kind {
	case kernel.Bridge:
		err = s.conn.newLink(key.Name, 0, []*nl.RtAttr{macAttr(spec), kindAttr("bridge", func(data *nl.RtAttr) {
			data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
		})})
	case kernel.VXLAN:
		err = k.newVXLAN(s, key, spec)
	case kernel.Veth:
		err = k.newVeth(s, key, spec)
	}
	if err != nil {
		return unsupported(err, key.Kind)
	}
	// Marking and setting up comes second: the kernel ignores the ifalias of a
	// new device, and a port must be quiet before it is up.
	if d, err = s.conn.link(key.Name); err == nil {
		err = k.changeLink(s, d, key, spec)
	}
	if err != nil {
		return errors.Join(err, s.conn.delLink(d.index)) // nothing half-made
	}
	return nil
}

// checkSpec refuses what could be made but would never compare equal when read
// back, and what the kernel would fill in by itself.
func (k *Kernel) checkSpec(key kernel.Link, s kernel.LinkSpec) error {
	switch {
	case !strings.HasPrefix(s.Alias, aliasPrefix):
		return fmt.Errorf("alias %q does not start with %q, the mark of what is sluice's", s.Alias, aliasPrefix)
	case s.MTU <= 0:
		return errors.New("no MTU is given")
	case key.Kind == kernel.Bridge && s.MAC.IsZero():
		return errors.New("no MAC is given; a bridge without one changes it with its ports")
	case key.Kind != kernel.Bridge && !s.MAC.IsZero():
		return errors.New("a MAC is given; the kernel chooses it for all devices but bridges")
	case key.Kind == kernel.VXLAN && (s.VNI == 0 || s.Port == 0 || !s.Local.Is4()):
		return errors.New("a VXLAN device needs VNI, port and an IPv4 local address")
	case key.Kind == kernel.Veth && (s.Peer == "" || s.PeerMAC.IsZero()):
		return errors.New("a veth pair needs name and MAC of the container's end")
	case s.Kept && (key.Kind != kernel.Veth || !k.isMesh(s.Peer)):
		return fmt.Errorf("the end of a pair that is kept is called %q; want a name that starts with %q", s.Peer, k.cfg.MeshPrefix)
	case !s.Kept && k.isMesh(s.Peer):
		return fmt.Errorf("the container's end is called %q: names that start with %q are of ends that are kept", s.Peer, k.cfg.MeshPrefix)
	}
	return nil
}

// incompatible says why a device cannot become what is wanted without being made
// anew; empty if it can.
func incompatible(d device, key kernel.Link, want kernel.LinkSpec) string {
	if d.kind != string(key.Kind) {
		return fmt.Sprintf("kind: %s, want %s", d.kind, key.Kind)
	}
	if key.Kind != kernel.VXLAN {
		return ""
	}
	switch {
	case d.vni != want.VNI:
		return fmt.Sprintf("vni: %d, want %d", d.vni, want.VNI)
	case d.port != want.Port:
		return fmt.Sprintf("port: %d, want %d", d.port, want.Port)
	case d.local != want.Local:
		return fmt.Sprintf("local: %s, want %s", d.local, want.Local)
	}
	return ""
}

// lost says that the end of a pair that is kept is not in the host's namespace; empty
// if it is.
func (k *Kernel) lost(s *space, d device) (string, error) {
	there, err := k.inHost(s, d)
	if err != nil || there {
		return "", err
	}
	return "its other end has left the host's namespace", nil
}

// changeLink brings d, which is of the right kind, to what is wanted, and up.
func (k *Kernel) changeLink(s *space, d device, key kernel.Link, want kernel.LinkSpec) error {
	as := []*nl.RtAttr{
		nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(want.Alias)),
		nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(want.MTU))),
	}
	if key.Kind == kernel.Bridge {
		as = append(as, macAttr(want))
	}
	master := 0
	if want.Master != "" {
		m, err := s.device(want.Master)
		if err != nil {
			return fmt.Errorf("master: %w", err)
		}
		master = m.index
	}
	if master != d.master {
		// First, and by itself: what follows depends on it.
		if err := s.conn.setLink(key.Name, 0, []*nl.RtAttr{masterAttr(master)}); err != nil {
			return fmt.Errorf("set master %q: %w", want.Master, err)
		}
	}
	if master != 0 && d.quiet != want.Quiet {
		as = append(as, portAttr(want.Quiet))
	}
	if key.Kind == kernel.Bridge && d.quiet != want.Quiet {
		if err := s.conn.setLink(key.Name, 0, []*nl.RtAttr{kindAttr("bridge", func(data *nl.RtAttr) {
			var opt [8]byte // the values, and which of them are meant
			binary.NativeEndian.PutUint32(opt[4:], brNoLLLearn)
			if want.Quiet {
				binary.NativeEndian.PutUint32(opt[:], brNoLLLearn)
			}
			data.AddRtAttr(unix.IFLA_BR_MULTI_BOOLOPT, opt[:])
		})}); err != nil {
			return fmt.Errorf("set learning from link-local frames to %t: %w", !want.Quiet, err)
		}
	}
	if key.Kind == kernel.VXLAN && d.learn {
		// Never on: packets must not teach us where a MAC lives. By itself,
		// because a message with data of a VXLAN device may not give an MTU.
		if err := s.conn.setLink(key.Name, 0, []*nl.RtAttr{kindAttr("vxlan", func(data *nl.RtAttr) {
			data.AddRtAttr(nl.IFLA_VXLAN_LEARNING, []byte{0})
		})}); err != nil {
			return fmt.Errorf("set learning off: %w", err)
		}
	}
	if key.Kind == kernel.Veth {
		if err := k.changePeer(s, d, want); err != nil {
			return err
		}
	}
	err := s.conn.setLink(key.Name, unix.IFF_UP, as)
	if key.Kind == kernel.VXLAN && errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("UDP port %d %w by another program; choose another with the setting VXLAN_PORT on all nodes: %w", want.Port, kernel.ErrTaken, err)
	}
	return err
}

// changePeer sets name, MAC, MTU and alias of the container's end while it is in the
// host's namespace. Once the engine has it, it is not ours to touch.
func (k *Kernel) changePeer(s *space, d device, want kernel.LinkSpec) error {
	there, err := k.inHost(s, d)
	if err != nil || !there {
		return err
	}
	peer, err := k.host.conn.linkByIndex(d.peer)
	if errors.Is(err, kernel.ErrNotExist) {
		return nil // taken between the two looks
	}
	if err != nil {
		return err
	}
	if peer.name != want.Peer {
		req := k.host.conn.request(unix.RTM_NEWLINK, 0)
		msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
		msg.Index = int32(peer.index)
		req.AddData(msg)
		req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(want.Peer)))
		if err := k.host.conn.do(req); err != nil {
			return fmt.Errorf("rename container's end %s to %s: %w", peer.name, want.Peer, err)
		}
	}
	flags := uint32(0)
	if want.Kept {
		flags = unix.IFF_UP
	}
	err = k.host.conn.setLink(want.Peer, flags, []*nl.RtAttr{
		nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(want.Alias)),
		nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(want.MTU))),
		nl.NewRtAttr(unix.IFLA_ADDRESS, want.PeerMAC[:]),
	})
	if err != nil && !errors.Is(err, kernel.ErrNotExist) {
		return fmt.Errorf("set container's end %s: %w", want.Peer, err)
	}
	return nil
}

// inHost reports whether the other end of a veth is in the host's namespace.
func (k *Kernel) inHost(s *space, d device) (bool, error) {
	if s == k.host {
		return d.peerNS < 0, nil
	}
	if d.peerNS < 0 {
		return false, nil
	}
	if s.hostID < 0 { // ids are given on first use and never change
		id, err := s.conn.nsid(k.host.fd())
		if err != nil {
			return false, err
		}
		s.hostID = id
	}
	return d.peerNS == s.hostID, nil
}

// newVeth makes both ends where they belong by one message: the host's end as a
// port of its bridge, up; the container's end in the host's namespace, down.
func (k *Kernel) newVeth(s *space, key kernel.Link, want kernel.LinkSpec) error {
	master, err := s.device(want.Master)
	if err != nil {
		return fmt.Errorf("master: %w", err)
	}
	create := func() error {
		mtu := nl.Uint32Attr(uint32(want.MTU))
		return s.conn.newLink(key.Name, unix.IFF_UP, []*nl.RtAttr{
			nl.NewRtAttr(unix.IFLA_MTU, mtu),
			masterAttr(master.index),
			kindAttr("veth", func(data *nl.RtAttr) {
				peer := data.AddRtAttr(nl.VETH_INFO_PEER, nil)
				nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
				peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(want.Peer))
				peer.AddRtAttr(unix.IFLA_MTU, mtu)
				peer.AddRtAttr(unix.IFLA_ADDRESS, want.PeerMAC[:])
				peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(k.host.fd())))
			}),
		})
	}
	err = create()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	// The host's end was looked for before: it is the container's end that is there.
	d, lookErr := k.host.conn.link(want.Peer)
	if lookErr != nil {
		return errors.Join(err, lookErr)
	}
	if d.kind != "veth" || !d.ours() {
		return fmt.Errorf("the name %s in the host's namespace %w by a %s device that is not sluice's; delete it", want.Peer, kernel.ErrTaken, d.kind)
	}
	k.log.Info("delete orphan of an earlier pair", "op", want.Peer)
	if err := k.host.conn.delLink(d.index); err != nil {
		return err
	}
	return create()
}

// newVXLAN makes the device in s by a message to the host's namespace: the kernel
// takes the namespace of the socket that asks as the one for the UDP side, and
// the one named in the message as the device's home.
func (k *Kernel) newVXLAN(s *space, key kernel.Link, want kernel.LinkSpec) error {
	local := want.Local.As4()
	err := k.host.conn.newLink(key.Name, 0, []*nl.RtAttr{
		nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(want.MTU))),
		nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(s.fd()))),
		kindAttr("vxlan", func(data *nl.RtAttr) {
			data.AddRtAttr(nl.IFLA_VXLAN_ID, nl.Uint32Attr(uint32(want.VNI)))
			data.AddRtAttr(nl.IFLA_VXLAN_LOCAL, local[:])
			data.AddRtAttr(nl.IFLA_VXLAN_PORT, nl.BEUint16Attr(want.Port))
			data.AddRtAttr(nl.IFLA_VXLAN_LEARNING, []byte{0})
			// The inner packets have checksums; the outer one costs about 1 % of
			// all packets, more where the NIC cannot compute it for tunnels.
			data.AddRtAttr(nl.IFLA_VXLAN_UDP_CSUM, []byte{0})
		}),
	})
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	return fmt.Errorf("VNI %d on UDP port %d %w by %s; choose another VNI with the network option sluice.vni, or another port with the setting VXLAN_PORT on all nodes",
		want.VNI, want.Port, kernel.ErrTaken, k.holder(want))
}

// holder finds the device that has a VNI and port, as text for an error.
func (k *Kernel) holder(want kernel.LinkSpec) string {
	places := []*space{k.host}
	for _, s := range k.spaces {
		places = append(places, s)
	}
	for _, s := range places {
		ls, err := s.conn.links("vxlan")
		if err != nil {
			continue // this only adds to an error text
		}
		for _, d := range ls {
			if d.vni != want.VNI || d.port != want.Port {
				continue
			}
			if s == k.host {
				return fmt.Sprintf("device %s in the host's namespace", d.name)
			}
			return fmt.Sprintf("device %s in namespace %s", d.name, s.name)
		}
	}
	return "a device in a namespace that is not sluice's, or in one that is just being deleted"
}

// linkByIndex returns one link; kernel.ErrNotExist if there is none.
func (c *conn) linkByIndex(index int) (device, error) {
	req := c.request(unix.RTM_GETLINK, 0)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(extSkipStats)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if errors.Is(err, unix.ENODEV) || err == nil && len(msgs) == 0 {
		return device{}, fmt.Errorf("device %d %w", index, kernel.ErrNotExist)
	}
	if err != nil {
		return device{}, fmt.Errorf("find device %d: %w", index, err)
	}
	d, ok := parseLink(msgs[0])
	if !ok {
		return device{}, fmt.Errorf("find device %d: the kernel's answer is too short", index)
	}
	return d, nil
}

// unsupported names the module behind the errno for a kind of device that the
// kernel does not know.
func unsupported(err error, kind kernel.LinkKind) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("a %s device %w; load the module %s: %w", kind, kernel.ErrUnsupported, kind, err)
	}
	return err
}

func macAttr(s kernel.LinkSpec) *nl.RtAttr { return nl.NewRtAttr(unix.IFLA_ADDRESS, s.MAC[:]) }

func masterAttr(index int) *nl.RtAttr {
	return nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(index)))
}

// kindAttr is the part of a message that says which kind of device it is about.
func kindAttr(kind string, fill func(data *nl.RtAttr)) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated(kind))
	fill(info.AddRtAttr(nl.IFLA_INFO_DATA, nil))
	return info
}

// portAttr sets all flags of a bridge port to quiet, or back to the kernel's defaults.
func portAttr(quiet bool) *nl.RtAttr {
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	for _, q := range quietPort {
		v := byte(0)
		if q.on == quiet { // the defaults are the opposite of quiet
			v = 1
		}
		data.AddRtAttr(q.attr, []byte{v})
	}
	return info
}
