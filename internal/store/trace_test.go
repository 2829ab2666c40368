package store

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A test that needs to know, or to spoil, what the store asks of the kernel runs its
// work in a process of its own under strace(1).

// inChild names the directory that a child works in; empty in the test itself.
const inChild = "SLUICE_STORE_TEST_CHILD"

// strace starts this test again, as a child that works in dir, with options of
// strace, and returns what the child printed.
func strace(t *testing.T, dir string, options ...string) string {
	t.Helper()
	if _, err := exec.LookPath("strace"); err != nil {
		t.Skip("needs strace, to see and to spoil what the store asks of the kernel")
	}
	args := append([]string{"-f", "-qq", "-e", "signal=none"}, options...)
	exe, err := os.Executable() // not /proc/self/exe, which is strace then
	if err != nil {
		t.Fatal(err)
	}
	// Each element of the name matches on its own (go help testflag).
	run := "^" + strings.ReplaceAll(regexp.QuoteMeta(t.Name()), "/", "$/^") + "$"
	cmd := exec.Command("strace", append(args, exe, "-test.run="+run, "-test.v")...)
	cmd.Env = append(os.Environ(), inChild+"="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// call is one thing asked of the kernel, and done.
type call struct {
	op     string // as traced, without the "at"
	fd     int    // that it is about, or that openat returned
	name   string // in the traced directory
	to     string // of link and rename
	create bool
	data   []byte
	at     int64 // offset of a write, size of a truncation
	mark   string
}

// calls are those that change files; the others are here so that one that the model
// does not know is noticed.
const traced = "trace=openat,close,pwrite64,write,ftruncate,fsync,fdatasync,linkat,renameat,renameat2,unlinkat," +
	"pwritev,pwritev2,fallocate,msync,sync_file_range,truncate,copy_file_range,sendfile,writev,dup,dup3"

// markPrefix begins what a child says between its calls.
const markPrefix = "@ "

// mark lets the trace know how far the child is.
func mark(format string, args ...any) {
	fmt.Printf(markPrefix+format+"\n", args...)
}

var (
	lineOf   = regexp.MustCompile(`^(\d+) +(.*)$`)
	resumed  = regexp.MustCompile(`^<\.\.\. \w+ resumed>(.*)$`)
	callText = regexp.MustCompile(`^(\w+)\((.*)\) += (-?\d+|\?)`)
)

// readTrace gives the calls of a trace file that concern the files of dir, and the
// child's marks, in the order in which they were done.
func readTrace(t *testing.T, path, dir string) []call {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []call
	begun := map[string]string{} // by thread
	open := map[int]string{}
	in := bufio.NewScanner(f)
	in.Buffer(nil, 64<<20)
	for in.Scan() {
		m := lineOf.FindStringSubmatch(in.Text())
		if m == nil {
			t.Fatalf("trace: %.200q", in.Text())
		}
		thread, text := m[1], m[2]
		if head, ok := strings.CutSuffix(text, " <unfinished ...>"); ok {
			begun[thread] = head
			continue
		}
		if m := resumed.FindStringSubmatch(text); m != nil {
			text = begun[thread] + m[1]
		}
		m = callText.FindStringSubmatch(text)
		if m == nil || m[3] == "?" || strings.HasPrefix(m[3], "-") {
			continue // the end of a thread, or a call that did nothing
		}
		c, ok := parseCall(t, m[1], strings.Split(m[2], ", "), m[3], dir, open)
		if ok {
			out = append(out, c)
		}
	}
	if err := in.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

// parseCall reads one call. open are the files of dir that are open.
func parseCall(t *testing.T, op string, args []string, result, dir string, open map[int]string) (call, bool) {
	t.Helper()
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%s%q: %v", op, args, err)
		}
		return n
	}
	// inDir is a path's name in dir; "." is dir itself.
	inDir := func(s string) (string, bool) {
		p := unhex(t, s)
		if p == dir {
			return ".", true
		}
		return filepath.Base(p), filepath.Dir(p) == dir
	}
	c := call{op: strings.TrimSuffix(strings.TrimSuffix(op, "2"), "at")}
	var ok bool
	switch op {
	case "openat":
		c.name, ok = inDir(args[1])
		c.fd, c.create = number(result), strings.Contains(args[2], "O_CREAT")
		if ok {
			open[c.fd] = c.name
		}
		return c, ok
	case "linkat", "renameat", "renameat2":
		from, in1 := inDir(args[1])
		to, in2 := inDir(args[3])
		c.name, c.to = from, to
		return c, in1 && in2
	case "unlinkat":
		c.name, ok = inDir(args[1])
		return c, ok
	}
	c.fd = number(args[0])
	if op == "write" && c.fd == 1 {
		text, ok := strings.CutPrefix(unhex(t, args[1]), markPrefix)
		return call{op: "mark", mark: strings.TrimSpace(text)}, ok
	}
	if c.name, ok = open[c.fd]; !ok {
		return c, false
	}
	switch op {
	case "close":
		delete(open, c.fd)
	case "fsync", "fdatasync":
		c.op = "sync"
	case "pwrite64":
		c.data, c.at = []byte(unhex(t, args[1])), int64(number(args[3]))
		if number(result) != len(c.data) {
			t.Fatalf("wrote %s of %d bytes", result, len(c.data))
		}
	case "ftruncate":
		c.at = int64(number(args[1]))
	case "write": // with an offset of its own: only to try for room, whose file is empty before
		c.data = []byte(unhex(t, args[1]))
		c.op = "pwrite64"
	default:
		t.Fatalf("the store calls %s, which this test's model of a disk does not know", op)
	}
	return c, true
}

// unhex reads a string as strace -xx writes it.
func unhex(t *testing.T, s string) string {
	t.Helper()
	quoted := strings.Trim(s, `"`)
	b, err := hex.DecodeString(strings.ReplaceAll(quoted, `\x`, ""))
	if err != nil {
		t.Fatalf("%.80q: %v", s, err)
	}
	return string(b)
}
