package ingress

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sluice/internal/model"
)

var (
	begin = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	any4  = netip.Addr{}
	addr1 = netip.MustParseAddr("192.0.2.1")
	addr2 = netip.MustParseAddr("192.0.2.2")
)

// want is what a service that is so many seconds old publishes.
func want(service string, age int, at netip.Addr, ports string) []Want {
	p, err := model.ParsePublished(ports)
	if err != nil {
		panic(err)
	}
	var out []Want
	for _, r := range p.List() {
		out = append(out, Want{Port{model.ServiceID(service), "net", at, r}, service, begin.Add(-time.Duration(age) * time.Second)})
	}
	return out
}

func (p Port) text() string {
	at := "*"
	if p.Addr.IsValid() {
		at = p.Addr.String()
	}
	return fmt.Sprintf("%s %s %s", p.Service, at, p.PortRange)
}

func TestWhoHasAPort(t *testing.T) {
	for _, c := range []struct {
		name      string
		wants     [][]Want
		held      map[model.HostPort]string
		won, lost []string
	}{
		{name: "nobody wants any"},
		{"the oldest", [][]Want{want("b", 1, any4, "80"), want("a", 2, any4, "80")}, nil,
			[]string{"a * 80/tcp"}, []string{"b: port 80/tcp belongs to service a, which is older"}},
		{"of one age, the smaller id", [][]Want{want("b", 1, any4, "80"), want("a", 1, any4, "80:8080")}, nil,
			[]string{"a * 80:8080/tcp"}, []string{"b: port 80/tcp belongs to service a, which is older"}},
		{"protocols are apart", [][]Want{want("b", 1, any4, "80/udp"), want("a", 2, any4, "80;80/sctp")}, nil,
			[]string{"a * 80/sctp", "a * 80/tcp", "b * 80/udp"}, nil},
		{"what is left of a range", [][]Want{want("b", 1, any4, "8000-8010:9000-9010"), want("a", 2, any4, "8003-8005")}, nil,
			[]string{"b * 8000-8002:9000-9002/tcp", "a * 8003-8005/tcp", "b * 8006-8010:9006-9010/tcp"},
			[]string{"b: port 8003-8005/tcp belongs to service a, which is older"}},
		{"addresses are apart", [][]Want{want("b", 1, addr1, "80"), want("a", 2, addr2, "80")}, nil,
			[]string{"b 192.0.2.1 80/tcp", "a 192.0.2.2 80/tcp"}, nil},
		{"all addresses and one", [][]Want{want("b", 1, any4, "80-81"), want("a", 2, addr2, "80")}, nil,
			[]string{"a 192.0.2.2 80/tcp", "b * 81/tcp"}, []string{"b: port 80/tcp belongs to service a, which is older"}},
		{"one address and all", [][]Want{want("b", 1, addr1, "80"), want("a", 2, any4, "80")}, nil,
			[]string{"a * 80/tcp"}, []string{"b: port 80/tcp of 192.0.2.1 belongs to service a, which is older"}},
		{"a loser's port is not lost to its own loser", [][]Want{want("a", 3, any4, "80"), want("b", 2, any4, "80-81"), want("c", 1, any4, "81")}, nil,
			[]string{"a * 80/tcp", "b * 81/tcp"},
			[]string{"b: port 80/tcp belongs to service a, which is older", "c: port 81/tcp belongs to service b, which is older"}},
		{"a process", [][]Want{want("b", 1, any4, "80"), want("a", 2, any4, "79-81:179-181")}, map[model.HostPort]string{{Proto: model.TCP, Addr: addr1, Port: 80}: "nginx (pid 7)", {Proto: model.UDP, Port: 79}: "named"},
			[]string{"a * 79:179/tcp", "a * 81:181/tcp"},
			[]string{"a: port 80/tcp is held by nginx (pid 7)", "b: port 80/tcp belongs to service a, which is older"}},
		{"a process at another address", [][]Want{want("a", 2, addr2, "80")}, map[model.HostPort]string{{Proto: model.TCP, Addr: addr1, Port: 80}: "nginx"},
			[]string{"a 192.0.2.2 80/tcp"}, nil},
		{"a process at an address that is one of two", [][]Want{want("a", 2, addr2, "80"), want("a", 2, addr1, "80")}, map[model.HostPort]string{{Proto: model.TCP, Addr: addr1, Port: 80}: "nginx"},
			[]string{"a 192.0.2.2 80/tcp"}, []string{"a: port 80/tcp of 192.0.2.1 is held by nginx"}},
		{"all ports", [][]Want{want("a", 2, any4, "1-65535"), want("b", 1, addr1, "1-65535")}, map[model.HostPort]string{{Proto: model.TCP, Port: 1}: "x", {Proto: model.TCP, Port: 65535}: "y"},
			[]string{"a * 2-65534/tcp"},
			[]string{"b: port 1-65535/tcp of 192.0.2.1 belongs to service a, which is older", "a: port 1/tcp is held by x", "a: port 65535/tcp is held by y"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			won, lost := Own(slices.Concat(c.wants...), c.held)
			var have, gone []string
			for _, p := range won {
				have = append(have, p.text())
			}
			for _, l := range lost {
				gone = append(gone, string(l.Service)+": "+l.String())
			}
			slices.Sort(gone)
			slices.Sort(c.lost)
			if d := cmp.Diff(c.won, have); d != "" {
				t.Errorf("won (-want +got)\n%s", d)
			}
			if d := cmp.Diff(c.lost, gone); d != "" {
				t.Errorf("lost (-want +got)\n%s", d)
			}
		})
	}
}

