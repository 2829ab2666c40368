package ingress

import "testing"

func FuzzParsePool(f *testing.F) {
	for _, s := range []string{"250.0.0.0/8", "250.0.0.0/31", "::/0", "10.0.0.1/8", "", "0.0.0.0/0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParsePool(s)
		if err != nil {
			return
		}
		if again, err := ParsePool(p.String()); err != nil || again != p || !p.Addr().Is4() || p != p.Masked() {
			t.Errorf("%q is %s, which is %s, %v", s, p, again, err)
		}
	})
}
