package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestPutReachesEveryMemberWithinMilliseconds(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 25)
		c.put("n07", "task", "10.0.1.5")
		advance(2 * time.Millisecond) // memnet takes up to one
		for _, name := range c.names() {
			if got := c.nodes[name].Snapshot()["n07"].Entries["task"]; string(got) != "10.0.1.5" {
				t.Errorf("%s does not know it yet: %q", name, got)
			}
		}
	})
}

func TestChangesReachALargeClusterByRelay(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, directLimit+20)
		c.put("n07", "task", "10.0.1.5")
		c.waitEntry(2*time.Second, c.names(), "n07", "task", "10.0.1.5")
	})
}

func TestChangedTellsAndCoalesces(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 2)
		n := c.nodes["n01"]
		for len(n.Changed()) > 0 {
			<-n.Changed()
		}
		for i := range 10 {
			c.put("n00", "k", fmt.Sprint(i))
		}
		advance(10 * time.Millisecond)
		select {
		case <-n.Changed():
		default:
			t.Error("no notice of a peer's change")
		}
		select {
		case <-n.Changed():
			t.Error("a second notice for the same changes")
		default:
		}
	})
}

func TestSnapshotDoesNotChangeLater(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 2)
		c.put("n00", "k", "old")
		advance(10 * time.Millisecond)
		before := c.nodes["n01"].Snapshot()
		c.put("n00", "k", "new")
		c.put("n00", "more", "new")
		advance(10 * time.Millisecond)
		if e := before["n00"].Entries; string(e["k"]) != "old" || len(e) != 1 {
			t.Errorf("former snapshot now shows %q", e)
		}
	})
}

func TestRestartKeepsFormerEntriesUntilComplete(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 5)
		for i := range 10 {
			c.put("n03", fmt.Sprint("backend", i), "up")
		}
		if err := c.nodes["n03"].Complete(); err != nil {
			t.Fatal(err)
		}
		c.waitConverged(time.Second * 3)
		c.kill("n03")
		n := c.start("n03")
		c.put("n03", "backend0", "new")
		if err := n.Delete("backend1"); err != nil {
			t.Fatal(err)
		}
		c.waitEntry(5*time.Second, c.others("n03"), "n03", "backend0", "new")
		late := c.start("n05") // joins between restart and Complete
		advance(5 * time.Second)
		for _, name := range []string{"n00", "n01", "n02", "n04", "n05"} {
			s := c.nodes[name].Snapshot()["n03"]
			if len(s.Entries) != 9 || string(s.Entries["backend9"]) != "up" || s.Complete {
				t.Errorf("%s lost entries of the former incarnation: %s", name, show(Tables{"n03": s}))
			}
		}
		if err := n.Complete(); err != nil {
			t.Fatal(err)
		}
		advance(10 * time.Millisecond)
		c.waitEntry(3*time.Second, c.names(), "n03", "backend9", "")
		if s := late.Snapshot()["n03"]; len(s.Entries) != 1 || !s.Complete {
			t.Errorf("after Complete: %s", show(Tables{"n03": s}))
		}
	})
}

func TestLeaveRemovesTheTable(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 6)
		c.put("n02", "k", "v")
		advance(time.Second)
		c.net.SetLoss(0.2)
		n := c.nodes["n02"]
		if err := n.Leave(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := n.Put("k", nil); !errors.Is(err, ErrLeft) {
			t.Errorf("Put after Leave: %v, want ErrLeft", err)
		}
		c.kill("n02")
		c.waitState(ConvergenceBound, c.names(), "n02", 0)
		members := c.nodes["n00"].Members()
		if i := slices.IndexFunc(members, func(m Member) bool { return m.Name == "n02" }); i < 0 || members[i].State != Left {
			t.Errorf("n02 is not listed as left: %+v", members)
		}
		c.start("n02")
		c.put("n02", "k", "again")
		c.waitEntry(ConvergenceBound, c.names(), "n02", "k", "again")
		c.waitConverged(ConvergenceBound)
	})
}

func TestForgetSpreadsAndIsOutbidByTheLiving(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 6)
		c.put("n05", "k", "v")
		advance(time.Second)
		if err := c.nodes["n00"].Forget("n05"); !errors.Is(err, ErrAlive) {
			t.Errorf("Forget of a living node: %v, want ErrAlive", err)
		}
		if err := c.nodes["n00"].Forget("nobody"); err != nil {
			t.Errorf("Forget of an unknown node: %v", err)
		}
		rest := c.others("n05")
		c.split([]string{"n05"}, rest)
		c.waitState(detection, rest, "n05", Suspended)
		if err := c.nodes["n00"].Forget("n05"); err != nil {
			t.Fatal(err)
		}
		c.waitState(ConvergenceBound, rest, "n05", 0)
		advance(time.Minute)
		c.waitState(0, rest, "n05", 0)
		c.net.Heal()
		c.nodes["n05"].Join([]netip.AddrPort{nodeAddr("n01")})
		c.waitEntry(ConvergenceBound, c.names(), "n05", "k", "v")
		c.waitConverged(ConvergenceBound)
		if got := c.nodes["n05"].Status().Counters.Refuted; got == 0 {
			t.Error("n05 came back without outbidding its grave")
		}
	})
}

