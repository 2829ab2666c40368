package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"sluice/test/cluster"
	"sluice/test/image"
)

// warning is how long before its stop signal a leaving task gets nothing new at least,
// on the swarm's own way of stopping it: the engine waits 2 s between the two.
const warning = time.Second

// asker is somewhere that requests are made from.
type asker struct {
	name string
	to   string // address, without a port
	tcp  string // port
	udp  string
	run  func(ctx context.Context, args ...string) (string, error) // probe's arguments
}

// byVIP asks a VIP from a container on host i.
func byVIP(t *testing.T, i int, network, vip string) asker {
	t.Helper()
	h, id := lab.Host(i), client(t, i, network)
	return asker{"VIP from " + h.Name(), vip, "80", "53", func(ctx context.Context, args ...string) (string, error) {
		return h.InContainer(ctx, id, append([]string{"/probe"}, args...)...)
	}}
}

// byPort asks published ports of host i from outside.
func byPort(t *testing.T, i int) asker {
	t.Helper()
	c, h := clients(t)[0], lab.Host(i)
	return asker{"port of " + h.Name(), h.Addr().String(), "81", "82", func(ctx context.Context, args ...string) (string, error) {
		return c.Exec(ctx, append([]string{probe()}, args...)...)
	}}
}

func (a asker) at(udp bool) string {
	if udp {
		return a.to + ":" + a.udp
	}
	return a.to + ":" + a.tcp
}

