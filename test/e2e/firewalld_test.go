package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sluice/internal/diag"
	"sluice/test/cluster"
)

// firewalldScript gives a host a system bus and a firewalld of its own, whose
// configuration is a copy.
const firewalldScript = `set -e
mkdir -p /run/dbus /run/firewalld
cp -r /etc/firewalld /run/etc-firewalld
mount --bind /run/etc-firewalld /etc/firewalld
sed -i "s/^FirewallBackend=.*/FirewallBackend=$0/" /etc/firewalld/firewalld.conf
dbus-daemon --system --fork --nopidfile 2>/run/dbus.log`

// startFirewalld starts it; its process is kept in a file.
const startFirewalld = `setsid firewalld --nofork --nopid </dev/null >>/run/firewalld.log 2>&1 &
echo $! > /run/firewalld.is`

const stopFirewalld = `kill $(cat /run/firewalld.is); while firewall-cmd --state >/dev/null 2>&1; do :; done`

// TestPeaceWithFirewalld: one node has Debian's firewalld, which the engine found at its
// start. Service and published port of that node answer, and go on to after whatever
// firewalld does.
func TestPeaceWithFirewalld(t *testing.T) {
	h := lab.Host(3)
	if out, err := h.Exec(within(t), "sh", "-c", "command -v firewalld firewall-cmd dbus-daemon"); err != nil {
		t.Skipf("missing: firewalld and dbus-daemon (the commands) on the hosts: %s", out)
	}
	if out, err := h.Exec(within(t), "sh", "-c", firewalldScript, "nftables"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { // with all that was changed there
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := h.Reboot(ctx); err != nil {
			t.Error(err)
		}
	})
	firewall := func(script string) {
		t.Helper()
		if out, err := h.Exec(within(t), "sh", "-c", script); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	state := func() {
		t.Helper()
		err := cluster.Wait(within(t), "firewalld runs", func(ctx context.Context) error {
			if _, err := h.Exec(ctx, "firewall-cmd", "--state"); err != nil {
				log, _ := h.Exec(ctx, "cat", "/run/firewalld.log") // only for the text
				return fmt.Errorf("%w: %s", err, log)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	firewall(startFirewalld)
	state()
	if err := errors.Join(h.KillEngine(within(t)), h.StartEngine(within(t))); err != nil {
		t.Fatal(err)
	}

	network(t, "web")
	service(t, "there", publish("web", "publish=8191:80;8191:53/udp"), 1, "--constraint", "node.hostname=="+h.Name())
	service(t, "here", publish("web", "publish=8192:80;8192:53/udp"), 1, "--constraint", "node.hostname=="+lab.Host(1).Name())
	c, v := client(t, 1, "web"), vip(t, "there", "web").String()
	from := clients(t)[0]
	works := func() {
		t.Helper()
		reaches(t, lab.Host(1), c, 1, 3, v)
		for _, port := range []int{8191, 8192} {
			sees(t, from, h, port, false, "", is(from.Addr()))
			sees(t, from, h, port, true, "", is(from.Addr()))
		}
		sees(t, from, lab.Host(1), 8191, false, "", is(from.Addr()))
	}
	works()
	var st diag.Status
	sluice(t, 3, &st, "status")
	if !strings.Contains(st.Firewall, "4799/udp 7947/tcp 7947/udp open in zone public") {
		t.Errorf("status tells of firewalld: %q", st.Firewall)
	}
	if out, err := h.Exec(within(t), "firewall-cmd", "--list-ports"); err != nil || !strings.Contains(out, "4799/udp") {
		t.Errorf("ports of the zone: %q, %v", out, err)
	}
	restart := stopFirewalld + "\n" + startFirewalld
	for _, step := range []struct{ name, do string }{
		{"reload", "firewall-cmd --reload"},
		{"complete reload", "firewall-cmd --complete-reload"},
		{"panic", "firewall-cmd --panic-on; firewall-cmd --panic-off"},
		{"restart", restart},
		{"restart with iptables", stopFirewalld + "\nsed -i s/^FirewallBackend=.*/FirewallBackend=iptables/ /etc/firewalld/firewalld.conf\n" + startFirewalld},
		{"reload with iptables", "firewall-cmd --reload"},
	} {
		firewall(step.do)
		state()
		start := time.Now()
		noDiff(t, 3)
		rules := time.Since(start)
		works()
		t.Logf("%s: rules after %v, all answers after %v", step.name, rules.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
		if rules > soonMended {
			t.Errorf("%s: rules after %v, want at most %v", step.name, rules, soonMended)
		}
	}
}
