package arch

import (
	"fmt"
	"go/ast"
	"go/token"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Module is the path of the module that the rules are for.
const Module = "sluice"

// Layer is a place in the order of imports.
type Layer string

// The layers, from the inside out; T is beside them.
const (
	L0 Layer = "L0"
	L1 Layer = "L1"
	L2 Layer = "L2"
	L3 Layer = "L3"
	L4 Layer = "L4"
	T  Layer = "T"
)

// layers says where each package belongs. A path that ends in /... stands for
// the package and all below it, which are one part as far as imports go.
var layers = []struct {
	path  string
	layer Layer
}{
	{"internal/model", L0},

	{"internal/kernel", L1},
	{"internal/plan", L1},
	{"internal/options", L1},
	{"driver/overlay", L1},
	{"lb/service", L1},
	{"lb/ingress", L1},
	{"lb/guard", L1},
	{"ipam/pool", L1},

	{"internal/linux/...", L2},
	{"internal/gossip", L2},
	{"internal/dockerapi", L2},
	{"internal/keyshare", L2},
	{"internal/store", L2},
	{"internal/firewalld", L2},

	{"driver", L3},
	{"ipam", L3},
	{"internal/view", L3},
	{"internal/reconcile", L3},
	{"internal/keyring", L3},
	{"internal/diag", L3},
	{"internal/monitor", L3},
	{"lb/expiry", L3},
	{"lb/publish", L3},

	{"plugin", L4},
	{"cmd/sluice", L4},

	{"internal/arch", T},
	{"internal/golden", T},
	{"internal/gossip/memnet", T},
	{"internal/kernel/kerneltest", T},
	{"internal/netnstest", T},
	{"test/...", T},
}

// inner lists the layers of the module that a layer may import. Packages of one
// layer may import each other where the layer is listed for itself; adapters may not.
var inner = map[Layer][]Layer{
	L0: {},
	L1: {L0, L1},
	L2: {L0, L1},
	L3: {L0, L1, L3},
	L4: {L0, L1, L2, L3},
	T:  {L0, L1, L2, L3, T},
}

// homes says which part of the module is the only one to import an outside
// library, given by the beginning of its import path. T packages are free.
var homes = []struct{ library, home string }{
	{"github.com/docker/go-plugins-helpers", "plugin"},
	{"github.com/vishvananda/netlink", "internal/linux/..."},
	{"github.com/vishvananda/netns", "internal/linux/..."},
	{"github.com/google/nftables", "internal/linux/..."},
	{"github.com/mdlayher/netlink", "internal/linux/..."},
	{"github.com/moby/ipvs", "internal/linux/..."},
	{"github.com/coreos/go-iptables", "internal/linux/..."},
	{"golang.org/x/sys", "internal/linux/..."},
	{"github.com/hashicorp/memberlist", "internal/gossip"},
	{"github.com/docker/docker", "internal/dockerapi"},
	{"go.etcd.io/bbolt", "internal/store"},
	{"github.com/VictoriaMetrics/metrics", "internal/monitor"},
	{"github.com/godbus/dbus/v5", "internal/firewalld"},
}

// impure lists standard packages, with all below them, that a pure package must
// not import: they reach the system, wait, or make a result differ from run to run.
var impure = []string{
	"context", "crypto/rand", "database", "log", "math/rand", "net", "os", "plugin",
	"runtime", "sync", "syscall", "testing", "unsafe",
}

// pure lists what stands below a name in impure and is pure all the same.
var pure = []string{"net/netip", "net/url"}

// clock lists the functions of package time that read or follow the clock.
var clock = []string{"After", "AfterFunc", "NewTicker", "NewTimer", "Now", "Since", "Sleep", "Tick", "Until"}

// Package is one directory's files.
type Package struct {
	Path  string // below the module, with slashes
	Files []File
}

// File is one parsed file.
type File struct {
	Name string // of the file alone
	AST  *ast.File
}

func (f File) test() bool { return strings.HasSuffix(f.Name, "_test.go") }

// Breach is one violation of a rule.
type Breach struct {
	Where string // file:line, or the package
	What  string
}

// String is the breach on one line.
func (b Breach) String() string { return b.Where + ": " + b.What }

// checker collects the breaches of one package.
type checker struct {
	fset     *token.FileSet
	p        Package
	part     string // the row of layers that it belongs to
	layer    Layer
	breaches []Breach
}

// Check applies every rule to every package.
func Check(fset *token.FileSet, packages []Package) []Breach {
	var out []Breach
	for _, p := range packages {
		c := checker{fset: fset, p: p}
		c.check()
		out = append(out, c.breaches...)
	}
	return out
}

func (c *checker) at(pos token.Pos, format string, args ...any) {
	where := c.fset.Position(pos)
	c.breaches = append(c.breaches, Breach{
		Where: fmt.Sprintf("%s:%d", path.Join(c.p.Path, path.Base(where.Filename)), where.Line),
		What:  fmt.Sprintf(format, args...),
	})
}

func (c *checker) whole(format string, args ...any) {
	c.breaches = append(c.breaches, Breach{c.p.Path, fmt.Sprintf(format, args...)})
}

func (c *checker) check() {
	var ok bool
	if c.part, c.layer, ok = layerOf(c.p.Path); !ok {
		c.whole("is in no layer; say in internal/arch/rules.go where it belongs")
		return
	}
	c.document()
	for _, f := range c.p.Files {
		c.comments(f)
		if f.test() {
			c.skips(f)
			continue
		}
		for _, i := range f.AST.Imports {
			name, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				c.at(i.Pos(), "import %s cannot be read: %v", i.Path.Value, err)
				continue
			}
			c.imports(i.Pos(), name)
		}
		if c.layer <= L1 {
			c.purity(f)
		}
		if c.layer == T {
			c.skips(f)
		}
	}
}

