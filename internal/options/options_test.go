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
	for _, c := range []struct {
		in   map[string]string
		want model.ServiceOptions
	}{
		{map[string]string{Ports: "81:8080;53/UDP"}, model.ServiceOptions{Ports: "53/udp;81:8080/tcp"}},
		{map[string]string{Ports: "53%3b80"}, model.ServiceOptions{Ports: "53/tcp;80/tcp"}},
		{map[string]string{Persistence: "300"}, model.ServiceOptions{Persist: 300, PersistBits: 32}},
		{map[string]string{Persistence: "5M"}, model.ServiceOptions{Persist: 300, PersistBits: 32}},
		{map[string]string{Persistence: "2h", Netmask: "24"}, model.ServiceOptions{Persist: 7200, PersistBits: 24}},
		// Read in the order of the keys as they are written.
		{map[string]string{"sluice.persistence": "576h", "SLUICE.persistence.netmask": "255.255.128.0"}, model.ServiceOptions{Persist: MaxSeconds, PersistBits: 17}},
		{map[string]string{Persistence: "1", Netmask: "128.0.0.0"}, model.ServiceOptions{Persist: 1, PersistBits: 1}},
		{map[string]string{Persistence: "1", Netmask: "255.255.255.255"}, model.ServiceOptions{Persist: 1, PersistBits: 32}},
		{map[string]string{Persistence: "off"}, model.ServiceOptions{}},
		{map[string]string{Persistence: "0"}, model.ServiceOptions{}},
		{map[string]string{OnePacket: "On"}, model.ServiceOptions{OnePacket: true}},
		{map[string]string{OnePacket: "no"}, model.ServiceOptions{}},
		{map[string]string{Upper: "2147483647", Lower: "2147483647"}, model.ServiceOptions{Upper: MaxConnections, Lower: MaxConnections}},
		{map[string]string{Upper: "0", Lower: "0"}, model.ServiceOptions{}},
		{map[string]string{IdleTimeout: "1s"}, model.ServiceOptions{Idle: 1}},
		{map[string]string{Drain: "2m", SlowStart: "30"}, model.ServiceOptions{Drain: 120, SlowStart: 30}},
		{map[string]string{Publish: "81:80/tcp"}, model.ServiceOptions{Published: "81:80/tcp"}},
		{map[string]string{Publish: "443;80;81;8000-8010:9000-9010/UDP"}, model.ServiceOptions{Published: "80-81/tcp;443/tcp;8000-8010:9000-9010/udp"}},
		{map[string]string{Publish: "1-65535/sctp"}, model.ServiceOptions{Published: "1-65535/sctp"}},
		{map[string]string{Publish: "80", Bind: "198.51.100.1;192.0.2.1", Nodes: "Zone=A; disk!=slow", Allow: "10.0.0.0/8;192.0.2.7", Source: "Masquerade"},
			model.ServiceOptions{Published: "80/tcp", Bind: "192.0.2.1;198.51.100.1", Nodes: "disk!=slow;zone=a", Allow: "10.0.0.0/8;192.0.2.7/32", Source: model.Masquerade}},
		// What is the default anyway is of use without ports too.
		{map[string]string{Bind: "0.0.0.0", Allow: "0.0.0.0/0", Source: "keep"}, model.ServiceOptions{}},
	} {
		if got, err := Service(c.in); err != nil || got != c.want {
			t.Errorf("%v: got %+v, %v; want %+v", c.in, got, err, c.want)
		}
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
			`sluice.scheduler="random": unknown; allowed: rr, wrr, lc, wlc, sh, dh, sed, nq, lblc, lblcr, fo, ovf, mh`},
		{"a scheduler that not every kernel has", network, map[string]string{Scheduler: "twos"},
			`sluice.scheduler="twos": twos is not in every kernel that has ip_vs, and all nodes must mean the same; allowed: rr, wrr, lc, wlc, sh, dh, sed, nq, lblc, lblcr, fo, ovf, mh`},
		{"a scheduler that counts, without ip_vs", network, map[string]string{"Sluice.Scheduler": "WLC", Datapath: "nft"},
			`Sluice.Scheduler="WLC": wlc needs the number of open connections of each backend, which only the kernel's ip_vs keeps, and the network has sluice.datapath=nft; allowed: rr, wrr, sh, dh, fo, mh, or another sluice.datapath`},
		{"a datapath that is none", network, map[string]string{Datapath: "ebpf"},
			`sluice.datapath="ebpf": unknown; allowed: auto, ipvs, nft`},
		{"vni zero", network, map[string]string{VNI: "0"},
			`sluice.vni="0": out of range; allowed: a number from 1 to 16777215`},
		{"mtu with a unit", network, map[string]string{MTU: "1400b"},
			`sluice.mtu="1400b": not a number; allowed: a number from 576 to 65000`},
		{"broken escape", network, map[string]string{Mode: "50%"},
			`sluice.mode="50%": a % must start an escape like %2f; write %25 for the sign itself; allowed: dr, nat, tun`},
		{"contradiction", network, map[string]string{"com.docker.network.driver.mtu": "1400", MTU: "1500"},
			`sluice.mtu="1500": contradicts com.docker.network.driver.mtu, which is the same option; give one of them`},
		{"overlay's VNI list", network, map[string]string{"com.docker.network.driver.overlay.vxlanid_list": "4100"},
			`com.docker.network.driver.overlay.vxlanid_list="4100": is an option of Docker's overlay driver; a sluice network has one VNI, given with sluice.vni; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"a stranger's key", network, map[string]string{"foo": "bar"},
			`foo="bar": unknown option; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"a service's option on a network", network, map[string]string{Weight: "3"},
			`sluice.weight="3": is an option of a service (docker service create --network name=NET,driver-opt=KEY=VALUE), not of a network; allowed: sluice.datapath, sluice.mode, sluice.scheduler, sluice.vni, sluice.mtu`},
		{"a network's option on a service", service, map[string]string{VNI: "3"},
			`sluice.vni="3": is an option of a network (docker network create -o KEY=VALUE), not of a service; allowed: sluice.scheduler, sluice.mode, sluice.weight, sluice.ports, sluice.persistence, sluice.persistence.netmask, sluice.one-packet, sluice.threshold.upper, sluice.threshold.lower, sluice.idle-timeout, sluice.drain, sluice.slow-start, sluice.publish, sluice.publish.bind, sluice.publish.nodes, sluice.publish.allow, sluice.source`},
		{"all at once, one line", service, map[string]string{Weight: "0", Mode: "warp", Scheduler: ""},
			`sluice.mode="warp": unknown; allowed: dr, nat, tun | sluice.scheduler: unknown; allowed: rr, wrr, lc, wlc, sh, dh, sed, nq, lblc, lblcr, fo, ovf, mh | sluice.weight="0": out of range; allowed: a number from 1 to 255`},
		{"a port that is none", service, map[string]string{Ports: "80;http"},
			`sluice.ports="80;http": "http": "http" is no port; allowed: up to 32 ports or ranges like 80;81:8080/tcp;5000-5003/udp`},
		{"no duration", service, map[string]string{Persistence: "long"},
			`sluice.persistence="long": not a duration; allowed: off, or a duration of whole seconds from 1s to 576h, like 300, 300s, 5m or 2h`},
		{"half a second", service, map[string]string{IdleTimeout: "1.5s"},
			`sluice.idle-timeout="1.5s": not whole seconds; allowed: a duration of whole seconds from 1s to 576h, like 300, 300s, 5m or 2h`},
		{"longer than the kernel counts", service, map[string]string{IdleTimeout: "577h"},
			`sluice.idle-timeout="577h": out of range; allowed: a duration of whole seconds from 1s to 576h, like 300, 300s, 5m or 2h`},
		{"a mask with holes", service, map[string]string{Persistence: "5m", Netmask: "255.0.255.0"},
			`sluice.persistence.netmask="255.0.255.0": not a mask: bits that are one come first, and there is at least one; allowed: a prefix length from 1 to 32, or a mask like 255.255.255.0`},
		{"a netmask of nothing", service, map[string]string{Netmask: "24"},
			`sluice.persistence.netmask="24": is the netmask of sluice.persistence, which is off; allowed: with sluice.persistence=DURATION`},
		{"a netmask of what was refused", service, map[string]string{Netmask: "24", Persistence: "0.1"},
			`sluice.persistence="0.1": not a duration; allowed: off, or a duration of whole seconds from 1s to 576h, like 300, 300s, 5m or 2h`},
		{"neither true nor false", service, map[string]string{OnePacket: "udp"},
			`sluice.one-packet="udp": neither true nor false; allowed: true, false`},
		{"more connections than the kernel counts", service, map[string]string{Upper: "2147483648"},
			`sluice.threshold.upper="2147483648": out of range; allowed: a number from 0 to 2147483647`},
		{"a lower threshold alone", service, map[string]string{Lower: "5"},
			`sluice.threshold.lower="5": needs sluice.threshold.upper, which is not set; allowed: 0, or with sluice.threshold.upper=NUMBER`},
		{"thresholds the wrong way round", service, map[string]string{Lower: "6", Upper: "5"},
			`sluice.threshold.lower="6": is more than sluice.threshold.upper, which is 5; allowed: a number from 0 to 5`},
		{"a lower threshold of what was refused", service, map[string]string{Lower: "6", Upper: "-5"},
			`sluice.threshold.upper="-5": out of range; allowed: a number from 0 to 2147483647`},
		{"a published port that is none", service, map[string]string{Publish: "80;http"},
			`sluice.publish="80;http": "http": "http" is no port; allowed: up to 32 ports or ranges like 81:80;443;8000-8010:9000-9010/udp`},
		{"a name to bind to", service, map[string]string{Publish: "80", Bind: "eth0"},
			`sluice.publish.bind="eth0": "eth0" is no IPv4 address; allowed: up to 64 IPv4 addresses like 192.0.2.1;198.51.100.1`},
		{"nodes by name", service, map[string]string{Publish: "80", Nodes: "node.hostname==a"},
			`sluice.publish.nodes="node.hostname==a": "node.hostname" is no label of a node; allowed: up to 64 conditions like zone=a;disk!=slow`},
		{"an address in a prefix", service, map[string]string{Publish: "80", Allow: "10.0.0.1/8"},
			`sluice.publish.allow="10.0.0.1/8": 10.0.0.1/8 is an address in a prefix, which is 10.0.0.0/8; allowed: up to 64 IPv4 prefixes or addresses like 10.0.0.0/8;192.0.2.7`},
		{"a source that is none", service, map[string]string{Publish: "80", Source: "snat"},
			`sluice.source="snat": unknown; allowed: keep, masquerade`},
		{"what is of published ports, without", service, map[string]string{Bind: "192.0.2.1", Source: "masquerade"},
			`sluice.publish.bind="192.0.2.1": is of use with sluice.publish only, which is not set; allowed: with sluice.publish=PORTS | sluice.source="masquerade": is of use with sluice.publish only, which is not set; allowed: with sluice.publish=PORTS`},
		{"ports at too many addresses", service, map[string]string{Publish: "1-40000", Bind: "192.0.2.1;192.0.2.2", Allow: "10.0.0.0/8"},
			`sluice.publish="1-40000": is 40000 ports at 2 addresses; allowed: up to 65536 ports, counted for each address of sluice.publish.bind`},
		{"what is of refused ports", service, map[string]string{Publish: "0", Allow: "10.0.0.0/8"},
			`sluice.publish="0": "0": "0" is no port; allowed: up to 32 ports or ranges like 81:80;443;8000-8010:9000-9010/udp`},
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
		if o.Key != Scheduler && o.Key != Mode && o.Key != OnePacket && o.Key != Source {
			continue // not a list of words
		}
		for word := range strings.SplitSeq(o.Allowed, ", ") {
			if _, err := Service(map[string]string{o.Key: word, Publish: "80"}); err != nil {
				t.Errorf("an allowed value is refused: %v", err)
			}
		}
	}
}

