package diag_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/plan"
	"sluice/lb/service"
)

// counting makes the kernel of a node have all that its plan wants, and numbers at
// all that balances: each its own, so that none can be taken for another.
func (w *world) counting() *world {
	want := plan.Host(w.view)
	w.last.Want = want
	w.cfg.Traffic = func(_ context.Context, ns string) (map[kernel.Key]kernel.Traffic, error) {
		out := make(map[kernel.Key]kernel.Traffic)
		n := uint64(0)
		for _, k := range want.Keys() {
			if k.Netns() != ns {
				continue
			}
			switch k.(type) {
			case kernel.IPVSService, kernel.IPVSDest:
				n++
				out[k] = kernel.Traffic{Connections: n, PacketsIn: 10 * n, PacketsOut: 20 * n, BytesIn: 100 * n, BytesOut: 200 * n, Active: int(n), Inactive: int(2 * n)}
			case kernel.VIP:
				n++
				out[k] = kernel.Traffic{Connections: n}
			}
		}
		return out, nil
	}
	return w
}

// balanced is a worker whose kernel has ip_vs, and whose service asks for much.
func balanced(mode string) *world {
	w := worker()
	w.view.Self.Datapath = service.IPVS
	s := w.view.Services[shop]
	s.Options = map[model.NetworkID]model.ServiceOptions{web: {
		Scheduler: "wlc", Mode: mode, Ports: "80;81:8081/udp", Persist: 300, PersistBits: 24, OnePacket: true, Upper: 100, Lower: 50, Idle: 600,
	}}
	w.view.Services[shop] = s
	for id, e := range w.view.Endpoints {
		e.Options = s.Options[web]
		w.view.Endpoints[id] = e
	}
	for id, r := range w.view.Remotes {
		r.Options = s.Options[web]
		w.view.Remotes[id] = r
	}
	return w
}

// TestTheEntryOfAServiceInWords compares the answer of some nodes with its golden text.
func TestTheEntryOfAServiceInWords(t *testing.T) {
	nft := balanced("nat")
	nft.view.Self.Datapath = ""
	nft.cfg.Abilities = func() []diag.Ability {
		return []diag.Ability{{Name: diag.AbilityIPVS, Err: errors.New("ipvs is not supported by this kernel")}}
	}
	plain := worker()
	plain.view.Self.Datapath = service.IPVS
	draining := balanced("dr")
	r := draining.view.Remotes[there]
	r.Task.Leaving = true
	draining.view.Remotes[there] = r
	for name, w := range map[string]*world{
		"service-ipvs": plain.counting(), "service-ipvs-nat": balanced("nat").counting(), "service-ipvs-leaving": draining.counting(),
		"service-nft": nft.counting(), "service-two-networks": second(worker()).counting(),
	} {
		var e diag.Entry
		raw := w.ask(t, pathShop, &e)
		golden.Check(t, name, e.Text())
		if len(e.Problems) > 0 {
			t.Errorf("%s: %+v", name, e.Problems)
		}
		if again, err := json.Marshal(e); err != nil || !bytes.Equal(bytes.TrimSpace(raw), again) || bytes.Contains(raw, []byte("null")) {
			t.Errorf("%s: %v\n%s\n%s", name, err, raw, again)
		}
	}
}

// second gives the service another network.
func second(w *world) *world {
	n := w.view.Networks[web]
	n.ID, n.Name, n.VNI = far, "far", 8
	n.Subnet, n.Gateway = netip.MustParsePrefix("10.254.0.0/20"), addr("10.254.0.1")
	w.view.Networks[far] = n
	s := w.view.Services[shop]
	s.VIPs[far] = addr("10.254.0.9")
	e := w.view.Endpoints[here]
	e.ID, e.Network, e.Addr, e.Task.VIP, e.Prepared = "cccccccccccc", far, addr("10.254.0.2"), s.VIPs[far], s.VIPs[far]
	w.view.Endpoints[e.ID] = e
	return w
}

