package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
)

// ManagersChange is after how many entries of raft's log managers make a snapshot, where
// managers come and go; swarm's own number is 10,000. One that joins is given the
// leader's last snapshot and forgets all managers that are not in it. If the leader itself
// is not, the two never speak again, and what the new one is asked ends in "context deadline
// exceeded" (engine 20.10.24; seen after a snapshot that autolock made while there was one
// manager).
const ManagersChange = 10

// Swarm joins all hosts to one swarm: host 1 founds it, the first managers of
// the hosts are managers, and it returns when all have settled.
//
// A plugin that services will use should be installed before: the scheduler
// sees the plugins of a joining node at once, but those enabled later only
// after up to 20 s.
func (c *Cluster) Swarm(ctx context.Context, managers int) error {
	if managers < 1 || managers > len(c.hosts) {
		return fmt.Errorf("form swarm: %d managers asked for, of %d hosts", managers, len(c.hosts))
	}
	first := c.Host(1)
	init := map[string]any{
		"ListenAddr":    swarmAddr(first),
		"AdvertiseAddr": first.Addr().String(),
	}
	if managers > 1 {
		init["Spec"] = map[string]any{"Raft": map[string]any{"SnapshotInterval": ManagersChange}}
	}
	_, err := first.API(ctx, "POST", "/swarm/init", init)
	if err != nil {
		return fmt.Errorf("form swarm: %w", err)
	}
	swarm, err := get[struct {
		JoinTokens struct{ Manager, Worker string }
	}](ctx, first, "/swarm")
	if err != nil {
		return fmt.Errorf("form swarm: %w", err)
	}
	join := func(ctx context.Context, h *Host, token string) error {
		_, err := h.API(ctx, "POST", "/swarm/join", map[string]any{
			"ListenAddr":    swarmAddr(h),
			"AdvertiseAddr": h.Addr().String(),
			"RemoteAddrs":   []string{swarmAddr(first)},
			"JoinToken":     token,
		})
		return err
	}
	// Managers one after the other: each changes the quorum of the next.
	for _, h := range c.hosts[1:managers] {
		if err := join(ctx, h, swarm.JoinTokens.Manager); err != nil {
			return fmt.Errorf("join swarm: %w", err)
		}
	}
	err = c.Each(ctx, func(ctx context.Context, h *Host) error {
		if slices.Contains(c.hosts[:managers], h) {
			return nil
		}
		return join(ctx, h, swarm.JoinTokens.Worker)
	})
	if err != nil {
		return fmt.Errorf("join swarm: %w", err)
	}
	return c.WaitSettled(ctx)
}

// WaitSettled waits until every host is a ready node and has the ingress
// network, which a node makes on its own some time after it joined or booted. A
// snapshot taken before that would blame it on the test.
func (c *Cluster) WaitSettled(ctx context.Context) error {
	if err := c.WaitNodes(ctx, len(c.hosts)); err != nil {
		return err
	}
	// The default route of the ingress sandbox comes last.
	return c.Each(ctx, func(ctx context.Context, h *Host) error {
		return Wait(ctx, h.name+" has the ingress network", func(ctx context.Context) error {
			routes, err := h.Exec(ctx, "nsenter", "--net=/run/docker/netns/ingress_sbox", "ip", "route")
			if err == nil && !strings.Contains(routes, "default") {
				err = fmt.Errorf("its sandbox has no default route yet: %q", routes)
			}
			return err
		})
	})
}

// swarmAddr is where a node listens for its peers; 2377 is the engine's default.
func swarmAddr(h *Host) string { return netip.AddrPortFrom(h.Addr(), 2377).String() }

type node struct {
	ID            string
	Description   struct{ Hostname string }
	Status        struct{ State string }
	ManagerStatus *struct {
		Leader       bool
		Reachability string
	}
}

// Node is what a manager says of a node.
type Node struct {
	Name   string
	Ready  bool
	Leader bool
	// Manager: it is one, and the others reach it.
	Manager bool
	// Member: it is one, reached or not.
	Member bool
}

// Nodes lists the swarm's nodes, by the word of this host, a manager.
func (h *Host) Nodes(ctx context.Context) ([]Node, error) {
	nodes, err := get[[]node](ctx, h, "/nodes")
	if err != nil {
		return nil, err
	}
	var out []Node
	for _, n := range nodes {
		x := Node{Name: n.Description.Hostname, Ready: n.Status.State == "ready"}
		if m := n.ManagerStatus; m != nil {
			x.Leader, x.Manager, x.Member = m.Leader, m.Reachability == "reachable", true
		}
		out = append(out, x)
	}
	return out, nil
}

