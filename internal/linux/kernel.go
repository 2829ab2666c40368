package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// Marks of ownership that the host can see. The plan uses the same ones.
const (
	// aliasPrefix starts the ifalias of every device of ours; the network's or
	// endpoint's id follows.
	aliasPrefix = "sluice "
	// defaultNetnsPrefix starts the names of our namespaces.
	defaultNetnsPrefix = "sluice-"
	// defaultMeshPrefix starts the names of the host's ends of networks that
	// published ports lead into; the network's short id follows.
	defaultMeshPrefix = "slm"
	// defaultLinkPrefix starts the names of the containers' ends in the host's
	// namespace. Three letters leave twelve of the fifteen that a device name
	// may have (IFNAMSIZ) for the endpoint's short id.
	defaultLinkPrefix = "slc"
)

// Tables reads and changes nftables inside namespaces. sluice/internal/linux/nft
// implements it; the namespace is given as an open descriptor, which stays the
// caller's and is valid for the length of the call only.
type Tables interface {
	// DumpBridge returns the PhaseVIP objects of the namespace called ns.
	DumpBridge(nsFD int, ns string) (kernel.State, error)
	// ApplyBridge does all ops, which are PhaseVIP objects of ns, in one transaction.
	ApplyBridge(nsFD int, ns string, ops []kernel.Op) error
	// DumpTask returns the PhaseTask objects of a task's namespace; sandbox is
	// the path it was opened by.
	DumpTask(nsFD int, sandbox string) (kernel.State, error)
	// ApplyTask does all ops, which are PhaseTask objects of sandbox, in one transaction.
	ApplyTask(nsFD int, sandbox string, ops []kernel.Op) error
	// DumpHost returns the PhaseGuard and PhaseMesh objects of the host's namespace.
	DumpHost(nsFD int) (kernel.State, error)
	// ApplyHost does all ops, which are of these phases, in as few transactions as it can.
	ApplyHost(nsFD int, ops []kernel.Op) error
}

// IPVS reads and changes IPVS inside namespaces. sluice/internal/linux/ipvs
// implements it; the namespace is given as for Tables.
type IPVS interface {
	// Dump returns the objects of IPVS of the namespace called ns.
	Dump(nsFD int, ns string) (kernel.State, error)
	// Apply does ops, which are objects of IPVS of ns, in order; there is an
	// error, or nil, for each.
	Apply(nsFD int, ns string, ops []kernel.Op) []error
	// Traffic returns the counters of what Dump returns. It may be called at any
	// time, also while another goroutine is in Dump or Apply.
	Traffic(nsFD int, ns string) (map[kernel.Key]kernel.Traffic, error)
}

// Config is what New needs.
type Config struct {
	// NetnsDir is where namespaces are pinned, such as /run/netns; below
	// another root if the host's /run is mounted elsewhere.
	NetnsDir string
	// HostNetns is the path of the host's network namespace; empty means the
	// namespace that New is called in.
	HostNetns string
	// NetnsPrefix starts the names of our namespaces; empty means "sluice-".
	// Two plugins on one host need prefixes of which neither starts the other.
	NetnsPrefix string
	// LinkPrefix starts the names of containers' ends; empty means "slc". Two
	// plugins on one host need different ones.
	LinkPrefix string
	// MeshPrefix starts the names of the host's ends of networks; empty means "slm".
	// Two plugins on one host need different ones.
	MeshPrefix string
	// NoFilter leaves the host's chains and tables alone: they belong to another plugin on this
	// host. Two that share them would undo each other's work.
	NoFilter bool
	// Tables changes nftables. Without it, dumps hold no PhaseGuard, PhaseVIP, PhaseMesh
	// and PhaseTask objects but tunnels and routes, and applying one is kernel.ErrUnsupported.
	Tables Tables
	// IPVS changes IPVS. Without it, or on a kernel that lacks IPVS, dumps hold
	// no objects of IPVS and applying one is kernel.ErrUnsupported.
	IPVS IPVS
	Log  *slog.Logger
}

// Kernel is the kernel of one host. It is safe for concurrent use; calls of Dump
// and Apply wait for each other.
type Kernel struct {
	cfg  Config
	log  *slog.Logger
	self *os.File // the namespace threads of this process belong to
	host *space

	// mu guards what follows and makes Dump and Apply exclude each other.
	// Rank 1: watcher.mu may be taken while it is held.
	mu     sync.Mutex
	spaces map[string]*space // our namespaces that are open, by name
	filter filter
	watch  *watcher // nil while nobody watches
	closed bool
}

// space is an open network namespace with its netlink socket. Both keep the
// namespace alive, so a space is closed before its namespace is deleted, and as
// soon as a dump sees that it has gone.
type space struct {
	name string // empty: the host's
	file *os.File
	id   nsID
	conn *conn
	// hostID is the number by which links here name the host's namespace
	// (ip-netns(8), list-id); -1: none yet.
	hostID int
	sysctl map[string]bool // names set by us
	// devices are those looked up in this Apply: a thousand forwarding entries
	// are for one device. Whoever changes a link here forgets what is stale.
	devices map[string]device
}

// nsID tells namespaces apart: device and inode of the nsfs file.
type nsID struct{ dev, ino uint64 }

