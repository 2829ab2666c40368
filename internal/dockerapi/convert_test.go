package dockerapi

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"sluice/internal/model"
)

func TestReadyIsWhatDockerPsShows(t *testing.T) {
	for _, c := range []struct {
		state, status string
		ready         bool
	}{
		{"running", "Up 5 minutes", true},
		{"running", "Up Less than a second", true},
		{"running", "Up About an hour", true},
		{"running", "Up 5 minutes (healthy)", true},
		{"running", "Up 5 minutes (none)", true},
		{"running", "Up 2 seconds (health: starting)", false},
		{"running", "Up 3 minutes (unhealthy)", false},
		{"running", "Up 3 minutes (something new)", false},
		{"paused", "Up 3 minutes (Paused)", false},
		{"running", "Up 3 minutes (Paused)", false},
		{"restarting", "Restarting (1) 5 seconds ago", false},
		{"exited", "Exited (0) 3 minutes ago", false},
		{"exited", "Exited (137) 3 minutes ago", false},
		{"created", "Created", false},
		{"removing", "Removal In Progress", false},
		{"dead", "Dead", false},
		{"running", "", false},
		{"", "", false},
	} {
		if got := ready(c.state, c.status); got != c.ready {
			t.Errorf("%s, %q: ready %t", c.state, c.status, got)
		}
	}
}

func TestInfoOfEveryKindOfNode(t *testing.T) {
	for name, c := range map[string]struct {
		body            string
		active, manager bool
		managers        int
	}{
		"no swarm":    {`{"Name":"h","ServerVersion":"20.10.24","Swarm":{"NodeID":"","NodeAddr":"","LocalNodeState":"inactive","ControlAvailable":false,"Error":"","RemoteManagers":null}}`, false, false, 0},
		"joining":     {`{"Swarm":{"NodeID":"","NodeAddr":"10.0.0.1","LocalNodeState":"pending","ControlAvailable":false,"RemoteManagers":null}}`, false, false, 0},
		"locked":      {`{"Swarm":{"LocalNodeState":"locked","ControlAvailable":false}}`, false, false, 0},
		"lost leader": {`{"Swarm":{"NodeID":"n","NodeAddr":"10.0.0.1","LocalNodeState":"active","ControlAvailable":true,"Error":"rpc error","RemoteManagers":[{"NodeID":"m","Addr":"[fd00::2]:2377"},{"Addr":"nonsense"}]}}`, true, true, 2},
	} {
		in, err := parseInfo([]byte(c.body))
		if none := name == "no swarm"; in.none != none {
			t.Errorf("%s: in no swarm %t", name, in.none)
		}
		if err != nil || in.active != c.active || in.manager != c.manager || len(in.managers) != c.managers {
			t.Errorf("%s: %+v, %v", name, in, err)
		}
	}
	if _, err := parseInfo([]byte(`{}`)); err == nil {
		t.Error("an answer without a word on swarm was taken for one without a swarm")
	}
}

// TestTasksTellWhoseTheyAre: of a replicated service, of a global one, and of a
// container that somebody attached to the network.
func TestTasksTellWhoseTheyAre(t *testing.T) {
	slot := strings.Replace(task("a", "running", "running", "10.200.0.3/24"), `"NodeID"`, `"Slot":2,"NodeID"`, 1)
	run := strings.Replace(task("b", "running", "running", "10.200.0.4/24"), `"ServiceID":"svc1"`, `"Spec":{"NetworkAttachmentSpec":{"ContainerID":"c1"}}`, 1)
	got, err := parseTasks([]byte("[" + slot + "," + run + "," + task("c", "running", "running", "10.200.0.5/24") + "]"))
	want := []model.Holder{
		{Addr: addr("10.200.0.3"), Kind: model.HolderTask, ID: "a", Service: "svc1", Slot: 2, Node: "node2"},
		{Addr: addr("10.200.0.4"), Kind: model.HolderTask, ID: "b", Container: "c1", Node: "node2"},
		{Addr: addr("10.200.0.5"), Kind: model.HolderTask, ID: "c", Service: "svc1", Node: "node2"},
	}
	if err != nil || !slices.Equal(got.live[webNet], want) {
		t.Errorf("%v, %+v", err, got.live)
	}
}

func TestAnAddressThatIsNoneFailsTheWholeList(t *testing.T) {
	if _, err := parseTasks([]byte("[" + task("t", "running", "running", "10.200.0.256/24") + "]")); err == nil {
		t.Error("tasks: accepted")
	}
	body := strings.Replace(leader()["/services"], "10.200.0.2/24", "10.200.0.2/240", 1)
	if _, _, err := parseServices([]byte(body)); err == nil {
		t.Error("services: accepted")
	}
}

