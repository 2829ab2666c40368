package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

// gate is a way from a published port of host 1 to a task.
type gate struct {
	name    string
	what    string                                  // for people
	args    []string                                // of docker network create; a process has no network
	publish func(network string, port int) []string // arguments of docker service create
	pin     func(id string) string                  // the namespace whose IPVS counts connections, in /run
	ipvs    bool                                    // they must show there
	source  bool                                    // the task must see the client's address
}

// The gates that the others are compared with: a process that listens on the port
// itself, and Docker's own.
const (
	plain    = "process"
	docker   = "published"
	compared = 2 // these
)

// gates begin with those two.
var gates = []gate{
	{name: plain, what: "a process on the node itself", source: true},
	{name: docker, what: "Docker's ingress network", args: []string{"-d", "overlay"}, publish: publishIngress, ipvs: true,
		pin: func(string) string { return "docker/netns/ingress_sbox" }},
	{name: "mesh-ipvs", what: "sluice, ipvs", args: sluice("datapath=ipvs"), publish: publishMesh, pin: pinned, ipvs: true, source: true},
	{name: "mesh-nft", what: "sluice, nft", args: sluice("datapath=nft"), publish: publishMesh, pin: pinned, source: true},
}

func publishIngress(network string, port int) []string {
	return []string{
		"--network", network,
		"--publish", fmt.Sprintf("published=%d,target=80,protocol=tcp", port),
		"--publish", fmt.Sprintf("published=%d,target=80,protocol=udp", port),
	}
}

func publishMesh(network string, port int) []string {
	return []string{"--network", fmt.Sprintf("name=%s,driver-opt=sluice.publish=%d:80/tcp;%d:80/udp", network, port, port)}
}

// door is a published port, of a service with one task.
type door struct {
	gate  gate
	place string // where the task is, as host 1 sees it; of a process: "near"
	port  int
}

func (d door) name() string { return d.gate.name + "/" + d.place }

// firstPort is outside of what processes of a host take, and of what others publish.
const firstPort = 8001

// outside is the client, on the hosts' own LAN.
var outside = netip.MustParseAddr("10.77.0.200")

// meshLab is what is asked from outside, on the hosts of a lab.
type meshLab struct {
	*lab
	doors  []door
	asker  *cluster.Client
	probe  string // its program
	server string // the container of the process
}

// newMesh makes the services of some gates, and the client.
func (l *lab) newMesh(ctx context.Context, asked []gate) (*meshLab, error) {
	m := &meshLab{lab: l}
	port := firstPort
	for _, g := range asked {
		for _, p := range places {
			if g.name == plain && p.host != 1 {
				continue
			}
			m.doors = append(m.doors, door{gate: g, place: p.name, port: port})
			port++
		}
		if g.name == plain {
			continue
		}
		id, err := l.cluster.Host(1).Docker(ctx, slices.Concat([]string{"network", "create"}, g.args, []string{g.name})...)
		if err != nil {
			return nil, err
		}
		l.ids[g.name] = id
	}
	for _, step := range []func(context.Context) error{m.process, m.services, m.client, m.answer} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// process runs the plain one: in a container, as the others, but in the host's
// network.
func (m *meshLab) process(ctx context.Context) (err error) {
	port := fmt.Sprint(m.doors[0].port)
	m.server, err = m.cluster.Host(1).Docker(ctx, "run", "-d", "--network", "host", image.Probe, "echo", "--port", port)
	return err
}

func (m *meshLab) services(ctx context.Context) error {
	for _, d := range m.doors[1:] {
		host := m.cluster.Host(1)
		for _, p := range places {
			if p.name == d.place {
				host = m.cluster.Host(p.host)
			}
		}
		_, err := m.cluster.Host(1).Docker(ctx, slices.Concat([]string{"service", "create", "-d", "--no-resolve-image", "--name", strings.ReplaceAll(d.name(), "/", "-"),
			"--constraint", "node.hostname==" + host.Name(), "--stop-grace-period", "1s"}, d.gate.publish(d.gate.name, d.port), []string{image.Probe, "echo"})...)
		if err != nil {
			return err
		}
	}
	return nil
}

// client plugs it in, with the program of the images.
func (m *meshLab) client(ctx context.Context) (err error) {
	m.probe = filepath.Join(m.cluster.Dir(), "probe")
	if _, err := m.cluster.Host(1).Docker(ctx, "cp", m.server+":/probe", m.probe); err != nil {
		return err
	}
	m.asker, err = m.cluster.Outside(ctx, outside)
	return err
}

// answer waits until every door answers by TCP and UDP, and the right one: who is
// served by a task sees what says so.
func (m *meshLab) answer(ctx context.Context) error {
	for _, d := range m.doors {
		fmt.Fprintf(m.progress, "datapaths: %s, %s, port %d …\n", d.gate.what, d.place, d.port)
		if d.gate.name != plain {
			if _, err := m.cluster.WaitService(ctx, strings.ReplaceAll(d.name(), "/", "-"), 1); err != nil {
				return err
			}
		}
		for _, proto := range []string{"--tcp", "--udp"} {
			if err := m.answered(ctx, d, proto); err != nil {
				return err
			}
		}
	}
	return nil
}

// answered waits until a door answers by one protocol.
func (m *meshLab) answered(ctx context.Context, d door, proto string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return cluster.Wait(ctx, fmt.Sprintf("%s answers %s at %s", d.name(), proto, m.at(d)), func(ctx context.Context) error {
		out, err := m.asker.Exec(ctx, m.probe, "get", proto, m.at(d))
		if err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(out))
		}
		var got struct{ Reply struct{ Peer netip.AddrPort } }
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			return err
		}
		if keeps := got.Reply.Peer.Addr() == outside; keeps != d.gate.source {
			return fmt.Errorf("the task sees %s as the client", got.Reply.Peer)
		}
		return nil
	})
}

