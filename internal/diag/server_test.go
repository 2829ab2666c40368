package diag_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sluice/driver/overlay"
	"sluice/internal/diag"
	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/internal/reconcile"
	"sluice/internal/view"
	"sluice/ipam/pool"
)

// world is what a server is asked about.
type world struct {
	cfg    diag.Config
	view   model.View
	engine model.EngineSnapshot
	peers  []view.Peer
	stats  reconcile.Stats
	last   reconcile.Round
	ops    []kernel.Op
	unread error // what an inspection fails with
	up     bool
	gossip string

	full   map[model.NetworkID]error
	failed map[model.HostPort]error
	absent map[netip.Addr]bool
	missed uint64
}

func (w *world) View() model.View             { return w.view }
func (w *world) Engine() model.EngineSnapshot { return w.engine }
func (w *world) Peers() []view.Peer           { return w.peers }

func (w *world) Unclaimed() map[model.NetworkID]error { return w.full }
func (w *world) Failed() map[model.HostPort]error     { return w.failed }
func (w *world) Absent() map[netip.Addr]bool          { return w.absent }
func (w *world) Missed() uint64                       { return w.missed }

func (w *world) Stats() reconcile.Stats { return w.stats }
func (w *world) Last() reconcile.Round  { return w.last }
func (w *world) Inspect(context.Context) ([]kernel.Op, error) {
	return w.ops, w.unread
}

