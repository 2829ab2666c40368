package driver_test

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sluice/driver"
	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/ipam/pool"
)

// complains fails the test unless err says all of words.
func complains(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("error %v, want one with %q", err, w)
		}
	}
}

func TestALifeOfATask(t *testing.T) {
	h := newHost(t, false)
	opts := h.allocated(t, map[string]string{"sluice.scheduler": "wrr"})
	if err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: opts, Internal: true, Subnets: plain}); err != nil {
		t.Fatal(err)
	}
	n, _ := h.hub.Network(web)
	want := model.Network{
		ID: web, Subnet: prefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1"), Internal: true, VNI: n.VNI, MTU: 1450,
		Options: model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "wrr"},
	}
	if n != want || n.VNI < 1<<20 {
		t.Errorf("network %+v, want %+v with a VNI from the upper space", n, want)
	}

	reply, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{
		Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20"), Options: map[string]string{"sluice.weight": "7", "com.docker.network.portmap": "x"},
	})
	mac := model.MACFor(netip.MustParseAddr("10.255.0.2"))
	if err != nil || reply.MAC != mac {
		t.Errorf("endpoint: %v, %v", reply, err)
	}
	join, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd, Sandbox: "/var/run/docker/netns/1234"})
	if err != nil || join != (driver.JoinReply{SrcName: "slcaaaaaaaaaaaa", DstPrefix: "eth"}) {
		t.Errorf("join: %v, %v", join, err)
	}
	expected := model.Endpoint{
		ID: webEnd, Network: web, Addr: netip.MustParseAddr("10.255.0.2"), MAC: mac, Phase: model.Joined,
		Sandbox: "/host/run/docker/netns/1234", Options: model.ServiceOptions{Weight: 7},
	}
	if e, _ := h.hub.Endpoint(webEnd); e != expected {
		t.Errorf("endpoint %+v, want %+v", e, expected)
	}
	if last := h.loop.waited[len(h.loop.waited)-1]; last != h.hub.View().Revision {
		t.Errorf("waited for revision %d of %d", last, h.hub.View().Revision)
	}

	for range 2 { // deleting twice is deleting once
		if err := errors.Join(h.Leave(t.Context(), web, webEnd)); err != nil {
			t.Fatal(err)
		}
		if e, _ := h.hub.Endpoint(webEnd); !e.Left {
			t.Error("it has not left")
		}
	}
	for range 2 {
		if err := h.DeleteEndpoint(t.Context(), web, webEnd); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := errors.Join(h.DeleteNetwork(t.Context(), web), h.Free(t.Context(), web)); err != nil {
			t.Fatal(err)
		}
	}
	if v := h.hub.View(); len(v.Networks)+len(v.Endpoints)+len(h.pools.bound) > 0 {
		t.Errorf("left over: %v %v %v", v.Networks, v.Endpoints, h.pools.bound)
	}
	if err := h.Leave(t.Context(), web, webEnd); err != nil {
		t.Errorf("leave of what is unknown: %v", err)
	}
}

func TestCreateNetworkRefuses(t *testing.T) {
	leader := newHost(t, false)
	good := leader.allocated(t, nil)
	with := func(k, v string) map[string]string {
		out := maps.Clone(good)
		out[k] = v
		return out
	}
	for _, c := range []struct {
		name    string
		request driver.CreateRequest
		words   []string
	}{
		{"no swarm network", driver.CreateRequest{Subnets: plain}, []string{"join a swarm first", "SCOPE=local"}},
		{"an unknown option", driver.CreateRequest{Options: with("sluice.colour", "red"), Subnets: plain}, []string{"sluice.colour"}},
		{"IPv6", driver.CreateRequest{Options: good, IPv6: true, Subnets: plain}, []string{"without --ipv6"}},
		{"an IPv6 subnet", driver.CreateRequest{Options: good, Subnets: plain, Subnets6: plain}, []string{"without --ipv6"}},
		{"an IPv6 subnet among the others", driver.CreateRequest{Options: good, Subnets: []driver.Subnet{{Pool: prefix("fd00::/64")}}}, []string{"fd00::/64", "IPv4"}},
		{"two subnets", driver.CreateRequest{Options: good, Subnets: append(plain, plain...)}, []string{"2 IPv4 subnets", "single --subnet"}},
		{"no subnet", driver.CreateRequest{Options: good}, []string{"0 IPv4 subnets"}},
		{"a gateway elsewhere", driver.CreateRequest{Options: good, Subnets: []driver.Subnet{subnet("10.255.0.0/20", "10.1.0.1/20")}}, []string{"10.1.0.1", "10.255.0.0/20", "--gateway"}},
		{"an MTU that the underlay cannot carry", driver.CreateRequest{Options: with(options.MTU, "1451"), Subnets: plain}, []string{"MTU 1451", "192.168.0.1 carries 1500", "-o sluice.mtu=1450"}},
		{"a key that is none", driver.CreateRequest{Options: with(options.SecretKey, "short"), Subnets: plain}, []string{options.SecretKey}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, false)
			c.request.Network = web
			err := h.CreateNetwork(t.Context(), c.request)
			complains(t, err, append(c.words, "network webnetwork00")...)
			if err != nil && strings.Contains(err.Error(), good[options.SecretKey]) {
				t.Error("the key is in the text")
			}
			if len(h.hub.View().Networks) > 0 {
				t.Error("it was recorded all the same")
			}
		})
	}
}

