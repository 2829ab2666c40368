package linux

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/netnstest"
)

// said is who answered, and as whom it saw the client.
type said struct{ server, client string }

// serveMesh starts the servers of a task; one at port 9000 sends a megabyte. Answers of
// UDP are as long as the question at least.
func serveMesh(t testing.TB, task *netnstest.NS, name string, addrs []string) {
	t.Helper()
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	for _, at := range addrs {
		task.Must(func() error {
			ln, err := net.Listen("tcp4", at)
			if err != nil {
				return err
			}
			pc, err := net.ListenPacket("udp4", at)
			if err != nil {
				return err
			}
			t.Cleanup(func() { ln.Close(); pc.Close() })
			wg.Go(func() {
				for {
					c, err := ln.Accept()
					if err != nil {
						return
					}
					wg.Go(func() {
						defer c.Close()
						defer context.AfterFunc(t.Context(), func() { c.Close() })()
						c.SetDeadline(time.Now().Add(10 * meshPatience))
						fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
						if strings.HasSuffix(at, ":9000") {
							c.Write(make([]byte, 1<<20))
							return
						}
						io.Copy(c, c)
					})
				}
			})
			wg.Go(func() {
				buf := make([]byte, 1<<16)
				for {
					n, from, err := pc.ReadFrom(buf)
					if err != nil {
						return
					}
					pc.WriteTo(fmt.Appendf(nil, "%-*s", n, name+" "+from.String()), from)
				}
			})
			return nil
		})
	}
}

// short asks with little patience: what is let in answers within milliseconds.
func short(ask asker, from *netnstest.NS, local, to string) (said, error) {
	type answer struct {
		said
		err error
	}
	got := make(chan answer, 1)
	go func() {
		a, err := ask(from, local, to)
		got <- answer{a, err}
	}()
	select {
	case a := <-got:
		return a.said, a.err
	case <-time.After(300 * time.Millisecond):
		return said{}, context.DeadlineExceeded
	}
}

// dialMesh connects from a namespace, by the port of local if it is given.
func dialMesh(from *netnstest.NS, network, local, to string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: meshPatience}
	if local != "" { // else the kernel may give two sockets of UDP one port
		d.Control = func(_, _ string, rc syscall.RawConn) error {
			var err error
			return errors.Join(rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), err)
		}
	}
	if local != "" && network == "tcp4" {
		d.LocalAddr, err = net.ResolveTCPAddr(network, local)
	} else if local != "" {
		d.LocalAddr, err = net.ResolveUDPAddr(network, local)
	}
	if err != nil {
		return nil, err
	}
	err = from.Do(func() error {
		c, err = d.DialContext(context.Background(), network, to)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(meshPatience))
}

func askTCP(from *netnstest.NS, local, to string) (said, error) {
	c, err := dialMesh(from, "tcp4", local, to)
	if err != nil {
		return said{}, err
	}
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	return parseSaid(line), err
}

func askUDP(from *netnstest.NS, local, to string) (said, error) {
	c, err := dialMesh(from, "udp4", local, to)
	if err != nil {
		return said{}, err
	}
	defer c.Close()
	return question(c)
}

func question(c net.Conn) (said, error) {
	if _, err := c.Write([]byte("who")); err != nil {
		return said{}, err
	}
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	return parseSaid(string(buf[:n])), err
}

func parseSaid(s string) said {
	server, client, _ := strings.Cut(strings.TrimSpace(s), " ")
	return said{server, client}
}
