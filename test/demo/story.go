package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"sluice/test/cluster"
)

// story prints what happens, as it happens.
type story struct {
	out   io.Writer
	begun time.Time
}

// chapter begins a part, with the time since the beginning.
func (s *story) chapter(format string, args ...any) {
	fmt.Fprintf(s.out, "\n== %s  (%.1f s)\n", fmt.Sprintf(format, args...), time.Since(s.begun).Seconds())
}

func (s *story) say(format string, args ...any) {
	fmt.Fprintf(s.out, "   "+format+"\n", args...)
}

// command prints a command as one would type it on the host, and its output.
func (s *story) command(host, line, output string) {
	fmt.Fprintf(s.out, "%s# %s\n", host, line)
	if output = strings.TrimRight(output, "\n"); output != "" {
		for l := range strings.Lines(output) {
			fmt.Fprintf(s.out, "   %s\n", strings.TrimRight(l, "\n"))
		}
	}
}

// docker runs docker on the host, and tells.
func (s *story) docker(ctx context.Context, h *cluster.Host, args ...string) (string, error) {
	out, err := h.Docker(ctx, args...)
	s.command(h.Name(), "docker "+quote(args), out)
	return out, err
}

// quote joins words so that a shell would take them apart again.
func quote(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		if strings.ContainsAny(w, " {}|$\"*?&;<>()") || w == "" {
			w = "'" + w + "'"
		}
		quoted[i] = w
	}
	return strings.Join(quoted, " ")
}

// verdicts counts checks and remembers what failed.
type verdicts struct {
	checks int
	failed []string
}

func (v *verdicts) check(what string, err error) {
	v.checks++
	if err != nil {
		v.failed = append(v.failed, fmt.Sprintf("%s: %v", what, err))
	}
}

func (v *verdicts) err() error {
	if len(v.failed) == 0 {
		return nil
	}
	return errors.New(fmt.Sprintf("%d of %d checks failed:\n  ", len(v.failed), v.checks) + strings.Join(v.failed, "\n  "))
}
