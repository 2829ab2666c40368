package linux

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// Feature is something of the kernel that sluice needs or uses.
type Feature struct {
	Name string // short and stable, such as "vxlan"
	Use  string // what sluice does with it, and what is lost without
	// Err is nil if the kernel has it. It wraps kernel.ErrUnsupported if the
	// kernel has not; any other error means that it could not be found out.
	Err error
}

// feature is how to find out: try runs in a scratch namespace with loopback only,
// after those before it in the table, whose devices are still there.
type feature struct {
	name, use string
	try       func(c *conn) error
}

// Names of the devices in the scratch namespace.
const tryBridge, tryVXLAN, tryVeth = "br0", "vxlan0", "veth0"

var features = []feature{
	{"bridge", "joins the containers of a network; without it no network can be made", func(c *conn) error {
		return c.newLink(tryBridge, unix.IFF_UP, []*nl.RtAttr{kindAttr("bridge", func(*nl.RtAttr) {})})
	}},
	{"veth", "attaches a container; without it none can be", func(c *conn) error {
		return c.newLink(tryVeth, unix.IFF_UP, []*nl.RtAttr{kindAttr("veth", func(data *nl.RtAttr) {
			peer := data.AddRtAttr(nl.VETH_INFO_PEER, nil)
			nl.NewIfInfomsgChild(peer, unix.AF_UNSPEC)
			peer.AddRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated("veth1"))
		})})
	}},
	{"vxlan", "carries a network between hosts; without it networks end at this host", func(c *conn) error {
		return c.newLink(tryVXLAN, 0, []*nl.RtAttr{kindAttr("vxlan", func(data *nl.RtAttr) {
			data.AddRtAttr(nl.IFLA_VXLAN_ID, nl.Uint32Attr(1))
			data.AddRtAttr(nl.IFLA_VXLAN_PORT, nl.BEUint16Attr(4789)) // nobody else is in this namespace
			data.AddRtAttr(nl.IFLA_VXLAN_LEARNING, []byte{0})
		})})
	}},
	{"neigh_suppress", "answers ARP on the node; without it (Linux before 4.15) broadcasts would have to cross the underlay", func(c *conn) error {
		br, err := c.link(tryBridge)
		if err != nil {
			return err
		}
		if err := c.setLink(tryVXLAN, 0, []*nl.RtAttr{masterAttr(br.index)}); err != nil {
			return err
		}
		if err := c.setLink(tryVXLAN, 0, []*nl.RtAttr{portAttr(true)}); err != nil {
			return err
		}
		// An old kernel accepts flags that it does not know, and ignores them.
		d, err := c.link(tryVXLAN)
		if err == nil && !d.quiet {
			err = fmt.Errorf("the port's flags read back otherwise than set: %w", unix.EOPNOTSUPP)
		}
		return err
	}},
}

// tableProbe is what Tables and IPVS may offer besides: whether this kernel can do
// what they need, tried in the namespace open at nsFD.
type tableProbe interface{ Probe(nsFD int) error }

// Features tries, in a network namespace of its own that nobody else sees, what
// this kernel can do. Trying loads modules where the kernel is allowed to. It
// takes some tens of milliseconds.
func (k *Kernel) Features(ctx context.Context) ([]Feature, error) {
	var out []Feature
	err := scratch(func(c *conn) error {
		for _, f := range features {
			if err := ctx.Err(); err != nil {
				return err
			}
			out = append(out, Feature{f.name, f.use, lacking(f.name, f.try(c))})
		}
		return k.probeTables(&out)
	})
	if err != nil {
		return nil, fmt.Errorf("probe kernel: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	err = k.within(k.host, func() error {
		_, err := k.iptablesLocked()
		return err
	})
	if errors.Is(err, kernel.ErrNotExist) {
		err = fmt.Errorf("%w: %w", kernel.ErrUnsupported, err)
	}
	return append(out, Feature{"iptables", "keeps VXLAN packets of strangers out; without it nothing does", err}), nil
}

// scratch runs f on a thread inside a network namespace of its own that nobody else
// sees, with a socket in it. Both end with f, and so does what f made there.
func scratch(f func(c *conn) error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread and its scratch namespace end here.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("make scratch namespace: %w%s", err, hint(err))
			}
			c, err := dial()
			if err != nil {
				return err
			}
			defer c.close()
			return f(c)
		}()
	}()
	return <-done
}

// HasIPVS tries, in a network namespace of its own that nobody else sees, whether
// this kernel has IPVS. Trying loads ip_vs where the kernel can do that by itself
// (from about Linux 5.16). The error is nil if it has, wraps
// kernel.ErrUnsupported if it has not; any other means that it could not be found out.
func (k *Kernel) HasIPVS() error {
	p, ok := k.cfg.IPVS.(tableProbe)
	if !ok {
		return fmt.Errorf("IPVS %w: no adapter is configured", kernel.ErrUnsupported)
	}
	return scratch(func(*conn) error {
		ns, _, err := openNetns("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		return errors.Join(p.Probe(int(ns.Fd())), ns.Close())
	})
}

// HasTunnel tries, in a network namespace of its own that nobody else sees, whether
// tasks on this node can have a kernel.TaskTunnel. Trying loads the module ipip,
// which every kernel does by itself where it may. The error is nil if they can,
// wraps kernel.ErrUnsupported if this kernel has no such devices; any other means
// that it could not be found out.
func (k *Kernel) HasTunnel() error {
	addr := netip.AddrFrom4([4]byte{192, 0, 2, 1}) // of TEST-NET-1 (RFC 5737); nobody else is in there
	err := scratch(func(c *conn) error {
		if err := k.makeTunnel(c, addr); err != nil {
			return err
		}
		there, err := c.tunnels()
		if err == nil && !slices.Contains(there, addr) {
			err = fmt.Errorf("a device of kind %s %w: it reads back otherwise than made", kindIPIP, kernel.ErrUnsupported)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("probe tunnel: %w", err)
	}
	return nil
}

// meshProbe is what Tables may offer besides.
type meshProbe interface{ ProbeMesh(nsFD int) error }

// HasMesh tries, in a network namespace of its own that nobody else sees, whether this
// kernel has what published ports need. The error is nil if it has, wraps
// kernel.ErrUnsupported if it has not; any other means that it could not be found out.
func (k *Kernel) HasMesh() error {
	p, ok := k.cfg.Tables.(meshProbe)
	if !ok {
		return fmt.Errorf("the routing mesh %w: no adapter is configured", kernel.ErrUnsupported)
	}
	return scratch(func(*conn) error {
		ns, _, err := openNetns("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		return errors.Join(p.ProbeMesh(int(ns.Fd())), ns.Close())
	})
}

// probeTables asks the nftables adapter, in the calling thread's namespace.
func (k *Kernel) probeTables(out *[]Feature) error {
	const name, use = "nftables", "spreads connections to virtual IPs; without it services have none"
	p, ok := k.cfg.Tables.(tableProbe)
	if !ok {
		return nil // nothing to ask
	}
	ns, _, err := openNetns("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	err = p.Probe(int(ns.Fd()))
	*out = append(*out, Feature{name, use, err})
	return ns.Close()
}

// lacking gives the errors that mean "never heard of" their common sentinel and
// a person something to do.
func lacking(name string, err error) error {
	for _, no := range []error{unix.EOPNOTSUPP, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.ENODEV, unix.EINVAL, kernel.ErrNotExist} {
		if errors.Is(err, no) {
			return fmt.Errorf("%s %w; load its module (modprobe) or use a kernel built with it: %w", name, kernel.ErrUnsupported, err)
		}
	}
	return err
}
