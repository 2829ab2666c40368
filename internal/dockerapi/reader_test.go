package dockerapi

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sluice/internal/model"
)

var compare = cmp.Options{
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
	cmpopts.EquateEmpty(),
}

func TestAWorkerLearnsEverythingWithoutAManager(t *testing.T) {
	for _, api := range []string{"1.41", "1.45", "1.51"} {
		t.Run(api, func(t *testing.T) {
			inBubble(t, api, worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
				s := within(t, time.Second, "the task's namespace and VIP", r, func(s model.EngineSnapshot) bool {
					c := s.Containers[webEP]
					return s.SwarmValid && c.Sandbox != "" && c.Task.VIP.IsValid()
				})
				want := model.EngineSnapshot{
					Alias: "sluice:latest", HostName: "w1", Version: "20.10.24", DataRoot: "/var/lib/docker",
					SwarmValid: true, Active: true, Node: "node2", NodeAddr: addr("10.77.0.12"), Managers: []netip.Addr{addr("10.77.0.11")},
					ContainersValid: true,
					Containers:      map[model.EndpointID]model.EngineEndpoint{webEP: webEndpoint()},
					NetworksValid:   true,
					Networks: map[model.NetworkID]model.EngineNetwork{webNet: {
						ID: webNet, Name: "web", Swarm: true, Subnet: netip.MustParsePrefix("10.200.0.0/24"), Gateway: addr("10.200.0.1"),
						IPAM: "sluice:latest", Options: map[string]string{"sluice.vni": "4711"}, Peers: []netip.Addr{addr("10.77.0.11"), addr("10.77.0.12")},
						Services: map[string]model.EngineService{
							"rr":  {},
							"web": {VIP: addr("10.200.0.2"), Tasks: map[model.EndpointID]netip.Addr{"ep2": addr("10.200.0.4"), webEP: addr("10.200.0.3")}},
						},
					}},
				}
				if d := cmp.Diff(want, s, compare, cmpopts.IgnoreFields(model.EngineSnapshot{}, "SwarmAt", "ContainersAt")); d != "" {
					t.Errorf("(-want +got):\n%s", d)
				}
				pass(20 * time.Second)
				for _, path := range []string{"/services", "/tasks", "/nodes"} {
					if n := f.called(path); n != 0 {
						t.Errorf("a worker was asked for %s %d times", path, n)
					}
				}
				if n := f.called("/containers/c1/json"); n != 1 {
					t.Errorf("inspected %d times, want once", n)
				}
				if st := r.Status(); !st.Serving || st.API != api || len(st.Parts) != 6 {
					t.Errorf("status %+v", st)
				}
			})
		})
	}
}

