package model

// NeedsIPVS reports whether a scheduler, by its name in the kernel's ip_vs
// (net/netfilter/ipvs/, ipvsadm(8)), goes by how many connections each backend
// has, which only ip_vs knows.
func NeedsIPVS(scheduler string) bool {
	switch scheduler {
	case "lc", "wlc", "sed", "nq", "lblc", "lblcr", "ovf":
		return true
	}
	return false
}
