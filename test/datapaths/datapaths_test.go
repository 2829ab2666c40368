package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWhatIsAskedForIsMeasuredWithItsMeasure(t *testing.T) {
	for _, c := range []struct{ only, ways, gates string }{
		{"", "docker dr tun nat nft-dr nft-nat", "process published mesh-ipvs mesh-nft"},
		{"nft-dr,dr", "docker nft-dr dr", ""},
		{"mesh-nft", "", "process published mesh-nft"},
		{"tun,mesh-ipvs", "docker tun", "process published mesh-ipvs"},
	} {
		w, g, err := choose(c.only)
		if err != nil {
			t.Fatal(err)
		}
		var inWays, inGates []string
		for _, w := range w {
			inWays = append(inWays, w.name)
		}
		for _, g := range g {
			inGates = append(inGates, g.name)
		}
		if got := strings.Join(inWays, " "); got != c.ways {
			t.Errorf("-only %s: networks %s, want %s", c.only, got, c.ways)
		}
		if got := strings.Join(inGates, " "); got != c.gates {
			t.Errorf("-only %s: ports %s, want %s", c.only, got, c.gates)
		}
	}
	if _, _, err := choose("nat,mesh"); err == nil || !strings.Contains(err.Error(), `"mesh"`) {
		t.Errorf("a name that is none: %v", err)
	}
}

func TestTimesAreComparedInTheirRound(t *testing.T) {
	// The machine gets slower; in each round one takes half of the other's time.
	slow, fast := []float64{20, 20, 200, 200, 2000, 2000}, []float64{10, 10, 100, 100, 1000, 1000}
	if got := inTurns(perRound(slow, 3, median), perRound(fast, 3, median)); got != 2 {
		t.Errorf("%v times as fast, want 2", got)
	}
	if got := perRound(slow, 3, mean); len(got) != 3 || got[1] != 200 {
		t.Errorf("rounds %v, want three", got)
	}
}

func TestATableIsPutBetweenItsOwnMarkers(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(page, []byte("a\n"+begin("one")+"old\n"+end+"b\n"+begin("two")+"old\n"+end+"c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replace(page, "two", []byte("new\n")); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(page)
	if want := "a\n" + begin("one") + "old\n" + end + "b\n" + begin("two") + "new\n" + end + "c\n"; err != nil || string(got) != want {
		t.Errorf("%v: got %q, want %q", err, got, want)
	}
	if err := replace(page, "three", nil); err == nil {
		t.Error("a page without the markers was taken")
	}
}
