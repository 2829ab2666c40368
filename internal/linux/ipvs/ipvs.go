package ipvs

import (
	"errors"
	"fmt"
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

// untouched are the timeouts that a new namespace has (tcp_timeouts and
// udp_timeouts in net/netfilter/ipvs/).
var untouched = kernel.IPVSTimeoutsSpec{TCP: 900, FIN: 120, UDP: 300}

// Balancer reads and changes IPVS. Any number of goroutines may use it, but only
// one at a time should change one namespace.
type Balancer struct {
	// id is the number of the kernel's family; 0: not seen yet. Loaded modules with
	// services do not go.
	id atomic.Uint32
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
	if _, err := b.look(); err != nil {
		return nil, err
	}
	h, err := ipvs.New(fmt.Sprintf("/proc/self/fd/%d", nsFD))
	if err != nil {
		return nil, fmt.Errorf("ipvs: open netlink socket: %w", err)
	}
	// The library's wait for an answer ends when its socket is closed.
	return &session{h: h, alarm: time.AfterFunc(sessionTimeout, h.Close)}, nil
}

// look returns the number of IPVS's family, asking for it until it has been there
// once. Asking loads the module by the kernel's own doing, if it may and the module
// says so: since about Linux 5.16 (MODULE_ALIAS_GENL_FAMILY in ip_vs_ctl.c). An
// older one is loaded by modprobe, by the engine's first service with a published
// port, or by any rule with iptables' match ipvs.
//
// kernel.ErrUnsupported: there is no ip_vs.
func (b *Balancer) look() (uint16, error) {
	if id := b.id.Load(); id != 0 {
		return uint16(id), nil
	}
	f, err := netlink.GenlFamilyGet(family)
	if errors.Is(err, unix.ENOENT) {
		return 0, fmt.Errorf("ipvs: %w; load the module (modprobe ip_vs) or use a kernel that has it: %w", kernel.ErrUnsupported, err)
	}
	if err != nil {
		return 0, fmt.Errorf("ipvs: look for its netlink family: %w", err)
	}
	b.id.Store(uint32(f.ID))
	return f.ID, nil
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
			if !ok || !ip.Is4() {
				continue
			}
			st[kernel.IPVSDest{NS: ns, Mark: svc.FWMark, IP: ip, Port: d.Port}] = destSpec(d)
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
			return absent(s.h.DelDestination(byMark(k.Mark), byKey(k)))
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
	d, err := destination(k, want)
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
