package expiry

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Target is a task of this node whose connections have a limit.
type Target struct {
	Service model.ServiceID
	Sandbox string // path of its network namespace
	Addr    netip.Addr
	Idle    time.Duration // how long a connection may be silent; 0: for ever
	End     time.Time     // when all end, because the task leaves; zero: never
}

// maxLimit bounds a limit that another node tells. The kernel counts silence in
// milliseconds, in 32 bits, which is 49 days.
const maxLimit = 31 * 24 * time.Hour

// Targets lists the tasks of this node whose connections have a limit, in a certain
// order.
//
// A manager's word on the service decides. Where none has told of it, the task's
// own options do, with which its engine has started it. When a task began to leave
// is in the node's own durable record of it (model.Endpoint.Leaves), so a restart of
// this process gives its connections no more time.
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
		t := Target{Service: e.Task.Service, Sandbox: e.Sandbox, Addr: e.Addr, Idle: limit(opts.Idle)}
		if d := limit(opts.Drain); d > 0 && !e.Leaves.IsZero() {
			t.End = e.Leaves.Add(d)
		}
		if t.Idle > 0 || !t.End.IsZero() {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b Target) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), a.Addr.Compare(b.Addr), cmp.Compare(a.Sandbox, b.Sandbox),
			cmp.Compare(a.Idle, b.Idle), a.End.Compare(b.End))
	})
	// An endpoint and the one before it may speak of one task while it starts anew.
	return slices.Compact(out)
}

// limit is a number of seconds that another node may have told; 0: none.
func limit(seconds int) time.Duration {
	return time.Duration(max(0, min(seconds, int(maxLimit/time.Second)))) * time.Second
}

// next is when to look at a target again after now.
func (t Target) next(now time.Time) time.Time {
	var at time.Time
	if t.Idle > 0 {
		at = now.Add(period(t.Idle))
	}
	if t.End.IsZero() {
		return at
	}
	end := t.End
	if !now.Before(end) {
		// What has come since by the task's own address, which nobody balances.
		end = now.Add(period(0))
	}
	if at.IsZero() || end.Before(at) {
		at = end
	}
	return at
}

// period is between two looks at a target: a tenth of its limit, so that a
// connection lives no longer than a tenth more than it may. Not less than a second,
// which is the unit of a limit, as each look lists the task's sockets; not more than 30 s, so
// that a limit of hours is kept to the minute.
func period(limit time.Duration) time.Duration {
	return max(time.Second, min(limit/10, 30*time.Second))
}

// Over returns those of conns that have to end now. It uses conns.
//
// At its end a task loses all that clients have opened to it, whether its server
// listens still or has stopped that, as one that is to stop does, and whatever they
// have said since they were listed. Before it, those that have been silent for the
// limit and whose server still listens.
func (t Target) Over(conns []kernel.Conn, now time.Time) []kernel.Conn {
	if !t.End.IsZero() && !now.Before(t.End) {
		for i := range conns {
			conns[i].Idle = 0 // none can have spoken more lately than that
		}
		return conns
	}
	return slices.DeleteFunc(conns, func(c kernel.Conn) bool {
		return t.Idle == 0 || !c.Served || c.Idle < t.Idle
	})
}
