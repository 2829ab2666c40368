package diag

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// SocketDir is where the plugin's processes put their diagnosis sockets, on the host.
const SocketDir = "/run/sluice"

// SocketSuffix is the end of a diagnosis socket's file name.
const SocketSuffix = ".sock"

// SocketName is the name, before the suffix, of the socket of the plugin that the
// engine calls alias: without :latest, which docker adds by itself, and with _
// for the slashes of a repository. It is empty for an empty alias.
func SocketName(alias string) string {
	return strings.ReplaceAll(strings.TrimSuffix(alias, ":latest"), "/", "_")
}

// FindSocket returns the socket to ask: the only one in dir, or the one of the
// plugin named, like sluice:latest or a beginning of it that fits one alone. The
// error lists what there is.
func FindSocket(dir, plugin string) (string, error) {
	files, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("look for sluice's sockets: %w", err)
	}
	wanted := SocketName(plugin)
	var all, fit []string
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), SocketSuffix)
		if !ok {
			continue
		}
		all = append(all, name)
		if name == wanted {
			return filepath.Join(dir, f.Name()), nil
		}
		if strings.HasPrefix(name, wanted) {
			fit = append(fit, name)
		}
	}
	slices.Sort(all) // files are in the order with their suffix
	slices.Sort(fit)
	switch {
	case len(fit) == 1:
		return filepath.Join(dir, fit[0]+SocketSuffix), nil
	case len(all) == 0:
		return "", fmt.Errorf("no plugin answers in %s: is sluice enabled on this host? See: docker plugin ls", dir)
	case plugin == "":
		return "", fmt.Errorf("several plugins run on this host: choose one with --plugin: %s", strings.Join(all, ", "))
	case len(fit) > 1:
		return "", fmt.Errorf("--plugin %s fits several: %s", plugin, strings.Join(fit, ", "))
	}
	return "", fmt.Errorf("no plugin %q in %s; there is: %s", plugin, dir, strings.Join(all, ", "))
}

// Ask puts a question to the plugin behind socket and reads the answer into out.
// raw is the answer as it came.
func Ask(ctx context.Context, socket, path string, out Answer) (raw []byte, err error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://sluice"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	// The URL that net/http puts in front is made up: only the reason helps.
	if wrapped := (*url.Error)(nil); errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("ask %s: permission denied; run as root", socket)
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("ask %s: the plugin does not answer in time; its log may say why: journalctl -u docker", socket)
	case err != nil:
		return nil, fmt.Errorf("ask %s: %w; does the plugin run? See: docker plugin ls", socket, err)
	}
	defer resp.Body.Close()
	raw, err = io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("ask %s: read the answer: %w", socket, err)
	}
	if resp.StatusCode == wrongQuestion {
		return nil, errors.New(strings.TrimSpace(string(raw)))
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask %s: %s: %s; command and plugin may be of different versions", socket, resp.Status, strings.TrimSpace(string(raw)))
	}
	if err := json.Unmarshal(raw, out); err != nil {
		return nil, fmt.Errorf("answer of %s: %w; command and plugin may be of different versions", socket, err)
	}
	return raw, nil
}
