package diag_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/service"
)

const old model.ServiceID = "oldservice0000000000000f"

// publishing is a worker whose service publishes ports, and whose kernel has all that
// this takes. edit may change what is known before that.
func publishing(o model.ServiceOptions, edit ...func(*world)) *world {
	w := worker()
	s := w.view.Services[shop]
	s.Created = time.Unix(1000, 0)
	s.Options = map[model.NetworkID]model.ServiceOptions{web: o}
	w.view.Services[shop] = s
	w.view.Published = map[model.NetworkID]model.Network{web: w.view.Networks[web]}
	w.view.Entries = map[model.NetworkID]map[model.NodeID]model.Entry{web: {
		"node1": {Addr: addr("10.255.15.1"), Number: 1, VTEP: addr("192.0.2.1")},
		"node2": {Addr: addr("10.255.15.2"), Number: 2, VTEP: addr("192.0.2.2")},
	}}
	e, r := w.view.Endpoints[here], w.view.Remotes[there]
	e.MAC, e.Sandbox, e.Meshed = model.MACFor(e.Addr), "/run/docker/netns/"+here.Short(), true
	r.MAC, r.Meshed = model.MACFor(r.Addr), true
	w.view.Endpoints[here], w.view.Remotes[there] = e, r
	for _, f := range edit {
		f(w)
	}
	w.counting()
	w.last.Have = w.last.Want
	return w
}

func ipvs(w *world) { w.view.Self.Datapath = service.IPVS }

// elder adds a service that is older, and publishes ports itself.
func elder(o model.ServiceOptions) func(*world) {
	return func(w *world) {
		w.view.Services[old] = model.Service{
			ID: old, Name: "old", Created: time.Unix(1, 0), VIPs: map[model.NetworkID]netip.Addr{web: addr("10.255.0.8")},
			Options: map[model.NetworkID]model.ServiceOptions{web: o},
		}
	}
}

func taken(port uint16, process string) func(*world) {
	return func(w *world) {
		p := model.HostPort{Proto: model.TCP, Port: port}
		w.view.Taken = map[model.HostPort]string{p: process}
		w.failed = map[model.HostPort]error{p: &kernel.TakenError{Port: p, Process: process}}
	}
}

func noTasks(w *world) { w.view.Endpoints, w.view.Remotes = nil, nil }

func transit(w *world) {
	n := w.view.Networks[web]
	n.Transit = true
	w.view.Networks[web] = n
	w.view.Endpoints = nil
}

func byDNS(w *world) {
	s := w.view.Services[shop]
	s.VIPs = nil
	w.view.Services[shop] = s
	e, r := w.view.Endpoints[here], w.view.Remotes[there]
	e.Task.VIP, e.Prepared, r.Task.VIP, r.Prepared = netip.Addr{}, netip.Addr{}, netip.Addr{}, netip.Addr{}
	w.view.Endpoints[here], w.view.Remotes[there] = e, r
}

func askPort(port string) string { return diag.PathEntry + "?" + url.Values{"port": {port}}.Encode() }

