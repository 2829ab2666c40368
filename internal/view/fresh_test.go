package view

import (
	"testing"
	"time"

	"sluice/internal/model"
)

// TestFreshIsWhatBecomesReadyInThisLife: for as long as its service says, and each few
// seconds there is a new view for it.
func TestFreshIsWhatBecomesReadyInThisLife(t *testing.T) {
	a := member(t, "nodeA", "192.168.0.1", one, "10.255.0.2")
	must[uint64](t)(a.PutEndpoint(t.Context(), endpoint(two, "10.255.0.3", model.Taken)))
	tell := func(ids ...model.EndpointID) {
		t.Helper()
		s := leads(swarm("nodeA", "192.168.0.1"), "web")
		o := s.Services[svc].Options[web]
		o.SlowStart = 30
		s.Services[svc].Options[web] = o
		for _, id := range ids {
			s = runs(s, id)
		}
		ok(t, a.SetEngine(t.Context(), s))
	}
	tell(one)
	if v := a.View(); len(v.Fresh) != 0 {
		t.Errorf("what was ready before is fresh: %v", v.Fresh)
	}
	tell(one, two)
	began := a.View()
	if since, is := began.Fresh[two]; !is || since != began.Now || len(began.Fresh) != 1 {
		t.Errorf("fresh: %v; want %s since %s", began.Fresh, two.Short(), began.Now)
	}
	a.clock.now = a.clock.now.Add(29 * time.Second)
	a.Ripen()
	if v := a.View(); v.Revision == began.Revision || v.Fresh[two] != began.Now {
		t.Errorf("after 29 s: revision %d, %v; before %d", v.Revision, v.Fresh, began.Revision)
	}
	a.clock.now = a.clock.now.Add(time.Second)
	a.Ripen()
	last := a.View()
	if len(last.Fresh) != 0 {
		t.Errorf("after 30 s: %v", last.Fresh)
	}
	a.Ripen()
	if v := a.View(); v.Revision != last.Revision {
		t.Error("there are new views without need")
	}
	if v := a.restarted(t).View(); len(v.Fresh) != 0 {
		t.Errorf("fresh by a restart: %v", v.Fresh)
	}
	tell(one)
	a.View()
	tell(one, two)
	if v := a.View(); len(v.Fresh) != 1 {
		t.Errorf("ready again, and not fresh: %v", v.Fresh)
	}
}