func TestANetworkWithoutAGatewayGetsTheFirstAddress(t *testing.T) {
	h := newHost(t, false)
	err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: []driver.Subnet{{Pool: prefix("10.255.0.0/20")}}})
	if n, _ := h.hub.Network(web); err != nil || n.Gateway != netip.MustParseAddr("10.255.0.1") {
		t.Errorf("gateway %s, %v", n.Gateway, err)
	}
}

func TestALocalNetworkNeedsNoSwarm(t *testing.T) {
	h := newHost(t, true)
	const id model.NetworkID = "10ca1000000000000000000000000000000000000000000000000000000000ff"
	request := driver.CreateRequest{Network: id, Subnets: []driver.Subnet{subnet("172.30.0.0/24", "172.30.0.1/24")}}
	if err := h.CreateNetwork(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	n, _ := h.hub.Network(id)
	if !n.Local || n.MTU != 1500 || n.VNI != 0 || len(h.ring.Keys()) > 0 {
		t.Errorf("network %+v, %d keys", n, len(h.ring.Keys()))
	}
	if h.pools.bound[id] != prefix("172.30.0.0/24") {
		t.Errorf("bound: %v", h.pools.bound)
	}
	if err := h.DeleteNetwork(t.Context(), id); err != nil || len(h.pools.bound) > 0 {
		t.Errorf("bound after delete: %v, %v", h.pools.bound, err)
	}
	h.loop.failed[kernel.Netns{Name: overlay.NetnsName(n)}] = kernel.ErrUnsupported
	if err := h.CreateNetwork(t.Context(), request); !errors.Is(err, kernel.ErrUnsupported) || len(h.pools.bound) > 0 {
		t.Errorf("after a failure: %v, bound %v", err, h.pools.bound)
	}
}

func TestAKernelThatRefusesANetworkLeavesNoIntent(t *testing.T) {
	n := model.Network{ID: web}
	ns := overlay.NetnsName(n)
	for _, k := range []kernel.Key{
		kernel.Netns{Name: ns},
		kernel.Link{NS: ns, Name: overlay.BridgeName, Kind: kernel.Bridge},
		kernel.Link{NS: ns, Name: overlay.VXLANName, Kind: kernel.VXLAN},
		kernel.BridgeTable{NS: ns},
		kernel.MarkTable{NS: ns},
		kernel.LiftTable{NS: ns},
		kernel.GuardTable{NS: ns},
	} {
		t.Run(k.String(), func(t *testing.T) {
			h := newHost(t, false)
			h.loop.failed[k] = kernel.ErrTaken
			triggers := h.loop.triggers
			err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: plain})
			if !errors.Is(err, kernel.ErrTaken) {
				t.Errorf("got %v", err)
			}
			complains(t, err, "create network webnetwork00")
			if len(h.hub.View().Networks) > 0 || h.loop.triggers == triggers {
				t.Error("what was half made stays")
			}
		})
	}
}

