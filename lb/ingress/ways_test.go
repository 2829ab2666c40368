package ingress_test

import (
	"testing"

	"sluice/driver/overlay"
	"sluice/internal/kernel"
	"sluice/lb/ingress"
	"sluice/lb/service"
)

// TestWaysAreThoseOfThePlan: every service of IPVS is told by its address, client and
// port, and none that there is not.
func TestWaysAreThoseOfThePlan(t *testing.T) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld()
			c.edit(&w)
			w.View.Self.Datapath = service.IPVS
			want := planned(w.View)
			ways := service.Ways(w.View, ingress.Balanced(w.View))
			told := make(map[kernel.Key]bool)
			for _, x := range ways {
				ns := overlay.NetnsName(w.Networks[x.Network])
				k := kernel.IPVSService{NS: ns, Mark: x.Mark}
				if told[k] || want[k] == nil {
					t.Errorf("%+v is told twice, or not planned", x)
				}
				told[k] = true
				m, marked := want[kernel.Mark{NS: ns, VIP: x.At, Client: x.Client, Proto: x.Port.Proto, Port: x.Port.From}].(kernel.MarkSpec)
				if marked && m.Mark != x.Mark {
					t.Errorf("%+v has mark %d in the plan", x, m.Mark)
				}
			}
			for k := range want {
				if s, ok := k.(kernel.IPVSService); ok && !told[s] {
					t.Errorf("%s is not told", k)
				}
			}
		})
	}
}
