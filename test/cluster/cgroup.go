package cluster

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroups are the one thing that hosts leave in the machine when their
// processes are gone, so everything of a cluster is kept below one name:
//
//	sluice-cluster-HASH/h1/engine        dockerd, and with version 1 its plugins
//	sluice-cluster-HASH/h1/ID            containers, by dockerd's --cgroup-parent
//
// The engine's own is a leaf, because version 2 allows no processes in a cgroup
// that has children with controllers.

// cgroupRoot is where the machine mounts its cgroup hierarchies: one tree with
// version 2, one directory per controller with version 1.
const cgroupRoot = "/sys/fs/cgroup"

// engineCgroup is the name of the engine's own cgroup in its host's.
const engineCgroup = "engine"

// cgroupName is the cgroup of the cluster in dir. It follows from dir alone, so
// that a later run finds what a killed one left.
func cgroupName(dir string) string {
	h := fnv.New32a()
	h.Write([]byte(dir))
	return fmt.Sprintf("sluice-cluster-%08x", h.Sum32())
}

// hierarchies returns the roots of the machine's cgroup hierarchies.
func hierarchies() ([]string, error) {
	const procs = "cgroup.procs" // every cgroup has it
	if _, err := os.Stat(filepath.Join(cgroupRoot, procs)); err == nil {
		return []string{cgroupRoot}, nil
	}
	found, err := filepath.Glob(filepath.Join(cgroupRoot, "*", procs))
	if err != nil {
		return nil, err
	}
	for i, path := range found {
		found[i] = filepath.Dir(path)
	}
	return found, nil
}

// makeCgroup makes the cgroup of a name in every hierarchy, and returns the
// directories.
func makeCgroup(name string) ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range roots {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := inheritCpuset(root, dir); err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// inheritCpuset gives dir and its parents below root the processors and memory
// nodes of the level above: in version 1 a new cpuset has none, and takes no
// process until it has.
func inheritCpuset(root, dir string) error {
	if dir == root {
		return nil
	}
	parent := filepath.Dir(dir)
	if err := inheritCpuset(root, parent); err != nil {
		return err
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		above, err := os.ReadFile(filepath.Join(parent, file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another controller, or version 2, which inherits by itself
		}
		if err != nil {
			return err
		}
		f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0) // not to be made: version 2 gives it to whom the parent shares it with
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		_, err = f.Write(above)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// cgroups returns the directories of a cgroup in every hierarchy that has it.
func cgroups(name string) ([]string, error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, root := range roots {
		if _, err := os.Stat(filepath.Join(root, name)); err == nil {
			found = append(found, filepath.Join(root, name))
		}
	}
	return found, nil
}

// removeHostCgroups removes the cgroup of a host, whose disk is dir, or of
// several hosts, for which dir may be a pattern. Where both versions are
// mounted, runc puts plugins into the root of the version 2 hierarchy under
// their id alone, wherever their engine is; the disk tells the ids.
func removeHostCgroups(name, dir string) error {
	errs := []error{removeCgroups(name)}
	plugins, err := filepath.Glob(filepath.Join(dir, "docker", "plugins", "*"))
	if err != nil {
		return err
	}
	for _, p := range plugins {
		// 64 hexadecimal digits; beside them stand the engine's own directories.
		if id := filepath.Base(p); len(id) == 64 {
			errs = append(errs, removeCgroups(id))
		}
	}
	return errors.Join(errs...)
}

// removeCgroups removes the cgroup and all below it; its processes are gone.
func removeCgroups(name string) error {
	roots, err := cgroups(name)
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range roots {
		var dirs []string
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		slices.Reverse(dirs) // children before parents
		for _, dir := range dirs {
			errs = append(errs, removeCgroup(dir))
		}
	}
	return errors.Join(errs...)
}

// removeCgroup removes one empty cgroup. A process leaves its cgroup a moment
// after its exit was seen, so a busy one is tried again for a second (measured:
// under 10 ms).
func removeCgroup(dir string) error {
	deadline := time.Now().Add(time.Second)
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return &os.PathError{Op: "rmdir", Path: dir, Err: err}
		}
		time.Sleep(5 * time.Millisecond)
	}
}
