package ipam

import (
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"sluice/internal/model"
	"sluice/ipam/pool"
)

// This file has several clients call one process at once, and porcupine find an order
// of the calls that the specification allows. leaders_test.go has several managers.

// subnets of the histories: the first two overlap.
var subnets = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/28"), netip.MustParsePrefix("10.1.0.0/27"), netip.MustParsePrefix("10.2.0.0/29")}

// call is one call of a client. Addresses are offsets in the subnet; 0 is any.
type call struct {
	verb   string // pool, relpool, gw, any, ask, rel, bind, free, confirm, restart
	pool   int
	net    int
	addr   int
	serial bool
	live   uint32
}

type answer struct {
	ok   bool
	addr int
}

// state is what the specification remembers, by subnet.
type state [3]poolState

// poolState has the leases of a subnet as bits, to be compared at every step of the
// search.
type poolState struct {
	there, claimed bool
	owner, gw      int // 0: none
	used           uint32
	old            uint32 // leased before the last replay, as the journal has it
	open           uint32 // unconfirmed
	given          uint32 // to somebody who asked since
}

// TestConcurrentCallsAreLinearizable: whatever several clients call at once, over ends
// of the process at any commit, is as if the calls had come one after the other, each
// between its begin and its end; those that were acknowledged outlive the process, and
// those that failed had no effect.
func TestConcurrentCallsAreLinearizable(t *testing.T) {
	restarts := 0
	for seed := range uint64(200) { // 20 ms each
		h, n := record(t, seed, flaw{})
		if restarts += n; h.verdict(specification()) != porcupine.Ok {
			t.Fatalf("seed %d: no order of these calls is right, or found in a second:\n%s", seed, h)
		}
	}
	if restarts < 50 {
		t.Errorf("only %d restarts", restarts)
	}
}

// TestTheCheckFindsPlantedMistakes: each is found within as many histories as are run
// without one.
func TestTheCheckFindsPlantedMistakes(t *testing.T) {
	for name, f := range map[string]flaw{
		"the next address is looked up and taken without a lock between": {verbs: func(a *Allocator) verbs { return twoSteps{a} }},
		"a release is applied before it is in the journal":               {verbs: func(a *Allocator) verbs { return early{a} }},
		"answers before the journal is written":                          {journal: func(j Journal) Journal { return &lazy{Journal: j} }},
		"a lease is not in the journal": {journal: func(j Journal) Journal {
			return dropping{j, func(r Record) bool { return r.Kind == KindLease }}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(200) {
				if h, _ := record(t, seed, f); h.verdict(specification()) == porcupine.Illegal {
					t.Logf("found by seed %d", seed)
					return
				}
			}
			t.Error("not found")
		})
	}
}

// record runs a history with that seed and returns it with the number of restarts.
func record(t *testing.T, seed uint64, f flaw) (h *history, restarts int) {
	const clients, calls = 5, 14 // of 70 calls, an order is found in a millisecond
	p := newProcess(t, seed, f, true)
	h = &history{}
	var life sync.RWMutex // held for reading in a call, for writing while the process starts over
	var broken error      // the process could not start over; guarded by life
	var wg sync.WaitGroup
	for c := range clients {
		rnd := rand.New(rand.NewPCG(seed, uint64(c)))
		wg.Go(func() {
			for range calls {
				in := anyCall(rnd)
				life.RLock()
				if broken == nil {
					h.call(c, in, func() (any, bool) { return p.do(t, in) })
				}
				dead := p.j.dead.Load()
				life.RUnlock()
				if !dead {
					continue
				}
				life.Lock()
				if broken == nil && p.j.dead.Load() {
					restarts++
					h.call(c, call{verb: "restart"}, func() (any, bool) {
						broken = p.restart()
						return answer{ok: broken == nil}, true
					})
				}
				life.Unlock()
			}
		})
	}
	wg.Wait()
	if broken != nil {
		t.Logf("seed %d: the process does not start again: %v", seed, broken)
	}
	p.remove(t)
	return h, restarts
}

