package linux

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	mobyipvs "github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/kernel/kerneltest"
	"sluice/internal/model"
	"sluice/internal/netnstest"
)

// world plays everybody else on a host that is a namespace. It uses the commands
// ip, bridge and iptables, not the code under test.
type world struct {
	host *netnstest.NS
	dir  string // where namespaces are pinned
}

// in is the namespace of that name; empty is the host's.
func (w world) in(t *testing.T, ns string) *netnstest.NS {
	t.Helper()
	if ns == "" {
		return w.host
	}
	return netnstest.Open(t, filepath.Join(w.dir, ns))
}

// run runs a command line in a namespace; it must succeed. Words have no blanks.
func run(t testing.TB, ns *netnstest.NS, format string, args ...any) string {
	t.Helper()
	words := strings.Fields(fmt.Sprintf(format, args...))
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command(words[0], words[1:]...).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(words, " "), err, out)
	}
	return string(out)
}

func (w world) Spoil(t *testing.T, key kernel.Key, how kerneltest.Damage) {
	t.Helper()
	var ns *netnstest.NS
	if _, isTask := sandboxOf(key); !isTask {
		ns = w.in(t, key.Netns())
	}
	switch k := key.(type) {
	case kernel.Netns:
		if err := unix.Unmount(filepath.Join(w.dir, k.Name), unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	case kernel.Sysctl:
		ns.Must(func() error {
			value := "1"
			if strings.HasSuffix(k.Name, "route_localnet") || strings.HasSuffix(k.Name, "disable_ipv6") {
				value = "0"
			}
			return os.WriteFile("/proc/sys/"+strings.ReplaceAll(k.Name, ".", "/"), []byte(value), 0)
		})
	case kernel.Link:
		if how == kerneltest.Halved {
			run(t, w.host, "ip link set down slma")
			return
		}
		run(t, ns, "ip link %s", map[kerneltest.Damage]string{
			kerneltest.Deleted: "del " + k.Name,
			kerneltest.Down:    "set down " + k.Name,
			kerneltest.Changed: "set mtu 1300 dev " + k.Name,
		}[how])
	case kernel.Addr:
		run(t, ns, "ip addr del %s dev %s", k.Prefix, k.Dev)
	case kernel.Neigh:
		if how == kerneltest.Deleted {
			run(t, ns, "ip neigh del %s dev %s", k.IP, k.Dev)
		} else {
			run(t, ns, "ip neigh replace %s dev %s lladdr 02:00:00:00:00:99 nud permanent", k.IP, k.Dev)
		}
	case kernel.Route:
		table := "main"
		if k.NS != "" {
			table = "local"
		}
		run(t, ns, "ip route del %s dev %s table %s", k.Prefix, k.Dev, table)
	case kernel.Forward, kernel.BackTable, kernel.Back, kernel.TaskRoute, kernel.TaskMesh, kernel.MeshTable, kernel.MeshPort, kernel.MeshRange, kernel.MeshNet, kernel.MeshAllow:
		w.spoilMesh(t, ns, key, how)
	case kernel.FDB:
		if k.Dev == "mesh0" {
			run(t, ns, "bridge fdb del %s dev %s master", k.MAC, k.Dev)
			return
		}
		switch how {
		case kerneltest.Deleted:
			run(t, ns, "bridge fdb del %s dev %s self", k.MAC, k.Dev)
			run(t, ns, "bridge fdb del %s dev %s master", k.MAC, k.Dev)
		case kerneltest.Halved:
			run(t, ns, "bridge fdb del %s dev %s master", k.MAC, k.Dev)
		default:
			run(t, ns, "bridge fdb replace %s dev %s dst 192.0.2.77 self permanent", k.MAC, k.Dev)
		}
	case kernel.Filter:
		w.spoilFilter(t, how)
	case kernel.FilterPeer:
		run(t, ns, "iptables -D SLUICE-VXLAN -s %s -j ACCEPT", k.VTEP)
	case kernel.BridgeTable:
		run(t, ns, "nft delete table bridge sluice")
	case kernel.MarkTable:
		run(t, ns, "nft delete table ip sluice")
	case kernel.Real:
		run(t, ns, "nft delete element bridge sluice real { %s }", k.MAC)
	case kernel.LiftTable:
		run(t, ns, "nft delete table bridge sluice-lift")
	case kernel.GuardTable:
		run(t, ns, "nft delete table bridge sluice-guard")
	case kernel.GuardPort:
		w.spoilGuard(t, ns, "ports", k.Dev, how)
	case kernel.GuardAddr:
		w.spoilGuard(t, ns, "addresses", k.Dev+" . "+k.IP.String(), how)
	case kernel.LiftTo:
		run(t, ns, "nft delete element bridge sluice-lift to { %s }", k.IP)
	case kernel.Mark: // of a port
		run(t, ns, "nft delete element ip sluice port-marks { %s . %s . %d }", k.VIP, k.Proto, k.Port)
	case kernel.IPVSTimeouts, kernel.IPVSService, kernel.IPVSDest:
		w.spoilIPVS(t, ns, key, how)
	case kernel.Port:
		run(t, ns, "nft delete element bridge sluice ports { %s . %s . %d }", k.VIP, k.Proto, k.Port)
	case kernel.TaskPort:
		run(t, w.task(t), "nft delete element ip sluice in-ports { %s . %s . %d }", k.VIP, k.Proto, k.Port)
	case kernel.TaskTunnel:
		w.spoilTunnel(t, k, how)
	case kernel.TaskTable:
		run(t, w.task(t), "nft delete table ip sluice")
	default:
		t.Fatalf("spoil %s: no way known", key)
	}
}

// spoilGuard takes the elements of a map away that begin with key, which is how
// nft prints them, or gives them another MAC.
func (w world) spoilGuard(t *testing.T, ns *netnstest.NS, set, key string, how kerneltest.Damage) {
	t.Helper()
	list := run(t, ns, "nft list map bridge sluice-guard %s", set)
	_, list, _ = strings.Cut(list, "elements = {")
	list, _, _ = strings.Cut(list, "}")
	for elem := range strings.SplitSeq(list, ",") {
		elem = strings.TrimSpace(elem)
		at, data, _ := strings.Cut(elem, " : ")
		if !strings.HasPrefix(strings.ReplaceAll(at, "\"", ""), key) {
			continue
		}
		run(t, ns, "nft delete element bridge sluice-guard %s { %s }", set, at)
		if how == kerneltest.Changed {
			at = at[:strings.LastIndex(at, " . ")] + " . 02:00:00:00:00:99"
			run(t, ns, "nft add element bridge sluice-guard %s { %s : %s }", set, at, data)
		}
		return
	}
	t.Fatalf("map %s has no element %s: %s", set, key, list)
}

func (w world) spoilMesh(t *testing.T, ns *netnstest.NS, key kernel.Key, how kerneltest.Damage) {
	t.Helper()
	switch k := key.(type) {
	case kernel.Forward:
		switch how {
		case kerneltest.Deleted:
			run(t, ns, "iptables -F FORWARD")
		case kerneltest.Flushed:
			run(t, ns, "iptables -F SLUICE-MESH")
		case kerneltest.Reordered:
			run(t, ns, "iptables -I FORWARD -j DROP")
			t.Cleanup(func() { run(t, ns, "iptables -D FORWARD -j DROP") })
		case kerneltest.Intruded:
			run(t, ns, "iptables -I SLUICE-MESH 2 -s 203.0.113.0/24 -j ACCEPT")
		}
	case kernel.BackTable:
		run(t, ns, "nft delete table bridge sluice-back")
	case kernel.Back:
		run(t, ns, "nft delete element bridge sluice-back entries { %s }", k.Block)
	case kernel.TaskRoute:
		switch how {
		case kerneltest.Deleted:
			run(t, w.task(t), "ip rule del from %s", k.Addr)
		case kerneltest.Halved:
			run(t, w.task(t), "ip route del default table %d", tableOf(k.Addr))
		case kerneltest.Changed:
			run(t, w.task(t), "ip route change default via 10.255.0.9 dev eth0 proto 115 table %d", tableOf(k.Addr))
		}
	case kernel.TaskMesh: // of UDP
		run(t, w.task(t), "nft flush chain ip sluice reply")
	case kernel.MeshTable:
		if how == kerneltest.Flushed {
			run(t, ns, "nft flush chain ip sluice-mesh forward")
			return
		}
		run(t, ns, "nft delete table ip sluice-mesh")
	case kernel.MeshPort:
		run(t, ns, "nft delete element ip sluice-mesh published { %s . %d }", k.Proto, k.Port)
	case kernel.MeshRange:
		run(t, ns, "nft flush map ip sluice-mesh %s-ranges; flush map ip sluice-mesh %[1]s-ranges-2", k.Proto)
	case kernel.MeshNet:
		run(t, ns, "nft flush chain ip sluice-mesh net-%s", k.Dev)
	case kernel.MeshAllow:
		run(t, ns, "nft flush chain ip sluice-mesh allow-%s", k.Alias)
	}
}

func (w world) spoilFilter(t *testing.T, how kerneltest.Damage) {
	t.Helper()
	switch how {
	case kerneltest.Flushed:
		run(t, w.host, "iptables -F SLUICE-VXLAN")
	case kerneltest.Reordered:
		run(t, w.host, "iptables -D SLUICE-VXLAN -j DROP")
		run(t, w.host, "iptables -I SLUICE-VXLAN -j DROP")
	case kerneltest.Intruded:
		run(t, w.host, "iptables -I SLUICE-VXLAN 2 -s 203.0.113.0/24 -j ACCEPT")
	case kerneltest.Deleted:
		run(t, w.host, "iptables -F INPUT")
	}
}

func (w world) spoilIPVS(t *testing.T, ns *netnstest.NS, key kernel.Key, how kerneltest.Damage) {
	t.Helper()
	h, err := mobyipvs.New(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	switch k := key.(type) {
	case kernel.IPVSTimeouts:
		err = h.SetConfig(&mobyipvs.Config{TimeoutTCP: 77 * time.Second})
	case kernel.IPVSService:
		s := &mobyipvs.Service{AddressFamily: unix.AF_INET, FWMark: k.Mark, SchedName: "dh", Netmask: 0xffffffff}
		if how == kerneltest.Deleted {
			err = h.DelService(s)
		} else {
			err = h.UpdateService(s)
		}
	case kernel.IPVSDest:
		s := &mobyipvs.Service{AddressFamily: unix.AF_INET, FWMark: k.Mark}
		d := &mobyipvs.Destination{Address: k.IP.AsSlice(), Port: k.Port, Weight: 77, ConnectionFlags: mobyipvs.ConnFwdDirectRoute}
		if how == kerneltest.Deleted {
			err = h.DelDestination(s, d)
		} else {
			err = h.UpdateDestination(s, d)
		}
	}
	if err != nil {
		t.Fatalf("spoil %s: %v", key, err)
	}
}

func (w world) spoilTunnel(t *testing.T, k kernel.TaskTunnel, how kerneltest.Damage) {
	t.Helper()
	task, name := w.task(t), tunnelName(k.Addr)
	switch how {
	case kerneltest.Deleted:
		run(t, task, "ip link del %s", name)
	case kerneltest.Down:
		run(t, task, "ip link set %s down", name)
	case kerneltest.Changed:
		task.Must(func() error { return writeSysctl("net.ipv4.conf."+name+".rp_filter", "1") })
	case kerneltest.Halved:
		run(t, task, "ip addr flush dev %s", name)
	case kerneltest.Replaced:
		run(t, task, "ip tunnel change %s mode ipip local 10.255.0.99", name)
	}
}

func (w world) Take(t *testing.T, _ kernel.Link, peer string) {
	t.Helper()
	task := netnstest.New(t)
	run(t, w.host, "ip link set %s netns %s", peer, task.Path())
	run(t, task, "ip link set %s name eth0 up", peer)
}

func (w world) AddVXLAN(t *testing.T, name string, vni model.VNI, port uint16) {
	t.Helper()
	run(t, w.host, "ip link add %s type vxlan id %d dstport %d local 192.0.2.1", name, vni, port)
}

// AddForeign puts devices, entries, rules and a namespace of others beside ours.
func (w world) AddForeign(t *testing.T, ns string) func(*testing.T) {
	t.Helper()
	in := w.in(t, ns)
	run(t, in, "ip link add other0 type bridge")
	run(t, in, "ip addr add 198.51.100.1/24 dev other0")
	run(t, in, "ip link set other0 up")
	run(t, in, "ip neigh add 198.51.100.9 dev other0 lladdr 02:00:00:00:00:09 nud permanent")
	run(t, w.host, "ip link add slcforeign type veth peer name slvforeign")
	run(t, w.host, "ip link add br9 type bridge")
	run(t, w.host, "ip link set br9 alias sluicelike")
	run(t, w.host, "iptables -N OTHER-CHAIN")
	run(t, w.host, "iptables -I INPUT -p udp -m udp --dport 4789 -j OTHER-CHAIN")
	pinned := filepath.Join(w.dir, "other-ns")
	if err := os.WriteFile(pinned, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(netnstest.New(t).Path(), pinned, "none", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	return func(t *testing.T) {
		t.Helper()
		run(t, in, "ip link show other0")
		if !strings.Contains(run(t, in, "ip neigh show dev other0"), "198.51.100.9") {
			t.Error("foreign neighbour has gone")
		}
		run(t, w.host, "ip link show slcforeign")
		run(t, w.host, "ip link show br9")
		run(t, w.host, "iptables -C INPUT -p udp -m udp --dport 4789 -j OTHER-CHAIN")
		if _, err := statNetns(pinned); err != nil {
			t.Errorf("foreign namespace: %v", err)
		}
	}
}

func (w world) task(t *testing.T) *netnstest.NS {
	return netnstest.Open(t, filepath.Join(w.dir, "task"))
}

func (w world) Sandbox(t *testing.T) string {
	t.Helper()
	path := filepath.Join(w.dir, "task")
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	// With devices as the engine leaves them: one on a network, one to the outside.
	task := netnstest.New(t)
	run(t, task, "ip link add eth0 type veth peer name eth1")
	run(t, task, "ip addr add 10.255.0.2/20 dev eth0")
	run(t, task, "ip addr add 172.18.0.3/16 dev eth1")
	run(t, task, "ip link set eth0 up")
	run(t, task, "ip link set eth1 up")
	run(t, task, "ip route add default via 172.18.0.1")
	if err := unix.Mount(task.Path(), path, "none", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	return path
}

// newHost is a host of its own: a namespace with the address 192.0.2.1, and a
// kernel on it.
func newHost(t testing.TB, tables Tables) (*Kernel, world) {
	t.Helper()
	netnstest.Need(t, netnstest.Root, netnstest.Bridge, netnstest.Veth, netnstest.VXLAN, netnstest.IPTables)
	return newKernel(t, netnstest.LAN(t, 1)[0].NS, tables)
}

func newKernel(t testing.TB, host *netnstest.NS, tables Tables) (*Kernel, world) {
	t.Helper()
	w := world{host: host, dir: netnstest.Dir(t)}
	k, err := New(Config{NetnsDir: w.dir, HostNetns: host.Path(), Tables: tables})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return k, w
}

// hostNames are the names of the devices of a namespace.
func names(t testing.TB, ns *netnstest.NS) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	ns.Must(func() error {
		ifs, err := net.Interfaces()
		for _, i := range ifs {
			out[i.Name] = true
		}
		return err
	})
	return out
}
