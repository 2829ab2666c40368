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
	"syscall"
)

// Exit codes.
const (
	good  = 0
	bad   = 1
	usage = 2
)

func main() {
	// As init of a container the process has no default action for SIGTERM:
	// it must catch it to stop in time.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// errVerdict ends a command whose answers were printed but are not as demanded.
var errVerdict = errors.New("not as demanded")

// errUsage ends a command that was called wrongly; what is wrong was printed.
var errUsage = errors.New("usage")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	commands := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"serve":  serve,
		"get":    get,
		"hold":   hold,
		"dns":    dns,
		"health": health,
		"load":   load,
		"echo":   echoes,
		"turns":  turns,
		"forge":  forge,
		"hear":   hear,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		fmt.Fprintln(stderr, "usage: probe serve|get|hold|load|echo|turns|dns|health|forge|hear [-h] ...")
		return usage
	}
	switch err := commands[args[0]](ctx, args[1:], stdout, stderr); {
	case err == nil:
		return good
	case errors.Is(err, errVerdict):
		return bad
	case errors.Is(err, errUsage):
		return usage
	default:
		fmt.Fprintf(stderr, "probe %s: %v\n", args[0], err)
		return bad
	}
}

// parse parses flags that are followed by n arguments.
func parse(f *flag.FlagSet, args []string, n int, stderr io.Writer) error {
	f.SetOutput(stderr)
	if err := f.Parse(args); err != nil {
		return errUsage // the flag package has said what is wrong
	}
	if f.NArg() != n {
		fmt.Fprintf(stderr, "probe %s: %d arguments, want %d\n", f.Name(), f.NArg(), n)
		f.Usage()
		return errUsage
	}
	return nil
}

// answer is what the server says.
type answer struct {
	Host  string `json:"host"`
	Proto string `json:"proto"`
	Local string `json:"local"`
	Peer  string `json:"peer"`
	Ready bool   `json:"ready"`
	Echo  string `json:"echo,omitempty"`
}

// line is a value as one line of JSON. The types used here always marshal.
func line(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		text = fmt.Appendf(nil, "{%q:%q}", "error", err)
	}
	return append(text, '\n')
}
