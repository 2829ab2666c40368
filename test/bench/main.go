package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// limit bounds the whole run, which takes two to three minutes.
const limit = 15 * time.Minute

// insideEnv marks the process that runs in namespaces of its own.
const insideEnv = "SLUICE_BENCH_INSIDE"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// part is one group of measurements.
type part struct {
	name string
	root bool
	run  func(ctx context.Context, t *table) error
}

var parts = []part{
	{"join", true, joins},
	{"address", false, addresses},
	{"plan", false, plans},
	{"image", false, image},
	{"packets", true, packets},
	{"mesh", true, mesh},
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	names := make([]string, len(parts))
	for i, p := range parts {
		names[i] = p.name
	}
	only := f.String("only", "", "`part` to run: "+strings.Join(names, ", "))
	if err := f.Parse(args); err != nil {
		return err
	}
	if *only != "" && !slices.Contains(names, *only) {
		return fmt.Errorf("there is no part %q; the parts are %s", *only, strings.Join(names, ", "))
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	root := os.Geteuid() == 0
	if root && os.Getenv(insideEnv) == "" {
		return inside(ctx, args, out, progress)
	}
	if root {
		if err := settle(); err != nil {
			return err
		}
	}
	t := &table{}
	var errs []error
	for _, p := range parts {
		if *only != "" && p.name != *only {
			continue
		}
		if p.root && !root {
			t.missing(p.name, "root: sudo make bench")
			continue
		}
		fmt.Fprintf(progress, "bench: %s …\n", p.name)
		if err := p.run(ctx, t); err != nil {
			t.missing(p.name, err.Error())
			errs = append(errs, fmt.Errorf("%s: %w", p.name, err))
		}
	}
	if err := t.print(out); err != nil {
		return err
	}
	return errors.Join(errs...)
}

// inside runs this program again, as the first process of namespaces that end
// with it.
func inside(ctx context.Context, args []string, out, progress io.Writer) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Stdout, cmd.Stderr = out, progress
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:   syscall.CLONE_NEWNET | syscall.CLONE_NEWPID,
		Unshareflags: syscall.CLONE_NEWNS, // which also makes the mounts private
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("in namespaces of its own: %w", err)
	}
	return nil
}

// settle makes the new namespaces usable: /proc of the new processes, and an
// empty /run, where the engine's and the plugin's sockets are to be.
func settle() error {
	if os.Getpid() != 1 {
		return fmt.Errorf("%s is set, but this is no namespace of its own; unset it", insideEnv)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	return nil
}
