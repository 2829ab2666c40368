package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process identifies one process for good: a pid alone may be given to another
// process later, a pid with its start time is never.
type process struct {
	PID int `json:"pid"`
	// Start is field 22 of /proc/PID/stat: clock ticks between boot and the
	// start of the process (proc(5)).
	Start uint64 `json:"start"`
}

// identify returns the identity of a live process.
func identify(pid int) (process, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	// Field 2 is the command's name in parentheses and may contain anything,
	// so fields are counted behind the last parenthesis; field 3 comes first.
	_, rest, ok := cutLast(string(stat), ")")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 {
		return process{}, fmt.Errorf("read /proc/%d/stat: unexpected form %q", pid, stat)
	}
	start, err := strconv.ParseUint(fields[22-3], 10, 64)
	if err != nil {
		return process{}, fmt.Errorf("read /proc/%d/stat: start time: %w", pid, err)
	}
	return process{PID: pid, Start: start}, nil
}

// kill sends SIGKILL and returns when the process is gone, or when ctx ends.
// If it is the init of a PID namespace, everything in that namespace is gone as
// well. A process that is already gone is a success.
func (p process) kill(ctx context.Context) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	// From here on fd means one process, whatever happens to its pid; look
	// once whether it is the one we mean.
	now, err := identify(p.PID)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) || (err == nil && now != p) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return waitGone(ctx, fd, p.PID)
}

// waitGone waits until the process behind a pidfd has exited.
func waitGone(ctx context.Context, fd, pid int) error {
	// poll knows no context: it is asked in slices, short enough that a
	// cancelled caller does not notice.
	const slice = 50 * time.Millisecond
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(slice.Milliseconds()))
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for process %d: %w", pid, err)
		case ctx.Err() != nil:
			return fmt.Errorf("process %d was killed but is still there: %w", pid, ctx.Err())
		}
	}
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
