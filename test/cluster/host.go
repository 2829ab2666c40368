package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// socketName is the engine's second socket, in the host's directory, where
	// the machine can reach it; the first is /run/docker.sock inside.
	socketName = "docker.sock"
	engineLog  = "dockerd.log"
)

// Host is one simulated Docker host. Its methods may be called concurrently;
// those that start or stop something exclude each other.
type Host struct {
	c    *Cluster
	name string
	addr netip.Addr
	dir  string
	http *http.Client

	// box is replaced by each boot; readers take what there is.
	box atomic.Pointer[box]

	mu     sync.Mutex // guards engine, and is held while box or engine start or stop
	engine *engine    // nil while stopped
}

func newHost(c *Cluster, i int) *Host {
	name := fmt.Sprintf("%s%d", c.o.Prefix, i)
	h := &Host{c: c, name: name, addr: hostAddr(i), dir: c.path(name)}
	h.http = &http.Client{Transport: &http.Transport{
		// A kept connection would outlive the engine at its other end.
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", h.Socket())
		},
	}}
	return h
}

// Name is the host's name, which is also its node name in a swarm.
func (h *Host) Name() string { return h.name }

// Addr is the host's address on the underlay.
func (h *Host) Addr() netip.Addr { return h.addr }

// Dir is the host's directory on the machine, under the same path inside: the
// place to hand files over.
func (h *Host) Dir() string { return h.dir }

// Socket is the path of the engine's socket on the machine.
func (h *Host) Socket() string { return filepath.Join(h.dir, socketName) }

// LogFile is the path of the engine's log, which all its starts append to.
func (h *Host) LogFile() string { return filepath.Join(h.dir, engineLog) }

// PID is the process that holds the host's namespaces, for nsenter -t PID -a.
func (h *Host) PID() int { return h.box.Load().proc.PID }

// boot makes the host's namespaces and connects it. Its disk, which is its
// directory, may hold what an earlier boot left.
func (h *Host) boot(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	data, etc := filepath.Join(h.dir, "docker"), filepath.Join(h.dir, "etc-docker")
	for _, dir := range []string{data, etc} {
		if err := os.MkdirAll(dir, 0o711); err != nil { // the mode an engine gives its data root
			return fmt.Errorf("boot %s: %w", h.name, err)
		}
	}
	b, err := startBox(ctx, h.c.book, h.name, filepath.Join(h.dir, "boot.log"), boxSpec{
		Hostname: h.name,
		Resolver: fmt.Sprintf("nameserver %s\noptions attempts:1\n", underlayGateway),
		Tree:     h.c.o.Engine,
		Overlay:  h.dir + ".overlay",
		Share:    h.dir,
		Binds:    map[string]string{"/var/lib/docker": data, "/etc/docker": etc},
	})
	if err != nil {
		return err
	}
	if err := plug(ctx, h.c.underlay, b, port(h.addr), h.addr); err != nil {
		return fmt.Errorf("connect %s: %w", h.name, err)
	}
	h.box.Store(b)
	return nil
}

// Reboot cuts the host's power and starts it again, engine included: all its
// processes, namespaces, links, rules and /run are gone, its disk is as it was.
func (h *Host) Reboot(ctx context.Context) error {
	if err := h.PowerOff(ctx); err != nil {
		return err
	}
	return h.PowerOn(ctx)
}

// PowerOff cuts the host's power. Only PowerOn may follow.
func (h *Host) PowerOff(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	// The kernel removes links of a dead namespace some time later; this one
	// must be gone when the next boot makes it again.
	if err := h.c.underlay.ip(ctx, "link del "+port(h.addr)); err != nil {
		return fmt.Errorf("power off %s: %w", h.name, err)
	}
	if err := h.box.Load().proc.kill(ctx); err != nil {
		return fmt.Errorf("power off %s: %w", h.name, err)
	}
	h.engine = nil
	if err := removeHostCgroups(h.cgroup(), h.dir); err != nil {
		return fmt.Errorf("power off %s: %w", h.name, err)
	}
	return nil
}

// cgroup is the name of the host's cgroup on the machine.
func (h *Host) cgroup() string { return filepath.Join(cgroupName(h.c.o.Dir), h.name) }

// PowerOn boots the host after PowerOff and starts its engine.
func (h *Host) PowerOn(ctx context.Context) error {
	if err := h.boot(ctx); err != nil {
		return err
	}
	return h.StartEngine(ctx)
}

// Exec runs a command on the host, with its file system, network and processes,
// and returns its standard output; an error carries its standard error.
func (h *Host) Exec(ctx context.Context, args ...string) (string, error) {
	return h.box.Load().run(ctx, false, "", args...)
}

