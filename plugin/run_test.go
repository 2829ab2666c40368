package main

import (
	"errors"
	"slices"
	"testing"

	"sluice/internal/diag"
)

// To find out about tunnels changes the host: it is done once, and not to report it.
func TestTunnelsAreReportedOnceAskedFor(t *testing.T) {
	for _, answer := range []error{nil, errors.New("ipip is not supported")} {
		asked := 0
		p := &parts{}
		ask := p.askTunnel(func() error { asked++; return answer })
		ipip := func(a diag.Ability) bool { return a.Name == "ipip" }
		if slices.ContainsFunc(p.abilities(), ipip) || asked > 0 {
			t.Errorf("asked %d times before anybody wanted to know", asked)
		}
		for range 2 {
			if err := ask(); !errors.Is(err, answer) {
				t.Errorf("%v, want %v", err, answer)
			}
		}
		all := p.abilities()
		if i := slices.IndexFunc(all, ipip); i < 0 || !errors.Is(all[i].Err, answer) || asked != 1 {
			t.Errorf("asked %d times, reported: %v", asked, all)
		}
	}
}
