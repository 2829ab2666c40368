package kerneltest

import (
	"errors"
	"fmt"
	"strings"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// set makes or changes an object, if the kernel would.
func (f *Fake) set(key kernel.Key, want kernel.Value) error {
	if err := f.place(key); err != nil {
		return err
	}
	if l, ok := key.(kernel.Link); ok {
		return f.setLink(l, want.(kernel.LinkSpec))
	}
	f.state[key] = want
	return nil
}

// place says what is missing for the object to be made where it belongs.
func (f *Fake) place(key kernel.Key) error {
	if path, ok := sandboxOf(key); ok {
		return f.placeTask(path, key)
	}
	if ns := key.Netns(); ns != "" {
		if err := f.need(kernel.Netns{Name: ns}); err != nil {
			return err
		}
	}
	switch k := key.(type) {
	case kernel.Addr:
		return f.device(k.NS, k.Dev)
	case kernel.Neigh:
		return f.device(k.NS, k.Dev)
	case kernel.Route:
		return f.device(k.NS, k.Dev)
	case kernel.Sysctl:
		if dev := k.Dev(); dev != "" {
			return f.device(k.NS, dev)
		}
	case kernel.FDB:
		spec, ok := f.state[kernel.Link{NS: k.NS, Name: k.Dev, Kind: kernel.VXLAN}].(kernel.LinkSpec)
		if !ok {
			spec, ok = f.state[kernel.Link{NS: k.NS, Name: k.Dev, Kind: kernel.Veth}].(kernel.LinkSpec)
		}
		if !ok {
			return missing("device " + k.Dev)
		}
		if spec.Master == "" {
			return missing("bridge of " + k.Dev)
		}
	case kernel.FilterPeer:
		return f.need(kernel.Filter{})
	case kernel.Member:
		return f.need(kernel.BridgeTable{NS: k.NS})
	case kernel.VIP:
		return f.need(kernel.BridgeTable{NS: k.NS})
	case kernel.Slot:
		if vip, ok := f.state[kernel.VIP{NS: k.NS, IP: k.VIP}].(kernel.VIPSpec); !ok || k.Slot >= vip.Slots {
			return missing(fmt.Sprintf("place for slot %d of VIP %s", k.Slot, k.VIP))
		}
	case kernel.Alive:
		return f.need(kernel.VIP{NS: k.NS, IP: k.VIP})
	case kernel.Other:
		return f.need(kernel.VIP{NS: k.NS, IP: k.VIP})
	case kernel.Port:
		return f.need(kernel.VIP{NS: k.NS, IP: k.VIP})
	case kernel.Real:
		return f.need(kernel.BridgeTable{NS: k.NS})
	case kernel.Back:
		return f.need(kernel.BackTable{NS: k.NS})
	case kernel.MeshNet, kernel.MeshPort, kernel.MeshRange, kernel.MeshMasq, kernel.MeshAllow:
		return f.need(kernel.MeshTable{})
	case kernel.GuardPort:
		return f.need(kernel.GuardTable{NS: k.NS})
	case kernel.GuardAddr:
		return f.need(kernel.GuardTable{NS: k.NS})
	case kernel.LiftFrom:
		return f.need(kernel.LiftTable{NS: k.NS})
	case kernel.LiftTo:
		return f.need(kernel.LiftTable{NS: k.NS})
	case kernel.Mark:
		return f.need(kernel.MarkTable{NS: k.NS})
	case kernel.IPVSDest:
		return f.need(kernel.IPVSService{NS: k.NS, Mark: k.Mark})
	}
	return nil
}

func (f *Fake) placeTask(path string, key kernel.Key) error {
	if !f.sandboxes[path] {
		return missing(fmt.Sprintf("task's namespace %q", path))
	}
	switch key.(type) {
	case kernel.TaskVIP, kernel.TaskPort, kernel.TaskMesh:
		return f.need(kernel.TaskTable{Sandbox: path})
	}
	return nil
}

func (f *Fake) need(key kernel.Key) error {
	if _, ok := f.state[key]; !ok {
		return missing(key.String())
	}
	return nil
}

func missing(what string) error { return fmt.Errorf("%s %w", what, kernel.ErrNotExist) }

// device looks for a link of any kind.
func (f *Fake) device(ns, name string) error {
	for _, kind := range []kernel.LinkKind{kernel.Bridge, kernel.VXLAN, kernel.Veth} {
		if _, ok := f.state[kernel.Link{NS: ns, Name: name, Kind: kind}]; ok {
			return nil
		}
	}
	for _, v := range f.state {
		if spec, ok := v.(kernel.LinkSpec); ok && ns == "" && spec.Kept && spec.Peer == name {
			return nil
		}
	}
	return missing("device " + name)
}

// setLink makes or changes a device.
func (f *Fake) setLink(key kernel.Link, want kernel.LinkSpec) error {
	if err := checkSpec(key, want); err != nil {
		return err
	}
	if want.Master != "" {
		if err := f.need(kernel.Link{NS: key.NS, Name: want.Master, Kind: kernel.Bridge}); err != nil {
			return err
		}
	}
	have, there := f.state[key].(kernel.LinkSpec)
	if err := f.clash(key, want); err != nil {
		return err
	}
	switch {
	case !there:
		// The name may be another kind's: a device is made anew.
		for _, kind := range []kernel.LinkKind{kernel.Bridge, kernel.VXLAN, kernel.Veth} {
			if old := (kernel.Link{NS: key.NS, Name: key.Name, Kind: kind}); f.state[old] != nil {
				f.remove(old)
			}
		}
	case key.Kind == kernel.VXLAN && (have.VNI != want.VNI || have.Port != want.Port || have.Local != want.Local):
		f.remove(key) // made anew: what was on it is lost
	case have.Master != want.Master:
		f.halve(key)
	}
	if there && have.Peer == "" {
		want.Peer, want.PeerMAC = "", model.MAC{} // taken: not ours to change
	}
	want.Taken = false // no kernel can show it
	f.state[key] = want
	return nil
}

// clash looks for what exists once per host: a VNI on a port, and the name of a
// container's end.
func (f *Fake) clash(key kernel.Link, want kernel.LinkSpec) error {
	if name, ok := f.foreign[vxlanID{want.VNI, want.Port}]; ok && key.Kind == kernel.VXLAN {
		return fmt.Errorf("VNI %d on UDP port %d %w by %s; choose another", want.VNI, want.Port, kernel.ErrTaken, name)
	}
	for k, v := range f.state {
		l, ok := k.(kernel.Link)
		if !ok || l == key || l.Kind != key.Kind {
			continue
		}
		spec := v.(kernel.LinkSpec)
		if key.Kind == kernel.VXLAN && spec.VNI == want.VNI && spec.Port == want.Port {
			return fmt.Errorf("VNI %d on UDP port %d %w by %s; choose another", want.VNI, want.Port, kernel.ErrTaken, l)
		}
		if key.Kind == kernel.Veth && want.Peer != "" && spec.Peer == want.Peer && f.state[key] == nil {
			return fmt.Errorf("the name %s %w by %s", want.Peer, kernel.ErrTaken, l)
		}
	}
	return nil
}

// checkSpec refuses what would not read back as it was given.
func checkSpec(key kernel.Link, s kernel.LinkSpec) error {
	switch {
	case !strings.HasPrefix(s.Alias, "sluice "):
		return fmt.Errorf("alias %q is not sluice's", s.Alias)
	case s.MTU <= 0:
		return errors.New("no MTU")
	case (key.Kind == kernel.Bridge) == s.MAC.IsZero():
		return errors.New("a MAC is for bridges, and they need one")
	case key.Kind == kernel.VXLAN && (s.VNI == 0 || s.Port == 0 || !s.Local.IsValid()):
		return errors.New("a VXLAN device needs VNI, port and local address")
	case key.Kind == kernel.Veth && (s.Peer == "" || s.PeerMAC.IsZero() || s.Master == ""):
		return errors.New("a veth pair needs a bridge, and name and MAC of the container's end")
	}
	return nil
}
