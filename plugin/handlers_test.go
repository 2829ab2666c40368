package main

import (
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"sluice/driver"
	"sluice/internal/keyring"
	"sluice/internal/model"
	"sluice/internal/reconcile"
	"sluice/internal/view"
	"sluice/ipam"
	"sluice/ipam/pool"
)

// memory is a journal that keeps records as a disk would.
type memory struct {
	mu      sync.Mutex
	records map[model.RecordKey]string
}

func (m *memory) Commit(_ context.Context, puts []model.Record, deletes []model.RecordKey) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range puts {
		m.records[model.RecordKey{Kind: r.Kind, Key: r.Key}] = string(r.Value)
	}
	for _, k := range deletes {
		delete(m.records, k)
	}
	return nil
}

func (m *memory) Load(context.Context) ([]model.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []model.Record
	for k, v := range m.records {
		out = append(out, model.Record{Kind: k.Kind, Key: k.Key, Value: []byte(v)})
	}
	return out, nil
}

// settled is a loop that has always just worked on what was asked for.
type settled struct{}

func (settled) Trigger()                                              {}
func (settled) Wait(context.Context, uint64) (reconcile.Round, error) { return reconcile.Round{}, nil }

// whole is the plugin from its socket to its journal, without the kernel and other nodes.
type whole struct {
	*socket
	journal *memory
	hub     *view.Hub
	pools   *ipam.Allocator
	ring    *keyring.Ring
}

// newWhole is a process that starts on a journal.
func newWhole(t interface{ Fatal(...any) }, scope string, journal *memory) *whole {
	ctx, log := context.Background(), slog.New(slog.DiscardHandler)
	records, err := journal.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	w := &whole{socket: newSocket(scope, log), journal: journal}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	if w.hub, err = view.New(view.Config{Journal: journal, Now: func() time.Time { return now }, VXLANPort: 4799, Log: log}, records); err != nil {
		t.Fatal("what was recorded is not read: ", err)
	}
	book, err := driver.NewBook(journal, records)
	if err != nil {
		t.Fatal("what was recorded is not read: ", err)
	}
	icfg := ipam.Config{Scope: ipam.ScopeGlobal, Journal: journal}
	if scope == scopeLocal {
		icfg.Scope = ipam.ScopeLocal
	}
	if w.pools, err = ipam.Open(ctx, icfg); err != nil {
		t.Fatal("what was recorded is not read: ", err)
	}
	w.ring = keyring.New(journal, records, nil, nil)
	w.attach(driver.New(driver.Config{
		Intents: w.hub, Allocations: book, Pools: w.pools, Keys: w.ring, Loop: settled{},
		UnderlayMTU: func(netip.Addr) (int, error) { return 1500, nil }, Hint: func(netip.Addr) {},
		Local: scope == scopeLocal, HostRun: "/host/run", Log: log,
	}), w.pools)
	return w
}

// state is all that a call can change.
type state struct {
	Records   map[model.RecordKey]string
	Self      model.Self
	Networks  map[model.NetworkID]model.Network
	Endpoints map[model.EndpointID]model.Endpoint
	Pools     []pool.Status
	Keys      [][]byte
}

func (w *whole) state() state {
	v := w.hub.View()
	w.journal.mu.Lock()
	defer w.journal.mu.Unlock()
	return state{maps.Clone(w.journal.records), v.Self, v.Networks, v.Endpoints, w.pools.Snapshot(), w.ring.Keys()}
}

// TestAnyCallsAreAnswered: whatever is called in whatever order, no handler panics or
// stays silent, what is refused changes nothing, and what was recorded is understood by
// the next process.
func TestAnyCallsAreAnswered(t *testing.T) {
	answered := map[string]*[2]int{}
	rapid.Check(t, func(t *rapid.T) {
		anyCalls(t, func(method string, ok bool) {
			if answered[method] == nil {
				answered[method] = new([2]int)
			}
			if ok {
				answered[method][1]++
			} else {
				answered[method][0]++
			}
		})
	})
	for method, n := range answered {
		t.Logf("%s: %d refused, %d done", method, n[0], n[1])
	}
	for _, method := range []string{"NetworkDriver.CreateNetwork", "NetworkDriver.CreateEndpoint", "NetworkDriver.Join", "IpamDriver.RequestPool"} {
		if n := answered[method]; n == nil || n[0] == 0 || n[1] == 0 {
			t.Errorf("%s: the calls do not try it: %v", method, n)
		}
	}
}

func FuzzCalls(f *testing.F) {
	for seed := range byte(8) { // each is another sequence
		f.Add(slices.Repeat([]byte{seed, 0, 3 * seed, 1, 0, 0, 0, 7}, 64))
	}
	f.Fuzz(rapid.MakeFuzz(func(t *rapid.T) { anyCalls(t, func(string, bool) {}) }))
}