// ExecNet runs a command of the machine in the host's network alone: for tools
// that an engine tree lacks, such as tcpdump.
func (h *Host) ExecNet(ctx context.Context, args ...string) (string, error) {
	return h.box.Load().run(ctx, true, "", args...)
}

// Command prepares a command on the host, for callers that want its streams.
// When ctx ends the command is killed with its process group.
func (h *Host) Command(ctx context.Context, args ...string) *exec.Cmd {
	return h.box.Load().command(ctx, false, args...)
}

// InContainer runs a program of a container in its file system and network, and
// returns its standard output; an error carries its standard error. It is what
// `docker exec` is for a test that asks something of the network, without command
// line, engine and runtime, which cost a second of CPU on a slow kernel.
func (h *Host) InContainer(ctx context.Context, container string, args ...string) (string, error) {
	cmd, err := h.ContainerCommand(ctx, container, args...)
	if err != nil {
		return "", err
	}
	out, err := output(cmd)
	if err != nil {
		return out, fmt.Errorf("%s: in container %.12s: %s: %w", h.name, container, strings.Join(args, " "), err)
	}
	return out, nil
}

// ContainerCommand prepares what InContainer runs, for callers that want its
// streams. It ends with the container, as it is one of its processes; when ctx ends
// it is killed.
func (h *Host) ContainerCommand(ctx context.Context, container string, args ...string) (*exec.Cmd, error) {
	c, err := get[struct{ State struct{ Pid int } }](ctx, h, "/containers/"+container+"/json")
	if err != nil {
		return nil, err
	}
	if c.State.Pid == 0 {
		return nil, fmt.Errorf("%s: container %s does not run", h.name, container)
	}
	// By files, as the pid is one of the host's.
	ns := fmt.Sprintf("/proc/%d/root/proc/%d/ns/", h.PID(), c.State.Pid)
	cmd := exec.CommandContext(ctx, tool("nsenter"), append([]string{"--mount=" + ns + "mnt", "--uts=" + ns + "uts", "--net=" + ns + "net", "--pid=" + ns + "pid", "--"}, args...)...)
	cmd.Env = []string{safePath, "HOME=/root"}
	killWithGroup(cmd)
	return cmd, nil
}

// Docker runs the docker command line against the host's engine and returns its
// standard output without the final newline; an error carries its standard
// error.
func (h *Host) Docker(ctx context.Context, args ...string) (string, error) {
	out, err := output(h.DockerCommand(ctx, args...))
	out = strings.TrimSuffix(out, "\n")
	if err != nil {
		return out, fmt.Errorf("%s: docker %s: %w", h.name, strings.Join(args, " "), err)
	}
	return out, nil
}

// DockerCommand prepares a docker command for callers that want its streams.
func (h *Host) DockerCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, tool("docker"), append([]string{"-H", "unix://" + h.Socket()}, args...)...)
	// A configuration of its own: the user's may name another engine, or
	// proxies that the command line passes on to containers.
	cmd.Env = []string{safePath, "HOME=/root", "DOCKER_CONFIG=" + h.c.path("docker-config"), "DOCKER_CLI_HINTS=false"}
	return cmd
}

// APIError is an answer of the engine other than success.
type APIError struct {
	Method, Path string
	Status       int // of HTTP
	Message      string
}

func (e *APIError) Error() string {
	return fmt.Sprintf("%s %s: %d: %s", e.Method, e.Path, e.Status, e.Message)
}

// NotFound says whether an engine answered that something is not there.
func NotFound(err error) bool {
	var e *APIError
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// API sends a request to the host's engine and returns the body of its answer.
// The path may begin with a version (/v1.41/info). A body is sent as it is if it
// is an io.Reader, as JSON if it is anything else but nil. Any status from 400
// on is an *APIError.
func (h *Host) API(ctx context.Context, method, path string, body any) ([]byte, error) {
	var in io.Reader
	contentType := "application/json"
	switch b := body.(type) {
	case nil:
	case io.Reader:
		in, contentType = b, "application/x-tar"
	default:
		text, err := json.Marshal(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %s %s: %w", h.name, method, path, err)
		}
		in = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://docker"+path, in)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.name, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", contentType)
	}
	res, err := h.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.name, err)
	}
	defer res.Body.Close()
	out, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, fmt.Errorf("%s: %s %s: %w", h.name, method, path, err)
	}
	if res.StatusCode >= 400 {
		var e struct{ Message string }
		if json.Unmarshal(out, &e) != nil || e.Message == "" {
			e.Message = strings.TrimSpace(string(out))
		}
		return out, fmt.Errorf("%s: %w", h.name, &APIError{method, path, res.StatusCode, e.Message})
	}
	return out, nil
}

