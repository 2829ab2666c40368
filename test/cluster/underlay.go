package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
)

const (
	underlayName = "underlay"
	bridgeName   = "br0"
)

var (
	// underlayNet is the same in every cluster: each has its own bridge in its
	// own namespace. It lies outside of what engines and sluice take as default
	// pools (172.17.0.0/12, 192.168.0.0/16, 10.0.0.0/16, 10.240.0.0/12).
	underlayNet     = netip.MustParsePrefix("10.77.0.0/24")
	underlayGateway = netip.MustParseAddr("10.77.0.1")
	// routedGateway is the next hop of clients that have an address outside
	// underlayNet; link-local, because it is seen on their link only.
	routedGateway = netip.MustParseAddr("169.254.1.1")
)

// firstHost is the last byte of the address of host 0, were there one: the low
// ten are for the gateway and what stands beside it.
const firstHost = 10

// hostAddr is the underlay address of host i, counted from 1.
func hostAddr(i int) netip.Addr {
	a := underlayNet.Addr().As4()
	a[3] = byte(firstHost + i)
	return netip.AddrFrom4(a)
}

// startUnderlay makes the bridge and the gateway that refuses everything.
func startUnderlay(ctx context.Context, book *ledger, logPath string) (*box, error) {
	b, err := startBox(ctx, book, underlayName, logPath, boxSpec{
		Hostname: underlayName,
		Sysctls: map[string]string{
			"net.ipv4.ip_forward": "1", // clients from outside come by way of the gateway
			// Refusals are the gateway's job; the kernel's default limit, one
			// per second and destination, would swallow them.
			"net.ipv4.icmp_ratelimit":    "0",
			"net.ipv4.icmp_msgs_per_sec": "100000",
			// A switch is no firewall: what the hosts' bridges cost shall show.
			"net.bridge.bridge-nf-call-iptables": "0",
		},
	})
	if err != nil {
		return nil, err
	}
	return b, b.ip(ctx,
		"link set lo up",
		"link add "+bridgeName+" type bridge",
		"link set "+bridgeName+" up",
		fmt.Sprintf("addr add %s/%d dev %s", underlayGateway, underlayNet.Bits(), bridgeName),
		"route add unreachable default",
	)
}

// ip runs commands of iproute2 in the box's network, all in one process.
func (b *box) ip(ctx context.Context, commands ...string) error {
	_, err := b.run(ctx, true, strings.Join(commands, "\n")+"\n", tool("ip"), "-batch", "-")
	return err
}

// plug connects the box with the bridge of the underlay, by a pair of which the
// underlay's end is called port.
func plug(ctx context.Context, underlay, b *box, port string, addr netip.Addr) error {
	err := underlay.ip(ctx,
		fmt.Sprintf("link add %s type veth peer name eth0 netns %d", port, b.proc.PID),
		fmt.Sprintf("link set %s master %s up", port, bridgeName),
	)
	if err != nil {
		return err
	}
	return b.ip(ctx,
		"link set lo up",
		"link set eth0 up",
		fmt.Sprintf("addr add %s/%d dev eth0", addr, underlayNet.Bits()),
		fmt.Sprintf("route add default via %s", underlayGateway),
	)
}

// plugRouted connects a box whose address is not of the underlay's subnet: the
// gateway routes to it, so hosts see a client from elsewhere.
func plugRouted(ctx context.Context, underlay, b *box, port string, addr netip.Addr) error {
	err := underlay.ip(ctx,
		fmt.Sprintf("link add %s type veth peer name eth0 netns %d", port, b.proc.PID),
		fmt.Sprintf("link set %s up", port),
		fmt.Sprintf("addr add %s/32 dev %s", routedGateway, port),
		fmt.Sprintf("route add %s/32 dev %s", addr, port),
	)
	if err != nil {
		return err
	}
	return b.ip(ctx,
		"link set lo up",
		"link set eth0 up",
		fmt.Sprintf("addr add %s/32 dev eth0", addr),
		fmt.Sprintf("route add %s/32 dev eth0", routedGateway),
		fmt.Sprintf("route add default via %s", routedGateway),
	)
}

// port is the name of the underlay's end of the link to an address.
func port(addr netip.Addr) string {
	if underlayNet.Contains(addr) {
		return fmt.Sprintf("port%d", addr.As4()[3])
	}
	// At most 15 bytes (IFNAMSIZ): eight hexadecimal digits are an IPv4 address.
	return fmt.Sprintf("far%x", addr.As4())
}

// Outside adds a client to the underlay: a machine without an engine, for
// requests from outside the cluster. An addr of the underlay's subnet
// (10.77.0.0/24; hosts begin at .11, so .200 is a good choice) sits on the same
// bridge as the hosts; any other IPv4 address is behind the gateway, and hosts
// see it as a client from another network. The client lives until Down.
func (c *Cluster) Outside(ctx context.Context, addr netip.Addr) (*Client, error) {
	if !addr.Is4() {
		return nil, fmt.Errorf("add client %s: the underlay has IPv4 only", addr)
	}
	name := "outside-" + addr.String()
	b, err := startBox(ctx, c.book, name, c.path(underlayName+".log"), boxSpec{Hostname: "outside"})
	if err != nil {
		return nil, err
	}
	connect := plugRouted
	if underlayNet.Contains(addr) {
		connect = plug
	}
	if err := connect(ctx, c.underlay, b, port(addr), addr); err != nil {
		return nil, fmt.Errorf("connect %s: %w", name, err)
	}
	return &Client{box: b, addr: addr}, nil
}

// Unplug takes the cable out of host i: its peers lose it and it loses its
// carrier. Replug puts it back.
func (c *Cluster) Unplug(ctx context.Context, i int) error {
	return c.underlay.ip(ctx, "link set "+port(c.Host(i).Addr())+" down")
}

// Replug ends Unplug.
func (c *Cluster) Replug(ctx context.Context, i int) error {
	return c.underlay.ip(ctx, "link set "+port(c.Host(i).Addr())+" up")
}

// Client is a machine on the underlay that is no Docker host.
type Client struct {
	*box
	addr netip.Addr
}

// Addr is the client's address.
func (c *Client) Addr() netip.Addr { return c.addr }

// Exec runs a command of the machine's file system from the client's network
// and returns its standard output; an error carries its standard error.
func (c *Client) Exec(ctx context.Context, args ...string) (string, error) {
	return c.run(ctx, false, "", args...)
}

// Command prepares what Exec runs, for callers that want its streams. When ctx ends
// it is killed with its process group.
func (c *Client) Command(ctx context.Context, args ...string) *exec.Cmd {
	return c.command(ctx, false, args...)
}
