package service_test

import (
	"fmt"
	"testing"
	"time"

	"sluice/internal/model"
	"sluice/lb/service"
)

// TestSlowStart: a fresh task's weight grows, while there are others.
func TestSlowStart(t *testing.T) {
	for _, c := range []struct {
		name, scheduler string
		weight          int
		age             map[model.EndpointID]time.Duration
		as              string // scheduler
		want            string // weights
	}{
		{"nobody is fresh", "", 0, nil, "wrr", "[1 1 1]"},
		{"all are", "", 0, map[model.EndpointID]time.Duration{"e1": 0, "e2": 1, "e3": 2}, "wrr", "[1 1 1]"},
		{"at first", "", 0, map[model.EndpointID]time.Duration{"e2": 0}, "wrr", "[10 1 10]"},
		{"half of it", "", 0, map[model.EndpointID]time.Duration{"e2": 30 * time.Second}, "wrr", "[10 5 10]"},
		{"nearly all", "", 0, map[model.EndpointID]time.Duration{"e2": 59 * time.Second}, "wrr", "[10 9 10]"},
		{"two", "lc", 0, map[model.EndpointID]time.Duration{"e2": 30 * time.Second, "e3": 6 * time.Second}, "wlc", "[10 5 1]"},
		{"a weight", "wrr", 20, map[model.EndpointID]time.Duration{"e1": 15 * time.Second}, "wrr", "[50 200 200]"},
		{"a great weight", "wrr", 255, map[model.EndpointID]time.Duration{"e1": 15 * time.Second}, "wrr", "[63 255 255]"},
		{"a clock that was set back", "", 0, map[model.EndpointID]time.Duration{"e2": -time.Hour}, "wrr", "[10 1 10]"},
		{"a hash", "mh", 0, map[model.EndpointID]time.Duration{"e2": 0}, "mh", "[1 1 1]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			s := w.told(web, vipOn(net1, webVIP))
			s.Options = map[model.NetworkID]model.ServiceOptions{net1: {Scheduler: c.scheduler, Weight: c.weight, SlowStart: 60}}
			w.Services[web] = s
			w.here("e1", web, webVIP, "10.255.0.3")
			w.there("e2", web, webVIP, "10.255.0.4")
			w.there("e3", web, webVIP, "10.255.0.5")
			v := w.View
			v.Now, v.Fresh = time.Unix(2000, 0), map[model.EndpointID]time.Time{}
			for id, age := range c.age {
				v.Fresh[id] = v.Now.Add(-age)
			}
			x := service.Virtuals(v)[0]
			var got []int
			for _, b := range x.Backends {
				got = append(got, b.Weight)
			}
			if fmt.Sprint(got) != c.want || x.Scheduler != c.as {
				t.Errorf("%s %v, want %s %s", x.Scheduler, got, c.as, c.want)
			}
		})
	}
}