// anyCalls makes a sequence of calls, and tells answered how each ended.
func anyCalls(t *rapid.T, answered func(method string, ok bool)) {
	scope := rapid.SampledFrom([]string{scopeGlobal, scopeLocal}).Draw(t, "scope")
	w := newWhole(t, scope, &memory{records: map[model.RecordKey]string{}})
	methods := slices.Sorted(maps.Keys(w.stats))
	// What makes something more often than what asks.
	methods = append(methods, slices.Repeat([]string{"NetworkDriver.CreateEndpoint", "NetworkDriver.Join", "IpamDriver.RequestAddress", "IpamDriver.RequestPool"}, 3)...)
	if rapid.Bool().Draw(t, "there is a network") {
		for _, method := range []string{"NetworkDriver.DiscoverNew", "IpamDriver.RequestPool", "NetworkDriver.CreateNetwork", "NetworkDriver.CreateEndpoint"} {
			if code, reply := post(w, method, fitting[method]); code != http.StatusOK {
				t.Fatal(method, reply)
			}
		}
	}
	for range rapid.IntRange(1, 30).Draw(t, "calls") {
		method := rapid.SampledFrom(methods).Draw(t, "method")
		body := drawBody(t, method)
		before := w.state()
		code, reply := post(w, method, body)
		after := w.state()
		if !json.Valid([]byte(reply)) {
			t.Fatalf("%s %s: the reply is not JSON: %q", method, body, reply)
		}
		answered(method, code == http.StatusOK)
		if code == http.StatusOK {
			continue
		}
		var e errorBody
		if err := json.Unmarshal([]byte(reply), &e); err != nil || e.Err == "" {
			t.Fatalf("%s %s: status %d without a reason: %s", method, body, code, reply)
		}
		if !reflect.DeepEqual(before, after) {
			t.Fatalf("%s %s was refused (%s), and yet there is a change.\nbefore %+v\nafter %+v", method, body, e.Err, before, after)
		}
	}
	for _, c := range w.counts() {
		if c.Panics+c.Late > 0 {
			t.Fatalf("%+v", c)
		}
	}
	now, next := w.state(), newWhole(t, scope, w.journal).state()
	if !reflect.DeepEqual(now, next) {
		t.Fatalf("after a restart it is another.\nbefore %+v\nafter %+v", now, next)
	}
}