// TestTheWayOfAPublishedPortInWords compares the answers of some nodes with their
// golden text: each variant of the way names its own hops.
func TestTheWayOfAPublishedPortInWords(t *testing.T) {
	both := model.ServiceOptions{Published: "53/udp;81:80/tcp"}
	masked := model.ServiceOptions{Published: "81:80/tcp", Source: model.Masquerade, Allow: "192.0.2.0/24;198.51.100.7/32", Bind: "192.0.2.1"}
	unready := func(w *world) {
		e, r := w.view.Endpoints[here], w.view.Remotes[there]
		e.Meshed, r.Task.Ready = false, false
		w.view.Endpoints[here], w.view.Remotes[there] = e, r
	}
	for name, c := range map[string]struct {
		w    *world
		port string
		ill  bool
	}{
		"entry-nft":         {publishing(both), "81", false},
		"entry-ipvs":        {publishing(both, ipvs), "81", false},
		"entry-udp":         {publishing(both), "53/udp", false},
		"entry-masquerade":  {publishing(masked), "81", false},
		"entry-transit":     {publishing(both, transit), "81/tcp", false},
		"entry-dnsrr":       {publishing(both, byDNS, ipvs), "81/tcp", false},
		"entry-no-tasks":    {publishing(both, noTasks), "81", true},
		"entry-unready":     {publishing(both, unready, ipvs), "81", true},
		"entry-two-owners":  {publishing(both, elder(model.ServiceOptions{Published: "81/tcp"})), "81", true},
		"entry-process":     {publishing(both, taken(81, "nginx (pid 7)")), "81", true},
		"entry-range":       {publishing(model.ServiceOptions{Published: "8000-8009:9000-9009"}), "8004", false},
		"entry-one-element": {publishing(model.ServiceOptions{Published: "8000-8009"}), "8004", false},
		"entry-all":         {publishing(model.ServiceOptions{Published: "53/udp;80-90/tcp"}, elder(model.ServiceOptions{Published: "81:80/tcp"}), taken(85, "nginx (pid 7)")), "", true},
		"entry-all-is-well": {publishing(both), "", false},
	} {
		t.Run(name, func(t *testing.T) {
			var a diag.Ports
			raw := c.w.ask(t, askPort(c.port), &a)
			golden.Check(t, name, a.Text())
			if len(a.Problems) > 0 != c.ill {
				t.Errorf("problems: %+v", a.Problems)
			}
			if again, err := json.Marshal(a); err != nil || !bytes.Equal(bytes.TrimSpace(raw), again) || bytes.Contains(raw, []byte("null")) {
				t.Errorf("%v\n%s\n%s", err, raw, again)
			}
			for _, p := range a.Problems {
				if p.Do == "" {
					t.Errorf("nothing to do: %s", p.What)
				}
			}
			for _, x := range a.Ports {
				if x.Path == nil {
					continue
				}
				for _, h := range x.Path.Hops {
					if strings.HasPrefix(h.Kernel, "not there") || strings.HasPrefix(h.Kernel, "another") || h.At == "" || h.Does == "" {
						t.Errorf("%s: hop %+v", x.Port, h)
					}
				}
			}
		})
	}
}

// TestHopsTellWhatTheKernelHas, object by object, and not what it should have.
func TestHopsTellWhatTheKernelHas(t *testing.T) {
	for _, w := range []*world{
		publishing(model.ServiceOptions{Published: "81:80/tcp", Allow: "192.0.2.0/24"}),
		publishing(model.ServiceOptions{Published: "81:80/tcp", Source: model.Masquerade}, ipvs),
	} {
		words := func() (out []string) {
			var a diag.Ports
			w.ask(t, askPort("81"), &a)
			for _, h := range a.Ports[0].Path.Hops {
				out = append(out, h.Kernel)
			}
			return out
		}
		well, seen := words(), 0
		all := w.last.Want
		for k := range all {
			w.last.Have = make(kernel.State)
			for o, v := range all {
				if o != k {
					w.last.Have[o] = v
				}
			}
			now := strings.Join(words(), "\n")
			if told := strings.Contains(now, "not there: "+k.String()); told {
				seen++
			} else if now != strings.Join(well, "\n") {
				t.Errorf("without %s: %s", k, now)
			}
			w.last.Have = all
			w.last.Failed = map[kernel.Key]error{k: errors.New("add " + k.String() + ": refused")}
			if now := strings.Join(words(), "\n"); now != strings.Join(well, "\n") && !strings.Contains(now, k.String()+": refused") {
				t.Errorf("refused %s: %s", k, now)
			}
			w.last.Failed = nil
		}
		if seen < 12 {
			t.Errorf("%d objects of the way are told by hops, of %d", seen, len(all))
		}
	}
}

