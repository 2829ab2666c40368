package linux

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// Watch tells of changes to what is ours: links, addresses, neighbours, forwarding
// entries, routes, the sysctls that give notice, and tables and chains of nftables, in
// the host's namespace, ours and those of the tasks that the last Dump was asked for.
// One value waiting in the channel stands for any number; Notices says what was
// told. The channel is closed when ctx has ended, or the Kernel was closed, and all
// that Watch started has ended. One watch at a time.
//
// Nobody tells of IPVS, iptables-legacy, most sysctls, and a namespace that is
// unmounted.
func (k *Kernel) Watch(ctx context.Context) (<-chan struct{}, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, fs.ErrClosed
	}
	if k.watch != nil {
		return nil, errors.New("watch the kernel: there is a watch already")
	}
	w, err := newWatcher(k)
	if err != nil {
		return nil, err
	}
	if err := w.add(k.host); err != nil {
		return nil, errors.Join(err, w.close())
	}
	k.watch = w
	for _, s := range k.spaces {
		w.addOrWarn(s)
	}
	stop := context.AfterFunc(ctx, w.stop)
	go func() {
		w.run()
		stop()
		k.mu.Lock()
		k.watch = nil
		k.mu.Unlock()
		close(w.wake)
		close(w.done)
	}()
	return w.wake, nil
}

// Notices takes what was told since it was called last. All that an Apply has
// caused is there when that returns; so is nothing of what its tables are about.
func (k *Kernel) Notices() kernel.Notices {
	k.mu.Lock()
	w := k.watch
	k.mu.Unlock()
	if w == nil {
		return kernel.Notices{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.told
	w.told = kernel.Notices{}
	return out
}

// watcher reads the sockets of all namespaces in one goroutine with one buffer:
// there may be hundreds.
type watcher struct {
	k      *Kernel
	wake   chan struct{}
	done   chan struct{} // closed when the goroutine has ended
	epoll  int
	signal int           // eventfd that ends the goroutine
	ending chan struct{} // closed at the same time: ends its pause
	pid    int32         // this process, which numbers its netlink sockets

	// mu guards what follows. Rank 2, after Kernel.mu: nothing else is locked
	// while it is held.
	mu      sync.Mutex
	subs    map[string]*sub // by name of the namespace; empty: the host's; "task:" and the path
	sockets map[int32]*earSocket
	told    kernel.Notices
	stopped bool
	buf     []byte
}

// sub is the subscription in one namespace.
type sub struct {
	name    string
	id      nsID
	sockets []*earSocket
	devices map[int]device // links that may be ours, by index
	changed []string       // tables that the transaction being read has touched
	// own is set while an Apply of ours is at work here: what is heard of tables is
	// ours then, unless its sender is known to be somebody else.
	own bool
}

// earSocket is one netlink socket that only listens.
type earSocket struct {
	fd     int
	sub    *sub
	tables bool // of nftables; else of links and what is on them
}

const (
	// earBuffer is the room for notices that wait, in bytes: a network of some
	// thousand objects that goes. If it does not do, the kernel says so.
	earBuffer = 1 << 20
	// turn is how many datagrams are read of one socket before others have theirs.
	turn = 256
	// retryWait is the pause after a failure that is not expected at all; a second
	// keeps an unforeseen cause from taking a processor.
	retryWait = time.Second
)

func newWatcher(k *Kernel) (w *watcher, err error) {
	w = &watcher{
		k: k, wake: make(chan struct{}, 1), done: make(chan struct{}), ending: make(chan struct{}),
		epoll: -1, signal: -1, pid: int32(os.Getpid()),
		subs: map[string]*sub{}, sockets: map[int32]*earSocket{},
		buf: make([]byte, 64<<10), // the kernel's messages are at most 32 KiB
	}
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if w.signal, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
		err = unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, w.signal, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(w.signal)})
	}
	if err != nil {
		return nil, errors.Join(os.NewSyscallError("eventfd", err), w.close())
	}
	return w, nil
}

// close releases everything; the goroutine does not run, or it is the one that calls.
func (w *watcher) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped = true
	for name := range w.subs {
		w.removeLocked(name)
	}
	var errs []error
	for _, fd := range []int{w.epoll, w.signal} {
		if fd >= 0 {
			errs = append(errs, unix.Close(fd))
		}
	}
	return errors.Join(errs...)
}

