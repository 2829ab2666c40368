package linux

import (
	"fmt"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"sluice/internal/kernel"
)

// The host's chain that lets the mesh's packets through. The engine sets the policy
// of FORWARD to DROP and leaves DOCKER-USER to others:
//
//	DOCKER-USER   -j SLUICE-MESH            FORWARD, where there is no engine's chain
//	SLUICE-MESH   -i slm+ -j ACCEPT
//	              -o slm+ -j ACCEPT
//
// Which connections are the mesh's, its own table decides (Tables, PhaseMesh).

const (
	meshChain    = "SLUICE-MESH"
	engineChain  = "DOCKER-USER"
	forwardChain = "FORWARD"
	meshJump     = "-j " + meshChain
)

// forwardRules is what `iptables -S` says of our chain and of those that lead to it.
type forwardRules struct {
	exists bool
	engine bool     // there is DOCKER-USER
	rules  []string // of the chain, without "-A SLUICE-MESH "
	// in are the rules of DOCKER-USER and of FORWARD, by chain.
	in map[string][]string
}

// parent is the chain that ours is to be jumped to from.
func (f forwardRules) parent() string {
	if f.engine {
		return engineChain
	}
	return forwardChain
}

// meshRules are the rules for devices whose names start so.
func meshRules(devices string) []string {
	return []string{"-i " + devices + "+ -j ACCEPT", "-o " + devices + "+ -j ACCEPT"}
}

// strays are rules that lead to our chain and should not, by chain.
func (f forwardRules) strays() map[string][]string {
	out := map[string][]string{}
	for chain, rules := range f.in {
		kept := false
		for _, r := range rules {
			if !leadsToMesh(r) {
				continue
			}
			if r == meshJump && chain == f.parent() && !kept {
				kept = true
				continue
			}
			out[chain] = append(out[chain], r)
		}
	}
	return out
}

// jumped reports whether the parent has the jump where packets come by.
func (f forwardRules) jumped() bool {
	for _, r := range f.in[f.parent()] {
		switch r {
		case meshJump:
			return true
		case "-j RETURN", "-j ACCEPT", "-j DROP", "-j REJECT --reject-with icmp-port-unreachable":
			return false
		}
	}
	return false
}

func leadsToMesh(rule string) bool {
	f := strings.Fields(rule)
	n := len(f)
	return n >= 2 && f[n-1] == meshChain && (f[n-2] == "-j" || f[n-2] == "-g")
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
		if slices.Equal(f.rules, meshRules(devices)) && f.jumped() && len(f.strays()) == 0 {
			spec.Devices = devices
		}
	}
	return kernel.State{kernel.Forward{}: spec}
}

// readForward lists our chain and, if it is there, what leads to it: a chain that is
// jumped to cannot go.
func readForward(ipt *iptables.IPTables) (forwardRules, error) {
	f := forwardRules{in: map[string][]string{}}
	own, err := ipt.List(filterTable, meshChain)
	if notExist(err) {
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("list %s: %w", meshChain, err)
	}
	f.exists, f.rules = true, ownRules(own, meshChain)
	return f, f.readParents(ipt)
}

func (f *forwardRules) readParents(ipt *iptables.IPTables) error {
	for _, chain := range []string{engineChain, forwardChain} {
		rules, err := ipt.List(filterTable, chain)
		if notExist(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", chain, err)
		}
		f.engine = f.engine || chain == engineChain
		f.in[chain] = ownRules(rules, chain)
	}
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
		if err := f.readParents(ipt); err != nil {
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
		return deleteStrays(ipt, f.strays())
	}
	// One further down comes to nothing.
	if err := deleteStrays(ipt, f.leading()); err != nil {
		return err
	}
	if err := ipt.Insert(filterTable, f.parent(), 1, strings.Fields(meshJump)...); err != nil {
		return fmt.Errorf("jump from %s: %w", f.parent(), err)
	}
	return nil
}

// leading are all rules that lead to our chain, by chain.
func (f forwardRules) leading() map[string][]string {
	out := map[string][]string{}
	for chain, rules := range f.in {
		for _, r := range rules {
			if leadsToMesh(r) {
				out[chain] = append(out[chain], r)
			}
		}
	}
	return out
}

func deleteStrays(ipt *iptables.IPTables, strays map[string][]string) error {
	for chain, rules := range strays {
		for _, r := range rules {
			if err := ipt.Delete(filterTable, chain, strings.Fields(r)...); err != nil && !notExist(err) {
				return fmt.Errorf("remove jump %q of %s: %w", r, chain, err)
			}
		}
	}
	return nil
}

// deleteForward removes the chain and what leads to it.
func deleteForward(ipt *iptables.IPTables, f forwardRules) error {
	if !f.exists {
		return nil
	}
	if err := deleteStrays(ipt, f.leading()); err != nil {
		return err
	}
	if err := ipt.ClearAndDeleteChain(filterTable, meshChain); err != nil && !notExist(err) {
		return fmt.Errorf("remove chain: %w", err)
	}
	return deleteEmpty(ipt, forwardChain)
}
