package main

import (
	"context"
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

// limit bounds the whole demo: it takes about 15 s, and a minute more where
// packages are installed first.
const limit = 5 * time.Minute

func main() {
	cluster.MaybeInner()
	// An interrupt cancels what is under way, and everything is taken down.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// config is what the command line says.
type config struct {
	driver string // of the network
	plugin string // directory with config.json and rootfs
	sluice string // the command
	dir    string // of the cluster
	engine string // release of Debian whose engine is used, or empty
	keep   bool
}

// overlay is the engine's own driver, for a demo without sluice.
const overlay = "overlay"

func run(ctx context.Context, args []string, getenv func(string) string, out io.Writer) error {
	var c config
	f := flag.NewFlagSet("demo", flag.ContinueOnError)
	f.SetOutput(out)
	f.StringVar(&c.driver, "driver", "sluice:latest", "network `driver`: the plugin's name, or overlay for the engine's own")
	f.StringVar(&c.plugin, "plugin", "build/plugin", "`directory` that `docker plugin create` takes")
	f.StringVar(&c.sluice, "sluice", "build/sluice", "`path` of the sluice command")
	f.StringVar(&c.dir, "dir", filepath.Join(os.TempDir(), "sluice-demo"), "`directory` of the hosts; removed at the end")
	f.StringVar(&c.engine, "engine", "", "`release` of Debian whose engine to use, such as trixie; empty is this machine's")
	down := f.Bool("down", false, "take down what KEEP=1 left up")
	if err := f.Parse(args); err != nil {
		return err
	}
	c.keep = getenv("KEEP") != "" && getenv("KEEP") != "0"
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w; please run: sudo make demo", cluster.ErrNotRoot)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if *down {
		if err := cluster.Remove(ctx, c.dir); err != nil {
			return err
		}
		fmt.Fprintln(out, "nothing of the demo is left in", c.dir)
		return nil
	}
	return demo(ctx, c, out)
}
