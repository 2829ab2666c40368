package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"sluice/driver"
	"sluice/internal/model"
	"sluice/ipam"
)

// The ids of the recorded requests: a swarm network's and an endpoint's.
const (
	swarmNet = "f9sxq2x1v0m3c7k5r8t4w6y2z"
	ep       = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0"
)

// recorded are requests as engines 20.10, 26.1 and 28.5 send them in a swarm,
// with the verb they must reach, the typed request and the answer.
var recorded = []struct {
	name, method, body string
	verb               string // of the fakes; empty: none is called
	want               any
	reply              string
}{
	{name: "leader: pool", method: "IpamDriver.RequestPool",
		body: `{"AddressSpace":"sluice-global","Pool":"","SubPool":"","Options":{"ik":"iv"},"V6":false}`,
		verb: "RequestPool", want: ipam.PoolRequest{Space: "sluice-global", Options: map[string]string{"ik": "iv"}},
		reply: `{"PoolID":"sluice-global/10.255.0.0/20","Pool":"10.255.0.0/20","Data":null}`},
	{name: "leader: gateway", method: "IpamDriver.RequestAddress",
		body: `{"PoolID":"p","Address":"","Options":{"RequestAddressType":"com.docker.network.gateway","com.docker.network.ipam.serial":"true"}}`,
		verb: "RequestAddress", want: ipam.AddressRequest{PoolID: "p", Options: map[string]string{"RequestAddressType": "com.docker.network.gateway", "com.docker.network.ipam.serial": "true"}},
		reply: `{"Address":"10.255.0.5/20","Data":null}`},
	{name: "node: address", method: "IpamDriver.RequestAddress",
		body: `{"PoolID":"p","Address":"10.255.0.5","Options":null}`,
		verb: "RequestAddress", want: ipam.AddressRequest{PoolID: "p", Address: "10.255.0.5"},
		reply: `{"Address":"10.255.0.5/20","Data":null}`},
	{name: "release an address", method: "IpamDriver.ReleaseAddress", body: `{"PoolID":"p","Address":"10.255.0.5"}`,
		verb: "ReleaseAddress", want: ipam.ReleaseAddressRequest{PoolID: "p", Address: "10.255.0.5"}, reply: `{}`},
	{name: "release a pool", method: "IpamDriver.ReleasePool", body: `{"PoolID":"p"}`,
		verb: "ReleasePool", want: ipam.ReleasePoolRequest{PoolID: "p"}, reply: `{}`},
	{name: "allocate", method: "NetworkDriver.AllocateNetwork",
		body: `{"NetworkID":"` + swarmNet + `","Options":{"k":"v"},"IPv4Data":[{"AddressSpace":"","Gateway":"10.200.0.1/24","Pool":"10.200.0.0/24"}],"IPv6Data":null}`,
		verb: "Allocate", want: driver.AllocateRequest{Network: swarmNet, Options: map[string]string{"k": "v"},
			Subnets: []driver.Subnet{{Pool: netip.MustParsePrefix("10.200.0.0/24"), Gateway: netip.MustParsePrefix("10.200.0.1/24")}}},
		reply: `{"Options":{"sluice.secret-key":"hush","sluice.vni":"5"}}`},
	{name: "allocate with an IPv6 subnet among the IPv4 ones", method: "NetworkDriver.AllocateNetwork",
		body: `{"NetworkID":"` + swarmNet + `","Options":null,"IPv4Data":[{"AddressSpace":"","Gateway":"fd00:88::1/64","Pool":"fd00:88::/64"}],"IPv6Data":null}`,
		verb: "Allocate", want: driver.AllocateRequest{Network: swarmNet,
			Subnets: []driver.Subnet{{Pool: netip.MustParsePrefix("fd00:88::/64"), Gateway: netip.MustParsePrefix("fd00:88::1/64")}}},
		reply: `{"Options":{"sluice.secret-key":"hush","sluice.vni":"5"}}`},
	{name: "free", method: "NetworkDriver.FreeNetwork", body: `{"NetworkID":"` + swarmNet + `"}`,
		verb: "Free", want: model.NetworkID(swarmNet), reply: `{}`},
	{name: "create, 20.10", method: "NetworkDriver.CreateNetwork",
		body: `{"NetworkID":"` + swarmNet + `","Options":{"com.docker.network.enable_ipv6":false,"com.docker.network.generic":{"sluice.vni":"5"}},"IPv4Data":[{"AddressSpace":"sluice-local","Gateway":"10.200.0.1/24","Pool":"10.200.0.0/24"}],"IPv6Data":[]}`,
		verb: "CreateNetwork", want: driver.CreateRequest{Network: swarmNet, Options: map[string]string{"sluice.vni": "5"},
			Subnets: []driver.Subnet{{Pool: netip.MustParsePrefix("10.200.0.0/24"), Gateway: netip.MustParsePrefix("10.200.0.1/24")}}},
		reply: `{}`},
	{name: "create, 28.5, internal with IPv6", method: "NetworkDriver.CreateNetwork",
		body: `{"NetworkID":"` + swarmNet + `","Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.enable_ipv6":true,"com.docker.network.internal":true,"com.docker.network.generic":{"sluice.mtu":1400,"x":true,"y":null}},"IPv4Data":[{"AddressSpace":"LocalDefault","AuxAddresses":{"a":"10.200.0.9/24"},"Pool":"10.200.0.0/24"}],"IPv6Data":[{"Pool":"fd00::/64"}]}`,
		verb: "CreateNetwork", want: driver.CreateRequest{Network: swarmNet, Options: map[string]string{"sluice.mtu": "1400", "x": "true"}, Internal: true, IPv6: true,
			Subnets:  []driver.Subnet{{Pool: netip.MustParsePrefix("10.200.0.0/24")}},
			Subnets6: []driver.Subnet{{Pool: netip.MustParsePrefix("fd00::/64")}}},
		reply: `{}`},
	{name: "delete", method: "NetworkDriver.DeleteNetwork", body: `{"NetworkID":"` + swarmNet + `"}`,
		verb: "DeleteNetwork", want: model.NetworkID(swarmNet), reply: `{}`},
	{name: "endpoint", method: "NetworkDriver.CreateEndpoint",
		body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `","Interface":{"Address":"10.200.0.2/24","AddressIPv6":"","MacAddress":""},"Options":{"com.docker.network.endpoint.exposedports":[{"Proto":6,"Port":80}],"com.docker.network.portmap":[{"Proto":6,"IP":"","Port":80,"HostIP":"","HostPort":9999,"HostPortEnd":9999}],"sluice.weight":"3"}}`,
		verb: "CreateEndpoint", want: driver.EndpointRequest{Network: swarmNet, Endpoint: ep, Addr: netip.MustParsePrefix("10.200.0.2/24"), Options: map[string]string{"sluice.weight": "3"}},
		reply: `{"Interface":{"Address":"","AddressIPv6":"","MacAddress":"02:42:0a:c8:00:02"}}`},
	{name: "endpoint with the user's MAC, which must not come back", method: "NetworkDriver.CreateEndpoint",
		body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `","Interface":{"Address":"10.200.0.2/24","AddressIPv6":"","MacAddress":"02:11:22:33:44:55"},"Options":{"com.docker.network.endpoint.macaddress":"AhEiM0RV"}}`,
		verb: "CreateEndpoint", want: driver.EndpointRequest{Network: swarmNet, Endpoint: ep, Addr: netip.MustParsePrefix("10.200.0.2/24"), MAC: model.MAC{2, 0x11, 0x22, 0x33, 0x44, 0x55},
			Options: map[string]string{"com.docker.network.endpoint.macaddress": "AhEiM0RV"}},
		reply: `{"Interface":{"Address":"","AddressIPv6":"","MacAddress":""}}`},
	{name: "join", method: "NetworkDriver.Join",
		body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `","SandboxKey":"/run/docker/netns/fa2eb53e4edc","Options":{"com.docker.network.endpoint.exposedports":[],"com.docker.network.portmap":[],"com.docker.network.generic":{"ChildEndpoints":null,"ParentEndpoints":null}}}`,
		verb: "Join", want: driver.JoinRequest{Network: swarmNet, Endpoint: ep, Sandbox: "/run/docker/netns/fa2eb53e4edc", Options: map[string]string{}},
		reply: `{"InterfaceName":{"SrcName":"vx-1","DstPrefix":"eth"},"Gateway":"","GatewayIPv6":"","StaticRoutes":null,"DisableGatewayService":false}`},
	{name: "external connectivity", method: "NetworkDriver.ProgramExternalConnectivity",
		body:  `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `","Options":{"com.docker.network.portmap":[],"com.docker.network.driver.private.no_proxy_6to4":false}}`,
		reply: `{}`},
	{name: "no more external connectivity", method: "NetworkDriver.RevokeExternalConnectivity",
		body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `"}`, reply: `{}`},
	{name: "operational info", method: "NetworkDriver.EndpointOperInfo",
		body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `"}`, reply: `{"Value":{}}`},
	{name: "gateway check, 28.5", method: "NetworkDriver.GwAllocCheck",
		body: `{"Options":{"com.docker.network.enable_ipv4":true,"com.docker.network.generic":{}}}`, reply: `{"SkipIPv4":false,"SkipIPv6":false}`},
	{name: "leave", method: "NetworkDriver.Leave", body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `"}`,
		verb: "Leave", want: pair{swarmNet, ep}, reply: `{}`},
	{name: "endpoint gone", method: "NetworkDriver.DeleteEndpoint", body: `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `"}`,
		verb: "DeleteEndpoint", want: pair{swarmNet, ep}, reply: `{}`},
	{name: "this node", method: "NetworkDriver.DiscoverNew",
		body: `{"DiscoveryType":1,"DiscoveryData":{"Address":"10.77.0.11","BindAddress":"10.77.0.11","Self":true}}`,
		verb: "Discovered", want: driver.Node{Address: "10.77.0.11", BindAddress: "10.77.0.11", Self: true}, reply: `{}`},
	{name: "another node is gone", method: "NetworkDriver.DiscoverDelete",
		body: `{"DiscoveryType":1,"DiscoveryData":{"Address":"10.77.0.12","BindAddress":"","Self":false}}`,
		verb: "Discovered", want: driver.Node{Address: "10.77.0.12", Gone: true}, reply: `{}`},
	{name: "news about something else", method: "NetworkDriver.DiscoverNew",
		body: `{"DiscoveryType":2,"DiscoveryData":[1,2]}`, reply: `{}`},
}

