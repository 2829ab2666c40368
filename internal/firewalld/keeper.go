package firewalld

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// Names of firewalld on the bus, see firewalld.dbus(5).
const (
	busName      = "org.fedoraproject.FirewallD1"
	busPath      = "/org/fedoraproject/FirewallD1"
	main         = busName + "."
	zoneCalls    = busName + ".zone."
	ownerChanged = "org.freedesktop.DBus.NameOwnerChanged"
	already      = "ALREADY_ENABLED" // how its error text begins if a port is open
)

const (
	// lookEvery is how old what is known of the zones may be: devices move between
	// them by hand, and nodes join.
	lookEvery = 30 * time.Second
	// askEvery is for a node that does not know its device yet: all to it is rejected.
	askEvery = 2 * time.Second
	// callTime bounds one call. firewalld answers none while it reloads, which
	// takes it a second or two, and ten with thousands of rules.
	callTime = 20 * time.Second
	// maxSignals is how many wait; each only says "look again".
	maxSignals = 16
)

// Config is what a Keeper is made of.
type Config struct {
	Socket   string      // of the system bus
	Want     func() Want // must not block
	Reloaded func()      // firewalld has made all rules anew, perhaps without those of others
	Log      *slog.Logger
}

// Keeper keeps ports open. Its methods may be called from any goroutine; Run
// only once.
type Keeper struct {
	cfg Config

	mu    sync.Mutex // guards what follows; nothing is locked under it
	state string
	err   error
}

// New makes a Keeper; Run starts it.
func New(cfg Config) *Keeper { return &Keeper{cfg: cfg, state: absent} }

// absent is the state of a host without firewalld.
const absent = "firewalld: not running"

// State says what firewalld has for this node, and what it has refused, if anything.
func (k *Keeper) State() (string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.state, k.err
}

func (k *Keeper) set(state string, err error) {
	k.mu.Lock()
	news := err != nil && (k.err == nil || k.err.Error() != err.Error())
	k.state, k.err = state, err
	k.mu.Unlock()
	if news {
		k.cfg.Log.Warn("firewalld", "err", err)
	}
}

// Run works until ctx ends.
func (k *Keeper) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := k.session(ctx); err != nil && ctx.Err() == nil {
			k.set("firewalld: the system bus does not answer", fmt.Errorf("talk to the system bus: %w", err))
		}
		select {
		case <-ctx.Done():
		case <-time.After(lookEvery):
		}
	}
}

// session keeps ports open while the bus is there. Without one it is nil.
func (k *Keeper) session(ctx context.Context) error {
	if _, err := os.Stat(k.cfg.Socket); errors.Is(err, fs.ErrNotExist) {
		k.set(absent, nil)
		return nil
	}
	conn, err := dbus.Dial("unix:path=" + dbus.EscapeBusAddressValue(k.cfg.Socket))
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() }) // what waits for an answer ends
	defer stop()
	signals := make(chan *dbus.Signal, maxSignals)
	starting, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	if err := greet(starting, conn, signals); err != nil {
		return err
	}
	for {
		rest := lookEvery
		if !k.look(ctx, conn) {
			rest = askEvery
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(rest):
		case s, ok := <-signals:
			if !ok {
				return errors.New("the connection ended")
			}
			if s.Name == main+"Reloaded" || s.Name == ownerChanged {
				k.cfg.Reloaded()
			}
		}
	}
}

// greet makes the bus know us and send signals. What it calls has no time limit of its
// own: when ctx ends, the connection is closed.
func greet(ctx context.Context, conn *dbus.Conn, signals chan<- *dbus.Signal) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err := func() error {
		// Not by the user's name: a plugin has no list of users.
		if err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err != nil {
			return err
		}
		if err := conn.Hello(); err != nil {
			return err
		}
		conn.Signal(signals)
		for _, match := range [][]dbus.MatchOption{
			{dbus.WithMatchSender(busName)}, // reloaded, another zone for a device, a port closed
			{dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, busName)},
		} {
			if err := conn.AddMatchSignal(match...); err != nil {
				return err
			}
		}
		return nil
	}()
	if !stop() {
		return ctx.Err() // says more than that the connection is closed
	}
	return err
}

