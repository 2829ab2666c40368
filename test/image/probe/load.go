package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// target is a server that load measures, and what it found.
type target struct {
	Name     string    `json:"name"`
	Addr     string    `json:"addr"`
	Connects []float64 `json:"connects_us"` // connect, a line there and back, reset
	Requests []float64 `json:"requests_us"` // a line there and back on an open connection
	Bulk     []float64 `json:"bulk_mbps"`   // 10^6 bits per second, to the server
	Packets  []float64 `json:"packets_us"`  // a small packet to the server, among many

	conn net.Conn
	in   *bufio.Reader
	asks int
}

// loaded is what load prints.
type loaded struct {
	Targets []*target `json:"targets"`
	// Idle is the share of the time in which a processor of the machine had
	// nothing to do.
	Idle float64 `json:"idle"`
}

// load measures servers in turns so short that whatever else the machine does
// falls on all of them alike: a few connections, some requests, one lump of data and
// some small packets for each, in another order every round. A failure ends it.
func load(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	to := f.String("to", "", "servers, as `NAME=ADDR:PORT,...`")
	rounds := f.Int("rounds", 50, "number of rounds")
	connects := f.Int("connects", 5, "connections to each server in a round")
	requests := f.Int("requests", 20, "requests to each server in a round, on a connection that stays open")
	bulk := f.Int("bulk", 4<<20, "bytes to each server in a round")
	small := f.Int("packets", 1000, "small packets to each server in a round")
	if err := parse(f, args, 0, stderr); err != nil {
		return err
	}
	var out loaded
	for word := range strings.SplitSeq(*to, ",") {
		name, addr, ok := strings.Cut(word, "=")
		if _, _, err := net.SplitHostPort(addr); !ok || err != nil {
			return fmt.Errorf("--to: %q is not NAME=ADDR:PORT", word)
		}
		out.Targets = append(out.Targets, &target{Name: name, Addr: addr})
	}
	for _, t := range out.Targets {
		if err := t.open(ctx); err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
		defer t.conn.Close()
	}
	idle, total, err := processors()
	if err != nil {
		return err
	}
	order := slices.Clone(out.Targets)
	for range *rounds {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, t := range order {
			for range *connects {
				err = errors.Join(err, t.connect(ctx))
			}
			for range *requests {
				err = errors.Join(err, t.request())
			}
			took, perr := t.push(ctx, *bulk, segment)
			t.Bulk = append(t.Bulk, float64(*bulk)*8/took)
			err = errors.Join(err, perr)
			took, perr = t.push(ctx, *small*packet, packet)
			t.Packets = append(t.Packets, took/float64(*small))
			err = errors.Join(err, perr)
			if err != nil {
				return fmt.Errorf("%s: %w", t.Name, err)
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

func (t *target) open(ctx context.Context) (err error) {
	if t.conn, err = t.dial(ctx); err != nil {
		return err
	}
	t.in = bufio.NewReader(t.conn)
	return nil
}

func (t *target) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var d net.Dialer
	return d.DialContext(ctx, "tcp4", t.Addr)
}

func micros(since time.Time) float64 { return float64(time.Since(since).Nanoseconds()) / 1000 }

// connect ends the connection with a reset: thousands in TIME_WAIT would take the
// client's ports from the connections after them.
func (t *target) connect(ctx context.Context) error {
	begun := time.Now()
	conn, err := t.dial(ctx)
	if err != nil {
		return err
	}
	t.asks++
	_, err = numbered(conn, bufio.NewReader(conn), t.asks)
	err = errors.Join(err, conn.(*net.TCPConn).SetLinger(0), conn.Close())
	t.Connects = append(t.Connects, micros(begun))
	return err
}

func (t *target) request() error {
	begun := time.Now()
	t.asks++
	_, err := numbered(t.conn, t.in, t.asks)
	t.Requests = append(t.Requests, micros(begun))
	return err
}

// How much push writes at a time: what the kernel hands on as one segment at most,
// and what it sends at once by itself, as Go sets TCP_NODELAY.
const (
	segment = 64 << 10
	packet  = 64
)

// push sends data by HTTP, waits for the answer, which comes after the last byte, and
// returns the microseconds that both took.
func (t *target) push(ctx context.Context, size, each int) (took float64, err error) {
	conn, err := t.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	begun := time.Now()
	if _, err := fmt.Fprintf(conn, "POST /sink HTTP/1.1\r\nHost: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", t.Addr, size); err != nil {
		return 0, err
	}
	lump := make([]byte, each)
	for left := size; left > 0; left -= each {
		if _, err := conn.Write(lump[:min(left, each)]); err != nil {
			return 0, err
		}
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	took = micros(begun)
	if err == nil && strings.TrimSpace(string(text)) != fmt.Sprint(size) {
		err = fmt.Errorf("the server took %q of %d bytes", text, size)
	}
	return took, err
}

// processors are the ticks in which the machine's processors were idle, and all, by
// /proc/stat (proc(5): idle and iowait are the fourth and fifth of "cpu").
func processors() (idle, total float64, err error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	first, _, _ := strings.Cut(string(text), "\n")
	for i, word := range strings.Fields(first)[1:] {
		n, err := strconv.ParseFloat(word, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("/proc/stat: %w", err)
		}
		total += n
		if i == 3 || i == 4 {
			idle += n
		}
	}
	return idle, total, nil
}