func (w *world) server() *diag.Server {
	w.cfg.Hub, w.cfg.Loop, w.cfg.Sockets = w, w, w
	return diag.NewServer(w.cfg)
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

const (
	web    model.NetworkID  = "webnetwork00000000000000a"
	far    model.NetworkID  = "farnetwork00000000000000b"
	no     model.NetworkID  = "refusednetwork000000000cc"
	never  model.NetworkID  = "waitingnetwork000000000dd"
	shop   model.ServiceID  = "shopservice0000000000000e"
	here   model.EndpointID = "aaaaaaaaaaaa1111111111111111111111111111111111111111111111111111"
	there  model.EndpointID = "bbbbbbbbbbbb1111111111111111111111111111111111111111111111111111"
	secret                  = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
)

// worker is a worker of a swarm of two nodes, with one network and one service,
// and nothing wrong.
func worker() *world {
	vip := addr("10.255.0.9")
	task := func(id string) model.Task {
		return model.Task{ID: model.TaskID(id), Service: shop, ServiceName: "shop", VIP: vip, Ready: true}
	}
	opts := map[string]string{options.VNI: "7", options.SecretKey: secret}
	return &world{
		cfg: diag.Config{
			Version: "v1.2.3", Scope: "global", Log: slog.New(slog.DiscardHandler),
			Settings: []diag.Setting{
				{Name: "VXLAN_PORT", Value: "4799", Default: true, Doc: "a port"},
				{Name: "GOSSIP_KEY", Value: options.Redacted, Doc: "a key"},
				{Name: "GOSSIP_BIND", Default: true},
			},
			Datapath: func() (string, string) { return "nft", "the kernel has all" },
			Abilities: func() []diag.Ability {
				return []diag.Ability{{Name: diag.AbilityIPVS, Use: "balances"}, {Name: "ipip", Use: "mode tun", Err: errors.New("no module; load it")}}
			},
			Ended: func() map[model.ServiceID]uint64 { return map[model.ServiceID]uint64{"shopservice0000000000000e": 2} },
			Calls: func() []diag.Call {
				return []diag.Call{
					{Method: "NetworkDriver.Join", Calls: 4, Failed: 2, Late: 1, Panics: 1, Longest: time.Second},
					{Method: "NetworkDriver.Leave", Calls: 3, Longest: 2 * time.Millisecond},
				}
			},
			Pools:    func() map[model.NetworkID]diag.Pool { return nil },
			Leases:   func() []pool.Listing { return nil },
			Dropped:  func(string) (uint64, error) { return 0, nil },
			Refusals: func() []diag.Problem { return nil },
			Trouble:  func() []diag.Problem { return nil },
			Memory:   func() uint64 { return 27 << 20 },
		},
		view: model.View{
			Revision: 3,
			Self:     model.Self{Node: "node1", VTEP: addr("192.0.2.1"), VXLANPort: 4799},
			Networks: map[model.NetworkID]model.Network{web: {
				ID: web, Name: "web", Subnet: netip.MustParsePrefix("10.255.0.0/20"), Gateway: addr("10.255.0.1"), VNI: 7, MTU: 1450,
				Options: model.NetworkOptions{Scheduler: "rr", Mode: "dr"},
			}},
			Endpoints: map[model.EndpointID]model.Endpoint{
				here: {ID: here, Network: web, Addr: addr("10.255.0.2"), Phase: model.Taken, Task: task("shop.1"), Prepared: vip},
			},
			Remotes: map[model.EndpointID]model.Remote{
				there: {ID: there, Network: web, Node: "node2", VTEP: addr("192.0.2.2"), Addr: addr("10.255.0.3"), Task: task("shop.2"), Prepared: vip},
			},
			Services: map[model.ServiceID]model.Service{shop: {ID: shop, Name: "shop", VIPs: map[model.NetworkID]netip.Addr{web: vip}}},
		},
		engine: model.EngineSnapshot{
			Alias: "sluice:latest", HostName: "h1", Version: "28.5.2",
			SwarmValid: true, Active: true, Node: "node1", NodeAddr: addr("192.0.2.1"), NetworksValid: true,
			Networks: map[model.NetworkID]model.EngineNetwork{web: {ID: web, Name: "web", Swarm: true, IPAM: "sluice:latest", Options: opts}},
		},
		peers:  []view.Peer{{Node: "node2", Name: "h2", VTEP: "192.0.2.2", Present: true, Endpoints: 1}},
		stats:  reconcile.Stats{Rounds: 40, Ops: 52, Drift: 1, Failures: 2, Drifts: map[string]uint64{"link": 1, "fdb": 0}},
		up:     true,
		gossip: "running on 192.0.2.1:7947",
	}
}

// leader is the leader of that swarm; it knows of networks that are not here.
func leader() *world {
	w := worker()
	w.engine.Manager, w.engine.Leader = true, true
	w.engine.Unallocated = map[model.NetworkID]string{never: "never"}
	w.engine.Networks[far] = model.EngineNetwork{
		ID: far, Name: "far", Swarm: true, IPAM: "sluice:latest", Subnet: netip.MustParsePrefix("10.254.0.0/20"), Gateway: addr("10.254.0.1"),
		Options: map[string]string{options.SecretKey: secret},
	}
	w.engine.Networks[no] = model.EngineNetwork{
		ID: no, Name: "no", Swarm: true, IPAM: "sluice:latest", Options: map[string]string{options.Refused: "VNI 7 belongs to network web", options.SecretKey: secret},
	}
	w.cfg.Pools = func() map[model.NetworkID]diag.Pool {
		return map[model.NetworkID]diag.Pool{web: {Used: 4, Size: 3838}, far: {Used: 1, Size: 3838}}
	}
	w.cfg.Refusals = func() []diag.Problem {
		return []diag.Problem{{What: "refused at 12:00:00: pool 10.0.0.0/24 overlaps", Do: "choose another --subnet"}}
	}
	return w
}

// outside is a node in no swarm, where a service is a wrong question.
func outside(w *world) *world {
	w.engine = model.EngineSnapshot{HostName: "h1", Version: "28.5.2", SwarmValid: true, NoSwarm: true}
	w.view = model.View{Self: model.Self{VXLANPort: 4799}}
	w.cfg.Abilities, w.cfg.Calls = func() []diag.Ability { return nil }, func() []diag.Call { return nil }
	w.peers, w.up, w.gossip = nil, false, "not running: the node is in no swarm"
	return w
}

// pathShop is the question for the service that every node in a swarm has here.
const pathShop = diag.PathService + "?name=shop"

// questions are all that a server answers.
var questions = []struct {
	path   string
	answer func() diag.Answer
}{
	{diag.PathStatus, func() diag.Answer { return new(diag.Status) }},
	{diag.PathNetworks, func() diag.Answer { return new(diag.Networks) }},
	{diag.PathServices, func() diag.Answer { return new(diag.Services) }},
	{pathShop, func() diag.Answer { return new(diag.Entry) }},
	{diag.PathEntry, func() diag.Answer { return new(diag.Ports) }},
	{diag.PathIPAM, func() diag.Answer { return new(diag.IPAM) }},
	{diag.PathDiff, func() diag.Answer { return new(diag.Diff) }},
	{diag.PathConfig, func() diag.Answer { return new(diag.Settings) }},
}

// ask puts a question over HTTP and reads the answer as the command does.
func (w *world) ask(t *testing.T, path string, out diag.Answer) (raw []byte) {
	t.Helper()
	w.cfg.Gossip = func() (bool, string) { return w.up, w.gossip }
	rec := httptest.NewRecorder()
	w.server().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
	if rec.Code != http.StatusOK || rec.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("%s: %d %v", path, rec.Code, rec.Header())
	}
	raw = rec.Body.Bytes()
	if err := json.Unmarshal(raw, out); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return raw
}