func TestATableThatIsMissingFailsAJoin(t *testing.T) {
	ns := overlay.NetnsName(model.Network{ID: web})
	for _, k := range []kernel.Key{
		kernel.BridgeTable{NS: ns}, kernel.MarkTable{NS: ns}, kernel.LiftTable{NS: ns}, kernel.GuardTable{NS: ns},
		kernel.GuardPort{NS: ns, Dev: "slvaaaaaaaaaaaa"}, kernel.GuardAddr{NS: ns, Dev: "slvaaaaaaaaaaaa", IP: netip.MustParseAddr("10.255.0.2")},
	} {
		t.Run(k.String(), func(t *testing.T) {
			h := newHost(t, false)
			if err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: plain}); err != nil {
				t.Fatal(err)
			}
			if _, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20")}); err != nil {
				t.Fatal(err)
			}
			h.loop.failed[k] = kernel.ErrTaken
			_, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd})
			if !errors.Is(err, kernel.ErrTaken) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTheTroublesOfOthersAreNotOurs(t *testing.T) {
	ns := overlay.NetnsName(model.Network{ID: web})
	h := newHost(t, false)
	h.loop.failed[kernel.Netns{Name: "sluice-another"}] = kernel.ErrTaken
	h.loop.failed[kernel.Link{NS: overlay.NetnsName(model.Network{ID: web}), Name: "slvbbbbbbbbbbbb", Kind: kernel.Veth}] = kernel.ErrTaken
	h.loop.failed[kernel.FilterPeer{}] = kernel.ErrTaken
	h.loop.failed[kernel.MarkTable{NS: "sluice-another"}] = kernel.ErrTaken
	h.loop.failed[kernel.LiftTable{NS: "sluice-another"}] = kernel.ErrTaken
	h.loop.failed[kernel.GuardTable{NS: "sluice-another"}] = kernel.ErrTaken
	h.loop.failed[kernel.GuardPort{NS: ns, Dev: "slvbbbbbbbbbbbb"}] = kernel.ErrTaken
	h.loop.failed[kernel.GuardAddr{NS: ns, Dev: "slvbbbbbbbbbbbb"}] = kernel.ErrTaken
	if err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: plain}); err != nil {
		t.Error(err)
	}
	if _, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20")}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd}); err != nil {
		t.Error(err)
	}
	h.loop.failed[kernel.Link{NS: overlay.NetnsName(model.Network{ID: web}), Name: "slvaaaaaaaaaaaa", Kind: kernel.Veth}] = kernel.ErrTaken
	_, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd})
	complains(t, err, "join endpoint aaaaaaaaaaaa", "is taken")
}

func TestADeadlineEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := created(t)
		h.loop.stuck = true
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := h.CreateNetwork(ctx, driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: plain})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("CreateNetwork: %v", err)
		}
		if len(h.hub.View().Networks) > 0 {
			t.Error("the intent outlives its call, although the engine forgets the network")
		}

		h = joined(t)
		h.loop.stuck = true
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := h.Join(ctx, driver.JoinRequest{Network: web, Endpoint: webEnd}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Join: %v", err)
		}
	})
}

// TestCreatingAKnownNetworkStartsOver: an engine that was killed asks for the
// network again, and its endpoints are of a former life.
func TestCreatingAKnownNetworkStartsOver(t *testing.T) {
	h := joined(t)
	if err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: h.allocated(t, nil), Subnets: plain}); err != nil {
		t.Fatal(err)
	}
	if v := h.hub.View(); len(v.Networks) != 1 || len(v.Endpoints) != 0 {
		t.Errorf("networks %v, endpoints %v", v.Networks, v.Endpoints)
	}
}

// TestAKnownNetworkThatCannotBeRecordedStays, with its endpoints: on a full disk the
// former life is all that there is.
func TestAKnownNetworkThatCannotBeRecordedStays(t *testing.T) {
	h := joined(t)
	opts := h.allocated(t, nil)
	before, recorded := h.hub.View(), h.journal.list()
	h.journal.fail = errDisk
	err := h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Options: opts, Subnets: plain})
	if !errors.Is(err, errDisk) {
		t.Fatal(err)
	}
	after := h.hub.View()
	if !maps.Equal(before.Networks, after.Networks) || !maps.Equal(before.Endpoints, after.Endpoints) {
		t.Errorf("networks %v, endpoints %v", after.Networks, after.Endpoints)
	}
	h.journal.fail = nil
	if err := h.Leave(t.Context(), web, webEnd); err != nil { // writes whatever was left to be written
		t.Fatal(err)
	}
	if now := h.journal.list(); len(now) != len(recorded) {
		t.Errorf("on disk are %d records, before %d", len(now), len(recorded))
	}
}

