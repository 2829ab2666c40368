package linux

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// within runs fn on a thread inside s.
func (k *Kernel) within(s *space, fn func() error) error { return k.inside(s.fd(), inName(s.name), fn) }

// inside runs fn on a thread inside the namespace open at fd, which texts call
// name. The thread comes back to the namespace of this process; if it cannot, it
// ends with its goroutine, which is why fn always gets a goroutine of its own.
func (k *Kernel) inside(fd int, name string, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(netns.NsHandle(fd)); err != nil {
			runtime.UnlockOSThread() // it never left
			done <- fmt.Errorf("enter network namespace %s: %w%s", name, err, hint(err))
			return
		}
		err := fn()
		if back := netns.Set(netns.NsHandle(k.self.Fd())); back != nil {
			k.log.Error("leave network namespace", "op", name, "err", back)
		} else {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// inName is how texts name a namespace.
func inName(ns string) string {
	if ns == "" {
		return "host"
	}
	return ns
}

// statNetns identifies the namespace mounted at path. It is kernel.ErrNotExist if
// there is nothing, or something that is no network namespace: a stale file.
func statNetns(path string) (nsID, error) {
	var st unix.Stat_t
	var sf unix.Statfs_t
	err := unix.Statfs(path, &sf)
	if err == nil && sf.Type != unix.NSFS_MAGIC {
		return nsID{}, kernel.ErrNotExist
	}
	if err == nil {
		err = unix.Stat(path, &st)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nsID{}, kernel.ErrNotExist
	}
	if err != nil {
		return nsID{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return nsID{st.Dev, st.Ino}, nil
}

// openNetns opens the network namespace at path. Anything else there is
// kernel.ErrNotExist; it is opened without waiting, as a name in a directory of
// others may be a pipe.
func openNetns(path string) (*os.File, nsID, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENXIO) {
		return nil, nsID{}, kernel.ErrNotExist
	}
	if err != nil {
		return nil, nsID{}, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	var sf unix.Statfs_t
	var st unix.Stat_t
	err = errors.Join(unix.Fstatfs(fd, &sf), unix.Fstat(fd, &st))
	switch {
	case err != nil:
		return nil, nsID{}, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, f.Close())
	case sf.Type != unix.NSFS_MAGIC:
		return nil, nsID{}, errors.Join(kernel.ErrNotExist, f.Close())
	}
	return f, nsID{st.Dev, st.Ino}, nil
}

// pin makes a network namespace with its loopback device up and mounts it at the
// path of name, as ip-netns(8) does. One that is there already is left as it is.
func (k *Kernel) pin(name string) error {
	path := k.path(name)
	if _, err := statNetns(path); err == nil {
		return nil
	} else if !errors.Is(err, kernel.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(k.cfg.NetnsDir, 0o755); err != nil { // as ip-netns makes it
		return err
	}
	if err := share(k.cfg.NetnsDir); err != nil {
		return err
	}
	// A file left by an earlier attempt serves as well as a new one.
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread belongs to the new namespace and ends here.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make network namespace: %w%s", err, hint(err))
			}
			c, err := dial()
			if err != nil {
				return err
			}
			defer c.close()
			if err := c.setLink("lo", unix.IFF_UP, nil); err != nil {
				return fmt.Errorf("set lo up: %w", err)
			}
			if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mount network namespace at %s: %w%s", path, err, hint(err))
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// unpin removes mount and file of name. The namespace goes when its last user does.
func (k *Kernel) unpin(name string) error {
	path := k.path(name)
	// Mounted twice, by an older mount hidden under a newer, is unmounted twice.
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, fs.ErrNotExist) {
			break // no mount any more
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w%s", path, err, hint(err))
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// share makes mounts below dir visible in other mount namespaces and, what
// matters more, their unmounts: a copy in another mount namespace would keep a
// network namespace alive. Nothing is done where dir lies on a shared mount,
// which is so under systemd and in a managed plugin (rshared).
func share(dir string) error {
	info, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return err
	}
	defer info.Close()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	real, err := resolve(dir)
	if err != nil {
		return err
	}
	shared, sc, best := false, bufio.NewScanner(info), ""
	for sc.Scan() {
		if point, isShared, ok := parseMount(sc.Text()); ok && covers(point, real) && len(point) >= len(best) {
			best, shared = point, isShared // later lines hide earlier ones of the same point
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	if shared {
		return nil
	}
	if best != real {
		if err := unix.Mount(real, real, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s on itself: %w%s", real, err, hint(err))
		}
	}
	if err := unix.Mount("", real, "none", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make %s a shared mount: %w%s", real, err, hint(err))
	}
	return nil
}

// parseMount reads a line of mountinfo (proc_pid_mountinfo(5)): mount point and
// whether it is shared.
func parseMount(line string) (point string, shared, ok bool) {
	// 36 35 98:0 /root /point rw,noatime shared:1 master:2 - ext3 /dev/root rw
	f := strings.Fields(line)
	if len(f) < 7 {
		return "", false, false
	}
	for _, opt := range f[6:] {
		if opt == "-" {
			return unescape(f[4]), shared, true
		}
		if strings.HasPrefix(opt, "shared:") {
			shared = true
		}
	}
	return "", false, false
}

// unescape undoes the octal escapes of mountinfo: space, tab, newline, backslash.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// covers reports whether path is point or below it.
func covers(point, path string) bool {
	return point == "/" || path == point || strings.HasPrefix(path, point+"/")
}
