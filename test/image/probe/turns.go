package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// turn is an echo server that turns measures, and what it found.
type turn struct {
	Name      string    `json:"name"`
	Connects  []float64 `json:"connects_us"`  // connect, a message there and back, reset
	Requests  []float64 `json:"requests_us"`  // a message there and back on an open connection
	Datagrams []float64 `json:"datagrams_us"` // one there and back, from a socket that stays
	Packets   []float64 `json:"packets_us"`   // of a batch of datagrams there and back, each

	at       netip.AddrPort
	stream   int
	datagram int
	batch    *batch
	message  []byte
	in       []byte
}

// turned is what turns prints.
type turned struct {
	Targets []*turn `json:"targets"`
	Idle    float64 `json:"idle"` // as loaded's
}

// messageSize is small, as those are whose number counts.
const messageSize = 64

// turns measures the way to echo servers, as load does, but with as few system calls
// as can be: see echoes. A failure ends it.
func turns(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("turns", flag.ContinueOnError)
	to := f.String("to", "", "servers, as `NAME=ADDR:PORT,...`, for TCP and UDP")
	rounds := f.Int("rounds", 50, "number of rounds")
	connects := f.Int("connects", 2, "connections to each server in a round")
	requests := f.Int("requests", 5, "requests to each server in a round, on a connection that stays open")
	datagrams := f.Int("datagrams", 5, "datagrams to each server in a round")
	batches := f.Int("batches", 1, fmt.Sprintf("batches of %d datagrams to each server in a round", batchSize))
	if err := parse(f, args, 0, stderr); err != nil {
		return err
	}
	var out turned
	for word := range strings.SplitSeq(*to, ",") {
		name, addr, ok := strings.Cut(word, "=")
		at, err := netip.ParseAddrPort(addr)
		if !ok || err != nil || !at.Addr().Is4() {
			return fmt.Errorf("--to: %q is not NAME=ADDR:PORT", word)
		}
		out.Targets = append(out.Targets, &turn{Name: name, at: at, in: make([]byte, batchMax)})
	}
	for _, t := range out.Targets {
		if err := t.open(); err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
	}
	if err := patient(); err != nil {
		return err
	}
	idle, total, err := processors()
	if err != nil {
		return err
	}
	order := slices.Clone(out.Targets)
	for range *rounds {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, t := range order {
			for _, part := range []struct {
				n    int
				into *[]float64
				do   func() error
				each float64
			}{
				{*connects, &t.Connects, t.connect, 1},
				{*requests, &t.Requests, func() error { return t.exchange(t.stream) }, 1},
				{*datagrams, &t.Datagrams, func() error { return t.exchange(t.datagram) }, 1},
				{*batches, &t.Packets, t.exchangeBatch, batchSize},
			} {
				for range part.n {
					begun := time.Now()
					if err := errors.Join(part.do(), ctx.Err()); err != nil {
						return fmt.Errorf("%s: %w", t.Name, err)
					}
					*part.into = append(*part.into, micros(begun)/part.each)
				}
			}
		}
	}
	idle2, total2, err := processors()
	if err != nil {
		return err
	}
	out.Idle = (idle2 - idle) / max(total2-total, 1)
	_, err = stdout.Write(line(out))
	return err
}

// patience is how long an answer may take before it is lost: TCP has repeated what was
// lost on the way three times by then.
const patience = 10 * time.Second

func (t *turn) dial(kind int) (int, error) {
	fd, err := bare(kind, t.at, unix.Connect)
	if err != nil {
		return -1, err
	}
	if err := limitReads(fd, patience); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// open makes what stays open, until the process ends, and asks once by each: the first
// may have to wait, for neighbours to be found.
func (t *turn) open() (err error) {
	t.message = bytes.Repeat([]byte("x"), messageSize)
	t.batch = newBatch()
	t.batch.connected()
	if t.stream, err = t.dial(unix.SOCK_STREAM); err != nil {
		return err
	}
	if t.datagram, err = t.dial(unix.SOCK_DGRAM); err != nil {
		return err
	}
	return errors.Join(t.exchange(t.stream), t.exchange(t.datagram))
}

// connect ends the connection with a reset, for load's reason.
func (t *turn) connect() error {
	fd, err := t.dial(unix.SOCK_STREAM)
	if err != nil {
		return err
	}
	return errors.Join(t.exchange(fd), unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), unix.Close(fd))
}

// exchange sends a message and takes it back.
func (t *turn) exchange(fd int) error {
	if _, err := retry(func() (int, error) { return unix.Write(fd, t.message) }); err != nil {
		return err
	}
	for got := 0; got < len(t.message); {
		n, err := retry(func() (int, error) { return unix.Read(fd, t.in) })
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		got += n
	}
	return nil
}

// exchangeBatch sends a batch of datagrams and takes them back.
func (t *turn) exchangeBatch() error {
	for i := range batchSize {
		t.batch.set(i, t.message)
	}
	if err := t.batch.send(t.datagram, batchSize); err != nil {
		return err
	}
	for got := 0; got < batchSize; {
		n, err := t.batch.receive(t.datagram)
		if err != nil {
			return fmt.Errorf("%d of %d datagrams came back: %w", got, batchSize, err)
		}
		got += n
	}
	return nil
}