// TestNumbersAreTheKernelsOwn: each number stands at the mark and destination that
// the kernel counted it at, and a backend's is the sum of its destinations'.
func TestNumbersAreTheKernelsOwn(t *testing.T) {
	w := balanced("nat").counting()
	const ns = "sluice-webnetwork00"
	traffic, err := w.cfg.Traffic(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	var e diag.Entry
	w.ask(t, pathShop, &e)
	n := e.Networks[0]
	sums := make(map[string]uint64)
	var total uint64
	shown := 0
	for _, s := range n.IPVS {
		shown++
		want := traffic[kernel.IPVSService{NS: ns, Mark: s.Mark}]
		if s.Traffic == nil || *s.Traffic != diag.Traffic(want) || want.Connections == 0 {
			t.Errorf("FWM %d: %+v, want %+v", s.Mark, s.Traffic, want)
		}
		total += want.Connections
		for _, d := range s.Destinations {
			shown++
			at := netip.MustParseAddrPort(d.Addr)
			want := traffic[kernel.IPVSDest{NS: ns, Mark: s.Mark, IP: at.Addr(), Port: at.Port()}]
			if d.Traffic == nil || *d.Traffic != diag.Traffic(want) || want.Connections == 0 {
				t.Errorf("FWM %d -> %s: %+v, want %+v", s.Mark, d.Addr, d.Traffic, want)
			}
			sums[at.Addr().String()] += want.BytesOut
		}
	}
	if shown != len(traffic) {
		t.Errorf("%d objects are shown of %d that the kernel counts at", shown, len(traffic))
	}
	for _, b := range n.Backends {
		if b.Traffic == nil || b.Traffic.BytesOut != sums[b.Addr] {
			t.Errorf("%s: %+v, want %d bytes out", b.Addr, b.Traffic, sums[b.Addr])
		}
	}
	if n.Traffic == nil || n.Traffic.Connections != total {
		t.Errorf("%+v, want %d connections", n.Traffic, total)
	}
}

// TestWhichServiceIsMeant: by name, id, beginning of the id, and network.
func TestWhichServiceIsMeant(t *testing.T) {
	w := second(worker())
	for id, name := range map[model.ServiceID]string{
		"shopservice1another000000e": "shops", "elsewhere": "elsewhere", "twin1": "twin", "twin2": "twin",
	} {
		s := model.Service{ID: id, Name: name, VIPs: map[model.NetworkID]netip.Addr{web: addr(fmt.Sprintf("10.255.1.%d", len(w.view.Services)))}}
		if name == "elsewhere" {
			s.VIPs = map[model.NetworkID]netip.Addr{"another": addr("10.1.0.1")}
		}
		w.view.Services[id] = s
	}
	for _, c := range []struct {
		name, network string
		want          string   // the networks of shop
		words         []string // of the error
	}{
		{"shop", "", "far web", nil},
		{"shop", "web", "web", nil},
		{"shop", "farnet", "far", nil},
		{string(shop), string(web), "web", nil},
		{"shopservice0", "", "far web", nil},
		{"shpo", "", "", []string{`no service "shpo"`, "there is: shop, shops, twin"}},
		{"twi", "", "", []string{`"twi" fits several`, "twin (twin1), twin (twin2)"}},
		{"twin", "", "", []string{`"twin" fits several`, "by its id"}},
		{"shopservice", "", "", []string{`fits several`, "shop (shopservice0000000000000e)", "shops ("}},
		{"elsewhere", "", "", []string{`"elsewhere" is on no network that this node serves`}},
		{"", "", "", []string{`no service ""`}},
		{"shop", "wbe", "", []string{`service shop is not on one network "wbe"`, "it is on: web, far"}},
		{"shops", "far", "", []string{"it is on: web"}},
	} {
		t.Run(c.name+" "+c.network, func(t *testing.T) {
			rec := httptest.NewRecorder()
			q := url.Values{"name": {c.name}, "network": {c.network}}
			w.server().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, diag.PathService+"?"+q.Encode(), nil))
			if c.words != nil {
				for _, word := range c.words {
					if rec.Code != http.StatusBadRequest || !strings.Contains(rec.Body.String(), word) {
						t.Errorf("%d %s, want %q", rec.Code, rec.Body, word)
					}
				}
				return
			}
			var e diag.Entry
			if err := json.Unmarshal(rec.Body.Bytes(), &e); err != nil {
				t.Fatalf("%d %s: %v", rec.Code, rec.Body, err)
			}
			var nets []string
			for _, n := range e.Networks {
				nets = append(nets, n.Network)
			}
			if got := strings.Join(nets, " "); got != c.want || e.ID != string(shop) {
				t.Errorf("%s on %s, want %s", e.ID, got, c.want)
			}
		})
	}
}

