package arch

import (
	"fmt"
	"go/ast"
	"go/token"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sluice/internal/options"
	"sluice/ipam/pool"
)

// TestDocsNameOnlyWhatExists holds what the documents tell people to type, and
// the files and tests they point at, to the code.
func TestDocsNameOnlyWhatExists(t *testing.T) {
	n := readNames(t)
	for _, p := range pages(t) {
		for _, problem := range n.check(p.text) {
			t.Errorf("%s:%d: %s", p.name, problem.line, problem.what)
		}
		for _, problem := range links(p) {
			t.Errorf("%s:%d: %s", p.name, problem.line, problem.what)
		}
	}
}

// TestDocsMistakesAreFound plants each kind of mistake, beside its right form.
func TestDocsMistakesAreFound(t *testing.T) {
	n := readNames(t)
	for _, c := range []struct{ right, wrong, want string }{
		{"`make build`", "`make bulid`", "no target"},
		{"`sudo make demo KEEP=1`", "`sudo make demo HOLD=1`", "no setting HOLD"},
		{"words that make sense", "```\nmake sense\n```", "no target"},
		{"`sluice --json status`", "`sluice stats`", "no verb"},
		{"`sluice status --json`", "`sluice status --yaml`", "no flag"},
		{"`sluice service web --network shop`", "`sluice services web`", "no verb"},
		{"`sluice entry --port 81/udp`", "`sluice entry 81`", "no verb"},
		{"`docker network create -o sluice.mtu=1400 x`", "`docker network create -o sluice.mut=1400 x`", "no network option"},
		{"`driver-opt=sluice.threshold.upper=3`", "`driver-opt=sluice.threshold.top=3`", "no service option"},
		{"`driver-opt=sluice.weight=3`", "`driver-opt=sluice.vni=3`", "no service option"},
		{"`--ipam-opt sluice.size=24`", "`--ipam-opt sluice.bits=24`", "no --ipam-opt"},
		{"`sluice.scheduler`", "`sluice.scheduling`", "no option"},
		{"`docker plugin set sluice:latest LOG_LEVEL=debug`", "`docker plugin set sluice:latest LOGLEVEL=debug`", "no setting"},
		{"`internal/plan/plan.go`", "`internal/plan/plans.go`", "no file"},
		{"`TestHouseRulesHold`", "`TestHouseRulesHolds`", "no test"},
	} {
		if got := n.check(c.right); len(got) > 0 {
			t.Errorf("%s: %v, want nothing", c.right, got)
		}
		if got := n.check(c.wrong); len(got) != 1 || !strings.Contains(got[0].what, c.want) {
			t.Errorf("%s: %v, want one with %q", c.wrong, got, c.want)
		}
	}
}

// names is what may be named.
type names struct {
	targets, variables         map[string]bool // of the Makefile
	verbs, flags               map[string]bool // of the command sluice
	takes                      map[string]bool // verbs and flags that something must follow
	network, service, internal map[string]bool // options
	settings                   map[string]bool
	tests                      map[string]bool
}

var (
	makeTarget   = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):[^=\n]*## `)
	makeVariable = regexp.MustCompile(`(?m)^([A-Z]+)\s*\?=|\$\(([A-Z]+)\)`)
)

func readNames(t *testing.T) names {
	n := names{
		targets: map[string]bool{}, variables: map[string]bool{}, verbs: map[string]bool{}, flags: map[string]bool{"help": true},
		takes:   map[string]bool{"--plugin": true, "--socket": true, "--network": true, "--port": true},
		network: map[string]bool{}, service: map[string]bool{}, internal: map[string]bool{}, settings: map[string]bool{}, tests: map[string]bool{},
	}
	makefile := read(t, "Makefile")
	for _, m := range makeTarget.FindAllStringSubmatch(makefile, -1) {
		n.targets[m[1]] = true
	}
	for _, m := range makeVariable.FindAllStringSubmatch(makefile, -1) {
		n.variables[m[1]+m[2]] = true
	}
	c := readCommand(t)
	for _, v := range c.verbs {
		n.verbs[v[0]], n.takes[v[0]] = true, v[2] != ""
	}
	for _, v := range c.bare {
		n.verbs[v] = true
	}
	for _, f := range c.flags {
		n.flags[f] = true
	}
	for _, o := range options.NetworkTable() {
		n.network[o.Key] = true
		n.internal[o.Key] = o.Internal
	}
	for _, o := range options.ServiceTable() {
		n.service[o.Key] = true
	}
	for _, s := range settings(t) {
		n.settings[s.Name] = true
	}
	for _, p := range load(t, token.NewFileSet(), os.DirFS(top)) {
		for _, f := range p.Files {
			for _, d := range f.AST.Decls {
				if d, ok := d.(*ast.FuncDecl); ok && f.test() {
					n.tests[d.Name.Name] = true
				}
			}
		}
	}
	return n
}

// ipamOption reports whether --ipam-opt has the key: its value may still be wrong.
func ipamOption(key string) bool {
	_, err := pool.ParseOptions(map[string]string{key: ""})
	return err != nil && !strings.Contains(err.Error(), "unknown --ipam-opt")
}

// finding is a mistake on a line of a page.
type finding struct {
	line int
	what string
}

