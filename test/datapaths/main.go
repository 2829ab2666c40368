package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"sluice/internal/netnstest"
	"sluice/test/cluster"
)

// limit bounds the whole run: two minutes, several times that on a busy machine.
const limit = 20 * time.Minute

func main() {
	cluster.MaybeInner()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "datapaths:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out, progress io.Writer) error {
	f := flag.NewFlagSet("datapaths", flag.ContinueOnError)
	rounds := f.Int("rounds", 60, "rounds of measuring")
	only := f.String("only", "", "measure only these, besides what they are compared with: `NAMES` of "+strings.Join(names(), ","))
	write := f.String("write", "", "put the table between the markers of this `file` too")
	if err := f.Parse(args); err != nil {
		return err
	}
	if err := netnstest.Has(netnstest.IPVS); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	asked, doors, err := choose(*only)
	if err != nil {
		return err
	}
	l, err := newLab(ctx, asked, progress)
	if err != nil {
		return err
	}
	tables, err := l.tables(ctx, asked, doors, *rounds)
	if err := errors.Join(err, l.cluster.Down()); err != nil {
		return err
	}
	for _, t := range tables {
		var text bytes.Buffer
		p := &printer{w: &text}
		p.machine(*only)
		t.print(p)
		if p.err != nil {
			return p.err
		}
		if _, err := fmt.Fprintf(out, "%s\n", text.Bytes()); err != nil {
			return err
		}
		if *write == "" {
			continue
		}
		if err := replace(*write, t.name(), text.Bytes()); err != nil {
			return err
		}
	}
	return nil
}

// table is a part of the page.
type table interface {
	name() string // of its markers
	print(*printer)
}

// tables measures what is asked for. What is asked from outside is made when the rest
// is measured.
func (l *lab) tables(ctx context.Context, asked []way, doors []gate, rounds int) ([]table, error) {
	var out []table
	if len(asked) > 0 {
		r, err := l.measure(ctx, rounds, l.progress)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	if len(doors) > 0 {
		m, err := l.newMesh(ctx, doors)
		if err != nil {
			return nil, err
		}
		r, err := m.measure(ctx, rounds)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// choose returns the ways and gates named, all if none is. Each begins with what the
// others are compared with.
func choose(only string) ([]way, []gate, error) {
	if only == "" {
		return ways, gates, nil
	}
	var (
		list = strings.Split(only, ",")
		w    = ways[:1:1]
		g    = gates[:compared:compared]
	)
	for _, name := range list {
		i := slices.IndexFunc(ways, func(w way) bool { return w.name == name })
		j := slices.IndexFunc(gates, func(g gate) bool { return g.name == name })
		switch {
		case i > 0:
			w = append(w, ways[i])
		case j >= compared:
			g = append(g, gates[j])
		default:
			return nil, nil, fmt.Errorf("-only %s: there is no %q; there are %s", only, name, strings.Join(names(), ", "))
		}
	}
	if len(w) == 1 {
		w = nil
	}
	if len(g) == compared {
		g = nil
	}
	return w, g, nil
}

// names are what can be asked for.
func names() []string {
	var all []string
	for _, w := range ways[1:] {
		all = append(all, w.name)
	}
	for _, g := range gates[compared:] {
		all = append(all, g.name)
	}
	return all
}

// end is the line behind a table of a page, and begin the one before.
const end = "<!-- measured end -->\n"

func begin(name string) string { return "<!-- measured: " + name + " -->\n" }

// replace puts text between the markers of a page.
func replace(path, name string, text []byte) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, rest, ok := bytes.Cut(page, []byte(begin(name)))
	_, tail, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		return fmt.Errorf("%s has no lines %q and %q", path, begin(name), end)
	}
	page = bytes.Join([][]byte{head, []byte(begin(name)), text, []byte(end), tail}, nil)
	return os.WriteFile(path, page, 0o644)
}

// moduleRoot is the directory of go.mod: this one, or one above.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("run this in the module")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}
