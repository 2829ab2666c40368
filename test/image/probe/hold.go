package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"time"
)

// held is what probe hold prints at its end.
type held struct {
	Sent     int     `json:"sent"`
	Received int     `json:"received"`
	Gaps     int     `json:"gaps"`
	Longest  float64 `json:"longest_ms"`
	Host     string  `json:"host"`
	Error    string  `json:"error,omitempty"`
}

// hold keeps one connection and sends a numbered line every so often, each
// after the answer to the last. It ends well at SIGTERM or --for, badly when
// the connection breaks or an answer took longer than --gap.
func hold(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	f := flag.NewFlagSet("hold", flag.ContinueOnError)
	every := f.Duration("every", 100*time.Millisecond, "time between lines")
	gap := f.Duration("gap", time.Second, "report answers that took longer")
	limit := f.Duration("timeout", 30*time.Second, "give up when an answer took this long")
	span := f.Duration("for", 0, "end after this long; 0 is at SIGTERM")
	source := f.Int("source-port", 0, "port to connect from; 0 is any")
	silent := f.Bool("silent", false, "after the first answer only wait for the end of the connection, or for --for")
	if err := parse(f, args, 1, stderr); err != nil {
		return err
	}
	if *span > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *span)
		defer cancel()
	}
	c := client{addr: f.Arg(0), sourcePort: *source}
	if _, _, err := net.SplitHostPort(c.addr); err != nil {
		c.addr = net.JoinHostPort(c.addr, "80")
	}
	var h held
	dctx, cancel := context.WithTimeout(ctx, *limit)
	conn, err := c.dial(dctx, "tcp4")
	cancel()
	if err != nil {
		return err
	}
	defer conn.Close()
	in := bufio.NewReader(conn)
	for h.Error == "" && ctx.Err() == nil {
		begun := time.Now()
		// Set anew for each exchange: a deadline of --for would look like a
		// broken connection.
		if err := conn.SetDeadline(begun.Add(*limit)); err != nil {
			return err
		}
		h.Sent++
		text, err := numbered(conn, in, h.Sent)
		took := time.Since(begun)
		h.Longest = max(h.Longest, millis(took))
		if err != nil {
			h.Error = err.Error()
			break
		}
		h.Received++
		if h.Host == "" {
			stdout.Write(text) // says where the connection is, and that it stands
			h.Host = hostOf(text)
		}
		if took > *gap {
			h.Gaps++
			stdout.Write(line(try{N: h.Sent, OK: true, Millis: millis(took), Reply: asJSON(text)}))
		}
		if *silent {
			h.Error = endOf(ctx, conn)
			break
		}
		pause(ctx, *every-took)
	}
	stdout.Write(line(h))
	if h.Error != "" || h.Gaps > 0 {
		return errVerdict
	}
	return nil
}

// endOf waits for the end of a connection and says how it ended; empty: it stands when
// ctx ends.
func endOf(ctx context.Context, conn net.Conn) string {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) }) // an error ends the read, too
	defer stop()
	_, err := conn.Read(make([]byte, 1))
	if ctx.Err() != nil || err == nil {
		return ""
	}
	return err.Error()
}

// numbered sends line n and waits for its answer.
func numbered(out io.Writer, in *bufio.Reader, n int) ([]byte, error) {
	if _, err := fmt.Fprintf(out, "%d\n", n); err != nil {
		return nil, err
	}
	return readEcho(in, n)
}
