package ports

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// backlog is how many connections may wait to be reset. None should come at all.
const backlog = 16

// Holder holds ports. Its methods may be called from any goroutine.
type Holder struct {
	proc   string
	max    int // how many ports it holds at most
	missed atomic.Uint64
	done   chan struct{} // closed when run has ended

	// mu guards what follows. Rank 1: nothing else is locked while it is held.
	mu     sync.Mutex
	held   map[model.HostPort]socket
	live   map[int32]int32 // descriptor to serial number, of sockets that accept
	serial int32
	epoll  int
	stop   int // an eventfd that ends run
	closed bool
}

type socket struct {
	fd      int
	accepts bool
}

// New makes a Holder that holds nothing. proc is where /proc is, of the process
// namespace in which owners of ports are looked for. Close ends it.
func New(proc string) (*Holder, error) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("hold ports: ask how many files may be open: %w", err)
	}
	// Half of the descriptors stay with the rest of the process, which needs some
	// dozens. RLIM_INFINITY is more than an int holds on some machines.
	most := int(min(files.Cur/2, 1<<30))
	h := &Holder{proc: proc, max: most, done: make(chan struct{}), held: make(map[model.HostPort]socket), live: make(map[int32]int32)}
	var err error
	if h.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("hold ports: epoll: %w", err)
	}
	if h.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, errors.Join(fmt.Errorf("hold ports: eventfd: %w", err), unix.Close(h.epoll))
	}
	if err := unix.EpollCtl(h.epoll, unix.EPOLL_CTL_ADD, h.stop, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(h.stop)}); err != nil {
		return nil, errors.Join(fmt.Errorf("hold ports: epoll: %w", err), unix.Close(h.stop), unix.Close(h.epoll))
	}
	go h.run()
	return h, nil
}

// Set holds the ports that are wanted, in the network namespace of the calling
// thread, and lets all others go first. What is held already is not touched. It
// returns what cannot be had, by port, and can be called again at any time to try
// once more:
//
//   - *kernel.TakenError: someone has it;
//   - kernel.ErrNotExist: the host does not have the address;
//   - kernel.ErrUnsupported: the kernel does not have the protocol, nor has anybody
//     such a port then;
//   - any other: of the system, such as too many open files.
func (h *Holder) Set(want []model.HostPort) map[model.HostPort]error {
	wanted := make(map[model.HostPort]bool, len(want))
	for _, p := range want {
		wanted[p] = true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		wanted = nil
	}
	failed := make(map[model.HostPort]error)
	for p, s := range h.held {
		if wanted[p] {
			continue
		}
		h.releaseLocked(p, s)
	}
	var taken []model.HostPort
	for _, p := range slices.SortedFunc(maps.Keys(wanted), model.HostPort.Compare) {
		if _, ok := h.held[p]; ok {
			continue
		}
		if len(h.held) >= h.max {
			failed[p] = fmt.Errorf("hold port %s: %w: %d are held, half of the files that this process may open", p, unix.EMFILE, h.max)
			continue
		}
		s, err := open(p)
		if err == nil && s.accepts {
			if err = h.watchLocked(s.fd); err != nil {
				err = errors.Join(err, unix.Close(s.fd))
			}
		}
		switch {
		case err == nil:
			h.held[p] = s
		case errors.Is(err, unix.EADDRINUSE):
			taken = append(taken, p)
		default:
			failed[p] = fmt.Errorf("hold port %s: %w", p, err)
		}
	}
	if len(taken) > 0 {
		for p, process := range owners(h.proc, taken) {
			failed[p] = &kernel.TakenError{Port: p, Process: process}
		}
	}
	return failed
}

// Held is the ports that are held, sorted.
func (h *Holder) Held() []model.HostPort {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.SortedFunc(maps.Keys(h.held), model.HostPort.Compare)
}

// Missed is how many connections have come to the sockets since New.
func (h *Holder) Missed() uint64 { return h.missed.Load() }

