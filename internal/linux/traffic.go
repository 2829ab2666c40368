package linux

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"sluice/internal/kernel"
)

// counts is what Tables may offer besides: the counters of what DumpBridge returns.
// It may be called at any time, also while another goroutine is in ApplyBridge.
type counts interface {
	Traffic(nsFD int, ns string) (map[kernel.Key]kernel.Traffic, error)
}

// Traffic returns what the kernel has counted in the namespace called ns, of
// nftables and of IPVS. Objects that are not counted are missing. It waits neither
// for Dump nor for Apply.
//
// kernel.ErrNotExist: there is no such namespace.
// kernel.ErrInterrupted: the kernel's lists changed all the while.
func (k *Kernel) Traffic(ctx context.Context, ns string) (map[kernel.Key]kernel.Traffic, error) {
	out, err := k.traffic(ctx, ns)
	if err != nil {
		return nil, fmt.Errorf("read counters of namespace %s: %w", ns, err)
	}
	return out, nil
}

func (k *Kernel) traffic(ctx context.Context, ns string) (map[kernel.Key]kernel.Traffic, error) {
	if !k.owns(ns) {
		return nil, fmt.Errorf("not sluice's: want a plain name that starts with %q", k.cfg.NetnsPrefix)
	}
	// A descriptor of its own: those in spaces are for who has the lock. Closing it
	// at once keeps a namespace that goes from staying.
	f, _, err := openNetns(k.path(ns))
	if err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	out := map[kernel.Key]kernel.Traffic{}
	for _, from := range []any{k.cfg.Tables, k.cfg.IPVS} {
		c, ok := from.(counts)
		if !ok || err != nil {
			continue
		}
		if err = ctx.Err(); err != nil {
			break
		}
		var t map[kernel.Key]kernel.Traffic
		t, err = c.Traffic(fd, ns)
		if errors.Is(err, kernel.ErrUnsupported) {
			err = nil // without IPVS, it counts nothing
		}
		maps.Copy(out, t)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return out, nil
}
