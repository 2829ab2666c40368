package publish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/ingress"
)

// Sockets holds ports of the host; internal/linux/ports does.
type Sockets interface {
	// Set holds these ports and no others, and returns what cannot be had: with a
	// *kernel.TakenError where someone has it, kernel.ErrNotExist where the host
	// lacks the address, kernel.ErrUnsupported where the kernel lacks the protocol.
	Set(want []model.HostPort) map[model.HostPort]error
	// Missed counts connections that have come to a socket, past the rules.
	Missed() uint64
}

// Config is what a Publisher is made of.
type Config struct {
	View    func() model.View // the newest view; must not block
	Sockets Sockets
	// Taken is told what was tried, and what of it processes have; see model.View.
	Taken func(context.Context, []model.HostRange, map[model.HostPort]string)
	// Reserved are ports that this program has or may come to need, of all addresses,
	// with what for. They are never held for a service: after a restart the sockets here
	// are made before those, and every node would lose the others.
	Reserved map[model.HostPort]string
	Log      *slog.Logger
}

// Nobody begins what Taken says of a port that no process has and that cannot be had
// all the same; why follows.
const Nobody = "nobody: "

// retry is between two looks without news, in which ports that could not be had are
// tried again: what is wrong in the kernel is mended within 5 s.
const retry = 5 * time.Second

// viewGap is between two looks at views: each new one has to be made, which a node
// with ten thousand endpoints around it feels.
const viewGap = 250 * time.Millisecond

// Publisher holds published ports. Its methods may be called from any goroutine,
// Run only once.
type Publisher struct {
	cfg   Config
	woken chan struct{} // capacity 1: a pending "look again"

	// Of Begin, and then of Run alone:
	looked time.Time      // last
	tried  time.Time      // when ports were set last; zero: never
	held   []ingress.Port // that were set last
	older  []ingress.Loss // what services have lost to each other, told last
	missed uint64         // that was told last

	// mu guards what follows. Rank: nothing else is locked while it is held.
	mu     sync.Mutex
	failed map[model.HostPort]error
	absent map[netip.Addr]bool // addresses of ports that are wanted, which this host does not have
}

// New makes a Publisher; Run starts it.
func New(cfg Config) *Publisher { return &Publisher{cfg: cfg, woken: make(chan struct{}, 1)} }

// Wake says that the view has changed. It does not wait.
func (p *Publisher) Wake() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

// Failed says which published ports are not held here, and why. An address that
// this host does not have is no failure: a service may name those of many hosts.
func (p *Publisher) Failed() map[model.HostPort]error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.failed)
}

// Absent are the addresses at which services publish ports, and which this host does
// not have.
func (p *Publisher) Absent() map[netip.Addr]bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.absent)
}

// Missed counts connections to published ports, since the process began, that have
// come to a socket here, past the rules, and were reset.
func (p *Publisher) Missed() uint64 { return p.cfg.Sockets.Missed() }

// Begin looks for the first time. It is to be called before anything is planned:
// what a process has must not lead to a service until that is seen.
func (p *Publisher) Begin(ctx context.Context) { p.look(ctx) }

// Run works until ctx ends, after Begin. The ports stay held: they go with the
// process.
func (p *Publisher) Run(ctx context.Context) {
	timer := time.NewTimer(retry)
	defer timer.Stop()
	woken := p.woken // nil while a look is near anyway
	for {
		select {
		case <-ctx.Done():
			return
		case <-woken:
			timer.Reset(max(viewGap-time.Since(p.looked), 0))
			woken = nil
			continue
		case <-timer.C:
		}
		woken = p.woken
		p.look(ctx)
		timer.Reset(retry)
	}
}

