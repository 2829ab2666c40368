package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/reconcile"
	"sluice/internal/view"
)

// node is a quiet worker with one service.
type node struct {
	ops     []kernel.Op
	unready bool // the service's task is

	publishes model.Published // the service
}

func (n node) View() model.View {
	vip := netip.MustParseAddr("10.255.0.2")
	return model.View{
		Networks: map[model.NetworkID]model.Network{"netid": {ID: "netid", Name: "net", Subnet: netip.MustParsePrefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1")}},
		Services: map[model.ServiceID]model.Service{"shopid": {
			ID: "shopid", Name: "shop", VIPs: map[model.NetworkID]netip.Addr{"netid": vip},
			Options: map[model.NetworkID]model.ServiceOptions{"netid": {Published: n.publishes}},
		}},
		Remotes: map[model.EndpointID]model.Remote{"taskid": {
			ID: "taskid", Network: "netid", Node: "other", VTEP: netip.MustParseAddr("192.0.2.2"), Addr: netip.MustParseAddr("10.255.0.3"),
			Task: model.Task{ID: "shop.1", Service: "shopid", VIP: vip, Ready: !n.unready}, Prepared: vip,
		}},
	}
}
func (node) Engine() model.EngineSnapshot {
	return model.EngineSnapshot{HostName: "h1", Version: "28.5.2", SwarmValid: true, NoSwarm: true}
}
func (node) Peers() []view.Peer                             { return nil }
func (node) Unclaimed() map[model.NetworkID]error           { return nil }
func (node) Failed() map[model.HostPort]error               { return nil }
func (node) Absent() map[netip.Addr]bool                    { return nil }
func (node) Missed() uint64                                 { return 0 }
func (node) Stats() reconcile.Stats                         { return reconcile.Stats{} }
func (node) Last() reconcile.Round                          { return reconcile.Round{} }
func (n node) Inspect(context.Context) ([]kernel.Op, error) { return n.ops, nil }

// plugin runs a diagnosis server on a socket in dir until the test ends.
func plugin(t *testing.T, dir, name string, n node, trouble ...diag.Problem) {
	t.Helper()
	s := diag.NewServer(diag.Config{
		Version: "v1.2.3", Scope: "global", Hub: n, Loop: n, Sockets: n, Log: slog.New(slog.DiscardHandler),
		Settings:  []diag.Setting{{Name: "SCOPE", Value: "global", Default: true}},
		Datapath:  func() (string, string) { return "nft", "the kernel has all" },
		Abilities: func() []diag.Ability { return nil },
		Ended:     func() map[model.ServiceID]uint64 { return nil },
		Calls:     func() []diag.Call { return nil },
		Gossip:    func() (bool, string) { return false, "not running" },
		Pools:     func() map[model.NetworkID]diag.Pool { return nil },
		Refusals:  func() []diag.Problem { return nil },
		Trouble:   func() []diag.Problem { return trouble },
		Memory:    func() uint64 { return 1 << 20 },
	})
	l, err := net.Listen("unix", filepath.Join(dir, name+diag.SocketSuffix))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: s}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
}

// sluice runs the command.
func sluice(t *testing.T, dir string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, dir, &out, &errs)
	return status, out.String(), errs.String()
}

