package monitor

import (
	"strings"
	"testing"

	"sluice/internal/diag"
)

// FuzzQuestion: any query is answered, and any name is one value of a label.
func FuzzQuestion(f *testing.F) {
	for _, s := range []string{"", "port=81", "port=81&proto=udp", "port=0", "port=%zz", "proto=tcp", "port=1&port=2", "a=\"\n\\"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		port, proto, err := question(s)
		if err == nil && (port == 0) != (proto == "") {
			t.Errorf("%q asks for %d/%s", s, port, proto)
		}
		out := text(diag.Status{Node: s, Host: s}, diag.Services{Services: []diag.Service{{Name: s, Network: s}, {ID: s}}}, false)
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "sluice_") {
				t.Errorf("%q makes a line %q", s, line)
			}
		}
	})
}