// TestARefusedNetworkLeavesTheFormerOne: nothing is taken away for what is not made.
func TestARefusedNetworkLeavesTheFormerOne(t *testing.T) {
	h := newHost(t, true)
	create := func(pool, gateway string) error {
		return h.CreateNetwork(t.Context(), driver.CreateRequest{Network: web, Subnets: []driver.Subnet{subnet(pool, gateway)}})
	}
	if err := create("10.255.0.0/20", "10.255.0.1/20"); err != nil {
		t.Fatal(err)
	}
	h.pools.fail = errors.New("it has another subnet")
	complains(t, create("10.60.0.0/24", "10.60.0.1/24"), "another subnet")
	if n, there := h.hub.Network(web); !there || n.Subnet != prefix("10.255.0.0/20") {
		t.Errorf("now it is %+v", n)
	}
}

func TestCreateEndpointRefuses(t *testing.T) {
	const other model.EndpointID = "bbbbbbbbbbbb2222222222222222222222222222222222222222222222222222"
	for _, c := range []struct {
		name    string
		request driver.EndpointRequest
		words   []string
	}{
		{"a network that is not here", driver.EndpointRequest{Network: "unknown", Endpoint: other, Addr: prefix("10.255.0.3/20")}, []string{"network unknown is not known", "restart docker"}},
		{"an address elsewhere", driver.EndpointRequest{Network: web, Endpoint: other, Addr: prefix("10.1.0.3/20")}, []string{"10.1.0.3", "10.255.0.0/20"}},
		{"an IPv6 address", driver.EndpointRequest{Network: web, Endpoint: other, Addr: prefix("fd00::3/64")}, []string{"fd00::3", "10.255.0.0/20"}},
		{"no address", driver.EndpointRequest{Network: web, Endpoint: other}, []string{"is not in the subnet"}},
		{"a bad option", driver.EndpointRequest{Network: web, Endpoint: other, Addr: prefix("10.255.0.3/20"), Options: map[string]string{"sluice.weight": "0"}}, []string{"sluice.weight", "1 to 255"}},
		{"a network's option", driver.EndpointRequest{Network: web, Endpoint: other, Addr: prefix("10.255.0.3/20"), Options: map[string]string{"sluice.vni": "5"}}, []string{"sluice.vni", "of a network"}},
		{"an endpoint with another address", driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.3/20")}, []string{"exists already", "10.255.0.2"}},
		{"an endpoint with another MAC", driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20"), MAC: model.MAC{2, 1}}, []string{"exists already"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := joined(t)
			before := h.hub.View().Revision
			_, err := h.CreateEndpoint(t.Context(), c.request)
			complains(t, err, append(c.words, "create endpoint "+c.request.Endpoint.Short())...)
			if h.hub.View().Revision != before {
				t.Error("something was recorded all the same")
			}
		})
	}
}

func TestCreatingAnEndpointTwiceIsCreatingItOnce(t *testing.T) {
	h := joined(t)
	before := h.hub.View()
	reply, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20")})
	if err != nil || reply.MAC.IsZero() || h.hub.View().Revision != before.Revision {
		t.Errorf("reply %v, %v", reply, err)
	}
	if e, _ := h.hub.Endpoint(webEnd); e.Phase != model.Joined {
		t.Errorf("it is %s again", e.Phase)
	}
}

// TestAMACOfTheUsersIsNotAnswered: the engine fails the container if it is.
func TestAMACOfTheUsersIsNotAnswered(t *testing.T) {
	h := created(t)
	mac := model.MAC{2, 0, 0, 0, 0, 9}
	reply, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: webEnd, Addr: prefix("10.255.0.2/20"), MAC: mac})
	if e, _ := h.hub.Endpoint(webEnd); err != nil || reply != (driver.EndpointReply{}) || e.MAC != mac {
		t.Errorf("reply %v, %v; endpoint %v", reply, err, e)
	}
}

