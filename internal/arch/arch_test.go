package arch

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestHouseRulesHold reads the whole module.
func TestHouseRulesHold(t *testing.T) {
	root := filepath.Join("..", "..")
	fset := token.NewFileSet()
	for _, b := range Check(fset, load(t, fset, os.DirFS(root))) {
		t.Error(b)
	}
}

// TestEveryRowOfTheTablesIsUsed keeps the tables from naming what is long gone.
// A package that is planned has no row; it gets one when it comes.
func TestEveryRowOfTheTablesIsUsed(t *testing.T) {
	fset := token.NewFileSet()
	packages := load(t, fset, os.DirFS(filepath.Join("..", "..")))
	for _, l := range layers {
		if !slices.ContainsFunc(packages, func(p Package) bool { return covers(l.path, p.Path) }) {
			t.Errorf("%s %s: there is no such package", l.layer, l.path)
		}
	}
}

// load parses every Go file of a tree, as the go command sees it: directories
// that begin with . or _, and testdata, are not packages.
func load(t *testing.T, fset *token.FileSet, tree fs.FS) []Package {
	t.Helper()
	found := make(map[string]*Package)
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			base := d.Name()
			if base != "." && (strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") || base == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(fset, name, text, parser.ParseComments)
		if err != nil {
			return err
		}
		dir := path.Dir(name)
		if found[dir] == nil {
			found[dir] = &Package{Path: dir}
		}
		found[dir].Files = append(found[dir].Files, File{Name: path.Base(name), AST: f})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	out := make([]Package, 0, len(found))
	for _, p := range found {
		out = append(out, *p)
	}
	slices.SortFunc(out, func(a, b Package) int { return strings.Compare(a.Path, b.Path) })
	return out
}

// TestPlantedBreachesAreFound tries every rule on a source that breaks it, and
// on the nearest one that does not.
func TestPlantedBreachesAreFound(t *testing.T) {
	imports := func(paths ...string) string {
		var b strings.Builder
		b.WriteString("package p\n")
		for _, p := range paths {
			b.WriteString("import _ \"" + p + "\"\n")
		}
		return b.String()
	}
	for _, c := range []struct {
		name, pkg, file, source string
		want                    string // part of the one breach; empty: none
	}{
		{"a package in no layer", "internal/util", "util.go", imports(), "in no layer"},
		{"an import of a package in no layer", "driver", "x.go", imports("sluice/internal/util"), "which is in no layer"},

		{"the nouns import nothing of ours", "internal/model", "x.go", imports("sluice/internal/kernel"), "L0 may not import L1"},
		{"core imports core", "internal/plan", "x.go", imports("sluice/internal/kernel", "sluice/internal/model"), ""},
		{"core imports an adapter", "internal/plan", "x.go", imports("sluice/internal/linux"), "L1 may not import L2"},
		{"core imports a shell", "driver/overlay", "x.go", imports("sluice/driver"), "L1 may not import L3"},
		{"an adapter imports core", "internal/linux", "x.go", imports("sluice/internal/kernel"), ""},
		{"an adapter imports another", "internal/gossip", "x.go", imports("sluice/internal/store"), "L2 may not import L2"},
		{"an adapter imports a shell", "internal/linux", "x.go", imports("sluice/internal/reconcile"), "L2 may not import L3"},
		{"an adapter imports its own part", "internal/linux", "x.go", imports("sluice/internal/linux/nft"), ""},
		{"a part imports its adapter", "internal/linux/nft", "x.go", imports("sluice/internal/linux"), ""},
		{"a shell imports a shell", "driver", "x.go", imports("sluice/internal/reconcile"), ""},
		{"a shell imports an adapter", "driver", "x.go", imports("sluice/internal/linux"), "L3 may not import L2"},
		{"a root imports all", "plugin", "x.go", imports("sluice/internal/linux", "sluice/driver", "sluice/internal/model"), ""},
		{"a root imports a root", "cmd/sluice", "x.go", imports("sluice/plugin"), "nobody imports a root"},
		{"test code in production", "driver", "x.go", imports("sluice/internal/netnstest"), "which is for tests"},
		{"test code in a test", "driver", "x_test.go", imports("sluice/internal/netnstest"), ""},
		{"a test sees everything", "internal/plan", "x_test.go", imports("sluice/internal/linux", "os", "pgregory.net/rapid"), ""},

		{"a library at home", "internal/linux", "x.go", imports("github.com/vishvananda/netlink/nl"), ""},
		{"a library at home in a part", "internal/linux/nft", "x.go", imports("github.com/google/nftables"), ""},
		{"a library abroad", "plugin", "x.go", imports("github.com/vishvananda/netlink"), "whose one home is internal/linux/..."},
		{"a library in the core", "lb/service", "x.go", imports("go.etcd.io/bbolt"), "whose one home is internal/store"},
		{"a library without a home", "internal/gossip", "x.go", imports("example.org/x/set"), "has no home"},
		{"a library that only begins alike", "internal/dockerapi", "x.go", imports("github.com/docker/dockerx"), "has no home"},
		{"a library of tests", "internal/netnstest", "x.go", imports("github.com/vishvananda/netlink"), ""},

		{"the system in the core", "internal/plan", "x.go", imports("os"), "imports os"},
		{"the network in the core", "lb/service", "x.go", imports("net"), "imports net"},
		{"a package below a forbidden one", "ipam/pool", "x.go", imports("log/slog"), "imports log/slog"},
		{"addresses are values", "ipam/pool", "x.go", imports("net/netip", "net/url", "time"), ""},
		{"a context in the core", "internal/kernel", "x.go", imports("context"), "imports context"},
		{"the system in a shell", "driver", "x.go", imports("os", "sync", "context"), ""},
		{"a goroutine in the core", "internal/plan", "x.go", "package p\nfunc f() { go f() }", "starts a goroutine"},
		{"a goroutine in a shell", "internal/view", "x.go", "package p\nfunc f() { go f() }", ""},
		{"the clock in the core", "internal/plan", "x.go", "package p\nimport \"time\"\nvar _ = time.Now()", "time.Now"},
		{"the clock under another name", "internal/plan", "x.go", "package p\nimport clock \"time\"\nvar _ = clock.Since", "time.Since"},
		{"the clock into its own scope", "internal/plan", "x.go", "package p\nimport . \"time\"\nvar _ = Now()", "imports time into its own scope"},
		{"a duration is a value", "internal/plan", "x.go", "package p\nimport \"time\"\nvar _ = 3 * time.Second", ""},
		{"another's method called Now", "internal/plan", "x.go", "package p\nimport \"time\"\nvar view struct{ Now time.Time }\nvar _ = view.Now", ""},

		{"a thing to do later", "driver", "x.go", "package p\n// TODO: all of it", "TODO"},
		{"a thing to mend later", "driver", "x_test.go", "package p\n/* FIXME(me) */", "FIXME"},
		{"a word that only contains it", "driver", "x.go", "package p\n// MASTODON and TODOS are no marks", ""},
		{"a skip that says nothing", "driver", "x_test.go", "package p\nfunc f(t T) { t.Skip() }", "without a reason"},
		{"a skip with an empty reason", "driver", "x_test.go", "package p\nfunc f(t T) { t.Skipf(\" \") }", "without a reason"},
		{"a skip by the other name", "driver", "x_test.go", "package p\nfunc f(t T) { t.SkipNow() }", "without a reason"},
		{"a skip with a reason", "driver", "x_test.go", "package p\nfunc f(t T) { t.Skip(\"needs root\"); t.Skipf(\"needs %s\", x) }", ""},
		{"a skip of a test package", "test/cluster", "x.go", "package p\nfunc f(t T) { t.Skip() }", "without a reason"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fset := token.NewFileSet()
			doc := parse(t, fset, "doc.go", "// Package p is planted.\npackage p")
			got := Check(fset, []Package{{Path: c.pkg, Files: []File{{"doc.go", doc}, {c.file, parse(t, fset, c.file, c.source)}}}})
			switch {
			case c.want == "" && len(got) > 0:
				t.Errorf("found %v, want nothing", got)
			case c.want != "" && (len(got) != 1 || !strings.Contains(got[0].What, c.want)):
				t.Errorf("found %v, want one breach with %q", got, c.want)
			}
		})
	}
}

// TestAPackageNeedsADocument tries the rule about doc.go.
func TestAPackageNeedsADocument(t *testing.T) {
	for _, c := range []struct{ name, file, source, want string }{
		{"right", "doc.go", "// Package p is planted.\npackage p", ""},
		{"no doc.go", "p.go", "// Package p is planted.\npackage p", "has no doc.go"},
		{"no comment", "doc.go", "package p", "must begin with"},
		{"a comment on something else", "doc.go", "// Package p is planted.\n\npackage p", "must begin with"},
		{"another package's name", "doc.go", "// Package q is planted.\npackage p", "must begin with"},
		{"a command in its own words", "doc.go", "// Sluice shows what the plugin does.\npackage main", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			fset := token.NewFileSet()
			got := Check(fset, []Package{{Path: "driver", Files: []File{{c.file, parse(t, fset, c.file, c.source)}}}})
			if c.want == "" && len(got) > 0 || c.want != "" && (len(got) != 1 || !strings.Contains(got[0].What, c.want)) {
				t.Errorf("found %v, want %q", got, c.want)
			}
		})
	}
}

func parse(t *testing.T, fset *token.FileSet, name, source string) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(fset, name, source, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	return f
}