// TestAnswersInWords compares every answer of some nodes with its golden text.
func TestAnswersInWords(t *testing.T) {
	for name, w := range map[string]*world{"worker": worker(), "leader": leader(), "no-swarm": outside(worker()), "trouble": trouble()} {
		var b strings.Builder
		for _, q := range questions {
			if q.path == pathShop && len(w.view.Services) == 0 {
				continue
			}
			a := q.answer()
			w.ask(t, q.path, a)
			b.WriteString("== " + q.path + "\n" + a.Text() + "\n")
		}
		golden.Check(t, name, b.String())
	}
}

// trouble is a leader with everything wrong that a person can be told of.
func trouble() *world {
	w := leader()
	w.peers = append(w.peers, view.Peer{Node: "node3"})
	w.stats.DumpError = "netlink: interrupted"
	w.cfg.Firewall = func() string { return "firewalld: runs; 4799/udp open in zone public" }
	w.cfg.Trouble = func() []diag.Problem {
		return []diag.Problem{{What: "state cannot be saved: no space left", Do: "make room"}}
	}
	w.last.Failed = map[kernel.Key]error{
		kernel.Netns{Name: "sluice-webnetwork00"}:                     errors.New("add namespace sluice-webnetwork00: operation not permitted"),
		kernel.Sysctl{NS: "sluice-webnetwork00", Name: "net.ipv4.x"}:  errors.New("set net.ipv4.x: read-only file system"),
		kernel.Sysctl{NS: "sluice-webnetwork00", Name: "net.ipv4.x2"}: errors.New("set net.ipv4.x: read-only file system"), // one text, told once
		kernel.Sysctl{NS: "sluice-another", Name: "net.ipv4.x"}:       errors.New("set net.ipv4.x of another network: no such device"),
	}
	e := w.view.Endpoints[here]
	e.Task.Ready = false
	w.view.Endpoints[here] = e
	r := w.view.Remotes[there]
	r.Task.Leaving = true
	w.view.Remotes[there] = r
	w.ops = []kernel.Op{{Key: kernel.Netns{Name: "sluice-webnetwork00"}, Want: kernel.NetnsSpec{}}, {Key: kernel.Netns{Name: "sluice-stale"}, Have: kernel.NetnsSpec{}}}
	w.up, w.gossip = false, "not running: listen on 192.0.2.1:7947: address already in use"
	w.engine.Alias = ""
	return w
}

// TestNoAnswerHoldsASecret: the engine's options of every network carry the
// gossip key, and no text and no document may.
func TestNoAnswerHoldsASecret(t *testing.T) {
	for name, w := range map[string]*world{"worker": worker(), "leader": leader(), "trouble": trouble()} {
		for _, q := range questions {
			a := q.answer()
			raw := w.ask(t, q.path, a)
			for _, text := range []string{string(raw), a.Text()} {
				if strings.Contains(strings.ToLower(text), secret) {
					t.Errorf("%s: %s holds the gossip key", name, q.path)
				}
			}
		}
	}
}

// TestAnswersSurviveTheWire: the command has what the server meant, and a list
// without elements is a list for those who read JSON by program.
func TestAnswersSurviveTheWire(t *testing.T) {
	for name, w := range map[string]*world{"worker": worker(), "leader": leader(), "no swarm": outside(worker()), "trouble": trouble()} {
		for _, q := range questions {
			if q.path == pathShop && len(w.view.Services) == 0 {
				continue
			}
			a := q.answer()
			raw := w.ask(t, q.path, a)
			again, err := json.Marshal(a)
			if err != nil || !bytes.Equal(bytes.TrimSpace(raw), again) {
				t.Errorf("%s, %s: %v\n%s\n%s", name, q.path, err, raw, again)
			}
			if bytes.Contains(raw, []byte("null")) {
				t.Errorf("%s, %s: null: %s", name, q.path, raw)
			}
		}
	}
}

// TestAnEngineThatWasThereOnce: its version is remembered, and no sign of life.
func TestAnEngineThatWasThereOnce(t *testing.T) {
	w := worker()
	w.engine.SwarmValid, w.engine.NetworksValid = false, false
	var s diag.Status
	if w.ask(t, diag.PathStatus, &s); s.Engine != "" || !strings.Contains(s.Text(), "does not answer") {
		t.Errorf("%q\n%s", s.Engine, s.Text())
	}
}

