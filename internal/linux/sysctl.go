package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// RemountSysctl makes /proc/sys writable for this process's mount namespace.
// Docker mounts it read-only in a managed plugin; where it is writable already
// nothing changes. Called once, before the first Apply.
func RemountSysctl() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/proc/sys", &st); err != nil {
		return fmt.Errorf("stat /proc/sys: %w", err)
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return nil
	}
	if err := unix.Mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("make /proc/sys writable: %w%s", err, hint(err))
	}
	return nil
}

// sysctlPath is the file of a name in sysctl(8)'s form: dots separate, a slash
// stands for a dot inside a device's name.
func sysctlPath(name string) (string, error) {
	p := strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
	if !filepath.IsLocal(p) || filepath.Clean(p) != p {
		return "", fmt.Errorf("sysctl name %q: want words separated by dots, such as net.ipv4.ip_forward", name)
	}
	return "/proc/sys/" + p, nil
}

// readSysctl returns the value of name in the calling thread's namespace.
func readSysctl(name string) (string, error) {
	path, err := sysctlPath(name)
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if v, ok := whenMissing(name); ok {
			return v, nil
		}
		return "", kernel.ErrNotExist
	}
	if err != nil {
		return "", err
	}
	// Values of several numbers come separated by tabs and are written with blanks.
	return strings.Join(strings.Fields(string(b)), " "), nil
}

// writeSysctl sets name in the calling thread's namespace.
func writeSysctl(name, value string) error {
	path, err := sysctlPath(name)
	if err != nil {
		return err
	}
	err = os.WriteFile(path, []byte(value), 0) // exists or cannot be made: the mode is never used
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) && !exists(path) {
		switch v, ok := whenMissing(name); {
		case ok && v == value:
			return nil
		case ok:
			return fmt.Errorf("sysctl %s = %s %w", name, value, kernel.ErrUnsupported)
		}
		return fmt.Errorf("sysctl %s: %w", name, kernel.ErrNotExist)
	}
	if err != nil {
		return fmt.Errorf("write %q to %s: %w%s", value, path, err, hint(err))
	}
	return nil
}

// whenMissing is the value that a key has in effect on a kernel that lacks it.
func whenMissing(name string) (string, bool) {
	switch {
	case strings.HasPrefix(name, "net.bridge."):
		// br_netfilter is not loaded: bridged frames pass no iptables.
		return "0", true
	case name == "net.ipv4.vs.conntrack":
		// IPVS was built without CONFIG_IP_VS_NFCT: it never uses conntrack.
		return "0", true
	case name == "net.ipv6.conf.all.disable_ipv6", name == "net.ipv6.conf.default.disable_ipv6",
		strings.HasPrefix(name, "net.ipv6.conf.") && strings.HasSuffix(name, ".disable_ipv6") && !exists("/proc/sys/net/ipv6/conf/all"):
		// No IPv6 at all, by kernel or by boot option. Else it is a device that is missing.
		return "1", true
	}
	return "", false
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// resolve is path without symbolic links: the form mountinfo uses.
func resolve(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}
