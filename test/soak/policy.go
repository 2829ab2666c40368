package main

import (
	"slices"
	"time"
)

// way is what a request depends on, by the names of hosts.
type way struct {
	client  string   // where the client's container is; empty: outside
	entry   string   // whose balancer is asked: of a VIP the client's, else whose published port
	servers []string // where the tasks may be
}

// crosses says whether the request may leave one of the hosts for another.
func (w way) crosses(from, to []string) bool {
	return slices.Contains(from, w.entry) && slices.ContainsFunc(w.servers, func(s string) bool { return s != w.entry && slices.Contains(to, s) })
}

// harm says which requests something may hurt, while it lasts and until it is healed.
type harm struct {
	clients bool // of containers on the host
	entries bool // that are balanced on the host
	servers bool // that may get to a task on the host
	only    bool // whose every task is on the host
	between bool // from one of the hosts to another of them
	across  bool // from or to the host, if by the wire
}

// hurts applies the policy to a request, where hosts are those that were struck.
func (h harm) hurts(w way, hosts []string) bool {
	switch {
	case h.clients && slices.Contains(hosts, w.client),
		h.entries && slices.Contains(hosts, w.entry),
		h.servers && slices.ContainsFunc(w.servers, func(s string) bool { return slices.Contains(hosts, s) }),
		h.only && !slices.ContainsFunc(w.servers, func(s string) bool { return !slices.Contains(hosts, s) }),
		h.between && w.crosses(hosts, hosts):
		return true
	}
	return h.across && (w.crosses(hosts, w.servers) || w.crosses([]string{w.entry}, hosts))
}

// policy is what a kind of fault or operation may do to requests, and how long all
// may need to heal after it, on a machine of two processors with other work.
type policy struct {
	harm harm
	why  string // of the harm, or of its absence
	heal time.Duration
}

// Times to heal. They bound what is said in their comment; half of each is for the
// machine.
const (
	// healKernel: damage without a notice is found by a read-back, after 5 s at most.
	healKernel = 15 * time.Second
	// healPlugin: the engine starts a plugin that ended at once, and after 1, 2, 4 s
	// if it ends again; it learns what its peers have in one exchange.
	healPlugin = 20 * time.Second
	// healEngine: an engine needs 3 to 10 s to start; its tasks, which ended with it,
	// are then started by the swarm.
	healEngine = 60 * time.Second
	// healPower: as an engine, but the swarm may have taken the node for lost (15 s),
	// and given its tasks to others.
	healPower = 90 * time.Second
)

// faults is the policy for every fault.
var faults = map[string]policy{
	"plugin killed":       {harm{}, "the data path is the kernel's", healPlugin},
	"plugins killed":      {harm{}, "the data path is the kernel's", healPlugin},
	"plugin frozen":       {harm{}, "silence of a node removes nothing", healPlugin},
	"plugin disabled":     {harm{}, "the data path is the kernel's", healPlugin},
	"state file damaged":  {harm{}, "a node without records only adds, until it knows all again", healPlugin},
	"engine killed":       {harm{clients: true, servers: true}, "its containers end when it starts again", healEngine},
	"engine stopped":      {harm{clients: true, servers: true}, "it stops its containers", healEngine},
	"power off":           {harm{clients: true, entries: true, servers: true}, "nothing of the host is there", healPower},
	"hosts cut off":       {harm{between: true}, "nothing passes between them", healEngine},
	"network's table":     {harm{entries: true}, "until it is there again, VIPs are not balanced on the host", healKernel},
	"mesh's table":        {harm{entries: true}, "until it is there again, ports lead nowhere", healKernel},
	"mesh's pair":         {harm{entries: true}, "until it is there again, ports lead nowhere", healKernel},
	"mesh's chain":        {harm{entries: true}, "until it is there again, Docker's firewall drops what the ports forward", healKernel},
	"VXLAN device":        {harm{across: true}, "until it is there again, nothing of the network leaves the host", healKernel},
	"VXLAN chain":         {harm{}, "the hosts' firewall lets in what no rule refuses", healKernel},
	"forwarding entries":  {harm{across: true}, "until they are there again, the device does not know where MACs are", healKernel},
	"neighbours":          {harm{entries: true}, "until they are there again, the balancer does not know MACs", healKernel},
	"bridge's addresses":  {harm{entries: true}, "until they are there again, the balancer has no address", healKernel},
	"network's sysctls":   {harm{entries: true}, "what is forwarded depends on them", healKernel},
	"VXLAN device is off": {harm{across: true}, "nothing of the network leaves the host", healKernel},
}

// operations that touch the services that are asked all the time; others must not hurt
// a request at all.
var hurtful = map[string]policy{
	opDrain: {harm{only: true}, "a service that may run nowhere else is down", healEngine},
}

// window is a time in which something may have hurt requests.
type window struct {
	what        string
	hosts       []string
	harm        harm
	from, until time.Time // until is zero while it lasts
}

// failure is a request that was not answered as it should be, or a connection that
// broke.
type failure struct {
	stream string
	way    way
	from   time.Time // when it was begun, at the earliest
	until  time.Time // when it was known
	what   string
}

// explain returns the windows that allow a failure, none if it has no excuse.
func explain(f failure, all []window) []window {
	var fit []window
	for _, w := range all {
		if f.until.Before(w.from) || !w.until.IsZero() && f.from.After(w.until) {
			continue
		}
		if w.harm.hurts(f.way, w.hosts) {
			fit = append(fit, w)
		}
	}
	return fit
}
