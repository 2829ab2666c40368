package gossip

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"time"
)

// until polls in real time.
func until(t *testing.T, bound time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(bound)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within %v", what, bound)
		}
	}
}

func TestThreeNodesOverUDP(t *testing.T) {
	before := runtime.NumGoroutine()
	loopback := netip.MustParseAddrPort("127.0.0.1:0")
	var nodes []*Node
	for i := range 3 {
		conf := Config{Name: nodeName(i), Incarnation: 1, BindAddr: loopback, Keys: [][]byte{keyA}}
		if i > 0 {
			conf.Seeds = []netip.AddrPort{nodes[0].Addr()}
		}
		n, err := New(conf)
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		nodes = append(nodes, n)
	}
	sees := func(n *Node, owner, key, value string) func() bool {
		return func() bool { return string(n.Snapshot()[owner].Entries[key]) == value }
	}
	for _, n := range nodes {
		until(t, 10*time.Second, "all are members", func() bool { return n.Status().Peers == 2 })
	}
	start := time.Now()
	if err := nodes[1].Put("small", []byte("v")); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "a packet arrives", sees(nodes[2], "n01", "small", "v"))
	t.Logf("small value after %v", time.Since(start))

	large := strings.Repeat("v", 20<<10)
	start = time.Now()
	if err := nodes[1].Put("large", []byte(large)); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "a stream arrives", sees(nodes[2], "n01", "large", large))
	t.Logf("large value after %v", time.Since(start))

	bulk := make(map[string][]byte)
	for i := range 5000 {
		bulk[fmt.Sprint("k", i)] = bytes.Repeat([]byte{'x'}, 300)
	}
	if err := nodes[0].Replace(bulk); err != nil {
		t.Fatal(err)
	}
	until(t, 10*time.Second, "a bulk load arrives", func() bool { return len(nodes[2].Snapshot()["n00"].Entries) == len(bulk) })

	junk, err := net.Dial("udp", nodes[0].Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer junk.Close()
	for _, b := range [][]byte{{0}, []byte("not encrypted"), bytes.Repeat([]byte{1}, 2000)} {
		if _, err := junk.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if err := nodes[2].Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, 5*time.Second, "the table of one that left is gone", func() bool {
		_, ok := nodes[0].Snapshot()["n02"]
		return !ok
	})
	for _, n := range nodes {
		start := time.Now()
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("Close took %v", took)
		}
	}
	until(t, linger, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
}

func TestCloseDoesNotWaitForASilentPeer(t *testing.T) {
	before := runtime.NumGoroutine()
	// Accepts and never answers.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	n, err := New(Config{
		Name: "n", BindAddr: netip.MustParseAddrPort("127.0.0.1:0"), Keys: [][]byte{keyA},
		Seeds: []netip.AddrPort{l.Addr().(*net.TCPAddr).AddrPort()},
	})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	start := time.Now()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("Close took %v", took)
	}
	until(t, linger, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before })
}

func TestPortInUseIsSaid(t *testing.T) {
	first, err := New(Config{Name: "a", BindAddr: netip.MustParseAddrPort("127.0.0.1:0"), Keys: [][]byte{keyA}})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	_, err = New(Config{Name: "b", BindAddr: first.Addr(), Keys: [][]byte{keyA}})
	if err == nil || !strings.Contains(err.Error(), first.Addr().String()) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("error %v does not name the address and the reason", err)
	}
}

func TestMemberlistLinesGetTheirLevel(t *testing.T) {
	var out bytes.Buffer
	drop := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	l := memberlistLogger(t.Context(), slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: drop})))
	for _, line := range []string{"[DEBUG] memberlist: a", "[INFO] memberlist: b", "[WARN] memberlist: c", "[ERR] memberlist: d", "[ERR] e", "Err: f", "[", ""} {
		if _, err := io.WriteString(l.Writer(), line+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	want := `level=DEBUG msg=memberlist text=a
level=INFO msg=memberlist text=b
level=WARN msg=memberlist text=c
level=WARN msg=memberlist text=d
level=WARN msg=memberlist text=e
level=INFO msg=memberlist text="Err: f"
level=INFO msg=memberlist text=[
level=INFO msg=memberlist text=""
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}
