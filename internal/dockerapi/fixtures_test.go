package dockerapi

import (
	"fmt"
	"net/netip"
	"strings"

	"sluice/internal/model"
)

const (
	webNet   = model.NetworkID("f9sxnet0000000000000000aa")
	plainNet = "ovlnet0000000000000000000"
	webEP    = "ep10000000000000000000000000000000000000000000000000000000000001"
)

// worker is what a worker's engine says, with one task of a service on our
// network and a container of its own on docker0.
func worker() map[string]string {
	return map[string]string{
		"/plugins/p1/json": `{"Id":"p1","Name":"sluice:latest","Enabled":true}`,
		"/info": `{"Name":"w1","ServerVersion":"20.10.24","DockerRootDir":"/var/lib/docker","Swarm":{"NodeID":"node2","NodeAddr":"10.77.0.12","LocalNodeState":"active",
			"ControlAvailable":false,"Error":"","RemoteManagers":[{"NodeID":"node1","Addr":"10.77.0.11:2377"},{"NodeID":"node3","Addr":"0.0.0.0:2377"}]}}`,
		"/containers/json": containersBody("running", "Up 5 seconds"),
		"/networks": `[{"Name":"web","Id":"f9sxnet0000000000000000aa","Created":"2024-01-01T00:00:00Z","Scope":"swarm","Driver":"sluice:latest","EnableIPv6":false,
			"IPAM":{"Driver":"sluice:latest","Options":null,"Config":[{"Subnet":"10.200.0.0/24","Gateway":"10.200.0.1"}]},"Internal":false,"Attachable":true,
			"Ingress":false,"ConfigFrom":{"Network":""},"ConfigOnly":false,"Containers":null,"Options":{"sluice.vni":"4711"},"Labels":null},
			{"Name":"other","Id":"ovlnet0000000000000000000","Scope":"swarm","Driver":"overlay","IPAM":{"Config":[{"Subnet":"10.0.1.0/24","Gateway":"10.0.1.1"}]}}]`,
		"/networks/f9sxnet0000000000000000aa": `{"Name":"web","Id":"f9sxnet0000000000000000aa","Scope":"swarm","Driver":"sluice:latest",
			"Peers":[{"Name":"3ec44f76aa56","IP":"10.77.0.11"},{"Name":"77ffaa","IP":"10.77.0.12"}],
			"Services":{"":{"VIP":"<nil>","Ports":[],"LocalLBIndex":0,"Tasks":[{"Name":"alone","EndpointID":"e9","EndpointIP":"10.200.0.9","Info":null}]},
				"rr":{"VIP":"<nil>","Ports":[],"LocalLBIndex":257,"Tasks":[]},
				"web":{"VIP":"10.200.0.2","Ports":[],"LocalLBIndex":256,"Tasks":[
					{"Name":"web.2.w49e","EndpointID":"ep2","EndpointIP":"10.200.0.4","Info":null},
					{"Name":"web.1.x1","EndpointID":"` + webEP + `","EndpointIP":"10.200.0.3","Info":null}]}}}`,
		"/containers/c1/json": `{"Id":"c1","NetworkSettings":{"SandboxKey":"/var/run/docker/netns/0123456789ab"}}`,
	}
}

func containersBody(state, status string) string {
	return fmt.Sprintf(`[{"Id":"c1","Names":["/web.1.x1"],"Image":"nginx","State":%q,"Status":%q,
		"Labels":{"com.docker.swarm.node.id":"node2","com.docker.swarm.service.id":"svc1","com.docker.swarm.service.name":"web","com.docker.swarm.task":"","com.docker.swarm.task.id":"task1","com.docker.swarm.task.name":"web.1.x1"},
		"HostConfig":{"NetworkMode":"default"},
		"NetworkSettings":{"Networks":{"web":{"IPAMConfig":{"IPv4Address":"10.200.0.3"},"NetworkID":"f9sxnet0000000000000000aa","EndpointID":%q,"Gateway":"","IPAddress":"10.200.0.3","IPPrefixLen":24,"MacAddress":"02:42:0a:c8:00:03","DriverOpts":null}}}},
		{"Id":"c2","Names":["/plain"],"State":"running","Status":"Up 2 hours","Labels":{},
		"NetworkSettings":{"Networks":{"bridge":{"NetworkID":"brnet","EndpointID":"epb","IPAddress":"172.17.0.2","MacAddress":"02:42:ac:11:00:02"}}}}]`, state, status, webEP)
}

