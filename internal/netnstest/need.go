package netnstest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Feature is something that a test needs of the machine.
type Feature string

// The features that tests ask for.
const (
	Root     Feature = "root"     // uid 0 with NET_ADMIN and SYS_ADMIN
	Bridge   Feature = "bridge"   // Linux bridge
	Veth     Feature = "veth"     // veth pairs
	VXLAN    Feature = "vxlan"    // VXLAN devices
	IPTables Feature = "iptables" // the command, with a filter table
	NFTables Feature = "nftables" // the kernel's, with tables of families bridge and ip
	IPVS     Feature = "ipvs"     // the kernel's ip_vs, loaded
	IPVSAdm  Feature = "ipvsadm"  // the command
	IPIP     Feature = "ipip"     // devices of that kind
	NFT      Feature = "nft"      // the command
	Tcpdump  Feature = "tcpdump"  // the command
	Destroy  Feature = "destroy"  // the kernel's ending of TCP connections, CONFIG_INET_DIAG_DESTROY
)

// RequireEnv names, separated by commas, the features whose absence is a failure;
// "all" is every one.
const RequireEnv = "REQUIRE"

// Need skips the test if the machine lacks one of the features, or fails it if
// RequireEnv says that the feature must be there. Every skip reads
// "missing: NAME (why)", so that they can be counted.
func Need(t testing.TB, features ...Feature) {
	t.Helper()
	required := strings.Split(os.Getenv(RequireEnv), ",")
	for _, f := range features {
		err := probe(f)
		if err == nil {
			continue
		}
		if slices.Contains(required, string(f)) || slices.Contains(required, "all") {
			t.Fatalf("missing: %s (%v), which %s demands", f, err, RequireEnv)
		}
		t.Skipf("missing: %s (%v)", f, err)
	}
}

// Has says what the machine lacks of a feature; nil: nothing. It is for tests of
// what the code under test makes of a machine without.
func Has(f Feature) error { return probe(f) }

// probe tries a feature in a scratch namespace.
func probe(f Feature) error {
	switch f {
	case Root:
		return scratch(func() error { return nil })
	case Bridge:
		return scratch(func() error { return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: named("br0")}) })
	case Veth:
		return scratch(func() error { return netlink.LinkAdd(&netlink.Veth{LinkAttrs: named("veth0"), PeerName: "veth1"}) })
	case VXLAN:
		return scratch(func() error {
			return netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: named("vxlan0"), VxlanId: 1, Port: 4789})
		})
	case IPTables:
		return command("iptables", "-w", "-t", "filter", "-S")
	case NFTables:
		// Two families at once: kernels are built with one and without the other.
		return command("nft", "add table bridge probe; add table ip probe")
	case IPVS:
		_, err := netlink.GenlFamilyGet("IPVS")
		if err != nil {
			return fmt.Errorf("modprobe ip_vs, or make test-vm: %w", err)
		}
		return nil
	case IPVSAdm:
		return command("ipvsadm", "-Ln")
	case IPIP:
		return scratch(func() error {
			err := netlink.LinkAdd(&netlink.Iptun{LinkAttrs: named("ipip1"), Local: net.IPv4(192, 0, 2, 1)})
			if err != nil {
				return fmt.Errorf("modprobe ipip, or make test-vm: %w", err)
			}
			return nil
		})
	case NFT:
		return command("nft", "list", "ruleset")
	case Tcpdump:
		return command("tcpdump", "--version")
	case Destroy:
		return scratch(destroy)
	}
	return fmt.Errorf("no such feature; one of the constants of netnstest is wanted")
}

// destroy ends a connection over lo.
func destroy() error {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := netlink.SocketDestroy(c.LocalAddr(), c.RemoteAddr()); err != nil {
		return fmt.Errorf("ending a TCP connection: %w; the kernel needs CONFIG_INET_DIAG_DESTROY and tcp_diag", err)
	}
	return nil
}

func named(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

// scratch runs f in a namespace that ends with it, loopback up.
func scratch(f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("making a network namespace: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(lo), f())
	})
}

// command runs a program in a scratch namespace.
func command(name string, args ...string) error {
	if _, err := exec.LookPath(name); err != nil {
		return err
	}
	return scratch(func() error {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
		}
		return nil
	})
}
