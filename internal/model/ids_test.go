package model_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"sluice/internal/model"
)

func TestMACs(t *testing.T) {
	want := model.MAC{0x02, 0x42, 0x0a, 0xff, 0x00, 0x02}
	for _, in := range []string{"02:42:0a:ff:00:02", "02:42:0A:FF:00:02"} {
		if got, err := model.ParseMAC(in); err != nil || got != want || got.String() != "02:42:0a:ff:00:02" {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for in, word := range map[string]string{
		"": "six octets", "02:42:0a:ff:00": "six octets", "02:42:0a:ff:00:02:03": "six octets", "0242.0aff.0002": "six octets",
		"02:42:0a:ff:00:2": `"2"`, "02:42:0a:ff:00:002": `"002"`, "02:42:0a:ff:00:zz": `"zz"`, "02:42:0a:ff:00:+1": `"+1"`, "02:42:0a:ff:00:": `""`,
	} {
		if got, err := model.ParseMAC(in); err == nil || !strings.Contains(err.Error(), word) || !got.IsZero() {
			t.Errorf("%q: %v, %v; want an error with %s", in, got, err, word)
		}
	}
	if got := model.MACFor(netip.MustParseAddr("10.255.0.2")); got != want {
		t.Errorf("derived: %s", got)
	}
	if got := model.MACFor(netip.MustParseAddr("::ffff:10.255.0.2")); got != want {
		t.Errorf("derived from the mapped form: %s", got)
	}
	for _, a := range []netip.Addr{{}, netip.MustParseAddr("fd00::2")} {
		if got := model.MACFor(a); !got.IsZero() {
			t.Errorf("%s: %s", a, got)
		}
	}
}

func TestMACsTravelAsText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var m, back model.MAC
		copy(m[:], rapid.SliceOfN(rapid.Byte(), 6, 6).Draw(t, "mac"))
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(text, &back); err != nil || back != m {
			t.Fatalf("%s became %s, %v", m, back, err)
		}
	})
	m := model.MAC{1}
	if err := json.Unmarshal([]byte(`""`), &m); err != nil || !m.IsZero() {
		t.Errorf("no text: %s, %v", m, err)
	}
	if err := json.Unmarshal([]byte(`"02:42"`), &m); err == nil {
		t.Error("half a MAC is taken")
	}
}

func TestShortIDs(t *testing.T) {
	if got := model.NetworkID("0123456789abcdef").Short(); got != "0123456789ab" {
		t.Errorf("got %s", got)
	}
	if got := model.EndpointID("0123").Short(); got != "0123" {
		t.Errorf("got %s", got)
	}
}

func TestPhasesHaveNames(t *testing.T) {
	for p, want := range map[model.Phase]string{model.Created: "created", model.Joined: "joined", model.Taken: "taken", 7: "unknown"} {
		if p.String() != want {
			t.Errorf("%d is %s, want %s", int(p), p, want)
		}
	}
}