// TestWhatBecameOfAPort: its state, who has it, and what to do.
func TestWhatBecameOfAPort(t *testing.T) {
	tcp := model.ServiceOptions{Published: "81:80/tcp"}
	rule := kernel.MeshPort{Proto: model.TCP, Port: 81}
	without := func(k kernel.Key) func(*world) {
		return func(w *world) {
			have := make(kernel.State)
			for o, v := range w.last.Want {
				if o != k {
					have[o] = v
				}
			}
			w.last.Have = have
		}
	}
	for _, c := range []struct {
		name        string
		w           *world
		after       func(*world)
		state, why  string
		owner, what string // of the problem; empty: there is none
		do          string
	}{
		{"served", publishing(tcp), nil, diag.PortServed, "2 of 2 tasks", "service shop", "", ""},
		{"served by ip_vs", publishing(tcp, ipvs), nil, diag.PortServed, "2 of 2 tasks", "service shop", "", ""},
		{"served by DNS names", publishing(tcp, byDNS), nil, diag.PortServed, "2 of 2 tasks", "service shop", "", ""},
		{"in transit", publishing(tcp, transit), nil, diag.PortServed, "1 of 1 tasks", "service shop", "", ""},
		{"no tasks", publishing(tcp, noTasks), nil, diag.PortRefuses, "no tasks", "service shop", "", ""},
		{"no tasks, with ip_vs", publishing(tcp, noTasks, ipvs), nil, diag.PortRefuses, "no tasks", "service shop", "", ""},
		{"a process has it", publishing(tcp, taken(81, "nginx (pid 7)")), nil, diag.PortLost, "", "process nginx (pid 7)",
			"shop does not have port 81/tcp here: it is held by nginx (pid 7)", "end that process"},
		{"nobody has it", publishing(tcp, taken(81, "nobody: too many open files")), nil, diag.PortFailed, "too many open files", "service shop", "not served at port 81/tcp: too many open files", "sluice diff"},
		{"the rule is not there", publishing(tcp), without(rule), diag.PortWaits, rule.String() + " is not in the kernel yet", "service shop", "not served at port 81/tcp yet", "normal for seconds"},
		{"the kernel refuses the rule", publishing(tcp), func(w *world) {
			w.last.Failed = map[kernel.Key]error{rule: errors.New("no space")}
		}, diag.PortFailed, "no space", "service shop", "not served at port 81/tcp: no space", "sluice diff"},
		{"the way in is not there", publishing(tcp), without(kernel.Link{NS: "sluice-webnetwork00", Name: "mesh0", Kind: kernel.Veth}), diag.PortWaits, "mesh0 is not in the kernel", "service shop", "yet", "sluice status"},
		{"no room", publishing(tcp), func(w *world) { w.full = map[model.NetworkID]error{web: errors.New("its subnet is small")} },
			diag.PortFailed, "its subnet is small", "service shop", "published ports of network web are not served by this node: its subnet is small", "sluice.publish.nodes"},
		{"no claim", publishing(tcp), func(w *world) { w.view.Entries = nil }, diag.PortWaits, "no address in the network yet", "service shop", "yet: this node has no address", "normal for seconds"},
		{"no network", publishing(tcp), func(w *world) { w.view.Networks = nil }, diag.PortWaits, "not known here", "service shop", "yet: the network", "leader"},
		{"the address is elsewhere", publishing(model.ServiceOptions{Published: "81:80/tcp", Bind: "192.0.2.9"}), func(w *world) {
			w.absent = map[netip.Addr]bool{addr("192.0.2.9"): true}
		}, diag.PortAbsent, "does not have the address", "service shop", "", ""},
		{"no socket for the protocol", publishing(model.ServiceOptions{Published: "81:80/sctp"}), func(w *world) {
			w.failed = map[model.HostPort]error{{Proto: model.SCTP, Port: 81}: kernel.ErrUnsupported}
		}, diag.PortServed, "2 of 2", "service shop", "published port 81/sctp is not held by a socket", "modprobe sctp"},
		{"no socket for many ports", publishing(model.ServiceOptions{Published: "81:80/sctp"}), func(w *world) {
			w.failed = map[model.HostPort]error{{Proto: model.SCTP, Port: 81}: kernel.ErrUnsupported}
			for p := range uint16(999) {
				w.failed[model.HostPort{Proto: model.SCTP, Port: 8000 + p}] = kernel.ErrUnsupported
			}
		}, diag.PortServed, "2 of 2", "service shop", "published port 81/sctp, as 999 more of sctp, is not held by a socket", "modprobe sctp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.after != nil {
				c.after(c.w)
			}
			var a diag.Ports
			c.w.ask(t, diag.PathEntry, &a)
			if len(a.Ports) != 1 || a.Ports[0].State != c.state || !strings.Contains(a.Ports[0].Why, c.why) || !strings.Contains(a.Text(), c.owner) {
				t.Fatalf("%+v\n%s", a.Ports, a.Text())
			}
			if (c.what != "") != (len(a.Problems) == 1) {
				t.Fatalf("%+v", a.Problems)
			}
			// The others tell the same.
			var st diag.Status
			var ss diag.Services
			c.w.ask(t, diag.PathStatus, &st)
			c.w.ask(t, diag.PathServices, &ss)
			for _, ps := range [][]diag.Problem{a.Problems, st.Problems, ss.Problems} {
				found := c.what == ""
				for _, p := range ps {
					found = found || strings.Contains(p.What, c.what) && strings.Contains(p.Do, c.do)
				}
				if !found {
					t.Errorf("no %q, %q in %+v", c.what, c.do, ps)
				}
			}
			if !strings.Contains(ss.Text(), a.Ports[0].Port) || len(ss.Ports) != 1 {
				t.Errorf("sluice services: %s", ss.Text())
			}
			sum := st.Published
			if c.state == diag.PortServed != (sum.Served == 1) || c.state == diag.PortLost != (sum.Lost == 1) || sum.Served+sum.Lost+sum.Idle != 1 || !strings.Contains(st.Text(), "published") {
				t.Errorf("sluice status: %+v", sum)
			}
		})
	}
}

