package diag_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sluice/internal/diag"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// fine is a publishing worker that a balancer may send to.
func fine(o model.ServiceOptions, edit ...func(*world)) *world {
	w := publishing(o, edit...)
	w.stats.LastDump = time.Now()
	w.cfg.Gossip = func() (bool, string) { return w.up, w.gossip }
	return w
}

// TestWhetherANodeIsFine, and why not.
func TestWhetherANodeIsFine(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*world)
		want string // words of why not
	}{
		{"fine", func(*world) {}, ""},
		{"drained", func(w *world) { w.view.Drained = true }, "paused or drained"},
		{"drained, and worse", func(w *world) { w.view.Drained, w.up = true, false }, "paused or drained"},
		{"gossip does not run", func(w *world) { w.up, w.gossip = false, "not running: port taken" }, "port taken"},
		{"gossip is not needed", func(w *world) { w.up, w.view.Networks = false, nil }, ""},
		{"in no swarm", func(w *world) { w.up, w.engine.Active = false, false }, ""},
		{"the engine does not answer any more", func(w *world) { w.engine.SwarmValid = false }, ""},
		{"the engine has not answered yet", func(w *world) {
			w.engine, w.view = model.EngineSnapshot{}, model.View{}
		}, "data-path address is not known yet"},
		{"no address", func(w *world) { w.view.Self.VTEP = netip.Addr{} }, "data-path address"},
		{"the kernel was never read", func(w *world) { w.stats.LastDump = time.Time{} }, "not been read yet"},
		{"the kernel was read a while ago", func(w *world) { w.stats.LastDump = time.Now().Add(-29 * time.Second) }, ""},
		{"the kernel cannot be read", func(w *world) {
			w.stats.LastDump, w.stats.DumpError = time.Now().Add(-time.Minute), "interrupted"
		}, "interrupted"},
		{"the loop hangs", func(w *world) { w.stats.LastDump = time.Now().Add(-time.Minute) }, "hangs"},
		{"the kernel refuses", func(w *world) {
			w.last.Failed = map[kernel.Key]error{kernel.Forward{}: errors.New("no iptables")}
		}, "refuses a change: no iptables"},
		{"a task's namespace refuses", func(w *world) {
			w.last.Failed = map[kernel.Key]error{kernel.TaskMesh{Sandbox: "x", Addr: addr("10.255.0.3")}: errors.New("not permitted")}
		}, ""},
		{"a task starts", func(w *world) {
			w.last.Failed = map[kernel.Key]error{kernel.TaskTable{Sandbox: "x"}: kernel.ErrNotExist}
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := fine(model.ServiceOptions{Published: "81"})
			c.edit(w)
			switch err := w.server().Healthy(); {
			case err == nil && c.want != "", err != nil && (c.want == "" || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// TestWhetherAPortIsServed, and why not.
func TestWhetherAPortIsServed(t *testing.T) {
	tcp := model.ServiceOptions{Published: "81:80/tcp;8000-8010/udp"}
	bound := model.ServiceOptions{Published: "81:80/tcp", Bind: "192.0.2.1;192.0.2.9"}
	far := func(addrs ...string) func(*world) {
		return func(w *world) {
			w.absent = make(map[netip.Addr]bool)
			for _, a := range addrs {
				w.absent[addr(a)] = true
			}
		}
	}
	rule := kernel.MeshPort{Proto: model.TCP, Port: 81}
	for _, c := range []struct {
		name  string
		w     *world
		after func(*world)
		port  uint16
		proto model.Proto
		want  string // words of the answer; of the refusal behind "no: "
	}{
		{"served", fine(tcp), nil, 81, model.TCP, "port 81/tcp leads to service shop: 2 of 2 tasks"},
		{"served by ip_vs", fine(tcp, ipvs), nil, 81, model.TCP, "leads to service shop"},
		{"of a range", fine(tcp), nil, 8004, model.UDP, "port 8004/udp leads to service shop"},
		{"another protocol", fine(tcp), nil, 81, model.UDP, "no: no service publishes port 81/udp on this node"},
		{"another port", fine(tcp), nil, 8011, model.UDP, "no: no service publishes port 8011/udp"},
		{"drained", fine(tcp), func(w *world) { w.view.Drained = true }, 81, model.TCP, "no: the swarm has this node paused or drained"},
		{"other trouble of the node", fine(tcp), func(w *world) {
			w.up, w.last.Failed = false, map[kernel.Key]error{kernel.Netns{Name: "other"}: errors.New("no")}
		}, 81, model.TCP, "leads to service shop"},
		{"no tasks", fine(tcp, noTasks), nil, 81, model.TCP, "no: port 81/tcp of service shop: refuses: the service has no tasks"},
		{"no tasks by ip_vs", fine(tcp, noTasks, ipvs), nil, 81, model.TCP, "no: port 81/tcp of service shop: refuses"},
		{"a process has it", fine(tcp, taken(81, "nginx (pid 7)")), nil, 81, model.TCP, "no: port 81/tcp of service shop: lost: it is held by nginx (pid 7)"},
		{"an older service has it and serves nobody", fine(tcp, elder(model.ServiceOptions{Published: "81"})), nil, 81, model.TCP, "no: port 81/tcp of service old: refuses"},
		{"a younger service has lost it", fine(model.ServiceOptions{Published: "81"}, func(w *world) {
			s := w.view.Services[shop]
			s.Created = time.Unix(0, 0)
			w.view.Services[shop] = s
		}, elder(model.ServiceOptions{Published: "81"})), nil, 81, model.TCP, "leads to service shop"},
		{"the rule is refused", fine(tcp), func(w *world) {
			w.last.Failed = map[kernel.Key]error{rule: errors.New("no space")}
		}, 81, model.TCP, "no: port 81/tcp of service shop: failed: no space"},
		{"nothing is in the kernel", fine(tcp), func(w *world) { w.last.Have = nil }, 81, model.TCP, "no: port 81/tcp of service shop: waits: mesh host is not in the kernel yet"},
		{"the balancer is not in the kernel", fine(tcp), func(w *world) {
			have := make(kernel.State)
			for k, v := range w.last.Want {
				if k != (kernel.VIP{NS: "sluice-webnetwork00", IP: addr("250.0.16.9")}) {
					have[k] = v
				}
			}
			w.last.Have = have
		}, 81, model.TCP, "no: port 81/tcp of service shop: refuses"},
		{"one address is here", fine(bound), far("192.0.2.9"), 81, model.TCP, "leads to service shop"},
		{"the other is", fine(bound), far("192.0.2.1"), 81, model.TCP, "leads to service shop"},
		{"none is", fine(bound), far("192.0.2.1", "192.0.2.9"), 81, model.TCP, "no: port 81/tcp of service shop: elsewhere"},
		{"the kernel is not known", fine(tcp), func(w *world) { w.stats.LastDump = time.Time{} }, 81, model.TCP, "no: the kernel has not been read yet"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.after != nil {
				c.after(c.w)
			}
			got, err := c.w.server().Serves(c.port, c.proto)
			if err != nil {
				got = "no: " + err.Error()
			}
			if !strings.HasPrefix(c.want, "no: ") && err != nil || !strings.Contains(got, c.want) {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

// TestADrainIsToldAtOnce, also where the judgement of ports is used again.
func TestADrainIsToldAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := fine(model.ServiceOptions{Published: "81"})
		s := w.server()
		serves := func() bool { _, err := s.Serves(81, model.TCP); return err == nil }
		if !serves() {
			t.Fatal("not served")
		}
		w.view.Drained = true
		if serves() {
			t.Error("a drained node says that it serves")
		}
		var st diag.Status
		if w.ask(t, diag.PathStatus, &st); !st.Published.Drained || st.Published.Served != 1 || !strings.Contains(st.Text(), "health checks say no") {
			t.Errorf("%+v\n%s", st.Published, st.Text())
		}
		w.view.Drained = false
		if !serves() {
			t.Error("not served after the drain")
		}
		// Other news count within a moment.
		w.last.Have = nil
		time.Sleep(time.Second)
		if w.stats.LastDump = time.Now(); serves() {
			t.Error("served without rules")
		}
	})
}