// stop ends the goroutine and returns when it has ended. Calling it again waits too.
func (w *watcher) stop() {
	w.mu.Lock()
	if !w.stopped {
		w.stopped = true
		close(w.ending)
		one := binary.NativeEndian.AppendUint64(nil, 1)
		if _, err := unix.Write(w.signal, one); err != nil {
			w.k.log.Error("end the watch of the kernel", "err", err)
		}
	}
	w.mu.Unlock()
	<-w.done
}

// run reads until stop.
func (w *watcher) run() {
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(w.epoll, events, -1)
		w.mu.Lock()
		for _, e := range events[:max(n, 0)] {
			if s := w.sockets[e.Fd]; s != nil {
				w.read(s)
			}
		}
		stopped := w.stopped
		w.mu.Unlock()
		if stopped {
			break
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			w.k.log.Warn("watch the kernel", "err", err)
			select {
			case <-w.ending:
			case <-time.After(retryWait):
			}
		}
	}
	if err := w.close(); err != nil {
		w.k.log.Warn("end the watch of the kernel", "err", err)
	}
}

// addOrWarn watches one more namespace. Without a watch there the timer of the
// reconciler still finds every change, so an error is told and no more.
func (w *watcher) addOrWarn(s *space) {
	if err := w.add(s); err != nil && !errors.Is(err, fs.ErrClosed) { // the watch is about to end
		w.k.log.Warn("watch a namespace", "op", inName(s.name), "err", err)
	}
}

// add subscribes in s, which stays open while it is called.
func (w *watcher) add(s *space) error {
	groups := []int{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_NETCONF}
	if err := w.subscribe(s.fd(), s.name, groups); err != nil {
		return err
	}
	ls, err := s.conn.links("") // after subscribing, so that none is missed
	if err == nil {
		w.seen(s.name, ls)
	}
	return err
}

// seen takes the links of a namespace as they were dumped.
func (w *watcher) seen(name string, ls []device) {
	w.mu.Lock()
	defer w.mu.Unlock()
	sub := w.subs[name]
	if sub == nil {
		return
	}
	clear(sub.devices)
	for _, d := range ls {
		if w.interesting(sub, d) {
			sub.devices[d.index] = d
		}
	}
}

// watchTasks makes the watched tasks those at the given paths. A watch keeps a
// namespace alive, so one that is not asked for any more must not stay.
func (w *watcher) watchTasks(paths []string) {
	want := make(map[string]bool, len(paths))
	for _, p := range paths {
		name := taskPrefix + p
		want[name] = true
		// What is at the path is what is watched. The plan may ask for a task for as long
		// as its pair is there, and the watch alone would keep that there: the engine has
		// unmounted the path of a task that ended with a killed engine.
		id, err := statNetns(p)
		w.mu.Lock()
		old := w.subs[name]
		there := old != nil && err == nil && old.id == id
		if old != nil && !there {
			w.removeLocked(name)
		}
		w.mu.Unlock()
		if there {
			continue
		}
		// Links for tunnels; rules and routes, for those of the mesh.
		err = withTask(p, func(fd int) error {
			return w.subscribe(fd, name, []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE})
		})
		if err != nil && !errors.Is(err, kernel.ErrNotExist) && !errors.Is(err, fs.ErrClosed) {
			w.k.log.Warn("watch a task's namespace", "op", p, "err", err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name := range w.subs {
		if strings.HasPrefix(name, taskPrefix) && !want[name] {
			w.removeLocked(name)
		}
	}
}

// taskPrefix starts the names of the tasks' namespaces, as kernel.Key.Netns says.
const taskPrefix = "task:"

// subscribe opens the sockets in the namespace open at fd.
func (w *watcher) subscribe(fd int, name string, groups []int) error {
	sub := &sub{name: name, devices: map[int]device{}}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	sub.id = nsID{st.Dev, st.Ino}
	err := w.k.inside(fd, inName(name), func() error {
		if err := sub.open(unix.NETLINK_ROUTE, groups); err != nil {
			return err
		}
		if w.k.cfg.Tables == nil && (name != "" || w.k.cfg.NoFilter) {
			return nil
		}
		return sub.open(unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES})
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil && w.stopped {
		err = fs.ErrClosed
	}
	for _, s := range sub.sockets {
		if err == nil {
			err = unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, s.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(s.fd)})
		}
	}
	if err != nil {
		for _, s := range sub.sockets {
			err = errors.Join(err, unix.Close(s.fd))
		}
		return err
	}
	w.removeLocked(name)
	w.subs[name] = sub
	for _, s := range sub.sockets {
		w.sockets[int32(s.fd)] = s
	}
	return nil
}

// open adds a socket that hears of the groups.
func (s *sub) open(proto int, groups []int) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	s.sockets = append(s.sockets, &earSocket{fd: fd, sub: s, tables: proto == unix.NETLINK_NETFILTER})
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, earBuffer); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return os.NewSyscallError("join a netlink group", err)
		}
	}
	return nil
}

