package reconcile

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"sluice/internal/kernel"
)

// Fight is something that others change again and again while the loop mends it.
type Fight struct {
	What  string // kind and place of the objects
	Times int    // read-backs that found it changed
	Since time.Time
	Cause string // how the last one was noticed
}

const (
	// repeatTime is how long a drift that was logged is only counted when it comes
	// again; then it is logged in one line. A program that fights comes every few
	// seconds or faster.
	repeatTime = time.Minute
	// restTime without a drift ends a fight: what comes every minute is one.
	restTime = 2 * time.Minute
	// fightTimes makes a fight. A person who tries things out deletes one thing
	// twice or three times.
	fightTimes = 5
)

// drifts remembers what was mended. A thing is what objects of one kind in one
// namespace are; there are some ten for each namespace.
type drifts struct {
	kinds  map[string]uint64
	things map[string]*repeated
}

// repeated is a thing that was mended lately.
type repeated struct {
	first, last, logged time.Time
	times               int
	unsaid              int // of times, those that were not logged
	cause               string
}

func newDrifts() drifts {
	d := drifts{kinds: make(map[string]uint64), things: make(map[string]*repeated)}
	for _, k := range kernel.Kinds() {
		d.kinds[k] = 0
	}
	return d
}

// add counts what was mended, and reports whether any of it is worth a line.
func (d *drifts) add(ops []kernel.Op, cause string, now time.Time) (say bool) {
	here := make(map[string]bool)
	for _, o := range ops {
		d.kinds[kernel.KindOf(o.Key)]++
		here[thing(o.Key)] = true
	}
	for t := range here {
		r := d.things[t]
		if r == nil {
			r = &repeated{first: now}
			d.things[t] = r
		}
		r.times, r.last, r.cause = r.times+1, now, cause
		r.unsaid++
		if now.Sub(r.logged) >= repeatTime && r.unsaid == 1 {
			say = true
		}
	}
	if say {
		for t := range here {
			d.things[t].logged = now
			d.things[t].unsaid-- // this one; what was not said before is still summed up
		}
	}
	return say
}

// thing names kind and place.
func thing(k kernel.Key) string {
	kind := kernel.KindOf(k)
	switch ns, task := strings.CutPrefix(k.Netns(), "task:"); {
	case task:
		return kind + " in the task's namespace " + ns
	case ns == "":
		return kind + " of the host"
	default:
		return kind + " in namespace " + ns
	}
}

// summary is a thing with how often it was mended without a line.
type summary struct {
	what, cause string
	times       int
}

// due takes what has to be summed up, in order, and forgets what has come to rest.
func (d *drifts) due(now time.Time) []summary {
	var out []summary
	for _, t := range slices.Sorted(maps.Keys(d.things)) {
		r := d.things[t]
		if r.unsaid > 0 && now.Sub(r.logged) >= repeatTime {
			out = append(out, summary{t, r.cause, r.unsaid})
			r.unsaid, r.logged = 0, now
		}
		if now.Sub(r.last) >= restTime {
			delete(d.things, t)
		}
	}
	return out
}

// fights lists what is changed again and again, in order.
func (d *drifts) fights(now time.Time) []Fight {
	var out []Fight
	for t, r := range d.things {
		if r.times >= fightTimes && now.Sub(r.last) < restTime {
			out = append(out, Fight{What: t, Times: r.times, Since: r.first, Cause: r.cause})
		}
	}
	slices.SortFunc(out, func(a, b Fight) int { return cmp.Compare(a.What, b.What) })
	return out
}

// right reports whether what o changes was as it should be by what was remembered.
func right(remembered kernel.State, o kernel.Op) bool {
	was, ok := remembered[o.Key]
	if o.Want == nil {
		return !ok
	}
	return ok && kernel.Same(was, o.Want)
}

// tell counts drift and logs it: one line for a round, none for what is mended again
// within a minute, and one that sums that up.
func (w *worker) tell(ops []kernel.Op, now time.Time) {
	cause := "a read-back"
	if len(w.causes) > 0 {
		cause = "notice: " + strings.Join(w.causes, "; ")
	}
	w.mu.Lock()
	sums := w.drift.due(now)
	say := len(ops) > 0 && w.drift.add(ops, cause, now)
	w.mu.Unlock()
	for _, s := range sums {
		w.cfg.Log.Warn("drift mended again and again", "what", s.what, "times", s.times, "cause", s.cause)
	}
	if !say {
		return
	}
	var first []string
	for _, o := range ops[:min(len(ops), maxCauses)] {
		first = append(first, o.String())
	}
	w.cfg.Log.Info("drift mended", "cause", cause, "objects", len(ops), "first", strings.Join(first, " | "))
}