// TestEveryPortIsDecidedByItself compares Own with a decision that goes port by
// port, and looks whether it is blind to order.
func TestEveryPortIsDecidedByItself(t *testing.T) {
	protos := []model.Proto{model.TCP, model.UDP}
	addrs := []netip.Addr{any4, addr1, addr2}
	rapid.Check(t, func(t *rapid.T) {
		var wants []Want
		for i := range rapid.IntRange(0, 6).Draw(t, "wants") {
			lo := rapid.Uint16Range(1, 12).Draw(t, "lo")
			wants = append(wants, Want{Port{
				Service: model.ServiceID(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "service")), Network: model.NetworkID(fmt.Sprint(i)),
				Addr: rapid.SampledFrom(addrs).Draw(t, "addr"),
				PortRange: model.PortRange{
					Proto: rapid.SampledFrom(protos).Draw(t, "proto"), Lo: lo, Hi: lo + rapid.Uint16Range(0, 4).Draw(t, "more"), To: lo + 100,
				},
			}, "", begin})
		}
		for i := range wants {
			wants[i].Created = begin.Add(time.Duration(len(wants[i].Service)+int(wants[i].Service[0])%2) * time.Second)
		}
		held := make(map[model.HostPort]string)
		for range rapid.IntRange(0, 3).Draw(t, "held") {
			at := model.HostPort{Proto: rapid.SampledFrom(protos).Draw(t, "proto"), Addr: rapid.SampledFrom(addrs).Draw(t, "addr"), Port: rapid.Uint16Range(1, 16).Draw(t, "port")}
			held[at] = "process of " + at.String()
		}
		won, lost := Own(wants, held)
		mixed := slices.Clone(wants)
		seed := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		seed.Shuffle(len(mixed), func(i, j int) { mixed[i], mixed[j] = mixed[j], mixed[i] })
		won2, lost2 := Own(mixed, held)
		if !slices.Equal(won, won2) || !slices.Equal(lost, lost2) {
			t.Fatalf("the order matters:\n%v\n%v\n%v\n%v", won, won2, lost, lost2)
		}

		meet := func(a, b netip.Addr) bool { return !a.IsValid() || !b.IsValid() || a == b }
		slices.SortFunc(wants, age)
		var expected, refused []string
		for port := uint16(1); port <= 20; port++ {
			for _, proto := range protos {
				var have []Want
			next:
				for _, w := range wants {
					if w.Proto != proto || port < w.Lo || port > w.Hi {
						continue
					}
					one := w.cut(span{int(port), int(port)})
					for _, o := range have {
						if meet(o.Addr, w.Addr) {
							refused = append(refused, one.text()+string(w.Network)+" to "+string(o.Service))
							continue next
						}
					}
					have = append(have, w)
				}
			have:
				for _, w := range have {
					one := w.cut(span{int(port), int(port)})
					name := ""
					for _, h := range slices.SortedFunc(maps.Keys(held), model.HostPort.Compare) {
						if h.Proto == proto && h.Port == port && meet(h.Addr, w.Addr) && name == "" {
							name = held[h]
						}
					}
					if name != "" {
						refused = append(refused, one.text()+string(w.Network)+" to "+name)
						continue have
					}
					expected = append(expected, one.text()+string(w.Network))
				}
			}
		}
		var got, gone []string
		for _, p := range won {
			for n := p.Lo; n <= p.Hi; n++ {
				got = append(got, p.cut(span{int(n), int(n)}).text()+string(p.Network))
			}
		}
		for _, l := range lost {
			for n := l.Lo; n <= l.Hi; n++ {
				gone = append(gone, l.cut(span{int(n), int(n)}).text()+string(l.Network)+" to "+string(l.Owner)+strings.Repeat(l.OwnerName, b2i(l.Owner == "")))
			}
		}
		for _, s := range [][]string{expected, refused, got, gone} {
			slices.Sort(s)
		}
		if d := cmp.Diff(expected, got); d != "" {
			t.Fatalf("won (-want +got)\n%s", d)
		}
		if d := cmp.Diff(refused, gone); d != "" {
			t.Fatalf("lost (-want +got)\n%s", d)
		}
	})
}

