package options

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"sluice/internal/model"
)

var defaults = model.NetworkOptions{Datapath: "auto", Mode: "dr", Scheduler: "rr"}

const hexKey = "000102030405060708090a0b0c0d0e0f"

func TestNetworkOptionsAreRead(t *testing.T) {
	with := func(f func(*NetworkRequest)) NetworkRequest {
		r := NetworkRequest{Options: defaults}
		f(&r)
		return r
	}
	for _, c := range []struct {
		name string
		in   map[string]string
		want NetworkRequest
	}{
		{"nothing given", nil, with(func(*NetworkRequest) {})},
		{"every key", map[string]string{Datapath: "nft", Mode: "dr", Scheduler: "wrr", VNI: "16777215", MTU: "65000", SecretKey: hexKey, Refused: "100% no"},
			with(func(r *NetworkRequest) {
				r.Options = model.NetworkOptions{Datapath: "nft", Mode: "dr", Scheduler: "wrr"}
				r.VNI, r.MTU, r.Key, r.Refused = 16777215, 65000, "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f", "100% no"
			})},
		{"any case, outer space", map[string]string{" Sluice.Scheduler ": " SH "}, with(func(r *NetworkRequest) { r.Options.Scheduler = "sh" })},
		{"escapes", map[string]string{Scheduler: "%73%48"}, with(func(r *NetworkRequest) { r.Options.Scheduler = "sh" })},
		{"the engine's name of the MTU", map[string]string{"com.docker.network.driver.mtu": "1400"}, with(func(r *NetworkRequest) { r.MTU = 1400 })},
		{"the same said twice", map[string]string{"com.docker.network.driver.mtu": "1400", MTU: "01400"}, with(func(r *NetworkRequest) { r.MTU = 1400 })},
		{"what the engine serves itself", map[string]string{"com.docker.network.advertise_addr_nmsgs": "3", "com.docker.network.enable_ipv4": "true"}, with(func(*NetworkRequest) {})},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Network(c.in)
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func TestServiceOptionsAreRead(t *testing.T) {
	got, err := Service(map[string]string{
		Scheduler: "wrr", "SLUICE.MODE": "DR", Weight: "255",
		"com.docker.network.driver.mtu": "9", "com.docker.network.endpoint.sysctls": "x", "alias": "y",
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := (model.ServiceOptions{Scheduler: "wrr", Mode: "dr", Weight: 255}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got, err := Service(nil); err != nil || got != (model.ServiceOptions{}) {
		t.Errorf("no options: got %+v, %v; want the zero value, which is the network's", got, err)
	}
}

func TestRefusalsSayWhatToDo(t *testing.T) {
	network := func(m map[string]string) error { _, err := Network(m); return err }
	service := func(m map[string]string) error { _, err := Service(m); return err }
	for _, c := range []struct {
		name string
		read func(map[string]string) error
		in   map[string]string
		want string // the whole text
	}{
		{"unknown key", network, map[string]string{"sluice.colour": "red"},
			`sluice.colour="red": unknown option; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"unknown word", network, map[string]string{Scheduler: "random"},
			`sluice.scheduler="random": unknown; allowed: rr, wrr, sh`},
		{"a scheduler of the kernel", network, map[string]string{Scheduler: "wlc"},
			`sluice.scheduler="wlc": wlc needs the number of open connections of each backend, which only the kernel's ip_vs keeps, and this version serves what every node can, by nft too; allowed: rr, wrr, sh`},
		{"a datapath that is none", network, map[string]string{Datapath: "ebpf"},
			`sluice.datapath="ebpf": unknown; allowed: auto, ipvs, nft`},
		{"vni zero", network, map[string]string{VNI: "0"},
			`sluice.vni="0": out of range; allowed: a number from 1 to 16777215`},
		{"mtu with a unit", network, map[string]string{MTU: "1400b"},
			`sluice.mtu="1400b": not a number; allowed: a number from 576 to 65000`},
		{"broken escape", network, map[string]string{Mode: "50%"},
			`sluice.mode="50%": a % must start an escape like %2f; write %25 for the sign itself; allowed: dr`},
		{"contradiction", network, map[string]string{"com.docker.network.driver.mtu": "1400", MTU: "1500"},
			`sluice.mtu="1500": contradicts com.docker.network.driver.mtu, which is the same option; give one of them`},
		{"overlay's VNI list", network, map[string]string{"com.docker.network.driver.overlay.vxlanid_list": "4100"},
			`com.docker.network.driver.overlay.vxlanid_list="4100": is an option of Docker's overlay driver; a sluice network has one VNI, given with sluice.vni; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"a stranger's key", network, map[string]string{"foo": "bar"},
			`foo="bar": unknown option; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"a service's option on a network", network, map[string]string{Weight: "3"},
			`sluice.weight="3": is an option of a service (docker service create --network name=NET,driver-opt=KEY=VALUE), not of a network; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"a network's option on a service", service, map[string]string{VNI: "3"},
			`sluice.vni="3": is an option of a network (docker network create -o KEY=VALUE), not of a service; allowed: sluice.scheduler, sluice.mode, sluice.weight`},
		{"all at once, one line", service, map[string]string{Weight: "0", Mode: "tun", Scheduler: ""},
			`sluice.mode="tun": tun is not served: this version forwards by layer 2 (dr) only; allowed: dr | sluice.scheduler: unknown; allowed: rr, wrr, sh | sluice.weight="0": out of range; allowed: a number from 1 to 255`},
		{"a secret is not repeated", network, map[string]string{SecretKey: "hunter2"},
			`sluice.secret-key: not a gossip key: want 16, 24 or 32 bytes in hexadecimal or base64, such as the output of ` + "`openssl rand -hex 32`" + `; allowed: 16, 24 or 32 bytes in hexadecimal or base64`},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.read(c.in)
			if err == nil {
				t.Fatal("accepted")
			}
			if diff := cmp.Diff(c.want, err.Error()); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			var e *Error
			if !errors.As(err, &e) {
				t.Errorf("%T holds no *Error", err)
			}
		})
	}
}

// TestTheTableIsTrue holds what the table says of a row to what its parser does.
func TestTheTableIsTrue(t *testing.T) {
	for _, o := range NetworkTable() {
		if o.Internal || o.Default == "allocated" || o.Default == "from the underlay" {
			continue
		}
		with, err := Network(map[string]string{o.Key: o.Default})
		if err != nil {
			t.Errorf("the default of %s is refused: %v", o.Key, err)
		}
		if without, _ := Network(nil); with != without {
			t.Errorf("%s: the default given is %+v, not given is %+v", o.Key, with, without)
		}
		for word := range strings.SplitSeq(o.Allowed, ", ") {
			if _, err := Network(map[string]string{o.Key: word}); err != nil {
				t.Errorf("an allowed value is refused: %v", err)
			}
		}
	}
	for _, o := range ServiceTable() {
		if o.Key == Weight {
			continue
		}
		for word := range strings.SplitSeq(o.Allowed, ", ") {
			if _, err := Service(map[string]string{o.Key: word}); err != nil {
				t.Errorf("an allowed value is refused: %v", err)
			}
		}
	}
}

func TestEveryKernelSchedulerIsServedOrRefusedByName(t *testing.T) {
	for s := range strings.FieldsSeq("rr wrr lc wlc sh dh sed nq lblc lblcr fo ovf mh twos") {
		if _, err := Network(map[string]string{Scheduler: s}); err != nil && !strings.Contains(err.Error(), "ip_vs") {
			t.Errorf("%v does not say what %s is", err, s)
		}
	}
}

func TestKeysAreReadInEveryUsualForm(t *testing.T) {
	for _, c := range []struct {
		in   string
		want string // hexadecimal; empty: refused
	}{
		{hexKey, hexKey},
		{strings.ToUpper(hexKey), hexKey},
		{"AAECAwQFBgcICQoLDA0ODw==", hexKey},
		{"AAECAwQFBgcICQoLDA0ODw", hexKey},
		{"-_-_-_-_-_-_-_-_-_-_-w", "fbffbffbffbffbffbffbffbffbffbffb"},
		// 32 digits are 16 bytes of hexadecimal, not 24 bytes of base64.
		{strings.Repeat("ab", 16), strings.Repeat("ab", 16)},
		{strings.Repeat("00", 32), strings.Repeat("00", 32)},
		{"", ""}, {"abcd", ""}, {strings.Repeat("00", 20), ""}, {"not a key at all", ""},
	} {
		got, err := DecodeKey(c.in)
		if c.want == "" {
			if err == nil {
				t.Errorf("%q: accepted", c.in)
			}
			continue
		}
		if err != nil || EncodeKey(got) != c.want {
			t.Errorf("%q: got %x, %v; want %s", c.in, got, err, c.want)
		}
	}
}

func TestAKeyNeverPrintsItself(t *testing.T) {
	r, err := Network(map[string]string{SecretKey: strings.Repeat("41", 16)})
	if err != nil {
		t.Fatal(err)
	}
	var printed []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		printed = append(printed, fmt.Sprintf(verb, r.Key), fmt.Sprintf(verb, r))
	}
	j, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	printed = append(printed, string(j), fmt.Sprint(Redact(map[string]string{"Sluice.Secret-Key": strings.Repeat("41", 16)})))
	for _, p := range printed {
		for _, leak := range []string{strings.Repeat("A", 16), strings.Repeat("41", 16), strings.Repeat("65 ", 4)} {
			if strings.Contains(p, leak) {
				t.Errorf("leaked: %s", p)
			}
		}
	}
}

func TestRedactLeavesItsArgument(t *testing.T) {
	in := map[string]string{SecretKey: "x", VNI: "5"}
	got := Redact(in)
	if want := map[string]string{SecretKey: Redacted, VNI: "5"}; !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if in[SecretKey] != "x" {
		t.Error("the argument was changed")
	}
	if Redact(nil) != nil {
		t.Error("nil became a map")
	}
}

func TestMarkdownHasEveryPublicKeyOnce(t *testing.T) {
	for _, table := range [][]Option{NetworkTable(), ServiceTable()} {
		text := Markdown(table)
		for _, o := range table {
			if n := strings.Count(text, "| `"+o.Key+"` |"); n != 1 && !o.Internal || n != 0 && o.Internal {
				t.Errorf("%s stands %d times in\n%s", o.Key, n, text)
			}
		}
		for line := range strings.Lines(text) {
			if strings.Count(line, "|") != 5 {
				t.Errorf("not four columns: %s", line)
			}
		}
	}
}

// TestReadingIsBlindToOrderAndCase: a map has no order, and neither case nor
// space of a key may change what it means.
func TestReadingIsBlindToOrderAndCase(t *testing.T) {
	keys := []string{Datapath, Mode, Scheduler, VNI, MTU, Weight, "foo", "com.docker.network.x"}
	values := []string{"auto", "nft", "ipvs", "dr", "rr", "sh", "lc", "0", "1", "600", "70000", "%", ""}
	rapid.Check(t, func(t *rapid.T) {
		in := rapid.MapOf(rapid.SampledFrom(keys), rapid.SampledFrom(values)).Draw(t, "in")
		shouted := make(map[string]string, len(in))
		for k, v := range in {
			shouted[" "+strings.ToUpper(k)] = strings.ToUpper(v)
		}
		r1, err1 := Network(in)
		r2, err2 := Network(shouted)
		if r1 != r2 || (err1 == nil) != (err2 == nil) {
			t.Fatalf("%v: %+v, %v\n%v: %+v, %v", in, r1, err1, shouted, r2, err2)
		}
		// Every mistake is told: what is left after taking out the keys that the
		// error names is accepted.
		var es Errors
		if errors.As(err1, &es) {
			for _, e := range es {
				delete(in, e.Key)
			}
			if r3, err := Network(in); err != nil || r3 != r1 {
				t.Fatalf("without the refused keys: %+v, %v; want %+v", r3, err, r1)
			}
		}
	})
}

func FuzzNetwork(f *testing.F) {
	f.Add(Scheduler, "rr", MTU, "1400")
	f.Add(VNI, "16777216", "Sluice.VNI", "5")
	f.Add(Mode, "%64%72", "sluice.", "%")
	f.Add("com.docker.network.driver.mtu", "1400", MTU, "1500")
	f.Add(SecretKey, hexKey, Refused, "because")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		in := map[string]string{k1: v1, k2: v2}
		r, err := Network(in)
		if err == nil {
			if r.MTU != 0 && (r.MTU < MinMTU || r.MTU > MaxMTU) || r.VNI > model.MaxVNI {
				t.Errorf("%q gave %+v", in, r)
			}
			if n := len(r.Key); n != 0 && !slices.Contains([]int{16, 24, 32}, n) {
				t.Errorf("a key of %d bytes", n)
			}
		} else if strings.ContainsAny(err.Error(), "\n\r") && !strings.ContainsAny(k1+k2, "\n\r") {
			t.Errorf("more than one line: %q", err)
		}
		if o, err := Service(in); err == nil && (o.Weight < 0 || o.Weight > MaxWeight) {
			t.Errorf("%q gave %+v", in, o)
		}
	})
}
