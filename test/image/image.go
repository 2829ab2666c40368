package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// Names of the images in the archive.
const (
	Probe = "sluice-probe:test"
	Web   = "sluice-web:test"
)

// probePackage is what /probe is built from.
const probePackage = "sluice/test/image/probe"

// busyboxPaths are where Debian's busybox-static and busybox put the program.
var busyboxPaths = []string{"/bin/busybox", "/usr/bin/busybox"}

// Build writes the archive into dir and returns its path, and leaves the program
// probe of the images beside it, for hosts. It needs the go command, a working
// directory inside this module, and busybox-static.
func Build(ctx context.Context, dir string) (string, error) {
	probe, err := buildProbe(ctx, dir)
	if err != nil {
		return "", fmt.Errorf("make images: %w", err)
	}
	busybox, err := readBusybox(busyboxPaths)
	if err != nil {
		return "", fmt.Errorf("make images: %w", err)
	}
	text, err := archive(probe, busybox)
	if err != nil {
		return "", fmt.Errorf("make images: %w", err)
	}
	path := filepath.Join(dir, "images.tar")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return "", fmt.Errorf("make images: %w", err)
	}
	return path, nil
}

func buildProbe(ctx context.Context, dir string) ([]byte, error) {
	path := filepath.Join(dir, "probe")
	// -trimpath, no symbols and no build id: the same bytes in every checkout.
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", path, probePackage)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("go build %s: %w: %s", probePackage, err, bytes.TrimSpace(out))
	}
	return os.ReadFile(path)
}

// readBusybox returns a busybox that runs without libraries.
func readBusybox(paths []string) ([]byte, error) {
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		f, err := elf.NewFile(bytes.NewReader(text))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				return nil, fmt.Errorf("%s needs shared libraries, which the images have not: install busybox-static", path)
			}
		}
		return text, nil
	}
	return nil, fmt.Errorf("no busybox in %s: install busybox-static", strings.Join(paths, " or "))
}

// config is the part of an image's configuration that docker and the OCI
// (image-spec, config.md) agree on.
type config struct {
	Architecture string  `json:"architecture"`
	OS           string  `json:"os"`
	Created      string  `json:"created"`
	Config       process `json:"config"`
	RootFS       rootFS  `json:"rootfs"`
}

type process struct {
	Entrypoint []string
	Cmd        []string `json:",omitempty"`
	Env        []string
	StopSignal string `json:",omitempty"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

// image is what differs between the two.
type image struct {
	name    string
	process process
}

func images() []image {
	env := []string{"PATH=/bin:/"}
	return []image{
		{Probe, process{Entrypoint: []string{"/probe"}, Cmd: []string{"serve", "--tcp", "80", "--udp", "53"}, Env: env}},
		// As init of a container httpd ignores SIGTERM, and each stop would
		// take the engine's ten seconds of grace.
		{Web, process{Entrypoint: []string{"/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"}, Env: env, StopSignal: "SIGKILL"}},
	}
}

// archive returns both images in the format of `docker save`, which every
// engine since 1.10 loads: manifest.json, and the files that it names.
func archive(probe, busybox []byte) ([]byte, error) {
	layer, err := layer(probe, busybox)
	if err != nil {
		return nil, err
	}
	const layerPath = "layer.tar"
	files := []file{{name: layerPath, mode: 0o644, text: layer}}
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var manifest []entry
	for _, i := range images() {
		text, err := json.Marshal(config{
			Architecture: runtime.GOARCH,
			OS:           "linux",
			Created:      epoch.Format(time.RFC3339),
			Config:       i.process,
			RootFS:       rootFS{Type: "layers", DiffIDs: []string{"sha256:" + digest(layer)}},
		})
		if err != nil {
			return nil, err
		}
		name := digest(text) + ".json"
		files = append(files, file{name: name, mode: 0o644, text: text})
		manifest = append(manifest, entry{name, []string{i.name}, []string{layerPath}})
	}
	text, err := json.Marshal(manifest)
	if err != nil {
		return nil, err
	}
	return pack(append(files, file{name: "manifest.json", mode: 0o644, text: text}))
}

const who = `#!/bin/sh
printf 'Content-Type: application/json\r\n\r\n{"host":"%s","peer":"%s"}\n' "$(hostname)" "$REMOTE_ADDR"
`

// layer returns the file system that both images share.
func layer(probe, busybox []byte) ([]byte, error) {
	files := []file{
		{name: "bin/", mode: 0o755},
		{name: "bin/busybox", mode: 0o755, text: busybox},
	}
	// The applets that tests call in a container; httpd finds its scripts'
	// commands by PATH as well.
	for _, applet := range []string{"sh", "hostname", "ip", "ping", "wget", "nslookup", "cat", "sleep"} {
		files = append(files, file{name: "bin/" + applet, link: "busybox"})
	}
	return pack(append(files,
		file{name: "probe", mode: 0o755, text: probe},
		file{name: "tmp/", mode: 0o1777},
		file{name: "www/", mode: 0o755},
		file{name: "www/index.html", mode: 0o644, text: []byte("a web server of the sluice tests\n")},
		file{name: "www/cgi-bin/", mode: 0o755},
		file{name: "www/cgi-bin/who", mode: 0o755, text: []byte(who)},
	))
}

// file is an entry of an archive: a directory if its name ends in a slash, a
// symbolic link if it has a target.
type file struct {
	name string
	mode int64
	text []byte
	link string
}

// epoch is the date of everything in the archive: fixed, so that ids are.
var epoch = time.Unix(0, 0).UTC()

func pack(files []file) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: f.name, Mode: f.mode, Size: int64(len(f.text)), ModTime: epoch}
		switch {
		case f.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		case strings.HasSuffix(f.name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %w", f.name, err)
		}
		if _, err := w.Write(f.text); err != nil {
			return nil, fmt.Errorf("pack %s: %w", f.name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("pack: %w", err)
	}
	return out.Bytes(), nil
}

func digest(text []byte) string {
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}