func TestTheLeaderLearnsServicesAndWhatIsLeaving(t *testing.T) {
	inBubble(t, "1.51", leader(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		s := within(t, time.Second, "services", r, func(s model.EngineSnapshot) bool { return s.ServicesValid && len(s.Services) > 0 })
		if !s.Manager || !s.Leader {
			t.Errorf("manager %t, leader %t", s.Manager, s.Leader)
		}
		wantServices := map[model.ServiceID]model.Service{
			"svc1": {ID: "svc1", Name: "web", Created: time.Date(2024, 5, 6, 7, 8, 9, 500e6, time.UTC),
				VIPs: map[model.NetworkID]netip.Addr{webNet: addr("10.200.0.2")}, Options: map[model.NetworkID]model.ServiceOptions{webNet: {Weight: 3}}},
			"svc2": {ID: "svc2", Name: "rr", Created: time.Date(2024, 5, 6, 7, 8, 10, 0, time.UTC), Options: map[model.NetworkID]model.ServiceOptions{webNet: {}}},
		}
		if d := cmp.Diff(wantServices, s.Services, compare); d != "" {
			t.Errorf("services (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]model.TaskID{"removed", "task2"}, s.Leaving); d != "" {
			t.Errorf("leaving (-want +got):\n%s", d)
		}
		var live []netip.Addr
		for _, a := range []string{"1", "2", "3", "4", "6", "7", "9", "10"} { // gateway, VIP, tasks
			live = append(live, addr("10.200.0."+a))
		}
		if d := cmp.Diff(map[model.NetworkID][]netip.Addr{webNet: live}, s.Live, compare); d != "" {
			t.Errorf("live (-want +got):\n%s", d)
		}
		held := func(last string, kind model.HolderKind, id string) model.Holder {
			h := model.Holder{Addr: addr("10.200.0." + last), Kind: kind, ID: id}
			if kind == model.HolderTask {
				h.Service, h.Node = "svc1", "node2"
			}
			return h
		}
		holders := []model.Holder{
			held("1", model.HolderGateway, ""), held("2", model.HolderService, "svc1"), held("3", model.HolderTask, "task1"), held("4", model.HolderTask, "task2"),
			held("6", model.HolderTask, "task4"), held("7", model.HolderTask, "job1"), held("9", model.HolderTask, "attached"), held("10", model.HolderTask, "removed"),
		}
		if d := cmp.Diff(map[model.NetworkID][]model.Holder{webNet: holders}, s.Holders, compare); d != "" {
			t.Errorf("holders (-want +got):\n%s", d)
		}
		wantNodes := map[model.NodeID]model.EngineNode{
			"node1": {Name: "m1", Addr: addr("10.77.0.11"), Labels: map[string]string{"zone": "a"}}, "node2": {Name: "w1", Addr: addr("10.77.0.12"), Down: true, Drained: true},
		}
		if d := cmp.Diff(wantNodes, s.Nodes, compare); d != "" {
			t.Errorf("nodes (-want +got):\n%s", d)
		}

		// A task that is to go is known within the half second, without any event.
		f.set(func(f *fakeEngine) {
			f.bodies["/tasks"] = "[" + task("task1", "shutdown", "running", "10.200.0.3/24") + "]"
		})
		s = within(t, 510*time.Millisecond, "task1 leaving", r, func(s model.EngineSnapshot) bool { return s.Containers[webEP].Task.Leaving })
		at := s.ServicesAt
		drain(r)
		pass(3 * time.Second)
		if !r.Snapshot().ServicesAt.After(at) {
			t.Error("ServicesAt stands still while polls succeed")
		}
		if n := f.called("/services"); n < 7 || n > 12 {
			t.Errorf("%d polls in some 4 s", n)
		}
	})
}

func drain(r *Reader) {
	select {
	case <-r.Changed():
	default:
	}
}

func TestPollsWithoutNewsAreNoChange(t *testing.T) {
	b := leader()
	inBubble(t, "1.41", b, nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "services", r, func(s model.EngineSnapshot) bool { return s.ServicesValid && s.Containers[webEP].Sandbox != "" })
		pass(100 * time.Millisecond)
		drain(r)
		pass(4 * time.Second) // shorter than the lists' period
		select {
		case <-r.Changed():
			t.Error("told of a change")
		default:
		}
	})
}

// TestConnectionsAreKept: with systemd's socket activation, who dials an engine that is
// being stopped has it started again, so that is done as seldom as can be.
func TestConnectionsAreKept(t *testing.T) {
	inBubble(t, "1.41", leader(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "services", r, func(s model.EngineSnapshot) bool { return s.ServicesValid && s.Containers[webEP].Sandbox != "" })
		dials := func() int {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.dials
		}
		before := dials()
		for range 60 {
			f.emit("container", "start") // all parts at once
			pass(time.Second)
		}
		if n := dials() - before; n > len(partNames) {
			t.Errorf("dialled %d times in a minute", n)
		}
	})
}

