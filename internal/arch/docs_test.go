package arch

import (
	"encoding/json"
	"flag"
	"fmt"
	"go/ast"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"sluice/internal/options"
)

var update = flag.Bool("update", false, "rewrite the generated parts of the documents")

// top is the module's directory.
var top = filepath.Join("..", "..")

// A generated part stands between two comments that a reader does not see:
//
//	<!-- generated: NAME -->
//	...
//	<!-- end -->
var generated = regexp.MustCompile(`(?s)(<!-- generated: ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)`)

// TestDocsShowWhatTheCodeSays compares every generated part with the code, and
// rewrites it with -update.
func TestDocsShowWhatTheCodeSays(t *testing.T) {
	parts := generators(t)
	used := make(map[string]bool)
	for _, page := range pages(t) {
		now := generated.ReplaceAllStringFunc(page.text, func(part string) string {
			m := generated.FindStringSubmatch(part)
			write, known := parts[m[2]]
			if !known {
				t.Errorf("%s: nothing generates %q", page.name, m[2])
				return part
			}
			used[m[2]] = true
			return m[1] + write() + m[4]
		})
		if begun, ended := strings.Count(now, "<!-- generated: "), len(generated.FindAllString(now, -1)); begun != ended {
			t.Errorf("%s: %d generated parts begin and %d end", page.name, begun, ended)
		}
		if now == page.text {
			continue
		}
		if !*update {
			t.Errorf("%s (-) is not what the code says (+); to rewrite it: make docs\n%s", page.name, cmp.Diff(page.text, now))
			continue
		}
		if err := os.WriteFile(filepath.Join(top, page.name), []byte(now), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name := range parts {
		if !used[name] {
			t.Errorf("no page shows %q", name)
		}
	}
}

// generators are the generated parts by name.
func generators(t *testing.T) map[string]func() string {
	out := map[string]func() string{
		"settings":        func() string { return settingsTable(t) },
		"network-options": func() string { return options.Markdown(options.NetworkTable()) },
		"service-options": func() string { return options.Markdown(options.ServiceTable()) },
		"verbs":           func() string { return verbsTable(t) },
		"packages":        func() string { return packagesTable(t) },
		"import-rule":     importRule,
		"libraries":       func() string { return librariesTable(t) },

		"status-example":   func() string { return fence(healthy().Text()) },
		"services-example": func() string { return fence(starting().Text()) },
		"service-example":  func() string { return fence(entered().Text()) },
		"entry-example":    func() string { return fence(led(t, "81").Text()) },
		"ports-example":    func() string { return fence(led(t, "").Text()) },
		"ipam-example":     func() string { return fence(leaking().Text()) },
	}
	maps.Copy(out, packetPaths())
	return out
}

// settingsTable is made from config.json, which a test of plugin holds equal to
// the table in the code.
func settingsTable(t *testing.T) string {
	var b strings.Builder
	b.WriteString("| setting | default | meaning |\n|---|---|---|\n")
	for _, s := range settings(t) {
		value := "empty"
		if s.Value != "" {
			value = "`" + s.Value + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", s.Name, value, s.Description)
	}
	return b.String()
}

type setting struct{ Name, Value, Description string }

func settings(t *testing.T) []setting {
	var c struct{ Env []setting }
	if err := json.Unmarshal([]byte(read(t, "config.json")), &c); err != nil {
		t.Fatalf("config.json: %v", err)
	}
	return c.Env
}

func verbsTable(t *testing.T) string {
	var b strings.Builder
	b.WriteString("| command | answers |\n|---|---|\n")
	for _, v := range readCommand(t).verbs {
		fmt.Fprintf(&b, "| `sluice %s` | %s |\n", strings.TrimSpace(v[0]+" "+v[2]), v[1])
	}
	return b.String()
}

// command is what cmd/sluice understands, read from its source: to run it would
// leave the test cache unaware of changes.
type command struct {
	verbs [][3]string // name, what it does, and what must follow it, as in its table
	bare  []string    // words that it understands besides
	flags []string
}

func readCommand(t *testing.T) command {
	var c command
	for _, p := range load(t, token.NewFileSet(), os.DirFS(top)) {
		if p.Path != "cmd/sluice" {
			continue
		}
		for _, f := range p.Files {
			if !f.test() {
				ast.Inspect(f.AST, c.visit)
			}
		}
	}
	if len(c.verbs) == 0 || len(c.flags) == 0 {
		t.Fatalf("cmd/sluice has no table of verbs or no flags any more: %+v; this test must learn its new form", c)
	}
	return c
}

func (c *command) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.ValueSpec: // var verbs = []verb{{"status", "how ...", ...}, ...}
		if n.Names[0].Name != "verbs" || len(n.Values) != 1 {
			return true
		}
		table, ok := n.Values[0].(*ast.CompositeLit)
		if !ok {
			return true
		}
		for _, row := range table.Elts {
			var texts []string
			ast.Inspect(row, func(n ast.Node) bool {
				if s, ok := text(n); ok {
					texts = append(texts, s)
				}
				return true
			})
			if len(texts) >= 3 {
				c.verbs = append(c.verbs, [3]string(texts[:3]))
			}
		}
	case *ast.BinaryExpr: // name == "version"
		if x, ok := n.X.(*ast.Ident); ok && x.Name == "name" && n.Op == token.EQL {
			if s, ok := text(n.Y); ok && s != "" {
				c.bare = append(c.bare, s)
			}
		}
	case *ast.CallExpr: // flags.Bool("json", ...)
		f, ok := n.Fun.(*ast.SelectorExpr)
		if !ok || len(n.Args) != 3 {
			return true
		}
		if x, ok := f.X.(*ast.Ident); ok && x.Name == "flags" {
			if s, ok := text(n.Args[0]); ok {
				c.flags = append(c.flags, s)
			}
		}
	}
	return true
}

// text is the value of a string literal.
func text(n ast.Node) (string, bool) {
	lit, ok := n.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// packagesTable lists the packages there are, with their layer and the first
// sentence of their document.
func packagesTable(t *testing.T) string {
	var b strings.Builder
	b.WriteString("| package | layer | what for |\n|---|---|---|\n")
	for _, p := range load(t, token.NewFileSet(), os.DirFS(top)) {
		_, layer, _ := layerOf(p.Path)
		for _, f := range p.Files {
			if f.Name == "doc.go" {
				fmt.Fprintf(&b, "| `%s` | %s | %s |\n", p.Path, layer, purpose(f.AST))
			}
		}
	}
	return b.String()
}

// sentenceEnd is where a sentence, or what can stand for one, is over.
var sentenceEnd = regexp.MustCompile(`[.;?]( |$)`)

// purpose is the first sentence of a package's document without its beginning,
// "Package NAME", which the row has said already.
func purpose(f *ast.File) string {
	first, _, _ := strings.Cut(f.Doc.Text(), "\n\n") // behind it there may be a picture
	s := strings.TrimSuffix(strings.Join(strings.Fields(first), " "), ":")
	for _, begin := range []string{"Package ", "Command "} {
		if rest, ok := strings.CutPrefix(s, begin); ok {
			_, s, _ = strings.Cut(rest, " ")
		}
	}
	if end := sentenceEnd.FindStringIndex(s); end != nil {
		s = s[:end[0]]
	}
	return strings.ReplaceAll(s, "|", `\|`)
}

// importRule is the table of inner, in words.
func importRule() string {
	var b strings.Builder
	b.WriteString("| layer | may import of this module |\n|---|---|\n")
	for _, l := range []Layer{L0, L1, L2, L3, L4, T} {
		may := "nothing"
		if len(inner[l]) > 0 {
			names := make([]string, len(inner[l]))
			for i, m := range inner[l] {
				names[i] = string(m)
			}
			may = strings.Join(names, ", ")
		}
		fmt.Fprintf(&b, "| %s | %s |\n", l, may)
	}
	return b.String()
}

// why is the reason for each outside library.
var why = map[string]string{
	"github.com/docker/go-plugins-helpers": "the wire types of the two plugin APIs. It has no releases and gives a handler no context, so the serving is ours (`plugin/socket.go`)",
	"github.com/vishvananda/netlink":       "messages for links, addresses, neighbours, forwarding entries; what the engine itself uses",
	"github.com/vishvananda/netns":         "enters network namespaces",
	"github.com/google/nftables":           "rules and sets over netlink, in transactions, without the `nft` command",
	"github.com/mdlayher/netlink":          "what google/nftables speaks through; used to read what that cannot return",
	"github.com/moby/ipvs":                 "services and destinations of IPVS; what the engine itself uses",
	"github.com/coreos/go-iptables":        "the one chain in the host's INPUT, made with the iptables that the engine uses",
	"golang.org/x/sys":                     "system calls and constants",
	"github.com/hashicorp/memberlist":      "who is there, encrypted packets and streams between nodes; the engine's own gossip is built on it too",
	"github.com/docker/docker":             "client of the engine's API, with version negotiation",
	"go.etcd.io/bbolt":                     "one file, one writer, crash-safe transactions",
	"github.com/godbus/dbus/v5":            "speaks D-Bus to firewalld; pure Go, no dependencies, what systemd's own library and the engine use",
	"github.com/VictoriaMetrics/metrics":   "the text format of Prometheus, and nothing else: 5,000 lines and no goroutine of its own, where client_golang brings protobuf and a registry that lives as long as the process",
}

// librariesTable lists the libraries of homes with the version in go.mod.
func librariesTable(t *testing.T) string {
	mod := read(t, "go.mod")
	var b strings.Builder
	b.WriteString("| library | version | home | why |\n|---|---|---|---|\n")
	for _, h := range homes {
		version := regexp.MustCompile(`(?m)^\s*` + regexp.QuoteMeta(h.library) + ` (\S+)$`).FindStringSubmatch(mod)
		if version == nil || why[h.library] == "" {
			t.Errorf("library %s: version %v in go.mod, reason %q", h.library, version, why[h.library])
			continue
		}
		fmt.Fprintf(&b, "| `%s` | %s | `%s` | %s |\n", h.library, version[1], strings.TrimSuffix(h.home, "/..."), why[h.library])
	}
	if len(why) != len(homes) {
		t.Errorf("%d libraries have a home and %d a reason", len(homes), len(why))
	}
	return b.String()
}

// page is a document.
type page struct{ name, text string }

// pages are the documents: those of the root, and those in docs.
func pages(t *testing.T) []page {
	t.Helper()
	tree := os.DirFS(top)
	names, err := fs.Glob(tree, "*.md")
	if err == nil {
		err = fs.WalkDir(tree, "docs", func(name string, _ fs.DirEntry, err error) error {
			if strings.HasSuffix(name, ".md") {
				names = append(names, name)
			}
			return err
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	out := make([]page, len(names))
	for i, name := range names {
		out[i] = page{name, read(t, name)}
	}
	return out
}

// read is the text of a file of the module.
func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
