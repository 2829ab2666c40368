package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

// stateDir is where a host has the plugin's state directory. What is mounted on it
// there is mounted in the plugin, too: that is what makes it the propagated mount.
func stateDir(t *testing.T, i int) string {
	t.Helper()
	root := docker(t, i, "info", "--format", "{{.DockerRootDir}}")
	id := docker(t, i, "plugin", "inspect", "--format", "{{.Id}}", plugin)
	return filepath.Join(root, "plugins", id, "propagated-mount")
}

// statusUntil waits until a host's status is as it should be. It may name problems.
func statusUntil(t *testing.T, h *cluster.Host, what string, ok func(diag.Status) bool) {
	t.Helper()
	err := cluster.Wait(within(t), h.Name()+": "+what, func(ctx context.Context) error {
		out, err := h.Exec(ctx, sluiceCommand(h), "--json", "status")
		var st diag.Status
		if jerr := json.Unmarshal([]byte(out), &st); jerr != nil {
			return errors.Join(err, jerr)
		}
		if !ok(st) {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// saying reports whether a problem has all words.
func saying(st diag.Status, words ...string) bool {
	for _, p := range st.Problems {
		has := true
		for _, w := range words {
			has = has && strings.Contains(p.What+p.Do, w)
		}
		if has {
			return true
		}
	}
	return false
}

// TestDiskTrouble fills, cuts and write-protects the disk of a node's state file,
// under traffic. What runs goes on, what ends is taken note of, what is new is
// refused with the reason, and all of it heals without a restart. It takes 40 s.
func TestDiskTrouble(t *testing.T) {
	network(t, "web")
	service(t, "s1", "web", 3)
	v := vip(t, "s1", "web").String()
	h := lab.Host(3)
	c, extra := client(t, 3, "web"), client(t, 3, "web")
	reaches(t, h, c, 3, 6, v)
	dir := stateDir(t, 3)
	sh := func(script string) {
		t.Helper()
		// Not the test's context: this takes mounts away after the test, too.
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if out, err := h.Exec(ctx, "sh", "-c", "dir="+dir+" disk="+h.Dir()+"/disk; "+script); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	// A mount on a shared one shows more than once: with each of its peers.
	const unmount = `while grep -q " $dir .* - tmpfs " /proc/self/mountinfo; do umount -l $dir; done; ! grep -q " $disk " /proc/self/mountinfo || umount -l $disk`
	t.Cleanup(func() { sh(unmount) })
	traffic := make(chan summary, 1)
	ctx, stop := context.WithCancel(within(t))
	defer stop()
	go func() {
		s, err := get(ctx, h, c, "--for", "35s", "--every", "5ms", v)
		if err != nil {
			t.Error(err)
		}
		traffic <- s
	}()
	here := func(n int) func(diag.Status) bool {
		return func(st diag.Status) bool { return st.Networks == 1 && st.Endpoints == n }
	}
	// A disk that is full. What there is of it is made ready elsewhere, for the plugin to
	// see it full from the start.
	service(t, "s2", "web", 1, "--constraint", "node.hostname=="+h.Name())
	statusUntil(t, h, "its tasks and two clients", here(4))
	const full = "mkdir -p $disk && mount -t tmpfs -o size=1m tmpfs $disk && ! dd if=/dev/zero of=$disk/filler bs=4k 2>/dev/null && mount --bind $disk $dir"
	sh(full)
	docker(t, 1, "service", "scale", "-d", "s2=3")
	err := cluster.Wait(within(t), "docker service ps says what keeps new tasks from starting", func(ctx context.Context) error {
		out, err := lab.Host(1).Docker(ctx, "service", "ps", "--no-trunc", "--format", "{{.Error}}", "s2")
		if !strings.Contains(out, "no space left on device") || !strings.Contains(out, "free space") {
			return fmt.Errorf("%q, %v", out, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	statusUntil(t, h, "tells that the disk is full, and where", func(st diag.Status) bool {
		return saying(st, "cannot be saved", "no space left", dir) && !st.State.Saved
	})
	docker(t, 3, "rm", "-f", extra)
	docker(t, 1, "service", "scale", "-d", "s2=0")
	statusUntil(t, h, "what ended is gone on a full disk, too", here(2))
	noDiff(t, 3)
	sh("rm $disk/filler")
	statusUntil(t, h, "it has healed by itself", func(st diag.Status) bool { return st.State.Saved && !saying(st, "cannot be saved") })
	docker(t, 1, "service", "scale", "-d", "s2=1")
	running(t, "s2", 1)

	sh(unmount) // and back to the first file, which is of long ago by now
	docker(t, 1, "service", "scale", "-d", "s2=2")
	running(t, "s2", 2)
	statusUntil(t, h, "saved where it began", func(st diag.Status) bool { return here(4)(st) && st.State.Saved })

	// Cut short while it is in use.
	sh("truncate -s 5000 $dir/state.db")
	docker(t, 1, "service", "scale", "-d", "s2=1")
	statusUntil(t, h, "the file is whole again", func(st diag.Status) bool { return here(3)(st) && st.State.Saved })

	// Read-only. What ends is taken note of there, too.
	sh("mount -t tmpfs -o ro tmpfs $dir")
	docker(t, 1, "service", "scale", "-d", "s2=0")
	statusUntil(t, h, "tells that the disk is read-only", func(st diag.Status) bool {
		return here(2)(st) && saying(st, "cannot be saved", "read-only") && !st.State.Saved
	})
	sh(unmount)
	statusUntil(t, h, "saved again", func(st diag.Status) bool { return here(2)(st) && st.State.Saved })

	// A new process on a disk that is full and has no state file. What is mounted when a
	// process starts is its own: the first disk comes back with the next process.
	sh(full)
	kill := func() {
		t.Helper()
		if _, err := h.Exec(within(t), "kill", "-9", pluginPID(t, h)); err != nil {
			t.Fatal(err)
		}
	}
	kill()
	// The engine has called it, too: killed before, it would not be started again.
	rebuilt := func(st diag.Status) bool {
		return here(2)(st) && len(st.Gossip.Peers) == 2 && len(st.Calls) > 0
	}
	statusUntil(t, h, "rebuilt in memory, and says that it is not saved", func(st diag.Status) bool {
		return rebuilt(st) && saying(st, "no space left") && !st.State.Saved
	})
	reaches(t, h, c, 3, 6, v)
	sh("rm $disk/filler")
	statusUntil(t, h, "saved as soon as there is room", func(st diag.Status) bool { return rebuilt(st) && st.State.Saved })
	sh(unmount + "; rm $dir/state.db")
	kill()
	statusUntil(t, h, "rebuilt on the first disk", func(st diag.Status) bool { return rebuilt(st) && st.State.Saved })
	noDiff(t, 3)
	if s := <-traffic; !s.lossless() {
		t.Errorf("requests during the trouble: %+v", s)
	}
	reaches(t, h, c, 3, 6, v)
}