func anyCall(rnd *rand.Rand) call {
	names := []string{"pool", "pool", "relpool", "gw", "gw", "any", "any", "any", "any", "any", "ask", "ask", "ask", "ask", "rel", "rel", "rel", "bind", "bind", "free", "confirm"}
	in := call{verb: names[rnd.IntN(len(names))], net: 1 + rnd.IntN(2), serial: rnd.IntN(2) == 0, live: rnd.Uint32()}
	if in.pool = rnd.IntN(5); in.pool > 2 {
		in.pool = 0
	}
	size := 1 << (32 - subnets[in.pool].Bits())
	switch in.verb {
	case "ask", "rel":
		in.addr = 1 + rnd.IntN(min(size, 9)) // few, so that calls meet
	case "gw":
		in.addr = rnd.IntN(3)
	}
	return in
}

// do makes a call. One that failed with its commit had no effect, if all is right, and
// is not told of.
func (p *process) do(t *testing.T, in call) (any, bool) {
	ctx, subnet := t.Context(), subnets[in.pool]
	id := pool.ID{Space: GlobalSpace, Subnet: subnet}.String()
	at := func(i int) string {
		b := subnet.Addr().As4()
		b[3] += byte(i)
		return netip.AddrFrom4(b).String()
	}
	network := model.NetworkID(fmt.Sprint("n", in.net))
	var reply AddressReply
	var err error
	switch in.verb {
	case "pool":
		_, err = p.RequestPool(ctx, PoolRequest{Space: GlobalSpace, Pool: subnet.String()})
	case "relpool":
		err = p.ReleasePool(ctx, ReleasePoolRequest{id})
	case "any", "ask", "gw":
		r := AddressRequest{PoolID: id, Options: map[string]string{}}
		if in.addr > 0 {
			r.Address = at(in.addr)
		}
		if in.serial {
			r.Options[pool.KeySerial] = "true"
		}
		if in.verb == "gw" {
			r.Options[pool.KeyAddressType] = pool.TypeGateway
		}
		reply, err = p.RequestAddress(ctx, r)
	case "rel":
		err = p.ReleaseAddress(ctx, ReleaseAddressRequest{id, at(in.addr)})
	case "bind":
		err = p.Bind(ctx, network, subnet, true)
	case "free":
		err = p.Free(ctx, network)
	case "confirm":
		var live []netip.Addr
		for i := range 1 << (32 - subnet.Bits()) {
			if in.live&(1<<i) != 0 {
				live = append(live, netip.MustParseAddr(at(i)))
			}
		}
		// Asked for later than any release; what older lists do is for leaders_test.go.
		_, err = p.Confirm(ctx, network, live, time.Now().Add(time.Hour))
	}
	switch {
	case errors.Is(err, errFault), errors.Is(err, errEnded):
		return answer{}, false
	case err != nil:
		if refusal := (*pool.Error)(nil); !errors.As(err, &refusal) {
			t.Errorf("%+v: %v", in, err)
		}
		return answer{}, true
	}
	out := answer{ok: true}
	if reply.Address.IsValid() {
		out.addr = int(reply.Address.Addr().As4()[3] - subnet.Addr().As4()[3])
	}
	return out, true
}

// specification is what the allocator of a swarm should do with call after call.
func specification() porcupine.Model {
	return porcupine.Model{
		Init: func() any { return state{} },
		Step: func(s, in, out any) (bool, any) {
			next, got := s.(state), out.(answer)
			ok, want := next.step(in.(call), got)
			return ok == got.ok && (!ok || want == got.addr), next
		},
	}
}