func TestEventsAreFollowedByReadingsUntilTheListHasCaughtUp(t *testing.T) {
	inBubble(t, "1.41", worker(), func(f *fakeEngine) { f.bodies["/containers/json"] = "[]" }, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "lists", r, func(s model.EngineSnapshot) bool { return s.ContainersValid && len(s.Networks) == 1 })
		pass(2 * time.Second) // past the start's follow-ups
		before := f.called("/containers/json")
		for range 5 {
			f.emit("container", "start")
		}
		pass(7 * time.Millisecond)
		if n := f.called("/containers/json") - before; n != 1 {
			t.Errorf("a burst of five events caused %d readings at once, want one", n)
		}
		// The list lags: it has the container only now.
		f.set(func(f *fakeEngine) { f.bodies["/containers/json"] = containersBody("running", "Up Less than a second") })
		within(t, 50*time.Millisecond, "the container", r, func(s model.EngineSnapshot) bool { return len(s.Containers) == 1 })
		pass(1100 * time.Millisecond)
		if n := f.called("/containers/json") - before; n != 4 {
			t.Errorf("%d readings after the burst, want the first and three more", n)
		}
		if st := r.Status(); st.Events != 5 {
			t.Errorf("%d events counted", st.Events)
		}
	})
}

func TestAHealthEventMovesReadiness(t *testing.T) {
	inBubble(t, "1.51", worker(), func(f *fakeEngine) {
		f.bodies["/containers/json"] = containersBody("running", "Up 2 seconds (health: starting)")
	}, func(t *testing.T, f *fakeEngine, r *Reader) {
		s := within(t, time.Second, "the container", r, func(s model.EngineSnapshot) bool { return len(s.Containers) == 1 })
		if s.Containers[webEP].Task.Ready {
			t.Error("ready while its health check has not passed")
		}
		f.set(func(f *fakeEngine) {
			f.bodies["/containers/json"] = containersBody("running", "Up 3 seconds (healthy)")
		})
		f.emit("container", "health_status: healthy")
		within(t, 20*time.Millisecond, "ready", r, func(s model.EngineSnapshot) bool { return s.Containers[webEP].Task.Ready })
	})
}

func TestABootingEngineIsPingedAndNothingElse(t *testing.T) {
	inBubble(t, "1.41", worker(), func(f *fakeEngine) { f.hang["*"] = true }, func(t *testing.T, f *fakeEngine, r *Reader) {
		pass(time.Minute)
		s := r.Snapshot()
		if s.SwarmValid || s.ContainersValid || s.NetworksValid || s.ServicesValid {
			t.Errorf("believes something: %+v", s)
		}
		f.mu.Lock()
		for path, n := range f.calls {
			if path != "/_ping" || n > 2*13 { // HEAD, perhaps GET, each 5 s and a pause
				t.Errorf("%s was asked %d times", path, n)
			}
		}
		f.mu.Unlock()
		if st := r.Status(); st.Serving || st.Trouble == "" {
			t.Errorf("status %+v", st)
		}
		f.set(func(f *fakeEngine) { f.hang["*"] = false })
		within(t, 11*time.Second, "everything", r, func(s model.EngineSnapshot) bool { return s.SwarmValid && s.ContainersValid && len(s.Containers) == 1 })
	})
}

func TestAnEngineThatRestartsIsDoubtedAndThenReadAgain(t *testing.T) {
	inBubble(t, "1.41", worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "the container", r, func(s model.EngineSnapshot) bool { return s.ContainersValid && len(s.Containers) == 1 })
		pass(30 * time.Second)
		f.set(func(f *fakeEngine) { f.refuse = true })
		f.cut()
		s := within(t, 10*time.Millisecond, "doubt", r, func(s model.EngineSnapshot) bool { return !s.ContainersValid })
		if len(s.Containers) != 1 || s.SwarmValid || s.NetworksValid || s.Node != "node2" {
			t.Errorf("what was known is kept, and not believed: %+v", s)
		}
		pass(20 * time.Second)
		f.set(func(f *fakeEngine) {
			f.refuse = false
			f.bodies["/containers/json"] = "[]"
		})
		s = within(t, 6*time.Second, "the new engine's word", r, func(s model.EngineSnapshot) bool { return s.ContainersValid })
		if len(s.Containers) != 0 {
			t.Error("still lists the old container")
		}
	})
}

