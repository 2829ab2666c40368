package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// needed maps programs that a cluster runs to the Debian packages they are in.
var needed = []struct{ program, pkg string }{
	{"dockerd", "docker.io"},
	{"docker", "docker.io"},
	{"containerd", "containerd"},
	{"runc", "runc"},
	{"iptables", "iptables"},
	{"nft", "nftables"},
	{"ipvsadm", "ipvsadm"},
	{"ip", "iproute2"},
	{"nsenter", "util-linux"},
	{"busybox", "busybox-static"},
	{"docker-registry", "docker-registry"},
	{"firewalld", "firewalld"},
	{"dbus-daemon", "dbus"},
	// For the tests of the state file, and for the race detector.
	{"strace", "strace"},
	{"gcc", "gcc"},
	{"gcc", "libc6-dev"},
}

// Prepare installs what a cluster needs and the machine lacks, from the
// distribution's packages, and says on out what it does. On a machine that has
// everything it does nothing and says nothing. An engine that it installs is
// not started as a service of the machine.
func Prepare(ctx context.Context, out io.Writer) error {
	var missing []string
	for _, n := range needed {
		if !filepath.IsAbs(tool(n.program)) && !slices.Contains(missing, n.pkg) {
			missing = append(missing, n.pkg)
		}
	}
	// From Debian 13 on the command line is a package of its own, which
	// docker.io only recommends.
	if slices.Contains(missing, "docker.io") && exec.CommandContext(ctx, "apt-cache", "show", "docker-cli").Run() == nil {
		missing = append(missing, "docker-cli")
	}
	return install(ctx, out, missing)
}

func install(ctx context.Context, out io.Writer, packages []string) error {
	if len(packages) == 0 {
		return nil
	}
	list := strings.Join(packages, " ")
	if os.Geteuid() != 0 {
		return fmt.Errorf("install %s: %w", list, ErrNotRoot)
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this machine lacks %s, and apt-get to install it: install it by hand", list)
	}
	restore, err := holdServices()
	if err != nil {
		return err
	}
	args := append([]string{"install", "--yes", "--no-install-recommends"}, packages...)
	fmt.Fprintf(out, "installing what is missing: apt-get %s\n", strings.Join(args, " "))
	err = aptGet(ctx, args...)
	if err != nil {
		// Package lists are absent or stale on a fresh machine.
		fmt.Fprintln(out, "once more with new package lists: apt-get update")
		err = aptGet(ctx, "update")
		if err == nil {
			err = aptGet(ctx, args...)
		}
	}
	return errors.Join(err, restore())
}

func aptGet(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"--quiet"}, args...)...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("apt-get %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// holdServices keeps packages from starting their services while they are
// installed: Debian's docker.io would start an engine and change the machine's
// firewall. A policy that the machine has already is left alone.
func holdServices() (restore func() error, err error) {
	const policy = "/usr/sbin/policy-rc.d"
	f, err := os.OpenFile(policy, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if errors.Is(err, os.ErrExist) {
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	// 101 is "action forbidden by policy" (invoke-rc.d(8)).
	_, err = io.WriteString(f, "#!/bin/sh\nexit 101\n")
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(policy))
	}
	return func() error { return os.Remove(policy) }, nil
}

// engineCache holds the trees that EngineTree makes; they are a download of
// about 250 MB and half a gigabyte each, so they outlive a test run.
const engineCache = "/var/cache/sluice-test"

// debianMirror is the distribution's own redirector to a near mirror.
const debianMirror = "http://deb.debian.org/debian"

// EngineTree returns the root of a Debian tree with the Docker engine of a
// release (trixie has 26.1, sid 28.5), for Options.Engine. The first call for a
// release makes it with debootstrap and says so on out; that takes about a
// minute, later calls nothing.
func EngineTree(ctx context.Context, suite string, out io.Writer) (string, error) {
	if suite == "" || strings.Trim(suite, "abcdefghijklmnopqrstuvwxyz-") != "" {
		return "", fmt.Errorf("make engine tree: %q is no release of Debian; use its code name, such as trixie or sid", suite)
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("make engine tree: %w", ErrNotRoot)
	}
	if err := os.MkdirAll(engineCache, 0o755); err != nil {
		return "", err
	}
	// Two test binaries may want the same tree at the same time.
	lock, err := os.Open(engineCache)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock %s: %w", engineCache, err)
	}
	tree := filepath.Join(engineCache, "engine-"+suite)
	if _, err := os.Stat(tree); err == nil {
		return tree, nil
	}
	if !filepath.IsAbs(tool("debootstrap")) {
		if err := install(ctx, out, []string{"debootstrap"}); err != nil {
			return "", err
		}
	}
	// Under its name there is only ever a whole tree.
	partial := tree + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return "", err
	}
	// Bookworm's docker.io brings its command line; later ones split it off,
	// and the hosts are spoken to with the machine's.
	args := []string{"--variant=minbase",
		"--include=docker.io,iptables,nftables,iproute2,procps,kmod,ca-certificates",
		suite, partial, debianMirror}
	fmt.Fprintf(out, "making a tree with the engine of %s, about a minute: debootstrap %s\n", suite, strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, tool("debootstrap"), args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", safePath)
	if text, err := output(cmd); err != nil {
		last := strings.Split(strings.TrimSpace(text), "\n")
		return "", errors.Join(fmt.Errorf("make engine tree: debootstrap %s: %w: %s", suite, err, last[len(last)-1]), os.RemoveAll(partial))
	}
	return tree, os.Rename(partial, tree)
}