// drawBody draws what a method is sent: mostly what the engine would send, or that with
// a fault, or anything.
func drawBody(t *rapid.T, method string) string {
	kind := rapid.IntRange(0, 14).Draw(t, "kind")
	if kind == 0 {
		return rapid.String().Draw(t, "garbage")
	}
	v := any(request(t, method))
	switch {
	case kind == 1:
		v = drawJSON(t, 3)
	case kind < 5:
		spoil(t, v.(map[string]any))
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if kind == 5 { // cut or changed on its way
		i := rapid.IntRange(0, len(b)-1).Draw(t, "at")
		if rapid.Bool().Draw(t, "cut") {
			return string(b[:i])
		}
		b[i] = rapid.Byte().Draw(t, "byte")
	}
	return string(b)
}

// spoil replaces, adds or removes a field, at some depth.
func spoil(t *rapid.T, m map[string]any) {
	keys := slices.Sorted(maps.Keys(m))
	key := rapid.SampledFrom(append(keys, words...)).Draw(t, "field")
	if inner, ok := m[key].(map[string]any); ok && len(inner) > 0 && rapid.Bool().Draw(t, "deeper") {
		spoil(t, inner)
		return
	}
	if rapid.IntRange(0, 3).Draw(t, "remove") == 0 {
		delete(m, key)
		return
	}
	m[key] = drawJSON(t, 2)
}

// fitting are requests of which each follows from the one before.
var fitting = map[string]string{
	"NetworkDriver.DiscoverNew":    `{"DiscoveryType":1,"DiscoveryData":{"Address":"192.168.0.1","Self":true}}`,
	"IpamDriver.RequestPool":       `{"AddressSpace":"sluice-local","Pool":"10.255.0.0/20"}`,
	"NetworkDriver.CreateEndpoint": `{"NetworkID":"` + swarmNet + `","EndpointID":"end1","Interface":{"Address":"10.255.0.9/20"}}`,
	"NetworkDriver.CreateNetwork":  `{"NetworkID":"` + swarmNet + `","Options":{"` + labelGeneric + `":{"sluice.vni":"4242","sluice.secret-key":"` + aKey + `"}},"IPv4Data":[{"Pool":"10.255.0.0/20"}]}`,
}

const aKey = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

// words are texts that mean something somewhere.
var words = []string{
	"", "sluice.vni", "sluice.mtu", "sluice.mode", "sluice.weight", "sluice.publish", "sluice.secret-key", "sluice.refused",
	"sluice.size", "com.docker.network.generic", "com.docker.network.internal", "Address", "PoolID", "Options",
	"10.255.0.0/20", "10.0.0.0/8", "0.0.0.0/0", "10.255.0.1", "10.255.0.255/20", "::1", "fd00::/64", "-1", "16777216", "81:80", "rr", "tun",
	"sluice-global/10.255.0.0/20", "sluice-local/10.255.0.0/20", "../../x", "\x00", "%zz", "true",
}

// drawJSON draws any value, no deeper than depth.
func drawJSON(t *rapid.T, depth int) any {
	kinds := 6
	if depth == 0 {
		kinds = 4
	}
	switch rapid.IntRange(0, kinds-1).Draw(t, "json") {
	case 0:
		return nil
	case 1:
		return rapid.Bool().Draw(t, "bool")
	case 2:
		return rapid.SampledFrom([]any{0, -1, 1.5, 1e300, uint64(1) << 63}).Draw(t, "number")
	case 3:
		if rapid.Bool().Draw(t, "known") {
			return rapid.SampledFrom(words).Draw(t, "word")
		}
		return rapid.String().Draw(t, "text")
	case 4:
		out := make([]any, rapid.IntRange(0, 3).Draw(t, "length"))
		for i := range out {
			out[i] = drawJSON(t, depth-1)
		}
		return out
	}
	out := map[string]any{}
	for range rapid.IntRange(0, 4).Draw(t, "fields") {
		out[rapid.SampledFrom(words).Draw(t, "key")] = drawJSON(t, depth-1)
	}
	return out
}

// request draws a request of a method with values of a small world, so that some fit
// together.
func request(t *rapid.T, method string) map[string]any {
	pick := func(name string, of ...string) string { return rapid.SampledFrom(of).Draw(t, name) }
	netID, endID := pick("network", swarmNet, swarmNet, swarmNet, "othernetwork"), pick("endpoint", "end1", "end2", "end3")
	subnet := pick("pool", "10.255.0.0/20", "10.255.0.0/20", "10.60.0.0/24")
	space := pick("space", "sluice-global", "sluice-local")
	address := pick("address", "10.255.0.2", "10.255.0.3", "10.60.0.2", "10.255.15.255")
	data := []any{map[string]any{"AddressSpace": space, "Pool": subnet, "Gateway": cmp.Or(map[string]string{"10.60.0.0/24": "10.60.0.1/24"}[subnet], "10.255.0.1/20")}}
	options := map[string]any{}
	if rapid.IntRange(0, 3).Draw(t, "option") == 0 {
		options[pick("key", words...)] = pick("value", words...)
	}
	switch method {
	case "NetworkDriver.AllocateNetwork":
		return map[string]any{"NetworkID": netID, "Options": options, "IPv4Data": data, "IPv6Data": nil}
	case "NetworkDriver.CreateNetwork":
		options["sluice.vni"], options["sluice.secret-key"] = "4242", aKey
		return map[string]any{"NetworkID": netID, "Options": map[string]any{labelGeneric: options, labelInternal: false}, "IPv4Data": data}
	case "NetworkDriver.CreateEndpoint":
		return map[string]any{"NetworkID": netID, "EndpointID": endID, "Interface": map[string]any{"Address": address + "/20", "MacAddress": ""}, "Options": options}
	case "NetworkDriver.Join":
		return map[string]any{"NetworkID": netID, "EndpointID": endID, "SandboxKey": "/var/run/docker/netns/1234", "Options": options}
	case "NetworkDriver.DiscoverNew", "NetworkDriver.DiscoverDelete":
		return map[string]any{"DiscoveryType": 1, "DiscoveryData": map[string]any{"Address": "192.168.0.1", "BindAddress": "", "Self": rapid.Bool().Draw(t, "self")}}
	case "IpamDriver.RequestPool":
		return map[string]any{"AddressSpace": space, "Pool": pick("wish", "", subnet), "SubPool": "", "Options": options, "V6": false}
	case "IpamDriver.ReleasePool":
		return map[string]any{"PoolID": space + "/" + subnet}
	case "IpamDriver.RequestAddress":
		if rapid.Bool().Draw(t, "gateway") {
			options["RequestAddressType"] = "com.docker.network.gateway"
		}
		return map[string]any{"PoolID": space + "/" + subnet, "Address": pick("wish", "", address), "Options": options}
	case "IpamDriver.ReleaseAddress":
		return map[string]any{"PoolID": space + "/" + subnet, "Address": address}
	}
	return map[string]any{"NetworkID": netID, "EndpointID": endID, "Options": options}
}
