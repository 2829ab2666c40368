package linux

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Watch tells of changes that others make to links: a container's end that leaves
// the host's namespace or comes back, and a link that goes from a namespace of
// ours. It tells of our own changes too. Notices are merged: one waiting in the
// channel stands for any number. The channel is closed when ctx has ended, or the
// Kernel was closed, and all that Watch started has ended. One watch at a time.
func (k *Kernel) Watch(ctx context.Context) (<-chan struct{}, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, fs.ErrClosed
	}
	if k.watch != nil {
		return nil, errors.New("watch links: there is a watch already")
	}
	w := &watcher{k: k, notices: make(chan struct{}, 1), subs: map[string]*os.File{}, quit: make(chan struct{}), done: make(chan struct{})}
	if err := w.start(k.host); err != nil {
		return nil, err
	}
	k.watch = w
	for _, s := range k.spaces {
		w.add(s)
	}
	stop := context.AfterFunc(ctx, w.stop)
	go func() {
		<-w.done
		stop()
		k.mu.Lock()
		k.watch = nil
		k.mu.Unlock()
		close(w.notices)
	}()
	return w.notices, nil
}

// watcher has one socket and one goroutine for each namespace.
type watcher struct {
	k       *Kernel
	notices chan struct{}
	quit    chan struct{} // closed by stop
	done    chan struct{} // closed when all goroutines have ended
	readers sync.WaitGroup

	// mu guards subs and stopped. Rank 2, after Kernel.mu: nothing else is locked
	// while it is held.
	mu      sync.Mutex
	subs    map[string]*os.File // by name of the namespace; empty: the host's
	stopped bool
}

// resubscribe is the pause before a broken subscription is renewed. Breaking is
// not expected at all; a second keeps an unforeseen cause from taking a processor.
const resubscribe = time.Second

// notify leaves a notice unless one is waiting.
func (w *watcher) notify() {
	select {
	case w.notices <- struct{}{}:
	default:
	}
}

// add watches a namespace of ours. Without a watch there the timer of the
// reconciler still finds every change, so an error is told and no more.
func (w *watcher) add(s *space) {
	if err := w.start(s); err != nil {
		w.k.log.Warn("watch links", "op", s.name, "err", err)
	}
}

// start subscribes in s and reads in a goroutine of its own.
func (w *watcher) start(s *space) error {
	f, err := w.k.subscribe(s)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped {
		return f.Close()
	}
	w.subs[s.name] = f
	w.readers.Go(func() {
		w.read(s, f)
	})
	return nil
}

// remove ends the watch in a namespace, which it would keep alive.
func (w *watcher) remove(name string) {
	w.mu.Lock()
	f := w.subs[name]
	delete(w.subs, name)
	w.mu.Unlock()
	if f != nil {
		f.Close() // only ends the reader; a socket has nothing to lose
	}
}

// stop ends all readers and returns when they have. Calling it again waits too.
func (w *watcher) stop() {
	w.mu.Lock()
	first := !w.stopped
	w.stopped = true
	for name, f := range w.subs {
		f.Close()
		delete(w.subs, name)
	}
	w.mu.Unlock()
	if first {
		close(w.quit)
		w.readers.Wait()
		close(w.done)
	}
	<-w.done
}

// subscribe opens a socket in s that hears of links. It is not netlink's own
// LinkSubscribe because that needs a second goroutine to end and leaves the first
// one blocked on its channel.
func (k *Kernel) subscribe(s *space) (f *os.File, err error) {
	err = k.within(s, func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_LINK - 1)}); err != nil {
			return errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
		}
		f = os.NewFile(uintptr(fd), "rtnetlink links")
		return nil
	})
	return f, err
}

// read turns messages into notices until f is closed.
func (w *watcher) read(s *space, f *os.File) {
	buf := make([]byte, 64<<10) // the kernel's messages are at most 32 KiB
	seen := map[int]bool{}      // containers' ends in the host's namespace, by index
	for {
		n, err := f.Read(buf)
		switch {
		case errors.Is(err, fs.ErrClosed):
			return
		case errors.Is(err, unix.ENOBUFS):
			// More news than the socket holds: some were lost, any may matter.
			clear(seen)
			w.notify()
			continue
		case err != nil:
			w.k.log.Warn("watch links: subscribing again", "op", inName(s.name), "err", err)
			if f = w.again(s, f); f == nil {
				return
			}
			clear(seen)
			continue
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			w.notify() // unreadable news are news
			continue
		}
		for _, m := range msgs {
			if w.matters(s, m, seen) {
				w.notify()
			}
		}
	}
}

// again replaces a broken subscription; nil if there is nothing to watch any more.
func (w *watcher) again(s *space, old *os.File) *os.File {
	if !w.current(s.name, old) {
		return nil
	}
	select {
	case <-time.After(resubscribe):
	case <-w.quit:
		return nil
	}
	w.k.mu.Lock() // keeps s open
	defer w.k.mu.Unlock()
	if w.k.closed || !w.current(s.name, old) {
		return nil
	}
	f, err := w.k.subscribe(s)
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil || w.stopped {
		w.k.log.Warn("watch links", "op", inName(s.name), "err", err)
		delete(w.subs, s.name)
		if f != nil {
			f.Close()
		}
		return nil
	}
	old.Close()
	w.subs[s.name] = f
	w.notify() // what happened meanwhile is not known
	return f
}

// current reports whether f is still the subscription in the namespace called name.
func (w *watcher) current(name string, f *os.File) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.stopped && w.subs[name] == f
}

// matters decides whether a message is worth a notice. A link's flags change many
// times; its coming and going is what counts.
func (w *watcher) matters(s *space, m syscall.NetlinkMessage, seen map[int]bool) bool {
	if m.Header.Type != unix.RTM_NEWLINK && m.Header.Type != unix.RTM_DELLINK || len(m.Data) < unix.SizeofIfInfomsg {
		return false
	}
	gone := m.Header.Type == unix.RTM_DELLINK
	if gone && m.Data[0] == unix.AF_BRIDGE {
		return false // a port left its bridge; if the link goes too, that is told as well
	}
	if s.name != "" {
		return gone
	}
	d, ok := parseLink(m.Data)
	if !ok || !strings.HasPrefix(d.name, w.k.cfg.LinkPrefix) {
		return false
	}
	index := int(int32(binary.NativeEndian.Uint32(m.Data[4:])))
	if gone {
		delete(seen, index)
		return true
	}
	first := !seen[index]
	seen[index] = true
	return first
}
