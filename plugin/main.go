package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
)

// gcPercent makes the collector run when the heap has grown by a quarter of what
// is in use, not by the whole: the plugin works for milliseconds at a time, and the
// memory of a node belongs to its containers. With 1,000 services of 10 tasks,
// some 25 MiB of live objects, the process is a third smaller for it, and a
// collection takes 10 ms of one processor, a few times in the 5 s between two
// read-backs of the kernel. See `make bench`.
const gcPercent = 25

func main() {
	debug.SetGCPercent(gcPercent)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err := run(ctx, os.Getenv, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "sluice:", err)
		os.Exit(1)
	}
}

// run is the whole life of the plugin. It listens first, then builds the parts
// (see build), and ends when ctx does. What is in the kernel stays: it is the
// data path of containers that go on.
//
// Whatever keeps the parts from being built is the answer to every call, and
// run goes on: a plugin that exits would be started again for ever.
func run(ctx context.Context, getenv func(string) string, stderr io.Writer) error {
	cfg, bad := parseConfig(getenv)
	// The engine's log adds a time of its own to each line.
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: cfg.LogLevel, ReplaceAttr: withoutTime}))

	s := newSocket(cfg.Scope, log)
	l, err := listen(socketPath)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- serve(ctx, l, s, log) }()

	var p *parts
	if bad == nil {
		p, bad = build(ctx, cfg, s.counts, log)
	}
	if bad != nil {
		log.Error("sluice serves nothing", "err", bad)
		s.refuse(bad)
		return <-served
	}
	s.attach(p.driver, p.ipam)
	log.Info("sluice runs", "version", version(), "scope", cfg.Scope, "go", runtime.Version())
	p.run(ctx)
	// Calls that are under way may use the parts: these are closed last.
	cancel()
	return errors.Join(<-served, p.close())
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}
