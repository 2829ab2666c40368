package ports

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"sluice/internal/model"
)

// unseen is who has a port if nothing says who.
const unseen = "a process that cannot be seen from here"

// tables are the files of /proc/net that list sockets.
var tables = []struct {
	proto model.Proto
	file  string
	read  func(line string) (row, bool)
}{
	{model.TCP, "tcp", inetRow}, {model.TCP, "tcp6", inetRow},
	{model.UDP, "udp", inetRow}, {model.UDP, "udp6", inetRow},
	{model.SCTP, "sctp/eps", sctpRow},
}

// row is a socket of a table.
type row struct {
	port    uint16
	inode   uint64
	addrs   []netip.Addr // at which it is; the unspecified one is all
	listens bool
}

// owners names the process that has each of some ports. What cannot be read is as
// if it were not there: a name is a help and no more.
func owners(proc string, ports []model.HostPort) map[model.HostPort]string {
	type at struct {
		proto model.Proto
		port  uint16
	}
	asked := make(map[at]bool, len(ports))
	for _, p := range ports {
		asked[at{p.Proto, p.Port}] = true
	}
	rows := make(map[at][]row)
	for _, t := range tables {
		f, err := os.Open(filepath.Join(proc, "thread-self", "net", t.file))
		if err != nil {
			continue
		}
		eachRow(f, t.read, func(r row) {
			if k := (at{t.proto, r.port}); asked[k] {
				rows[k] = append(rows[k], r)
			}
		})
		f.Close()
	}
	inodes := make(map[model.HostPort][]uint64, len(ports))
	all := make(map[uint64]string)
	for _, p := range ports {
		rs := rows[at{p.Proto, p.Port}]
		// Who listens before who is a client from that port.
		slices.SortStableFunc(rs, func(a, b row) int { return cmp.Compare(rank(a), rank(b)) })
		for _, r := range rs {
			if r.meets(p.Addr) {
				inodes[p] = append(inodes[p], r.inode)
				all[r.inode] = ""
			}
		}
	}
	findProcesses(proc, all)
	out := make(map[model.HostPort]string, len(ports))
	for _, p := range ports {
		out[p] = unseen
		for _, inode := range inodes[p] {
			if name := all[inode]; name != "" {
				out[p] = name
				break
			}
		}
	}
	return out
}

func rank(r row) int {
	if r.listens {
		return 0
	}
	return 1
}

// meets reports whether a socket is in the way of one at an address.
func (r row) meets(want netip.Addr) bool {
	return slices.ContainsFunc(r.addrs, func(a netip.Addr) bool {
		a = a.Unmap()
		return a.IsUnspecified() || a.Is4() && (!want.IsValid() || a == want)
	})
}

// eachRow reads a table. Sockets that no process has, which have no inode, are
// left out.
func eachRow(r io.Reader, read func(string) (row, bool), f func(row)) {
	for s := bufio.NewScanner(r); s.Scan(); {
		if x, ok := read(s.Text()); ok && x.inode != 0 && x.port != 0 {
			f(x)
		}
	}
}

// inetRow reads a line of tcp, tcp6, udp and udp6 (proc_pid_net(5)):
//
//	sl: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000  uid  0 inode …
func inetRow(line string) (row, bool) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return row{}, false
	}
	addr, port, ok := strings.Cut(f[1], ":")
	if !ok {
		return row{}, false
	}
	a, ok := kernelAddr(addr)
	n, err := strconv.ParseUint(port, 16, 16)
	inode, err2 := strconv.ParseUint(f[9], 10, 64)
	// 0A is TCP_LISTEN (include/net/tcp_states.h); UDP has no such state.
	return row{uint16(n), inode, []netip.Addr{a}, f[3] == "0A"}, ok && err == nil && err2 == nil
}

// kernelAddr reads an address as the kernel prints it: words of 32 bits, each a
// number in the machine's own order.
func kernelAddr(s string) (netip.Addr, bool) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 4 && len(b) != 16 {
		return netip.Addr{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	return netip.AddrFromSlice(b)
}

// sctpRow reads a line of sctp/eps (net/sctp/proc.c sctp_eps_seq_show):
//
//	ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS…
func sctpRow(line string) (row, bool) {
	f := strings.Fields(line)
	if len(f) < 9 {
		return row{}, false
	}
	n, err := strconv.ParseUint(f[5], 10, 16)
	inode, err2 := strconv.ParseUint(f[7], 10, 64)
	var addrs []netip.Addr
	for _, s := range f[8:] {
		if a, err := netip.ParseAddr(s); err == nil {
			addrs = append(addrs, a)
		}
	}
	return row{uint16(n), inode, addrs, true}, err == nil && err2 == nil
}

// findProcesses fills in which process has each socket, for people. Of several that
// share one, the one with the smallest id is named, which is most often the parent.
func findProcesses(proc string, sockets map[uint64]string) {
	if len(sockets) == 0 {
		return
	}
	entries, err := os.ReadDir(proc)
	if err != nil {
		return
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	left := len(sockets)
	for _, pid := range pids {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			continue // it has ended, or is none of our business
		}
		for _, fd := range fds {
			target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
			if err != nil {
				continue
			}
			number, is := strings.CutPrefix(target, "socket:[")
			if !is {
				continue
			}
			inode, err := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64)
			if name, asked := sockets[inode]; err != nil || !asked || name != "" {
				continue
			}
			sockets[inode] = describe(dir, pid)
			if left--; left == 0 {
				return
			}
		}
	}
}

// describe is a process for people. A process names itself as it likes.
func describe(dir string, pid int) string {
	comm, err := os.ReadFile(filepath.Join(dir, "comm"))
	name := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, string(bytes.ToValidUTF8(comm, nil)))
	if err != nil || name == "" {
		return fmt.Sprintf("pid %d", pid)
	}
	return fmt.Sprintf("%s (pid %d)", name, pid)
}