func TestOptionsThatAreNotUnderstoodAreReportedAndTheRestRead(t *testing.T) {
	body := strings.Replace(leader()["/services"], `{"sluice.weight":"3"}`, `{"sluice.weight":"3","sluice.sheduler":"rr"}`, 1)
	services, refused, err := parseServices([]byte(body))
	if err != nil || refused == nil || !strings.Contains(refused.Error(), "service web") {
		t.Errorf("refused %v, %v", refused, err)
	}
	if services["svc1"].Options[webNet].Weight != 3 {
		t.Errorf("options %+v", services["svc1"].Options)
	}
}

func TestServicesOfOldClientsNameTheirNetworksElsewhere(t *testing.T) {
	services, _, err := parseServices([]byte(`[{"ID":"s","Spec":{"Name":"old","TaskTemplate":{},"Networks":[{"Target":"` + string(webNet) + `","DriverOpts":{"sluice.weight":"7"}}]}}]`))
	if err != nil || services["s"].Options[webNet].Weight != 7 {
		t.Errorf("%+v, %v", services, err)
	}
}

func TestANetworkHasTheRangeThatItWasMadeWith(t *testing.T) {
	ns, _, err := parseNetworks([]byte(`[
		{"Id":"a","Scope":"swarm","Driver":"d","IPAM":{"Driver":"d","Config":[{"Subnet":"10.1.0.0/24","IPRange":"10.1.0.64/26","Gateway":"10.1.0.1"}]}},
		{"Id":"b","Scope":"swarm","Driver":"d","IPAM":{"Driver":"d","Config":[{"Subnet":"10.2.0.0/24","Gateway":"10.2.0.1"}]}}]`), "d")
	if err != nil || ns["a"].Range.String() != "10.1.0.64/26" || ns["b"].Range.IsValid() {
		t.Errorf("%+v, %v", ns, err)
	}
}

func TestAServiceIsKnownByItsIDWhileGossipStillHasTheOldName(t *testing.T) {
	k := known{
		info: info{active: true, manager: true}, infoValid: true, clusterValid: true, nodesValid: true, networksValid: true, containersValid: true,
		networks:   map[model.NetworkID]model.EngineNetwork{webNet: {ID: webNet, Swarm: true}},
		gossip:     map[model.NetworkID]gossip{webNet: {services: map[string]model.EngineService{"old": {VIP: netip.MustParseAddr("10.0.0.1")}}}},
		services:   map[model.ServiceID]model.Service{"s": {ID: "s", Name: "new", VIPs: map[model.NetworkID]netip.Addr{webNet: netip.MustParseAddr("10.0.0.2")}}},
		containers: map[model.EndpointID]model.EngineEndpoint{"e": {Network: webNet, Task: model.Task{ID: "t", Service: "s", ServiceName: "old"}}},
	}
	if got := k.snapshot().Containers["e"].Task.VIP.String(); got != "10.0.0.2" {
		t.Errorf("VIP %s", got)
	}
	k.clusterValid = false
	if got := k.snapshot().Containers["e"].Task.VIP.String(); got != "10.0.0.1" {
		t.Errorf("without managers: VIP %s", got)
	}
}

// Whatever the engine says, reading it ends in a value or an error, and a value
// never holds an address that is none.
func FuzzParse(f *testing.F) {
	for _, b := range leader() {
		f.Add([]byte(b))
	}
	f.Add([]byte(containersBody("running", "Up 1 second")))
	f.Add([]byte(`[{"NetworkSettings":{"Networks":{"a":null}}},null]`))
	f.Add([]byte(`{"Services":{"a":{"Tasks":null}},"Peers":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		k := known{infoValid: true, containersValid: true, networksValid: true, clusterValid: true, nodesValid: true}
		k.info, _ = parseInfo(b)
		k.info.active, k.info.manager = true, true
		k.containers, _ = parseContainers(b)
		k.networks, k.waiting, _ = parseNetworks(b, "sluice:latest")
		if g, err := parseGossip(b); err == nil {
			k.gossip = map[model.NetworkID]gossip{webNet: g}
			for _, p := range g.peers {
				if !p.IsValid() {
					t.Error("peer without address")
				}
			}
		}
		k.services, _, _ = parseServices(b)
		for _, s := range k.services {
			for n, vip := range s.VIPs {
				if !vip.IsValid() {
					t.Errorf("service %s has an invalid VIP on %s", s.ID, n)
				}
			}
		}
		k.tasks, _ = parseTasks(b)
		k.nodes, _ = parseNodes(b)
		_, _ = parseSandbox(b)
		_, _ = parsePlugin(b)
		s := k.snapshot()
		if !same(s, k.snapshot()) {
			t.Error("two snapshots of the same differ")
		}
		if _, err := json.Marshal(s); err != nil {
			t.Error(err)
		}
	})
}
