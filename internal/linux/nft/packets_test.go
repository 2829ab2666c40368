package nft_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
	lb "sluice/lb/service"
)

// serveAll starts a server on a port of every task.
func (l *lab) serveAll(address string) {
	for _, k := range l.tasks {
		k.serve(l.t, address)
	}
}

// names are the tasks in a row.
func (l *lab) names(s string) []*task {
	var out []*task
	for _, c := range s {
		out = append(out, l.tasks[string(c)])
	}
	return out
}

// hits connects n times and counts who answered. Every answer must have seen
// the client's own address and port: none is used twice, as connections of one port to two
// VIPs of one backend would be one there, and the kernel gives the second another port.
func (l *lab) hits(k *task, address string, n int) map[string]int {
	l.t.Helper()
	out := map[string]int{}
	for range n {
		k.hit++
		c, err := k.dial(fmt.Sprintf("%s:%d", k.ip, 10000+k.hit), address) // the kernel chooses from 32768 up
		must(l.t, err)
		if c.client != c.LocalAddr().String() {
			l.t.Errorf("client %s was seen as %s", c.LocalAddr(), c.client)
		}
		out[c.server]++
		c.Close()
	}
	return out
}

func wantHits(t testing.TB, got map[string]int, want map[string]int) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("answered by %v, want %v", got, want)
	}
}

func TestEveryTaskReachesTheVIP(t *testing.T) { onAll(t, everyTaskReaches) }

// Each node balances for its own clients, so those of two kinds serve one network.
func TestNodesOfBothKindsShareANetwork(t *testing.T) {
	for _, mode := range []string{lb.DR, lb.NAT, lb.TUN} {
		t.Run(mode, func(t *testing.T) { everyTaskReaches(t, newLab(t, as(lb.IPVS, mode), as(lb.NFT, mode))) })
		t.Run(mode+" the other way", func(t *testing.T) { everyTaskReaches(t, newLab(t, as(lb.NFT, mode), as(lb.IPVS, mode))) })
	}
}

func everyTaskReaches(t *testing.T, l *lab) {
	l.serveAll("0.0.0.0:80")
	l.set(service{vip: vip1, ready: l.names("bd")})
	for _, name := range []string{"a", "b", "c", "d"} {
		k := l.tasks[name]
		want := map[string]int{"b": 2, "d": 2}
		switch name { // a member never gets itself
		case "b":
			want = map[string]int{"d": 4}
		case "d":
			want = map[string]int{"b": 4}
		}
		wantHits(t, l.hits(k, vip1+":80", 4), want)
		got := map[string]int{}
		for range 4 {
			pc := k.udp(t, "")
			b, err := ask(pc, vip1+":80", []byte("?"))
			must(t, err)
			ans := parseAnswer(string(b))
			if port := netip.MustParseAddrPort(pc.LocalAddr().String()).Port(); ans.client != netip.AddrPortFrom(k.ip, port).String() {
				t.Errorf("client %s:%d was seen as %s", k.ip, port, ans.client)
			}
			got[ans.server]++
		}
		wantHits(t, got, want)
		if err := k.ping(vip1, 56); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		// With fragments.
		if err := k.ping(vip1, 4000); err != nil {
			t.Errorf("%s: large: %v", name, err)
		}
	}
}

// ping sends one echo request and waits for its answer, which must come from there.
func (k *task) ping(address string, size int) error {
	return try(k.fd, func() error {
		pc, err := net.ListenPacket("ip4:icmp", "0.0.0.0")
		if err != nil {
			return err
		}
		defer pc.Close()
		msg := make([]byte, 8+size)
		msg[0] = 8 // echo request
		binary.BigEndian.PutUint16(msg[4:], 4711)
		var sum uint32
		for i := 0; i < len(msg); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(msg[i:]))
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
		binary.BigEndian.PutUint16(msg[2:], ^uint16(sum))
		if _, err := pc.WriteTo(msg, &net.IPAddr{IP: net.ParseIP(address)}); err != nil {
			return err
		}
		pc.SetReadDeadline(time.Now().Add(patience))
		buf := make([]byte, 1<<16)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return fmt.Errorf("ping %s: %w", address, err)
			}
			if buf[0] == 0 && from.String() == address && n == len(msg) {
				return nil
			}
		}
	})
}

func TestRoundRobinIsExact(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1, ready: l.names("bcd")})
		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 9), map[string]int{"b": 3, "c": 3, "d": 3})
		// A second VIP counts for itself.
		l.set(service{vip: vip1, ready: l.names("bcd")}, service{vip: vip2, ready: l.names("bc")})
		for range 3 {
			wantHits(t, l.hits(l.tasks["a"], vip1+":80", 3), map[string]int{"b": 1, "c": 1, "d": 1})
			wantHits(t, l.hits(l.tasks["a"], vip2+":80", 2), map[string]int{"b": 1, "c": 1})
		}
	})
}