func TestRecordedRequestsReachTheirVerb(t *testing.T) {
	for _, c := range recorded {
		t.Run(c.name, func(t *testing.T) {
			s, d, i := attached(t)
			code, reply := post(s, c.method, c.body)
			if code != http.StatusOK || reply != c.reply {
				t.Errorf("%d %s, want 200 %s", code, reply, c.reply)
			}
			got := maps.Clone(d.got)
			if got == nil {
				got = map[string]any{}
			}
			maps.Copy(got, i.got)
			want := map[string]any{}
			if c.verb != "" {
				want[c.verb] = c.want
			}
			if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestCapabilitiesAreConstant(t *testing.T) {
	const spaces = `{"LocalDefaultAddressSpace":"sluice-local","GlobalDefaultAddressSpace":"sluice-global"}`
	for _, scope := range []string{scopeGlobal, scopeLocal} {
		s := newSocket(scope, slog.New(slog.DiscardHandler)) // nothing attached: they may not wait
		for method, want := range map[string]string{
			"Plugin.Activate":                    `{"Implements":["NetworkDriver","IpamDriver"]}`,
			"NetworkDriver.GetCapabilities":      `{"Scope":"` + scope + `","ConnectivityScope":"` + scope + `"}`,
			"IpamDriver.GetCapabilities":         `{"RequiresMACAddress":false,"RequiresRequestReplay":false}`,
			"IpamDriver.GetDefaultAddressSpaces": spaces,
		} {
			if code, reply := post(s, method, ""); code != http.StatusOK || reply != want {
				t.Errorf("%s: %d %s, want %s", method, code, reply, want)
			}
		}
	}
}

// hasBody are the methods whose request has a body.
func hasBody(s *socket) []string {
	var out []string
	for _, m := range slices.Sorted(maps.Keys(s.stats)) {
		if m != "Plugin.Activate" && !strings.HasSuffix(m, ".GetCapabilities") && !strings.HasSuffix(m, ".GetDefaultAddressSpaces") {
			out = append(out, m)
		}
	}
	return out
}

// errText is the text that the engine would show.
func errText(t *testing.T, reply string) string {
	t.Helper()
	var e errorBody
	if err := json.Unmarshal([]byte(reply), &e); err != nil || e.Err == "" {
		t.Fatalf("reply %q has no Err", reply)
	}
	return e.Err
}

func TestARepeatedCallWithoutBodyIsRefusedAndDoesNothing(t *testing.T) {
	for _, body := range []string{"", " \n", "null"} {
		s, d, i := attached(t)
		for _, m := range hasBody(s) {
			code, reply := post(s, m, body)
			if code != http.StatusBadRequest || !strings.Contains(errText(t, reply), "the request is empty") {
				t.Errorf("%s with body %q: %d %s", m, body, code, reply)
			}
		}
		if d.calls()+i.calls() != 0 {
			t.Errorf("body %q reached %v %v", body, d.got, i.got)
		}
	}
}

func TestBadRequestsAreRefusedWithAReason(t *testing.T) {
	endpoint := func(rest string) string {
		return `{"NetworkID":"` + swarmNet + `","EndpointID":"` + ep + `",` + rest + `}`
	}
	for _, c := range []struct{ name, method, body, want string }{
		{"not JSON", "NetworkDriver.Join", `{"NetworkID":`, "not understood"},
		{"two requests", "NetworkDriver.Join", `{} {}`, "more behind its end"},
		{"no network", "NetworkDriver.Leave", `{}`, "names no network"},
		{"no endpoint", "NetworkDriver.Leave", `{"NetworkID":"n1"}`, "names no endpoint"},
		{"an id that is a path", "NetworkDriver.DeleteNetwork", `{"NetworkID":"../../etc"}`, "letters and digits"},
		{"an id without end", "NetworkDriver.DeleteNetwork", `{"NetworkID":"` + strings.Repeat("a", 129) + `"}`, "letters and digits"},
		{"too large", "NetworkDriver.DeleteNetwork", `{"NetworkID":"` + strings.Repeat("a", maxBody) + `"}`, "too large"},
		{"pool", "NetworkDriver.AllocateNetwork", `{"NetworkID":"n","IPv4Data":[{"Pool":"10.0.0.0"}]}`, `pool "10.0.0.0" is no CIDR`},
		{"gateway", "NetworkDriver.AllocateNetwork", `{"NetworkID":"n","IPv4Data":[{"Pool":"10.0.0.0/8","Gateway":"x"}]}`, `gateway "x"`},
		{"null subnet", "NetworkDriver.CreateNetwork", `{"NetworkID":"n","IPv4Data":[null]}`, "null"},
		{"deep options", "NetworkDriver.CreateNetwork", `{"NetworkID":"n","Options":{"com.docker.network.generic":{"a":{"b":"c"}}}}`, "option a is a list or an object"},
		{"options of another kind", "NetworkDriver.CreateNetwork", `{"NetworkID":"n","Options":{"com.docker.network.generic":[1]}}`, "is no object"},
		{"several at once", "NetworkDriver.CreateNetwork", `{"NetworkID":"n","Options":{"com.docker.network.generic":[1],"com.docker.network.internal":"maybe"}}`, "neither true nor false"},
		{"no interface", "NetworkDriver.CreateEndpoint", endpoint(`"Options":{}`), "no IPv4 address"},
		{"IPv6", "NetworkDriver.CreateEndpoint", endpoint(`"Interface":{"Address":"10.0.0.2/24","AddressIPv6":"fd00::2/64"}`), "IPv4 only"},
		{"IPv6 as IPv4", "NetworkDriver.CreateEndpoint", endpoint(`"Interface":{"Address":"fd00::2/64"}`), "not an IPv4 address"},
		{"MAC", "NetworkDriver.CreateEndpoint", endpoint(`"Interface":{"Address":"10.0.0.2/24","MacAddress":"02:42"}`), "MAC address"},
		{"option of ours that is a list", "NetworkDriver.CreateEndpoint", endpoint(`"Interface":{"Address":"10.0.0.2/24"},"Options":{"Sluice.Weight":[3]}`), "write it as text"},
		{"discovery", "NetworkDriver.DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":"x"}`, "no object"},
		{"discovery address", "NetworkDriver.DiscoverNew", `{"DiscoveryType":1,"DiscoveryData":{"Address":7}}`, "no text"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, d, _ := attached(t)
			code, reply := post(s, c.method, c.body)
			if text := errText(t, reply); code != http.StatusBadRequest || !strings.Contains(text, c.want) {
				t.Errorf("%d %q, want 400 with %q", code, text, c.want)
			}
			if d.calls() != 0 {
				t.Errorf("reached %v", d.got)
			}
		})
	}
}

func TestUnknownMethodsAreNotFound(t *testing.T) {
	s, _, _ := attached(t)
	for _, m := range []string{"NetworkDriver.Dance", "VolumeDriver.Create", ""} {
		if code, reply := post(s, m, "{}"); code != http.StatusNotFound || errText(t, reply) == "" {
			t.Errorf("%s: %d %s", m, code, reply)
		}
	}
}

func TestErrorsOfTheVerbsGoToTheEngineInBothAPIs(t *testing.T) {
	s, d, i := attached(t)
	d.err, i.err = errNoDisk, errNoDisk
	for _, c := range recorded {
		if c.verb == "" {
			continue
		}
		// 500 and not 200: the IPAM API takes 200 {"Err"} for success.
		if code, reply := post(s, c.method, c.body); code != http.StatusInternalServerError || errText(t, reply) != errNoDisk.Error() {
			t.Errorf("%s: %d %s", c.name, code, reply)
		}
	}
}

func TestAPanicIsAnErrorOfItsCallOnly(t *testing.T) {
	var log bytes.Buffer
	s := newSocket(scopeGlobal, slog.New(slog.NewTextHandler(&log, nil)))
	d := &fakeDriver{hook: func(context.Context) error { panic("index out of range") }}
	s.attach(d, new(fakeIPAM))
	code, reply := post(s, "NetworkDriver.FreeNetwork", `{"NetworkID":"n1"}`)
	if code != http.StatusInternalServerError || !strings.Contains(errText(t, reply), "internal error in NetworkDriver.FreeNetwork") {
		t.Errorf("%d %s", code, reply)
	}
	if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "fakes_test.go") && !strings.Contains(log.String(), "socket_test.go") {
		t.Errorf("no stack in the log:\n%s", log.String())
	}
	d.hook = nil
	if code, reply := post(s, "NetworkDriver.FreeNetwork", `{"NetworkID":"n1"}`); code != http.StatusOK {
		t.Errorf("the next call: %d %s", code, reply)
	}
	if got := s.counts(); len(got) != 1 || got[0].Panics != 1 || got[0].Failed != 1 || got[0].Calls != 2 {
		t.Errorf("counts: %+v", got)
	}
}

func TestNoCallOutlivesItsBudget(t *testing.T) {
	t.Run("one that minds its context answers with its own error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, d, _ := attached(t)
			d.hook = func(ctx context.Context) error {
				<-ctx.Done()
				return errors.New("wait for bridge br0: " + ctx.Err().Error())
			}
			start := time.Now()
			code, reply := post(s, "NetworkDriver.FreeNetwork", `{"NetworkID":"n1"}`)
			if code != 500 || errText(t, reply) != "wait for bridge br0: context deadline exceeded" {
				t.Errorf("%d %s", code, reply)
			}
			if took := time.Since(start); took != budget {
				t.Errorf("took %s, want %s", took, budget)
			}
		})
	})
	t.Run("one that does not is left behind", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s, d, _ := attached(t)
			disk := make(chan struct{})
			d.hook = func(context.Context) error { <-disk; return nil }
			start := time.Now()
			code, reply := post(s, "NetworkDriver.FreeNetwork", `{"NetworkID":"n1"}`)
			if code != 500 || !strings.Contains(errText(t, reply), "took longer than 1s") {
				t.Errorf("%d %s", code, reply)
			}
			if took := time.Since(start); took != time.Second {
				t.Errorf("took %s, want the second that is promised", took)
			}
			if got := s.counts(); len(got) != 1 || got[0].Late != 1 || got[0].Longest != time.Second {
				t.Errorf("counts: %+v", got)
			}
			close(disk)
			synctest.Wait()
			if d.calls() != 1 {
				t.Error("the call did not go on")
			}
		})
	})
}

func TestCallsBeforeTheStartIsCompleteWaitForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSocket(scopeGlobal, slog.New(slog.DiscardHandler))
		if _, reply := post(s, "NetworkDriver.FreeNetwork", `{"NetworkID":"n1"}`); !strings.Contains(errText(t, reply), "still starting") {
			t.Error(reply)
		}
		d := new(fakeDriver)
		time.AfterFunc(budget/2, func() { s.attach(d, new(fakeIPAM)) })
		if code, reply := post(s, "NetworkDriver.FreeNetwork", `{"NetworkID":"n1"}`); code != http.StatusOK || d.calls() != 1 {
			t.Errorf("%d %s", code, reply)
		}
	})
}

func TestBadSettingsRefuseEveryCallWithTheReason(t *testing.T) {
	_, bad := parseConfig(func(name string) string { return map[string]string{"VXLAN_PORT": "70000"}[name] })
	s := newSocket(scopeGlobal, slog.New(slog.DiscardHandler))
	s.refuse(bad)
	s.attach(new(fakeDriver), new(fakeIPAM)) // too late: the first word counts
	for _, c := range recorded {
		if c.verb == "" {
			continue
		}
		if code, reply := post(s, c.method, c.body); code != 500 || !strings.Contains(errText(t, reply), `VXLAN_PORT="70000"`) {
			t.Errorf("%s: %d %s", c.name, code, reply)
		}
	}
	if code, _ := post(s, "NetworkDriver.GetCapabilities", ""); code != http.StatusOK {
		t.Error("a driver without capabilities is unknown to the engine, and the reason reaches nobody")
	}
}

func TestLogsHoldNoSecret(t *testing.T) {
	var log bytes.Buffer
	s := newSocket(scopeGlobal, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	d := new(fakeDriver)
	s.attach(d, new(fakeIPAM))
	create := `{"NetworkID":"n1","Options":{"com.docker.network.generic":{"Sluice.Secret-Key":"hush","sluice.vni":"5"}}}`
	post(s, "NetworkDriver.AllocateNetwork", `{"NetworkID":"n1","Options":{"sluice.secret-key":"hush"},"IPv4Data":[]}`)
	post(s, "NetworkDriver.CreateNetwork", create)
	d.err = errNoDisk
	post(s, "NetworkDriver.CreateNetwork", create)
	if strings.Contains(log.String(), "hush") {
		t.Errorf("leaked:\n%s", log.String())
	}
	for _, want := range []string{"op=NetworkDriver.CreateNetwork", "(redacted)", "no space left"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("no %q in\n%s", want, log.String())
		}
	}
}

func TestServeFinishesTheCallUnderWay(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.sock")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(path); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Fatalf("a file that is no socket: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// A socket as a killed process leaves it.
	stale, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := stale.Close(); err != nil {
		t.Fatal(err)
	}

	l, err := listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v", fi.Mode(), err)
	}
	s, d, _ := attached(t)
	entered, release := make(chan struct{}), make(chan struct{})
	d.hook = func(context.Context) error { close(entered); <-release; return nil }
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- serve(ctx, l, s, slog.New(slog.DiscardHandler)) }()

	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}
	defer client.CloseIdleConnections()
	code := make(chan int, 1)
	go func() {
		resp, err := client.Post("http://plugin.moby.localhost/NetworkDriver.FreeNetwork", "", strings.NewReader(`{"NetworkID":"n1"}`))
		if err != nil {
			t.Error(err)
			code <- 0
			return
		}
		code <- resp.StatusCode
		if err := resp.Body.Close(); err != nil {
			t.Error(err)
		}
	}()
	<-entered
	cancel()
	close(release)
	if c := <-code; c != http.StatusOK {
		t.Errorf("status %d", c)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestServeTellsWhyItCannot(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "p.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := serve(t.Context(), l, http.NotFoundHandler(), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("served a closed listener")
	}
}

// FuzzSocket sends any body to every method: nothing may panic, and what is
// refused says why.
func FuzzSocket(f *testing.F) {
	for _, c := range recorded {
		f.Add(c.body)
	}
	f.Add(`{"NetworkID":"n","EndpointID":"e","Interface":{"Address":"10.0.0.2/24"},"Options":{"sluice.weight":{"a":[[[]]]}}}`)
	f.Add(`{"NetworkID":"n","Options":{"com.docker.network.generic":{"a":1e400}},"IPv4Data":[{}]}`)
	f.Add(`{"DiscoveryType":1,"DiscoveryData":{"Address":null,"Self":"yes"}}`)
	s, _, _ := attached(f)
	methods := slices.Sorted(maps.Keys(s.stats))
	f.Fuzz(func(t *testing.T, body string) {
		for _, m := range methods {
			w := httptest.NewRecorder()
			s.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/"+m, strings.NewReader(body)))
			if !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s: the reply is not JSON: %s", m, w.Body)
			}
			if w.Code != http.StatusOK {
				errText(t, w.Body.String())
			}
		}
		for _, c := range s.counts() {
			if c.Panics != 0 {
				t.Errorf("%s panicked", c.Method)
			}
		}
	})
}