func TestHostPorts(t *testing.T) {
	won, _ := Own(slices.Concat(want("a", 1, addr1, "65534-65535"), want("b", 1, any4, "80/udp")), nil)
	got := HostPorts(won)
	if want := []model.HostPort{{Proto: model.TCP, Addr: addr1, Port: 65534}, {Proto: model.TCP, Addr: addr1, Port: 65535}, {Proto: model.UDP, Port: 80}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestOnlyWhatWasTriedIsPlanned(t *testing.T) {
	addr1, addr2 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	run := func(a netip.Addr, proto model.Proto, lo, hi uint16) model.HostRange {
		return model.HostRange{Proto: proto, Addr: a, Lo: lo, Hi: hi}
	}
	port := func(a netip.Addr, lo, hi, to uint16) Port {
		return Port{Service: "s", Network: "n", Addr: a, PortRange: model.PortRange{Proto: model.TCP, Lo: lo, Hi: hi, To: to}}
	}
	all := netip.Addr{}
	for _, c := range []struct {
		name  string
		won   []Port
		tried []model.HostRange
		want  []Port
	}{
		{"nobody tries", []Port{port(all, 80, 80, 80)}, nil, []Port{port(all, 80, 80, 80)}},
		{"nothing yet", []Port{port(all, 80, 80, 80)}, []model.HostRange{}, nil},
		{"another protocol", []Port{port(all, 80, 80, 80)}, []model.HostRange{run(all, model.UDP, 80, 80)}, nil},
		{"a range that grows", []Port{port(all, 80, 89, 1080)}, []model.HostRange{run(all, model.TCP, 80, 84)}, []Port{port(all, 80, 84, 1080)}},
		{"a range that shrinks", []Port{port(all, 82, 83, 82)}, []model.HostRange{run(all, model.TCP, 80, 84)}, []Port{port(all, 82, 83, 82)}},
		{"neighbours stay one", []Port{port(all, 80, 89, 80)}, []model.HostRange{run(all, model.TCP, 85, 89), run(all, model.TCP, 80, 84)}, []Port{port(all, 80, 89, 80)}},
		{"a gap", []Port{port(all, 80, 89, 1080)}, []model.HostRange{run(all, model.TCP, 70, 81), run(all, model.TCP, 88, 99)}, []Port{port(all, 80, 81, 1080), port(all, 88, 89, 1088)}},
		{"of all addresses, then of one", []Port{port(addr1, 80, 80, 80)}, []model.HostRange{run(all, model.TCP, 80, 80)}, []Port{port(addr1, 80, 80, 80)}},
		{"of one address, then of all", []Port{port(all, 80, 80, 80)}, []model.HostRange{run(addr1, model.TCP, 80, 80)}, nil},
		{"of another address", []Port{port(addr2, 80, 80, 80)}, []model.HostRange{run(addr1, model.TCP, 80, 80)}, nil},
		{"the ends of all", []Port{port(all, 1, 65535, 1)}, []model.HostRange{run(all, model.TCP, 1, 65535)}, []Port{port(all, 1, 65535, 1)}},
	} {
		if got := Tried(c.won, c.tried); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

// TestAddressesThatCannotBeReadOpenNoPort, as another version of sluice may tell them.
func TestAddressesThatCannotBeReadOpenNoPort(t *testing.T) {
	for bind, want := range map[model.Addrs]int{"": 1, "192.0.2.1;192.0.2.2": 2, "192.0.2.1;2001:db8::1": 1, "2001:db8::1": 0, "eth0": 0} {
		v := model.View{Services: map[model.ServiceID]model.Service{"s": {Options: map[model.NetworkID]model.ServiceOptions{
			"n": {Published: "80/tcp", Bind: bind},
		}}}}
		if got := Wants(v); len(got) != want {
			t.Errorf("%q: %v", bind, got)
		}
	}
}

// TestALossOfManyPortsIsOne, though a process has them one by one: each is told.
func TestALossOfManyPortsIsOne(t *testing.T) {
	held := make(map[model.HostPort]string)
	for p := uint16(8001); p <= 8999; p++ {
		held[model.HostPort{Proto: model.UDP, Port: p}] = "sfu (pid 7)"
	}
	held[model.HostPort{Proto: model.UDP, Port: 8500}] = "named (pid 8)"
	var got []string
	_, lost := Own(want("a", 1, netip.Addr{}, "8000-9000:9000-10000/udp"), held)
	for _, l := range lost {
		got = append(got, l.PortRange.String()+" "+l.OwnerName)
	}
	if want := []string{"8001-8499:9001-9499/udp sfu (pid 7)", "8500:9500/udp named (pid 8)", "8501-8999:9501-9999/udp sfu (pid 7)"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
