package linux

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"sluice/internal/kernel"
)

// iptablesWait is how long a call waits for another program's iptables lock, in
// seconds. The engine and firewall managers hold it for well under one.
const iptablesWait = 10

// filter remembers which iptables the engine uses. Host rules exist in one of
// two worlds, legacy or nft, which do not see each other's chains.
type filter struct {
	ipt  *iptables.IPTables // nil until known
	last string             // path of the one used last
}

// iptablesLocked returns the iptables whose world the engine's rules are in. While
// there is no sign of either it answers nft if there is such a command, and asks
// again next time. It runs in the host's namespace.
func (k *Kernel) iptablesLocked() (*iptables.IPTables, error) {
	if k.filter.ipt != nil {
		return k.filter.ipt, nil
	}
	nft, legacy := command("iptables-nft"), command("iptables-legacy")
	if nft == "" || legacy == "" {
		only := cmp.Or(nft, legacy, command("iptables"))
		if only == "" {
			return nil, fmt.Errorf("the command iptables %w; install it, or the packet filter for VXLAN cannot be set", kernel.ErrNotExist)
		}
		ipt, err := openIPTables(only)
		if err == nil {
			k.filter.ipt = ipt
		}
		return ipt, err
	}
	var inNFT, inLegacy signs
	var err error
	if legacyTables() {
		if inLegacy, err = readSigns(legacy); err != nil {
			return nil, err
		}
	}
	if inLegacy < engine {
		if inNFT, err = readSigns(nft); err != nil {
			return nil, err
		}
	}
	use, other := nft, legacy
	if inLegacy > inNFT {
		use, other = legacy, nft
	}
	ipt, err := openIPTables(use)
	if err != nil {
		return nil, err
	}
	sure := max(inLegacy, inNFT) == engine
	if sure || k.filter.last != use {
		if err := sweep(other, legacy); err != nil {
			return nil, err
		}
	}
	if sure {
		k.log.Info("packet filter found", "op", use)
		k.filter.ipt = ipt
	}
	k.filter.last = use
	return ipt, nil
}

// sweep removes our chains from the world that is not the engine's. They would go on
// dropping the packets of peers that came later.
func sweep(path, legacy string) error {
	if path == legacy && !legacyTables() {
		return nil
	}
	ipt, err := openIPTables(path)
	if err != nil {
		return err
	}
	c, err := readChain(ipt)
	if err != nil {
		return err
	}
	f, err := readForward(ipt)
	if err != nil {
		return err
	}
	return errors.Join(deleteForward(ipt, f), deleteChain(ipt, c))
}

// legacyTables reports whether there is a legacy filter table in the calling
// thread's namespace. Asking iptables-legacy about one would make it.
func legacyTables() bool {
	b, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	return err == nil && slices.Contains(strings.Fields(string(b)), filterTable)
}

func openIPTables(path string) (*iptables.IPTables, error) {
	ipt, err := iptables.New(iptables.IPFamily(iptables.ProtocolIPv4), iptables.Path(path), iptables.Timeout(iptablesWait))
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", path, err)
	}
	return ipt, nil
}

// command is the path of a program; empty if there is none.
func command(name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	return path
}

// signs of use in one world, the stronger the greater.
type signs int

const (
	none   signs = iota
	chains       // somebody's, not ours
	engine       // the engine's
)

// readSigns looks whose chains are there.
func readSigns(path string) (signs, error) {
	ipt, err := openIPTables(path)
	if err != nil {
		return none, err
	}
	names, err := ipt.ListChains(filterTable)
	if err != nil {
		return none, fmt.Errorf("list chains of %s: %w", path, err)
	}
	found := none
	for _, c := range names {
		switch {
		case strings.HasPrefix(c, "DOCKER"):
			return engine, nil
		case c == filterChain, c == meshChain, c == inputChain, c == forwardChain, c == "OUTPUT":
		default:
			found = chains
		}
	}
	return found, nil
}

// readChain lists our chain and the jumps to it.
func readChain(ipt *iptables.IPTables) (chainRules, error) {
	in, err := ipt.List(filterTable, inputChain)
	if err != nil {
		return chainRules{}, fmt.Errorf("list %s: %w", inputChain, err)
	}
	c := chainRules{jumps: jumpsOf(ownRules(in, inputChain))}
	own, err := ipt.List(filterTable, filterChain)
	if notExist(err) {
		return c, nil
	}
	if err != nil {
		return chainRules{}, fmt.Errorf("list %s: %w", filterChain, err)
	}
	c.exists, c.rules = true, ownRules(own, filterChain)
	return c, nil
}

// notExist reports whether iptables missed a chain or rule, given that it works at
// all. The words differ by flavour and version (the nft one of 1.8.9 calls a
// missing chain "incompatible"), the exit status does not: 1, where a lack of
// rights, a held lock or bad usage are 2 and above.
func notExist(err error) bool {
	e, ok := errors.AsType[*iptables.Error](err)
	return ok && e.ExitStatus() == 1
}

