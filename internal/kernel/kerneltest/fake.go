package kerneltest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"

	"sluice/internal/kernel"
	"sluice/internal/model"
)

// ErrFault is the cause of every failure that Faults asked for, but for
// interrupted dumps, which are kernel.ErrInterrupted.
var ErrFault = errors.New("fault by order of the test")

// Fake is a kernel in memory. It is safe for concurrent use.
type Fake struct {
	// mu guards all below. Rank: nothing else is locked while it is held.
	mu        sync.Mutex
	state     kernel.State
	sandboxes map[string]bool      // task namespaces by path
	foreign   map[vxlanID]string   // VXLAN devices of others, with their name
	rng       *rand.Rand           // nil: no faults
	p         float64              // probability of each fault
	applied   int                  // ops done, failed ones included
	log       func(op string)      // nil: nobody listens
	interrupt int                  // dumps still to be interrupted
	failures  map[kernel.Key]error // ops to refuse, by object
}

// vxlanID is what the kernel gives once per host.
type vxlanID struct {
	vni  model.VNI
	port uint16
}

// NewFake is an empty kernel without faults.
func NewFake() *Fake {
	return &Fake{state: kernel.State{}, sandboxes: map[string]bool{}, foreign: map[vxlanID]string{}, failures: map[kernel.Key]error{}}
}

// Faults makes each op and each dump fail with probability p, in an order that
// follows from seed. p = 0 ends it.
func (f *Fake) Faults(seed uint64, p float64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rng, f.p = rand.New(rand.NewPCG(seed, seed)), p
}

// Refuse makes every op on the object of key fail with err; nil ends it.
func (f *Fake) Refuse(key kernel.Key, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures[key] = err
}

// Interrupt makes the next n dumps fail with kernel.ErrInterrupted.
func (f *Fake) Interrupt(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.interrupt = n
}

// Observe has fn called with the text of each op that is tried, in order; nil ends
// it. fn must not call the Fake.
func (f *Fake) Observe(fn func(op string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = fn
}

// Applied is the number of ops tried so far.
func (f *Fake) Applied() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied
}

// State is a copy of all objects, those in tasks that have gone excepted.
func (f *Fake) State() kernel.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.state)
}

// Alter changes objects as somebody else would: with no rule to keep.
func (f *Fake) Alter(change func(kernel.State)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f.state)
}

// AddSandbox makes a task's namespace at path.
func (f *Fake) AddSandbox(path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sandboxes[path] = true
}

// RemoveSandbox ends the task's namespace at path, with all in it.
func (f *Fake) RemoveSandbox(path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.sandboxes, path)
	for k := range f.state {
		if at, ok := sandboxOf(k); ok && at == path {
			delete(f.state, k)
		}
	}
}

// AddForeignVXLAN makes a VXLAN device that is not sluice's.
func (f *Fake) AddForeignVXLAN(name string, vni model.VNI, port uint16) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.foreign[vxlanID{vni, port}] = name
}

// Take does what the engine does after Join: the container's end of the pair leaves
// the host's namespace.
func (f *Fake) Take(l kernel.Link) {
	f.Alter(func(s kernel.State) {
		if spec, ok := s[l].(kernel.LinkSpec); ok {
			spec.Peer, spec.PeerMAC = "", model.MAC{}
			s[l] = spec
		}
	})
}

// Dump implements Kernel.
func (f *Fake) Dump(ctx context.Context, sandboxes []string) (kernel.State, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if f.interrupt > 0 {
		f.interrupt--
		return nil, kernel.ErrInterrupted
	}
	if f.fault() {
		return nil, kernel.ErrInterrupted
	}
	out := kernel.State{}
	for k, v := range f.state {
		if path, ok := sandboxOf(k); ok && !slices.Contains(sandboxes, path) {
			continue // its namespace was not asked for
		}
		out[k] = v
	}
	return out, nil
}

// Apply implements Kernel.
func (f *Fake) Apply(ctx context.Context, ops []kernel.Op) []error {
	f.mu.Lock()
	defer f.mu.Unlock()
	errs := make([]error, len(ops))
	lost := false // the rest of the round, by a fault
	for i := 0; i < len(ops); {
		n := 1
		for batched(ops[i]) && i+n < len(ops) && batched(ops[i+n]) && ops[i+n].Key.Phase() == ops[i].Key.Phase() && ops[i+n].Key.Netns() == ops[i].Key.Netns() {
			n++
		}
		err := ctx.Err()
		if err == nil && lost {
			err = ErrFault
		}
		if err == nil {
			err = f.transact(ops[i : i+n])
		}
		for j := i; j < i+n; j++ {
			if err != nil {
				errs[j] = fmt.Errorf("%s: %w", ops[j], err)
			}
		}
		lost = lost || errors.Is(err, ErrFault) && f.fault()
		i += n
	}
	return errs
}

