package service

import "net/netip"

// Slots lays backends out for a scheduler: each element is an index into
// backends, and a connection takes the next slot (rr, wrr) or the one of its
// client's hash (sh). Equal weights give each backend one slot.
//
// wrr interleaves by the smooth weighted round robin of nginx: at each step
// every backend gains its weight, the one with the most is taken and pays the
// sum. A heavy backend is thus spread over the cycle instead of being hit in a
// burst. Weights are divided by their greatest common divisor first.
func Slots(scheduler string, backends []Backend) []int {
	if len(backends) == 0 {
		return nil
	}
	if scheduler != WRR {
		out := make([]int, len(backends))
		for i := range out {
			out[i] = i
		}
		return out
	}
	div, sum := 0, 0
	for _, b := range backends {
		div = gcd(div, b.Weight)
	}
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

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// host is the prefix of one address.
func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
