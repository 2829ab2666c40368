package sockets

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// answerTime bounds the wait for one answer. The kernel answers in the call that
// asks; a dump of ten thousand sockets has some hundred answers.
var answerTime = unix.Timeval{Sec: 5}

// Sockets asks inet_diag. It has no state: any number of goroutines may use it.
type Sockets struct{}

// New makes a Sockets. It asks nothing of the kernel.
func New() *Sockets { return &Sockets{} }

// session is an open netlink socket in one namespace.
type session struct {
	s *nl.NetlinkSocket
	// lo and hi are the first and the last of the ports that the namespace gives to
	// connections that are opened in it; 0 in a session of newSession.
	lo, hi uint16
}

// Probe asks whether this kernel can list and end connections. It loads the
// module tcp_diag where the kernel is allowed to, and ends nothing.
//
// kernel.ErrUnsupported: it cannot.
func (*Sockets) Probe() error {
	s, err := newSession()
	if err != nil {
		return err
	}
	defer s.s.Close()
	// No state is asked for, so none is listed.
	err = s.dump(context.Background(), unix.AF_INET, 0, func(socket) {})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("listing TCP connections %w; load its module (modprobe tcp_diag) or use a kernel built with CONFIG_INET_DIAG: %w", kernel.ErrUnsupported, err)
	}
	if err != nil {
		return fmt.Errorf("list TCP connections: %w%s", err, hint(err))
	}
	// A connection that cannot be: a socket's number begins at 1.
	nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	switch err = s.destroy(kernel.Conn{Local: nobody, Remote: nobody}); {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL): // the latter before Linux 4.5
		return fmt.Errorf("ending TCP connections %w; use a kernel built with CONFIG_INET_DIAG_DESTROY: %w", kernel.ErrUnsupported, err)
	case err == nil:
		return errors.New("ending TCP connections: the kernel has ended one that cannot be")
	}
	return fmt.Errorf("end TCP connections: %w%s", err, hint(err))
}

// Accepted lists the connections that clients have opened to addr in the
// namespace at path sandbox, in no order: those that are Served, and those of which
// something has been, as far as their port tells (see the package). While connections
// come and go one may be listed twice, or not.
//
// kernel.ErrNotExist: there is no network namespace at this path.
func (*Sockets) Accepted(ctx context.Context, sandbox string, addr netip.Addr) ([]kernel.Conn, error) {
	s, err := open(sandbox)
	if err != nil {
		return nil, err
	}
	defer s.s.Close()
	var open []kernel.Conn
	served := map[uint16]bool{} // ports that something listens on
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		err := s.dump(ctx, family, 1<<listening|talking, func(k socket) {
			switch {
			case k.state == listening:
				if k.serves(addr) {
					served[k.conn.Local.Port()] = true
				}
			case k.open() && k.conn.Local.Addr() == addr:
				open = append(open, k.conn)
			}
		})
		if err != nil {
			return nil, fmt.Errorf("list TCP connections in %s: %w%s", sandbox, err, hint(err))
		}
	}
	out := open[:0]
	for _, c := range open {
		port := c.Local.Port()
		c.Served = served[port]
		if c.Served || port < s.lo || port > s.hi {
			out = append(out, c)
		}
	}
	return out, nil
}

// End ends those of conns that are as they were listed by Accepted: one that has
// gone is passed over, and so is one that has spoken since. It returns how many it
// has ended, and the first error, after which it has gone on with the rest.
//
// kernel.ErrNotExist: there is no network namespace at this path any more.
func (*Sockets) End(ctx context.Context, sandbox string, conns []kernel.Conn) (int, error) {
	s, err := open(sandbox)
	if err != nil {
		return 0, err
	}
	defer s.s.Close()
	ended := 0
	var first error
	for _, c := range conns {
		if err := ctx.Err(); err != nil {
			return ended, errors.Join(first, err)
		}
		now, err := s.get(c)
		if err == nil {
			if !now.open() || now.conn.Idle < c.Idle {
				continue
			}
			err = s.destroy(c)
		}
		switch {
		case err == nil:
			ended++
		case !errors.Is(err, unix.ENOENT) && first == nil:
			// Without the client's address: the cause is the same for all, and it is told once.
			first = fmt.Errorf("end TCP connection to %s in %s: %w%s", c.Local, sandbox, err, hint(err))
		}
	}
	return ended, first
}

