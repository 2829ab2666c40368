package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func unpack(t *testing.T, text []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(text))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestArchiveIsTheSameEachTimeAndConsistent(t *testing.T) {
	one, err := archive([]byte("probe"), []byte("busybox"))
	if err != nil {
		t.Fatal(err)
	}
	two, err := archive([]byte("probe"), []byte("busybox"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one, two) {
		t.Error("two archives of the same content differ: nodes would not agree about the image")
	}
	files := unpack(t, one)
	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range manifest {
		names = append(names, m.RepoTags...)
		var c config
		if err := json.Unmarshal(files[m.Config], &c); err != nil {
			t.Fatalf("%s: %v", m.Config, err)
		}
		if want := digest(files[m.Config]) + ".json"; m.Config != want {
			t.Errorf("config is called %s, want its digest %s", m.Config, want)
		}
		if want := "sha256:" + digest(files[m.Layers[0]]); c.RootFS.DiffIDs[0] != want {
			t.Errorf("%s names layer %s, want %s", m.RepoTags, c.RootFS.DiffIDs[0], want)
		}
	}
	if want := []string{Probe, Web}; !slices.Equal(names, want) {
		t.Errorf("images %v, want %v", names, want)
	}
	if got := unpack(t, files["layer.tar"]); string(got["probe"]) != "probe" || string(got["bin/busybox"]) != "busybox" {
		t.Error("the layer has not the two programs that were put in")
	}
}

func TestBusyboxWithLibrariesIsRefused(t *testing.T) {
	if _, err := readBusybox([]string{filepath.Join(t.TempDir(), "busybox")}); err == nil || !strings.Contains(err.Error(), "install busybox-static") {
		t.Errorf("no busybox: %v, want advice to install it", err)
	}
	path := filepath.Join(t.TempDir(), "busybox")
	if err := os.WriteFile(path, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := readBusybox([]string{path}); err == nil {
		t.Error("a file that is no program was taken")
	}
}
