package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"sluice/internal/diag"
)

// verb is one question to the plugin.
type verb struct {
	name, does, argument string // argument: what must follow the name; empty: nothing may
	path                 string
	answer               func() diag.Answer
}

var verbs = []verb{
	{"status", "how this node is: engine, data path, peers, problems", "", diag.PathStatus, func() diag.Answer { return new(diag.Status) }},
	{"networks", "the networks, and those that were refused and why", "", diag.PathNetworks, func() diag.Answer { return new(diag.Networks) }},
	{"services", "the services, their virtual IPs and backends", "", diag.PathServices, func() diag.Answer { return new(diag.Services) }},
	{"service", "where the entry of one service is, by name or id: virtual IP, scheduler, backends, the kernel's counters", "NAME", diag.PathService, func() diag.Answer { return new(diag.Entry) }},
	{"entry", "the published ports of this node and who has each; with --port N, the whole way of one: host, alias, network, tasks, and back", "", diag.PathEntry, func() diag.Answer { return new(diag.Ports) }},
	{"ipam", "the addresses of the networks and who has each; leaks and doubles, on the swarm's leader", "", diag.PathIPAM, func() diag.Answer { return new(diag.IPAM) }},
	{"config", "the plugin's settings", "", diag.PathConfig, func() diag.Answer { return new(diag.Settings) }},
	{"diff", "what differs between plan and kernel, read back now", "", diag.PathDiff, func() diag.Answer { return new(diag.Diff) }},
}

// usage is how the verb is called.
func (v verb) usage() string { return strings.TrimSpace(v.name + " " + v.argument) }

// Exit statuses.
const (
	exitWell     = 0
	exitProblems = 1
	exitNoAnswer = 2
)

// askTime bounds a question; the longest is a read-back of the kernel, which the
// plugin itself bounds at 10 s.
const askTime = 15 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], diag.SocketDir, os.Stdout, os.Stderr))
}

// run is the command; dir is where the plugins' sockets are.
func run(ctx context.Context, args []string, dir string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("sluice", flag.ContinueOnError)
	flags.SetOutput(stderr)
	asJSON := flags.Bool("json", false, "print the answer as JSON")
	plugin := flags.String("plugin", "", "which plugin to ask, if several run: the name of its socket")
	socket := flags.String("socket", "", "path of the plugin's diagnosis socket (default: the one in "+diag.SocketDir+")")
	network := flags.String("network", "", "of service: the network to look at, by name or id, if the service is on several")
	port := flags.String("port", "", "of entry: the published port to look at, like 81, 81/tcp or 81/udp")
	flags.Usage = func() {} // helpStatus decides
	// Flags may stand anywhere between the words.
	var words []string
	for rest := args; ; {
		if err := flags.Parse(rest); err != nil {
			return helpStatus(err, flags, stdout, stderr)
		}
		if flags.NArg() == 0 {
			break
		}
		words, rest = append(words, flags.Arg(0)), flags.Args()[1:]
	}
	if len(words) == 0 {
		usage(stderr, flags)
		return exitNoAnswer
	}
	wrong := func(format string, args ...any) int {
		fmt.Fprintf(stderr, "sluice: "+format+"; see sluice --help\n", args...)
		return exitNoAnswer
	}
	name, argument := words[0], ""
	v, known := find(name)
	if words = words[1:]; known && v.argument != "" {
		if len(words) == 0 || words[0] == "" {
			return wrong("which? sluice %s", v.usage())
		}
		argument, words = words[0], words[1:]
	}
	switch {
	case len(words) > 0:
		return wrong("%q is one word too many", words[0])
	case name == "help":
		usage(stdout, flags)
		return exitWell
	case name == "version":
		fmt.Fprintln(stdout, version())
		return exitWell
	case !known:
		return wrong("there is no verb %q", name)
	case *network != "" && v.path != diag.PathService:
		return wrong("--network is not for %s", name)
	case *port != "" && v.path != diag.PathEntry:
		return wrong("--port is not for %s", name)
	}
	if *port != "" {
		if _, _, err := diag.ParsePort(*port); err != nil {
			return wrong("--port: %v", err)
		}
	}
	if *socket == "" {
		var err error
		if *socket, err = diag.FindSocket(dir, *plugin); err != nil {
			fmt.Fprintln(stderr, "sluice:", err)
			return exitNoAnswer
		}
	}
	if v.path == diag.PathService {
		v.path += "?" + url.Values{"name": {argument}, "network": {*network}}.Encode()
	}
	if *port != "" {
		v.path += "?" + url.Values{"port": {*port}}.Encode()
	}
	return ask(ctx, v, *socket, *asJSON, stdout, stderr)
}

// find is the verb of a name.
func find(name string) (verb, bool) {
	for _, v := range verbs {
		if v.name == name {
			return v, true
		}
	}
	return verb{}, false
}

// helpStatus ends a command whose flags ask for help or were wrong; the flag
// package has told of the mistake then.
func helpStatus(err error, flags *flag.FlagSet, stdout, stderr io.Writer) int {
	if errors.Is(err, flag.ErrHelp) {
		usage(stdout, flags)
		return exitWell
	}
	fmt.Fprintln(stderr, "sluice: see sluice --help")
	return exitNoAnswer
}

func usage(w io.Writer, flags *flag.FlagSet) {
	fmt.Fprint(w, "sluice asks the sluice plugin on this host.\n\nsluice [FLAG]... VERB\n\n")
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, v := range verbs {
		fmt.Fprintf(t, "  %s\t%s\n", v.usage(), v.does)
	}
	fmt.Fprintf(t, "  version\tthe version of this command\n")
	t.Flush()
	fmt.Fprintln(w)
	flags.SetOutput(w)
	flags.PrintDefaults()
	fmt.Fprint(w, "\nExit status: 0 all is well, 1 the answer names problems, 2 no answer.\n")
}

// ask prints the answer to a question and returns the verdict on it.
func ask(ctx context.Context, v verb, socket string, asJSON bool, stdout, stderr io.Writer) int {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	answer := v.answer()
	raw, err := diag.Ask(ctx, socket, v.path, answer)
	if err == nil {
		err = show(stdout, answer, raw, asJSON)
	}
	switch {
	case err != nil:
		fmt.Fprintln(stderr, "sluice:", err)
		return exitNoAnswer
	case len(answer.Found()) > 0:
		return exitProblems
	}
	return exitWell
}

// show prints an answer for people, or as it came.
func show(w io.Writer, answer diag.Answer, raw []byte, asJSON bool) error {
	if !asJSON {
		_, err := io.WriteString(w, answer.Text())
		return err
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, raw, "", "  "); err != nil {
		return err
	}
	_, err := pretty.WriteTo(w)
	return err
}

// version is what the build recorded of its source.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return info.Main.Version
}