func TestACutEventStreamIsOpenedAgainAndMissesNothing(t *testing.T) {
	inBubble(t, "1.41", worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "the container", r, func(s model.EngineSnapshot) bool { return len(s.Containers) == 1 })
		for range 5 {
			f.cut()
			f.set(func(f *fakeEngine) { f.bodies["/containers/json"] = "[]" })
			within(t, 5*time.Second+time.Millisecond, "the change in between", r, func(s model.EngineSnapshot) bool { return s.ContainersValid && len(s.Containers) == 0 })
			f.set(func(f *fakeEngine) { f.bodies["/containers/json"] = containersBody("running", "Up 1 second") })
			f.emit("container", "start")
			within(t, 100*time.Millisecond, "the container again", r, func(s model.EngineSnapshot) bool { return len(s.Containers) == 1 })
		}
	})
}

func TestOnePartThatHangsHoldsUpNoOther(t *testing.T) {
	for _, path := range []string{"/info", "/tasks", "/networks/" + string(webNet), "/containers/c1/json"} {
		t.Run(path[1:], func(t *testing.T) {
			inBubble(t, "1.41", leader(), func(f *fakeEngine) { f.hang[path] = true }, func(t *testing.T, f *fakeEngine, r *Reader) {
				within(t, time.Second, "the container", r, func(s model.EngineSnapshot) bool { return s.ContainersValid && len(s.Containers) == 1 })
				f.set(func(f *fakeEngine) { f.bodies["/containers/json"] = containersBody("paused", "Up 1 minute (Paused)") })
				f.emit("container", "pause")
				within(t, 20*time.Millisecond, "paused", r, func(s model.EngineSnapshot) bool { return !s.Containers[webEP].Task.Ready })
				pass(time.Minute)
				f.set(func(f *fakeEngine) { f.hang[path] = false })
				within(t, 40*time.Second, "what hung", r, func(s model.EngineSnapshot) bool {
					return s.SwarmValid && s.ServicesValid && len(s.Services) == 2 && s.Containers[webEP].Sandbox != "" && len(s.Networks[webNet].Peers) == 2
				})
			})
		})
	}
}

func TestWhatFailsIsNotBelievedAndComesBack(t *testing.T) {
	for name, spoil := range map[string]func(f *fakeEngine, path string){
		"error":    func(f *fakeEngine, path string) { f.statuses[path] = http.StatusInternalServerError },
		"503":      func(f *fakeEngine, path string) { f.statuses[path] = http.StatusServiceUnavailable },
		"garbage":  func(f *fakeEngine, path string) { f.bodies[path] = `{"Name": [` },
		"type":     func(f *fakeEngine, path string) { f.bodies[path] = `[17]` },
		"redirect": func(f *fakeEngine, path string) { f.statuses[path] = http.StatusFound },
	} {
		for path, valid := range map[string]func(s model.EngineSnapshot) bool{
			"/info":            func(s model.EngineSnapshot) bool { return s.SwarmValid },
			"/containers/json": func(s model.EngineSnapshot) bool { return s.ContainersValid },
			"/networks":        func(s model.EngineSnapshot) bool { return s.NetworksValid },
			"/services":        func(s model.EngineSnapshot) bool { return s.ServicesValid },
			"/tasks":           func(s model.EngineSnapshot) bool { return s.ServicesValid },
			"/nodes":           func(s model.EngineSnapshot) bool { return s.ServicesValid && s.Leader },
		} {
			t.Run(name+path, func(t *testing.T) {
				inBubble(t, "1.41", leader(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
					good := within(t, time.Second, "all", r, func(s model.EngineSnapshot) bool {
						return s.SwarmValid && s.ContainersValid && s.NetworksValid && s.ServicesValid && s.Leader
					})
					body := ""
					f.set(func(f *fakeEngine) {
						body = f.bodies[path]
						spoil(f, path)
					})
					bad := within(t, 11*time.Second, "doubt", r, func(s model.EngineSnapshot) bool { return !valid(s) })
					if len(bad.Services) != len(good.Services) || len(bad.Containers) != len(good.Containers) {
						t.Error("what was known is gone")
					}
					f.set(func(f *fakeEngine) {
						f.bodies[path] = body
						delete(f.statuses, path)
					})
					within(t, 6*time.Second, "belief", r, valid)
				})
			})
		}
	}
}

