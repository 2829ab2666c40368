package nft

import "testing"

// FuzzRuleText: a rule's comment carries what the table was made from. What is read of
// one is what would be written, so that a table that others changed is seen.
func FuzzRuleText(f *testing.F) {
	for _, s := range []string{
		"answers to the stack, router 02:42:0a:ff:00:01", "the host's own, source 10.0.0.1 subnet 10.0.0.0/8",
		"mesh 10.255.0.2 from 250.0.0.0/8 at 02:42:0a:ff:00:01 in 10.255.0.0/20 udp 10.0.0.1", "to a VIP, ", "from 10.0.0.0/8", "a b c d e f g h i", " [", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if spec, ok := parseLiftText(s); ok && liftText(spec) != s {
			t.Errorf("%q is read as %q", s, liftText(spec))
		}
		if spec, ok := parseEntryText(s); ok && entryText(spec) != s {
			t.Errorf("%q is read as %q", s, entryText(spec))
		}
		if m, ok := parseMeshed(s); ok && m.text() != s {
			t.Errorf("%q is read as %q", s, m.text())
		}
		if spec, ok := parseNetText(s); ok && (!spec.Source.Is4() || !spec.Subnet.IsValid()) {
			t.Errorf("%q is read as %+v", s, spec)
		}
		if spec, ok := parseBackText(s); ok && checkBack(spec) != nil {
			t.Errorf("%q is read as %+v", s, spec)
		}
		parsePickText(s)
		parseAllow([]string{s, uncomment(s)})
	})
}