func TestEveryKernelSchedulerIsServedOrRefusedByName(t *testing.T) {
	for s := range strings.FieldsSeq("rr wrr lc wlc sh dh sed nq lblc lblcr fo ovf mh twos") {
		if _, err := Network(map[string]string{Scheduler: s}); (err == nil) != (s != "twos") {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range model.Schedulers() {
		if !strings.Contains(Markdown(NetworkTable()), "`"+s.Name+"` "+s.Doc) {
			t.Errorf("the manual does not say what %s is", s.Name)
		}
	}
}

func TestWhatAServiceAsksForMustFitItsNetwork(t *testing.T) {
	for _, c := range []struct {
		datapath string
		service  model.ServiceOptions
		want     string // empty: it fits
	}{
		{"auto", model.ServiceOptions{Scheduler: "wlc", Upper: 9}, ""},
		{"ipvs", model.ServiceOptions{Scheduler: "wlc", Upper: 9}, ""},
		{"nft", model.ServiceOptions{}, ""},
		{"nft", model.ServiceOptions{Scheduler: "mh", Mode: "tun", Persist: 1, PersistBits: 32, OnePacket: true, Ports: "80/tcp", Idle: 1}, ""},
		{"nft", model.ServiceOptions{Scheduler: "lc", Upper: 9},
			`sluice.scheduler="lc": lc needs the number of open connections of each backend, which only the kernel's ip_vs keeps, and the network has sluice.datapath=nft; allowed: rr, wrr, sh, dh, fo, mh, or a network with another sluice.datapath | ` +
				`sluice.threshold.upper="9": a threshold needs the number of open connections of each backend, which only the kernel's ip_vs keeps, and the network has sluice.datapath=nft; allowed: 0, or a network with another sluice.datapath`},
	} {
		err := Fits(model.NetworkOptions{Datapath: c.datapath, Mode: "dr", Scheduler: "rr"}, c.service)
		if got := fmt.Sprint(err); (err == nil) != (c.want == "") || err != nil && got != c.want {
			t.Errorf("%s, %+v:\ngot  %v\nwant %s", c.datapath, c.service, err, c.want)
		}
	}
}

func TestModeNATRulesOut(t *testing.T) {
	nat, dr := model.NetworkOptions{Datapath: "auto", Mode: "nat"}, model.NetworkOptions{Datapath: "auto", Mode: "dr"}
	for _, c := range []struct {
		network model.NetworkOptions
		service model.ServiceOptions
		want    string // part of the text; empty: taken
	}{
		{nat, model.ServiceOptions{OnePacket: true}, `sluice.one-packet="true": cannot be had with sluice.mode=nat`},
		{nat, model.ServiceOptions{OnePacket: true, Mode: "dr"}, ""},
		{dr, model.ServiceOptions{OnePacket: true}, ""},
		{dr, model.ServiceOptions{OnePacket: true, Mode: "nat"}, "sluice.one-packet"},
		{nat, model.ServiceOptions{Ports: "80:81/tcp;80/sctp"}, ""},
		{nat, model.ServiceOptions{Ports: "80:81/sctp"}, `sluice.ports="80:81/sctp": SCTP cannot get another port`},
		{dr, model.ServiceOptions{Ports: "80:81/sctp"}, ""},
	} {
		err := Fits(c.network, c.service)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v, %+v: %v, want %q", c.network, c.service, err, c.want)
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

// TestReadingOfAServiceIsBlindToOrderAndCase: also where two options are of use
// together only. What is refused leaves nothing behind.
func TestReadingOfAServiceIsBlindToOrderAndCase(t *testing.T) {
	keys := []string{Scheduler, Ports, Persistence, Netmask, OnePacket, Upper, Lower, IdleTimeout, Drain, SlowStart, Publish, Bind, Nodes, Allow, Source}
	values := []string{"", "rr", "0", "1", "32", "80", "5m", "600h", "255.255.0.0", "off", "on", "-1", "80-90:180-190/udp", "a=b", "keep", "masquerade"}
	rapid.Check(t, func(t *rapid.T) {
		in := rapid.MapOf(rapid.SampledFrom(keys), rapid.SampledFrom(values)).Draw(t, "in")
		shouted := make(map[string]string, len(in))
		for k, v := range in {
			if rapid.Bool().Draw(t, "shout") {
				k = " " + strings.ToUpper(k)
			}
			shouted[k] = strings.ToUpper(v)
		}
		o1, err1 := Service(in)
		o2, err2 := Service(shouted)
		if o1 != o2 || (err1 == nil) != (err2 == nil) {
			t.Fatalf("%v: %+v, %v\n%v: %+v, %v", in, o1, err1, shouted, o2, err2)
		}
		if why := wrong(o1); why != "" {
			t.Fatalf("%v gave %+v: %s", in, o1, why)
		}
	})
}

// wrong says what options of a service cannot be, also beside an error.
func wrong(o model.ServiceOptions) string {
	switch {
	case o.Weight < 0 || o.Weight > MaxWeight:
		return "weight"
	case o.Persist < 0 || o.Persist > MaxSeconds || o.Idle < 0 || o.Idle > MaxSeconds || o.Drain < 0 || o.Drain > MaxSeconds || o.SlowStart < 0 || o.SlowStart > MaxSeconds:
		return "seconds"
	case o.PersistBits < 0 || o.PersistBits > 32 || (o.PersistBits == 0) != (o.Persist == 0):
		return "netmask"
	case o.Lower < 0 || o.Lower > o.Upper || o.Upper > MaxConnections:
		return "thresholds"
	case len(o.Ports.List()) > model.MaxPorts || (o.Ports == "") != (o.Ports.List() == nil):
		return "ports"
	case len(o.Published.List()) > model.MaxPublished || (o.Published == "") != (o.Published.List() == nil):
		return "published ports"
	case o.Published == "" && (o.Bind != "" || o.Nodes != "" || o.Allow != "" || o.Source != model.Keep):
		return "what is of published ports"
	}
	return ""
}

func FuzzNetwork(f *testing.F) {
	f.Add(Scheduler, "rr", MTU, "1400")
	f.Add(VNI, "16777216", "Sluice.VNI", "5")
	f.Add(Mode, "%64%72", "sluice.", "%")
	f.Add("com.docker.network.driver.mtu", "1400", MTU, "1500")
	f.Add(SecretKey, hexKey, Refused, "because")
	f.Add(Datapath, "nft", Scheduler, "lblcr")
	f.Add(Ports, "80;81:8080/tcp;5000-5003/udp", Weight, "255")
	f.Add(Persistence, "2h", Netmask, "255.255.255.0")
	f.Add(Persistence, "off", Netmask, "24")
	f.Add(Upper, "2147483647", Lower, "2147483648")
	f.Add(IdleTimeout, "2073600", OnePacket, "off")
	f.Add(Publish, "81:80/tcp;1-65535/udp", Bind, "192.0.2.1")
	f.Add(Publish, "80", Nodes, "zone=a;disk!=slow")
	f.Add(Allow, "10.0.0.0/8", Source, "masquerade")
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
		if model.NeedsIPVS(r.Options.Scheduler) && r.Options.Datapath == nft {
			t.Errorf("%q gave %+v", in, r)
		}
		if o, _ := Service(in); wrong(o) != "" {
			t.Errorf("%q gave %+v: %s", in, o, wrong(o))
		}
	})
}

// TestAPortIsNotOpenToMoreThanWasMeant: who may not be read as an address, a node or
// a client does not become all.
func TestAPortIsNotOpenToMoreThanWasMeant(t *testing.T) {
	for key, value := range map[string]string{Bind: "eth0", Nodes: "zone", Allow: "10.0.0.1/8", Allow + "ed": "10.0.0.0/8"} {
		o, err := Service(map[string]string{Publish: "80", key: value, Scheduler: "sh"})
		if errs := (Errors)(nil); !errors.As(err, &errs) || len(errs) != 1 || o != (model.ServiceOptions{Scheduler: "sh"}) {
			t.Errorf("%s=%s: %+v, %v", key, value, o, err)
		}
	}
}
