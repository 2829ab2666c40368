package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// family is the name of the generic netlink family that IPVS is reached by.
const family = "IPVS"

// sessionTimeout bounds all that is asked of IPVS in one go. The library waits
// for an answer for ever, in steps of three seconds. It is as long as nftables'
// socket waits: generous, for a loaded machine with thousands of services.
const sessionTimeout = 30 * time.Second

// Flags of a service (include/uapi/linux/ip_vs.h), which the library has no names for.
const (
	flagPersistent = 0x1  // IP_VS_SVC_F_PERSISTENT
	flagHashed     = 0x2  // IP_VS_SVC_F_HASHED: the kernel's own, on every service
	flagFallback   = 0x8  // IP_VS_SVC_F_SCHED1: what it means is the scheduler's to say
	flagPort       = 0x10 // IP_VS_SVC_F_SCHED2
)

// untouched are the timeouts that a new namespace has (tcp_timeouts and
// udp_timeouts in net/netfilter/ipvs/).
var untouched = kernel.IPVSTimeoutsSpec{TCP: 900, FIN: 120, UDP: 300}

// Balancer reads and changes IPVS. Any number of goroutines may use it, but only
// one at a time should change one namespace.
type Balancer struct {
	// there says that the kernel's family has been seen. Loaded modules with
	// services do not go.
	there atomic.Bool
}

// New makes a Balancer. It asks nothing of the kernel.
func New() *Balancer { return &Balancer{} }

// session is an open handle of one namespace.
type session struct {
	h     *ipvs.Handle
	alarm *time.Timer
}

// open opens a handle in the namespace that nsFD refers to. A handle serves one
// goroutine only, so each call has its own.
//
// kernel.ErrUnsupported: there is no ip_vs.
func (b *Balancer) open(nsFD int) (*session, error) {
	if nsFD <= 0 {
		// To the library, no path is the namespace of this process: the host's IPVS.
		return nil, fmt.Errorf("ipvs: %d is no file descriptor of a network namespace", nsFD)
	}
	// The library looks for the family once in the life of a process. If that is
	// before the module is loaded, all of its calls fail from then on.
	if !b.there.Load() {
		_, err := netlink.GenlFamilyGet(family)
		if errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("ipvs: %w; load the module (modprobe ip_vs) or use a kernel that has it: %w", kernel.ErrUnsupported, err)
		}
		if err != nil {
			return nil, fmt.Errorf("ipvs: look for its netlink family: %w", err)
		}
		b.there.Store(true)
	}
	h, err := ipvs.New(fmt.Sprintf("/proc/self/fd/%d", nsFD))
	if err != nil {
		return nil, fmt.Errorf("ipvs: open netlink socket: %w", err)
	}
	// The library's wait for an answer ends when its socket is closed.
	return &session{h: h, alarm: time.AfterFunc(sessionTimeout, h.Close)}, nil
}

func (s *session) close() {
	s.alarm.Stop()
	s.h.Close()
}

// Dump returns what IPVS has in the namespace that nsFD refers to, under the name
// ns. A service or destination that Apply would not make so has the zero value.
//
// kernel.ErrUnsupported: there is no ip_vs.
// kernel.ErrInterrupted: a service went while it was read.
func (b *Balancer) Dump(nsFD int, ns string) (kernel.State, error) {
	s, err := b.open(nsFD)
	if err != nil {
		return nil, fmt.Errorf("netns %s: %w", ns, err)
	}
	defer s.close()
	st, err := s.dump(ns)
	if err != nil {
		return nil, fmt.Errorf("netns %s: ipvs: %w", ns, err)
	}
	return st, nil
}

func (s *session) dump(ns string) (kernel.State, error) {
	st := kernel.State{}
	c, err := s.h.GetConfig()
	if err != nil {
		return nil, fmt.Errorf("read timeouts: %w", err)
	}
	timeouts := kernel.IPVSTimeoutsSpec{
		TCP: int(c.TimeoutTCP / time.Second), FIN: int(c.TimeoutTCPFin / time.Second), UDP: int(c.TimeoutUDP / time.Second),
	}
	if timeouts != untouched {
		st[kernel.IPVSTimeouts{NS: ns}] = timeouts
	}
	services, err := s.h.GetServices()
	if err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	for _, svc := range services {
		if svc.FWMark == 0 || svc.AddressFamily != unix.AF_INET {
			continue
		}
		st[kernel.IPVSService{NS: ns, Mark: svc.FWMark}] = serviceSpec(svc)
		dests, err := s.h.GetDestinations(byMark(svc.FWMark))
		if errors.Is(err, unix.ESRCH) {
			return nil, fmt.Errorf("service fwm %d: %w", svc.FWMark, kernel.ErrInterrupted)
		}
		if err != nil {
			return nil, fmt.Errorf("list destinations of fwm %d: %w", svc.FWMark, err)
		}
		for _, d := range dests {
			ip, ok := netip.AddrFromSlice(d.Address)
			if !ok || !ip.Is4() || d.Port != 0 {
				continue
			}
			st[kernel.IPVSDest{NS: ns, Mark: svc.FWMark, IP: ip}] = destSpec(d)
		}
	}
	return st, nil
}

