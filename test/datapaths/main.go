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
	only := f.String("only", "", "measure only these networks, besides Docker's own: `NAMES` of "+names())
	write := f.String("write", "", "put the table between the markers of this `file` too")
	if err := f.Parse(args); err != nil {
		return err
	}
	if err := netnstest.Has(netnstest.IPVS); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	l, err := newLab(ctx, chosen(*only), progress)
	if err != nil {
		return err
	}
	r, err := l.measure(ctx, *rounds, progress)
	if err := errors.Join(err, l.cluster.Down()); err != nil {
		return err
	}
	r.only = *only
	var text bytes.Buffer
	if err := r.print(&text); err != nil {
		return err
	}
	if _, err := out.Write(text.Bytes()); err != nil || *write == "" {
		return err
	}
	return replace(*write, text.Bytes())
}

// chosen are the ways named, which begin with Docker's; all if none is.
func chosen(names string) []way {
	if names == "" {
		return ways
	}
	return slices.DeleteFunc(slices.Clone(ways), func(w way) bool {
		return w.name != ways[0].name && !slices.Contains(strings.Split(names, ","), w.name)
	})
}

func names() string {
	var all []string
	for _, w := range ways[1:] {
		all = append(all, w.name)
	}
	return strings.Join(all, ",")
}

// The lines between which a page has the table.
const (
	begin = "<!-- measured: datapaths -->\n"
	end   = "<!-- measured end -->\n"
)

// replace puts text between the markers of a page.
func replace(path string, text []byte) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	head, rest, ok := bytes.Cut(page, []byte(begin))
	_, tail, ok2 := bytes.Cut(rest, []byte(end))
	if !ok || !ok2 {
		return fmt.Errorf("%s has no lines %q and %q", path, begin, end)
	}
	page = bytes.Join([][]byte{head, []byte(begin), text, []byte(end), tail}, nil)
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
