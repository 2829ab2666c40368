package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// allNamespaces are the namespaces of a box. The user namespace is the
// machine's: engines need real root.
const allNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// safePath is the PATH inside a box; a login PATH may lack the sbin
// directories, and an engine tree has nothing of the machine's own.
const safePath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// box is a set of namespaces with a process that holds them.
type box struct {
	name string
	proc process
}

// startBox starts the process called name, lets book record it, and only then
// lets it build its inside as s says. Output goes to logPath.
func startBox(ctx context.Context, book *ledger, name, logPath string, s boxSpec) (*box, error) {
	if os.Getenv(innerEnv) != "" {
		return nil, errors.New("this process was started to hold a box but runs its main program: call cluster.MaybeInner first in main or TestMain")
	}
	spec, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	specR, specW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer specW.Close()
	resultR, resultW, err := os.Pipe()
	if err != nil {
		specR.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer resultR.Close()

	cmd := &exec.Cmd{
		Path:       "/proc/self/exe",
		Args:       []string{innerName, filepath.Dir(book.path), name}, // for ps and Leftovers
		Env:        []string{safePath, innerEnv + "=1"},
		Stdout:     log, // files, not pipes: nobody may wait for the holder's output
		Stderr:     log,
		ExtraFiles: []*os.File{specFD - 3: specR, resultFD - 3: resultW},
		// A session of its own: an interrupt from the terminal is for the test.
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: allNamespaces, Setsid: true},
	}
	err = cmd.Start()
	specR.Close()
	resultW.Close()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	b := &box{name: name}
	fail := func(err error) (*box, error) {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), cmd.Process.Kill(), ignoreExit(cmd.Wait()))
	}
	if b.proc, err = identify(cmd.Process.Pid); err != nil {
		return fail(err)
	}
	if err := book.record(name, b.proc); err != nil {
		return fail(err)
	}
	if _, err := specW.Write(spec); err != nil {
		return fail(err)
	}
	specW.Close()

	// The other end closes when the process answers or dies, so this ends; ctx
	// is for a mount that hangs.
	stop := context.AfterFunc(ctx, func() { resultR.Close() })
	answer, err := io.ReadAll(resultR)
	if !stop() {
		return fail(ctx.Err())
	}
	if err != nil {
		return fail(err)
	}
	switch string(answer) {
	case okResult:
	case "":
		return fail(fmt.Errorf("its process ended without an answer, see %s; does main or TestMain call cluster.MaybeInner first?", logPath))
	default:
		return fail(errors.New(string(answer)))
	}
	go cmd.Wait() // reaps it; its exit status says only that it was killed
	return b, nil
}

// ignoreExit drops the error that says a process, killed on purpose, did not
// exit with zero.
func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// command prepares a command inside the box: in all its namespaces, or, with
// netOnly, in its network with the machine's file system and processes.
// When ctx ends, the command is killed with everything it started in its
// process group.
func (b *box) command(ctx context.Context, netOnly bool, args ...string) *exec.Cmd {
	enter := []string{"-t", strconv.Itoa(b.proc.PID), "-n"}
	if !netOnly {
		enter = append(enter, "-m", "-u", "-i", "-p")
	}
	cmd := exec.CommandContext(ctx, tool("nsenter"), append(append(enter, "--"), args...)...)
	cmd.Env = []string{safePath, "HOME=/root", "LC_ALL=C"} // no proxies: they point nowhere from here
	killWithGroup(cmd)
	return cmd
}

// killWithGroup has the end of a command's context kill its process group: nsenter
// forks to enter a PID namespace, and a SIGKILL to it alone would leave its child.
func killWithGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
}

// run runs a command inside the box and returns its standard output.
func (b *box) run(ctx context.Context, netOnly bool, stdin string, args ...string) (string, error) {
	cmd := b.command(ctx, netOnly, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := output(cmd)
	if err != nil {
		return out, fmt.Errorf("%s: %s: %w", b.name, strings.Join(args, " "), err)
	}
	return out, nil
}

// output runs cmd and returns its standard output; an error carries what it
// wrote to standard error.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if text := strings.TrimSpace(stderr.String()); err != nil && text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return stdout.String(), err
}

// tool finds a program that may live in a directory for administrators, which
// PATH may lack. A program that is nowhere comes back as it is, for the error
// message of whoever runs it.
func tool(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path := filepath.Join(dir, name); executable(path) {
			return path
		}
	}
	return name
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
