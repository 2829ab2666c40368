package firewalld

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// daemon answers for firewalld; a method that it does not know is a nil dereference.
type daemon struct {
	dbus.BusObject
	zones  map[string]map[string][]string
	refuse func(method string, args []any) error // nil: nothing
	asked  int
	opened []string // zone and port
}

func (d *daemon) CallWithContext(_ context.Context, method string, _ dbus.Flags, args ...any) *dbus.Call {
	d.asked++
	if d.refuse != nil {
		if err := d.refuse(method, args); err != nil {
			return &dbus.Call{Err: err}
		}
	}
	switch method {
	case main + "getDefaultZone":
		return &dbus.Call{Body: []any{"public"}}
	case zoneCalls + "getActiveZones":
		return &dbus.Call{Body: []any{d.zones}}
	case zoneCalls + "getPorts":
		return &dbus.Call{Body: []any{[][]string{}}}
	case zoneCalls + "addPort":
		d.opened = append(d.opened, args[0].(string)+" "+args[1].(string)+"/"+args[2].(string))
		return &dbus.Call{}
	}
	return &dbus.Call{Err: errors.New("no such method")}
}

func TestNothingIsOpenedByGuess(t *testing.T) {
	d := &daemon{}
	k := New(Config{Want: func() Want { return Want{} }, Log: slog.New(slog.DiscardHandler)})
	if k.keep(t.Context(), d) || d.asked > 0 {
		t.Errorf("asked %d times, opened %v", d.asked, d.opened)
	}
	if state, err := k.State(); err != nil || state != "firewalld: runs; nothing is opened while the device with this node's address is not known" {
		t.Errorf("state: %q, %v", state, err)
	}
	k.cfg.Want = func() Want { return Want{Ports: []Port{{4799, "udp"}}, Device: "eth0"} }
	if !k.keep(t.Context(), d) || len(d.opened) != 1 || d.opened[0] != "public 4799/udp" {
		t.Errorf("opened %v", d.opened)
	}
}

// What firewalld refuses for one port or zone keeps no other closed; if it does not
// answer, it is not asked on.
func TestOneRefusalEndsNoRound(t *testing.T) {
	ports := []Port{{4799, "udp"}, {7947, "tcp"}}
	want := Want{Ports: ports, Device: "eth0", Peers: []netip.Addr{netip.MustParseAddr("192.0.2.2")}}
	refusal := errors.New("INVALID_ZONE")
	for _, c := range []struct {
		name   string
		method string
		zone   string
		port   string // empty: any
		err    error
		opened []string
		failed string
	}{
		{"a port", zoneCalls + "addPort", "a", "4799", refusal, []string{"a 7947/tcp", "b 4799/udp", "b 7947/tcp"}, "open 4799/udp in zone a of firewalld: INVALID_ZONE"},
		{"a zone's ports", zoneCalls + "addPort", "a", "", refusal, []string{"b 4799/udp", "b 7947/tcp"}, "open 4799/udp in zone a of firewalld: INVALID_ZONE\nopen 7947/tcp in zone a of firewalld: INVALID_ZONE"},
		{"a zone's list", zoneCalls + "getPorts", "a", "", refusal, []string{"b 4799/udp", "b 7947/tcp"}, "ask firewalld for the ports of zone a: INVALID_ZONE"},
		{"the last zone", zoneCalls + "getPorts", "b", "", refusal, []string{"a 4799/udp", "a 7947/tcp"}, "ask firewalld for the ports of zone b: INVALID_ZONE"},
		{"open already", zoneCalls + "addPort", "a", "", errors.New(already + ": '4799:udp' already in 'a'"), []string{"b 4799/udp", "b 7947/tcp"}, ""},
		{"no answer", zoneCalls + "addPort", "a", "7947", context.DeadlineExceeded, []string{"a 4799/udp"}, "open 7947/tcp in zone a of firewalld: context deadline exceeded"},
	} {
		d := &daemon{zones: map[string]map[string][]string{"a": {"interfaces": {"eth0"}}, "b": {"sources": {"192.0.2.0/24"}}}}
		d.refuse = func(method string, args []any) error {
			if method == c.method && args[0] == c.zone && (c.port == "" || args[1] == c.port) {
				return c.err
			}
			return nil
		}
		k := New(Config{Want: func() Want { return want }, Log: slog.New(slog.DiscardHandler)})
		k.keep(t.Context(), d)
		failed := ""
		if _, err := k.State(); err != nil {
			failed = err.Error()
		}
		if !slices.Equal(d.opened, c.opened) || failed != c.failed {
			t.Errorf("%s: opened %v, want %v; failed %q, want %q", c.name, d.opened, c.opened, failed, c.failed)
		}
	}
}

// A bus that hangs at its start is left, wherever it does.
func TestSilentBusIsLeft(t *testing.T) {
	for _, c := range []struct {
		name    string
		answers int // lines until it is silent
	}{{"at once", 0}, {"asked to let us in", 1}, {"asked for our name", 100}} {
		t.Run(c.name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			begun := make(chan bool, 1)
			go func() { // ends with the pipe
				in := bufio.NewReader(theirs)
				for n := 0; ; n++ {
					line, err := in.ReadString('\n')
					if err != nil {
						return
					}
					if n >= c.answers {
						continue
					}
					answer := "OK 0123456789abcdef0123456789abcdef"
					switch line = strings.TrimLeft(line, "\x00"); {
					case line == "AUTH\r\n":
						answer = "REJECTED EXTERNAL"
					case line == "BEGIN\r\n":
						begun <- true
						continue
					}
					if _, err := fmt.Fprintf(theirs, "%s\r\n", answer); err != nil {
						return
					}
				}
			}()
			conn, err := dbus.NewConn(ours)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := greet(ctx, conn, make(chan *dbus.Signal, 1)); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v, want that its time is over", err)
			}
			if got := len(begun) > 0; got != (c.answers == 100) {
				t.Errorf("let in: %v", got)
			}
		})
	}
}
