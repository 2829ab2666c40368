package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/docker/docker/api/types"
	"github.com/google/go-cmp/cmp"
)

// readManifest is config.json as the engine reads it, except that a key it does
// not know is an error here: the engine would pass over a misspelt one.
func readManifest(t *testing.T) types.PluginConfig {
	t.Helper()
	b, err := os.ReadFile("../config.json")
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	var c types.PluginConfig
	if err := dec.Decode(&c); err != nil {
		t.Fatalf("config.json: %v", err)
	}
	return c
}

func TestManifestNamesBothDriversOnOneSocket(t *testing.T) {
	c := readManifest(t)
	// The engine looks handlers up by the full text; another version silently
	// activates nothing (moby plugin/store.go, CallHandler).
	var got []string
	for _, ty := range c.Interface.Types {
		got = append(got, ty.String())
	}
	if diff := cmp.Diff([]string{"docker.networkdriver/1.0", "docker.ipamdriver/1.0"}, got); diff != "" {
		t.Errorf("types (-want +got)\n%s", diff)
	}
	if c.Interface.Socket != path.Base(socketPath) {
		t.Errorf("socket %s, the binary listens on %s", c.Interface.Socket, socketPath)
	}
	// Empty is moby.plugins.http/v1, what socket.go speaks.
	if p := c.Interface.ProtocolScheme; p != "" && p != "moby.plugins.http/v1" {
		t.Errorf("protocol %s", p)
	}
}

func TestManifestAsksForNoMoreThanItNeeds(t *testing.T) {
	c := readManifest(t)
	// Host network: the engine takes the device that Join names from its own
	// namespace, and that is where VXLAN's socket has to be.
	if c.Network.Type != "host" {
		t.Errorf("network %q, want host", c.Network.Type)
	}
	// NET_ADMIN: links, routes, nftables, iptables. SYS_ADMIN: entering and
	// pinning namespaces, and a writable /proc/sys. SYS_PTRACE, with the host's
	// processes: the files of the engine, by what it sees of them itself, as a mount
	// of its data directory could be missing, and who holds a published port.
	if diff := cmp.Diff([]string{"CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"}, c.Linux.Capabilities); diff != "" {
		t.Errorf("capabilities (-want +got)\n%s", diff)
	}
	if !c.PidHost {
		t.Error("no pidhost: the engine's process is not seen")
	}
	if c.IpcHost || c.Linux.AllowAllDevices || len(c.Linux.Devices) > 0 {
		t.Error("ipchost and devices are not needed")
	}
	if len(c.Args.Settable) > 0 || len(c.Args.Value) > 0 {
		t.Error("settings are environment variables, not arguments")
	}
}

// TestWhatTheManifestAsksForIsExplained: whoever installs the plugin grants all of it,
// and finds each in docs/security.md with what it is for, and what is not without it.
func TestWhatTheManifestAsksForIsExplained(t *testing.T) {
	c := readManifest(t)
	text, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	const title = "## What the plugin gets from the host"
	_, section, ok := strings.Cut(string(text), title)
	if !ok {
		t.Fatalf("docs/security.md has no section %q", title)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	reasons := map[string]string{}
	for row := range strings.Lines(section) {
		if f := strings.Split(row, "|"); len(f) == 5 {
			reasons[f[1]] = strings.TrimSpace(f[2])
		}
	}
	asked := slices.Clone(c.Linux.Capabilities)
	for _, m := range c.Mounts {
		asked = append(asked, "`"+*m.Source+"` of the host, "+strings.Join(m.Options, " and "))
	}
	if c.Network.Type == "host" {
		asked = append(asked, "host network")
	}
	if c.PidHost {
		asked = append(asked, "PID namespace of the host")
	}
	if c.IpcHost {
		asked = append(asked, "IPC namespace of the host")
	}
	for _, d := range c.Linux.Devices {
		asked = append(asked, "`"+*d.Path+"`")
	}
	if c.PropagatedMount != "" {
		asked = append(asked, "propagatedMount `"+c.PropagatedMount+"`")
	}
	for _, what := range asked {
		found := false
		for row, reason := range reasons {
			found = found || strings.Contains(row, what) && len(reason) > 0
		}
		if !found {
			t.Errorf("no row of that table explains %s", what)
		}
	}
	// And nothing that it does not ask for any more.
	for row := range reasons {
		for _, word := range strings.FieldsFunc(row, func(r rune) bool { return r == ' ' || r == ',' }) {
			if strings.HasPrefix(word, "CAP_") && !slices.Contains(c.Linux.Capabilities, word) {
				t.Errorf("the table explains %s, which the manifest does not ask for", word)
			}
		}
	}
}

func TestManifestMountsOnlyWhatExistsAtEveryBoot(t *testing.T) {
	c := readManifest(t)
	// A missing mount source makes the engine panic at its start, every time,
	// until somebody repairs it by hand (20.10 to 28.5). /run exists before any
	// daemon; /run/docker/netns, the engine's socket and /lib/modules need not.
	// For the same reason no source can be set: a typing error would be enough.
	if len(c.Mounts) != 1 {
		t.Fatalf("%d mounts, want the one of /run", len(c.Mounts))
	}
	m := c.Mounts[0]
	if m.Source == nil || *m.Source != "/run" || len(m.Settable) > 0 {
		t.Errorf("mount %+v, want /run and not settable", m)
	}
	cfg, err := parseConfig(env(nil))
	if err != nil {
		t.Fatal(err)
	}
	if m.Destination != cfg.HostRun {
		t.Errorf("/run is mounted on %s, the binary expects it on %s", m.Destination, cfg.HostRun)
	}
	// rbind: namespaces are mounts below /run. rshared: the containers' appear
	// here, and those pinned here appear on the host, where they outlive this
	// process. That takes a shared root as well, which the engine gives only to
	// plugins with a propagatedMount (moby plugin/v2/plugin_linux.go, InitSpec).
	if diff := cmp.Diff([]string{"rbind", "rshared"}, m.Options); diff != "" || m.Type != "bind" {
		t.Errorf("type %s, options (-want +got)\n%s", m.Type, diff)
	}
	// It is also the place that an upgrade keeps, so the state goes there.
	if c.PropagatedMount != cfg.StateDir {
		t.Errorf("propagatedMount %q, state directory %q", c.PropagatedMount, cfg.StateDir)
	}
}

func TestManifestHasTheSettingsOfTheTable(t *testing.T) {
	type row struct{ Name, Value, Doc string }
	var got, want []row
	for _, e := range readManifest(t).Env {
		if e.Value == nil {
			t.Errorf("%s has no value: the engine then does not set it at all", e.Name)
			continue
		}
		if !slices.Equal(e.Settable, []string{"value"}) {
			t.Errorf("%s: settable %q, want value", e.Name, e.Settable)
		}
		got = append(got, row{e.Name, *e.Value, e.Description})
	}
	for _, s := range settings {
		want = append(want, row{s.name, s.value, s.doc})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("config.json env (-table +file)\n%s", diff)
	}
}

func TestManifestStartsTheBinaryOfTheRootfs(t *testing.T) {
	c := readManifest(t)
	if len(c.Entrypoint) != 1 || !path.IsAbs(c.Entrypoint[0]) {
		t.Fatalf("entrypoint %q", c.Entrypoint)
	}
	b, err := os.ReadFile("../scripts/rootfs.sh")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), strings.TrimPrefix(c.Entrypoint[0], "/")) {
		t.Errorf("scripts/rootfs.sh does not put anything at %s", c.Entrypoint[0])
	}
}
