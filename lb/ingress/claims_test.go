package ingress

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"sluice/internal/model"
)

// swarm is what some nodes have claimed, as far as each has heard.
type swarm struct {
	networks map[model.NetworkID]model.Network
	services map[model.ServiceID]model.Service
	claims   map[model.NodeID]map[model.NetworkID]model.Entry
}

func newSwarm(subnets ...string) *swarm {
	s := &swarm{make(map[model.NetworkID]model.Network), make(map[model.ServiceID]model.Service), make(map[model.NodeID]map[model.NetworkID]model.Entry)}
	for i, text := range subnets {
		p := netip.MustParsePrefix(text)
		id := model.NetworkID(fmt.Sprintf("net%d", i))
		s.networks[id] = model.Network{ID: id, Subnet: p, Gateway: p.Addr().Next(), VNI: model.VNI(i + 1)}
		s.services["svc"+model.ServiceID(id)] = model.Service{Options: map[model.NetworkID]model.ServiceOptions{id: {Published: "80/tcp"}}}
	}
	return s
}

func (s *swarm) view(node model.NodeID) model.View {
	v := model.View{
		Self:     model.Self{Node: node, VTEP: netip.MustParseAddr("192.0.2.1")},
		Networks: s.networks, Services: s.services, Entries: make(map[model.NetworkID]map[model.NodeID]model.Entry),
	}
	for n, es := range s.claims {
		for id, e := range es {
			if v.Entries[id] == nil {
				v.Entries[id] = make(map[model.NodeID]model.Entry)
			}
			v.Entries[id][n] = e
		}
	}
	return v
}

// unique says what two claims have in common that they must not.
func (s *swarm) unique() string {
	for a, as := range s.claims {
		own := make(map[uint16]bool)
		for id, e := range as {
			if own[e.Number] {
				return fmt.Sprintf("%s has number %d twice", a, e.Number)
			}
			own[e.Number] = true
			n := s.networks[id]
			if !n.Subnet.Contains(e.Addr) || e.Addr == n.Gateway || e.Number == 0 || e.Number > maxNumber {
				return fmt.Sprintf("%s claims %v", a, e)
			}
			for b, bs := range s.claims {
				if o, ok := bs[id]; ok && a != b && (o.Addr == e.Addr || o.Number == e.Number) {
					return fmt.Sprintf("%s and %s claim %v and %v", a, b, e, o)
				}
			}
		}
	}
	return ""
}

func TestClaimsOfOneNode(t *testing.T) {
	s := newSwarm("10.255.0.0/20", "10.255.0.0/20", "10.254.0.0/25", "192.168.0.0/24")
	v := s.view("n1")
	got, errs := Claims(v)
	if len(got) != 3 || len(errs) != 1 || !strings.Contains(fmt.Sprint(errs["net2"]), "10.254.0.0/25 is smaller than a /24") {
		t.Fatalf("%v, %v", got, errs)
	}
	if a := got["net0"].Addr; !netip.MustParsePrefix("10.255.15.0/24").Contains(a) {
		t.Errorf("%s is not of the part for nodes", a)
	}
	s.claims["n1"] = got
	if why := s.unique(); why != "" {
		t.Error(why)
	}
	if again, _ := Claims(s.view("n1")); !maps.Equal(again, got) {
		t.Errorf("%v became %v", got, again)
	}
	partial := s.view("n1")
	partial.Partial, partial.Services = true, nil
	if kept, _ := Claims(partial); !maps.Equal(kept, got) {
		t.Errorf("%v became %v while nothing is known", got, kept)
	}
	// Another gateway than usual, at the address that was claimed.
	n := s.networks["net0"]
	n.Gateway = got["net0"].Addr
	s.networks["net0"] = n
	if moved, _ := Claims(s.view("n1")); moved["net0"].Addr == n.Gateway || moved["net0"].Number != got["net0"].Number {
		t.Errorf("%v is the gateway's", moved["net0"])
	}
	delete(s.services, "svcnet0")
	if less, _ := Claims(s.view("n1")); len(less) != 2 {
		t.Errorf("%v, and nothing is published on net0", less)
	}
	if none, _ := Claims(model.View{Services: s.services, Networks: s.networks}); len(none) != 0 {
		t.Errorf("a node without a name claims %v", none)
	}
}

// TestANetworkInThePoolHasNoPorts: the mesh's addresses would be its containers'.
func TestANetworkInThePoolHasNoPorts(t *testing.T) {
	v := newSwarm("10.255.0.0/20", "30.1.0.0/20").view("n1")
	v.Self.MeshPool = netip.MustParsePrefix("30.0.0.0/8")
	got, errs := Claims(v)
	if len(got) != 1 || !got["net0"].Addr.IsValid() || !strings.Contains(fmt.Sprint(errs["net1"]), "30.1.0.0/20, which is in the mesh's pool 30.0.0.0/8; set MESH_POOL") {
		t.Errorf("%v, %v", got, errs)
	}
}