// leader is what the leading manager's engine says.
func leader() map[string]string {
	b := worker()
	b["/info"] = `{"Name":"m1","ServerVersion":"28.5.2","Swarm":{"NodeID":"node1","NodeAddr":"10.77.0.11","LocalNodeState":"active",
		"ControlAvailable":true,"RemoteManagers":[{"NodeID":"node1","Addr":"10.77.0.11:2377"}],"Nodes":2,"Managers":1}}`
	b["/nodes"] = `[{"ID":"node1","Description":{"Hostname":"m1"},"Spec":{"Labels":{"zone":"a"}},"Status":{"State":"ready","Addr":"10.77.0.11"},"ManagerStatus":{"Leader":true,"Reachability":"reachable","Addr":"10.77.0.11:2377"}},
		{"ID":"node2","Description":{"Hostname":"w1"},"Spec":{"Availability":"drain"},"Status":{"State":"down","Addr":"10.77.0.12"}}]`
	b["/services"] = `[{"ID":"svc1","Version":{"Index":20},"CreatedAt":"2024-05-06T07:08:09.5Z","Spec":{"Name":"web","Mode":{"Replicated":{"Replicas":2}},
		"TaskTemplate":{"Networks":[{"Target":"f9sxnet0000000000000000aa","DriverOpts":{"sluice.weight":"3"}},{"Target":"ovlnet0000000000000000000"}]}},
		"Endpoint":{"Spec":{"Mode":"vip"},"VirtualIPs":[{"NetworkID":"f9sxnet0000000000000000aa","Addr":"10.200.0.2/24"},{"NetworkID":"ovlnet0000000000000000000","Addr":"10.0.1.2/24"}]}},
		{"ID":"svc2","CreatedAt":"2024-05-06T07:08:10Z","Spec":{"Name":"rr","TaskTemplate":{"Networks":[{"Target":"f9sxnet0000000000000000aa"}]}},"Endpoint":{"Spec":{"Mode":"dnsrr"}}},
		{"ID":"svc3","Spec":{"Name":"elsewhere","TaskTemplate":{"Networks":[{"Target":"ovlnet0000000000000000000"}]}},"Endpoint":{"VirtualIPs":[{"NetworkID":"ovlnet0000000000000000000","Addr":"10.0.1.9/24"}]}}]`
	b["/tasks"] = "[" + strings.Join([]string{
		task("task1", "running", "running", "10.200.0.3/24"),
		task("task2", "shutdown", "running", "10.200.0.4/24"),
		task("task3", "shutdown", "shutdown", "10.200.0.5/24"),
		task("task4", "running", "failed", "10.200.0.6/24"),
		task("job1", "complete", "running", "10.200.0.7/24"),
		task("job2", "complete", "complete", "10.200.0.8/24"),
		task("attached", "running", "running", "10.200.0.9/24"),
		task("removed", "remove", "starting", "10.200.0.10/24"),
	}, ",") + "]"
	return b
}

func task(id, desired, observed, addr string) string {
	return fmt.Sprintf(`{"ID":%q,"ServiceID":"svc1","NodeID":"node2","DesiredState":%q,"Status":{"State":%q},
		"NetworksAttachments":[{"Network":{"ID":"f9sxnet0000000000000000aa","Spec":{"Name":"web"}},"Addresses":[%q]}]}`, id, desired, observed, addr)
}

var addr = netip.MustParseAddr

func webEndpoint() model.EngineEndpoint {
	return model.EngineEndpoint{
		Network: webNet, Addr: addr("10.200.0.3"), MAC: model.MAC{0x02, 0x42, 10, 200, 0, 3},
		Container: "c1", Name: "web.1.x1", Sandbox: "/var/run/docker/netns/0123456789ab",
		Task: model.Task{ID: "task1", Service: "svc1", ServiceName: "web", VIP: addr("10.200.0.2"), Ready: true},
	}
}
