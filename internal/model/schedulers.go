package model

// Scheduler is a way to choose a backend for a new connection.
type Scheduler struct {
	Name string // the one that it has in ip_vs
	// Doc says, after the name, whom it chooses.
	Doc string
	// Counts: it needs the number of open connections of each backend. Only ip_vs
	// keeps that; nftables has no comparison of one backend with another.
	Counts bool
}

// Schedulers lists what can be asked for: what the kernel has wherever it has
// ip_vs (net/netfilter/ipvs of Linux 6.12, without twos, which older ones lack).
func Schedulers() []Scheduler {
	return []Scheduler{
		{Name: "rr", Doc: "in turn"},
		{Name: "wrr", Doc: "in turn, by weight"},
		{Name: "lc", Doc: "the fewest connections", Counts: true},
		{Name: "wlc", Doc: "the fewest connections for its weight", Counts: true},
		{Name: "sh", Doc: "by the client's address, so that one client keeps one backend"},
		{Name: "dh", Doc: "by the virtual IP, so that all clients have one backend"},
		{Name: "sed", Doc: "the shortest expected delay: the fewest connections, with the new one, for its weight", Counts: true},
		{Name: "nq", Doc: "one without connections, else as `sed`", Counts: true},
		{Name: "lblc", Doc: "one backend for a virtual IP, another once that has too many connections", Counts: true},
		{Name: "lblcr", Doc: "as `lblc`, with a set of backends that grows and shrinks", Counts: true},
		{Name: "fo", Doc: "the one with the highest weight, another only once that is gone"},
		{Name: "ovf", Doc: "as `fo`, another also once it has as many connections as its weight", Counts: true},
		{Name: "mh", Doc: "by the client's address as `sh`, and fewer clients change over when backends come and go"},
	}
}

// NeedsIPVS reports whether a scheduler can be had from the kernel's ip_vs only.
// It cannot of a name that is none.
func NeedsIPVS(scheduler string) bool {
	for _, s := range Schedulers() {
		if s.Name == scheduler {
			return s.Counts
		}
	}
	return false
}