// get asks the engine for an object.
func get[T any](ctx context.Context, h *Host, path string) (T, error) {
	var v T
	text, err := h.API(ctx, "GET", path, nil)
	if err != nil {
		return v, err
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return v, fmt.Errorf("%s: GET %s: %w", h.name, path, err)
	}
	return v, nil
}

// engine is one run of dockerd.
type engine struct {
	done chan struct{} // closed when it has exited
	err  error         // how; read after done
}

// engineScript starts dockerd as the process it is run in: in the cgroups of
// its first argument, with the rest as dockerd's own. The pid file of an engine
// that was killed would make the next refuse to start when its pid is taken
// again, which in a PID namespace is likely.
const engineScript = `
for dir in $1; do echo 0 >"$dir/cgroup.procs" || exit; done
rm -f /run/docker.pid
shift
exec dockerd "$@"`

// StartEngine starts the engine and waits until it answers. On a host whose
// engine runs it does nothing.
func (h *Host) StartEngine(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.engine != nil && !h.engine.exited() {
		return nil
	}
	begun := time.Now()
	log, err := os.OpenFile(h.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("start engine of %s: %w", h.name, err)
	}
	defer log.Close()
	from, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("start engine of %s: %w", h.name, err)
	}
	groups, err := makeCgroup(filepath.Join(h.cgroup(), engineCgroup))
	if err != nil {
		return fmt.Errorf("start engine of %s: %w", h.name, err)
	}
	args := append([]string{"/bin/sh", "-c", engineScript, "start-dockerd", strings.Join(groups, " "),
		"-H", "unix:///run/docker.sock", "-H", "unix://" + h.Socket(),
		"--debug", "--pidfile", "/run/docker.pid", "--cgroup-parent", "/" + h.cgroup(),
	}, h.c.o.EngineArgs...)
	cmd := h.box.Load().command(context.WithoutCancel(ctx), false, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Setsid = false, true
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start engine of %s: %w", h.name, err)
	}
	e := &engine{done: make(chan struct{})}
	go func() {
		e.err = cmd.Wait()
		close(e.done)
	}()
	h.engine = e
	err = Wait(ctx, "engine of "+h.name+" answers", func(ctx context.Context) error {
		if e.exited() {
			return nil
		}
		_, err := h.API(ctx, "GET", "/_ping", nil)
		return err
	})
	if e.exited() {
		h.engine = nil
		err = fmt.Errorf("start engine of %s: it ended: %w", h.name, e.err)
	}
	if err != nil {
		return fmt.Errorf("%w\n%s ends with:\n%s", err, h.LogFile(), h.logTail(from))
	}
	h.c.log.DebugContext(ctx, "engine answers", "node", h.name, "took", time.Since(begun))
	return nil
}

// logTail returns the last lines that the engine has logged behind an offset.
func (h *Host) logTail(from int64) string {
	const lines = 8 // an engine says why it gives up in its last one or two
	f, err := os.Open(h.LogFile())
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	text, err := io.ReadAll(io.NewSectionReader(f, from, 1<<30))
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

func (e *engine) exited() bool {
	select {
	case <-e.done:
		return true
	default:
		return false
	}
}

// StopEngine asks the engine to stop, as an administrator does, and waits until
// it has: it stops the host's containers and plugins first, and gives each ten
// seconds to go.
func (h *Host) StopEngine(ctx context.Context) error { return h.endEngine(ctx, "TERM") }

// KillEngine ends the engine with SIGKILL. Containers and plugins stay until an
// engine is started again.
func (h *Host) KillEngine(ctx context.Context) error { return h.endEngine(ctx, "KILL") }

func (h *Host) endEngine(ctx context.Context, signal string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.engine == nil || h.engine.exited() {
		return fmt.Errorf("end engine of %s: %w", h.name, ErrNoEngine)
	}
	if _, err := h.Exec(ctx, "/bin/sh", "-c", `kill -`+signal+` "$(cat /run/docker.pid)"`); err != nil {
		return fmt.Errorf("end engine: %w", err)
	}
	select {
	case <-h.engine.done:
		h.engine = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end engine of %s: it was told but still runs: %w", h.name, ctx.Err())
	}
}

// ErrNoEngine says that the host's engine does not run.
var ErrNoEngine = errors.New("the engine does not run")