func TestWeightsAreSlots(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1, scheduler: "wrr", ready: l.names("bbd")})
		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 9), map[string]int{"b": 6, "d": 3})
		// Two slots in a row are the client's own: it gets the other all the same.
		wantHits(t, l.hits(l.tasks["b"], vip1+":80", 9), map[string]int{"d": 9})
	})
}

func TestSourceHashKeepsAClient(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1, scheduler: "sh", ready: l.names("bcd")})
		for _, name := range []string{"a", "b", "c", "d"} {
			hits := l.hits(l.tasks[name], vip1+":80", 6)
			if len(hits) != 1 || hits[name] != 0 {
				t.Errorf("client %s was answered by %v, want one that is not itself", name, hits)
			}
		}
	})
}

func TestAllPorts(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.set(service{vip: vip1, ready: l.names("b")})
		for _, port := range []string{"1", "80", "5432", "65535"} {
			l.tasks["b"].serve(t, "0.0.0.0:"+port)
			wantHits(t, l.hits(l.tasks["a"], vip1+":"+port, 1), map[string]int{"b": 1})
		}
	})
}

func TestWithoutBackendsRefusesAtOnce(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1})
		for _, name := range []string{"a", "d"} {
			k := l.tasks[name]
			began := time.Now()
			if _, err := k.dial("", vip1+":80"); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("TCP from %s: %v, want refused", name, err)
			}
			for _, size := range []int{10, 4000} {
				if err := k.knock(vip1+":80", size); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("UDP from %s, %d octets: %v, want refused", name, size, err)
				}
			}
			if took := time.Since(began); took > time.Second {
				t.Errorf("refusals from %s took %v", name, took)
			}
		}
	})
}

// knock sends a datagram on a connected socket and returns what comes of it.
func (k *task) knock(address string, size int) error {
	return try(k.fd, func() error {
		c, err := net.Dial("udp4", address)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write(make([]byte, size)); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(patience))
		_, err = c.Read(make([]byte, 1<<16))
		return err
	})
}

// A closed port of a backend refuses as the backend itself would.
func TestClosedPortRefuses(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.set(service{vip: vip1, ready: l.names("bd")})
		for range 2 { // local and remote
			if _, err := l.tasks["a"].dial("", vip1+":81"); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("TCP: %v, want refused", err)
			}
			if err := l.tasks["a"].knock(vip1+":81", 10); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("UDP: %v, want refused", err)
			}
		}
	})
}

func TestMemberCallsItsOwnVIP(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		b := l.tasks["b"]
		l.set(service{vip: vip1, ready: l.names("bcd")})
		hits := l.hits(b, vip1+":80", 12)
		if hits["b"] != 0 || hits["c"] < 4 || hits["d"] < 4 {
			t.Errorf("b was answered by %v, want c and d", hits)
		}
		// Alone, it is its own backend, and sees itself under its own address.
		l.set(service{vip: vip1, ready: l.names("b")})
		c, err := b.dial("", vip1+":80")
		must(t, err)
		must(t, c.echo("to myself"))
		if c.server != "b" || c.client != netip.AddrPortFrom(b.ip, uint16(c.LocalAddr().(*net.TCPAddr).Port)).String() {
			t.Errorf("alone: answered by %s, which saw %s", c.server, c.client)
		}
		c.Close()
		pc := b.udp(t, "")
		got, err := ask(pc, vip1+":80", []byte("?"))
		must(t, err)
		if ans := parseAnswer(string(got)); ans.server != "b" || !strings.HasPrefix(ans.client, b.ip.String()+":") {
			t.Errorf("alone: UDP answered by %v", ans)
		}
		must(t, b.ping(vip1, 56))
		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 2), map[string]int{"b": 2})
	})
}