func TestRoles(t *testing.T) {
	for _, c := range []struct {
		engine model.EngineSnapshot
		want   string
	}{
		{model.EngineSnapshot{}, "role not known yet"},
		{model.EngineSnapshot{SwarmValid: true, NoSwarm: true}, "no swarm"},
		{model.EngineSnapshot{SwarmValid: true}, "swarm not at work (locked, pending or in error)"},
		{model.EngineSnapshot{SwarmValid: true, Active: true}, "worker"},
		{model.EngineSnapshot{SwarmValid: true, Active: true, Manager: true}, "manager"},
		{model.EngineSnapshot{SwarmValid: true, Active: true, Manager: true, Leader: true}, "leader"},
	} {
		w := worker()
		w.engine = c.engine
		var s diag.Status
		if w.ask(t, diag.PathStatus, &s); s.Role != c.want {
			t.Errorf("%+v is %q, want %q", c.engine, s.Role, c.want)
		}
	}
}

// TestWhatTheGuardsDropIsTold: of each network, and in the text if there is any.
func TestWhatTheGuardsDropIsTold(t *testing.T) {
	w := worker()
	w.view.Networks[far] = model.Network{ID: far, Name: "far"}
	var st diag.Status
	if w.ask(t, diag.PathStatus, &st); strings.Contains(st.Text(), "guard") {
		t.Errorf("nothing is dropped:\n%s", st.Text())
	}
	w.cfg.Dropped = func(ns string) (uint64, error) {
		return map[string]uint64{overlay.NetnsName(w.view.Networks[web]): 7}[ns], nil
	}
	st = diag.Status{}
	w.ask(t, diag.PathStatus, &st)
	want := diag.Guard{Dropped: 7, Networks: []diag.Dropped{{Network: "far", ID: string(far)}, {Network: "web", ID: string(web), Frames: 7}}}
	if diff := cmp.Diff(want, st.Guard); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if line := "guard         7 frames of containers dropped that were not theirs to send: 7 on web\n"; !strings.Contains(st.Text(), line) {
		t.Errorf("no line %q:\n%s", line, st.Text())
	}
	if len(st.Problems) > 0 {
		t.Errorf("what was dropped is no problem of this node: %v", st.Problems)
	}
}