// finds waits until requests are answered by so many tasks, and none fails.
func (a asker) finds(t *testing.T, tasks int, protos ...string) {
	t.Helper()
	for _, proto := range protos {
		err := cluster.Wait(within(t), fmt.Sprintf("%s %s leads to %d tasks", a.name, proto, tasks), func(ctx context.Context) error {
			out, err := a.run(ctx, "get", proto, "--summary", "-n", fmt.Sprint(2*tasks), a.at(proto == "--udp"))
			var s summary
			if jerr := json.Unmarshal([]byte(out), &s); jerr != nil || s.Failed > 0 || len(s.Hosts) != tasks {
				return fmt.Errorf("%+v, %v", s, err)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// stop is what a task's server tells in the end: times in milliseconds.
type stop struct{ Term, LastTCP, LastUDP float64 }

// ends is what the servers of tasks have told in the end, by container.
type ends struct {
	mu   sync.Mutex
	told map[string]stop
}

func (e *ends) all() map[string]stop {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.told)
}

// listen hears what the servers of a service's tasks that run now tell in the end. It
// hears from now on: the swarm removes a task that it does not need any more, and with
// it what it has told.
func listen(t *testing.T, service string) *ends {
	t.Helper()
	e := &ends{told: map[string]stop{}}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	for _, h := range lab.Hosts() {
		ids, err := h.Docker(within(t), "ps", "-q", "--filter", "label=com.docker.swarm.service.name="+service)
		if err != nil {
			t.Fatal(err)
		}
		for id := range strings.FieldsSeq(ids) {
			wg.Go(func() {
				text, err := h.Docker(ctx, "attach", "--no-stdin", "--sig-proxy=false", id)
				for l := range strings.Lines(text) {
					var s stop
					if json.Unmarshal([]byte(l), &s) == nil && s.Term > 0 {
						e.mu.Lock()
						e.told[id] = s
						e.mu.Unlock()
						return
					}
				}
				if ctx.Err() == nil {
					t.Logf("container %s on %s told nothing of its end: %v", id, h.Name(), err)
				}
			})
		}
	}
	return e
}

// TestLeavingTasksGetNothingNewBeforeTheirStopSignal: by VIP and by published port, from
// all nodes, on every way by which the swarm stops a task. No request fails.
func TestLeavingTasksGetNothingNewBeforeTheirStopSignal(t *testing.T) {
	network(t, "web")
	service(t, "s1", publish("web", "publish=81:80;82:53/udp"), 3, "--update-order", "start-first", "--update-parallelism", "0",
		"--health-cmd", "/probe health", "--health-interval", "2s", // each costs an emulated processor half a second
		"--stop-grace-period", "10s") // one that is killed tells nothing
	v := vip(t, "s1", "web").String()
	var from []asker
	for i := 1; i <= 3; i++ {
		from = append(from, byVIP(t, i, "web", v), byPort(t, i))
	}
	t.Cleanup(func() {
		if _, err := lab.Host(1).Docker(context.Background(), "node", "update", "--availability", "active", "e2"); err != nil {
			t.Error(err)
		}
	})
	for _, step := range []struct {
		name  string
		tasks int // before
		stops int // of those
		do    func()
	}{
		{"service update --force", 3, 3, func() { docker(t, 1, "service", "update", "-d", "-q", "--force", "--no-resolve-image", "s1") }},
		{"scale to 1", 3, 2, func() { scale(t, lab.Host(1), "s1", 1) }},
		{"node drained", 3, 1, func() { docker(t, 1, "node", "update", "--availability", "drain", "e2") }},
	} {
		t.Run(step.name, func(t *testing.T) {
			scale(t, lab.Host(1), "s1", step.tasks)
			running(t, "s1", step.tasks)
			for _, f := range from {
				f.finds(t, step.tasks, "--tcp", "--udp") // none leaves before it was asked
			}
			heard := listen(t, "s1")
			a := keep(t, from)
			step.do()
			err := cluster.Wait(within(t), fmt.Sprintf("%d servers tell of their end", step.stops), func(context.Context) error {
				if n := len(heard.all()); n < step.stops {
					return fmt.Errorf("%d have", n)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
			a.end(t, step.name)
			for id, s := range heard.all() {
				before := func(last float64) time.Duration {
					if last == 0 {
						t.Errorf("%s was never asked", id)
					}
					return time.Duration((s.Term - last) * float64(time.Millisecond)).Round(time.Millisecond)
				}
				tcp, udp := before(s.LastTCP), before(s.LastUDP)
				t.Logf("%s: last connection %s before the stop signal, last datagram %s", step.name, tcp, udp)
				if tcp < warning {
					t.Errorf("%s: %s was asked %s before its stop signal, want %s", step.name, id, tcp, warning)
				}
				if udp < warning {
					t.Errorf("%s: %s had a datagram %s before its stop signal, want %s", step.name, id, udp, warning)
				}
			}
		})
	}
}

// keep makes requests by new connections and by new ports of UDP until its end.
func keep(t *testing.T, from []asker) *asked {
	t.Helper()
	a := asking(t)
	for _, f := range from {
		for _, proto := range []string{"--tcp", "--udp"} {
			a.by(t, f.name+" "+proto, f.run, proto, "--for", longRun, "--every", "100ms", "--timeout", "3s", f.at(proto == "--udp"))
		}
	}
	return a
}

// grace is how long a server that is told to stop goes on with what is open.
const grace = 2 * time.Second

// ways to end a task's process without a word to the swarm.
var suddenly = []struct {
	name   string
	serves time.Duration // how long the server goes on with what is open
	do     func(ctx context.Context, x cluster.Task) error
}{
	{"docker kill", 0, func(ctx context.Context, x cluster.Task) error {
		_, err := x.Host.Docker(ctx, "kill", x.Container)
		return err
	}},
	{"crash", 0, func(ctx context.Context, x cluster.Task) error {
		pid, err := x.Host.Docker(ctx, "inspect", "-f", "{{.State.Pid}}", x.Container)
		if err == nil {
			_, err = x.Host.Exec(ctx, "kill", "-9", strings.TrimSpace(pid))
		}
		return err
	}},
	{"docker stop", grace, func(ctx context.Context, x cluster.Task) error {
		_, err := x.Host.Docker(ctx, "stop", x.Container)
		return err
	}},
}

// TestTasksThatEndWithoutWarning: what clients see of it. Nobody waits for long: a
// connection ends at once, and datagrams of one port find another task within a second.
func TestTasksThatEndWithoutWarning(t *testing.T) {
	network(t, "web")
	service(t, "s1", publish("web", "publish=81:80;82:53/udp"), 3, "--restart-delay", "500ms",
		image.Probe, "serve", "--tcp", "80", "--udp", "53", "--grace", grace.String())
	v := vip(t, "s1", "web").String()
	var from []asker
	for _, i := range []int{1, 2} {
		from = append(from, byVIP(t, i, "web", v), byPort(t, i))
	}
	for _, way := range suddenly {
		t.Run(way.name, func(t *testing.T) {
			tasks := running(t, "s1", 3)
			victim := tasks[0]
			for _, x := range tasks {
				if x.Host == lab.Host(1) {
					victim = x // near to two of the four, far from the others
				}
			}
			for _, f := range from {
				f.finds(t, 3, "--tcp", "--udp")
			}
			host := victim.Container[:12]
			var mu sync.Mutex
			var killed time.Time
			var wg sync.WaitGroup
			type find struct {
				how    string
				hit    bool
				gap    time.Duration
				why    string
				failed int
			}
			var finds []find
			tell := func(f find) {
				mu.Lock()
				defer mu.Unlock()
				finds = append(finds, f)
			}
			ctx := within(t)
			for _, f := range from {
				for n := range 6 {
					wg.Go(func() {
						args := []string{"hold", "--for", "6s", "--timeout", "20s"}
						if n%2 == 0 {
							args = append(args, "--silent")
						}
						out, _ := f.run(ctx, append(args, f.at(false))...)
						end := time.Now()
						var h struct{ Host, Error string }
						for l := range strings.Lines(out) {
							_ = json.Unmarshal([]byte(l), &h) // the last has it; others are answers
						}
						mu.Lock()
						gap := end.Sub(killed)
						mu.Unlock()
						tell(find{fmt.Sprintf("%s, connection %s", f.name, map[bool]string{true: "in silence", false: "in use"}[n%2 == 0]), h.Host == host && h.Error != "", gap, h.Error, 0})
						if h.Host == host && h.Error == "" {
							t.Errorf("%s: a connection to the task that has ended stands: %s", f.name, out)
						}
					})
				}
				for n := range 6 {
					wg.Go(func() {
						out, _ := f.run(ctx, "get", "--udp", "--source-port", fmt.Sprint(41000+n), "--for", "6s", "--every", "50ms", "--timeout", "100ms", f.at(true))
						hit, gap, failed := outage(out, host)
						tell(find{f.name + ", datagrams of one port", hit, gap, "", failed})
					})
				}
				wg.Go(func() {
					out, _ := f.run(ctx, "get", "--for", "6s", "--every", "50ms", "--timeout", "500ms", f.at(false))
					_, gap, failed := outage(out, host)
					tell(find{f.name + ", new connections", true, gap, "", failed})
				})
			}
			stand(t, tasks, 6*len(from))
			mu.Lock()
			killed = time.Now()
			mu.Unlock()
			if err := way.do(ctx, victim); err != nil {
				t.Fatal(err)
			}
			wg.Wait()
			type sum struct {
				n      int
				gap    time.Duration
				failed int
				whys   map[string]int
			}
			sums := map[string]*sum{}
			for _, f := range finds {
				if !f.hit {
					continue
				}
				s := sums[f.how]
				if s == nil {
					s = &sum{whys: map[string]int{}}
					sums[f.how] = s
				}
				s.n++
				s.failed += f.failed
				s.gap = max(s.gap, f.gap)
				if i := strings.LastIndex(f.why, ": "); f.why != "" {
					s.whys[f.why[i+1:]]++
				}
				// A second, and what this machine's other work takes.
				if f.gap > 2*time.Second+way.serves {
					t.Errorf("%s, %s: %s without an answer (%s)", way.name, f.how, f.gap, f.why)
				}
			}
			if len(sums) == 0 {
				t.Error("nobody was with the task")
			}
			for how, s := range sums {
				t.Logf("%s: %s: %d, at most %s without an answer, %d failed %v", way.name, how, s.n, s.gap.Round(time.Millisecond), s.failed, s.whys)
			}
		})
	}
}

// outage is the longest time without an answer in what `probe get` printed, how many
// had none, and whether host has answered any of it.
func outage(out, host string) (hit bool, longest time.Duration, failed int) {
	const every = 50.0
	var now float64
	for l := range strings.Lines(out) {
		var x struct {
			OK    bool
			Ms    float64
			Reply struct{ Host string }
		}
		if json.Unmarshal([]byte(l), &x) != nil {
			continue
		}
		hit = hit || x.Reply.Host == host
		if now += max(x.Ms, every); x.OK {
			now = 0
		} else {
			failed++
		}
		longest = max(longest, time.Duration(now*float64(time.Millisecond)))
	}
	return hit, longest, failed
}

// stand waits until clients have n connections to port 80 of tasks.
func stand(t *testing.T, tasks []cluster.Task, n int) {
	t.Helper()
	err := cluster.Wait(within(t), fmt.Sprintf("%d connections stand", n), func(ctx context.Context) error {
		there := 0
		for _, x := range tasks {
			pid, err := x.Host.Docker(ctx, "inspect", "-f", "{{.State.Pid}}", x.Container)
			if err != nil {
				return err
			}
			out, err := x.Host.Exec(ctx, "nsenter", "-t", strings.TrimSpace(pid), "-n", "ss", "-Htn", "state", "established", "sport", "=", ":80")
			if err != nil {
				return err
			}
			there += strings.Count(out, "\n")
		}
		if there < n {
			return fmt.Errorf("%d do", there)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestDrainEndsConnections: those of a leaving task get an RST when its time is over, in
// use or in silence, by VIP and by published port, although the server goes on.
func TestDrainEndsConnections(t *testing.T) {
	network(t, "web")
	const drain = 4 * time.Second // after the stop signal, which comes 3 s after the news
	tasks := service(t, "s1", publish("web", "publish=81:80", "drain=4s"), 2, "--stop-grace-period", "30s",
		image.Probe, "serve", "--tcp", "80", "--grace", "30s")
	v := vip(t, "s1", "web").String()
	from := []asker{byVIP(t, 1, "web", v), byVIP(t, 2, "web", v), byPort(t, 3)}
	for _, f := range from {
		f.finds(t, 2, "--tcp")
	}
	ctx := within(t)
	ends := make(chan string, 4*len(from))
	var done sync.WaitGroup
	for _, f := range from {
		for n := range 4 {
			done.Go(func() {
				args := []string{"hold", "--for", "30s", "--timeout", "30s"}
				if n%2 == 0 {
					args = append(args, "--silent")
				}
				out, _ := f.run(ctx, append(args, f.at(false))...)
				ends <- f.name + ": " + out
			})
		}
	}
	stand(t, tasks, 4*len(from))
	begun := time.Now()
	docker(t, 1, "service", "scale", "-d", "s1=0")
	done.Wait()
	took := time.Since(begun)
	close(ends)
	for out := range ends {
		if !strings.Contains(out, "connection reset by peer") {
			t.Errorf("%s; want it reset", out)
		}
	}
	t.Logf("with sluice.drain=%s, all %d connections were reset %s after the command", drain, 4*len(from), took.Round(time.Millisecond))
	if took < drain || took > drain+10*time.Second {
		t.Errorf("took %s, want %s", took, drain)
	}
}
