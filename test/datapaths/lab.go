package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

const plugin = "sluice:latest"

// way is one kind of network whose VIPs are measured.
type way struct {
	name string   // of the network too
	what string   // for people
	args []string // of docker network create
	ipvs bool     // connections must show in IPVS's counters
}

// ways begins with what the others are compared with.
var ways = []way{
	{"docker", "Docker's overlay network (ip_vs, nat, in a namespace of its own)", []string{"-d", "overlay"}, true},
	{"dr", "sluice, ipvs, dr", sluice("datapath=ipvs", "mode=dr"), true},
	{"tun", "sluice, ipvs, tun", sluice("datapath=ipvs", "mode=tun"), true},
	{"nat", "sluice, ipvs, nat", sluice("datapath=ipvs", "mode=nat"), true},
	{"nft-dr", "sluice, nft, dr", sluice("datapath=nft", "mode=dr"), false},
	{"nft-nat", "sluice, nft, nat", sluice("datapath=nft", "mode=nat"), false},
}

func sluice(options ...string) []string {
	args := []string{"-d", plugin, "--ipam-driver", plugin}
	for _, o := range options {
		args = append(args, "-o", "sluice."+o)
	}
	return args
}

// places are the services, by where their only task is, as the client on host 1 sees it.
var places = []struct {
	name string
	host int
}{{"near", 1}, {"far", 2}}

// lab is the swarm with the networks, services and the client.
type lab struct {
	cluster  *cluster.Cluster
	progress io.Writer
	asked    []way
	ways     []way             // those of asked that this version has
	missing  map[string]string // the others, with the reason
	ids      map[string]string // of networks
	vips     map[string]string // with the port, by way/place
	client   string            // container on host 1
}

// newLab makes it, without networks if no ways are asked for; what was made is gone
// after an error.
func newLab(ctx context.Context, asked []way, progress io.Writer) (*lab, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	l := &lab{asked: asked, progress: progress, missing: map[string]string{}, ids: map[string]string{}, vips: map[string]string{}}
	fmt.Fprintln(progress, "datapaths: three engines …")
	if l.cluster, err = cluster.Up(ctx, cluster.Options{Hosts: 3, Prefix: "d"}); err != nil {
		return nil, err
	}
	steps := []func(context.Context) error{
		func(ctx context.Context) error {
			images, err := image.Build(ctx, l.cluster.Dir())
			if err != nil {
				return err
			}
			return l.cluster.LoadImages(ctx, images)
		},
		func(ctx context.Context) error {
			return l.cluster.InstallPlugin(ctx, plugin, filepath.Join(root, "build", "plugin"))
		},
		func(ctx context.Context) error { return l.cluster.Swarm(ctx, 1) },
	}
	if len(asked) > 0 {
		steps = append(steps, l.networks, l.services, l.connect)
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return nil, errors.Join(err, l.cluster.Down())
		}
	}
	return l, nil
}

// networks makes one of each kind.
func (l *lab) networks(ctx context.Context) error {
	for _, w := range l.asked {
		id, err := l.cluster.Host(1).Docker(ctx, slices.Concat([]string{"network", "create", "--attachable"}, w.args, []string{w.name})...)
		if err != nil {
			return err
		}
		l.ids[w.name] = id
	}
	return nil
}

