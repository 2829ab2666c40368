package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"sluice/test/cluster"
)

const (
	// calmTime is how long all requests must succeed before things are called healed:
	// twenty of each stream, so that one lost backend of three does not pass by luck.
	calmTime = 2 * time.Second
	// setUpTime bounds the making of the lab, which takes 20 s; a tree with another
	// engine is a download.
	setUpTime = 10 * time.Minute
	// endTime bounds the end: two minutes for what is removed after one, see
	// nothingLeft, and the removal itself.
	endTime = 4 * time.Minute
)

// run is one run of the soak.
type run struct {
	config
	lab     *lab
	plan    *plan
	traffic *traffic
	report  *report
	begun   time.Time
	windows []window
	usage   *usage
}

// soak runs it all. The error says why it could not be run, or not to the end; what was
// found is in the report.
func soak(ctx context.Context, c config) (*report, error) {
	sctx, cancel := context.WithTimeout(ctx, setUpTime)
	defer cancel()
	c.say("three engines, three managers, seed %d", c.seed)
	l, err := newLab(sctx, c)
	if err != nil {
		return nil, fmt.Errorf("make the lab: %w", err)
	}
	r := &run{config: c, lab: l, plan: newPlan(c.seed, hosts, l.steady, modes()), report: newReport(c), usage: newUsage(l.empty)}
	told := context.AfterFunc(ctx, func() { c.say("interrupted: what is under way is done first, then everything is taken down") })
	err = r.live(ctx)
	told()
	// The end is not the run's context's: an interrupt is no reason to leave things.
	ectx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	if err != nil {
		r.report.wrong("%v", err)
		if err := l.keepState(ectx, c.logs); err != nil {
			r.report.wrong("%v", err)
		}
	}
	r.end(ectx)
	r.report.Interrupted = ctx.Err() != nil
	if len(r.report.Wrong) > 0 {
		if err := l.cluster.KeepLogs(c.logs); err != nil {
			r.report.wrong("%v", err)
		} else {
			r.report.Logs = c.logs
		}
	}
	if err := l.cluster.Down(); err != nil {
		r.report.wrong("take the cluster down: %v", err)
	}
	return r.report, nil
}