// step does one call and returns whether it succeeds, with which address. Of the free
// ones, any is right that the process chose.
func (s *state) step(in call, got answer) (ok bool, addr int) {
	p := &s[in.pool]
	usable := uint32(1)<<(1<<(32-subnets[in.pool].Bits())-1) - 2 // neither network nor broadcast address
	mine := uint32(1) << in.addr
	gw := uint32(0)
	if p.gw != 0 {
		gw = 1 << p.gw
	}
	forget := func(bits uint32) {
		p.used, p.old, p.open, p.given = p.used&^bits, p.old&^bits, p.open&^bits, p.given&^bits
	}
	overlaps := func() bool {
		for i, subnet := range subnets {
			if i != in.pool && s[i].there && subnet.Overlaps(subnets[in.pool]) {
				return true
			}
		}
		return false
	}
	owned := slices.IndexFunc(s[:], func(o poolState) bool { return o.there && o.owner == in.net })
	lease := func(bit uint32) {
		forget(bit)
		p.used, p.given = p.used|bit, p.given|bit
	}
	switch in.verb {
	case "pool":
		if !p.there && overlaps() {
			return false, 0
		}
		p.there, p.claimed = true, p.owner != 0
	case "relpool":
		if p.claimed = false; p.owner == 0 {
			*p = poolState{}
		}
	case "any":
		free := usable &^ p.used &^ gw
		if !p.there || free == 0 {
			return false, 0
		}
		if bit := uint32(1) << got.addr; got.ok && free&bit != 0 {
			lease(bit)
			return true, got.addr
		}
		return true, -1 // it has to succeed, with another
	case "ask":
		taken := p.used&mine != 0
		switch {
		case !p.there, usable&mine == 0, mine == gw:
			return false, 0
		case taken && (p.owner == 0 && !in.serial || p.owner != 0 && p.given&mine != 0):
			return false, 0
		case taken:
			p.open, p.given = p.open&^mine, p.given|mine
		default:
			lease(mine)
		}
		return true, in.addr
	case "gw":
		switch {
		case !p.there, in.addr != 0 && usable&mine == 0:
			return false, 0
		case p.gw != 0 && (in.addr == 0 || in.addr == p.gw):
			return true, p.gw
		case p.gw != 0 && p.owner != 0:
			return false, 0
		}
		if in.addr == 0 {
			free := usable &^ p.used
			if free == 0 {
				return false, 0
			}
			in.addr = bits.TrailingZeros32(free)
		}
		forget(1 << in.addr)
		p.gw = in.addr
		return true, p.gw
	case "rel":
		if p.there && p.used&mine != 0 {
			forget(mine)
		} else if p.there && mine == gw && p.owner == 0 {
			p.gw = 0
		}
	case "bind":
		switch {
		case owned >= 0 && owned != in.pool, !p.there && overlaps(), p.owner != 0 && p.owner != in.net:
			return false, 0
		}
		p.there, p.owner, p.claimed = true, in.net, false
		if p.used != 0 {
			p.old, p.open, p.given = p.used, p.used, 0
		}
	case "free":
		if owned < 0 {
			break
		}
		if p = &s[owned]; p.claimed {
			p.owner, p.claimed, p.used, p.old, p.open, p.given = 0, false, 0, 0, 0, 0
		} else {
			*p = poolState{}
		}
	case "confirm":
		if owned < 0 {
			return false, 0
		}
		// The list was made for the subnet of the call; the addresses of another do not
		// lie in this one, but for the two that overlap and begin alike.
		p = &s[owned]
		size := 1 << (32 - max(subnets[owned].Bits(), subnets[in.pool].Bits()))
		live := in.live & (1<<size - 1) & (uint32(1)<<(1<<(32-subnets[owned].Bits())-1) - 2)
		if subnets[owned].Addr() != subnets[in.pool].Addr() {
			live = 0
		}
		forget(p.open &^ live)
		p.open &^= live
		if p.gw != 0 {
			live &^= 1 << p.gw
		}
		adopted := live &^ p.used
		p.used, p.old, p.open = p.used|adopted, p.old|adopted, p.open|adopted
	case "restart":
		for i := range s {
			s[i].claimed, s[i].given, s[i].open = false, 0, s[i].old
		}
	}
	return true, 0
}