func TestJoinRefuses(t *testing.T) {
	h := joined(t)
	_, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: "unknown"})
	complains(t, err, "join endpoint unknown", "create it first")
	_, err = h.Join(t.Context(), driver.JoinRequest{Network: "unknown", Endpoint: webEnd})
	complains(t, err, "is not known on network unknown")
}

func TestSandboxPaths(t *testing.T) {
	for in, want := range map[string]string{
		"/var/run/docker/netns/1":       "/host/run/docker/netns/1",
		"/run/docker/netns/1":           "/host/run/docker/netns/1",
		"/run/../run/docker//netns/1":   "/host/run/docker/netns/1",
		"/var/lib/elsewhere/netns/1":    "/var/lib/elsewhere/netns/1",
		"/variable/run/docker/netns/1":  "/variable/run/docker/netns/1",
		"/run/../../etc/docker/netns/1": "/run/../../etc/docker/netns/1",
		"":                              "",
	} {
		h := joined(t)
		if _, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd, Sandbox: in}); err != nil {
			t.Fatal(err)
		}
		if e, _ := h.hub.Endpoint(webEnd); e.Sandbox != want {
			t.Errorf("%q became %q, want %q", in, e.Sandbox, want)
		}
	}
}

// TestAFailingJournalFailsTheCall that would make something; what ends is taken
// note of all the same.
func TestAFailingJournalFailsTheCall(t *testing.T) {
	h := joined(t)
	opts := h.allocated(t, nil)
	h.journal.fail = errDisk
	for name, err := range map[string]error{
		"CreateNetwork": h.CreateNetwork(t.Context(), driver.CreateRequest{Network: "another", Options: opts, Subnets: plain}),
		"CreateEndpoint": func() error {
			_, err := h.CreateEndpoint(t.Context(), driver.EndpointRequest{Network: web, Endpoint: "another", Addr: prefix("10.255.0.3/20")})
			return err
		}(),
		"Join": func() error {
			_, err := h.Join(t.Context(), driver.JoinRequest{Network: web, Endpoint: webEnd})
			return err
		}(),
		"Free": h.Free(t.Context(), web), // a store takes removals; this journal does not
	} {
		if !errors.Is(err, errDisk) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v := h.hub.View(); len(v.Networks) != 1 || len(v.Endpoints) != 1 || v.Endpoints[webEnd].Left {
		t.Errorf("networks %v, endpoints %v", v.Networks, v.Endpoints)
	}
	for name, err := range map[string]error{
		"Discovered":     h.Discovered(t.Context(), driver.Node{Address: "192.168.0.9", Self: true}),
		"Leave":          h.Leave(t.Context(), web, webEnd),
		"DeleteEndpoint": h.DeleteEndpoint(t.Context(), web, webEnd),
		"DeleteNetwork":  h.DeleteNetwork(t.Context(), web),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if v := h.hub.View(); len(v.Networks) != 0 || len(v.Endpoints) != 0 {
		t.Errorf("networks %v, endpoints %v", v.Networks, v.Endpoints)
	}
}

func TestDiscovery(t *testing.T) {
	h := newHost(t, false)
	for _, n := range []driver.Node{
		{Address: "192.168.0.7"},
		{Address: "192.168.0.8", Gone: true},
		{Address: "not even an address", Gone: true},
		{Address: "192.168.0.1", Self: true},
	} {
		if err := h.Discovered(t.Context(), n); err != nil {
			t.Errorf("%+v: %v", n, err)
		}
	}
	if len(h.hints) != 1 || h.hints[0] != netip.MustParseAddr("192.168.0.7") {
		t.Errorf("hints: %v", h.hints)
	}
	if got := h.hub.Self().VTEP; got != netip.MustParseAddr("192.168.0.1") {
		t.Errorf("data-path address %s", got)
	}
	complains(t, h.Discovered(t.Context(), driver.Node{Address: "nonsense"}), "nonsense")
	for _, self := range []bool{true, false} {
		complains(t, h.Discovered(t.Context(), driver.Node{Address: "fd00::1", Self: self}), "fd00::1", "IPv4", "--data-path-addr")
	}
	if err := h.Discovered(t.Context(), driver.Node{Address: "::ffff:192.168.0.1", Self: true}); err != nil || h.hub.Self().VTEP != netip.MustParseAddr("192.168.0.1") {
		t.Errorf("an IPv4 address in IPv6 form: %s, %v", h.hub.Self().VTEP, err)
	}

	local := newHost(t, true)
	if got := local.hub.Self().VTEP; got.IsValid() {
		t.Errorf("a process for local networks has data-path address %s", got)
	}
}

// TestLeadersLossIsBroughtBack: VNIs and pools of the swarm's networks, by what the
// managers list; of another driver's addresses the subnet alone.
func TestLeadersLossIsBroughtBack(t *testing.T) {
	opts := newHost(t, false).allocated(t, map[string]string{"sluice.vni": "4711"})
	live := []netip.Addr{netip.MustParseAddr("10.255.0.2")}
	snapshot := model.EngineSnapshot{
		Alias: "sluice:latest",
		Networks: map[model.NetworkID]model.EngineNetwork{
			web:       {ID: web, Swarm: true, Options: opts, Subnet: prefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1"), Range: prefix("10.255.1.0/24"), IPAM: "sluice:latest"},
			"foreign": {ID: "foreign", Swarm: true, Subnet: prefix("10.9.0.0/24"), Gateway: netip.MustParseAddr("10.9.0.1"), IPAM: "default"},
			"local":   {ID: "local", Subnet: prefix("172.30.0.0/24"), IPAM: "sluice:latest"},
			"waits":   {ID: "waits", Swarm: true, IPAM: "sluice:latest"},
			"refused": {ID: "refused", Swarm: true, Subnet: prefix("10.8.0.0/24"), Options: map[string]string{options.Refused: "no"}},
		},
		Live: map[model.NetworkID][]netip.Addr{web: live, "foreign": live},
	}
	h := newHost(t, false)
	if err := h.Recover(t.Context(), snapshot); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(h.pools.lost, func(a, b pool.Lost) int { return a.Subnet.Addr().Compare(b.Subnet.Addr()) })
	want := []pool.Lost{
		{Network: "foreign", Subnet: prefix("10.9.0.0/24")},
		{Network: web, Subnet: prefix("10.255.0.0/20"), Sub: prefix("10.255.1.0/24"), Gateway: netip.MustParseAddr("10.255.0.1"), Live: live},
	}
	if !reflect.DeepEqual(h.pools.lost, want) {
		t.Errorf("brought back %+v", h.pools.lost)
	}
	if _, err := h.book.VNI(t.Context(), "another", 4711); err == nil {
		t.Error("another network gets its VNI")
	}
	h.pools.fail = errDisk
	complains(t, h.Recover(t.Context(), snapshot), "bring back network", errDisk.Error())
}

func TestAdoptTakesOverWhatRuns(t *testing.T) {
	opts := newHost(t, false).allocated(t, nil)
	snapshot := model.EngineSnapshot{
		ContainersValid: true, NetworksValid: true,
		Networks: map[model.NetworkID]model.EngineNetwork{
			web:     {ID: web, Name: "web", Swarm: true, Options: opts, Subnet: prefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1")},
			"local": {ID: "local", Name: "local", Subnet: prefix("172.30.0.0/24")},
			"bare":  {ID: "bare", Name: "bare", Swarm: true, Options: opts},
		},
		Containers: map[model.EndpointID]model.EngineEndpoint{
			webEnd:      {Network: web, Addr: netip.MustParseAddr("10.255.0.2"), Sandbox: "/var/run/docker/netns/1", Task: model.Task{ID: "t"}},
			"elsewhere": {Network: "local", Addr: netip.MustParseAddr("172.30.0.2")},
			"no-addr":   {Network: web},
			"unlisted":  {Network: "unlisted", Addr: netip.MustParseAddr("10.255.0.9")},
		},
	}
	h := newHost(t, false)
	if err := h.Adopt(t.Context(), snapshot); err != nil {
		t.Fatal(err)
	}
	want := model.Endpoint{
		ID: webEnd, Network: web, Addr: netip.MustParseAddr("10.255.0.2"), MAC: model.MACFor(netip.MustParseAddr("10.255.0.2")),
		Phase: model.Taken, Sandbox: "/host/run/docker/netns/1", Task: model.Task{ID: "t"},
	}
	if v := h.hub.View(); len(v.Endpoints) != 1 || v.Endpoints[webEnd] != want || len(v.Networks) != 1 || v.Networks[web].VNI == 0 {
		t.Errorf("networks %+v, endpoints %+v", v.Networks, v.Endpoints)
	}
	before := h.hub.View().Revision
	if err := h.Adopt(t.Context(), snapshot); err != nil || h.hub.View().Revision != before {
		t.Errorf("what is known is taken over again: %v", err)
	}
	snapshot.Containers["bare"] = model.EngineEndpoint{Network: "bare", Name: "box", Addr: netip.MustParseAddr("10.255.0.9")}
	complains(t, h.Adopt(t.Context(), snapshot), "container box", "does not tell the subnet")
}

// TestAdoptIsNotStoppedBy takes over what is beside something that cannot be.
func TestAdoptIsNotStoppedBy(t *testing.T) {
	opts := newHost(t, false).allocated(t, nil)
	with := func(k, v string) map[string]string {
		out := maps.Clone(opts)
		out[k] = v
		return out
	}
	for _, c := range []struct {
		name    string
		network model.EngineNetwork // with one container, beside web
		address string              // of the container
		words   []string            // of the error; nil: none
		taken   bool
	}{
		{"a refused network", model.EngineNetwork{Swarm: true, Subnet: prefix("10.254.0.0/20"), Options: with(options.Refused, "for a reason")}, "10.254.0.2", []string{"container box", "for a reason"}, false},
		{"a network without a key", model.EngineNetwork{Swarm: true, Subnet: prefix("10.254.0.0/20")}, "10.254.0.2", []string{"container box", "no swarm network"}, false},
		{"a container without an address", model.EngineNetwork{Swarm: true, Subnet: prefix("10.254.0.0/20"), Options: opts}, "", nil, false},
		{"a network of this engine only", model.EngineNetwork{Subnet: prefix("10.254.0.0/20")}, "10.254.0.2", nil, false},
		// Its containers run: to refuse it now would cut them off.
		{"an MTU that would be refused if it were new", model.EngineNetwork{Swarm: true, Subnet: prefix("10.254.0.0/20"), Options: with(options.MTU, "9000")}, "10.254.0.2", nil, true},
		{"a network without a gateway", model.EngineNetwork{Swarm: true, Subnet: prefix("10.254.0.0/20"), Options: opts}, "10.254.0.2", nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, false)
			addr, _ := netip.ParseAddr(c.address)
			err := h.Adopt(t.Context(), model.EngineSnapshot{
				Networks: map[model.NetworkID]model.EngineNetwork{
					web:     {ID: web, Swarm: true, Options: opts, Subnet: prefix("10.255.0.0/20"), Gateway: netip.MustParseAddr("10.255.0.1")},
					"other": c.network,
				},
				Containers: map[model.EndpointID]model.EngineEndpoint{
					webEnd:  {Network: web, Addr: netip.MustParseAddr("10.255.0.2")},
					"other": {Network: "other", Name: "box", Addr: addr},
				},
			})
			if c.words != nil {
				complains(t, err, c.words...)
			} else if err != nil {
				t.Error(err)
			}
			v := h.hub.View()
			if _, taken := v.Endpoints["other"]; taken != c.taken {
				t.Errorf("taken over: %t", taken)
			}
			if v.Endpoints[webEnd].Phase != model.Taken {
				t.Error("the one beside it is not")
			}
		})
	}
}

// TestAdoptDoesNotWaitForTheDisk: a node whose state was lost and whose disk is full
// is rebuilt in memory.
func TestAdoptDoesNotWaitForTheDisk(t *testing.T) {
	opts := newHost(t, false).allocated(t, nil)
	h := newHost(t, false)
	h.journal.fail = errDisk
	err := h.Adopt(t.Context(), model.EngineSnapshot{
		Networks:   map[model.NetworkID]model.EngineNetwork{web: {ID: web, Swarm: true, Options: opts, Subnet: prefix("10.255.0.0/20")}},
		Containers: map[model.EndpointID]model.EngineEndpoint{webEnd: {Network: web, Name: "box", Addr: netip.MustParseAddr("10.255.0.2")}},
	})
	if v := h.hub.View(); err != nil || len(v.Networks) != 1 || v.Endpoints[webEnd].Phase != model.Taken || len(h.ring.Keys()) != 1 {
		t.Errorf("%v; networks %v, endpoints %v, %d keys", err, v.Networks, v.Endpoints, len(h.ring.Keys()))
	}
}
