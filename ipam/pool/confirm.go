package pool

import (
	"net/netip"
	"time"

	"sluice/internal/model"
)

const (
	// LeakAfter is how long nobody may be known to have a lease before it is called
	// a leak. Swarm's allocator leases first and makes the task or service that has
	// the address known then: milliseconds later, unless a lead is lost in between,
	// and an election takes up to 15 s on a busy machine. Twice that.
	LeakAfter = 30 * time.Second
	// FreeAfter is how long nobody may be known to have it before it is taken back.
	// A task whose address the allocator could not make known is tried again every
	// five minutes, with that address. Three times that.
	FreeAfter = 15 * time.Minute
	// UnaskedAfter is the same for a lease that stood by the managers' lists alone: its
	// task ran or ended when the lead changed, and Swarm's new allocator, which did not
	// count it, will never release it. Two readings, so that it takes more than one that
	// is wrong; before it would be called a leak.
	UnaskedAfter = LeakAfter / 3
)

// Confirmation is what PlanConfirm found.
type Confirmation struct {
	Dropped []netip.Addr // unconfirmed and not live
	Adopted []netip.Addr // live and not leased
	Freed   []netip.Addr // leased, and nobody's for FreeAfter, or UnaskedAfter
}

// PlanConfirm compares the leases of a network with the addresses that the
// managers know of. What is unconfirmed and not among them is dropped. A live
// address without a lease, which Swarm did not replay because its task was running
// already, is leased again, unconfirmed, unless it was given back since asked, when
// the managers were asked: they may show who had it. What only an endpoint holds
// (see PlanBind) stays leased and in doubt for as long as it does: Swarm knows
// nothing of it and will never release it.
//
// What is confirmed stays, since an address may be leased before the managers'
// state shows it. But from now on it is an orphan until somebody has it, and it is
// dropped by a call with lists that were asked for FreeAfter those of the first one: two
// whole answers of the managers, minutes apart, knew nobody who has it, nor did any
// between, and no node has an endpoint with it. Who is given it then, or asks for it, begins anew;
// and as freed addresses rest, that is nobody soon. Of what nobody has asked for since
// the last replay, UnaskedAfter is enough.
//
// Addresses outside of the subnet are passed over.
// Errors: ErrUnknownNetwork.
func (t *Table) PlanConfirm(network model.NetworkID, live, held []netip.Addr, asked time.Time) (Confirmation, Change, error) {
	e := t.owned(network)
	if e == nil {
		return Confirmation{}, Change{}, refuse(ErrUnknownNetwork, "network %s owns no pool of %s; bind it first", t.name(network), t.space)
	}
	alive, there := e.among(live), e.among(held)
	var found Confirmation
	var c Change
	for i, since := range e.released {
		if since.Before(asked) {
			c.Soft.Released = append(c.Soft.Released, Release{Subnet: e.subnet, Address: at(e.subnet, i)})
		} else {
			alive.Remove(i)
		}
	}
	for i := range e.used.All() {
		a := at(e.subnet, i)
		since, orphan := e.orphans[i]
		switch known := alive.Has(i) || there.Has(i); {
		case a == e.gateway:
		case e.open.Has(i) && alive.Has(i):
			c.Soft.Confirmed = append(c.Soft.Confirmed, e.lease(a))
			c.Soft.Listed = append(c.Soft.Listed, e.lease(a))
		case e.open.Has(i) && !known:
			found.Dropped = append(found.Dropped, a)
			c.DropLeases = append(c.DropLeases, e.lease(a))
		case e.open.Has(i):
		case known && orphan:
			c.Soft.Orphans = append(c.Soft.Orphans, Orphan{Subnet: e.subnet, Address: a})
		case !known && !orphan:
			c.Soft.Orphans = append(c.Soft.Orphans, Orphan{Subnet: e.subnet, Address: a, Since: asked})
		case !known && asked.Sub(since) >= e.patience(i):
			found.Freed = append(found.Freed, a)
			c.DropLeases = append(c.DropLeases, e.lease(a))
		}
	}
	c.Leases = e.adopt(alive)
	for _, l := range c.Leases {
		found.Adopted = append(found.Adopted, l.Address)
	}
	return found, c, nil
}

// patience is how long a confirmed lease may be nobody's.
func (e *entry) patience(i uint32) time.Duration {
	if e.listed.Has(i) {
		return UnaskedAfter
	}
	return FreeAfter
}