// TestProblems: what is wrong is named, with what to do, and nothing else is.
func TestProblems(t *testing.T) {
	for _, c := range []struct {
		name string
		path string
		edit func(*world)
		want [][2]string // words of what, words of do
	}{
		{"nothing wrong", diag.PathStatus, func(*world) {}, nil},
		{"nothing wrong with networks", diag.PathNetworks, func(*world) {}, nil},
		{"nothing wrong with services", diag.PathServices, func(*world) {}, nil},
		{"a node out of contact", diag.PathStatus, func(w *world) { w.peers[0].Present = false }, [][2]string{{"node h2 (192.0.2.2) is out of contact", "docker node rm"}}},
		{"gossip does not run", diag.PathStatus, func(w *world) { w.up, w.gossip = false, "not running: port taken" }, [][2]string{{"port taken", "sluice config"}}},
		{"gossip is not needed yet", diag.PathStatus, func(w *world) {
			w.up, w.gossip, w.view.Networks = false, "not running: no key yet", nil
		}, nil},
		{"gossip is never needed", diag.PathStatus, func(w *world) { w.cfg.Scope, w.up = "local", false }, nil},
		{"no address yet", diag.PathStatus, func(w *world) { w.view.Self.VTEP = netip.Addr{} }, [][2]string{{"data-path address is not known", "docker info"}}},
		{"an IPv6 swarm", diag.PathStatus, func(w *world) { w.view.Self.VTEP, w.engine.NodeAddr = netip.Addr{}, addr("fd00::1") }, [][2]string{{"fd00::1, is not IPv4", "--data-path-addr"}}},
		{"somebody fights", diag.PathStatus, func(w *world) {
			w.stats.Fights = []reconcile.Fight{{What: "nftables of the host", Times: 40, Since: time.Now().Add(-150 * time.Second), Cause: "notice: table ip sluice-mesh in host, by nft (process 7)"}}
		}, [][2]string{{"nftables of the host is changed again and again by somebody: 40 times in the last 3 minutes, last seen by notice: table ip sluice-mesh in host, by nft (process 7)", "find the program"}}},
		{"the kernel is not readable", diag.PathStatus, func(w *world) { w.stats.DumpError = "interrupted" }, [][2]string{{"cannot be read: interrupted", "nothing is changed"}}},
		{"the guard's counters are not readable", diag.PathStatus, func(w *world) {
			w.cfg.Dropped = func(string) (uint64, error) { return 0, errors.New("interrupted") }
		}, [][2]string{{"network web: interrupted", "sluice diff"}}},
		{"the guard is not there yet", diag.PathStatus, func(w *world) {
			w.cfg.Dropped = func(string) (uint64, error) { return 0, kernel.ErrNotExist }
		}, nil},
		{"a difference", diag.PathDiff, func(w *world) { w.ops = []kernel.Op{{Key: kernel.Netns{Name: "x"}, Want: kernel.NetnsSpec{}}} }, [][2]string{{"1 differences", "sluice status"}}},
		{"no difference known", diag.PathDiff, func(w *world) { w.unread = errors.New("interrupted") }, [][2]string{{"not known: interrupted", "nothing is changed"}}},
		{"no task is ready", diag.PathServices, func(w *world) {
			delete(w.view.Remotes, there)
			e := w.view.Endpoints[here]
			e.Prepared = netip.Addr{}
			w.view.Endpoints[here] = e
		}, [][2]string{{"service shop has 1 tasks and none is ready: connections to it are refused", "docker service ps --no-trunc shop"}}},
		{"no task of a service without a VIP", diag.PathServices, func(w *world) {
			delete(w.view.Remotes, there)
			w.view.Services = map[model.ServiceID]model.Service{shop: {ID: shop, Name: "shop"}}
			e := w.view.Endpoints[here]
			e.Task.Ready = false
			w.view.Endpoints[here] = e
		}, [][2]string{{"none is ready: its name leads to none", "docker service ps"}}},
		{"a refused network", diag.PathNetworks, func(w *world) {
			w.engine.Networks[no] = leader().engine.Networks[no]
		}, [][2]string{{"network no was refused: VNI 7 belongs", "docker network rm no"}}},
		{"a network that waits", diag.PathNetworks, func(w *world) { w.engine.Unallocated = map[model.NetworkID]string{never: "never"} }, [][2]string{{"network never has no addresses", "create it again"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := worker()
			c.edit(w)
			i := slices.IndexFunc(questions, func(q struct {
				path   string
				answer func() diag.Answer
			}) bool {
				return q.path == c.path
			})
			a := questions[i].answer()
			w.ask(t, c.path, a)
			got := a.Found()
			if len(got) != len(c.want) {
				t.Fatalf("%+v, want %d", got, len(c.want))
			}
			for i, p := range got {
				if !strings.Contains(p.What, c.want[i][0]) || !strings.Contains(p.Do, c.want[i][1]) {
					t.Errorf("%+v, want %q", p, c.want[i])
				}
				if !strings.Contains(a.Text(), "- "+p.What+"\n  "+p.Do+"\n") {
					t.Errorf("not in the text:\n%s", a.Text())
				}
			}
		})
	}
}

// TestAServiceByDNSHasNoVIP, and its tasks are listed all the same.
func TestAServiceByDNSHasNoVIP(t *testing.T) {
	w := worker()
	w.view.Services = map[model.ServiceID]model.Service{shop: {ID: shop, Name: "shop"}}
	for id, e := range w.view.Endpoints {
		e.Task.VIP, e.Prepared = netip.Addr{}, netip.Addr{}
		w.view.Endpoints[id] = e
	}
	for id, r := range w.view.Remotes {
		r.Task.VIP, r.Prepared = netip.Addr{}, netip.Addr{}
		w.view.Remotes[id] = r
	}
	var s diag.Services
	w.ask(t, diag.PathServices, &s)
	if len(s.Services) != 1 || s.Services[0].VIP != "" || len(s.Services[0].Backends) != 2 || len(s.Problems) != 0 {
		t.Errorf("%+v", s)
	}
	for _, words := range []string{"none (dnsrr)", "10.255.0.2  h1", "10.255.0.3  h2"} {
		if !strings.Contains(s.Text(), words) {
			t.Errorf("no %q in\n%s", words, s.Text())
		}
	}
}

func TestOnlyKnownQuestionsAreAnswered(t *testing.T) {
	w := worker()
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{http.MethodGet, "/v1/nothing", http.StatusNotFound},
		{http.MethodGet, "/", http.StatusNotFound},
		{http.MethodPost, diag.PathStatus, http.StatusMethodNotAllowed},
		{http.MethodGet, diag.PathService, http.StatusBadRequest},
	} {
		rec := httptest.NewRecorder()
		w.server().ServeHTTP(rec, httptest.NewRequest(c.method, c.path, nil))
		if rec.Code != c.want {
			t.Errorf("%s %s: %d, want %d", c.method, c.path, rec.Code, c.want)
		}
		if _, err := io.ReadAll(rec.Body); err != nil {
			t.Error(err)
		}
	}
}
