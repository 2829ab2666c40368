package nft

import (
	"fmt"
	"net/netip"

	"sluice/internal/kernel"
)

// present is the data of an element that is there; in a set, that is all of it.
//
//go:fix inline
func present(data string) *string { return new(data) }

// want4 is an error unless all addresses are IPv4: that is what the tables know.
func want4(what kernel.Key, addrs ...netip.Addr) error {
	for _, a := range addrs {
		if !a.Is4() {
			return fmt.Errorf("%s: address %s is not IPv4: %w", what, a, kernel.ErrUnsupported)
		}
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
		if err := want4(k, k.VIP); err != nil {
			return err
		}
		c.elem(op, setAlive, ipKey(k.VIP)+macKey(k.MAC), "", "")
	case kernel.Member:
		have, want, err := cast[kernel.MemberSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.IP); err != nil {
			return err
		}
		// The MAC is part of the element's key.
		ip := ipKey(k.IP)
		if op.Have != nil {
			c.put(setMembers, ip+macKey(have.MAC), new(""), nil)
		}
		if op.Want != nil {
			var there *string
			if op.Have != nil && have == want {
				there = new("")
			}
			c.put(setMembers, ip+macKey(want.MAC), there, new(""))
		}
		c.alone[setMembers] = append(c.alone[setMembers], ip)
		c.sure = c.sure && (op.Have == nil || !have.MAC.IsZero())
	case kernel.Other:
		have, want, err := cast[kernel.OtherSpec](op)
		if err != nil {
			return err
		}
		if err := want4(k, k.VIP, k.Client); err != nil {
			return err
		}
		c.elem(op, mapOthers, ipKey(k.Client)+ipKey(k.VIP), macData(have.MAC), macData(want.MAC))
	case kernel.Port, kernel.Real:
		return c.natOp(op)
	default:
		return fmt.Errorf("%s is not of table bridge %s", k, tableName)
	}
	return nil
}

// vipOp adds an operation on a VIP. Its elements are the same whatever its spec
// is: only creating and deleting it touches them.
func (c *change) vipOp(k kernel.VIP, op kernel.Op) error {
	have, want, err := cast[kernel.VIPSpec](op)
	if err != nil {
		return err
	}
	name, key := pickChain(k.IP), ipKey(k.IP)
	c.elem(op, setVIPs, key, "", "")
	c.elem(op, mapPick, key, jumpTo(name), jumpTo(name))
	c.put(setNAT, key, flag(op.Have != nil && have.NAT), flag(op.Want != nil && want.NAT))
	c.sure = c.sure && (op.Have == nil || have != kernel.VIPSpec{})
	if op.Want == nil {
		c.picks[name] = nil
		return nil
	}
	r, err := pickRule(k.IP, want)
	if err != nil {
		return err
	}
	c.picks[name] = &r
	return nil
}

// taskOp adds an operation on an object in table ip sluice.
func (c *change) taskOp(op kernel.Op) error {
	k, ok := op.Key.(kernel.TaskVIP)
	if !ok {
		return fmt.Errorf("%s is not of table ip %s", op.Key, tableName)
	}
	have, want, err := cast[kernel.TaskVIPSpec](op)
	if err != nil {
		return err
	}
	if err := want4(k, k.VIP); err != nil {
		return err
	}
	data := func(v kernel.Value, s kernel.TaskVIPSpec) (in, loop *string, err error) {
		if v == nil {
			return nil, nil, nil
		}
		if err := want4(k, s.Addr); err != nil {
			return nil, nil, err
		}
		in = new(ipKey(s.Addr))
		if s.Loop {
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
	c.put(mapIn, ipKey(k.VIP), inHave, inWant)
	c.put(mapLoop, ipKey(k.VIP), loopHave, loopWant)
	return nil
}