// TestManyNamesAreCut: a person who has mistyped wants the near ones, not all.
func TestManyNamesAreCut(t *testing.T) {
	w := worker()
	for i := range 100 {
		id := model.ServiceID(fmt.Sprintf("service%02d", i))
		w.view.Services[id] = model.Service{ID: id, Name: "api-" + strings.Repeat("x", i), VIPs: map[model.NetworkID]netip.Addr{web: netip.AddrFrom4([4]byte{10, 255, 1, byte(i)})}}
	}
	rec := httptest.NewRecorder()
	w.server().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, diag.PathService+"?name=shp", nil))
	if got := rec.Body.String(); !strings.Contains(got, "there is: shop, api-,") || !strings.HasSuffix(got, " and 93 more\n") {
		t.Error(got)
	}
}

// TestWhatIsWrongWithAService is named, with what to do; else the verdict is that
// it serves.
func TestWhatIsWrongWithAService(t *testing.T) {
	unready := func(w *world) {
		e, r := w.view.Endpoints[here], w.view.Remotes[there]
		e.Task.Ready, r.Task.Ready = false, false
		w.view.Endpoints[here], w.view.Remotes[there] = e, r
	}
	withoutVIP := func(w *world, vips map[model.NetworkID]netip.Addr) {
		w.view.Services = map[model.ServiceID]model.Service{}
		if vips != nil {
			w.view.Services[shop] = model.Service{ID: shop, Name: "shop", VIPs: vips}
		}
		e, r := w.view.Endpoints[here], w.view.Remotes[there]
		e.Task.VIP, r.Task.VIP = netip.Addr{}, netip.Addr{}
		w.view.Endpoints[here], w.view.Remotes[there] = e, r
	}
	// lost has ip_vs balance, without one of its destinations.
	lost := func(w *world) kernel.Key {
		w.view.Self.Datapath = service.IPVS
		w.counting()
		read := w.cfg.Traffic
		keys := w.last.Want.Keys()
		at := slices.IndexFunc(keys, func(k kernel.Key) bool { d, ok := k.(kernel.IPVSDest); return ok && d.IP == addr("10.255.0.3") })
		w.cfg.Traffic = func(ctx context.Context, ns string) (map[kernel.Key]kernel.Traffic, error) {
			m, err := read(ctx, ns)
			delete(m, keys[at])
			return m, err
		}
		return keys[at]
	}
	vip := kernel.VIP{NS: "sluice-webnetwork00", IP: addr("10.255.0.9")}
	for _, c := range []struct {
		name string
		edit func(*world)
		want [][2]string // words of what, words of do
	}{
		{"nothing", func(*world) {}, nil},
		{"a scheduler is replaced", func(w *world) {
			s := w.view.Services[shop]
			s.Options = map[model.NetworkID]model.ServiceOptions{web: {Scheduler: "lc"}}
			w.view.Services[shop] = s
		}, nil},
		{"no backend is ready", unready, [][2]string{{"shop has 2 tasks and none is ready: connections to it are refused", "docker service ps --no-trunc shop"}}},
		{"no backend is ready for ip_vs", func(w *world) { w.view.Self.Datapath = service.IPVS; unready(w) }, [][2]string{{"none is ready", "docker service ps"}}},
		{"no tasks", func(w *world) { w.view.Endpoints, w.view.Remotes = nil, nil }, [][2]string{{"shop has 0 tasks", "docker service ps"}}},
		{"by DNS", func(w *world) { withoutVIP(w, map[model.NetworkID]netip.Addr{}) }, nil},
		{"by DNS and none ready", func(w *world) { withoutVIP(w, map[model.NetworkID]netip.Addr{}); unready(w) }, [][2]string{{"its name leads to none", "docker service ps"}}},
		{"no VIP here", func(w *world) { withoutVIP(w, map[model.NetworkID]netip.Addr{far: addr("10.254.0.9")}) }, [][2]string{{"VIPs on other networks, but none on web", "docker service inspect"}}},
		{"no VIP told", func(w *world) { withoutVIP(w, nil) }, [][2]string{{"no manager has told of the service", "sluice status"}}},
		{"another service has its VIP", func(w *world) {
			w.view.Services["other"] = model.Service{ID: "other", Name: "other", VIPs: map[model.NetworkID]netip.Addr{web: vip.IP}}
		}, [][2]string{{"service other claims the VIP 10.255.0.9 on network web too", "normal for seconds"}}},
		{"the kernel refuses", func(w *world) {
			w.last.Failed = map[kernel.Key]error{
				vip: errors.New("add vip: no space"), kernel.Netns{Name: "other"}: errors.New("another network's"),
			}
		}, [][2]string{{"network web: add vip: no space", ""}}},
		{"the kernel has lost a destination", func(w *world) { lost(w) }, [][2]string{{"-> 10.255.0.3 is not in the kernel", "sluice status"}}},
		{"the kernel refuses a destination", func(w *world) {
			w.last.Failed = map[kernel.Key]error{lost(w): errors.New("add destination: no space")}
		}, [][2]string{{"add destination: no space", ""}}},
		{"a destination is about to be made", func(w *world) { lost(w); w.last.Want = nil }, nil},
		{"the counters cannot be read", func(w *world) {
			w.cfg.Traffic = func(context.Context, string) (map[kernel.Key]kernel.Traffic, error) {
				return nil, errors.New("open namespace: no such file")
			}
		}, [][2]string{{"cannot be read: open namespace", "sluice diff"}}},
		{"the counters are not read", func(w *world) { w.cfg.Traffic = nil }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := worker().counting()
			c.edit(w)
			var e diag.Entry
			w.ask(t, diag.PathService+"?name="+string(shop), &e)
			if len(e.Problems) != len(c.want) {
				t.Fatalf("%+v, want %d", e.Problems, len(c.want))
			}
			for i, p := range e.Problems {
				if !strings.Contains(p.What, c.want[i][0]) || !strings.Contains(p.Do, c.want[i][1]) || !strings.Contains(e.Text(), "- "+p.What+"\n") {
					t.Errorf("%+v, want %q\n%s", p, c.want[i], e.Text())
				}
			}
		})
	}
}

// TestAReplacedSchedulerIsNoted in the list of services, as a note, not a problem.
func TestAReplacedSchedulerIsNoted(t *testing.T) {
	w := balanced("dr")
	for datapath, want := range map[string]string{
		service.IPVS: "wlc",
		"":           "\nnote: shop on web asks for scheduler wlc; here wrr: wlc goes by open connections",
	} {
		w.view.Self.Datapath = datapath
		var s diag.Services
		w.ask(t, diag.PathServices, &s)
		if text := s.Text(); !strings.Contains(text, want) || len(s.Problems) > 0 || strings.Contains(text, "note") != strings.Contains(want, "note") {
			t.Errorf("%q: no %q in\n%s", datapath, want, text)
		}
	}
}