// at is where the client asks.
func (m *meshLab) at(d door) string {
	return netip.AddrPortFrom(m.cluster.Host(1).Addr(), uint16(d.port)).String()
}

// turned is what probe turns tells.
type turned struct {
	Targets []struct {
		Name      string
		Connects  []float64 `json:"connects_us"`
		Requests  []float64 `json:"requests_us"`
		Datagrams []float64 `json:"datagrams_us"`
		Packets   []float64 `json:"packets_us"`
	}
	Idle float64
}

// meshRounds is how many rounds of the doors one round of VIPs is worth: they take
// that much less time, and short ones next to each other compare best.
const meshRounds = 20

// measure asks all doors in turns.
func (m *meshLab) measure(ctx context.Context, rounds int) (*meshResult, error) {
	var to []string
	for _, d := range m.doors {
		to = append(to, d.name()+"="+m.at(d))
	}
	before := map[string]int{}
	for _, d := range m.doors {
		n, err := m.counted(ctx, d.gate)
		if err != nil {
			return nil, err
		}
		before[d.gate.name] = n
	}
	rounds *= meshRounds
	fmt.Fprintf(m.progress, "datapaths: %d rounds of %s …\n", rounds, strings.Join(to, " "))
	begun := time.Now()
	out, err := m.asker.Exec(ctx, m.probe, "turns", "--rounds", fmt.Sprint(rounds), "--to", strings.Join(to, ","))
	if err != nil {
		return nil, err
	}
	var got turned
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		return nil, err
	}
	r := &meshResult{doors: m.doors, rounds: rounds, took: time.Since(begun), idle: got.Idle, rows: map[string]meshRow{}}
	made := map[string]int{}
	for _, t := range got.Targets {
		r.rows[t.Name] = meshRow{t.Connects, t.Requests, t.Datagrams, t.Packets}
		name, _, _ := strings.Cut(t.Name, "/")
		made[name] += len(t.Connects)
	}
	ctx, cancel := context.WithTimeout(ctx, connsWait)
	defer cancel()
	for _, d := range m.doors {
		g := d.gate
		err := cluster.Wait(ctx, fmt.Sprintf("IPVS has counted the %d connections to %s", made[g.name], g.name), func(ctx context.Context) error {
			n, err := m.counted(ctx, g)
			if grown := n - before[g.name]; err == nil && (g.ipvs && grown < made[g.name]*9/10 || !g.ipvs && n > 0) {
				err = fmt.Errorf("it has counted %d", grown)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return r, nil
}

// counted are the connections that IPVS has counted for a gate on host 1.
func (m *meshLab) counted(ctx context.Context, g gate) (int, error) {
	if g.pin == nil {
		return 0, nil
	}
	return m.conns(ctx, g.pin(m.ids[g.name]))
}
