package ipvs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"sluice/internal/kernel"
)

// Flags of a service (include/uapi/linux/ip_vs.h), which the library has no names for.
const (
	flagPersistent = 0x1 // IP_VS_SVC_F_PERSISTENT
	flagHashed     = 0x2 // IP_VS_SVC_F_HASHED: the kernel's own, on every service
	flagOnePacket  = 0x4 // IP_VS_SVC_F_ONEPACKET: means nothing to TCP
	flagFallback   = 0x8 // IP_VS_SVC_F_SCHED1: what it means is the scheduler's to say
)

// byMark names a service.
func byMark(mark uint32) *ipvs.Service {
	return &ipvs.Service{AddressFamily: unix.AF_INET, FWMark: mark}
}

// byKey names a destination. Address and port are what the kernel knows it by.
func byKey(k kernel.IPVSDest) *ipvs.Destination {
	return &ipvs.Destination{AddressFamily: unix.AF_INET, Address: net.IP(k.IP.AsSlice()), Port: k.Port}
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
	if want.OnePacket {
		svc.Flags |= flagOnePacket
	}
	return svc, nil
}

// serviceSpec is the reverse of service; zero if that would not make it so.
func serviceSpec(svc *ipvs.Service) kernel.IPVSServiceSpec {
	spec := kernel.IPVSServiceSpec{
		Scheduler: svc.SchedName, Fallback: svc.Flags&flagFallback != 0,
		OnePacket: svc.Flags&flagOnePacket != 0,
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
func destination(k kernel.IPVSDest, want kernel.IPVSDestSpec) (*ipvs.Destination, error) {
	if k.Port != 0 && want.Method != kernel.IPVSNAT {
		// The kernel would take it, and send to the port that the client asks for.
		return nil, fmt.Errorf("port %d with forwarding method %q; only nat changes the port of a packet", k.Port, want.Method)
	}
	if want.Weight < 0 || want.Weight > maxWeight {
		return nil, fmt.Errorf("weight %d; want 0 to %d", want.Weight, maxWeight)
	}
	if want.Upper < 0 || want.Lower < 0 || want.Upper < want.Lower {
		return nil, fmt.Errorf("thresholds upper %d, lower %d; want upper >= lower >= 0", want.Upper, want.Lower)
	}
	d := byKey(k)
	d.Weight, d.UpperThreshold, d.LowerThreshold = want.Weight, uint32(want.Upper), uint32(want.Lower)
	for _, m := range methods {
		if m.name == want.Method {
			d.ConnectionFlags = m.number
			return d, nil
		}
	}
	return nil, fmt.Errorf("forwarding method %q: %w; want dr, nat or tun", want.Method, kernel.ErrUnsupported)
}

// destSpec is the reverse of destination; zero if that would not make it so.
func destSpec(d *ipvs.Destination) kernel.IPVSDestSpec {
	for _, m := range methods {
		if m.number == d.ConnectionFlags&ipvs.ConnFwdMask && (d.Port == 0 || m.name == kernel.IPVSNAT) {
			return kernel.IPVSDestSpec{
				Weight: d.Weight, Method: m.name, Upper: int(d.UpperThreshold), Lower: int(d.LowerThreshold),
			}
		}
	}
	return kernel.IPVSDestSpec{}
}
