package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// innerName is argument zero of a process that holds a box: how it knows
	// itself, and what ps shows.
	innerName = "sluice-cluster-box"
	// innerEnv marks everything that such a process runs. A binary that forgot
	// MaybeInner would otherwise start its own tests again, and those the next.
	innerEnv = "SLUICE_CLUSTER_BOX"

	// File descriptors that box.start hands over, behind stdin, stdout, stderr.
	specFD   = 3 // read: the boxSpec, once the process is recorded
	resultFD = 4 // write: "ok", or what went wrong
	okResult = "ok"
)

// boxSpec says what the inside of a box looks like. It crosses a pipe as JSON.
type boxSpec struct {
	Hostname string
	Resolver string            // content of /etc/resolv.conf
	Sysctls  map[string]string // of the network namespace; a missing one is skipped
	// Tree is the root of another distribution, or empty for the machine's own;
	// it is never written to: writes go to Overlay.
	Tree    string
	Overlay string // directory for the writes over Tree
	// Share is a directory that the inside sees under the same path.
	Share string
	// Binds maps paths inside to directories below Share.
	Binds map[string]string
}

// MaybeInner turns the process into the holder of a box, and never returns, if
// the process was started as one. Otherwise it does nothing. It must be the
// first call of main or TestMain in every binary that uses [Up].
func MaybeInner() {
	if len(os.Args) == 0 || os.Args[0] != innerName {
		return
	}
	os.Exit(inner())
}

func inner() int {
	// As init of its PID namespace the process ends by SIGKILL only.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)

	result := os.NewFile(resultFD, "result")
	if err := prepareBox(os.NewFile(specFD, "spec")); err != nil {
		fmt.Fprint(result, err)
		return 1
	}
	if _, err := io.WriteString(result, okResult); err != nil {
		return 1 // who asked is gone
	}
	result.Close()

	// From here on it is an init: it takes over the children of processes that
	// ended before them, such as the shims of a killed engine.
	for range children {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || pid == 0 {
				break
			}
		}
	}
	return 0
}

// prepareBox builds the inside of the box, in a mount namespace of its own.
func prepareBox(in *os.File) error {
	text, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read what to do: %w", err)
	}
	if len(text) == 0 {
		return errors.New("the process that wanted this box is gone")
	}
	var s boxSpec
	if err := json.Unmarshal(text, &s); err != nil {
		return fmt.Errorf("read what to do: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("set hostname %s: %w", s.Hostname, err)
	}
	// Until the last step nothing may propagate to the machine.
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if s.Tree != "" {
		if err := enterTree(s); err != nil {
			return err
		}
	}
	for _, step := range []func() error{
		mountProc,
		mountSys,
		mountRun,
		func() error { return setResolver(s.Resolver) },
		func() error { return bindAll(s.Binds) },
		func() error { return setSysctls(s.Sysctls) },
		// New peer groups: the inside shares among itself, as systemd sets it
		// up on a real host, and not with the machine.
		func() error { return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "") },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// enterTree makes a copy-on-write view of s.Tree the root.
func enterTree(s boxSpec) error {
	root, upper, work := filepath.Join(s.Overlay, "root"), filepath.Join(s.Overlay, "upper"), filepath.Join(s.Overlay, "work")
	for _, dir := range []string{root, upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	layers := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", s.Tree, upper, work)
	if err := mount("overlay", root, "overlay", 0, layers); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/sys"} {
		if err := bind(dir, filepath.Join(root, dir), unix.MS_REC); err != nil {
			return err
		}
	}
	// Not recursive: the overlay itself may be mounted below.
	if err := bind(s.Share, filepath.Join(root, s.Share), 0); err != nil {
		return err
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	// With both names the same the old root lies over the new one and can be
	// detached at once (pivot_root(2), "pivot_root(., .)").
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	return os.Chdir("/")
}

func mountProc() error {
	if err := os.MkdirAll("/proc", 0o555); err != nil {
		return err
	}
	return mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
}

// mountSys replaces /sys, so that /sys/class/net shows the interfaces of this
// network namespace, and keeps the cgroup hierarchies, which a new sysfs lacks
// and without which no container starts.
func mountSys() error {
	cgroup, err := unix.OpenTree(unix.AT_FDCWD, cgroupRoot, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("copy the mounts of %s: %w", cgroupRoot, err)
	}
	defer unix.Close(cgroup)
	if err := mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := unix.MoveMount(cgroup, "", unix.AT_FDCWD, cgroupRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s: %w", cgroupRoot, err)
	}
	// Real hosts have a file system for pinned BPF objects; a kernel without
	// BPF has not, and neither has a host on it.
	if err := mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=700"); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

func mountRun() error {
	if err := mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return err
	}
	return os.MkdirAll("/run/lock", 0o755)
}

// setResolver covers /etc/resolv.conf, which systemd-resolved makes a link into
// /run, where nothing is left to cover.
func setResolver(content string) error {
	const own, path = "/run/resolv.conf", "/etc/resolv.conf"
	if err := os.WriteFile(own, []byte(content), 0o644); err != nil {
		return err
	}
	target := path
	if link, err := os.Readlink(path); err == nil {
		target = link
		if !filepath.IsAbs(link) {
			target = filepath.Join(filepath.Dir(path), link)
		}
	}
	if strings.HasPrefix(target, "/run/") {
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		return os.WriteFile(target, []byte(content), 0o644)
	}
	if _, err := os.Stat(target); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(target, nil, 0o644); err != nil {
			return err
		}
	}
	return mount(own, target, "", unix.MS_BIND, "")
}

func bindAll(binds map[string]string) error {
	for inside, outside := range binds {
		if err := bind(outside, inside, 0); err != nil {
			return err
		}
	}
	return nil
}

func setSysctls(values map[string]string) error {
	for name, value := range values {
		path := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
		// Some exist per namespace only from a certain kernel on.
		if err := os.WriteFile(path, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("set %s to %s: %w", name, value, err)
		}
	}
	return nil
}

// bind mounts a directory at another path, which it makes; with unix.MS_REC in
// flags also what is mounted below it.
func bind(from, to string, flags uintptr) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	return mount(from, to, "", unix.MS_BIND|flags, "")
}

func mount(source, target, fstype string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		return &os.PathError{Op: strings.TrimSpace("mount " + fstype), Path: target, Err: err}
	}
	return nil
}