var (
	makeCall    = regexp.MustCompile(`(?:^|[;&|(] *|sudo |[A-Z]=\S+ )make((?: +[A-Za-z0-9:=./-]+)*)`)
	sluiceCall  = regexp.MustCompile(`(?:^|[;&|(] *|sudo )sluice((?: +[A-Za-z0-9:=./-]+)*)`)
	optionName  = regexp.MustCompile(`(-o |--opt |driver-opt=|--ipam-opt )?(sluice\.[a-z][a-z-]*(?:\.[a-z]+)*)`)
	pluginSet   = regexp.MustCompile(`docker plugin (?:set|install) .*`)
	assignment  = regexp.MustCompile(`\b([A-Z][A-Z_]+)=`)
	ourFile     = regexp.MustCompile(`^(?:plugin|driver|ipam|lb|cmd|internal|test|docs|scripts)(?:/[A-Za-z0-9_.-]+)+/?$`)
	testName    = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w+\b`)
	inlineCode  = regexp.MustCompile("`([^`]+)`")
	linkTarget  = regexp.MustCompile(`\]\(([^)]+)\)`)
	notInAnchor = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// check looks at the code of a page: what is fenced, and what stands in backquotes.
func (n names) check(text string) []finding {
	var out []finding
	fenced, line := false, 0
	for l := range strings.Lines(text) {
		line++
		l = strings.TrimSpace(l)
		if strings.HasPrefix(l, "```") {
			fenced = !fenced
			continue
		}
		pieces := []string{strings.TrimPrefix(strings.TrimPrefix(l, "$ "), "# ")}
		if !fenced {
			pieces = nil
			for _, m := range inlineCode.FindAllStringSubmatch(l, -1) {
				pieces = append(pieces, m[1])
			}
		}
		for _, p := range pieces {
			for _, what := range n.problems(p) {
				out = append(out, finding{line, what})
			}
		}
	}
	return out
}

func (n names) problems(code string) []string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	code, _, _ = strings.Cut(code, "  #") // a remark behind a command
	for _, m := range makeCall.FindAllStringSubmatch(code, -1) {
		for word := range strings.FieldsSeq(m[1]) {
			if name, _, set := strings.Cut(word, "="); set && !n.variables[name] {
				say("the Makefile has no setting %s", name)
			} else if !set && !n.targets[word] {
				say("the Makefile has no target %s", word)
			}
		}
	}
	for _, m := range sluiceCall.FindAllStringSubmatch(code, -1) {
		words := strings.Fields(m[1])
		for i, word := range words {
			flag, isFlag := strings.CutPrefix(word, "--")
			argument := i > 0 && n.takes[words[i-1]]
			switch {
			case argument:
			case isFlag && !n.flags[flag]:
				say("the command has no flag %s", word)
			case !isFlag && !n.verbs[word]:
				say("the command has no verb %s", word)
			}
		}
	}
	for _, m := range optionName.FindAllStringSubmatch(code, -1) {
		key := m[2]
		switch {
		case key == "sluice.sock": // a file
		case strings.HasPrefix(m[1], "-o"), strings.HasPrefix(m[1], "--opt"):
			if !n.network[key] || n.internal[key] {
				say("there is no network option %s", key)
			}
		case m[1] == "driver-opt=":
			if !n.service[key] {
				say("there is no service option %s", key)
			}
		case m[1] == "--ipam-opt ":
			if !ipamOption(key) {
				say("there is no --ipam-opt %s", key)
			}
		case !n.network[key] && !n.service[key] && !ipamOption(key):
			say("there is no option %s", key)
		}
	}
	for _, call := range pluginSet.FindAllString(code, -1) {
		for _, m := range assignment.FindAllStringSubmatch(call, -1) {
			if !n.settings[m[1]] {
				say("there is no setting %s; there are %s", m[1], strings.Join(slices.Sorted(maps.Keys(n.settings)), ", "))
			}
		}
	}
	for _, name := range testName.FindAllString(code, -1) {
		if !n.tests[name] {
			say("there is no test %s", name)
		}
	}
	if ourFile.MatchString(code) {
		if _, err := os.Stat(filepath.Join(top, filepath.FromSlash(code))); err != nil {
			say("there is no file %s", code)
		}
	}
	return out
}

// links finds links of a page to files and headings that are not there.
func links(p page) []finding {
	var out []finding
	line := 0
	for l := range strings.Lines(p.text) {
		line++
		for _, m := range linkTarget.FindAllStringSubmatch(l, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			name := p.name
			if file != "" {
				name = path.Join(path.Dir(p.name), file)
			}
			b, err := os.ReadFile(filepath.Join(top, filepath.FromSlash(name)))
			switch {
			case err != nil:
				if _, err := os.Stat(filepath.Join(top, filepath.FromSlash(name))); err != nil {
					out = append(out, finding{line, "the link leads to no file: " + m[1]})
				}
			case anchor != "" && !slices.Contains(anchors(string(b)), anchor):
				out = append(out, finding{line, "the link leads to no heading: " + m[1]})
			}
		}
	}
	return out
}

// anchors are the names that a page's headings get where Markdown is shown.
func anchors(text string) []string {
	var out []string
	for l := range strings.Lines(text) {
		if heading := strings.TrimLeft(l, "#"); heading != l && strings.HasPrefix(heading, " ") {
			s := notInAnchor.ReplaceAllString(strings.ToLower(strings.TrimSpace(heading)), "")
			out = append(out, strings.ReplaceAll(s, " ", "-"))
		}
	}
	return out
}
