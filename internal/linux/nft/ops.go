package nft

import (
	"fmt"
	"net/netip"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// want4 is an error unless all addresses are IPv4: that is what the tables know.
func want4(what kernel.Key, addrs ...netip.Addr) error {
	for _, a := range addrs {
		if !a.Is4() {
			return fmt.Errorf("%s: address %s is not IPv4: %w", what, a, kernel.ErrUnsupported)
		}
	}
	return nil
}

// wantPorts is an error unless it is a protocol with ports.
func wantPorts(what kernel.Key, p model.Proto) error {
	if p.Number() == 0 {
		return fmt.Errorf("%s: protocol %q; want tcp, udp or sctp", what, p)
	}
	return nil
}

// cast reads the two values of an operation; nil is the zero value.
func cast[V kernel.Value](op kernel.Op) (have, want V, err error) {
	var ok bool
	if op.Have != nil {
		if have, ok = op.Have.(V); !ok {
			return have, want, fmt.Errorf("%s: value is a %T, not a %T", op.Key, op.Have, have)
		}
	}
	if op.Want != nil {
		if want, ok = op.Want.(V); !ok {
			return have, want, fmt.Errorf("%s: value is a %T, not a %T", op.Key, op.Want, want)
		}
	}
	return have, want, nil
}

// elem adds what an operation means for the one element that its object is.
func (c *change) elem(op kernel.Op, set, key, have, want string) {
	var h, w *string
	if op.Have != nil {
		h = &have
	}
	if op.Want != nil {
		w = &want
	}
	c.put(set, key, h, w)
}

// flag adds what an operation means for an element of a set that is there only if
// its object's value says so.
func (c *change) flag(op kernel.Op, set, key string, have, want bool) {
	is := func(v kernel.Value, set bool) *string {
		if v == nil || !set {
			return nil
		}
		return new("")
	}
	c.put(set, key, is(op.Have, have), is(op.Want, want))
}

// keyed adds what an operation means for an object whose one element has part of the
// value in its key, which begins with prefix for no other object.
func keyed[V comparable](c *change, op kernel.Op, set, prefix string, have, want V, elem func(V) (key, data string)) {
	haveKey, haveData := elem(have)
	wantKey, wantData := elem(want)
	if op.Have != nil {
		c.put(set, haveKey, &haveData, nil)
	}
	if op.Want != nil {
		var there *string
		if op.Have != nil && haveKey == wantKey {
			there = &haveData
		}
		c.put(set, wantKey, there, &wantData)
	}
	var none V
	c.alone[set] = append(c.alone[set], prefix)
	c.sure = c.sure && (op.Have == nil || have != none)
}

// bridgeOp adds an operation on an object in table bridge sluice.
func (c *change) bridgeOp(op kernel.Op) error {
	switch k := op.Key.(type) {
	case kernel.VIP:
		if err := want4(k, k.IP); err != nil {
			return err
		}
		return c.vipOp(k, op)
	case kernel.Slot:
		have, want, err := cast[kernel.SlotSpec](op)
		if err != nil {
			return err
		}
		if k.Slot < 0 {
			return fmt.Errorf("%s: number is negative", k)
		}
		if err := want4(k, k.VIP); err != nil {
			return err
		}
		c.elem(op, mapSlots, ipKey(k.VIP)+slotKey(k.Slot), macData(have.MAC), macData(want.MAC))
	case kernel.Alive:
		have, want, err := cast[kernel.AliveSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.VIP); err != nil {
			return err
		}
		key := ipKey(k.VIP) + macKey(k.MAC)
		c.elem(op, setAlive, key, "", "")
		c.flag(op, setDrains, key, have.Drains, want.Drains)
	case kernel.Port:
		have, want, err := cast[kernel.PortSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.VIP); err != nil {
			return err
		}
		if err := wantPorts(k, k.Proto); err != nil {
			return err
		}
		c.elem(op, mapPorts, ipKey(k.VIP)+portKey(k.Proto, k.Port), portData(have.To), portData(want.To))
	case kernel.Member:
		have, want, err := cast[kernel.MemberSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.IP); err != nil {
			return err
		}
		ip := ipKey(k.IP)
		elem := func(s kernel.MemberSpec) (key, data string) { return ip + macKey(s.MAC), "" }
		keyed(c, op, setMembers, ip, have, want, elem)
	case kernel.Other:
		have, want, err := cast[kernel.OtherSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.VIP, k.Client); err != nil {
			return err
		}
		c.elem(op, mapOthers, ipKey(k.Client)+ipKey(k.VIP), macData(have.MAC), macData(want.MAC))
	case kernel.Real:
		return c.realOp(k, op)
	default:
		return fmt.Errorf("%s is not of table bridge %s", k, tableName)
	}
	return nil
}

// vipOp adds an operation on a VIP. Few of its elements depend on its spec: mostly,
// only creating and deleting it touches them.
func (c *change) vipOp(k kernel.VIP, op kernel.Op) error {
	have, want, err := cast[kernel.VIPSpec](op)
	if err != nil {
		return err
	}
	name, key := pickChain(k.IP), ipKey(k.IP)
	haveIn := vipSets(have)
	for set, in := range vipSets(want) {
		c.flag(op, set, key, haveIn[set], in)
	}
	c.elem(op, mapPick, key, jumpTo(name), jumpTo(name))
	c.sure = c.sure && (op.Have == nil || have != kernel.VIPSpec{})
	if op.Want == nil {
		c.picks[name] = nil
		delete(c.counted, name)
		return nil
	}
	if op.Have != nil {
		c.counted[name] = true
	}
	c.picks[name], err = pickRules(k.IP, want)
	return err
}
