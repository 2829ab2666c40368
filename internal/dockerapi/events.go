package dockerapi

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/docker/api/types/events"
	"github.com/docker/docker/api/types/filters"
)

// stream is an open subscription to the engine's events.
type stream struct {
	messages <-chan events.Message
	errs     <-chan error
}

// wanted are the events that say something about what is read here. Execs, which
// health checks send all the time, are not among them.
var wanted = filters.NewArgs(
	filters.Arg("type", string(events.ContainerEventType)),
	filters.Arg("type", string(events.NetworkEventType)),
	filters.Arg("type", string(events.ServiceEventType)),
	filters.Arg("type", string(events.NodeEventType)),
	filters.Arg("event", string(events.ActionStart)),
	filters.Arg("event", string(events.ActionDie)),
	filters.Arg("event", string(events.ActionKill)),
	filters.Arg("event", string(events.ActionPause)),
	filters.Arg("event", string(events.ActionUnPause)),
	filters.Arg("event", string(events.ActionHealthStatus)), // the engine takes it as a prefix
	filters.Arg("event", string(events.ActionDestroy)),
	filters.Arg("event", string(events.ActionCreate)),
	filters.Arg("event", string(events.ActionUpdate)),
	filters.Arg("event", string(events.ActionRemove)),
	filters.Arg("event", string(events.ActionConnect)),
	filters.Arg("event", string(events.ActionDisconnect)),
)

// subscribe opens the event stream. cancel ends ctx: it is what makes the wait
// for a silent engine end, since the stream itself has no deadline.
func subscribe(ctx context.Context, cancel context.CancelFunc, e *engine) (stream, error) {
	late := time.AfterFunc(subscribeTimeout, cancel)
	// Events returns when the engine has answered, or has not.
	messages, errs := e.cli.Events(ctx, events.ListOptions{Filters: wanted})
	if !late.Stop() {
		return stream{}, fmt.Errorf("subscribe to events: no answer within %s", subscribeTimeout)
	}
	select {
	case err := <-errs:
		return stream{}, fmt.Errorf("subscribe to events: %w", err)
	default:
		return stream{messages, errs}, nil
	}
}

// follow asks for readings as events come, until the stream ends.
func (s *session) follow(ctx context.Context, st stream) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-st.errs:
			return fmt.Errorf("event stream ended: %w", err)
		case m := <-st.messages:
			s.r.mu.Lock()
			s.r.status.Events++
			s.r.mu.Unlock()
			s.heard(m.Type)
		}
	}
}

// heard asks for what an event of a type may have changed.
func (s *session) heard(t events.Type) {
	switch t {
	case events.ContainerEventType:
		s.containers.look()
		s.gossip.look()
		s.cluster.look()
	case events.NetworkEventType:
		s.networks.look()
		s.containers.look()
		s.gossip.look()
	case events.ServiceEventType:
		s.cluster.look()
		s.gossip.look()
	case events.NodeEventType:
		s.nodeEvent.Store(true)
		s.info.look()
		s.cluster.look()
	}
}