// batched reports whether ops like this one are done in one transaction; IPVS and
// devices know none.
func batched(o kernel.Op) bool {
	switch o.Key.(type) {
	case kernel.TaskTunnel, kernel.TaskRoute:
		return false
	}
	switch o.Key.Phase() {
	case kernel.PhaseVIP, kernel.PhaseTask, kernel.PhaseMesh:
		return !kernel.IsIPVS(o.Key)
	}
	return false
}

// fault throws the dice.
func (f *Fake) fault() bool { return f.rng != nil && f.rng.Float64() < f.p }

// transact does all ops or none.
func (f *Fake) transact(ops []kernel.Op) error {
	before := maps.Clone(f.state)
	for _, o := range ops {
		f.applied++
		if f.log != nil {
			f.log(o.String())
		}
	}
	if f.fault() {
		return ErrFault
	}
	for _, o := range ops {
		err := f.failures[o.Key]
		if err == nil && o.Want == nil {
			f.remove(o.Key)
		} else if err == nil {
			err = f.set(o.Key, o.Want)
		}
		if err != nil {
			f.state = before
			return err
		}
	}
	if f.fault() {
		return ErrFault // done all the same, as when an answer is lost
	}
	return nil
}

// remove deletes an object and what cannot be without it. What is absent is no error.
func (f *Fake) remove(key kernel.Key) {
	old := f.state[key]
	if gone, ok := key.(kernel.Netns); ok {
		for k, v := range f.state {
			if l, ok := k.(kernel.Link); ok && l.NS == gone.Name {
				f.unkeep(v.(kernel.LinkSpec))
			}
		}
	}
	if spec, ok := old.(kernel.LinkSpec); ok {
		f.unkeep(spec)
	}
	f.state = kernel.Apply(f.state, []kernel.Op{{Key: key, Have: old}})
	switch key := key.(type) {
	case kernel.Link:
		f.unplug(key)
	case kernel.Filter:
		maps.DeleteFunc(f.state, func(k kernel.Key, _ kernel.Value) bool { _, is := k.(kernel.FilterPeer); return is })
	}
}

// unplug removes what was on a device, and the device as others' master.
func (f *Fake) unplug(l kernel.Link) {
	for k, v := range f.state {
		switch k := k.(type) {
		case kernel.Addr:
			if k.NS == l.NS && k.Dev == l.Name {
				delete(f.state, k)
			}
		case kernel.Neigh:
			if k.NS == l.NS && k.Dev == l.Name {
				delete(f.state, k)
			}
		case kernel.FDB:
			if k.NS == l.NS && k.Dev == l.Name {
				delete(f.state, k)
			}
		case kernel.Route:
			if k.NS == l.NS && k.Dev == l.Name {
				delete(f.state, k)
			}
		case kernel.Link:
			if spec := v.(kernel.LinkSpec); k.NS == l.NS && spec.Master == l.Name {
				spec.Master = ""
				f.state[k] = spec
				f.halve(k)
			}
		}
	}
}

// unkeep removes what was on the host's end of a pair.
func (f *Fake) unkeep(pair kernel.LinkSpec) {
	if !pair.Kept {
		return
	}
	maps.DeleteFunc(f.state, func(k kernel.Key, _ kernel.Value) bool { return hostDev(k) == pair.Peer })
}

// halve takes the bridge's half of the forwarding entries of a port away, which is
// all of an entry that is for a pair.
func (f *Fake) halve(port kernel.Link) {
	for k := range f.state {
		if e, ok := k.(kernel.FDB); ok && e.NS == port.NS && e.Dev == port.Name {
			f.state[k] = kernel.FDBSpec{}
			if port.Kind == kernel.Veth {
				delete(f.state, k)
			}
		}
	}
}

// sandboxOf is the path of the task's namespace that an object is in.
func sandboxOf(k kernel.Key) (string, bool) { return strings.CutPrefix(k.Netns(), "task:") }
