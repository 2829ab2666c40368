package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// host is a host's ports, and a view.
type host struct {
	mu     sync.Mutex
	view   model.View
	errs   map[model.HostPort]error
	held   []model.HostPort
	missed uint64
	sets   int
	tried  []model.HostRange
	taken  map[model.HostPort]string
	log    bytes.Buffer
}

func (h *host) Set(want []model.HostPort) map[model.HostPort]error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sets++
	h.held = nil
	failed := make(map[model.HostPort]error)
	for _, p := range want {
		if err := h.errs[p]; err != nil {
			failed[p] = err
		} else {
			h.held = append(h.held, p)
		}
	}
	return failed
}

func (h *host) Missed() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.missed
}

func (h *host) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// publishes makes a view in which each service, older than the next, publishes ports.
func publishes(ports ...string) model.View {
	v := model.View{Services: make(map[model.ServiceID]model.Service)}
	for i, text := range ports {
		p, err := model.ParsePublished(text)
		if err != nil {
			panic(err)
		}
		id := model.ServiceID(fmt.Sprint("s", i))
		v.Services[id] = model.Service{ID: id, Created: time.Unix(int64(i), 0), Options: map[model.NetworkID]model.ServiceOptions{"net": {Published: p}}}
	}
	return v
}

func tcp(n uint16) model.HostPort { return model.HostPort{Proto: model.TCP, Port: n} }

// during runs a Publisher on h for the time that f takes.
func during(t *testing.T, h *host, f func(p *Publisher)) {
	synctest.Test(t, func(t *testing.T) {
		p := New(Config{
			View: func() model.View { h.mu.Lock(); defer h.mu.Unlock(); return h.view }, Sockets: h,
			Taken: func(_ context.Context, tried []model.HostRange, m map[model.HostPort]string) {
				h.change(func() { h.tried, h.taken = append([]model.HostRange{}, tried...), m })
			},
			Reserved: map[model.HostPort]string{tcp(7947): "sluice itself (GOSSIP_PORT)"},
			Log:      slog.New(slog.NewTextHandler(&h.log, nil)),
		})
		p.Begin(t.Context())
		go p.Run(t.Context()) // which ends with f
		synctest.Wait()
		f(p)
	})
}

func (h *host) holds(t *testing.T, want ...model.HostPort) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.Equal(h.held, want) {
		t.Errorf("held %v, want %v", h.held, want)
	}
}

func TestWhatServicesPublishIsHeld(t *testing.T) {
	h := &host{view: publishes("80-81", "81-82")}
	during(t, h, func(p *Publisher) {
		h.holds(t, tcp(80), tcp(81), tcp(82))
		// A change is followed soon, and many changes by one look.
		h.change(func() { h.view = publishes("90") })
		for range 10 {
			p.Wake()
		}
		time.Sleep(viewGap)
		synctest.Wait()
		h.holds(t, tcp(90))
		if h.sets != 2 {
			t.Errorf("%d times set", h.sets)
		}
		// Without news there is nothing to do.
		time.Sleep(time.Minute)
		if h.sets != 2 || len(p.Failed())+len(p.Absent()) > 0 || strings.Contains(h.log.String(), "held") {
			t.Errorf("%d times set, %v, %s", h.sets, p.Failed(), &h.log)
		}
	})
}

// TestWhatWasTriedIsToldFromTheBeginning: also that nothing was, so that what comes
// later waits for its attempt.
func TestWhatWasTriedIsToldFromTheBeginning(t *testing.T) {
	h := new(host)
	during(t, h, func(p *Publisher) {
		if h.tried == nil || len(h.tried) > 0 {
			t.Errorf("told %v, want that nothing was tried", h.tried)
		}
		h.change(func() {
			h.view = publishes("80-81")
			h.errs = map[model.HostPort]error{tcp(81): &kernel.TakenError{Port: tcp(81), Process: "nginx (pid 7)"}}
		})
		p.Wake()
		time.Sleep(viewGap)
		synctest.Wait()
		if want := []model.HostRange{{Proto: model.TCP, Lo: 80, Hi: 81}}; !slices.Equal(h.tried, want) || len(h.taken) != 1 {
			t.Errorf("tried %v, taken %v", h.tried, h.taken)
		}
	})
}

func TestAPortOfAProcessIsTriedAgain(t *testing.T) {
	far := errors.Join(kernel.ErrNotExist)
	h := &host{view: publishes("80-83"), errs: map[model.HostPort]error{
		tcp(80): far, tcp(81): &kernel.TakenError{Port: tcp(81), Process: "nginx (pid 7)"}, tcp(82): kernel.ErrUnsupported, tcp(83): errors.New("too many open files"),
	}}
	during(t, h, func(p *Publisher) {
		if want := map[model.HostPort]string{tcp(81): "nginx (pid 7)", tcp(83): "nobody: too many open files"}; !maps.Equal(h.taken, want) {
			t.Errorf("taken %v, want %v", h.taken, want)
		}
		if got := p.Failed(); len(got) != 3 || got[tcp(80)] != nil || !errors.Is(got[tcp(81)], kernel.ErrTaken) {
			t.Errorf("failed: %v", got)
		}
		if n := strings.Count(h.log.String(), "\n"); n != 1 || !strings.Contains(h.log.String(), "port 81/tcp is held by nginx (pid 7)") {
			t.Errorf("told: %s", &h.log)
		}
		time.Sleep(retry)
		synctest.Wait()
		if n := strings.Count(h.log.String(), "\n"); n != 1 || h.sets != 2 {
			t.Errorf("set %d times, told again: %s", h.sets, &h.log)
		}
		h.change(func() { h.errs = nil })
		time.Sleep(retry)
		synctest.Wait()
		h.holds(t, tcp(80), tcp(81), tcp(82), tcp(83))
		if len(h.taken)+len(p.Failed()) > 0 || !strings.Contains(h.log.String(), `op="3 ports"`) {
			t.Errorf("taken %v, failed %v, told: %s", h.taken, p.Failed(), &h.log)
		}
	})
}

