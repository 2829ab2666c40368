package guard_test

import (
	"net/netip"
	"testing"

	"sluice/internal/golden"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/lb/guard"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

const (
	shop  model.NetworkID  = "shopnetwork00"
	back  model.NetworkID  = "backnetwork00"
	task1 model.EndpointID = "aaaaaaaaaaaa1111"
	task2 model.EndpointID = "bbbbbbbbbbbb2222"
	web   model.ServiceID  = "web"
)

// view is a node with a network and the endpoints; the service web has 10.255.0.9 there.
func view(es ...model.Endpoint) model.View {
	v := model.View{
		Self:      model.Self{Node: "node1", VTEP: addr("192.0.2.1")},
		Networks:  map[model.NetworkID]model.Network{},
		Endpoints: map[model.EndpointID]model.Endpoint{},
		Services:  map[model.ServiceID]model.Service{web: {ID: web, VIPs: map[model.NetworkID]netip.Addr{shop: addr("10.255.0.9")}}},
	}
	for id, third := range map[model.NetworkID]byte{shop: 0, back: 16} {
		v.Networks[id] = model.Network{
			ID: id, Subnet: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, third, 0}), 20), Gateway: netip.AddrFrom4([4]byte{10, 255, third, 1}),
		}
	}
	for _, e := range es {
		v.Endpoints[e.ID] = e
	}
	return v
}

// end is an endpoint that is in its task, with these changes.
func end(id model.EndpointID, ip string, changes ...func(*model.Endpoint)) model.Endpoint {
	e := model.Endpoint{ID: id, Network: shop, Addr: addr(ip), MAC: model.MACFor(addr(ip)), Phase: model.Taken, Sandbox: "/run/docker/netns/" + id.Short()}
	for _, c := range changes {
		c(&e)
	}
	return e
}

// of has the endpoint's task be one of a service.
func of(s model.ServiceID) func(*model.Endpoint) {
	return func(e *model.Endpoint) { e.Task.Service = s }
}

func TestPlans(t *testing.T) {
	published := func(v model.View) model.View {
		s := v.Services[web]
		s.Options = map[model.NetworkID]model.ServiceOptions{shop: {Published: "81:80/tcp"}}
		v.Services[web] = s
		return v
	}
	edit := func(v model.View, f func(*model.View)) model.View { f(&v); return v }
	for _, c := range []struct {
		name string
		view model.View
	}{
		{"nobody", view()},
		{"a-client-and-a-task", view(end(task1, "10.255.0.3"), end(task2, "10.255.0.4", of(web)))},
		{"phases", view(
			end(task1, "10.255.0.3", of(web), func(e *model.Endpoint) { e.Phase = model.Created }),
			end(task2, "10.255.0.4", of(web), func(e *model.Endpoint) { e.Phase, e.Sandbox = model.Joined, "" }))},
		{"a-MAC-of-the-users", view(end(task1, "10.255.0.3", of(web), func(e *model.Endpoint) { e.MAC = model.MAC{2, 0, 0, 0, 0, 9} }))},
		{"another-virtual-IP-than-before", view(end(task1, "10.255.0.3", of(web), func(e *model.Endpoint) {
			e.Prepared, e.Task.VIP = addr("10.255.0.7"), addr("10.255.0.8")
		}))},
		{"a-task-on-two-networks", view(
			end(task1, "10.255.0.3", of(web)),
			end(task2, "10.255.16.3", of(web), func(e *model.Endpoint) { e.Network = back }))},
		{"no-manager-has-told", edit(view(
			end(task1, "10.255.0.3", of(web)), end(task2, "10.255.0.4", of("another"))), func(v *model.View) {
			clear(v.Services)
			v.Remotes = map[model.EndpointID]model.Remote{
				"there":     {Network: shop, Task: model.Task{Service: web, VIP: addr("10.255.0.9")}},
				"elsewhere": {Network: back, Task: model.Task{Service: web, VIP: addr("10.255.16.9")}},
			}
		})},
		{"published", published(view(end(task1, "10.255.0.3", of(web)), end(task2, "10.255.0.4")))},
		{"not-published-any-more", view(end(task1, "10.255.0.3", of(web), func(e *model.Endpoint) { e.Meshed = true }))},
		{"a-kernel-without", edit(published(view(end(task1, "10.255.0.3", of(web)))), func(v *model.View) { v.Self.NoMesh = true })},
		{"another-pool", edit(published(view(end(task1, "10.255.0.3", of(web)))), func(v *model.View) {
			v.Self.MeshPool = netip.MustParsePrefix("240.0.0.0/8")
		})},
		{"a-local-network", edit(published(view(end(task1, "10.255.0.3", of(web)))), func(v *model.View) {
			n := v.Networks[shop]
			n.Local = true
			v.Networks[shop] = n
		})},
		{"partial", edit(view(end(task1, "10.255.0.3", of(web))), func(v *model.View) { v.Partial = true })},
		{"a-network-that-is-not-here", edit(view(end(task1, "10.255.0.3", of(web))), func(v *model.View) { delete(v.Networks, shop) })},
		{"what-is-nobodys-virtual-IP", view(end(task1, "10.255.0.3", of(web), func(e *model.Endpoint) {
			e.Prepared, e.Task.VIP = e.Addr, addr("10.255.0.1")
		}))},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := kernel.State{}
			guard.Plan(c.view, s)
			golden.Check(t, c.name, s.Text())
		})
	}
}