// look sets the ports by the newest view.
func (p *Publisher) look(ctx context.Context) {
	p.looked = time.Now()
	v := p.cfg.View()
	won, lost := ingress.Own(ingress.Wants(v), nil)
	p.tell(v, lost)
	if v.Partial {
		for _, had := range p.held {
			if !slices.Contains(won, had) {
				won = append(won, had)
			}
		}
	}
	p.mu.Lock()
	before, absent := p.failed, len(p.absent) > 0
	p.mu.Unlock()
	// An address may come at any time, as those do that move between hosts. What could not
	// be had is tried every 5 s, however often views change: to find who has a port, the
	// descriptors of all processes are read.
	again := p.looked.Sub(p.tried) >= retry && (len(before) > 0 || absent)
	if p.tried.IsZero() || !slices.Equal(won, p.held) || again {
		p.tried = p.looked
		p.set(ctx, won, before)
	}
	if n := p.cfg.Sockets.Missed(); n != p.missed {
		p.cfg.Log.Warn("connections to published ports have missed the rules, and were reset", "op", count(n-p.missed, "connections"))
		p.missed = n
	}
}

// set sets ports, and tells what has changed in what cannot be had.
func (p *Publisher) set(ctx context.Context, won []ingress.Port, before map[model.HostPort]error) {
	failed := make(map[model.HostPort]error)
	want := slices.DeleteFunc(ingress.HostPorts(won), func(port model.HostPort) bool {
		what, is := p.cfg.Reserved[model.HostPort{Proto: port.Proto, Port: port.Port}]
		if is {
			failed[port] = &kernel.TakenError{Port: port, Process: what}
		}
		return is
	})
	maps.Copy(failed, p.cfg.Sockets.Set(want))
	p.held = won
	taken, absent := make(map[model.HostPort]string), make(map[netip.Addr]bool)
	for port, err := range failed {
		var t *kernel.TakenError
		switch {
		case errors.Is(err, kernel.ErrNotExist):
			absent[port.Addr] = true
			delete(failed, port)
			continue
		case errors.As(err, &t):
			taken[port] = t.Process
		case !errors.Is(err, kernel.ErrUnsupported): // of which nobody has a port
			taken[port] = Nobody + err.Error()
		}
	}
	p.mu.Lock()
	p.failed, p.absent = failed, absent
	p.mu.Unlock()
	p.cfg.Taken(ctx, ingress.Ranges(won), taken)
	p.log(before, failed)
}

// tell tells of ports that services have lost to older ones, once for each change.
// While the view is partial, who is older may still be to come.
func (p *Publisher) tell(v model.View, lost []ingress.Loss) {
	if v.Partial || slices.Equal(lost, p.older) {
		return
	}
	for _, l := range lost {
		if !slices.Contains(p.older, l) {
			p.cfg.Log.Error("a published port is not the service's", "service", cmp.Or(v.Services[l.Service].Name, string(l.Service)), "network", l.Network.Short(), "err", l.String())
		}
	}
	for _, l := range p.older {
		if !slices.Contains(lost, l) {
			p.cfg.Log.Info("a published port is not another service's any more, or wanted no more", "service", cmp.Or(v.Services[l.Service].Name, string(l.Service)), "op", l.PortRange.String())
		}
	}
	p.older = lost
}

func count(n uint64, of string) string { return fmt.Sprintf("%d %s", n, of) }

// log tells what is new, in one line for each reason: a range may fail as a whole.
func (p *Publisher) log(before, now map[model.HostPort]error) {
	news, sample := 0, model.HostPort{}
	for _, port := range slices.SortedFunc(maps.Keys(now), model.HostPort.Compare) {
		if was := before[port]; was == nil || was.Error() != now[port].Error() {
			if news == 0 {
				sample = port
			}
			news++
		}
	}
	if news > 0 {
		p.cfg.Log.Error("published ports cannot be held on this node, will be retried; the first is told", "op", count(uint64(news), "ports"), "err", now[sample])
	}
	mended := 0
	for port := range before {
		if now[port] == nil {
			mended++
		}
	}
	if mended > 0 {
		p.cfg.Log.Info("published ports that could not be held are held, or are wanted no more", "op", count(uint64(mended), "ports"))
	}
}