// TestAServiceThatTakesAPortFromItself is told of that, not of a service that is older.
func TestAServiceThatTakesAPortFromItself(t *testing.T) {
	w := publishing(model.ServiceOptions{Published: "81"}, func(w *world) {
		second(w)
		w.view.Services[shop].Options[far] = model.ServiceOptions{Published: "81"}
		w.view.Entries[far] = map[model.NodeID]model.Entry{"node1": {Addr: addr("10.254.15.1"), Number: 2, VTEP: addr("192.0.2.1")}}
	})
	var a diag.Ports
	w.ask(t, diag.PathEntry, &a)
	if len(a.Ports) != 2 || a.Ports[1].Why != "the service has it on another network" || len(a.Problems) != 1 || !strings.Contains(a.Problems[0].What, "service shop publishes port 81/tcp on several networks; on ") {
		t.Errorf("%s", a.Text())
	}
}

// TestALocalNetworkPublishesNothing, whatever its services' options say.
func TestALocalNetworkPublishesNothing(t *testing.T) {
	w := publishing(model.ServiceOptions{Published: "81"}, func(w *world) {
		n := w.view.Networks[web]
		n.Local = true
		w.view.Networks[web] = n
	})
	var a diag.Ports
	if w.ask(t, diag.PathEntry, &a); len(a.Ports)+len(a.Problems) > 0 {
		t.Errorf("%s", a.Text())
	}
}

