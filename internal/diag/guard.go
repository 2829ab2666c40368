package diag

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/internal/model"
)

// Guard counts what the source guards of a node's networks have dropped.
type Guard struct {
	Dropped  uint64    `json:"dropped"`  // frames, of all networks
	Networks []Dropped `json:"networks"` // by name
}

// Dropped is what the guard of one network has dropped since it was made: frames of
// this node's containers that were in the name of others, and all that is neither IPv4
// nor ARP.
type Dropped struct {
	Network string `json:"network"`
	ID      string `json:"id"`
	Frames  uint64 `json:"frames"`
}

// guardTime bounds the reading of the guards' counters of all networks together, many
// times what it takes on a large node: Prometheus waits 10 s for all that it asks.
const guardTime = 2 * time.Second

// guard reads the counters of the source guards, and what is wrong with the reading. Of
// a kernel that does not answer, it has what was read in time.
func (s *Server) guard(v model.View) (Guard, []Problem) {
	out := Guard{Networks: []Dropped{}}
	if s.cfg.Dropped == nil {
		return out, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), guardTime)
	defer cancel()
	var errs []Problem
	var missing []string
	for id, n := range v.Networks {
		frames, err := within(ctx, s.drops, func() (uint64, error) { return s.cfg.Dropped(overlay.NetnsName(n)) })
		if errors.Is(err, errNoAnswer) {
			missing = append(missing, orElse(n.Name, id.Short()))
			continue
		}
		if errors.Is(err, kernel.ErrNotExist) {
			continue // the next round makes it
		}
		if err != nil {
			errs = append(errs, Problem{What: "network " + orElse(n.Name, id.Short()) + ": " + err.Error(), Do: "sluice diff says whether the kernel has the guard"})
			continue
		}
		out.Dropped += frames
		out.Networks = append(out.Networks, Dropped{Network: orElse(n.Name, id.Short()), ID: string(id), Frames: frames})
	}
	if slices.Sort(missing); len(missing) > 0 {
		errs = append(errs, Problem{
			What: fmt.Sprintf("the source guards' counters of %d networks are missing here: %v within %s: %s", len(missing), errNoAnswer, guardTime, strings.Join(missing, ", ")),
			Do:   "the data path goes on; see the kernel's log (dmesg) for tasks that hang",
		})
	}
	slices.SortFunc(out.Networks, func(a, b Dropped) int { return strings.Compare(a.Network+"\x00"+a.ID, b.Network+"\x00"+b.ID) })
	slices.SortFunc(errs, func(a, b Problem) int { return strings.Compare(a.What, b.What) })
	return out, errs
}

// errNoAnswer is why something of the kernel is missing in an answer.
var errNoAnswer = errors.New("the kernel has not answered")

// within asks the kernel something and waits until ctx ends, and no longer: a system
// call that hangs cannot be called off. Only one question at a time holds slot, which has
// room for one; while it hangs no further goroutine is spent on it.
func within[T any](ctx context.Context, slot chan struct{}, ask func() (T, error)) (T, error) {
	var none T
	if ctx.Err() != nil {
		return none, errNoAnswer
	}
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return none, errNoAnswer
	}
	type answer struct {
		is  T
		err error
	}
	answers := make(chan answer, 1)
	go func() {
		defer func() { <-slot }()
		is, err := ask()
		answers <- answer{is, err}
	}()
	select {
	case a := <-answers:
		return a.is, a.err
	case <-ctx.Done():
		return none, errNoAnswer
	}
}

// text is one line about the guards.
func (g Guard) text() string {
	var by []string
	for _, n := range g.Networks {
		if n.Frames > 0 {
			by = append(by, fmt.Sprintf("%d on %s", n.Frames, n.Network))
		}
	}
	return fmt.Sprintf("%d frames of containers dropped that were not theirs to send: %s", g.Dropped, strings.Join(by, ", "))
}