// dumpFilter adds the filter's objects. A host without any iptables has none.
func (k *Kernel) dumpFilter(out kernel.State) error {
	if k.cfg.NoFilter {
		return nil
	}
	return k.within(k.host, func() error {
		ipt, err := k.iptablesLocked()
		if errors.Is(err, kernel.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		c, err := readChain(ipt)
		maps.Copy(out, c.state())
		if err != nil {
			return err
		}
		f, err := readForward(ipt)
		maps.Copy(out, f.state())
		return err
	})
}

// applyFilter does neighbouring ops on the filter as one change, and that on the
// chain of the mesh by itself.
func (k *Kernel) applyFilter(ops []kernel.Op, errs []error) {
	var filter []kernel.Op
	var at []int // where they stand in ops
	for i, o := range ops {
		if _, ok := o.Key.(kernel.Forward); !ok {
			filter, at = append(filter, o), append(at, i)
			continue
		}
		errs[i] = k.within(k.host, func() error {
			ipt, err := k.iptablesLocked()
			if errors.Is(err, kernel.ErrNotExist) && o.Want == nil {
				return nil // no iptables at all
			}
			if err != nil {
				return err
			}
			return applyForward(ipt, o)
		})
	}
	if len(filter) > 0 {
		for i, err := range k.applyPeers(filter) {
			errs[at[i]] = err
		}
	}
}

// applyPeers does ops on the chain for VXLAN packets as one change.
func (k *Kernel) applyPeers(ops []kernel.Op) []error {
	errs := make([]error, len(ops))
	err := k.within(k.host, func() error {
		ipt, err := k.iptablesLocked()
		if err != nil {
			return err
		}
		c, err := readChain(ipt)
		if err != nil {
			return err
		}
		return changeChain(ipt, c, ops)
	})
	for i, o := range ops {
		if o.Want == nil && errors.Is(err, kernel.ErrNotExist) {
			continue // no chain, or no iptables at all: nothing to delete
		}
		errs[i] = err
	}
	return errs
}

// changeChain leads from the rules c to what ops want of them. The chain is
// filled before the jump to it exists, and emptied after the jump has gone.
func changeChain(ipt *iptables.IPTables, c chainRules, ops []kernel.Op) error {
	port, deleted := uint16(0), false
	peers := map[netip.Addr]bool{}
	for _, r := range c.rules {
		if a, ok := parseAccept(r); ok {
			peers[a] = true
		}
	}
	for _, j := range c.jumps {
		if p, ok := parseJump(j); ok {
			port = p
		}
	}
	for _, o := range ops {
		switch key := o.Key.(type) {
		case kernel.Filter:
			deleted = o.Want == nil
			if !deleted {
				port = o.Want.(kernel.FilterSpec).Port
			}
		case kernel.FilterPeer:
			if o.Want != nil && !key.VTEP.Is4() {
				return fmt.Errorf("peer %s: only IPv4 is supported", key.VTEP)
			}
			if peers[key.VTEP] = true; o.Want == nil {
				delete(peers, key.VTEP)
			}
		}
	}
	if deleted {
		return deleteChain(ipt, c)
	}
	if port == 0 {
		return fmt.Errorf("the chain %s %w", filterChain, kernel.ErrNotExist)
	}
	if !c.exists {
		if err := ipt.NewChain(filterTable, filterChain); err != nil {
			return fmt.Errorf("make chain: %w", err)
		}
	}
	fix := c.plan(peers)
	for _, a := range fix.insert {
		if err := ipt.Insert(filterTable, filterChain, 1, strings.Fields(acceptRule(a))...); err != nil {
			return fmt.Errorf("accept %s: %w", a, err)
		}
	}
	if fix.drop {
		if err := ipt.Append(filterTable, filterChain, strings.Fields(dropRule)...); err != nil {
			return fmt.Errorf("drop others: %w", err)
		}
	}
	for _, n := range fix.remove {
		if err := ipt.DeleteById(filterTable, filterChain, n+len(fix.insert)); err != nil {
			return fmt.Errorf("remove rule %q: %w", c.rules[n-1], err)
		}
	}
	return changeJump(ipt, c.jumps, port)
}

// changeJump leaves exactly one jump, for port.
func changeJump(ipt *iptables.IPTables, jumps []string, port uint16) error {
	want, kept := jumpRule(port), false
	var wrong []string
	for _, j := range jumps {
		if j == want && !kept {
			kept = true
			continue
		}
		wrong = append(wrong, j)
	}
	if !kept {
		if err := ipt.Insert(filterTable, inputChain, 1, strings.Fields(want)...); err != nil {
			return fmt.Errorf("jump from %s: %w", inputChain, err)
		}
	}
	return deleteJumps(ipt, wrong)
}

// deleteJumps names rules by their text, not their position: INPUT is everybody's.
func deleteJumps(ipt *iptables.IPTables, jumps []string) error {
	for _, j := range jumps {
		if err := ipt.Delete(filterTable, inputChain, strings.Fields(j)...); err != nil && !notExist(err) {
			return fmt.Errorf("remove jump %q: %w", j, err)
		}
	}
	return nil
}

func deleteChain(ipt *iptables.IPTables, c chainRules) error {
	if err := deleteJumps(ipt, c.jumps); err != nil {
		return err
	}
	if !c.exists {
		return nil
	}
	if err := ipt.ClearAndDeleteChain(filterTable, filterChain); err != nil && !notExist(err) {
		return fmt.Errorf("remove chain: %w", err)
	}
	return deleteEmpty(ipt, inputChain)
}

// deleteEmpty takes away the hook that iptables-nft makes for the first rule in
// INPUT or FORWARD and then leaves there for good: each packet would pass an
// empty chain. One with rules or a policy of its own is somebody's and stays;
// iptables-legacy, whose chains are built in, refuses with status 1 too.
func deleteEmpty(ipt *iptables.IPTables, chain string) error {
	left, err := ipt.List(filterTable, chain)
	if err != nil {
		return fmt.Errorf("list %s: %w", chain, err)
	}
	if len(left) != 1 || left[0] != "-P "+chain+" ACCEPT" {
		return nil
	}
	if err := ipt.DeleteChain(filterTable, chain); err != nil && !notExist(err) {
		return fmt.Errorf("remove empty %s: %w", chain, err)
	}
	return nil
}