// Apply does ops, which are of IPVS and this namespace, in the order given. Each
// stands by itself and has its own error; doing them again changes nothing.
//
// kernel.ErrNotExist: there is no such service to put a destination in.
// kernel.ErrUnsupported: there is no ip_vs, or no such scheduler.
func (b *Balancer) Apply(nsFD int, ns string, ops []kernel.Op) []error {
	errs := make([]error, len(ops))
	if len(ops) == 0 {
		return errs
	}
	s, err := b.open(nsFD)
	if err != nil {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	defer s.close()
	for i, o := range ops {
		if o.Key.Netns() != ns {
			errs[i] = fmt.Errorf("netns %s: %s belongs to netns %s", ns, o.Key, o.Key.Netns())
			continue
		}
		errs[i] = s.apply(o)
	}
	return errs
}

func (s *session) apply(o kernel.Op) error {
	switch k := o.Key.(type) {
	case kernel.IPVSTimeouts:
		want := untouched
		if o.Want != nil {
			var ok bool
			if want, ok = o.Want.(kernel.IPVSTimeoutsSpec); !ok {
				return wrongValue(o)
			}
		}
		return s.setTimeouts(want)
	case kernel.IPVSService:
		if o.Want == nil {
			return absent(s.h.DelService(byMark(k.Mark)))
		}
		want, ok := o.Want.(kernel.IPVSServiceSpec)
		if !ok {
			return wrongValue(o)
		}
		return s.setService(k, want, o.Have != nil)
	case kernel.IPVSDest:
		if !k.IP.Is4() {
			return fmt.Errorf("address %s is not IPv4: %w", k.IP, kernel.ErrUnsupported)
		}
		if o.Want == nil {
			return absent(s.h.DelDestination(byMark(k.Mark), byIP(k.IP)))
		}
		want, ok := o.Want.(kernel.IPVSDestSpec)
		if !ok {
			return wrongValue(o)
		}
		return s.setDest(k, want, o.Have != nil)
	}
	return fmt.Errorf("%s is not of IPVS", o.Key)
}

func wrongValue(o kernel.Op) error { return fmt.Errorf("%s: value is a %T", o.Key, o.Want) }

// absent takes the ways of saying "it is not there" for success: no such service
// (ESRCH), no such destination (ENOENT).
func absent(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (s *session) setTimeouts(want kernel.IPVSTimeoutsSpec) error {
	// To the kernel, 0 is "as it is".
	if want.TCP <= 0 || want.FIN <= 0 || want.UDP <= 0 {
		return fmt.Errorf("timeouts %s: want seconds, more than 0", want)
	}
	return s.h.SetConfig(&ipvs.Config{
		TimeoutTCP:    time.Duration(want.TCP) * time.Second,
		TimeoutTCPFin: time.Duration(want.FIN) * time.Second,
		TimeoutUDP:    time.Duration(want.UDP) * time.Second,
	})
}

// setService makes a service, or changes the one that is there: connections and
// destinations stay. there is what the caller believes.
func (s *session) setService(k kernel.IPVSService, want kernel.IPVSServiceSpec, there bool) error {
	svc, err := service(k.Mark, want)
	if err != nil {
		return err
	}
	if there {
		err = s.h.UpdateService(svc)
		if errors.Is(err, unix.ESRCH) {
			err = s.h.NewService(svc)
		}
	} else {
		err = s.h.NewService(svc)
		if errors.Is(err, unix.EEXIST) {
			err = s.h.UpdateService(svc)
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("scheduler %s %w; load its module (modprobe ip_vs_%s): %w", want.Scheduler, kernel.ErrUnsupported, want.Scheduler, err)
	}
	return err
}

// setDest makes a destination, or changes the one that is there.
func (s *session) setDest(k kernel.IPVSDest, want kernel.IPVSDestSpec, there bool) error {
	d, err := destination(k.IP, want)
	if err != nil {
		return err
	}
	svc := byMark(k.Mark)
	if there {
		err = s.h.UpdateDestination(svc, d)
		if errors.Is(err, unix.ENOENT) {
			err = s.h.NewDestination(svc, d)
		}
	} else {
		err = s.h.NewDestination(svc, d)
		if errors.Is(err, unix.EEXIST) {
			err = s.h.UpdateDestination(svc, d)
		}
	}
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("service fwm %d %w", k.Mark, kernel.ErrNotExist)
	}
	return err
}

// byMark names a service.
func byMark(mark uint32) *ipvs.Service {
	return &ipvs.Service{AddressFamily: unix.AF_INET, FWMark: mark}
}

// byIP names a destination on the ports that clients ask for.
func byIP(ip netip.Addr) *ipvs.Destination {
	return &ipvs.Destination{AddressFamily: unix.AF_INET, Address: net.IP(ip.AsSlice())}
}

// service is the library's form of a service.
func service(mark uint32, want kernel.IPVSServiceSpec) (*ipvs.Service, error) {
	switch {
	case mark == 0:
		return nil, errors.New("mark 0 is none")
	case want.Scheduler == "":
		return nil, errors.New("no scheduler is given; want a name such as rr")
	case want.Persist < 0 || want.PersistBits < 0 || want.PersistBits > 32 || (want.Persist > 0) != (want.PersistBits > 0):
		return nil, fmt.Errorf("persistence of %d s for prefixes of %d bits; want both, bits from 1 to 32, or none", want.Persist, want.PersistBits)
	}
	svc := byMark(mark)
	svc.SchedName = want.Scheduler
	svc.Netmask = netmask(32)
	if want.Persist > 0 {
		svc.Flags |= flagPersistent
		svc.Timeout, svc.Netmask = uint32(want.Persist), netmask(want.PersistBits)
	}
	if want.Fallback {
		svc.Flags |= flagFallback
	}
	if want.Port {
		svc.Flags |= flagPort
	}
	return svc, nil
}

// serviceSpec is the reverse of service; zero if that would not make it so.
func serviceSpec(svc *ipvs.Service) kernel.IPVSServiceSpec {
	spec := kernel.IPVSServiceSpec{
		Scheduler: svc.SchedName, Fallback: svc.Flags&flagFallback != 0, Port: svc.Flags&flagPort != 0,
	}
	if svc.Flags&flagPersistent != 0 {
		spec.Persist = int(svc.Timeout)
		for n := 1; n <= 32; n++ {
			if netmask(n) == svc.Netmask {
				spec.PersistBits = n
			}
		}
	}
	again, err := service(svc.FWMark, spec)
	if err != nil || again.Flags != svc.Flags&^flagHashed {
		return kernel.IPVSServiceSpec{}
	}
	return spec
}

// netmask is the mask of a prefix the way the library wants it: a number whose
// bytes in memory are those of the mask.
func netmask(bits int) uint32 {
	return binary.NativeEndian.Uint32(net.CIDRMask(bits, 32))
}

// maxWeight is the largest that the library can read back. The kernel takes more.
const maxWeight = 65535

// methods are the forwarding methods by their numbers (include/uapi/linux/ip_vs.h).
var methods = []struct {
	number uint32
	name   kernel.IPVSMethod
}{
	{ipvs.ConnFwdDirectRoute, kernel.IPVSDR},
	{ipvs.ConnFwdMasq, kernel.IPVSNAT},
	{ipvs.ConnFwdTunnel, kernel.IPVSTun},
}

// destination is the library's form of a destination.
func destination(ip netip.Addr, want kernel.IPVSDestSpec) (*ipvs.Destination, error) {
	if want.Weight < 0 || want.Weight > maxWeight {
		return nil, fmt.Errorf("weight %d; want 0 to %d", want.Weight, maxWeight)
	}
	if want.Upper < 0 || want.Lower < 0 || want.Upper < want.Lower {
		return nil, fmt.Errorf("thresholds upper %d, lower %d; want upper >= lower >= 0", want.Upper, want.Lower)
	}
	d := byIP(ip)
	d.Weight, d.UpperThreshold, d.LowerThreshold = want.Weight, uint32(want.Upper), uint32(want.Lower)
	for _, m := range methods {
		if m.name == want.Method {
			d.ConnectionFlags = m.number
			return d, nil
		}
	}
	return nil, fmt.Errorf("forwarding method %q: %w; want dr, nat or tun", want.Method, kernel.ErrUnsupported)
}

// destSpec is the reverse of destination; zero if the method is none of ours.
func destSpec(d *ipvs.Destination) kernel.IPVSDestSpec {
	for _, m := range methods {
		if m.number == d.ConnectionFlags&ipvs.ConnFwdMask {
			return kernel.IPVSDestSpec{
				Weight: d.Weight, Method: m.name, Upper: int(d.UpperThreshold), Lower: int(d.LowerThreshold),
			}
		}
	}
	return kernel.IPVSDestSpec{}
}

// Probe tries whether the kernel has IPVS, in the namespace that nsFD refers to,
// which nobody may use: it makes a service and deletes it again.
//
// kernel.ErrUnsupported: it has not. Any other error says nothing about the kernel.
func (b *Balancer) Probe(nsFD int) error {
	const ns = "probe"
	// No destination: in a namespace without an address, the kernel has no table to
	// look its address up in, takes it for a broadcast, and refuses.
	svc := kernel.IPVSService{NS: ns, Mark: 1}
	want := kernel.State{svc: kernel.IPVSServiceSpec{Scheduler: "rr"}}
	if err := errors.Join(b.Apply(nsFD, ns, kernel.Diff(kernel.State{}, want))...); err != nil {
		return fmt.Errorf("probe ipvs: %w", err)
	}
	have, err := b.Dump(nsFD, ns)
	if err == nil && have[svc] != want[svc] {
		err = fmt.Errorf("%w: it reads back as\n%s", kernel.ErrUnsupported, have.Text())
	}
	if err != nil {
		return fmt.Errorf("probe ipvs: %w", err)
	}
	return errors.Join(b.Apply(nsFD, ns, kernel.Diff(want, kernel.State{}))...)
}