// TestNewsDoNotHurryWhatCannotBeHad: to look for who has a port is dear.
func TestNewsDoNotHurryWhatCannotBeHad(t *testing.T) {
	h := &host{view: publishes("80"), errs: map[model.HostPort]error{tcp(80): &kernel.TakenError{Port: tcp(80), Process: "nginx (pid 7)"}}}
	during(t, h, func(p *Publisher) {
		for range 100 { // 25 s
			p.Wake()
			time.Sleep(viewGap)
		}
		synctest.Wait()
		if h.sets < 4 || h.sets > 6 {
			t.Errorf("tried %d times", h.sets)
		}
		h.change(func() { h.view = publishes("81") })
		p.Wake()
		time.Sleep(viewGap)
		synctest.Wait()
		h.holds(t, tcp(81))
	})
}

// TestOwnPortsAreNoServices, at whatever address and in whatever range.
func TestOwnPortsAreNoServices(t *testing.T) {
	h := &host{view: publishes("7946-7948;7947/udp")}
	during(t, h, func(p *Publisher) {
		h.holds(t, tcp(7946), tcp(7948), model.HostPort{Proto: model.UDP, Port: 7947})
		if want := map[model.HostPort]string{tcp(7947): "sluice itself (GOSSIP_PORT)"}; !maps.Equal(h.taken, want) || !errors.Is(p.Failed()[tcp(7947)], kernel.ErrTaken) {
			t.Errorf("taken %v, failed %v", h.taken, p.Failed())
		}
		h.change(func() {
			h.view = publishes("7947")
			o := h.view.Services["s0"].Options["net"]
			o.Bind = "192.0.2.1"
			h.view.Services["s0"].Options["net"] = o
		})
		p.Wake()
		time.Sleep(viewGap)
		synctest.Wait()
		if h.holds(t); len(h.taken) != 1 {
			t.Errorf("taken %v", h.taken)
		}
	})
}

func TestAnAddressMayComeLater(t *testing.T) {
	v := publishes("80")
	s := v.Services["s0"]
	o := s.Options["net"]
	o.Bind = "192.0.2.1;192.0.2.9"
	s.Options["net"] = o
	at := func(a string) model.HostPort {
		return model.HostPort{Proto: model.TCP, Port: 80, Addr: netip.MustParseAddr(a)}
	}
	h := &host{view: v, errs: map[model.HostPort]error{at("192.0.2.9"): fmt.Errorf("hold port: %w", kernel.ErrNotExist)}}
	during(t, h, func(p *Publisher) {
		h.holds(t, at("192.0.2.1"))
		if got := p.Absent(); len(got) != 1 || !got[netip.MustParseAddr("192.0.2.9")] || len(p.Failed()) > 0 {
			t.Errorf("absent %v, failed %v", got, p.Failed())
		}
		h.change(func() { h.errs = nil })
		time.Sleep(retry)
		synctest.Wait()
		h.holds(t, at("192.0.2.1"), at("192.0.2.9"))
		if len(p.Absent()) > 0 || h.log.Len() > 0 {
			t.Errorf("absent %v, told %s", p.Absent(), &h.log)
		}
	})
}

func TestALossToAnOlderServiceIsToldOnce(t *testing.T) {
	h := &host{view: publishes("80-81", "81-82")}
	during(t, h, func(p *Publisher) {
		told := func(lost, regained int) {
			t.Helper()
			synctest.Wait()
			text := h.log.String()
			if a, b := strings.Count(text, "port 81/tcp belongs to service s0, which is older"), strings.Count(text, "not another service's any more"); a != lost || b != regained {
				t.Errorf("told %d times of a loss, %d of its end, want %d and %d: %s", a, b, lost, regained, text)
			}
		}
		told(1, 0)
		time.Sleep(time.Minute)
		told(1, 0)
		// What is missing in a partial view is not gone.
		h.change(func() { h.view = publishes("90"); h.view.Partial = true })
		p.Wake()
		time.Sleep(viewGap)
		told(1, 0)
		h.change(func() { h.view = publishes("80", "81-82") })
		p.Wake()
		time.Sleep(viewGap)
		told(1, 1)
		h.holds(t, tcp(80), tcp(81), tcp(82))
	})
}

func TestNothingIsLetGoWhileTheViewIsPartial(t *testing.T) {
	h := &host{view: publishes("80")}
	during(t, h, func(p *Publisher) {
		h.change(func() { h.view = publishes("79", "81"); h.view.Partial = true })
		p.Wake()
		time.Sleep(viewGap)
		synctest.Wait()
		h.holds(t, tcp(79), tcp(81), tcp(80))
		h.change(func() { h.view.Partial = false })
		p.Wake()
		time.Sleep(viewGap)
		synctest.Wait()
		h.holds(t, tcp(79), tcp(81))
	})
}

func TestMissedConnectionsAreTold(t *testing.T) {
	h := &host{view: publishes("80")}
	during(t, h, func(*Publisher) {
		h.change(func() { h.missed = 5 })
		time.Sleep(2 * retry)
		synctest.Wait()
		if n := strings.Count(h.log.String(), "have missed the rules"); n != 1 || !strings.Contains(h.log.String(), `op="5 connections"`) {
			t.Errorf("told %d times: %s", n, &h.log)
		}
	})
}