func TestJoiningASwarmIsNoticedWithoutAnEvent(t *testing.T) {
	inBubble(t, "1.41", worker(), func(f *fakeEngine) {
		f.bodies["/info"] = `{"Name":"w1","Swarm":{"LocalNodeState":"inactive"}}`
	}, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "no swarm", r, func(s model.EngineSnapshot) bool { return s.SwarmValid && !s.Active })
		f.set(func(f *fakeEngine) { f.bodies["/info"] = worker()["/info"] })
		within(t, infoEveryOutside, "a worker", r, func(s model.EngineSnapshot) bool { return s.Active })
	})
}

func TestLeavingASwarmIsNoticed(t *testing.T) {
	inBubble(t, "1.41", worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "a worker", r, func(s model.EngineSnapshot) bool { return s.SwarmValid && s.Active })
		none := `{"Name":"w1","Swarm":{"LocalNodeState":"inactive"}}`
		// That is what an engine says too that is being stopped.
		f.set(func(f *fakeEngine) { f.bodies["/info"], f.refuse = none, true })
		s := within(t, infoEvery+time.Second, "doubt", r, func(s model.EngineSnapshot) bool { return !s.SwarmValid })
		if !s.Active || s.NoSwarm {
			t.Errorf("an engine that is being stopped has left its swarm: %+v", s)
		}
		f.set(func(f *fakeEngine) { f.refuse = false })
		within(t, infoEvery+time.Second, "no swarm", r, func(s model.EngineSnapshot) bool { return s.SwarmValid && s.NoSwarm && !s.Active })
	})
}

func TestADemotedManagerKeepsNoWord(t *testing.T) {
	inBubble(t, "1.41", leader(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "leader", r, func(s model.EngineSnapshot) bool { return s.Leader })
		f.set(func(f *fakeEngine) {
			f.bodies["/info"] = worker()["/info"]
			for _, p := range []string{"/nodes", "/services", "/tasks"} {
				f.statuses[p] = http.StatusServiceUnavailable
			}
		})
		f.emit("node", "update")
		s := within(t, 20*time.Millisecond, "a worker", r, func(s model.EngineSnapshot) bool { return !s.Manager })
		if s.Leader || s.ServicesValid || s.Services != nil {
			t.Errorf("%+v", s)
		}
	})
}

// TestAnEngineThatIsStoppedTellsOfNoServicesEnd: it lists the swarm's networks no more,
// and then fails to say what services there are, or the other way round.
func TestAnEngineThatIsStoppedTellsOfNoServicesEnd(t *testing.T) {
	lists := func(f *fakeEngine) { f.bodies["/networks"] = "[]" }
	fails := func(f *fakeEngine) {
		for _, p := range []string{"/nodes", "/services", "/tasks"} {
			f.statuses[p] = http.StatusServiceUnavailable
		}
	}
	both := func(f *fakeEngine) { lists(f); fails(f) }
	for name, steps := range map[string][]func(*fakeEngine){
		"both at once": {both}, "the swarm's part ends first": {fails, lists},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, "1.41", leader(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
				within(t, time.Second, "leader", r, func(s model.EngineSnapshot) bool { return s.Leader && len(s.Services) == 2 })
				pass(nodesEvery + leaderEvery/2)
				for _, step := range steps {
					f.set(step)
					f.emit("network", "destroy")
					for range 600 {
						pass(time.Millisecond)
						if s := r.Snapshot(); s.ServicesValid && len(s.Services) != 2 {
							t.Fatalf("services: %v", s.Services)
						}
					}
				}
				within(t, networksEvery, "the list without them", r, func(s model.EngineSnapshot) bool { return s.NetworksValid && len(s.Networks) == 0 && !s.ServicesValid })
			})
		})
	}
}

func TestAnotherLeaderIsNoticedWithinSeconds(t *testing.T) {
	inBubble(t, "1.41", leader(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "leader", r, func(s model.EngineSnapshot) bool { return s.Leader })
		f.set(func(f *fakeEngine) {
			f.bodies["/nodes"] = strings.Replace(f.bodies["/nodes"], `"Leader":true`, `"Leader":false`, 1)
		})
		within(t, nodesEvery+leaderEvery, "no leader", r, func(s model.EngineSnapshot) bool { return !s.Leader && s.LeaderAt.IsZero() && s.ServicesValid })
		before := f.called("/services")
		pass(10 * time.Second)
		if n := f.called("/services") - before; n > 6 {
			t.Errorf("a manager that does not lead polled %d times in 10 s", n)
		}
	})
}