// live is the run between its beginning and its end. An error ends it early: from then
// on nothing could be judged.
func (r *run) live(ctx context.Context) error {
	r.traffic = startTraffic(context.WithoutCancel(ctx), r.lab.streams())
	r.begun = time.Now()
	if _, err := r.heal(ctx, setUpTime, nil); err != nil {
		return fmt.Errorf("before the first operation: %w", err)
	}
	// What went before was the beginning of services, not theirs to fail.
	r.windows = append(r.windows, window{what: "the beginning", hosts: r.all(), harm: harm{clients: true, entries: true, servers: true}, from: r.begun, until: time.Now()})
	r.begun = time.Now()
	if err := r.measure(ctx); err != nil {
		return err
	}
	used, err := r.lab.used(ctx, calm)
	if err != nil {
		return err
	}
	r.report.AddressesStart = used
	for time.Since(r.begun) < r.span && ctx.Err() == nil {
		a := r.plan.next()
		step := r.operate
		if _, is := faults[a.kind]; is {
			step = r.strike
		}
		// What is begun is done: an interrupt lets a fault end.
		if err := step(context.WithoutCancel(ctx), a); err != nil {
			return err
		}
		if err := r.measure(context.WithoutCancel(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// all are the names of all hosts.
func (r *run) all() (names []string) {
	for _, h := range r.lab.cluster.Hosts() {
		names = append(names, h.Name())
	}
	return names
}

// open begins a window, which the function that it returns ends.
func (r *run) open(a action, h harm) (end func()) {
	r.windows = append(r.windows, window{what: a.String(), hosts: r.lab.names(a), harm: h, from: time.Now()})
	i := len(r.windows) - 1
	return sync.OnceFunc(func() { r.windows[i].until = time.Now() })
}

// operate does an operation.
func (r *run) operate(ctx context.Context, a action) error {
	p, hurtful := hurtful[a.kind]
	if hurtful {
		defer r.open(a, p.harm)()
	}
	within := opTime
	if a.kind == opDemote {
		within = demoteTime
	}
	if err := r.perform(ctx, a, within); err != nil || !hurtful {
		return err
	}
	_, err := r.heal(ctx, p.heal, nil)
	return err
}

// perform does an operation and notes it.
func (r *run) perform(ctx context.Context, a action, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	begun := time.Now()
	err := r.lab.do(ctx, a)
	r.report.operation(a, r.lab.names(a), begun.Sub(r.begun), time.Since(begun), err)
	r.say("%7s  %s %s (%s)", since(r.begun, begun), a, r.lab.names(a), round(time.Since(begun)))
	return err
}

// strike lets a fault happen, with the operation that is to be done while it lasts, and
// waits until all is healed.
func (r *run) strike(ctx context.Context, a action) error {
	p, begun := faults[a.kind], time.Now()
	r.say("%7s  ! %s %s", since(r.begun, begun), a, r.lab.names(a))
	closeWindow := r.open(a, p.harm)
	defer closeWindow()
	sctx, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	if err := r.lab.strike(sctx, a); err != nil {
		return errors.Join(err, r.lab.relieve(sctx, a))
	}
	var wg sync.WaitGroup
	var during error
	if a.during != nil {
		wg.Go(func() { during = r.perform(ctx, *a.during, opTime+p.heal) })
	}
	if blows[a.kind].end != nil {
		wait(ctx, a.lasts)
	}
	rctx, cancel := context.WithTimeout(ctx, p.heal)
	defer cancel()
	ended := time.Now()
	if err := r.lab.relieve(rctx, a); err != nil {
		wg.Wait()
		return errors.Join(err, during)
	}
	// What the operation is about is its own to wait for.
	at, err := r.heal(ctx, p.heal-time.Since(ended), a.during)
	if err != nil && a.during != nil {
		// What it changes is seen half done at each look, on a machine that is busy.
		wg.Wait()
		at, err = r.heal(ctx, p.heal, nil)
	}
	healed := at.Sub(ended)
	closeWindow()
	wg.Wait()
	r.report.fault(a, r.lab.names(a), begun.Sub(r.begun), ended.Sub(begun), healed, p)
	if err = errors.Join(err, during); err != nil {
		return fmt.Errorf("%s %v: not healed within %s: %w", a, r.lab.names(a), p.heal, err)
	}
	r.say("%7s  healed, %s after its end", since(r.begun, time.Now()), round(healed))
	return nil
}

// heal waits until nothing is wrong but what an operation is about that is under way,
// and says since when that is so.
func (r *run) heal(ctx context.Context, within time.Duration, but *action) (since time.Time, err error) {
	// The observation is not the healing.
	ctx, cancel := context.WithTimeout(ctx, within+calmTime)
	defer cancel()
	services, clients := map[string]int{}, map[string][]string{}
	for _, s := range r.plan.services {
		services[s.name] = s.replicas
	}
	for _, c := range r.plan.clients {
		h := r.lab.cluster.Host(c.host).Name()
		clients[h] = append(clients[h], c.name)
	}
	if but != nil {
		delete(services, but.name)
		for h := range clients {
			clients[h] = slices.DeleteFunc(clients[h], func(name string) bool { return name == but.name })
		}
	}
	if err := cluster.Wait(ctx, "swarm and kernels are as they should be", func(ctx context.Context) error {
		since = time.Now()
		return r.lab.healed(ctx, services, clients)
	}); err != nil {
		return time.Now(), err
	}
	err = cluster.Wait(ctx, "all requests succeed", func(context.Context) error {
		good, bad := r.traffic.since()
		if len(bad) > 0 {
			return fmt.Errorf("not of: %v", bad)
		}
		if good.After(since) {
			since = good
		}
		if time.Since(since) < calmTime {
			return fmt.Errorf("all do since %s", round(time.Since(since)))
		}
		return nil
	})
	if err != nil {
		since = time.Now()
	}
	return since, err
}

// end removes everything, looks whether it is gone, and judges.
func (r *run) end(ctx context.Context) {
	r.report.Took = time.Since(r.begun)
	if r.traffic == nil {
		return
	}
	if r.report.AddressesStart > 0 {
		r.finalAddresses(ctx)
	}
	r.judge(r.traffic.end())
	r.report.Requests = r.traffic.counts()
	r.report.finish()
	r.say("%7s  everything is removed", since(r.begun, time.Now()))
	if err := r.lab.remove(ctx, r.plan); err != nil {
		r.report.wrong("remove everything: %v", err)
	} else if err := r.lab.nothingLeft(ctx); err != nil {
		r.report.Left = err.Error()
		r.report.wrong("something is left behind: %v", err)
	}
	if err := r.measure(ctx); err != nil {
		r.report.wrong("%v", err)
	}
	r.usage.into(r.report)
}

// finalAddresses compares the addresses in use on the network that is always there, with
// the services and clients that it always has.
func (r *run) finalAddresses(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, opTime)
	defer cancel()
	err := cluster.Wait(ctx, fmt.Sprintf("%d addresses of %s are in use, as at the start", r.report.AddressesStart, calm), func(ctx context.Context) (err error) {
		if r.report.AddressesEnd, err = r.lab.used(ctx, calm); err == nil && r.report.AddressesEnd != r.report.AddressesStart {
			err = fmt.Errorf("%d are", r.report.AddressesEnd)
		}
		return err
	})
	if err != nil {
		r.report.wrong("%v", err)
	}
}

// judge asks of each failure what explains it.
func (r *run) judge(all []failure) {
	for _, f := range all {
		fit := explain(f, r.windows)
		if slices.ContainsFunc(fit, func(w window) bool { return w.what == "the beginning" }) {
			continue
		}
		r.report.failure(f, f.from.Sub(r.begun), fit)
	}
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Millisecond) }

// since is a time of the run, as the progress begins its lines.
func since(begun, at time.Time) string { return fmt.Sprintf("%.1fs", at.Sub(begun).Seconds()) }
