package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"sluice/test/cluster"
	"sluice/test/image"
)

// silent waits until a request to a port of a node gets no answer from a task:
// is refused, or finds nobody.
func silent(t *testing.T, from execer, h *cluster.Host, port int) {
	t.Helper()
	err := cluster.Wait(within(t), fmt.Sprintf("port %d of %s is not answered", port, h.Name()), func(ctx context.Context) error {
		r, err := askFrom(ctx, from, netip.AddrPortFrom(h.Addr(), uint16(port)).String())
		if err == nil && r.OK {
			err = fmt.Errorf("%+v", r)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// anyone is for answers where it does not matter as whose the task saw the client.
func anyone(netip.Addr) bool { return true }

// TestMeshOptions: the addresses, nodes and sources that a port is for.
func TestMeshOptions(t *testing.T) {
	network(t, "web")
	near, far := clients(t)[0], clients(t)[1]
	docker(t, 1, "node", "update", "--label-add", "Entry=True", lab.Host(2).Name())
	defer docker(t, 1, "node", "update", "--label-rm", "Entry", lab.Host(2).Name())
	service(t, "bound", publish("web", "publish=81:80", "publish.bind="+lab.Host(1).Addr().String()), 1)
	service(t, "chosen", publish("web", "publish=82:80", "publish.nodes=entry=true"), 1)
	service(t, "guarded", publish("web", "publish=83:80;83:53/udp", "publish.allow=203.0.113.0/24"), 1)
	service(t, "many", publish("web", "publish=20000-20999:20000-20999;21000-21009:80-89"), 1, "--constraint", "node.hostname==e1", image.Probe,
		"serve", "--tcp", "80,89,20000,20500,20999")
	t.Run("bind", func(t *testing.T) {
		sees(t, far, lab.Host(1), 81, false, "", is(far.Addr()))
		silent(t, far, lab.Host(2), 81)
		silent(t, onHost{lab.Host(1)}, lab.Host(2), 81)
	})
	t.Run("nodes", func(t *testing.T) {
		sees(t, far, lab.Host(2), 82, false, "", is(far.Addr()))
		silent(t, far, lab.Host(1), 82)
		silent(t, far, lab.Host(3), 82)
		docker(t, 1, "node", "update", "--label-add", "entry=true", lab.Host(3).Name())
		sees(t, far, lab.Host(3), 82, false, "", is(far.Addr()))
		docker(t, 1, "node", "update", "--label-rm", "entry", lab.Host(3).Name())
		silent(t, far, lab.Host(3), 82)
	})
	t.Run("allow", func(t *testing.T) {
		for _, h := range lab.Hosts() {
			sees(t, far, h, 83, false, "", is(far.Addr()))
			sees(t, far, h, 83, true, "", is(far.Addr()))
			silent(t, near, h, 83)
		}
	})
	t.Run("ranges", func(t *testing.T) {
		for _, h := range lab.Hosts() {
			for _, port := range []int{20000, 20500, 20999, 21000, 21009} {
				sees(t, far, h, port, false, "", is(far.Addr()))
			}
			refuses(t, far, h, 20001) // published, and no server at the task's port
			rules, err := h.ExecNet(within(t), "nft", "list", "table", "ip", "sluice-mesh")
			if err != nil || strings.Count(rules, "20000-20999") != 1 || strings.Contains(rules, "20500") {
				t.Errorf("a range of 1,000 ports is not one element on %s (%v):\n%s", h.Name(), err, rules)
			}
		}
	})
	for i := range 3 {
		noDiff(t, i+1)
	}
}

// TestMeshPortHasOneOwner: the older service has the port, and a process that was
// there before has it on its node.
func TestMeshPortHasOneOwner(t *testing.T) {
	network(t, "web")
	c := clients(t)[1]
	older := service(t, "older", publish("web", "publish=81:80"), 1)[0].Container[:12]
	younger := service(t, "younger", publish("web", "publish=81:80;82:80"), 1)[0].Container[:12]
	for _, h := range lab.Hosts() {
		sees(t, c, h, 81, false, older, is(c.Addr()))
		sees(t, c, h, 82, false, younger, is(c.Addr()))
	}
	removeService(t, "older")
	for _, h := range lab.Hosts() {
		sees(t, c, h, 81, false, younger, is(c.Addr()))
	}
	t.Run("a process was there before", func(t *testing.T) {
		h := lab.Host(2)
		program, err := place(h, probe())
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(within(t))
		server := h.Command(ctx, program, "serve", "--tcp", "84")
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { stop(); server.Wait() }()
		sees(t, c, h, 84, false, "", is(c.Addr()))
		task := service(t, "third", publish("web", "publish=84:80"), 1)[0].Container[:12]
		sees(t, c, lab.Host(1), 84, false, task, is(c.Addr()))
		sees(t, c, lab.Host(3), 84, false, task, is(c.Addr()))
		if r, err := askFrom(within(t), c, netip.AddrPortFrom(h.Addr(), 84).String()); err != nil || !r.OK || r.Reply.Host == task {
			t.Errorf("the process's port is answered by %+v, %v", r, err)
		}
		stop()
		server.Wait()
		sees(t, c, h, 84, false, task, is(c.Addr()))
	})
}

// TestMeshFromContainers: from containers of the network and of others, by the port
// of their own node and of others.
func TestMeshFromContainers(t *testing.T) {
	network(t, "web")
	tasks := service(t, "s1", publish("web", "publish=81:80;81:53/udp"), 2, "--constraint", "node.hostname!=e3")
	in, bridged := client(t, 1, "web"), client(t, 1, "bridge")
	froms := map[string]struct {
		host *cluster.Host
		id   string
	}{
		"of the network":    {lab.Host(1), in},
		"of another":        {lab.Host(1), bridged},
		"a task of its own": {tasks[0].Host, tasks[0].Container},
	}
	for name, from := range froms {
		t.Run(name, func(t *testing.T) {
			for _, h := range lab.Hosts() {
				reaches(t, from.host, from.id, 2, 6, netip.AddrPortFrom(h.Addr(), 81).String())
				reaches(t, from.host, from.id, 2, 6, "--udp", netip.AddrPortFrom(h.Addr(), 81).String())
			}
		})
	}
}

// TestMeshBesideDockersOwnPorts: host-mode ports, and the engine's own mesh where the
// kernel has what that needs.
func TestMeshBesideDockersOwnPorts(t *testing.T) {
	network(t, "web")
	c := clients(t)[1]
	service(t, "ours", publish("web", "publish=81:80"), 1, "--constraint", "node.hostname==e1")
	at := service(t, "host", "web", 1, "--publish", "mode=host,published=8090,target=80", "--constraint", "node.hostname==e2")[0].Container[:12]
	for _, h := range lab.Hosts() {
		sees(t, c, h, 81, false, "", is(c.Addr()))
	}
	sees(t, c, lab.Host(2), 8090, false, at, is(c.Addr()))
	t.Run("the engine's mesh", func(t *testing.T) {
		needIPVS(t)
		both := service(t, "both", publish("web", "publish=83:80"), 1, "--publish", "published=8091,target=80")[0].Container[:12]
		for _, h := range lab.Hosts() {
			sees(t, c, h, 8091, false, both, func(a netip.Addr) bool { return a != c.Addr() })
			sees(t, c, h, 83, false, both, is(c.Addr()))
			sees(t, c, h, 81, false, "", is(c.Addr()))
		}
	})
}