func TestEveryVerb(t *testing.T) {
	well, ill := t.TempDir(), t.TempDir()
	plugin(t, well, "sluice", node{})
	plugin(t, ill, "sluice", node{unready: true, ops: []kernel.Op{{Key: kernel.Netns{Name: "x"}, Want: kernel.NetnsSpec{}}}}, diag.Problem{What: "no room", Do: "make room"})
	says := map[string]string{
		"status": "h1 (-), no swarm", "networks": "NETWORK  ID", "services": "SERVICE  NETWORK", "service": "shop (shopid)", "entry": "no service publishes a port",
		"ipam":   "NETWORK  ADDRESS",
		"config": "SCOPE    global  default", "diff": "no difference",
	}
	for _, v := range verbs {
		t.Run(v.name, func(t *testing.T) {
			call := []string{v.name}
			if v.argument != "" {
				call = append(call, "shop")
			}
			status, out, errs := sluice(t, well, call...)
			if status != exitWell || says[v.name] == "" || !strings.Contains(out, says[v.name]) || errs != "" {
				t.Errorf("%d, want 0 and %q\n%s%s", status, says[v.name], out, errs)
			}
			for _, args := range [][]string{
				slices.Insert(slices.Clone(call), 0, "--json"), slices.Insert(slices.Clone(call), 1, "--json"), append(call, "--json"),
				slices.Insert(slices.Clone(call), 0, "-json"), slices.Insert(slices.Clone(call), 0, "--json=true"),
			} {
				status, out, errs := sluice(t, well, args...)
				if status != exitWell || errs != "" {
					t.Errorf("%q: %d %s", args, status, errs)
				}
				a := v.answer()
				if err := json.Unmarshal([]byte(out), a); err != nil || !strings.HasSuffix(out, "\n}\n") {
					t.Errorf("%q: %v\n%s", args, err, out)
				}
			}
		})
	}
	for _, args := range [][]string{{"status"}, {"diff"}, {"status", "--json"}, {"service", "shop"}, {"service", "shopid", "--json", "--network", "net"}} {
		status, out, errs := sluice(t, ill, args...)
		says := func(word string) bool { return strings.Contains(out, word) }
		if status != exitProblems || errs != "" || !says("+ netns x") && !says("make room") && !says("none is ready") {
			t.Errorf("%q: %d, want 1\n%s%s", args, status, out, errs)
		}
	}
}

// TestAPublishedPortIsLookedAtByItsNumber, here one that this node has no claim for.
func TestAPublishedPortIsLookedAtByItsNumber(t *testing.T) {
	dir := t.TempDir()
	plugin(t, dir, "sluice", node{publishes: "80-90:8080-8090/tcp;53/udp"})
	for _, c := range []struct {
		args  []string
		want  int
		words string
	}{
		{[]string{"entry"}, exitProblems, "80-90/tcp  all"},
		{[]string{"entry", "--port", "81"}, exitProblems, "81/tcp of all addresses, to port 8081 of a task"},
		{[]string{"--port=81/tcp", "entry"}, exitProblems, "waits: this node has no address in the network yet"},
		{[]string{"entry", "--port", "53/udp", "--json"}, exitProblems, `"asked": "53/udp"`},
		{[]string{"entry", "--port", "53/tcp"}, exitNoAnswer, "there is: 53/udp, 80-90/tcp"},
		{[]string{"services"}, exitProblems, "53/udp     all"},
	} {
		if status, out, errs := sluice(t, dir, c.args...); status != c.want || !strings.Contains(out+errs, c.words) {
			t.Errorf("%q: %d, want %d and %q\n%s%s", c.args, status, c.want, c.words, out, errs)
		}
	}
}

