package linux

import (
	"fmt"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"sluice/internal/kernel"
)

// The host's chain that lets the mesh's packets through, where the engine sets the
// policy of FORWARD to DROP:
//
//	FORWARD       -j DOCKER-USER            if the engine has it: people's own rules come first
//	              -j SLUICE-MESH
//	SLUICE-MESH   -i slm+ -j ACCEPT
//	              -o slm+ -j ACCEPT
//
// Not from within DOCKER-USER: before people's rules there it would pass what they
// drop, and behind them it would miss what they let the engine's rules decide, by
// RETURN. Which connections are the mesh's, its own table decides (Tables, PhaseMesh).

const (
	meshChain    = "SLUICE-MESH"
	forwardChain = "FORWARD"
	meshJump     = "-j " + meshChain
	userJump     = "-j DOCKER-USER"
)

// forwardRules is what `iptables -S` says of our chain and of FORWARD.
type forwardRules struct {
	exists bool
	rules  []string // of the chain, without "-A SLUICE-MESH "
	in     []string // of FORWARD, without "-A FORWARD "
}

// meshRules are the rules for devices whose names start so.
func meshRules(devices string) []string {
	return []string{"-i " + devices + "+ -j ACCEPT", "-o " + devices + "+ -j ACCEPT"}
}

// place is where in FORWARD, counted from 1, the jump to our chain belongs.
func (f forwardRules) place() int { return slices.Index(f.in, userJump) + 2 }

// jumped reports whether the only jump to our chain is behind people's rules, and no
// rule there ends the way of all packets before it. The engine puts the jump to
// DOCKER-USER first again and again; what it puts between that and ours drops nothing
// of the mesh.
func (f forwardRules) jumped() bool {
	if len(f.leading()) != 1 {
		return false
	}
	for _, r := range f.in[f.place()-1:] {
		switch r {
		case meshJump:
			return true
		case "-j RETURN", "-j ACCEPT", "-j DROP", "-j REJECT --reject-with icmp-port-unreachable", "-j REJECT --reject-with icmp-host-prohibited":
			return false
		}
	}
	return false
}

// leading are the rules of FORWARD that lead to our chain.
func (f forwardRules) leading() []string {
	return slices.DeleteFunc(slices.Clone(f.in), func(rule string) bool {
		w := strings.Fields(rule)
		n := len(w)
		return n < 2 || w[n-1] != meshChain || w[n-2] != "-j" && w[n-2] != "-g"
	})
}

// state is the chain as an object; it has no devices if anything is not as we make it.
func (f forwardRules) state() kernel.State {
	if !f.exists {
		return kernel.State{}
	}
	var spec kernel.ForwardSpec
	if len(f.rules) > 0 {
		s, _ := strings.CutPrefix(f.rules[0], "-i ")
		devices, _, _ := strings.Cut(s, "+")
		if slices.Equal(f.rules, meshRules(devices)) && f.jumped() {
			spec.Devices = devices
		}
	}
	return kernel.State{kernel.Forward{}: spec}
}

// readForward lists our chain and, if it is there, FORWARD: a chain that is jumped to
// cannot go.
func readForward(ipt *iptables.IPTables) (forwardRules, error) {
	var f forwardRules
	own, err := ipt.List(filterTable, meshChain)
	if notExist(err) {
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("list %s: %w", meshChain, err)
	}
	f.exists, f.rules = true, ownRules(own, meshChain)
	return f, f.readParent(ipt)
}

func (f *forwardRules) readParent(ipt *iptables.IPTables) error {
	rules, err := ipt.List(filterTable, forwardChain)
	if err != nil && !notExist(err) {
		return fmt.Errorf("list %s: %w", forwardChain, err)
	}
	f.in = ownRules(rules, forwardChain)
	return nil
}

// applyForward leads to the chain that op wants, or to none.
func applyForward(ipt *iptables.IPTables, o kernel.Op) error {
	f, err := readForward(ipt)
	if err != nil {
		return err
	}
	if o.Want == nil {
		return deleteForward(ipt, f)
	}
	spec, ok := o.Want.(kernel.ForwardSpec)
	if !ok || spec.Devices == "" || strings.ContainsAny(spec.Devices, " +!") {
		return fmt.Errorf("%q is no beginning of a device's name", spec.Devices)
	}
	if !f.exists {
		if err := ipt.NewChain(filterTable, meshChain); err != nil {
			return fmt.Errorf("make chain: %w", err)
		}
		if err := f.readParent(ipt); err != nil {
			return err
		}
	}
	if want := meshRules(spec.Devices); !slices.Equal(f.rules, want) {
		// In front first: what passed goes on passing.
		for i, r := range want {
			if err := ipt.Insert(filterTable, meshChain, i+1, strings.Fields(r)...); err != nil {
				return fmt.Errorf("accept %q: %w", r, err)
			}
		}
		for range f.rules {
			if err := ipt.DeleteById(filterTable, meshChain, len(want)+1); err != nil {
				return fmt.Errorf("remove a rule behind: %w", err)
			}
		}
	}
	if f.jumped() {
		return nil
	}
	// The new one first: what passes goes on passing. It moves those behind it.
	at := f.place()
	if err := ipt.Insert(filterTable, forwardChain, at, strings.Fields(meshJump)...); err != nil {
		return fmt.Errorf("jump from %s: %w", forwardChain, err)
	}
	for i := len(f.in); i > 0; i-- {
		if !slices.Contains(f.leading(), f.in[i-1]) {
			continue
		}
		now := i
		if i >= at {
			now++
		}
		if err := ipt.DeleteById(filterTable, forwardChain, now); err != nil {
			return fmt.Errorf("remove jump %q: %w", f.in[i-1], err)
		}
	}
	return nil
}

// deleteForward removes the chain and what leads to it.
func deleteForward(ipt *iptables.IPTables, f forwardRules) error {
	if !f.exists {
		return nil
	}
	for _, r := range f.leading() {
		if err := ipt.Delete(filterTable, forwardChain, strings.Fields(r)...); err != nil && !notExist(err) {
			return fmt.Errorf("remove jump %q: %w", r, err)
		}
	}
	if err := ipt.ClearAndDeleteChain(filterTable, meshChain); err != nil && !notExist(err) {
		return fmt.Errorf("remove chain: %w", err)
	}
	return deleteEmpty(ipt, forwardChain)
}
