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

// drops is what Tables may offer besides: how many frames of containers the source guard
// has dropped. It may be called at any time.
type drops interface {
	Dropped(nsFD int, ns string) (uint64, error)
}

// Dropped returns how many frames of containers the source guard of the network in the
// namespace called ns has dropped since it was made. It waits neither for Dump nor for
// Apply.
//
// kernel.ErrNotExist: there is no such namespace.
// kernel.ErrInterrupted: the kernel's lists changed all the while.
func (k *Kernel) Dropped(ns string) (n uint64, err error) {
	err = k.into(ns, func(fd int) error {
		if d, ok := k.cfg.Tables.(drops); ok {
			n, err = d.Dropped(fd, ns)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read the guard's counters of namespace %s: %w", ns, err)
	}
	return n, nil
}

// into calls f with a descriptor of the namespace called ns. It is one of its own: those
// in spaces are for who has the lock. Closing it at once keeps a namespace that goes
// from staying.
func (k *Kernel) into(ns string, f func(fd int) error) error {
	if !k.owns(ns) {
		return fmt.Errorf("not sluice's: want a plain name that starts with %q", k.cfg.NetnsPrefix)
	}
	at, _, err := openNetns(k.path(ns))
	if err != nil {
		return err
	}
	return errors.Join(f(int(at.Fd())), at.Close())
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
	out := map[kernel.Key]kernel.Traffic{}
	err := k.into(ns, func(fd int) error {
		for _, from := range []any{k.cfg.Tables, k.cfg.IPVS} {
			c, ok := from.(counts)
			if !ok {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			t, err := c.Traffic(fd, ns)
			if err != nil && !errors.Is(err, kernel.ErrUnsupported) { // without IPVS, it counts nothing
				return err
			}
			maps.Copy(out, t)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
