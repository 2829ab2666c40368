package linux

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sluice/internal/model"
)

// The pair is for IPv4: what guards the host from networks knows nothing else. A task,
// of this node or another, that speaks IPv6 to the host's end is not heard, neither
// itself nor as a router.
func TestMeshTakesNoIPv6(t *testing.T) {
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		t.Skipf("missing: ipv6 (%v)", err)
	}
	l := newMeshLab(t, false, "dr")
	for _, to := range l.hosts {
		var server *net.UDPConn
		to.w.host.Must(func() (err error) {
			server, err = net.ListenUDP("udp6", &net.UDPAddr{IP: net.IPv6unspecified})
			return err
		})
		defer server.Close()
		port := server.LocalAddr().(*net.UDPAddr).Port
		mac := model.MACFor(to.mesh)
		// As the kernel makes it of the MAC (RFC 4291, appendix A).
		at := net.IP{0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
		if s := run(t, to.w.host, "ip -6 addr show dev slmmeshnet00000"); s != "" {
			t.Errorf("host %d has IPv6 there:\n%s", to.n, s)
		}
		for _, from := range l.hosts[:2] {
			run(t, from.task, "ip -6 addr replace fe80::%d/64 dev eth0 nodad", from.n)
			run(t, from.task, "ip -6 neigh replace %s lladdr %s dev eth0 nud permanent", at, mac)
			from.task.Must(func() error {
				// An address counts from a work queue on.
				for late := time.Now().Add(10 * time.Second); ; {
					c, err := net.DialUDP("udp6", nil, &net.UDPAddr{IP: at, Port: port, Zone: "eth0"})
					if (errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EADDRNOTAVAIL)) && time.Now().Before(late) {
						continue
					}
					if err != nil {
						return err
					}
					_, err = c.Write([]byte("in"))
					return errors.Join(err, c.Close())
				}
			})
			if err := server.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, who, err := server.ReadFrom(make([]byte, 16)); err == nil {
				t.Errorf("a datagram of host %d's task arrives at host %d from %s", from.n, to.n, who)
			}
		}
	}
}
