package service

import (
	"hash/fnv"
	"net/netip"

	"sluice/internal/model"
)

// Schedulers that a plan treats in some way of its own, by their LVS names
// (ipvsadm(8)): those that the nft datapath can express. The rest of the kernel's
// go by open connections, see model.NeedsIPVS.
const (
	RR  = "rr"  // in turn
	WRR = "wrr" // in turn, by weight
	SH  = "sh"  // by the client's address
	MH  = "mh"  // by the client's address, with Maglev's table
	DH  = "dh"  // by the VIP: one backend for all
	FO  = "fo"  // failover: the one with the highest weight
)

// Scheduler is the one that a datapath uses for a service, and why it is not the
// one that was asked for; empty if it is.
func Scheduler(x *Virtual, datapath string) (used, why string) {
	switch {
	case datapath == IPVS && x.Scheduler == DH:
		// With weights that follow from the VIP: see order.
		return FO, "dh of ip_vs refuses everybody while its backend leaves; fo has one backend for all too"
	case datapath == IPVS || !model.NeedsIPVS(x.Scheduler):
		return x.Scheduler, ""
	}
	// The nearest in what it is for: to spread by weight, or to keep what is asked
	// of one address in one place.
	used = WRR
	switch x.Scheduler {
	case "lc":
		used = RR
	case "lblc", "lblcr":
		used = DH
	}
	return used, x.Scheduler + " goes by open connections, which only ip_vs counts"
}

// Slots lays the backends of a VIP out for a scheduler that nftables can express.
// Each element is an index into backends. A connection takes the next slot, or, if
// hashed, the one of its client's hash.
//
// wrr interleaves by the smooth weighted round robin of nginx: at each step
// every backend gains its weight, the one with the most is taken and pays the
// sum. A heavy backend is thus spread over the cycle instead of being hit in a
// burst. Weights are divided by their greatest common divisor first.
//
// mh fills Maglev's table (Eisenbud et al., NSDI 2016, section 3.4): when a
// backend comes or goes, nearly all other slots stay as they are. dh and fo are
// one backend.
func Slots(scheduler string, vip netip.Addr, backends []Backend) (slots []int, hashed bool) {
	if len(backends) == 0 {
		return nil, false
	}
	switch scheduler {
	case WRR:
		return interleave(backends), false
	case MH:
		return maglev(backends), true
	case DH:
		return []int{bestBy(backends, func(b *Backend) int { return order(vip, b) })}, false
	case FO:
		return []int{bestBy(backends, rank)}, false
	}
	out := make([]int, len(backends))
	for i := range out {
		out[i] = i
	}
	return out, scheduler == SH
}

// rank orders the backends of a VIP for fo: by weight, then by a hash, so that all
// nodes have the same one of equals and none moves when another comes or goes.
func rank(b *Backend) int { return b.Weight<<8 | int(hash(b.Addr)&0xff) }

// order is that of the backends for dh: of this VIP alone, and likewise.
func order(vip netip.Addr, b *Backend) int { return 1 + int(hash(vip, b.Addr)%maxIPVSWeight) }

// maxIPVSWeight is the largest weight of the kernel's that can be read back.
const maxIPVSWeight = 65535

// bestBy is the first of the backends with the most points.
func bestBy(backends []Backend, points func(*Backend) int) int {
	best, most := 0, points(&backends[0])
	for i := range backends[1:] {
		if p := points(&backends[i+1]); p > most {
			best, most = i+1, p
		}
	}
	return best
}

func interleave(backends []Backend) []int {
	div, sum := divisor(backends), 0
	for _, b := range backends {
		sum += b.Weight / div
	}
	credit := make([]int, len(backends))
	out := make([]int, 0, sum)
	for range sum {
		best := 0
		for i, b := range backends {
			credit[i] += b.Weight / div
			if credit[i] > credit[best] {
				best = i
			}
		}
		credit[best] -= sum
		out = append(out, best)
	}
	return out
}

// maglevSizes are primes, as the table wants. It does not grow with each backend,
// because another size is another table. With 100 slots for each, as the paper
// has it, no backend has 1 % more than another, and one that goes moves 1 to 3 % of
// the others' slots; with a quarter of that, up to 16 %. The kernel's mh has 4,093
// for any number, but there a slot is a pointer, here an element of a map.
var maglevSizes = []int{1021, 4093, 16381}

// maglevShare is how many slots a backend should have at least.
const maglevShare = 100

func maglev(backends []Backend) []int {
	size := maglevSizes[len(maglevSizes)-1]
	for _, s := range maglevSizes {
		if len(backends)*maglevShare <= s {
			size = s
			break
		}
	}
	div := divisor(backends)
	at, step := make([]int, len(backends)), make([]int, len(backends))
	for i := range backends {
		// Any two hashes that have nothing to do with each other.
		at[i] = int(hash(backends[i].Addr) % uint64(size))
		step[i] = int(hash(backends[i].Addr, backends[i].Addr)%uint64(size-1)) + 1
	}
	out := make([]int, size)
	for i := range out {
		out[i] = -1
	}
	for left := size; ; {
		for i := range backends {
			for range backends[i].Weight / div {
				for out[at[i]] >= 0 {
					at[i] = (at[i] + step[i]) % size
				}
				out[at[i]] = i
				if left--; left == 0 {
					return out
				}
			}
		}
	}
}

// hash is FNV-1a, finished so that each bit of it depends on every bit: the low
// bits of FNV alone tell neighbouring addresses apart too regularly.
func hash(addrs ...netip.Addr) uint64 {
	h := fnv.New64a()
	for _, a := range addrs {
		b := a.As16()
		_, _ = h.Write(b[:]) // never fails, by its contract
	}
	x := h.Sum64() // MurmurHash3's finaliser
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

func divisor(backends []Backend) int {
	div := 0
	for i := range backends {
		div = gcd(div, backends[i].Weight)
	}
	return div
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// host is the prefix of one address.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