// remove ends the watch in a namespace, which it would keep alive.
func (w *watcher) remove(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.removeLocked(name)
}

func (w *watcher) removeLocked(name string) {
	sub := w.subs[name]
	if sub == nil {
		return
	}
	delete(w.subs, name)
	for _, s := range sub.sockets {
		delete(w.sockets, int32(s.fd))
		if err := unix.Close(s.fd); err != nil { // epoll forgets it
			w.k.log.Warn("end the watch in a namespace", "op", inName(name), "err", err)
		}
	}
}

// watchLocked watches what is not watched and should be: a dump is to follow.
func (k *Kernel) watchLocked(sandboxes []string) {
	w := k.watch
	if w == nil {
		return
	}
	w.mu.Lock()
	var missing []*space
	if w.subs[""] == nil {
		missing = append(missing, k.host)
	}
	for name, s := range k.spaces {
		if w.subs[name] == nil {
			missing = append(missing, s)
		}
	}
	w.mu.Unlock()
	for _, s := range missing {
		w.addOrWarn(s)
	}
	w.watchTasks(sandboxes)
}

// seenLocked hands the watch the links that a dump has read.
func (k *Kernel) seenLocked(name string, ls []device) {
	if k.watch != nil {
		k.watch.seen(name, ls)
	}
}

// beforeLocked says that ops are about to be done, and returns what has to be called
// when they are. The kernel tells of a change before it answers who made it, so what
// waits before is by others, and what waits then may be ours.
func (k *Kernel) beforeLocked(ops []kernel.Op) (after func()) {
	w := k.watch
	if w == nil {
		return func() {}
	}
	var names []string
	for _, o := range ops {
		if n := o.Key.Netns(); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	w.hear(names, true)
	return func() { w.hear(names, false) }
}

// hear reads all that waits in the namespaces called names, and then sets own.
func (w *watcher) hear(names []string, own bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range names {
		if sub := w.subs[n]; sub != nil {
			for _, s := range sub.sockets {
				for left := hearTurns; left > 0 && w.subs[n] == sub && w.read(s); left-- {
				}
			}
			sub.own = own
		}
	}
}

// hearTurns bounds what hear reads of one socket, and so how long a change waits for
// others' storms: 16,000 notices, more than any change of ours makes.
const hearTurns = 64

// read hears what waits in s, up to a turn, and tells whether there may be more.
func (w *watcher) read(s *earSocket) (more bool) {
	for range turn {
		n, _, err := unix.Recvfrom(s.fd, w.buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			w.ring()
			return false
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			// More news than the socket holds: some were lost, any may matter. What ends a
			// transaction may be among them.
			s.sub.flush(w, "")
			w.told.TellOther("more changes than could be heard in " + inName(s.sub.name))
			continue
		case err != nil:
			w.k.log.Warn("watch the kernel", "op", inName(s.sub.name), "err", err)
			w.told.TellOther("the watch in " + inName(s.sub.name) + " broke")
			w.ring()
			w.removeLocked(s.sub.name)
			return false
		}
		w.parse(s, w.buf[:n])
	}
	w.ring() // there may be more: epoll tells again
	return true
}

// ring wakes who waits for notices, if there are any.
func (w *watcher) ring() {
	if w.told.Empty() {
		return
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}