func TestForgottenNodeStaysForgottenOnALateNode(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 5)
		c.put("n04", "k", "v")
		advance(time.Second)
		c.split([]string{"n03"}, c.others("n03")) // holds a copy of n04's table
		c.kill("n04")
		rest := []string{"n00", "n01", "n02"}
		c.waitState(detection, rest, "n04", Suspended)
		if err := c.nodes["n00"].Forget("n04"); err != nil {
			t.Fatal(err)
		}
		advance(time.Hour)
		c.net.Heal()
		c.waitState(ConvergenceBound, c.names(), "n04", 0)
		c.waitConverged(ConvergenceBound)
	})
}

func TestBulkLoadTravelsByStream(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 5)
		big := make(map[string][]byte)
		for i := range 5000 {
			big[fmt.Sprint("endpoint/", i)] = bytes.Repeat([]byte{byte(i)}, 200)
		}
		if err := c.nodes["n01"].Replace(big); err != nil {
			t.Fatal(err)
		}
		c.waitEntry(3*time.Second, c.names(), "n01", "endpoint/4999", string(big["endpoint/4999"]))
		c.waitConverged(3 * time.Second)
		delete(big, "endpoint/17")
		if err := c.nodes["n01"].Replace(big); err != nil {
			t.Fatal(err)
		}
		advance(3 * time.Millisecond)
		c.waitEntry(0, c.names(), "n01", "endpoint/17", "")
		c.start("n05")
		c.waitConverged(ConvergenceBound)
	})
}

func TestLimits(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 1)
		n := c.nodes["n00"]
		for _, err := range []error{
			n.Put("", nil),
			n.Put(strings.Repeat("k", MaxKey+1), nil),
			n.Put("k", make([]byte, MaxValue+1)),
			n.Replace(map[string][]byte{"k": make([]byte, MaxValue+1)}),
		} {
			if !errors.Is(err, ErrTooLarge) {
				t.Errorf("got %v, want ErrTooLarge", err)
			}
		}
		var err error
		for i := 0; err == nil; i++ {
			err = n.Put(fmt.Sprintf("%08d", i), make([]byte, MaxValue))
		}
		if !errors.Is(err, ErrTableFull) {
			t.Errorf("got %v, want ErrTableFull", err)
		}
		if err := n.Delete("00000000"); err != nil {
			t.Error(err)
		}
		if err := n.Put("again", make([]byte, MaxValue)); err != nil {
			t.Errorf("after a deletion made room: %v", err)
		}
	})
}

func TestKeysOfTheRingAreUnited(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := newCluster(t, 1)
		only := func(k []byte) func(*Config) { return func(c *Config) { c.Keys = [][]byte{k} } }
		c.start("n00", only(keyA))
		c.start("n01", only(keyB))
		c.start("n02", only(keyA))
		c.put("n00", "k", "v")
		advance(30 * time.Second)
		if _, ok := c.nodes["n01"].Snapshot()["n00"]; ok {
			t.Fatal("n01 reads n00 without having its key")
		}
		// The union arrives at one node after the other.
		for _, name := range c.names() {
			for _, k := range [][]byte{keyA, keyB} {
				if err := c.nodes[name].AddKey(k); err != nil {
					t.Fatal(err)
				}
			}
			advance(20 * time.Second)
		}
		c.waitEntry(ConvergenceBound, c.names(), "n00", "k", "v")
		c.waitConverged(ConvergenceBound)
		ids := c.nodes["n00"].Status().KeyIDs
		for _, name := range c.names() {
			if got := c.nodes[name].Status().KeyIDs; !slices.Equal(got, ids) {
				t.Errorf("%s has keys %v, n00 %v", name, got, ids)
			}
		}
		// Rotation: drop the primary everywhere, one after the other.
		keep := keyA
		if slices.Equal(c.nodes["n00"].keys.ring.GetPrimaryKey(), keyA) {
			keep = keyB
		}
		for _, name := range c.names() {
			if err := c.nodes[name].SetKeys([][]byte{keep}); err != nil {
				t.Fatal(err)
			}
		}
		c.put("n01", "rotated", "yes")
		c.waitEntry(ConvergenceBound, c.names(), "n01", "rotated", "yes")
		c.waitConverged(ConvergenceBound)
	})
}