func TestClaimsMeetAndTheSmallerIDKeeps(t *testing.T) {
	s := newSwarm("10.255.0.0/20")
	same := model.Entry{Addr: netip.MustParseAddr("10.255.15.9"), Number: 5}
	s.claims["n1"] = map[model.NetworkID]model.Entry{"net0": same}
	s.claims["n2"] = map[model.NetworkID]model.Entry{"net0": same}
	one, _ := Claims(s.view("n1"))
	two, _ := Claims(s.view("n2"))
	if e := one["net0"]; e.Addr != same.Addr || e.Number != 5 {
		t.Errorf("n1 moved to %v", e)
	}
	if e := two["net0"]; e.Addr == same.Addr || e.Number == 5 || !e.Addr.IsValid() || e.Number == 0 {
		t.Errorf("n2 has %v", e)
	}
}

func TestOnlyClaimsThatHoldCount(t *testing.T) {
	s := newSwarm("10.255.0.0/20")
	v := s.view("n9")
	at := func(last byte, number uint16) model.Entry {
		return model.Entry{Addr: netip.AddrFrom4([4]byte{10, 255, 15, last}), Number: number, VTEP: netip.MustParseAddr("192.0.2.1")}
	}
	without := at(7, 7)
	without.VTEP = netip.Addr{}
	v.Entries["net0"] = map[model.NodeID]model.Entry{
		"n1": at(1, 1), "n2": at(1, 2), "n3": at(3, 2), "n4": at(4, 4), "n5": at(255, 5), "n6": at(6, 0), "n7": without,
		"n8": {Addr: netip.MustParseAddr("10.255.0.8"), Number: 8, VTEP: at(0, 0).VTEP},
	}
	// n3 has what n2 is about to leave, but nobody can tell whether n2 has.
	if got, want := Claimed(v, "net0"), (map[model.NodeID]model.Entry{"n1": at(1, 1), "n4": at(4, 4)}); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestANetworkIsFull(t *testing.T) {
	s := newSwarm("192.168.0.0/24")
	for i := range 15 {
		node := model.NodeID(fmt.Sprintf("n%02d", i))
		got, errs := Claims(s.view(node))
		if len(errs) > 0 {
			t.Fatalf("entry %d: %v", i, errs)
		}
		s.claims[node] = got
	}
	if why := s.unique(); why != "" {
		t.Error(why)
	}
	if got, errs := Claims(s.view("n99")); len(got) != 0 || !strings.Contains(fmt.Sprint(errs["net0"]), "no address left") {
		t.Errorf("%v, %v", got, errs)
	}
}

// TestClaimsComeToRest: nodes that decide at the same time, and hear of each other
// afterwards, agree after few rounds, and then stay.
func TestClaimsComeToRest(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSwarm("10.255.0.0/20", "10.254.0.0/22", "10.253.0.0/24")
		nodes := rapid.IntRange(1, 15).Draw(t, "nodes")
		for i := range nodes {
			node := model.NodeID(fmt.Sprintf("n%02d", i))
			s.claims[node] = make(map[model.NetworkID]model.Entry)
			for id := range s.networks { // whatever they had
				if rapid.Bool().Draw(t, "had") {
					s.claims[node][id] = model.Entry{
						Addr: plus(s.networks[id].Subnet.Addr(), rapid.Uint32Range(0, 255).Draw(t, "addr")), Number: rapid.Uint16Range(0, 3).Draw(t, "number"),
					}
				}
			}
		}
		for round := 0; ; round++ {
			next := make(map[model.NodeID]map[model.NetworkID]model.Entry)
			moved := false
			for node := range s.claims {
				now, errs := Claims(s.view(node))
				next[node] = now
				// A full network may show one for a round.
				moved = moved || !maps.Equal(now, s.claims[node]) || len(errs) > 0
			}
			s.claims = next
			if !moved {
				break
			}
			if round > 2*nodes+2 {
				t.Fatalf("not at rest after %d rounds: %v", round, s.claims)
			}
		}
		if why := s.unique(); why != "" {
			t.Fatal(why)
		}
		for node, es := range s.claims {
			if len(es) != len(s.networks) {
				t.Fatalf("%s claims %v", node, es)
			}
		}
	})
}

