package e2e

import (
	"os"
	"strconv"
	"testing"
)

// updatesEnv is how many updates TestUpdatesLoseNothing makes, of which each takes a
// quarter of a minute.
const updatesEnv = "SLUICE_TEST_UPDATES"

// TestUpdatesLoseNothing changes a service under constant load: new connections,
// connections that are kept, and datagrams, by virtual IP and by published ports.
// No request fails: a task gets nothing before it is ready, and nothing new any more
// well before it is told to end.
func TestUpdatesLoseNothing(t *testing.T) {
	updates := 5
	if s := os.Getenv(updatesEnv); s != "" {
		var err error
		if updates, err = strconv.Atoi(s); err != nil {
			t.Fatal(err)
		}
	}
	network(t, "web")
	outside := clients(t)[1]
	const replicas = 3
	service(t, "s1", publish("web", "publish=81:80;81:53/udp"), replicas,
		"--health-cmd", "/probe health", "--health-interval", "2s", "--stop-grace-period", "10s", "--update-monitor", "1s")
	v := vip(t, "s1", "web").String()
	c := client(t, 2, "web")
	reaches(t, lab.Host(2), c, replicas, 6, v)
	spreads(t, outside, 81, 6, replicas)
	spreads(t, outside, 81, 6, replicas, "--udp")

	force := func(order string) func() {
		return func() {
			must(t, update(t, "s1", "--force", "--update-order", order))
		}
	}
	scales := func(ns ...int) func() {
		return func() {
			for _, n := range ns {
				scale(t, lab.Host(1), "s1", n)
				running(t, "s1", n)
			}
		}
	}
	kinds := []struct {
		name string
		do   func()
	}{
		{"new tasks first", force("start-first")},
		{"old tasks first", force("stop-first")},
		{"scaled to 10, to 1 and back", scales(10, 1, replicas)},
		{"a node is drained", func() {
			docker(t, 1, "node", "update", "--availability", "drain", "e3")
			running(t, "s1", replicas)
			docker(t, 1, "node", "update", "--availability", "active", "e3")
		}},
	}
	all := asking(t)
	all.inside(t, 2, c, v)
	for _, h := range lab.Hosts()[1:] {
		all.outside(t, outside, h, 81)
		all.outside(t, outside, h, 81, "--udp")
		all.outside(t, outside, h, 81, "--keep", "--for", longRun)
	}
	for i := range updates {
		kind := kinds[i%len(kinds)]
		before := all.failed()
		kind.do()
		running(t, "s1", replicas)
		if n := all.failed() - before; n > 0 {
			t.Errorf("update %d, %s: %d requests failed; so far:%s", i+1, kind.name, n, all.why())
		}
	}
	reaches(t, lab.Host(2), c, replicas, 6, v)
	all.end(t, "during updates")
	sound(t, "web")
}
