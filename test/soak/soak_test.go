package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sluice/test/cluster"
)

func TestMain(m *testing.M) {
	cluster.MaybeInner()
	os.Exit(m.Run())
}

// TestAShortSoakIsWell runs the whole, for as long as a commit can wait: some 40 s, and
// as much again for the swarm's beginning and end.
func TestAShortSoakIsWell(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("engines in namespaces need root")
	}
	const (
		span = 40 * time.Second
		// seed: all plugins killed, a mesh's pair deleted, a state file damaged and
		// neighbours flushed, between a service that is made, published, rolled back
		// and asked; and nothing that waits for swarm's own clocks, as demotion does.
		seed = 10
	)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.Build(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	r, err := soak(t.Context(), config{span: span, seed: seed, built: filepath.Join(root, "build"), dir: filepath.Join(os.TempDir(), "sluice-soak-test"),
		logs: filepath.Join(root, "build", fmt.Sprintf("soak-%d", seed)), out: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r.Text())
	if len(r.Wrong) > 0 {
		t.Error("not well, see above")
	}
	for kind, c := range r.Requests {
		// Each stream makes ten a second; on a machine that is busy some of them.
		if c.OK < 100 {
			t.Errorf("of %s there were only %d answers: nothing was tried", kind, c.OK)
		}
	}
	left, err := cluster.Leftovers(filepath.Join(os.TempDir(), "sluice-soak-test"))
	if err != nil || len(left) > 0 {
		t.Errorf("left on the machine: %v, %v", left, err)
	}
}

func TestEveryFaultHasAPolicyAndAWayToBeDone(t *testing.T) {
	if a, b := slices.Sorted(maps.Keys(faults)), slices.Sorted(maps.Keys(blows)); !slices.Equal(a, b) {
		t.Errorf("policy for %v\nways for   %v", a, b)
	}
	for kind, p := range faults {
		if p.heal <= 0 || p.why == "" {
			t.Errorf("%s: %+v", kind, p)
		}
	}
}

// steady is for plans of tests.
var steady = []string{"spread", "on-s1"}

func TestASeedMakesTheSameChoices(t *testing.T) {
	a, b, c := newPlan(1, hosts, steady, []string{"dr", "nat"}), newPlan(1, hosts, steady, []string{"dr", "nat"}), newPlan(2, hosts, steady, []string{"dr", "nat"})
	same := true
	for i := range 100 {
		x, y, z := a.next(), b.next(), c.next()
		if describe(x) != describe(y) {
			t.Fatalf("choice %d of one seed: %s, %s", i, describe(x), describe(y))
		}
		same = same && describe(x) == describe(z)
	}
	if same {
		t.Error("another seed makes the same choices")
	}
}

func describe(a action) string {
	if a.during != nil {
		return fmt.Sprintf("%s %v %s, and %s", a, a.hosts, a.lasts, describe(*a.during))
	}
	return fmt.Sprintf("%s %v", a, a.hosts)
}

// TestChoicesAreAboutWhatIsThere replays what plans choose against what they have made.
func TestChoicesAreAboutWhatIsThere(t *testing.T) {
	seen := map[string]int{}
	for seed := range uint64(100) {
		networks, services, clients := map[string]bool{}, map[string]string{}, map[string]string{}
		var do func(a action, alone bool) error
		do = func(a action, alone bool) error {
			seen[a.kind]++
			for _, h := range a.hosts {
				if h < 1 || h > hosts {
					return fmt.Errorf("there is no host %d", h)
				}
			}
			has := func(m map[string]string, name string) error {
				if m[name] == "" {
					return fmt.Errorf("%s is not there: %v", name, m)
				}
				return nil
			}
			switch a.kind {
			case opNetwork:
				networks[a.name] = true
			case opNoNetwork:
				for name, on := range services {
					if on == a.name {
						return fmt.Errorf("service %s uses the network", name)
					}
				}
				for name, on := range clients {
					if on == a.name {
						return fmt.Errorf("client %s uses the network", name)
					}
				}
				delete(networks, a.name)
			case opService, opClient:
				if !networks[a.network] {
					return fmt.Errorf("network %s is not there: %v", a.network, networks)
				}
				of := services
				if a.kind == opClient {
					of = clients
				}
				of[a.name] = a.network
			case opNoService:
				defer delete(services, a.name)
				return has(services, a.name)
			case opNoClient:
				defer delete(clients, a.name)
				return has(clients, a.name)
			case opScale, opUpdate, opRollback, opPublish, opUnpublish:
				if a.at != "" && !strings.HasPrefix(a.at, "name="+a.network) {
					return fmt.Errorf("at %q", a.at)
				}
				return has(services, a.name)
			case opAsk:
				if services[a.name] != clients[a.client] {
					return fmt.Errorf("client %s is on %s, service %s on %s", a.client, clients[a.client], a.name, services[a.name])
				}
				return has(services, a.name)
			case opRolling, opDrain, opDemote:
				if !alone {
					return fmt.Errorf("during a fault")
				}
			default:
				if len(a.hosts) == 0 || a.kind == "hosts cut off" && a.hosts[0] == a.hosts[1] {
					return fmt.Errorf("strikes %v", a.hosts)
				}
				if a.during != nil {
					return do(*a.during, false)
				}
			}
			return nil
		}
		p := newPlan(seed, hosts, steady, []string{"dr", "nat"})
		for i := range 200 {
			a := p.next()
			if err := do(a, true); err != nil {
				t.Fatalf("seed %d, choice %d, %s: %v", seed, i, describe(a), err)
			}
		}
	}
	for _, kind := range append(slices.Collect(maps.Keys(faults)), opNetwork, opNoNetwork, opService, opNoService, opScale, opUpdate, opRollback,
		opPublish, opUnpublish, opClient, opNoClient, opAsk, opRolling, opDrain, opDemote) {
		if seen[kind] < 100 {
			t.Errorf("%s was chosen %d times in 20,000 choices", kind, seen[kind])
		}
	}
}

func TestPolicySaysWhoMayBeHurt(t *testing.T) {
	inside := way{client: "s1", entry: "s1", servers: []string{"s2"}}
	outer := way{entry: "s1", servers: []string{"s2"}}
	local := way{client: "s1", entry: "s1", servers: []string{"s1"}}
	wide := way{entry: "s1", servers: []string{"s1", "s2", "s3"}}
	for _, c := range []struct {
		name  string
		harm  harm
		hosts []string
		want  []bool // of inside, outer, local, wide
	}{
		{"nothing", harm{}, []string{"s1", "s2"}, []bool{false, false, false, false}},
		{"clients of s1", harm{clients: true}, []string{"s1"}, []bool{true, false, true, false}},
		{"clients of s2", harm{clients: true}, []string{"s2"}, []bool{false, false, false, false}},
		{"entries", harm{entries: true}, []string{"s1"}, []bool{true, true, true, true}},
		{"servers", harm{servers: true}, []string{"s2"}, []bool{true, true, false, true}},
		{"servers elsewhere", harm{servers: true}, []string{"s3"}, []bool{false, false, false, true}},
		{"only there", harm{only: true}, []string{"s2"}, []bool{true, true, false, false}},
		{"between", harm{between: true}, []string{"s1", "s2"}, []bool{true, true, false, true}},
		{"between others", harm{between: true}, []string{"s2", "s3"}, []bool{false, false, false, false}},
		{"across, from", harm{across: true}, []string{"s1"}, []bool{true, true, false, true}},
		{"across, to", harm{across: true}, []string{"s2"}, []bool{true, true, false, true}},
		{"across, others", harm{across: true}, []string{"s3"}, []bool{false, false, false, true}},
	} {
		for i, w := range []way{inside, outer, local, wide} {
			if got := c.harm.hurts(w, c.hosts); got != c.want[i] {
				t.Errorf("%s, %+v: %t", c.name, w, got)
			}
		}
	}
}

func TestAFailureIsExplainedByWhatWasThenAndThere(t *testing.T) {
	t0 := time.Now()
	at := func(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }
	w := way{client: "s1", entry: "s1", servers: []string{"s2"}}
	all := []window{
		{what: "old", hosts: []string{"s2"}, harm: harm{servers: true}, from: at(0), until: at(10)},
		{what: "harmless", hosts: []string{"s2"}, from: at(0), until: at(30)},
		{what: "elsewhere", hosts: []string{"s3"}, harm: harm{servers: true}, from: at(0), until: at(30)},
		{what: "under way", hosts: []string{"s1"}, harm: harm{clients: true}, from: at(20)},
	}
	for _, c := range []struct {
		from, until int
		want        string
	}{
		{1, 2, "old"}, {9, 11, "old"}, {11, 13, ""}, {19, 21, "under way"}, {40, 42, "under way"},
	} {
		var got []string
		for _, x := range explain(failure{way: w, from: at(c.from), until: at(c.until)}, all) {
			got = append(got, x.what)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("from %d to %d: %v, want %q", c.from, c.until, got, c.want)
		}
	}
	var r report
	r.AllowedBy = map[string]int{}
	r.failure(failure{stream: "a"}, 0, all[:1])
	r.finish()
	if len(r.Wrong) > 0 || r.Allowed != 1 {
		t.Errorf("an explained failure: %+v", r.Wrong)
	}
	r.failure(failure{stream: "b", what: "refused"}, time.Second, nil)
	r.finish()
	if len(r.Wrong) != 1 || !strings.Contains(r.Text(), "at 1.0s  b: refused") || !strings.Contains(r.Text(), "NOT WELL") {
		t.Errorf("a failure without an excuse: %v\n%s", r.Wrong, r.Text())
	}
}

func TestRequestsAreJudgedByTheirAnswers(t *testing.T) {
	read := func(s *stream, lines ...string) (told bool, fails []string) {
		tr := &traffic{streams: []*stream{s}}
		told = tr.read(s, strings.NewReader(strings.Join(lines, "\n")))
		for _, f := range tr.failures {
			fails = append(fails, f.what)
		}
		return told, fails
	}
	s := &stream{kind: newConnections, service: "web", peer: outside}
	_, fails := read(s,
		`{"n":1,"ok":true,"ms":1.5,"reply":{"host":"web-on-s1","peer":"203.0.113.7:1000"}}`,
		`{"n":2,"ok":true,"ms":1,"reply":{"host":"other-on-s1","peer":"203.0.113.7:1000"}}`,
		`{"n":3,"ok":true,"ms":1,"reply":{"host":"web-on-s1","peer":"10.0.0.1:1000"}}`,
		`{"n":4,"ok":false,"ms":2000,"error":"i/o timeout"}`)
	want := []string{`"other-on-s1" has answered, not a task of web`, `the task sees "10.0.0.1:1000", not 203.0.113.7`, "i/o timeout"}
	if !slices.Equal(fails, want) || s.count.OK != 1 || s.count.Failed != 3 || !s.good.IsZero() {
		t.Errorf("%q, %+v", fails, s.count)
	}
	s = &stream{kind: keptConnections, service: "web"}
	told, fails := read(s, `{"host":"web-on-s1","proto":"tcp","peer":"10.0.0.1:1"}`, `{"sent":30,"received":30,"longest_ms":12,"host":"web-on-s1"}`)
	if !told || fails != nil || s.count.OK != 30 || s.good.IsZero() {
		t.Errorf("a connection that lasts: %t, %q, %+v", told, fails, s.count)
	}
	told, fails = read(s, `{"host":"web-on-s1"}`, `{"sent":5,"received":4,"host":"web-on-s1","error":"EOF"}`)
	if !told || !slices.Equal(fails, []string{"after 4 answers: EOF"}) || !s.good.IsZero() {
		t.Errorf("a connection that breaks: %t, %q", told, fails)
	}
	if told, _ := read(s, `{"host":"web-on-s1"}`); told {
		t.Error("a client that was killed has told its end")
	}
}

func TestGrowthIsSeen(t *testing.T) {
	u := newUsage(map[string]footprint{"s1": {PID: "10", Memory: 20 << 20, Descriptors: 30}})
	u.add("s1", footprint{PID: "10", Memory: 20 << 20, Descriptors: 30}, 3)
	u.add("s1", footprint{PID: "10", Memory: 60 << 20, Descriptors: 40}, 5)
	u.add("s1", footprint{PID: "11", Memory: 21 << 20, Descriptors: 25}, 4)
	r := newReport(config{})
	u.into(r)
	if x := r.Plugins[0]; x.Processes != 2 || x.Drift != 9 || x.Most.Memory != 60<<20 || x.End.PID != "11" || len(r.Wrong) > 0 {
		t.Errorf("%+v, %v", x, r.Wrong)
	}
	u.add("s1", footprint{PID: "11", Memory: 20<<20 + moreMemory + 1, Descriptors: 30 + moreDescriptors + 1}, 4)
	r = newReport(config{})
	u.into(r)
	if len(r.Wrong) != 2 {
		t.Errorf("growth of both: %v", r.Wrong)
	}
}

func TestACommandLineThatIsWrongIsNotRun(t *testing.T) {
	var out, errs strings.Builder
	if code := command(context.Background(), []string{"-for", "soon"}, &out, &errs); code != exitNotRun || !strings.Contains(errs.String(), "soon") {
		t.Errorf("%d: %s", code, errs.String())
	}
}
