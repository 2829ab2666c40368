package diag

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/ingress"
)

const (
	// staleAfter is when a kernel that was not read counts as not known. It is read
	// every 5 s, and a round of a large node takes a fraction of a second.
	staleAfter = 30 * time.Second
	// judgedFor is how long the judgement of all ports is used again. Balancers ask for
	// each port, some of them every second, and on a node with ten thousand endpoints
	// around it a judgement takes milliseconds.
	judgedFor = 250 * time.Millisecond
)

// errDrained is why a node that serves shall get nothing new.
var errDrained = errors.New("the swarm has this node paused or drained")

// judged are the published ports as they were lately.
type judged struct {
	mu    sync.Mutex // guards what follows. Nothing is locked under it but what doors asks
	at    time.Time
	ports []judgedPort
}

type judgedPort struct {
	ingress.Port
	shown Port
}

// Healthy says why this node shall get no new connections from outside; nil: it is
// fine. It is what an external balancer goes by that knows nothing of ports.
func (s *Server) Healthy() error {
	v, e := s.cfg.Hub.View(), s.cfg.Hub.Engine()
	if v.Drained {
		return errDrained
	}
	// An engine that does not answer is no reason by itself: the data path goes on.
	if s.cfg.Scope == "global" && (e.Active || !e.SwarmValid) {
		running, state := s.cfg.Gossip()
		for _, p := range contact(v, e, running, state) {
			return errors.New(p.What)
		}
	}
	if err := s.known(); err != nil {
		return err
	}
	// The first by its text, so that the answer stays the same.
	var first kernel.Key
	failed := s.cfg.Loop.Last().Failed
	for k, err := range failed {
		// What is not there yet is how a task's start looks from here. And what a task's
		// own namespace refuses is that task's trouble: wherever the task went, it would take
		// the node from the balancer.
		if errors.Is(err, kernel.ErrNotExist) || strings.HasPrefix(k.Netns(), "task:") {
			continue
		}
		if first == nil || k.String() < first.String() {
			first = k
		}
	}
	if first != nil {
		return fmt.Errorf("the kernel refuses a change: %w", failed[first])
	}
	return nil
}

// known says why what the kernel has is not known; nil: it is.
func (s *Server) known() error {
	switch stats := s.cfg.Loop.Stats(); {
	case stats.LastDump.IsZero():
		return errors.New("the kernel has not been read yet")
	case time.Since(stats.LastDump) > staleAfter:
		return fmt.Errorf("the kernel was last read %s: %s", ago(stats.LastDump), orElse(stats.DumpError, "the loop hangs"))
	}
	return nil
}

// Serves says what a published port of this node leads to now, or why it does not.
// Of a port that is bound to several addresses, one that serves is enough.
func (s *Server) Serves(port uint16, proto model.Proto) (string, error) {
	if s.cfg.Hub.View().Drained {
		return "", errDrained
	}
	if err := s.known(); err != nil {
		return "", err
	}
	var why error
	for _, j := range s.judged() {
		if j.Proto != proto || port < j.Lo || j.Hi < port {
			continue
		}
		x := j.shown
		name := orElse(x.Service, x.ServiceID)
		switch {
		case x.State == PortServed:
			return fmt.Sprintf("port %d/%s leads to service %s: %s", port, proto, name, x.Why), nil
		case why == nil:
			why = fmt.Errorf("port %d/%s of service %s: %s: %s", port, proto, name, x.State, x.Why)
		}
	}
	if why == nil {
		why = fmt.Errorf("no service publishes port %d/%s on this node", port, proto)
	}
	return "", why
}

// judged are the ports that services have or have lost, those first, as they are or
// were a moment ago.
func (s *Server) judged() []judgedPort {
	s.ports.mu.Lock()
	defer s.ports.mu.Unlock()
	if now := time.Now(); s.ports.at.IsZero() || now.Sub(s.ports.at) >= judgedFor {
		d := s.doors()
		s.ports.at, s.ports.ports = now, nil
		for _, p := range d.won {
			x := d.port(p)
			x.State, x.Why = d.judge(p)
			s.ports.ports = append(s.ports.ports, judgedPort{p, x})
		}
		for _, l := range d.lost {
			s.ports.ports = append(s.ports.ports, judgedPort{l.Port, d.loss(l)})
		}
	}
	return s.ports.ports
}
