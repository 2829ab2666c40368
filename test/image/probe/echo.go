package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// workers of an echo server: each has one connection at a time, and a client of
// turns has two, the one that stays open and the one that it just makes.
const workers = 8

// echoes serves what turns measures: what comes goes back as it is. There is as little
// of the server in it as can be, five system calls for a connection and two for a
// request, none of which waits for another thread: where they are dear, as in a VM,
// the way to a server with more of them would hardly show.
//
// What ends in a line feed gets the answer of serve instead, so that get can ask.
func echoes(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("echo", flag.ContinueOnError)
	port := f.Uint("port", 80, "TCP and UDP port")
	if err := parse(f, args, 0, stderr); err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	at := netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(*port))
	listener, err := bare(unix.SOCK_STREAM, at, unix.Bind)
	if err != nil {
		return fmt.Errorf("listen on tcp %s: %w", at, err)
	}
	if err := unix.Listen(listener, unix.SOMAXCONN); err != nil {
		return fmt.Errorf("listen on tcp %s: %w", at, err)
	}
	socket, err := bare(unix.SOCK_DGRAM, at, unix.Bind)
	if err != nil {
		return fmt.Errorf("listen on udp %s: %w", at, err)
	}
	for _, fd := range []int{listener, socket} {
		if err := limitReads(fd, attention); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, workers+1)
	for range workers {
		go func() { failed <- echoStreams(ctx, listener, host) }()
	}
	go func() { failed <- echoDatagrams(ctx, socket, host) }()
	fmt.Fprintf(stdout, "%s echoes on port %d\n", host, *port)
	for range cap(failed) {
		if one := <-failed; one != nil {
			err = errors.Join(err, one)
			cancel()
		}
	}
	return errors.Join(err, unix.Close(listener), unix.Close(socket))
}

// attention is how often a call that waits looks whether the server is to end: rarely
// beside what is measured, and soon beside what a stop may take.
const attention = 200 * time.Millisecond

// limitReads bounds the calls that wait for something to come. Connections inherit it
// from who accepts them.
func limitReads(fd int, limit time.Duration) error {
	t := unix.NsecToTimeval(limit.Nanoseconds())
	return unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t)
}

// patient keeps the goroutine on a thread that lets others finish their turn when
// something comes for it (sched(7), SCHED_BATCH). On one processor the server would
// else begin with the first datagram of a batch, or not, as it happens.
func patient() error {
	runtime.LockOSThread()
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}, 0); err != nil {
		return fmt.Errorf("set the thread's scheduling policy: %w", err)
	}
	return nil
}

// await repeats a bounded call until something has come. When ctx ends first, that is
// the error.
func await(ctx context.Context, do func() (int, error)) (int, error) {
	for {
		n, err := retry(do)
		if !errors.Is(err, unix.EAGAIN) {
			return n, err
		}
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
	}
}

// echoStreams serves one connection after the other.
func echoStreams(ctx context.Context, listener int, host string) error {
	if err := patient(); err != nil {
		return err
	}
	in := make([]byte, 64<<10)
	for {
		var from unix.Sockaddr
		fd, err := await(ctx, func() (fd int, err error) {
			fd, from, err = unix.Accept(listener)
			return fd, err
		})
		if ctx.Err() != nil && err != nil {
			return nil
		}
		if errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		for {
			n, err := await(ctx, func() (int, error) { return unix.Read(fd, in) })
			if n <= 0 || err != nil {
				break // the client has gone, with a reset as a rule
			}
			out := in[:n]
			if asks(out) {
				out = tell("tcp", host, out, from)
			}
			if _, err := retry(func() (int, error) { return unix.Write(fd, out) }); err != nil {
				break
			}
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
	}
}

// echoDatagrams serves all that come to a socket, as many at a time as are there.
func echoDatagrams(ctx context.Context, socket int, host string) error {
	if err := patient(); err != nil {
		return err
	}
	b := newBatch()
	for {
		n, err := await(ctx, func() (int, error) { return b.receive(socket) })
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			continue // about an earlier answer
		}
		for i := range n {
			m := b.get(i)
			if asks(m) {
				m = tell("udp", host, m, b.from(i))
			}
			b.set(i, m)
		}
		// What cannot be sent is lost, as datagrams are, and the client says so.
		if err := b.send(socket, n); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
}

// asks says that a message is get's.
func asks(m []byte) bool { return bytes.HasSuffix(m, []byte("\n")) }

// tell is the answer to get.
func tell(proto, host string, m []byte, from unix.Sockaddr) []byte {
	a := answer{Host: host, Proto: proto, Ready: true, Echo: strings.TrimSpace(string(m))}
	if in4, ok := from.(*unix.SockaddrInet4); ok {
		a.Peer = netip.AddrPortFrom(netip.AddrFrom4(in4.Addr), uint16(in4.Port)).String()
	}
	return line(a)
}

// bare is a socket that blocks, unlike those of package net, whose reads and writes
// cost several system calls each. It is bound or connected to an address.
func bare(kind int, at netip.AddrPort, tie func(int, unix.Sockaddr) error) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if _, err := retry(func() (int, error) {
		return 0, tie(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
	}); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// retry repeats what a signal has interrupted.
func retry(do func() (int, error)) (int, error) {
	for {
		n, err := do()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