// look opens what is not open. It is false if firewalld runs and it is not known yet
// what to open.
func (k *Keeper) look(ctx context.Context, conn *dbus.Conn) bool {
	var there bool
	if err := call(ctx, conn.BusObject(), "org.freedesktop.DBus.NameHasOwner", busName).Store(&there); err != nil {
		k.set("firewalld: not known", fmt.Errorf("ask the system bus for firewalld: %w", err))
		return true
	}
	if !there {
		k.set(absent, nil)
		return true
	}
	return k.keep(ctx, conn.Object(busName, busPath))
}

// keep is look where firewalld runs.
func (k *Keeper) keep(ctx context.Context, o dbus.BusObject) bool {
	want := k.cfg.Want()
	if len(want.Ports) == 0 {
		k.set("firewalld: runs; nothing is opened while the device with this node's address is not known", nil)
		return false
	}
	names, err := k.open(ctx, o, want)
	if err != nil {
		k.set("firewalld: runs, and has not opened all of the nodes' ports", err)
		return true
	}
	ports := make([]string, 0, len(want.Ports))
	for _, p := range want.Ports {
		ports = append(ports, p.String())
	}
	k.set(fmt.Sprintf("firewalld: runs; %s open in zone %s", strings.Join(ports, " "), strings.Join(names, ", ")), nil)
	return true
}

// open opens what want misses, and returns the zones.
func (k *Keeper) open(ctx context.Context, o dbus.BusObject, want Want) ([]string, error) {
	var z zones
	if err := call(ctx, o, main+"getDefaultZone").Store(&z.standard); err != nil {
		return nil, fmt.Errorf("ask firewalld for its default zone: %w", err)
	}
	var active map[string]map[string][]string
	if err := call(ctx, o, zoneCalls+"getActiveZones").Store(&active); err != nil {
		return nil, fmt.Errorf("ask firewalld for its zones: %w", err)
	}
	z.active = make(map[string]zone, len(active))
	for name, a := range active {
		z.active[name] = zone{devices: a["interfaces"], sources: a["sources"]}
	}
	names := z.open(want)
	var failed []error // one zone may be broken, or refuse: the others are opened
	for _, name := range names {
		if err := k.openIn(ctx, o, name, want.Ports); err != nil {
			failed = append(failed, err)
			if silent(err) {
				break
			}
		}
	}
	return names, errors.Join(failed...)
}

// openIn opens what of ports a zone has not.
func (k *Keeper) openIn(ctx context.Context, o dbus.BusObject, zone string, ports []Port) error {
	var had [][]string
	if err := call(ctx, o, zoneCalls+"getPorts", zone).Store(&had); err != nil {
		return fmt.Errorf("ask firewalld for the ports of zone %s: %w", zone, err)
	}
	var failed []error
	for _, p := range missing(ports, had) {
		err := call(ctx, o, zoneCalls+"addPort", zone, strconv.Itoa(int(p.Number)), p.Proto, int32(0)).Err
		if err != nil && !strings.HasPrefix(err.Error(), already) {
			failed = append(failed, fmt.Errorf("open %s in zone %s of firewalld: %w", p, zone, err))
			if silent(err) {
				break
			}
			continue
		}
		k.cfg.Log.Info("port opened in firewalld", "op", p.String()+" in zone "+zone)
	}
	return errors.Join(failed...)
}

// silent says that nobody answers: to ask on would take callTime for each port.
func silent(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, dbus.ErrClosed)
}

// call asks and waits for the answer, within its time.
func call(ctx context.Context, o dbus.BusObject, method string, args ...any) *dbus.Call {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	return o.CallWithContext(ctx, method, 0, args...)
}
