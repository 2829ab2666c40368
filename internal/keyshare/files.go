package keyshare

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Where swarm keeps what a node proves itself with, below the engine's data
// directory (moby daemon/cluster, swarmkit node/node.go and ca/config.go).
const (
	certFile  = "swarm/certificates/swarm-node.crt"
	keyFile   = "swarm/certificates/swarm-node.key"
	rootsFile = "swarm/certificates/swarm-root-ca.crt"
)

// maxFile bounds each of them. A certificate of swarm's is 1 KiB; a few come
// together while a CA is replaced.
const maxFile = 256 << 10

// fresh is for how long what was read serves: whoever reaches the port could have
// the files read, and the engine's socket dialled, with each connection. Swarm
// renews certificates long before they end, and an old one is good until then.
const fresh = 5 * time.Second

// Files reads the identity of the node from where its engine keeps it. Its methods
// may be called from any goroutine.
type Files struct {
	// Socket is the path of the engine's socket: the process that listens there has
	// the view of the file system that DataRoot is a path in.
	Socket string
	// Proc is where /proc is, of the process namespace in which the engine is.
	Proc string
	// DataRoot is the engine's data directory by its own word; empty if not known.
	DataRoot func() string

	// mu guards what follows, and is held while the files are read.
	mu   sync.Mutex
	last Identity
	from string // the directory
	at   time.Time
}

// Read returns the identity; it may be some seconds old. An error says what is
// missing. It is ErrLocked if the key is encrypted.
func (f *Files) Read() (Identity, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := f.DataRoot()
	if dir == "" {
		return Identity{}, errors.New("the engine has not told its data directory yet")
	}
	now := time.Now()
	if f.from == dir && now.Sub(f.at) < fresh && now.Before(f.last.ends) {
		return f.last, nil
	}
	id, err := f.read(dir)
	if err != nil {
		return Identity{}, err
	}
	if !now.Before(id.ends) {
		return Identity{}, fmt.Errorf("this node's certificate of the swarm ended at %s; is the clock right? docker node ls on a manager tells whether the node is in contact", id.ends.UTC().Format(time.RFC3339))
	}
	f.last, f.from, f.at = id, dir, now
	return id, nil
}

func (f *Files) read(dir string) (Identity, error) {
	pid, err := listener(f.Socket)
	if err != nil {
		return Identity{}, err
	}
	// An os.Root, so that no link in the engine's files leads to this process's own.
	root, err := os.OpenRoot(filepath.Join(f.Proc, strconv.Itoa(pid), "root"))
	if err != nil {
		return Identity{}, fmt.Errorf("look into the engine's process: %w%s", err, advice(err))
	}
	defer root.Close()
	var texts [3][]byte
	for i, name := range []string{certFile, keyFile, rootsFile} {
		if texts[i], err = readFile(root, filepath.Join(dir, name)); err != nil {
			return Identity{}, fmt.Errorf("read the node's identity in the swarm: %w", err)
		}
	}
	// The first two may be of different pairs in the moment in which swarm renews
	// them: an error, and right when they are read again.
	id, err := Parse(texts[0], texts[1], texts[2])
	if err != nil {
		return Identity{}, fmt.Errorf("read the node's identity in the swarm: %w", err)
	}
	return id, nil
}

// listener is the process that listens on a socket: the engine, or the one that
// has handed it over to the engine (pid 1, with systemd's socket activation),
// which sees the host's files as well.
func listener(socket string) (int, error) {
	c, err := net.DialTimeout("unix", socket, time.Second) // the kernel answers, not the engine
	if err != nil {
		return 0, fmt.Errorf("find the engine's process: %w", err)
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("find the engine's process: %w", err)
	}
	var cred *syscall.Ucred
	var refused error
	if err := raw.Control(func(fd uintptr) {
		cred, refused = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil || refused != nil {
		return 0, fmt.Errorf("find the engine's process: %w", errors.Join(err, refused))
	}
	if cred.Pid <= 0 {
		return 0, errors.New("find the engine's process: it is not in the process namespace of this plugin, which needs the host's (pidhost); install the plugin anew, with the privileges that it asks for")
	}
	return int(cred.Pid), nil
}

func advice(err error) string {
	if errors.Is(err, fs.ErrPermission) {
		return " (sluice needs the capability SYS_PTRACE; install the plugin anew, with the privileges that it asks for)"
	}
	return ""
}

func readFile(root *os.Root, path string) ([]byte, error) {
	f, err := root.Open(strings.TrimPrefix(path, "/"))
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, advice(err))
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxFile)
	}
	return b, err
}