func TestBlocksAndPools(t *testing.T) {
	for n, want := range map[uint16]string{1: "250.0.16.0/20", 2: "250.0.32.0/20", 16: "250.1.0.0/20", maxNumber: "250.255.240.0/20"} {
		if got := Block(DefaultPool(), n); got.String() != want {
			t.Errorf("block %d is %s, want %s", n, got, want)
		}
	}
	if Block(DefaultPool(), 0).IsValid() || Block(DefaultPool(), maxNumber+1).IsValid() || Block(netip.Prefix{}, 1).IsValid() {
		t.Error("a number that is none has a block")
	}
	for _, s := range []string{"250.0.0.0/8", "11.0.0.0/8", "240.0.0.0/8", "254.0.0.0/8"} {
		if p, err := ParsePool(s); err != nil || p.String() != s {
			t.Errorf("%s: %v, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "250.0.0.0", "250.0.0.0/9", "250.0.0.1/8", "fd00::/8", "0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/8", "239.0.0.0/8", "255.0.0.0/8"} {
		if p, err := ParsePool(s); err == nil {
			t.Errorf("%s is taken: %v", s, p)
		}
	}
}

func TestAliases(t *testing.T) {
	block := netip.MustParsePrefix("250.0.16.0/20")
	a := netip.MustParseAddr
	vips := map[model.ServiceID]netip.Addr{"web": a("10.255.0.100"), "api": a("10.255.1.2"), "far": a("10.255.16.100"), "rr": {}}
	oldest := []model.ServiceID{"web", "rr", "api", "far"}
	got := Aliases(block, oldest, vips)
	for id, want := range map[model.ServiceID]string{"web": "250.0.16.100", "api": "250.0.17.2", "far": "250.0.16.101"} {
		if got[id] != a(want) {
			t.Errorf("%s is at %s, want %s", id, got[id], want)
		}
	}
	if !block.Contains(got["rr"]) || len(got) != 4 {
		t.Errorf("without a virtual IP: %v", got)
	}
	// Who was there stays, also when the virtual IPs of others would lead there.
	rr := got["rr"].As4()
	vips["new"], vips["newer"] = a("10.255.0.101"), netip.AddrFrom4([4]byte{10, 255, rr[2] & 15, rr[3]})
	next := Aliases(block, append(oldest, "new", "newer"), vips)
	for id, at := range got {
		if next[id] != at {
			t.Errorf("%s was at %s and is at %s", id, at, next[id])
		}
	}
	if next["new"] != a("250.0.16.102") || next["newer"] == got["rr"] {
		t.Errorf("%v became %v", got, next)
	}
	if moved := Aliases(netip.MustParsePrefix("250.0.32.0/20"), oldest, vips); moved["api"] != a("250.0.33.2") {
		t.Errorf("in another block: %v", moved)
	}
	if none := Aliases(netip.Prefix{}, oldest, vips); len(none) != 0 {
		t.Errorf("in no block: %v", none)
	}
	many := make(map[model.ServiceID]netip.Addr)
	for i := range services + 10 {
		many[model.ServiceID(fmt.Sprint(i))] = plus(a("10.0.0.0"), uint32(i))
	}
	full := Aliases(block, slices.Sorted(maps.Keys(many)), many)
	seen := make(map[netip.Addr]bool)
	for _, a := range full {
		if seen[a] || a == block.Addr() || !block.Contains(a) {
			t.Fatalf("%s twice, or none of a service", a)
		}
		seen[a] = true
	}
	if len(full) != services-1 {
		t.Errorf("%d of %d have one", len(full), len(many))
	}
}

// TestNumbersAreOfOneNetworkIfTheyCan: as long as there are enough, no two networks have
// an entry of one number.
func TestNumbersAreOfOneNetworkIfTheyCan(t *testing.T) {
	s := newSwarm("10.255.0.0/20", "10.255.16.0/20")
	seen := make(map[uint16]bool)
	for i := range 100 {
		node := model.NodeID(fmt.Sprint("node", i))
		claims, full := Claims(s.view(node))
		if len(full) > 0 || len(claims) != 2 {
			t.Fatalf("%v, %v", claims, full)
		}
		s.claims[node] = claims
		for _, e := range claims {
			if seen[e.Number] {
				t.Errorf("%s took %d, which is taken", node, e.Number)
			}
			seen[e.Number] = true
		}
	}
	// With none left, one of another network does.
	v := s.view("last")
	for n := range uint16(maxNumber) {
		v.Entries["net1"][model.NodeID(fmt.Sprint("x", n))] = model.Entry{Number: n + 1, Addr: netip.MustParseAddr("10.255.31.1")}
	}
	if n := number(v, "net0", map[uint16]bool{}); n == 0 {
		t.Error("there was room")
	}
}
