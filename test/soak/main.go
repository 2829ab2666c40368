package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"sluice/test/cluster"
)

// Exit codes.
const (
	exitWell   = 0
	exitNot    = 1
	exitNotRun = 2
)

func main() {
	cluster.MaybeInner()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first interrupt ends the run in good order, the second at once.
	context.AfterFunc(ctx, stop)
	os.Exit(command(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// config is what the command line says.
type config struct {
	span  time.Duration
	seed  uint64
	json  string // path of the report, or empty
	built string // directory with plugin and command
	dir   string // of the cluster
	logs  string // where engines' logs go if all is not well
	out   io.Writer
}

func (c config) say(format string, args ...any) { fmt.Fprintf(c.out, format+"\n", args...) }

// command is the program; its result is the exit code.
func command(ctx context.Context, args []string, out, errs io.Writer) int {
	c := config{out: out}
	f := flag.NewFlagSet("soak", flag.ContinueOnError)
	f.SetOutput(errs)
	f.DurationVar(&c.span, "for", 10*time.Minute, "how long to go on")
	f.Uint64Var(&c.seed, "seed", uint64(time.Now().Unix()), "of the choices; the same makes the same again")
	f.StringVar(&c.json, "json", "", "`file` for the report as JSON (default: report.json beside the logs, if all is not well)")
	f.StringVar(&c.built, "built", "build", "`directory` in which make build leaves plugin and command")
	f.StringVar(&c.dir, "dir", filepath.Join(os.TempDir(), "sluice-soak"), "`directory` of the hosts; removed at the end")
	f.StringVar(&c.logs, "logs", "", "`directory` for the engines' logs if all is not well (default build/soak-SEED)")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitWell
		}
		return exitNotRun
	}
	if c.logs == "" {
		c.logs = filepath.Join("build", fmt.Sprintf("soak-%d", c.seed))
	}
	if os.Geteuid() != 0 {
		fmt.Fprintf(errs, "soak: %v; please run: sudo make soak\n", cluster.ErrNotRoot)
		return exitNotRun
	}
	r, err := soak(ctx, c)
	if err != nil {
		fmt.Fprintln(errs, "soak:", err)
		return exitNotRun
	}
	fmt.Fprint(out, r.Text())
	if c.json == "" && r.Logs != "" {
		c.json = filepath.Join(r.Logs, "report.json")
	}
	if c.json != "" {
		if err := writeJSON(c.json, r); err != nil {
			fmt.Fprintln(errs, "soak: write the report:", err)
			return exitNotRun
		}
	}
	if len(r.Wrong) > 0 {
		return exitNot
	}
	return exitWell
}

func writeJSON(path string, r *report) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