// TestAKernelWithoutTheMesh is told of, if anybody publishes anything.
func TestAKernelWithoutTheMesh(t *testing.T) {
	w := publishing(model.ServiceOptions{Published: "81"}, func(w *world) {
		w.view.Self.NoMesh = true
		w.cfg.Abilities = func() []diag.Ability {
			return []diag.Ability{{Name: diag.AbilityMesh, Err: errors.New("nft socket is missing")}}
		}
	})
	var a diag.Ports
	w.ask(t, diag.PathEntry, &a)
	if len(a.Ports) > 0 || len(a.Problems) != 1 || !strings.Contains(a.Problems[0].What, "none of the ports that shop publish: nft socket is missing") {
		t.Errorf("%+v", a)
	}
	w = worker()
	w.view.Self.NoMesh = true
	if w.ask(t, diag.PathEntry, &a); len(a.Problems) > 0 {
		t.Errorf("%+v", a.Problems)
	}
}

// TestPortsThatAreNotHere are a wrong question, and the answer says what there is.
func TestPortsThatAreNotHere(t *testing.T) {
	w := publishing(model.ServiceOptions{Published: "81:80/tcp;8000-8010/udp"}, elder(model.ServiceOptions{Published: "90", Nodes: "zone=b"}))
	for port, want := range map[string]string{
		"82":       "no service publishes port 82; there is: ",
		"81/udp":   "no service publishes port 81/udp; there is: 81/tcp, 8000-8010/udp",
		"90":       "service old publishes port 90, but not on this node: sluice.publish.nodes=zone=b",
		"web":      `"web" is no port`,
		"0":        `"0" is no port`,
		"65536":    "from 1 to 65535",
		"81/":      `"81/" is no port`,
		"81/icmp":  "81/sctp",
		"8011/udp": "no service publishes port 8011/udp",
	} {
		rec := httptest.NewRecorder()
		w.server().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, askPort(port), nil))
		if rec.Code != http.StatusBadRequest || !strings.Contains(rec.Body.String(), want) {
			t.Errorf("%s: %d %s, want %q", port, rec.Code, rec.Body, want)
		}
	}
}

// TestNetworksOfPublishedPorts: those in transit, this node's claims, and those that
// have no room.
func TestNetworksOfPublishedPorts(t *testing.T) {
	w := publishing(model.ServiceOptions{Published: "81"}, transit)
	var a diag.Networks
	w.ask(t, diag.PathNetworks, &a)
	if len(a.Networks) != 1 || a.Networks[0].State != "transit" || a.Networks[0].Entry != "10.255.15.1" || a.Networks[0].Number != 1 || !strings.Contains(a.Text(), "10.255.15.1 number 1") {
		t.Errorf("%+v\n%s", a.Networks, a.Text())
	}
	var st diag.Status
	if w.ask(t, diag.PathStatus, &st); st.Transit != 1 || !strings.Contains(st.Text(), "1 networks (1 for published ports only)") {
		t.Errorf("%s", st.Text())
	}
	w.full = map[model.NetworkID]error{web: errors.New("its subnet is small")}
	if w.ask(t, diag.PathNetworks, &a); len(a.Problems) != 1 || !strings.Contains(a.Problems[0].What, "network web are not served by this node: its subnet") {
		t.Errorf("%+v", a.Problems)
	}
}

// TestAServiceTellsItsPublishedPorts, and what its alias has counted.
func TestAServiceTellsItsPublishedPorts(t *testing.T) {
	for name, edit := range map[string]func(*world){"published-nft": func(*world) {}, "published-ipvs": ipvs} {
		w := publishing(model.ServiceOptions{Published: "80-90/tcp"}, edit, taken(85, "nginx (pid 7)"))
		var e diag.Entry
		w.ask(t, pathShop, &e)
		golden.Check(t, "service-"+name, e.Text())
		n := e.Networks[0]
		if n.Alias != "250.0.16.9" || n.AliasTraffic == nil || n.AliasTraffic.Connections == 0 || *n.AliasTraffic == *n.Traffic || len(n.Published) != 3 || len(e.Problems) != 1 {
			t.Errorf("%s: %+v %+v", name, n, e.Problems)
		}
	}
}