// A task on two networks has one namespace, and a VIP and an address on each.
func TestATaskOnTwoNetworks(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		const dbVIP = "10.254.0.100"
		n := l.one.network // the second network, of one host
		n.ID, n.VNI = "dbnetwork00000000000000000", 4098
		n.Subnet, n.Gateway = netip.MustParsePrefix("10.254.0.0/20"), netip.MustParseAddr("10.254.0.1")
		db := newHost(t, n, "192.0.2.3")
		l.hosts = append(l.hosts, db)
		client := newTask(t, "e", db, netip.MustParseAddr("10.254.0.2"))
		client.join(t, "eth0")
		l.tasks["e"] = client
		b := l.tasks["b"]
		onDB := *b
		onDB.on, onDB.ip = db, netip.MustParseAddr("10.254.0.3")
		onDB.mac = model.MACFor(onDB.ip)
		onDB.join(t, "eth1")
		b.serve(t, "0.0.0.0:80")
		l.tasks["c"].serve(t, "0.0.0.0:80")

		web := service{vip: vip1, ready: l.names("bc")}
		data := service{vip: dbVIP, ready: []*task{&onDB}}
		l.set(web, data)

		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 4), map[string]int{"b": 2, "c": 2})
		wantHits(t, l.hits(client, dbVIP+":80", 2), map[string]int{"b": 2})
		// It is alone on the second network only.
		wantHits(t, l.hits(b, vip1+":80", 2), map[string]int{"c": 2})
		c, err := b.dial("", dbVIP+":80")
		must(t, err)
		if c.server != "b" || !strings.HasPrefix(c.client, onDB.ip.String()+":") {
			t.Errorf("alone: answered by %s, which saw %s", c.server, c.client)
		}
		c.Close()

		// It leaves the first network: that VIP's translation goes, and its tunnel; the
		// other stays.
		left := map[kernel.Key]bool{
			kernel.TaskVIP{Sandbox: b.sandbox(), VIP: netip.MustParseAddr(vip1)}: true,
			kernel.TaskTunnel{Sandbox: b.sandbox(), Addr: b.ip}:                  hasTunnel(b.have),
		}
		ops := kernel.Diff(b.have, l.wantTask(b, data))
		for _, o := range ops {
			if !left[o.Key] || o.Want != nil {
				t.Errorf("leaving a network takes %s", o)
			}
			delete(left, o.Key)
		}
		if left[kernel.TaskVIP{Sandbox: b.sandbox(), VIP: netip.MustParseAddr(vip1)}] {
			t.Errorf("leaving a network takes only %v", ops)
		}
		b.apply(t, l.wantTask(b, data))
		wantHits(t, l.hits(client, dbVIP+":80", 2), map[string]int{"b": 2})
	})
}

func TestServerBoundToItsOwnAddress(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		for _, name := range []string{"b", "d"} {
			l.tasks[name].serve(t, l.tasks[name].ip.String()+":80")
		}
		l.set(service{vip: vip1, ready: l.names("bd")})
		wantHits(t, l.hits(l.tasks["a"], vip1+":80", 4), map[string]int{"b": 2, "d": 2})
		for range 2 {
			_, err := ask(l.tasks["a"].udp(t, ""), vip1+":80", []byte("?")) // which checks who answers
			must(t, err)
		}
	})
}

// One client port may be in use to the VIP and to the same task directly: in the
// task both become the same pair of addresses and ports.
func TestOnePortToVIPAndToTheTaskDirectly(t *testing.T) {
	// In nat both are the same pair already when they come to the task.
	onThose(t, func(v variant) bool { return v.mode != lb.NAT }, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		a := l.tasks["a"]
		for i, server := range []string{"b", "d"} {
			l.set(service{vip: vip1, ready: l.names(server)})
			direct := l.tasks[server].ip.String() + ":80"
			for j, order := range [][2]string{{vip1 + ":80", direct}, {direct, vip1 + ":80"}} {
				local := fmt.Sprintf("%s:%d", a.ip, 40000+10*i+j)
				c1, err := a.dial(local, order[0])
				must(t, err)
				c2, err := a.dial(local, order[1])
				if err != nil {
					t.Fatalf("port in use to %s, then to %s: %v", order[0], order[1], err)
				}
				for range 3 {
					must(t, c1.echo("one"))
					must(t, c2.echo("two"))
				}
				c1.Close()
				must(t, c2.echo("still"))
				c2.Close()

				pc := a.udp(t, local)
				for range 3 {
					for _, to := range order {
						_, err := ask(pc, to, []byte("?"))
						must(t, err)
					}
				}
			}
		}
	})
}

// One client port may be in use to two ports of a VIP. Each is a flow of its own.
func TestOnePortToTwoPortsOfAVIP(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.serveAll("0.0.0.0:81")
		l.set(service{vip: vip1, ready: l.names("bd")})
		a := l.tasks["a"]
		local := a.ip.String() + ":43000"
		c1, err := a.dial(local, vip1+":80")
		must(t, err)
		c2, err := a.dial(local, vip1+":81")
		must(t, err)
		must(t, c1.echo("one"))
		c1.Close()
		for range 3 {
			must(t, c2.echo("two"))
		}
		c2.Close()
		pc := a.udp(t, local)
		for range 4 {
			for _, to := range []string{vip1 + ":80", vip1 + ":81"} {
				_, err := ask(pc, to, []byte("?"))
				must(t, err)
			}
		}
	})
}

func TestLargeDatagrams(t *testing.T) {
	onAll(t, func(t *testing.T, l *lab) {
		l.serveAll("0.0.0.0:80")
		l.set(service{vip: vip1, ready: l.names("bd")})
		pc := l.tasks["a"].udp(t, "")
		for i, size := range []int{1400, 8 << 10, 60 << 10, 65000, 8 << 10} {
			msg := bytes.Repeat([]byte{byte(i + 1)}, size)
			for range 4 {
				for _, sock := range []net.PacketConn{pc, l.tasks["a"].udp(t, "")} { // known flow, new flow
					got, err := ask(sock, vip1+":80", msg)
					if err != nil {
						t.Fatalf("%d octets: %v", size, err)
					}
					if !bytes.Equal(got, msg) {
						t.Fatalf("%d octets came back as %d others", size, len(got))
					}
				}
			}
		}
	})
}