// open opens a socket in the namespace at path. The socket does not hold the
// namespace for longer than a session lasts.
func open(path string) (session, error) {
	// Without waiting, as a name in a directory of others may be a pipe.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		return session{}, fmt.Errorf("network namespace %s: %w", path, kernel.ErrNotExist)
	}
	if err != nil {
		return session{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return session{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Type != unix.NSFS_MAGIC {
		return session{}, fmt.Errorf("network namespace %s: %w", path, kernel.ErrNotExist)
	}
	type result struct {
		s   session
		err error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread belongs to the task's namespace and ends here.
		runtime.LockOSThread()
		var r result
		if r.err = netns.Set(netns.NsHandle(fd)); r.err != nil {
			r.err = fmt.Errorf("enter network namespace %s: %w%s", path, r.err, hint(r.err))
		} else {
			r.s, r.err = newSession()
		}
		if r.err == nil {
			if r.s.lo, r.s.hi, r.err = ownPorts(); r.err != nil {
				r.s.s.Close()
			}
		}
		done <- r
	}()
	r := <-done
	return r.s, r.err
}

// newSession opens a socket in the namespace of the calling thread.
func newSession() (session, error) {
	s, err := nl.Subscribe(unix.NETLINK_INET_DIAG)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return session{}, fmt.Errorf("listing TCP connections %w; use a kernel built with CONFIG_INET_DIAG: %w", kernel.ErrUnsupported, err)
	}
	if err == nil {
		err = errors.Join(s.SetSendTimeout(&answerTime), s.SetReceiveTimeout(&answerTime))
	}
	if err != nil {
		return session{}, fmt.Errorf("open netlink socket: %w", err)
	}
	return session{s: s}, nil
}

// ownPortsFile is net.ipv4.ip_local_port_range (ip(7)) of the namespace of the
// thread that reads it.
const ownPortsFile = "/proc/sys/net/ipv4/ip_local_port_range"

// ownPorts are the first and the last of the ports that the calling thread's
// namespace gives to connections that are opened in it.
func ownPorts() (lo, hi uint16, err error) {
	text, err := os.ReadFile(ownPortsFile)
	if err != nil {
		return 0, 0, err
	}
	if _, err := fmt.Sscan(string(text), &lo, &hi); err != nil {
		return 0, 0, fmt.Errorf("%s: %q: want two ports: %w", ownPortsFile, text, err)
	}
	return lo, hi, nil
}

// dump calls f with each TCP socket of a family in one of states, a set of bits.
// A socket that is not of IPv4's addresses is left out.
func (s session) dump(ctx context.Context, family uint8, states uint32, f func(socket)) error {
	var bad error
	err := s.ask(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, request(family, states, kernel.Conn{}), func(msg []byte) bool {
		k, ok, err := parse(msg)
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			bad = err
			return false
		}
		if ok {
			f(k)
		}
		return true
	})
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		err = nil // by connections that come and go; those that stay are listed
	}
	return errors.Join(err, bad)
}

// get asks for one connection; unix.ENOENT: it has gone.
func (s session) get(c kernel.Conn) (socket, error) {
	var out socket
	var bad error = unix.ENOENT
	err := s.ask(nl.SOCK_DIAG_BY_FAMILY, 0, request(familyOf(c), 0, c), func(msg []byte) bool {
		out, _, bad = parse(msg)
		return false
	})
	if err == nil {
		err = bad
	}
	return out, err
}

// destroy ends one connection; unix.ENOENT: it has gone.
func (s session) destroy(c kernel.Conn) error {
	return s.ask(nl.SOCK_DESTROY, unix.NLM_F_ACK, request(familyOf(c), 0, c), func([]byte) bool { return true })
}

func (s session) ask(kind, flags int, payload []byte, f func([]byte) bool) error {
	r := nl.NewNetlinkRequest(kind, flags)
	r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Socket: s.s}}
	r.AddRawData(payload)
	return r.ExecuteIter(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY, f)
}

// hint says what a person can do about an error of the kernel, as the end of a text.
func hint(err error) string {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return " (sluice needs the capabilities NET_ADMIN and SYS_ADMIN)"
	}
	return ""
}
