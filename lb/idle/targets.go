package idle

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Target is a task of this node whose service has a limit.
type Target struct {
	Service model.ServiceID
	Sandbox string // path of its network namespace
	Addr    netip.Addr
	Limit   time.Duration
}

// maxLimit bounds a limit that another node tells. The kernel counts silence in
// milliseconds, in 32 bits, which is 49 days.
const maxLimit = 31 * 24 * time.Hour

// Targets lists the tasks of this node whose services have a limit, in a certain
// order.
//
// A manager's word on the service decides. Where none has told of it, the task's
// own options do, with which its engine has started it.
func Targets(v model.View) []Target {
	var out []Target
	for _, e := range v.Endpoints {
		if e.Task.Service == "" || e.Phase != model.Taken || e.Sandbox == "" {
			continue
		}
		opts := e.Options
		if s, told := v.Services[e.Task.Service]; told {
			opts = s.Options[e.Network]
		}
		if opts.Idle > 0 {
			limit := time.Duration(min(opts.Idle, int(maxLimit/time.Second))) * time.Second
			out = append(out, Target{Service: e.Task.Service, Sandbox: e.Sandbox, Addr: e.Addr, Limit: limit})
		}
	}
	slices.SortFunc(out, func(a, b Target) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), a.Addr.Compare(b.Addr), cmp.Compare(a.Sandbox, b.Sandbox),
			cmp.Compare(a.Limit, b.Limit))
	})
	// An endpoint and the one before it may speak of one task while it starts anew.
	return slices.Compact(out)
}

// period is between two looks at a target: a tenth of its limit, so that a
// connection lives no longer than a tenth more than it may. Not less than a second,
// which is the unit of a limit, as each look lists the task's sockets; not more than 30 s, so
// that a limit of hours is kept to the minute.
func period(limit time.Duration) time.Duration {
	return max(time.Second, min(limit/10, 30*time.Second))
}

// Over returns those of conns that have been silent for limit. It uses conns.
func Over(conns []kernel.Conn, limit time.Duration) []kernel.Conn {
	return slices.DeleteFunc(conns, func(c kernel.Conn) bool { return c.Idle < limit })
}