// covers reports whether a row's path stands for a package.
func covers(row, pkg string) bool {
	base, all := strings.CutSuffix(row, "/...")
	return pkg == base || all && strings.HasPrefix(pkg, base+"/")
}

// layerOf finds the row of layers for a package, and its layer.
func layerOf(pkg string) (string, Layer, bool) {
	for _, l := range layers {
		if covers(l.path, pkg) {
			return l.path, l.layer, true
		}
	}
	return "", "", false
}

// imports applies the import rule to one import.
func (c *checker) imports(pos token.Pos, name string) {
	if name == Module || strings.HasPrefix(name, Module+"/") {
		c.importsOwn(pos, strings.TrimPrefix(name, Module+"/"))
		return
	}
	if first, _, _ := strings.Cut(name, "/"); !strings.Contains(first, ".") {
		if c.layer <= L1 && isImpure(name) {
			c.at(pos, "imports %s; %s is pure: no system, no clock, no waiting", name, c.layer)
		}
		return
	}
	c.importsOutside(pos, name)
}

func (c *checker) importsOwn(pos token.Pos, pkg string) {
	part, layer, ok := layerOf(pkg)
	switch {
	case !ok:
		c.at(pos, "imports %s, which is in no layer", pkg)
	case part == c.part:
	case layer == T && c.layer != T:
		c.at(pos, "imports %s, which is for tests", pkg)
	case layer == L4:
		c.at(pos, "imports %s; nobody imports a root", pkg)
	case !slices.Contains(inner[c.layer], layer):
		c.at(pos, "imports %s; %s may not import %s", pkg, c.layer, layer)
	}
}

func (c *checker) importsOutside(pos token.Pos, name string) {
	if c.layer == T {
		return
	}
	for _, h := range homes {
		if name == h.library || strings.HasPrefix(name, h.library+"/") {
			if h.home != c.part {
				c.at(pos, "imports %s, whose one home is %s", name, h.home)
			}
			return
		}
	}
	c.at(pos, "imports %s, which has no home; say in internal/arch/rules.go which package wraps it", name)
}

func isImpure(name string) bool {
	below := func(root string) bool { return name == root || strings.HasPrefix(name, root+"/") }
	return slices.ContainsFunc(impure, below) && !slices.Contains(pure, name)
}

// purity looks for goroutines and reads of the clock.
func (c *checker) purity(f File) {
	clockName := importName(f.AST, "time")
	if clockName == "." {
		c.at(f.AST.Package, "imports time into its own scope, where reads of the clock cannot be told")
	}
	ast.Inspect(f.AST, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			c.at(n.Pos(), "starts a goroutine; %s is pure", c.layer)
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if ok && clockName != "" && x.Name == clockName && slices.Contains(clock, n.Sel.Name) {
				c.at(n.Pos(), "uses time.%s; %s is given the time as a value", n.Sel.Name, c.layer)
			}
		}
		return true
	})
}

// importName is what a file calls an imported package; empty if it does not
// import it.
func importName(f *ast.File, name string) string {
	for _, i := range f.Imports {
		if i.Path.Value != strconv.Quote(name) {
			continue
		}
		if i.Name != nil {
			return i.Name.Name
		}
		return path.Base(name)
	}
	return ""
}

// document demands a doc.go with a comment on the package.
func (c *checker) document() {
	for _, f := range c.p.Files {
		if f.Name != "doc.go" {
			continue
		}
		text := f.AST.Doc.Text()
		want := "Package " + f.AST.Name.Name + " "
		if f.AST.Name.Name == "main" {
			want = "" // a command says in its own words what it does
		}
		if text == "" || !strings.HasPrefix(text, want) {
			c.at(f.AST.Package, "the package comment must begin with %q", "Package "+f.AST.Name.Name)
		}
		return
	}
	c.whole("has no doc.go")
}

// comments looks for what was put off.
func (c *checker) comments(f File) {
	for _, g := range f.AST.Comments {
		for _, line := range g.List {
			for _, mark := range []string{"TODO", "FIXME", "XXX"} {
				if hasWord(line.Text, mark) {
					c.at(line.Pos(), "%s: do it, or say in the issue tracker why not yet", mark)
				}
			}
		}
	}
}

// hasWord reports whether word stands in text by itself.
func hasWord(text, word string) bool {
	return slices.Contains(strings.FieldsFunc(text, func(r rune) bool {
		return (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_'
	}), word)
}

// skips demands that a skipped test names what is missing.
func (c *checker) skips(f File) {
	ast.Inspect(f.AST, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		fun, ok := call.Fun.(*ast.SelectorExpr)
		if !ok || !slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, fun.Sel.Name) {
			return true
		}
		if _, ok := fun.X.(*ast.Ident); !ok {
			return true // a method of something else than a test
		}
		if fun.Sel.Name == "SkipNow" || len(call.Args) == 0 || emptyString(call.Args[0]) {
			c.at(call.Pos(), "%s without a reason; name what is missing", fun.Sel.Name)
		}
		return true
	})
}

func emptyString(e ast.Expr) bool {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return false
	}
	s, err := strconv.Unquote(lit.Value)
	return err != nil || strings.TrimSpace(s) == ""
}