// WaitWorker waits until the host's engine is a worker's, after somebody has asked for
// that. Swarm takes a manager out of its raft, and 5 s later the role from the node
// (swarmkit's roleManager): one that is promoted in between stays a manager that is no
// member, and its engine was seen to answer nothing for ten minutes.
func (h *Host) WaitWorker(ctx context.Context) error {
	return Wait(ctx, h.name+" is no manager", func(ctx context.Context) error {
		is, err := h.Docker(ctx, "info", "--format", "{{.Swarm.LocalNodeState}}, manager: {{.Swarm.ControlAvailable}}")
		if err == nil && is != "active, manager: false" {
			err = errors.New(is)
		}
		return err
	})
}

// WaitNodes waits until the manager on host 1 has n nodes that are ready.
func (c *Cluster) WaitNodes(ctx context.Context, n int) error {
	return Wait(ctx, fmt.Sprintf("%d nodes are ready", n), func(ctx context.Context) error {
		nodes, err := get[[]node](ctx, c.Host(1), "/nodes")
		if err != nil {
			return err
		}
		var ready []string
		for _, n := range nodes {
			if n.Status.State == "ready" {
				ready = append(ready, n.Description.Hostname)
			}
		}
		if len(ready) != n {
			return fmt.Errorf("ready are %d: %v", len(ready), ready)
		}
		return nil
	})
}

// LoadImages gives the images of an archive, as `docker save` makes it, to all
// hosts. Nodes then agree about the image's id, which `docker import` would not
// give.
func (c *Cluster) LoadImages(ctx context.Context, archive string) error {
	return c.Each(ctx, func(ctx context.Context, h *Host) error {
		_, err := h.Docker(ctx, "load", "--quiet", "--input", archive)
		return err
	})
}

// InstallPlugin creates a managed plugin from dir (config.json and rootfs) on
// all hosts, applies settings (KEY=VALUE), and enables it.
func (c *Cluster) InstallPlugin(ctx context.Context, name, dir string, settings ...string) error {
	return c.Each(ctx, func(ctx context.Context, h *Host) error {
		if _, err := h.Docker(ctx, "plugin", "create", name, dir); err != nil {
			return err
		}
		if len(settings) > 0 {
			if _, err := h.Docker(ctx, append([]string{"plugin", "set", name}, settings...)...); err != nil {
				return err
			}
		}
		_, err := h.Docker(ctx, "plugin", "enable", name)
		return err
	})
}

// Task is a running task of a service.
type Task struct {
	ID        string
	Host      *Host  // where it runs
	Container string // id of its container on that host
	Leaving   bool   // the swarm wants it gone
	// Addrs are its addresses, by name of the network.
	Addrs map[string]netip.Addr
}

// Exec runs a command in the task's container and returns its standard output.
func (t Task) Exec(ctx context.Context, args ...string) (string, error) {
	return t.Host.Docker(ctx, append([]string{"exec", t.Container}, args...)...)
}

// apiTask is what the engine says about a task, as far as it is needed here.
type apiTask struct {
	ID           string
	NodeID       string
	DesiredState string
	Status       struct {
		State, Err      string
		ContainerStatus struct{ ContainerID string }
	}
	NetworksAttachments []struct {
		Network   struct{ Spec struct{ Name string } }
		Addresses []netip.Prefix
	}
}

// WaitService waits until exactly n tasks of the service run, by the word of
// the manager on host 1, and returns them. If they do not, the error has what
// the engine says about each.
func (c *Cluster) WaitService(ctx context.Context, service string, n int) ([]Task, error) {
	return c.Host(1).WaitService(ctx, service, n)
}

// WaitService is that of the cluster, by the word of this host, a manager.
func (h *Host) WaitService(ctx context.Context, service string, n int) ([]Task, error) {
	var running []Task
	what := fmt.Sprintf("service %s has %d running tasks", service, n)
	err := Wait(ctx, what, func(ctx context.Context) error {
		tasks, troubles, err := h.tasks(ctx, service)
		if err != nil {
			return err
		}
		if len(tasks) != n {
			return fmt.Errorf("%d run; %s", len(tasks), strings.Join(troubles, "; "))
		}
		running = tasks
		return nil
	})
	return running, err
}

