package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// builtEnv says that plugin and command were built just before: in a VM that takes ten
// times as long, and test binaries that run side by side would build over each other.
const builtEnv = "SLUICE_TEST_BUILT"

// Build makes plugin and command in root's build directory, unless the environment
// says that this was done (SLUICE_TEST_BUILT).
func Build(ctx context.Context, root string) error {
	if os.Getenv(builtEnv) != "" {
		return nil
	}
	if out, err := exec.CommandContext(ctx, "make", "-s", "-C", root, "build").CombinedOutput(); err != nil {
		return fmt.Errorf("make build: %w\n%s", err, out)
	}
	return nil
}

// Place copies a program to where the host finds it under the path returned: one
// with another engine sees no files of the machine but those in its directory.
func (h *Host) Place(program string) (string, error) {
	text, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	path := filepath.Join(h.dir, filepath.Base(program))
	return path, os.WriteFile(path, text, 0o755)
}

// SluicePath is where the host has the sluice command, once it was placed.
func (h *Host) SluicePath() string { return filepath.Join(h.dir, "sluice") }

// Sluice asks the plugin on the host by the placed command and decodes the answer
// into out. That the answer names problems is no error.
func (h *Host) Sluice(ctx context.Context, out any, args ...string) error {
	text, err := h.Exec(ctx, append([]string{h.SluicePath(), "--json"}, args...)...)
	if jerr := json.Unmarshal([]byte(text), out); jerr != nil {
		return fmt.Errorf("%s: sluice %s: %w", h.name, strings.Join(args, " "), errors.Join(jerr, err))
	}
	return nil
}

// PluginPID is the plugin's process, as the host counts. None is an error; so are several,
// but for a moment: a process that starts a command is two until that runs.
func (h *Host) PluginPID(ctx context.Context) (string, error) {
	const moment = 5 * time.Second
	wctx, cancel := context.WithTimeout(ctx, moment)
	defer cancel()
	var pids []string
	err := Wait(wctx, h.name+": one process of the plugin", func(context.Context) error {
		out, err := h.Exec(ctx, "sh", "-c", `for p in /proc/[0-9]*; do
			[ "$(readlink $p/exe)" = /bin/sluice-plugin ] && echo "${p#/proc/}"; done; true`)
		if err != nil {
			return err
		}
		if pids = strings.Fields(out); len(pids) > 1 {
			return fmt.Errorf("there are %d: %v", len(pids), pids)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if len(pids) == 0 {
		return "", fmt.Errorf("%s: there is no process of the plugin", h.name)
	}
	return pids[0], nil
}

// InNetwork runs a command of the machine in the namespace that sluice has on the
// host for a network, by the network's id.
func (h *Host) InNetwork(ctx context.Context, id string, args ...string) (string, error) {
	// Pins are mounts of the host, which its first process sees.
	pin := fmt.Sprintf("/proc/%d/root/run/netns/sluice-%s", h.PID(), id[:12])
	return h.ExecNet(ctx, append([]string{"nsenter", "--net=" + pin, "--"}, args...)...)
}

// EngineOwn tells whether a line of a snapshot's difference is the engine's own. The
// sandbox of its ingress network is made anew when it starts, with other names and
// ports; the jump to DOCKER-USER goes and comes, see Host.SettledSnapshot, and is
// gone while it is killed at the wrong moment. One that was killed ends its plugins when
// it starts, and may unmount what belongs to them after it has started them again
// (Manager.HandleExitEvent); they have mounts of their own of the same.
func EngineOwn(line string) bool {
	return strings.Contains(line, "ingress_sbox") ||
		strings.HasPrefix(line, "-mount ") && strings.Contains(line, "/propagated-mount ") ||
		strings.Contains(line, "link veth") && strings.Contains(line, "master docker_gwbridge") ||
		strings.HasSuffix(line, "jump DOCKER-USER") || strings.HasSuffix(line, "-j DOCKER-USER")
}

// UseIngress publishes a port by the engines' own mesh for a moment, with a service
// of an image: on a kernel with ip_vs they keep some rules from then on, also for
// snapshots taken after a power cut.
func (c *Cluster) UseIngress(ctx context.Context, image string) error {
	const port = "8099" // of no test
	if _, err := c.Host(1).Docker(ctx, "service", "create", "-d", "--no-resolve-image", "--name", "first", "--publish", port+":80", image); err != nil {
		return err
	}
	published := func(want bool) error {
		return Wait(ctx, fmt.Sprintf("all engines have rules for the port: %t", want), func(ctx context.Context) error {
			for _, h := range c.hosts {
				if out, err := h.ExecNet(ctx, "iptables-save"); err != nil || strings.Contains(out, port) != want {
					return fmt.Errorf("%s: %v\n%s", h.name, err, out)
				}
			}
			return nil
		})
	}
	err := published(true)
	_, rmErr := c.Host(1).Docker(ctx, "service", "rm", "first")
	if err := errors.Join(err, rmErr); err != nil {
		return err
	}
	return published(false)
}

// KeepLogs copies the engines' logs, which hold the plugins' too, to a directory,
// which it makes: the cluster's own goes with it.
func (c *Cluster) KeepLogs(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("keep logs: %w", err)
	}
	var errs []error
	for _, h := range c.hosts {
		text, err := os.ReadFile(h.LogFile())
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, h.name+".log"), text, 0o644)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("keep logs: %w", err))
		}
	}
	return errors.Join(errs...)
}
