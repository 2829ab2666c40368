package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"
)

// engineDNS is where the engine answers in every container of a network of its
// users.
const engineDNS = "127.0.0.11:53"

// dns asks a name server for the IPv4 addresses of a name.
func dns(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("dns", flag.ContinueOnError)
	server := f.String("server", engineDNS, "name server to ask")
	timeout := f.Duration("timeout", 2*time.Second, "time to wait for the answer")
	if err := parse(f, args, 1, stderr); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, *server)
	}}
	addrs, err := resolver.LookupNetIP(ctx, "ip4", f.Arg(0))
	if err != nil {
		return err
	}
	for i, a := range addrs {
		addrs[i] = a.Unmap() // the resolver gives IPv4 in its IPv6 form
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	stdout.Write(line(struct {
		Name  string       `json:"name"`
		Addrs []netip.Addr `json:"addrs"`
	}{f.Arg(0), addrs}))
	return nil
}

// health asks the server in the same container how it is, wherever it listens.
func health(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("health", flag.ContinueOnError)
	port := f.Uint("port", 80, "TCP port of the server")
	timeout := f.Duration("timeout", time.Second, "time to wait for the answer")
	if err := parse(f, args, 0, stderr); err != nil {
		return err
	}
	// A server with --bind own does not listen on loopback.
	addrs := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	if own, err := ownAddrs(); err == nil {
		addrs = append(addrs, own...)
	}
	var errs []error
	for _, addr := range addrs {
		c := client{addr: fmt.Sprintf("%s:%d", addr, *port), path: "/health"}
		tctx, cancel := context.WithTimeout(ctx, *timeout)
		_, err := c.http(tctx, 1)
		cancel()
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// hostOf is the name in a server's answer.
func hostOf(text []byte) string {
	var a answer
	if err := json.Unmarshal(text, &a); err != nil {
		return ""
	}
	return a.Host
}