// TestWhenAnotherLedIsNoLaterThanItsLead: tasks are asked for more often than who leads,
// and their times say nothing of that.
func TestWhenAnotherLedIsNoLaterThanItsLead(t *testing.T) {
	const lead, other = `"ID":"node1","ManagerStatus":{"Leader":%t}`, `"ID":"node2","ManagerStatus":{"Leader":%t}`
	nodes := func(first, second bool) func(*fakeEngine) {
		return func(f *fakeEngine) {
			f.bodies["/nodes"] = fmt.Sprintf("[{"+lead+"},{"+other+"}]", first, second)
		}
	}
	inBubble(t, "1.41", leader(), nodes(false, true), func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "another leads", r, func(s model.EngineSnapshot) bool { return !s.Follows.IsZero() })
		was := r.Snapshot().Follows
		pass(3 * nodesEvery)
		if !r.Snapshot().Follows.After(was) {
			t.Error("the time stands still while another leads")
		}
		f.set(nodes(true, false))
		since := time.Now()
		for range 19 { // not until the nodes are asked for again
			f.set(func(f *fakeEngine) { f.bodies["/tasks"] += " " }) // news, and no node's
			r.Refresh()
			pass(nodesEvery / 20)
			if s := r.Snapshot(); s.Follows.After(since) {
				t.Fatalf("another leads at %s, and this one does since %s", s.Follows, since)
			}
		}
		within(t, leaderEvery, "this one leads", r, func(s model.EngineSnapshot) bool { return s.Leader && s.Follows.IsZero() })
		led := r.Snapshot().LeaderAt
		if led.Before(since) {
			t.Errorf("this one leads since %s, as asked at %s", since, led)
		}
		pass(3 * nodesEvery)
		if !r.Snapshot().LeaderAt.After(led) {
			t.Error("the time stands still while this one leads")
		}
		f.set(nodes(false, false))
		within(t, nodesEvery+leaderEvery, "nobody leads", r, func(s model.EngineSnapshot) bool { return !s.Leader && s.LeaderAt.IsZero() && s.ServicesValid })
		if at := r.Snapshot().Follows; !at.IsZero() {
			t.Errorf("nobody leads, and another does at %s", at)
		}
		f.set(func(f *fakeEngine) { f.bodies["/nodes"] = "[{" + fmt.Sprintf(other, true) + "}]" })
		pass(2 * nodesEvery)
		if at := r.Snapshot().Follows; !at.IsZero() {
			t.Errorf("another leads a swarm that this node is not in, at %s", at)
		}
	})
}

func TestWithoutANetworkOfOursTheSwarmIsLeftInPeace(t *testing.T) {
	inBubble(t, "1.41", leader(), func(f *fakeEngine) { f.bodies["/networks"] = "[]" }, func(t *testing.T, f *fakeEngine, r *Reader) {
		within(t, time.Second, "leader", r, func(s model.EngineSnapshot) bool { return s.Leader && s.NetworksValid })
		pass(time.Minute)
		if n := f.called("/services") + f.called("/tasks"); n != 0 {
			t.Errorf("%d polls", n)
		}
		if s := r.Snapshot(); !s.ServicesValid || len(s.Services)+len(s.Live) != 0 {
			t.Errorf("no network, so no service: %+v", s)
		}
		// The first network starts the polls, and what was not read is not believed
		// to be absent.
		f.set(func(f *fakeEngine) {
			f.bodies["/networks"] = worker()["/networks"]
			f.hang["/tasks"] = true
		})
		f.emit("network", "create")
		within(t, 50*time.Millisecond, "the network", r, func(s model.EngineSnapshot) bool {
			if len(s.Networks) == 1 && s.ServicesValid {
				t.Fatal("services are believed that were never read")
			}
			return len(s.Networks) == 1
		})
		f.set(func(f *fakeEngine) { f.hang["/tasks"] = false })
		within(t, 11*time.Second, "services", r, func(s model.EngineSnapshot) bool { return s.ServicesValid && len(s.Services) == 2 })
	})
}