func TestStatusShowsAgreement(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 4)
		advance(30 * time.Second)
		s := c.nodes["n00"].Status()
		if s.Agreed != 3 || s.Peers != 3 || len(s.Members) != 4 || s.Digest != c.nodes["n03"].Status().Digest {
			t.Errorf("status of an idle cluster: %+v", s)
		}
		for _, m := range s.Members {
			if m.State != Alive || m.Addr != nodeAddr(m.Name) || !m.Self && m.LastAgreed.IsZero() {
				t.Errorf("member %+v", m)
			}
		}
		if text := fmt.Sprintf("%+v", s); strings.Contains(text, string(keyA)) || strings.Contains(text, fmt.Sprint(keyA)) {
			t.Error("status tells the key")
		}
	})
}

func TestIdleClusterIsQuiet(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const size, seconds = 10, 60
		c := startN(t, size)
		advance(30 * time.Second)
		before := c.nodes["n00"].Status().Counters
		sent := c.net.Sent()
		advance(seconds * time.Second)
		sent = c.net.Sent() - sent
		after := c.nodes["n00"].Status().Counters
		if after.Answers != before.Answers || after.Applied != before.Applied || after.StreamsOut != before.StreamsOut {
			t.Errorf("an idle node exchanged tables: %+v, then %+v", before, after)
		}
		// Per node and second: a ping and an ack, a probe and an agreement, each
		// sent once and answered once; a fifth more for jitter.
		if per := float64(sent) / size / seconds; per > 5 {
			t.Errorf("%.1f packets per node and second", per)
		}
	})
}

// TestConcurrentUse is for the race detector.
func TestConcurrentUse(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 3)
		n := c.nodes["n00"]
		var wg sync.WaitGroup
		check := func(err error) {
			if err != nil {
				t.Error(err)
			}
		}
		for _, f := range []func(i int){
			func(i int) { c.put("n00", fmt.Sprint("k", i%10), fmt.Sprint(i)) },
			func(i int) { check(n.Delete(fmt.Sprint("k", i%10))) },
			func(i int) { check(n.SetKeys([][][]byte{{keyA}, {keyA, keyB}}[i%2])) },
			func(int) { n.Snapshot() },
			func(int) { n.Status() },
			func(int) { n.Join([]netip.AddrPort{nodeAddr("n01")}) },
			func(int) { check(n.Forget("nobody")) },
			func(i int) { c.put("n01", "k", fmt.Sprint(i)) },
		} {
			wg.Go(func() {
				for i := range 200 {
					f(i)
					<-time.After(time.Millisecond)
				}
			})
		}
		wg.Wait()
		check(n.SetKeys([][]byte{keyA}))
		c.waitConverged(ConvergenceBound)
	})
}

func TestClosedNodeRefuses(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		c := startN(t, 1)
		n := c.nodes["n00"]
		c.kill("n00")
		for _, err := range []error{n.Put("k", nil), n.Delete("k"), n.Complete(), n.Forget("x"), n.Leave(t.Context())} {
			if !errors.Is(err, ErrClosed) {
				t.Errorf("got %v, want ErrClosed", err)
			}
		}
		if err := n.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		n.Join(nil)
		n.Snapshot()
		n.Status()
		synctest.Wait()
	})
}

func TestConfigErrorsSayWhatToDo(t *testing.T) {
	good := Config{Name: "n", BindAddr: netip.MustParseAddrPort("127.0.0.1:0"), Keys: [][]byte{keyA}}
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"no name", func(c *Config) { c.Name = "" }, "node name"},
		{"no key", func(c *Config) { c.Keys = nil }, "no gossip key"},
		{"short key", func(c *Config) { c.Keys = [][]byte{keyA, []byte("short")} }, "key 2 of 2 has 5 bytes"},
		{"no address", func(c *Config) { c.BindAddr = netip.AddrPort{} }, "bind address"},
		{"unspecified", func(c *Config) { c.BindAddr = netip.MustParseAddrPort("0.0.0.0:7947") }, "advertise address is missing"},
		{"bad advertise", func(c *Config) { c.AdvertiseAddr = netip.MustParseAddrPort("0.0.0.0:1") }, "cannot connect"},
		{"not ours", func(c *Config) { c.BindAddr = netip.MustParseAddrPort("192.0.2.1:7947") }, "192.0.2.1:7947"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conf := good
			tc.change(&conf)
			n, err := New(conf)
			if err == nil {
				n.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %q does not mention %q", err, tc.want)
			}
		})
	}
}