// New opens the host's namespace. It changes nothing.
func New(cfg Config) (*Kernel, error) {
	if cfg.NetnsDir == "" {
		return nil, errors.New("open kernel: no directory for network namespaces is given")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.NetnsPrefix == "" {
		cfg.NetnsPrefix = defaultNetnsPrefix
	}
	if cfg.LinkPrefix == "" {
		cfg.LinkPrefix = defaultLinkPrefix
	}
	if cfg.MeshPrefix == "" {
		cfg.MeshPrefix = defaultMeshPrefix
	}
	self, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open own network namespace: %w", err)
	}
	k := &Kernel{cfg: cfg, log: cfg.Log, self: self, spaces: map[string]*space{}}
	path := cfg.HostNetns
	if path == "" {
		path = fmt.Sprintf("/proc/self/fd/%d", self.Fd())
	}
	k.host, err = k.openSpace("", path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the host's network namespace: %w", err), self.Close())
	}
	return k, nil
}

// Close ends the watch and releases sockets and descriptors. What is in the
// kernel stays.
func (k *Kernel) Close() error {
	k.mu.Lock()
	if k.closed {
		k.mu.Unlock()
		return nil
	}
	k.closed = true
	w := k.watch
	k.mu.Unlock()
	if w != nil {
		w.stop() // waits for goroutines that may want mu: not under it
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	errs := []error{k.host.close(), k.self.Close()}
	for name, s := range k.spaces {
		errs = append(errs, s.close())
		delete(k.spaces, name)
	}
	return errors.Join(errs...)
}

// path is where the namespace called name is pinned.
func (k *Kernel) path(name string) string { return filepath.Join(k.cfg.NetnsDir, name) }

// openSpace opens the namespace at path and a netlink socket in it.
func (k *Kernel) openSpace(name, path string) (*space, error) {
	f, id, err := openNetns(path)
	if err != nil {
		return nil, err
	}
	s := &space{name: name, file: f, id: id, hostID: -1, sysctl: map[string]bool{}, devices: map[string]device{}}
	err = k.within(s, func() error {
		s.conn, err = dial()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

// spaceLocked returns the open namespace called name, opening it if needed; empty
// is the host. It is kernel.ErrNotExist if there is none.
func (k *Kernel) spaceLocked(name string) (*space, error) {
	if k.closed {
		return nil, fs.ErrClosed
	}
	if name == "" {
		return k.host, nil
	}
	if !k.owns(name) {
		return nil, fmt.Errorf("namespace %q is not sluice's: want a plain name that starts with %q", name, k.cfg.NetnsPrefix)
	}
	id, err := statNetns(k.path(name))
	if s := k.spaces[name]; s != nil {
		if err == nil && s.id == id {
			return s, nil
		}
		k.dropLocked(name) // gone, or another one under the old name
	}
	if err != nil {
		return nil, fmt.Errorf("namespace %s: %w", name, err)
	}
	s, err := k.openSpace(name, k.path(name))
	if err != nil {
		return nil, fmt.Errorf("open namespace %s: %w", name, err)
	}
	k.spaces[name] = s
	if k.watch != nil {
		k.watch.addOrWarn(s)
	}
	return s, nil
}

// dropLocked closes what is open of the namespace called name.
func (k *Kernel) dropLocked(name string) {
	s := k.spaces[name]
	if s == nil {
		return
	}
	delete(k.spaces, name)
	if k.watch != nil {
		k.watch.remove(name)
	}
	if err := s.close(); err != nil {
		k.log.Warn("close namespace", "op", name, "err", err)
	}
}

func (s *space) close() error {
	s.conn.close()
	return s.file.Close()
}

func (s *space) fd() int { return int(s.file.Fd()) }

// namesLocked lists our namespaces: entries with our prefix on which a network
// namespace is mounted. It closes those that have gone.
func (k *Kernel) namesLocked() ([]string, error) {
	all, err := readNames(k.cfg.NetnsDir)
	if err != nil {
		return nil, err
	}
	var names []string
	there := map[string]bool{}
	for _, name := range all {
		if !k.owns(name) {
			continue
		}
		// A stale file without a mount is no namespace.
		if _, err := statNetns(k.path(name)); err != nil {
			if errors.Is(err, kernel.ErrNotExist) {
				continue
			}
			return nil, fmt.Errorf("list network namespaces: %w", err)
		}
		names = append(names, name)
		there[name] = true
	}
	for name := range k.spaces {
		if !there[name] {
			k.dropLocked(name)
		}
	}
	return names, nil
}

// owns reports whether a namespace of that name is ours. It also keeps a name
// from pointing out of the directory.
func (k *Kernel) owns(name string) bool {
	return strings.HasPrefix(name, k.cfg.NetnsPrefix) && filepath.Base(name) == name
}

// readNames lists a directory; one that is missing is empty.
func readNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, nil
}

// hint says what a person can do about an error of the kernel, as the end of a text.
func hint(err error) string {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return " (sluice needs the capabilities NET_ADMIN and SYS_ADMIN)"
	case errors.Is(err, unix.EROFS):
		return " (/proc/sys is read-only: sluice needs the capability SYS_ADMIN to remount it)"
	case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.ENOMEM):
		return " (the kernel is out of memory for network objects)"
	}
	return ""
}