func TestANetworkThatIsGoneHereLosesItsGossip(t *testing.T) {
	inBubble(t, "1.41", worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		path := "/networks/" + string(webNet)
		has := func(s model.EngineSnapshot) bool { return len(s.Networks[webNet].Services) > 0 }
		within(t, time.Second, "gossip", r, has)
		// The engine stumbling is no evidence.
		f.set(func(f *fakeEngine) { f.statuses[path] = http.StatusInternalServerError })
		r.Refresh()
		pass(2 * time.Second)
		if !has(r.Snapshot()) {
			t.Fatal("a failed reading took the gossip away")
		}
		f.set(func(f *fakeEngine) {
			f.statuses[path] = 0
			delete(f.bodies, path)
		})
		within(t, 6*time.Second, "no gossip", r, func(s model.EngineSnapshot) bool { return !has(s) })
		f.set(func(f *fakeEngine) { f.bodies[path] = worker()[path] })
		r.Refresh()
		within(t, 50*time.Millisecond, "gossip again", r, has)
	})
}

func TestAPluginUnderAnotherNameOwnsOtherNetworks(t *testing.T) {
	inBubble(t, "1.41", worker(), func(f *fakeEngine) {
		f.bodies["/plugins/p1/json"] = `{"Id":"p1","Name":"mine:v2"}`
		f.bodies["/networks"] = strings.ReplaceAll(f.bodies["/networks"], "sluice:latest", "mine:v2")
	}, func(t *testing.T, _ *fakeEngine, r *Reader) {
		within(t, time.Second, "the network", r, func(s model.EngineSnapshot) bool { return s.Alias == "mine:v2" && len(s.Networks) == 1 })
	})
}

func TestAnEngineThatIsTooOldIsNamed(t *testing.T) {
	inBubble(t, "1.40", worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		pass(time.Second)
		if st := r.Status(); st.Serving || !strings.Contains(st.Trouble, "20.10") {
			t.Errorf("status %+v", st)
		}
	})
}

func TestAConfigurationThatCannotWorkIsRefused(t *testing.T) {
	for _, c := range []Config{{}, {Socket: "/x"}, {Name: "n"}} {
		if _, err := New(c); err == nil {
			t.Errorf("%+v accepted", c)
		}
	}
}

func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		var p pace
		p.done(now, now.Add(time.Second), 10*time.Second, true) // a slow reading
		now = now.Add(time.Second)
		p.asked(now)
		p.asked(now.Add(10 * time.Millisecond)) // does not push the reading away
		if got := p.next.Sub(now); got != time.Second {
			t.Errorf("rests %s after a reading of 1 s", got)
		}
		var failing pace
		var pauses []time.Duration
		for range 7 {
			failing.done(now, now, time.Hour, false)
			failing.asked(now)
			pauses = append(pauses, failing.due().Sub(now))
		}
		want := []time.Duration{250e6, 500e6, 1e9, 2e9, 4e9, 5e9, 5e9}
		if d := cmp.Diff(want, pauses); d != "" {
			t.Errorf("pauses (-want +got):\n%s", d)
		}
	})
}

func TestRefusalsCarryTheEnginesWords(t *testing.T) {
	inBubble(t, "1.41", worker(), nil, func(t *testing.T, f *fakeEngine, r *Reader) {
		f.set(func(f *fakeEngine) { f.statuses["/x"] = http.StatusServiceUnavailable })
		e, err := connect(t.Context(), f.dial)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := e.close(); err != nil {
				t.Error(err)
			}
		}()
		if _, err := e.get(t.Context(), "/x", nil); !errors.Is(err, errNotManager) || !strings.Contains(err.Error(), "status 503 for /x") {
			t.Errorf("got %v", err)
		}
		if _, err := e.get(t.Context(), "/nothing", nil); !errors.Is(err, errNotFound) {
			t.Errorf("got %v", err)
		}
	})
}