// HasTasks says what is wrong if not exactly n tasks of the service run now, by the
// word of this host, a manager.
func (h *Host) HasTasks(ctx context.Context, service string, n int) error {
	tasks, troubles, err := h.tasks(ctx, service)
	if err == nil && len(tasks) != n {
		err = fmt.Errorf("of service %s %d tasks run, want %d; %s", service, len(tasks), n, strings.Join(troubles, "; "))
	}
	return err
}

// tasks returns the running tasks of a service, and a remark about each other
// one that should be running or has failed.
func (h *Host) tasks(ctx context.Context, service string) (running []Task, troubles []string, err error) {
	filter, err := json.Marshal(map[string][]string{"service": {service}})
	if err != nil {
		return nil, nil, err
	}
	all, err := get[[]apiTask](ctx, h, "/tasks?filters="+url.QueryEscape(string(filter)))
	if err != nil {
		return nil, nil, err
	}
	nodes, err := get[[]node](ctx, h, "/nodes")
	if err != nil {
		return nil, nil, err
	}
	hostOf := map[string]*Host{}
	for _, n := range nodes {
		for _, x := range h.c.hosts {
			if x.name == n.Description.Hostname {
				hostOf[n.ID] = x
			}
		}
	}
	for _, t := range all {
		on := hostOf[t.NodeID]
		if t.Status.State != "running" || on == nil {
			remark := t.ID + " is " + t.Status.State
			if on != nil {
				remark += " on " + on.name
			}
			if t.Status.Err != "" {
				remark += ": " + t.Status.Err
			}
			troubles = append(troubles, remark)
			continue
		}
		task := Task{ID: t.ID, Host: on, Container: t.Status.ContainerStatus.ContainerID, Leaving: t.DesiredState != "running", Addrs: map[string]netip.Addr{}}
		for _, a := range t.NetworksAttachments {
			if len(a.Addresses) > 0 {
				task.Addrs[a.Network.Spec.Name] = a.Addresses[0].Addr()
			}
		}
		running = append(running, task)
	}
	slices.SortFunc(running, func(a, b Task) int { return strings.Compare(a.Host.name+a.ID, b.Host.name+b.ID) })
	return running, troubles, nil
}

// VIP returns the virtual IP of a service in a network.
func (c *Cluster) VIP(ctx context.Context, service, network string) (netip.Addr, error) {
	return c.Host(1).VIP(ctx, service, network)
}

// VIP is that of the cluster, by the word of this host, a manager.
func (h *Host) VIP(ctx context.Context, service, network string) (netip.Addr, error) {
	s, err := get[struct {
		Endpoint struct {
			VirtualIPs []struct{ NetworkID, Addr string }
		}
	}](ctx, h, "/services/"+service)
	if err != nil {
		return netip.Addr{}, err
	}
	id, err := h.networkID(ctx, network)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, v := range s.Endpoint.VirtualIPs {
		if v.NetworkID != id {
			continue
		}
		p, err := netip.ParsePrefix(v.Addr)
		if err != nil {
			return netip.Addr{}, fmt.Errorf("service %s: virtual IP %q in network %s: %w", service, v.Addr, network, err)
		}
		return p.Addr(), nil
	}
	return netip.Addr{}, fmt.Errorf("service %s: %w in network %s", service, errNoVIP, network)
}

var errNoVIP = errors.New("no virtual IP")

func (h *Host) networkID(ctx context.Context, name string) (string, error) {
	n, err := get[struct{ ID string }](ctx, h, "/networks/"+name)
	return n.ID, err
}

// RemoveNetwork removes a network and waits until no engine has it any more: a
// service's tasks outlive `service rm` by the time they take to stop, and the swarm
// forgets a network while its last containers still run. That it is gone already is a
// success.
func (c *Cluster) RemoveNetwork(ctx context.Context, name string) error {
	return Wait(ctx, "network "+name+" is removed", func(ctx context.Context) error {
		if _, err := c.Host(1).API(ctx, "DELETE", "/networks/"+name, nil); err != nil && !NotFound(err) {
			return err
		}
		for _, h := range c.hosts {
			if _, err := h.API(ctx, "GET", "/networks/"+name, nil); !NotFound(err) {
				return fmt.Errorf("%s has it still: %v", h.name, err)
			}
		}
		return nil
	})
}
