package e2e

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"sluice/internal/diag"
	"sluice/internal/model"
	"sluice/internal/options"
	"sluice/test/cluster"
	"sluice/test/image"
)

// who is an address with its MAC, as the probe takes it.
func who(a netip.Addr) string { return model.MACFor(a).String() + "/" + a.String() }

// background runs something that ends when it is told to, and returns what tells it.
func background(t *testing.T, run func(context.Context) (string, error)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(within(t))
	var wg sync.WaitGroup
	wg.Go(func() {
		if out, err := run(ctx); ctx.Err() == nil {
			t.Errorf("it has ended by itself: %q, %v", out, err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

// hears is what a container hears of forged frames until it has heard one of a name.
func hears(t *testing.T, h *cluster.Host, container, last string, rounds int) map[string]int {
	t.Helper()
	out, err := h.InContainer(within(t), container, "/probe", "hear", "--last", last, "--rounds", fmt.Sprint(rounds))
	heard := map[string]int{}
	if err := errors.Join(err, json.Unmarshal([]byte(out), &heard)); err != nil {
		t.Fatal(err)
	}
	return heard
}

// TestATaskCannotSpeakForOthers: a task says by ARP and IPv4 that it is the virtual IP
// of another service, another task, or the gateway. Neither a container on its node
// nor one on another hears it, and both go on being served. Then a host that is no
// node, and after it one that is, send a frame in VXLAN.
func TestATaskCannotSpeakForOthers(t *testing.T) {
	network(t, "web")
	victim := service(t, "s1", "web", 2, "--constraint", "node.hostname!=e3")
	liar := service(t, "s2", "web", 1, "--constraint", "node.hostname==e1")[0]
	v1, v2 := vip(t, "s1", "web"), vip(t, "s2", "web")
	own, other := liar.Addrs["web"], victim[0].Addrs["web"]
	var st diag.Networks
	sluice(t, 1, &st, "networks")
	i := slices.IndexFunc(st.Networks, func(n diag.Network) bool { return n.Name == "web" })
	if i < 0 {
		t.Fatalf("%+v", st)
	}
	gateway := netip.MustParseAddr(st.Networks[i].Gateway)
	mac := func(a netip.Addr) string { return model.MACFor(a).String() }
	lies := []string{
		"arp-vip=arp/" + mac(own) + "/" + v1.String(),
		"arp-own-vip=arp/" + mac(own) + "/" + v2.String(),
		"arp-task=arp/" + mac(own) + "/" + other.String(),
		"arp-as-task=arp/" + who(other),
		"arp-gateway=arp/" + mac(own) + "/" + gateway.String(),
		"ipv4-vip=ipv4/" + mac(own) + "/" + v1.String(),
		"ipv4-task=ipv4/" + mac(own) + "/" + other.String(),
		"ipv4-as-task=ipv4/" + who(other),
		"mac-of-task=ipv4/" + mac(other) + "/" + own.String(),
		"ipv4-gateway=ipv4/" + mac(own) + "/" + gateway.String(),
	}
	truths := []string{
		"arp=arp/" + who(own),
		"answer=ipv4/" + mac(own) + "/" + v2.String(),
		"last=ipv4/" + who(own),
	}
	for _, i := range []int{1, 3} {
		h := lab.Host(i)
		c := client(t, i, "web")
		reaches(t, h, c, 2, 4, v1.String())
		stop := background(t, func(ctx context.Context) (string, error) {
			return liar.Host.InContainer(ctx, liar.Container, "/probe", "forge", "--to", who(addrOn(t, h, c, "web")), strings.Join(append(lies, truths...), ","))
		})
		heard := hears(t, h, c, "last", 3)
		for _, l := range lies {
			if name, _, _ := strings.Cut(l, "="); heard[name] > 0 {
				t.Errorf("a container on %s hears %s", h.Name(), l)
			}
		}
		for _, l := range truths {
			if name, _, _ := strings.Cut(l, "="); heard[name] == 0 {
				t.Errorf("a container on %s does not hear %s", h.Name(), l)
			}
		}
		s, err := get(within(t), h, c, "--for", "1s", "--every", "5ms", v1.String())
		if err != nil || !s.lossless() || len(s.Hosts) != 2 {
			t.Errorf("requests from %s meanwhile: %+v, %v", h.Name(), s, err)
		}
		stop()
	}
	noDiff(t, 1)

	// It is counted, where it was dropped.
	var status diag.Status
	sluice(t, 1, &status, "status")
	if status.Guard.Dropped < uint64(len(lies)) {
		t.Errorf("%+v, want %d frames dropped or more", status.Guard, len(lies))
	}
	text, err := metricsOf(t, 1)
	if err != nil || !strings.Contains(text, `sluice_guard_dropped_total{network="web"}`) {
		t.Errorf("metrics do not tell what was dropped: %v\n%s", err, text)
	}

	t.Run("VXLAN", func(t *testing.T) {
		h := lab.Host(3)
		c := client(t, 3, "web")
		args := func(name string) []string {
			return []string{probe(), "forge", "--vxlan", fmt.Sprintf("%s:%d", h.Addr(), status.Port), "--vni", fmt.Sprint(st.Networks[i].VNI),
				"--to", who(addrOn(t, h, c, "web")), name + "=ipv4/" + who(own)}
		}
		refused := func() string {
			out, err := h.Exec(within(t), "iptables", "-nvxL", "SLUICE-VXLAN")
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(out) {
				if f := strings.Fields(line); len(f) > 2 && f[2] == "DROP" {
					return f[0]
				}
			}
			t.Fatalf("no DROP:\n%s", out)
			return ""
		}
		before := refused()
		stranger := clients(t)[0]
		background(t, func(ctx context.Context) (string, error) { return stranger.Exec(ctx, args("stranger")...) })
		err := cluster.Wait(within(t), "the stranger's frames are dropped", func(context.Context) error {
			if refused() == before {
				return errors.New("none is")
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		background(t, func(ctx context.Context) (string, error) { return onHost{lab.Host(2)}.Exec(ctx, args("node")...) })
		if heard := hears(t, h, c, "node", 3); heard["stranger"] > 0 {
			t.Error("a container hears what came in VXLAN from a host that is no node")
		}
	})
}

// TestWhoSpeaksForItselfIsHeard: with a MAC of the user's choice, after a restart, on a
// network that came later; a task alone that calls its service, and one without a
// virtual IP.
func TestWhoSpeaksForItselfIsHeard(t *testing.T) {
	network(t, "web")
	alone := service(t, "s1", "web", 1, "--constraint", "node.hostname==e1")[0]
	service(t, "s2", "web", 1, "--constraint", "node.hostname==e3", "--endpoint-mode", "dnsrr")
	v := vip(t, "s1", "web").String()
	reaches(t, alone.Host, alone.Container, 1, 3, v)
	reaches(t, alone.Host, alone.Container, 1, 3, "s2")
	for _, i := range []int{1, 2} {
		h := lab.Host(i)
		mac := fmt.Sprintf("02:11:22:33:44:5%d", i)
		c := clientWithMAC(t, i, "web", mac)
		if out, err := h.InContainer(within(t), c, "/bin/ip", "link"); err != nil || !strings.Contains(out, mac) {
			t.Errorf("on %s no device has MAC %s: %v\n%s", h.Name(), mac, err, out)
		}
		reaches(t, h, c, 1, 3, v)
		reaches(t, h, c, 1, 3, "s2")
		docker(t, i, "restart", "-t", "0", c)
		reaches(t, h, c, 1, 3, v)
		docker(t, i, "network", "disconnect", "web", c)
		docker(t, i, "network", "connect", "web", c)
		reaches(t, h, c, 1, 3, "--udp", v)
	}
	for _, i := range []int{1, 2} {
		noDiff(t, i)
		var st diag.Status
		if sluice(t, i, &st, "status"); st.Guard.Dropped > 0 {
			t.Errorf("on host %d something of theirs was dropped: %+v", i, st.Guard)
		}
	}
}

// clientWithMAC is client with a MAC, which the docker command of later versions has no
// way to ask an engine of 20.10 for.
func clientWithMAC(t *testing.T, i int, network, mac string) string {
	t.Helper()
	type object map[string]any
	text, err := lab.Host(i).API(within(t), http.MethodPost, "/containers/create", object{
		"Image": image.Probe, "MacAddress": mac, "StopSignal": "SIGKILL",
		"HostConfig":       object{"NetworkMode": network},
		"NetworkingConfig": object{"EndpointsConfig": object{network: object{"MacAddress": mac}}},
	})
	var c struct{ ID string }
	if err := errors.Join(err, json.Unmarshal(text, &c)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if _, err := lab.Host(i).Docker(ctx, "rm", "-f", c.ID); err != nil {
			t.Error(err)
		}
	})
	docker(t, i, "start", c.ID)
	return c.ID
}

// metricsOf is what collectors get of host i.
func metricsOf(t *testing.T, i int) (string, error) {
	t.Helper()
	from := clients(t)[0]
	return from.Exec(within(t), "curl", "-sf", fmt.Sprintf("http://%s:9247/metrics", lab.Host(i).Addr()))
}

// TestNoSecretIsTold: the gossip key of the swarm is in nothing that sluice says, at
// the log level debug; and its sockets and its state are root's alone.
func TestNoSecretIsTold(t *testing.T) {
	id := network(t, "web")
	service(t, "s1", publish("web", "publish=81:80"), 3)
	gossips(t, 1)
	var n struct{ Options map[string]string }
	text, err := lab.Host(1).API(within(t), http.MethodGet, "/networks/"+id, nil)
	if err := errors.Join(err, json.Unmarshal(text, &n)); err != nil {
		t.Fatal(err)
	}
	key, err := hex.DecodeString(n.Options[options.SecretKey])
	if err != nil || len(key) != 32 {
		t.Fatalf("option %s is no key: %v", options.SecretKey, err)
	}
	secrets := map[string]string{
		"hexadecimal": hex.EncodeToString(key), "HEXADECIMAL": strings.ToUpper(hex.EncodeToString(key)),
		"base64": base64.RawStdEncoding.EncodeToString(key), "base64 for URLs": base64.RawURLEncoding.EncodeToString(key),
		"octets": string(key), "octets as Go quotes them": strings.Trim(fmt.Sprintf("%q", key), `"`),
		"octets as Go lists them": strings.Trim(fmt.Sprint(key), "[]"), "octets as JSON lists them": strings.ReplaceAll(strings.Trim(fmt.Sprint(key), "[]"), " ", ","),
	}
	silent := func(where, text string) {
		t.Helper()
		if text == "" {
			t.Errorf("%s says nothing", where)
		}
		for form, s := range secrets {
			if strings.Contains(text, s) {
				t.Errorf("%s has the gossip key in %s", where, form)
			}
		}
	}
	for i, h := range lab.Hosts() {
		for _, args := range [][]string{{"status"}, {"networks"}, {"services"}, {"service", "s1"}, {"entry"}, {"diff"}, {"config"}} {
			for _, form := range [][]string{nil, {"--json"}} {
				full := slices.Concat([]string{sluiceCommand(h)}, form, args)
				out, err := h.Exec(within(t), full...)
				silent(fmt.Sprintf("%s on %s (%v)", strings.Join(full[1:], " "), h.Name(), err), out)
			}
		}
		out, err := metricsOf(t, i+1)
		silent(fmt.Sprintf("/metrics of %s (%v)", h.Name(), err), out)
		log, err := os.Open(h.LogFile())
		if err != nil {
			t.Fatal(err)
		}
		lines, err := io.ReadAll(log)
		if err := errors.Join(err, log.Close()); err != nil {
			t.Fatal(err)
		}
		// The engine's own lines quote what it asks for; the plugin's are marked.
		var ours strings.Builder
		debug := false
		for line := range strings.Lines(string(lines)) {
			if strings.Contains(line, "plugin=") {
				ours.WriteString(line)
				debug = debug || strings.Contains(line, "level=DEBUG")
			}
		}
		silent("the log of "+h.Name(), ours.String())
		if !debug {
			t.Errorf("the log of %s has no line of the level debug", h.Name())
		}
	}

	// By the files of the machine: an engine's tree has no tools.
	h := lab.Host(1)
	base := fmt.Sprintf("/proc/%d/root", h.PID())
	modes := map[string]fs.FileMode{}
	must := func(path string, want fs.FileMode) {
		t.Helper()
		found, err := filepath.Glob(base + path)
		if err != nil || len(found) == 0 {
			t.Errorf("%s is not there: %v", path, err)
		}
		for _, f := range found {
			info, err := os.Lstat(f)
			if err != nil {
				t.Error(err)
				continue
			}
			if modes[f] = info.Mode(); info.Mode() != want {
				t.Errorf("%s has mode %v, want %v", strings.TrimPrefix(f, base), info.Mode(), want)
			}
		}
	}
	must("/run/sluice", fs.ModeDir|0o755)
	must("/run/sluice/*.sock", fs.ModeSocket|0o600)
	must("/run/docker/plugins/*", fs.ModeDir|0o700)
	state := "/proc/" + pluginPID(t, h) + "/root/var/lib/sluice"
	out, err := h.Exec(within(t), "stat", "-c", "%a", state, state+"/state.db")
	if err != nil || out != "700\n600\n" {
		t.Errorf("modes of the state directory and file: %q, %v; want 700, 600", out, err)
	}
}