func TestMistakes(t *testing.T) {
	one, two, none := t.TempDir(), t.TempDir(), t.TempDir()
	plugin(t, one, "sluice", node{})
	plugin(t, two, "sluice", node{})
	plugin(t, two, "sluice-local", node{})
	for _, c := range []struct {
		name, dir string
		args      []string
		words     []string // of stderr
	}{
		{"no verb", one, nil, []string{"sluice [FLAG]... VERB", "status", "--json"}},
		{"an unknown verb", one, []string{"stats"}, []string{`no verb "stats"`, "--help"}},
		{"no name", one, []string{"service"}, []string{"which? sluice service NAME"}},
		{"an empty name", one, []string{"service", ""}, []string{"which? sluice service NAME"}},
		{"two names", one, []string{"service", "shop", "web"}, []string{`"web" is one word too many`}},
		{"an unknown name", one, []string{"service", "shpo"}, []string{`sluice: no service "shpo" on this node's networks; there is: shop`}},
		{"a name that is a number of words", one, []string{"service", "a b&network=c"}, []string{`no service "a b&network=c"`}},
		{"an unknown network", one, []string{"service", "shop", "--network", "wbe"}, []string{`not on one network "wbe"`, "it is on: net"}},
		{"a port for all services", one, []string{"services", "--port", "81"}, []string{"--port is not for services"}},
		{"no port", one, []string{"entry", "--port", "web"}, []string{`--port: "web" is no port`, "81/udp"}},
		{"a protocol without ports", one, []string{"entry", "--port", "81/icmp"}, []string{`--port: "81/icmp" is no port`}},
		{"a port that nobody publishes", one, []string{"entry", "--port", "82"}, []string{"sluice: no service publishes port 82; there is: none"}},
		{"a network for all services", one, []string{"services", "--network", "net"}, []string{"--network is not for services"}},
		{"two verbs", one, []string{"status", "networks"}, []string{`"networks" is one word too many`}},
		{"an unknown flag", one, []string{"status", "--yaml"}, []string{"yaml", "--help"}},
		{"a flag without its value", one, []string{"--plugin"}, []string{"plugin", "--help"}},
		{"no plugin", none, []string{"status"}, []string{"is sluice enabled"}},
		{"two plugins", two, []string{"status"}, []string{"--plugin", "sluice, sluice-local"}},
		{"another plugin", two, []string{"status", "--plugin", "other"}, []string{`no plugin "other"`}},
		{"another socket", one, []string{"--socket", "/nonexistent/x.sock", "status"}, []string{"/nonexistent/x.sock", "docker plugin ls"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, out, errs := sluice(t, c.dir, c.args...)
			if status != exitNoAnswer || out != "" {
				t.Errorf("%d, want 2\n%s", status, out)
			}
			for _, w := range c.words {
				if !strings.Contains(strings.ReplaceAll(errs, "  -", "  --"), w) {
					t.Errorf("no %q in %s", w, errs)
				}
			}
		})
	}
}

func TestOneOfTwoPluginsIsChosen(t *testing.T) {
	dir := t.TempDir()
	plugin(t, dir, "sluice", node{})
	plugin(t, dir, "sluice-local", node{}, diag.Problem{What: "no room"})
	for _, c := range []struct {
		want int
		args []string
	}{
		{exitWell, []string{"--plugin", "sluice", "status"}},
		{exitWell, []string{"status", "--plugin=sluice:latest"}},
		{exitProblems, []string{"status", "--plugin", "sluice-local"}},
		{exitProblems, []string{"status", "--socket", filepath.Join(dir, "sluice-local.sock")}},
	} {
		if status, _, errs := sluice(t, dir, c.args...); status != c.want {
			t.Errorf("%q: %d, want %d %s", c.args, status, c.want, errs)
		}
	}
}

func TestHelpListsEveryVerbAndFlag(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"-h"}, {"help"}, {"status", "--help"}} {
		status, out, errs := sluice(t, t.TempDir(), args...)
		if status != exitWell || errs != "" {
			t.Errorf("%q: %d %s", args, status, errs)
		}
		for _, v := range verbs {
			if !strings.Contains(out, v.name) || !strings.Contains(out, v.does) {
				t.Errorf("%q: no %s", args, v.name)
			}
		}
		for _, w := range []string{"-json", "-plugin", "-socket", "-network", "-port", "service NAME", "version", "Exit status"} {
			if !strings.Contains(out, w) {
				t.Errorf("%q: no %s", args, w)
			}
		}
	}
}

func TestVersionNeedsNoPlugin(t *testing.T) {
	if status, out, errs := sluice(t, t.TempDir(), "version"); status != exitWell || strings.TrimSpace(out) == "" || errs != "" {
		t.Errorf("%d %q %q", status, out, errs)
	}
}

// TestAnAnswerThatCannotBePrintedIsNone: a script that asks must not read half
// an answer as a good one.
func TestAnAnswerThatCannotBePrintedIsNone(t *testing.T) {
	dir := t.TempDir()
	plugin(t, dir, "sluice", node{})
	for _, args := range [][]string{{"status"}, {"status", "--json"}} {
		var errs bytes.Buffer
		if status := run(t.Context(), args, dir, full{}, &errs); status != exitNoAnswer || !strings.Contains(errs.String(), "short write") {
			t.Errorf("%q: %d %s", args, status, errs.String())
		}
	}
}

// full is a disk that is.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, io.ErrShortWrite }