// Close lets all ports go. A second call does nothing.
func (h *Holder) Close() error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil
	}
	h.closed = true
	for p, s := range h.held {
		h.releaseLocked(p, s)
	}
	// The counter of an eventfd takes 2^64-2 of these; this is the only one.
	_, err := unix.Write(h.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	h.mu.Unlock()
	if err != nil {
		return fmt.Errorf("stop holding ports: %w", err)
	}
	<-h.done
	return errors.Join(unix.Close(h.stop), unix.Close(h.epoll))
}

// releaseLocked closes a socket; that takes it out of epoll as well. An error of
// close(2) on a socket says nothing that could be acted on: the descriptor is gone.
func (h *Holder) releaseLocked(p model.HostPort, s socket) {
	delete(h.live, int32(s.fd))
	delete(h.held, p)
	_ = unix.Close(s.fd)
}

// watchLocked has run accept what comes to a socket. By edges: what cannot be
// accepted for want of a descriptor would keep a level up for ever.
func (h *Holder) watchLocked(fd int) error {
	h.serial++
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd), Pad: h.serial}
	if err := unix.EpollCtl(h.epoll, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	h.live[int32(fd)] = h.serial
	return nil
}

// run resets what comes, until Close.
func (h *Holder) run() {
	defer close(h.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(h.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return // only what cannot happen: a bad descriptor or address
		}
		for _, e := range events[:max(n, 0)] {
			if e.Fd == int32(h.stop) {
				return
			}
			h.reset(e.Fd, e.Pad)
		}
	}
}

// reset accepts all that waits at a socket, and ends it. The descriptor may be of
// another socket by now, of this process but not of this package: the serial number
// tells.
func (h *Holder) reset(fd, serial int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.live[fd] == serial {
		c, _, err := unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
			continue
		case err != nil:
			return // EAGAIN: that was all
		}
		h.missed.Add(1)
		// Closing without lingering is what sends RST, or ABORT of SCTP. If it cannot
		// be said, closing still ends the connection.
		_ = unix.SetsockoptLinger(c, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		_ = unix.Close(c)
	}
}

// open makes the socket that holds a port.
func open(p model.HostPort) (socket, error) {
	kind := unix.SOCK_STREAM
	if p.Proto == model.UDP {
		kind = unix.SOCK_DGRAM
	}
	if p.Proto.Number() == 0 {
		return socket{}, fmt.Errorf("protocol %q %w", p.Proto, kernel.ErrUnsupported)
	}
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(p.Proto.Number()))
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
		return socket{}, fmt.Errorf("protocol %s %w: %w", p.Proto, kernel.ErrUnsupported, err)
	}
	if err != nil {
		return socket{}, fmt.Errorf("socket: %w", err)
	}
	s := socket{fd, p.Proto != model.UDP}
	if err := claim(s, p); err != nil {
		return socket{}, errors.Join(err, unix.Close(fd))
	}
	return s, nil
}

// claim binds a socket to its port.
func claim(s socket, p model.HostPort) error {
	switch p.Proto {
	case model.TCP:
		// Connections that a former life of the port has left do not count; another
		// socket that listens does all the same.
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return fmt.Errorf("set SO_REUSEADDR: %w", err)
		}
	case model.UDP:
		// No buffer to speak of (the kernel makes it 2,304 bytes), and nothing gets
		// into it: the program is one instruction, "keep 0 bytes".
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1); err != nil {
			return fmt.Errorf("set SO_RCVBUF: %w", err)
		}
		nothing := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
		if err := unix.SetsockoptSockFprog(s.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing[0]}); err != nil {
			return fmt.Errorf("set SO_ATTACH_FILTER: %w", err)
		}
	}
	at := &unix.SockaddrInet4{Port: int(p.Port)}
	if p.Addr.IsValid() {
		if !p.Addr.Is4() {
			return fmt.Errorf("address %s %w: it is not IPv4", p.Addr, kernel.ErrUnsupported)
		}
		at.Addr = p.Addr.As4()
	}
	if err := unix.Bind(s.fd, at); errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("address %s %w on this host", p.Addr, kernel.ErrNotExist)
	} else if err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if !s.accepts {
		return nil
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return nil
}