// services makes those of all networks, to run when they do.
func (l *lab) services(ctx context.Context) error {
	for _, w := range l.asked {
		for _, p := range places {
			_, err := l.cluster.Host(1).Docker(ctx, "service", "create", "-d", "--no-resolve-image", "--name", w.name+"-"+p.name, "--network", w.name,
				"--constraint", "node.hostname=="+l.cluster.Host(p.host).Name(), "--stop-grace-period", "1s", image.Probe)
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// patience is for two services of a network to answer, on a busy machine.
const patience = 2 * time.Minute

// connect runs the client, connects it with all networks, and finds out which of
// them this version does not serve.
func (l *lab) connect(ctx context.Context) (err error) {
	h := l.cluster.Host(1)
	if l.client, err = h.Docker(ctx, "run", "-d", "--network", ways[0].name, image.Probe); err != nil {
		return err
	}
	for i, w := range l.asked {
		fmt.Fprintf(l.progress, "datapaths: %s …\n", w.what)
		if i > 0 {
			_, err = h.Docker(ctx, "network", "connect", w.name, l.client)
		}
		for _, p := range places {
			if err == nil {
				err = l.answers(ctx, w, p.name)
			}
		}
		if err == nil {
			l.ways = append(l.ways, w)
			continue
		}
		if i == 0 {
			return err
		}
		l.missing[w.what] = err.Error()
	}
	return nil
}

// answers waits until a service runs and answers at its VIP.
func (l *lab) answers(ctx context.Context, w way, place string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	name := w.name + "-" + place
	if _, err := l.cluster.WaitService(ctx, name, 1); err != nil {
		return err
	}
	vip, err := l.cluster.VIP(ctx, name, w.name)
	if err != nil {
		return err
	}
	at := netip.AddrPortFrom(vip, 80).String()
	l.vips[w.name+"/"+place] = at
	return cluster.Wait(ctx, name+" answers at its VIP", func(ctx context.Context) error {
		_, err := l.cluster.Host(1).InContainer(ctx, l.client, "/probe", "get", "-n", "2", at)
		return err
	})
}

// namespace is where a network's VIPs are served, below /run: sluice's own, or the
// engine's sandbox for them (moby libnetwork/service_linux.go: "lb_" and nine digits).
func (l *lab) namespace(w way) string {
	id := l.ids[w.name]
	if w.name == ways[0].name {
		return "docker/netns/lb_" + id[:9]
	}
	return pinned(id)
}

// pinned is the namespace of a network of sluice.
func pinned(id string) string { return "netns/sluice-" + id[:min(12, len(id))] }

// conns are the connections that IPVS has counted in a namespace of host 1, which is
// pinned at a path in /run.
func (l *lab) conns(ctx context.Context, pin string) (int, error) {
	h := l.cluster.Host(1)
	out, err := h.ExecNet(ctx, "nsenter", fmt.Sprintf("--net=/proc/%d/root/run/%s", h.PID(), pin), "--", "ipvsadm", "-L", "-n", "--stats", "--exact")
	if err != nil {
		return 0, err
	}
	sum := 0
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == "FWM" {
			n, err := strconv.Atoi(f[2])
			if err != nil {
				return 0, fmt.Errorf("ipvsadm: %q: %w", line, err)
			}
			sum += n
		}
	}
	return sum, nil
}

// measured is what probe load tells.
type measured struct {
	Targets []struct {
		Name     string
		Connects []float64 `json:"connects_us"`
		Requests []float64 `json:"requests_us"`
		Bulk     []float64 `json:"bulk_mbps"`
		Packets  []float64 `json:"packets_us"`
	}
	Idle float64
}

// connsWait is longer than the 2 s after which the kernel adds its counters up.
const connsWait = 30 * time.Second

func (l *lab) measure(ctx context.Context, rounds int, progress io.Writer) (*result, error) {
	h := l.cluster.Host(1)
	var to []string
	for _, w := range l.ways {
		for _, p := range places {
			name := w.name + "/" + p.name
			to = append(to, name+"="+l.vips[name])
		}
	}
	before := map[string]int{}
	for _, w := range l.ways {
		n, err := l.conns(ctx, l.namespace(w))
		if err != nil {
			return nil, err
		}
		before[w.name] = n
	}
	fmt.Fprintf(progress, "datapaths: %d rounds of %s …\n", rounds, strings.Join(to, " "))
	begun := time.Now()
	out, err := h.InContainer(ctx, l.client, "/probe", "load", "--rounds", fmt.Sprint(rounds), "--to", strings.Join(to, ","))
	if err != nil {
		return nil, err
	}
	var m measured
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		return nil, err
	}
	r := &result{ways: l.ways, missing: maps.Clone(l.missing), rounds: rounds, took: time.Since(begun), idle: m.Idle, rows: map[string]row{}}
	made := map[string]int{}
	for _, t := range m.Targets {
		name, _, _ := strings.Cut(t.Name, "/")
		made[name] += 1 + len(t.Connects) + len(t.Bulk) + len(t.Packets)
		r.rows[t.Name] = row{t.Connects, t.Requests, t.Bulk, t.Packets}
	}
	// All but a few: to IPVS, a port that the client uses again within seconds is the
	// same connection (Docker's: 3 of 1402).
	ctx, cancel := context.WithTimeout(ctx, connsWait)
	defer cancel()
	for _, w := range l.ways {
		err := cluster.Wait(ctx, fmt.Sprintf("IPVS has counted the %d connections to VIPs of %s", made[w.name], w.name), func(ctx context.Context) error {
			n, err := l.conns(ctx, l.namespace(w))
			if grown := n - before[w.name]; err == nil && (w.ipvs && grown < made[w.name]*9/10 || !w.ipvs && n > 0) {
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
